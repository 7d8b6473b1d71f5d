"""The router: scores every token with its sample's own router, and keeps the k best experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import aten
from ._torch_private import exporting, has_forward_hooks
from .attributes import UNKNOWN_POLICIES, as_attributes, as_sizes, check_attributes, per_token
from .checks import check_choice, check_count, check_device, check_is_no_proxy, describe
from .eager.router import route as eager_route
from .lazy import LazyDim
from .operators import draw_seed, refuse_functional_derivatives
from .tensors import RouterWeights, Routing

NOISE = ("train", "always", "never")


class BackendRoute:
    """A backend's ``route`` as a layer hands it to its router.

    The router returns the Routing alone, as to anybody, and its hooks see nothing else; the plan
    is left here for the layer.

    Attributes:
        plan: after the call, what the backend's ``experts`` need of it.
        wants_attributes: whether anybody will read the Routing's attributes, a number a token.
    """

    def __init__(
        self, route: Callable[..., tuple[Routing, Any]], wants_attributes: bool = True
    ) -> None:
        self._route, self.wants_attributes = route, wants_attributes
        self.plan: Any = None
        self._indices: Tensor | None = None

    def __call__(self, *inputs: Any) -> Routing:
        routing, self.plan = self._route(*inputs)
        self._indices = routing.expert_indices
        return routing

    def plan_of(self, routing: Routing) -> Any:
        """The plan, or an error where a hook or a router of one's own has chosen other experts."""
        replaced = not torch.compiler.is_compiling() and routing.expert_indices is not self._indices
        if self.plan is None or replaced:
            raise RuntimeError(
                "backend='triton': the router's experts were replaced (by a hook or a router of "
                "your own), but are sorted already. Use backend='eager', which follows them."
            )
        return self.plan


class AttributeRouter(LazyDim):
    """Noisy top-k gating with one router for each attribute value.

    For a token x of a sample whose attribute has value a (Oh et al., ICML 2025,
    arXiv:2502.00619, after Shazeer et al., arXiv:1701.06538)::

        R(x) = x·W_a + b_a + N(0,1) * softplus(x·W'_a + b'_a)      noise as ``noise`` says
        K(x) = softmax over the k largest of R(x)

    All routers stand in two parameters, ``w_A2ED`` (A, 2, E, D) and ``bias`` (A, 2, E); index 0 of
    the axis of length 2 has the clean weights W and b, index 1 the noise weights W' and b'. So the
    value that is absent from a batch still gets a zero gradient. Scores, softmax and gates are at
    least fp32, also under autocast.

    Args:
        dim: width D of a token; None learns it from the first input or a state_dict.
        n_experts: E.
        k: experts a token.
        attribute_sizes: None (one router for all), an int (one attribute with that many
            values) or a tuple (several attributes; their routers' scores, clean and noise, are
            summed).
        unknown: what the attribute value -1 does: "error" raises, "average" averages that
            attribute's routers' scores, "learned" has a router of its own.
        noise: "train" (in training only), "always" (what the paper's released code does),
            "never".
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: for an option that does not fit, at construction.
        MissingAttributesError: if called without attributes though ``attribute_sizes`` is set.

    Example:
        >>> import torch
        >>> from dmoe_layer import AttributeRouter
        >>> router = AttributeRouter(16, n_experts=8, k=2, attribute_sizes=3)
        >>> routing = router(torch.randn(4, 10, 16), torch.tensor([0, 2, 2, 1]))
        >>> routing.expert_indices.shape, routing.gates.shape, routing.logits.shape
        (torch.Size([40, 2]), torch.Size([40, 2]), torch.Size([40, 8]))
    """

    _dim_from = "w_A2ED"
    w_A2ED: Tensor
    bias: Tensor

    def __init__(
        self,
        dim: int | None,
        n_experts: int = 8,
        k: int = 2,
        *,
        attribute_sizes: int | tuple[int, ...] | None = None,
        unknown: str = "error",
        noise: str = "train",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim is not None:
            check_count("dim", dim)
        check_count("n_experts", n_experts)
        check_count("k", k)
        if k > n_experts:
            raise ValueError(f"k: got {k}, expected at most n_experts={n_experts}.")
        check_choice("unknown", unknown, UNKNOWN_POLICIES)
        check_choice("noise", noise, NOISE)
        self.n_experts, self.k, self.unknown, self.noise = n_experts, k, unknown, noise
        self.sizes = as_sizes(attribute_sizes)
        self.attribute_sizes = attribute_sizes
        self._create_parameters(dim, device, dtype)

    def _shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        routers = sum(self.sizes or (1,))
        if self.sizes is not None and self.unknown == "learned":
            routers += len(self.sizes)
        return {"w_A2ED": (routers, 2, self.n_experts, dim), "bias": (routers, 2, self.n_experts)}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws weights and biases as ``nn.Linear`` does; nothing if the width is not known."""
        if self.dim is None:
            return
        bound = 1 / math.sqrt(self.w_A2ED.shape[-1])
        nn.init.uniform_(self.w_A2ED, -bound, bound, generator)
        nn.init.uniform_(self.bias, -bound, bound, generator)

    def initialize_parameters(
        self,
        x: Tensor,
        attributes: Any = None,
        *,
        tokens_per_sample: Tensor | None = None,
        route: BackendRoute | None = None,
    ) -> None:
        """Learns ``dim`` from the first input, once nothing is wrong with it."""
        self._check_input(x, tokens_per_sample)
        check_device(x, self.w_A2ED, "router")
        batch = (x if tokens_per_sample is None else tokens_per_sample).shape[0]
        self.values_of(x, batch, attributes)
        self._learn_dim(x.shape[-1])

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, n_experts={self.n_experts}, k={self.k}, "
            f"attribute_sizes={self.attribute_sizes}, unknown={self.unknown!r}, "
            f"noise={self.noise!r}"
        )

    def forward(
        self,
        x: Tensor,
        attributes: Any = None,
        *,
        tokens_per_sample: Tensor | None = None,
        route: BackendRoute | None = None,
    ) -> Routing:
        """Routes every token.

        Args:
            x: (B, T, D); or, with ``tokens_per_sample``, the samples' tokens one after another,
                (sum of the counts, D).
            attributes: integers, (B,) or (B, n); a batch of 1 or a scalar applies to every
                sample; -1 is unknown.
            tokens_per_sample: (B,) int64, how many tokens of a ragged batch each sample has.
            route: that of a :class:`DMoE`, which has checked x; None: plain PyTorch's.

        Returns:
            Routing, over all tokens sample after sample.
        """
        if route is None:
            route = BackendRoute(aten.route if exporting() else eager_route)
            self._check_input(x, tokens_per_sample)
        check_device(x, self.w_A2ED, "router")
        refuse_functional_derivatives(x)
        batch = (x if tokens_per_sample is None else tokens_per_sample).shape[0]
        values_BN = self.values_of(x, batch, attributes)
        noisy = self.noise == "always" or (self.noise == "train" and self.training)
        seed = draw_seed() if noisy else None
        weights = RouterWeights(self._table(self.w_A2ED), self._table(self.bias))
        rows_BN = None if self.sizes is None or values_BN is None else self._rows(values_BN)
        routing = route(x, weights, rows_BN, tokens_per_sample, self.k, seed)
        if values_BN is None or not route.wants_attributes:
            return routing
        attributes_T = per_token(values_BN, routing.logits.shape[0], tokens_per_sample)
        # Not by _replace, which torch.compile traces from PyTorch 2.10 on only.
        return Routing(routing.expert_indices, routing.gates, routing.logits, attributes_T)

    def values_of(self, x: Tensor, batch: int, attributes: Any) -> Tensor | None:
        """The attribute values of ``batch`` samples, (B, n) on ``x``'s device, or an error.

        A router without ``attribute_sizes`` takes a scope's attributes, which are only recorded,
        refuses any others, and has None without.
        """
        values, bounds_2N, from_scope = None, None, False
        if attributes is not None:
            values, bounds_2N, from_scope = as_attributes(attributes)
        if self.sizes is not None:
            sizes: list[int] | None = list(self.sizes)
        elif attributes is None:
            return None
        else:
            sizes = None if from_scope else []
        return check_attributes(x, batch, values, bounds_2N, sizes, self.unknown)

    def _check_input(self, x: Tensor, tokens_per_sample: Tensor | None) -> None:
        check_is_no_proxy(x)
        ragged = tokens_per_sample is not None
        form = f"({'tokens' if ragged else 'B, T'}, {self.dim or 'dim'})"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x: got {describe(x)}, expected a floating-point tensor {form}.")
        if (
            x.ndim != (2 if ragged else 3)
            or x.shape[-1] == 0
            or (self.dim is not None and self.dim != x.shape[-1])
        ):
            raise ValueError(f"x: got {describe(x)}, expected {form}.")

    def _table(self, parameter: Tensor) -> Tensor:
        """All rows that a value can point to: every value's router, then the unknown ones."""
        if self.unknown != "average" or self.sizes is None:
            return parameter
        parameter = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        means = [part.mean(dim=0, keepdim=True) for part in parameter.split(self.sizes)]
        return torch.cat([parameter, *means])

    def _rows(self, values_BN: Tensor) -> Tensor:
        """The row of the table for each sample and attribute: its value's, or its unknown's."""
        sizes = self.sizes or ()
        starts = (0, *itertools.accumulate(sizes))
        columns = []
        for i, values_B in enumerate(values_BN.unbind(dim=1)):
            rows_B = values_B + starts[i] if i else values_B
            if self.unknown != "error":
                rows_B = torch.where(values_B < 0, starts[-1] + i, rows_B)
            columns.append(rows_B)
        return torch.stack(columns, dim=1) if len(columns) > 1 else columns[0][:, None]


def is_watched(router: nn.Module) -> bool:
    """Whether others than its layer see what a router returns: hooks, or a class of their own."""
    return type(router) is not AttributeRouter or has_forward_hooks(router)
