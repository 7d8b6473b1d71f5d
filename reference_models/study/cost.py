"""What the study's methods cost: multiply-adds of a forward pass, and milliseconds of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dmoe_layer import DMoE

from ..inference import call
from ..recipe import Recipe, SquareSettings


def multiply_adds(model: nn.Module, recipe: Recipe, n_attributes: int) -> int:
    """Of all that is active for one image: convolutions, matrix products, and the experts' share.

    Args:
        model: a 2D network, in eval mode.
        recipe: its own; says how large an image is.
        n_attributes: of the data.
    """
    assert isinstance(recipe.frame, SquareSettings)
    experts = 0

    def count(layer: DMoE, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # PyTorch's counter does not see inside of DMoE, whose operators are its own: two products
        # with each of k experts' weights, and the router's scores (with their noise, twice).
        nonlocal experts
        tokens = output.numel() // output.shape[layer.channel_dim]
        n_experts, hidden, dim = layer.w1_EHD.shape
        scores = n_experts * dim * (2 if layer.router.noise == "always" else 1)
        experts += tokens * (2 * layer.k * dim * hidden + scores)

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, DMoE)
    ]
    image_1CHW = torch.zeros(1, model.in_channels, recipe.frame.size, recipe.frame.size)
    told_1A = torch.zeros(1, n_attributes, dtype=torch.int64)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call(model, [image_1CHW], told_1A)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + experts
