"""Adapts a trained network to one site more, of which a few labelled cases are there.

Shapes: S sites, Z zones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dmoe_layer.surgery import add_attribute_value

from ..methods import Method
from .cases import Cases
from .learning import build, endless_batches, loss_of

BATCH_SIZE = 8
# What is trained: what the network has of the new site alone (a router, a row of FiLM's, an MLP,
# the weights of an input channel), or all weights.
Part = Literal["own", "all"]
PARTS: tuple[Part, ...] = ("own", "all")


@dataclass(frozen=True)
class Extended:
    """A network with one site more, the last.

    Args:
        network: the other sites' outputs are what they were.
        own: of the parameters that grew, by name, along which dimension; the last place is the new
            site's. Empty of a network that is told no site.
    """

    network: nn.Module
    own: dict[str, int]

    @property
    def numbers(self) -> int:
        """How many numbers the new site has of its own."""
        parameters = dict(self.network.named_parameters())
        return sum(
            parameters[name].numel() // parameters[name].shape[dim]
            for name, dim in self.own.items()
        )


def extended(method: Method, network: nn.Module, sites: int) -> Extended:
    """A copy of a network of `build` with one site more, which starts as the mean of the others.

    Args:
        method: of the network.
        network: stays as it is.
        sites: how many it is told apart.
    """
    if not method.settings.told:
        return Extended(copy.deepcopy(network), {})
    before = network.state_dict()
    if method.settings.block == "moe":
        grown = copy.deepcopy(network)
        add_attribute_value(grown)
    else:
        grown = build(method, sites + 1, seed=0)
    after, own = grown.state_dict(), dict[str, int]()
    for name, new in after.items():
        old = before[name]
        if old.shape == new.shape:
            new.copy_(old)
            continue
        (own[name],) = (d for d in range(new.dim()) if new.shape[d] != old.shape[d])
        if method.settings.block != "moe":
            # Before the sites' places may stand others: of a convolution those of the image.
            of_sites = old.narrow(own[name], old.shape[own[name]] - sites, sites)
            mean = of_sites.mean(own[name], keepdim=True)
            new.copy_(torch.cat([old, mean], dim=own[name]))
    return Extended(grown, own)


def adapt(
    method: Method,
    start: Extended,
    part: Part,
    labelled: Cases,
    rules_SZ: Tensor,
    *,
    rate: float,
    steps: tuple[int, ...],
    seed: int,
) -> Iterator[tuple[int, nn.Module]]:
    """Trains on the labelled cases of the new site, and hands the network over after some steps.

    Args:
        method: of the network.
        start: stays as it is.
        part: what is trained.
        labelled: cases of the new site alone.
        rules_SZ: which zones each site outlines, the new one the last.
        rate: the learning rate.
        steps: after which the network is handed over, in rising order.
        seed: of batches, windows, routing noise and dropout.

    Raises:
        ValueError: the network has nothing of the new site's own.
    """
    network = copy.deepcopy(start.network)
    parameters = dict(network.named_parameters())
    decay = 0.01  # AdamW's own
    if part == "own":
        if not start.own:
            raise ValueError("part: got 'own', but the network receives no site; expected 'all'.")
        decay = 0.0  # which would move the other sites'
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in start.own)
            if name in start.own:
                parameter.register_hook(_last_alone(start.own[name]))
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    batches = endless_batches(labelled, BATCH_SIZE, seed)
    torch.manual_seed(seed)
    for step in range(1, steps[-1] + 1):
        loss = loss_of(method, network, next(batches), rules_SZ)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in steps:
            yield step, network


def _last_alone(dim: int) -> Callable[[Tensor], Tensor]:
    """Keeps the gradient of the last place along a dimension, and takes the others' away."""

    def keep(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        last = gradient.shape[dim] - 1
        kept.select(dim, last).copy_(gradient.select(dim, last))
        return kept

    return keep
