"""Which backend computes a call, and why; this file holds all conditions.

A backend is two functions. ``route`` scores the tokens and selects the k best experts of each. It
returns a Routing and a plan, which is whatever the function ``experts`` needs to run them. To add a
backend, make a folder with two such functions, and enter it in the layers of pyproject.toml and in
the list of modules in the documentation. Then add its name to ``BACKENDS``, its import to
``load``, and the conditions under which it is chosen to ``choose``.

``eager`` is plain PyTorch, and supports every call. ``triton``, the folder ``fused``, has kernels
for the router, the dispatch and the experts. It supports the calls for which ``_obstacle`` returns
nothing. Both use the same parameters. From the same seed they draw different noise and dropout.
``aten`` replaces both while a program is exported, so that the program has none of their operators.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from . import aten
from ._torch_private import constant_for_dynamo, exporting, has_autocast
from .activations import ACTIVATIONS
from .checks import check_choice
from .eager import experts as eager_experts
from .eager import router as eager_router
from .tensors import Routing

__all__ = ["explain"]

BACKENDS = ("auto", "eager", "triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS, MAX_K = 64, 8
# A tile holds tokens of one sample, since each sample has a router. If samples have few tokens,
# most of a tile is empty, and a sample's share of the router's gradient is larger than its x. Also,
# with a mask each program searches all samples for its own.
MIN_TOKENS_PER_SAMPLE, MAX_SAMPLES = 16, 4096
# Numbers of (token, slot) pairs have 32 bits. So have those behind the last of them in a block, and
# the largest block, a chunk of the router's backward, has 2**21. What they point to may be larger.
MAX_PAIRS = 2**31 - 2**22


class Choice(NamedTuple):
    """The backend of a call, and the reason for it as a sentence."""

    backend: str
    reason: str


class Backend(NamedTuple):
    """The two functions of a backend.

    Attributes:
        route: (x, weights, rows_BN, tokens_per_sample, k, seed) -> (Routing, plan); see
            ``eager.router.route``.
        experts: (x_TD, plan, gates_TK, weights, options) -> y_TD; see ``eager.experts.experts``.
        plans_by_routing: Whether its plan is the routing's ``expert_indices``. Else the plan is a
            named tuple with a field ``x``: the tokens that the experts take, or None if they
            take the layer's own.
    """

    route: Callable[..., tuple[Routing, Any]]
    experts: Callable[..., Tensor]
    plans_by_routing: bool = False


def load(name: str) -> Backend:
    """Returns the backend of a name that ``choose`` gave; Triton is imported only here."""
    if name == "eager":
        return Backend(eager_router.route, eager_experts.experts, plans_by_routing=True)
    if name == "aten":
        return Backend(aten.route, aten.experts, plans_by_routing=True)
    if name == "triton":
        from .fused import experts as fused_experts
        from .fused import router as fused_router

        return Backend(fused_router.route, fused_experts.experts)
    raise ValueError(f"backend: got {name!r}, expected 'eager', 'aten' or 'triton'.")


def choose(layer: Any, x: Tensor, dtype: torch.dtype) -> Choice:
    """Chooses the backend that a DMoE uses for a call.

    Args:
        layer: The layer.
        x: Its tokens, (B, T, D).
        dtype: The dtype in which the experts compute: that of x, or that of autocast.

    Raises:
        RuntimeError: The layer has ``backend="triton"``, and Triton does not support this call.
    """
    check_choice("backend", layer.backend, BACKENDS)
    if exporting():
        return Choice("aten", "a program is being exported, and may run without this package")
    if layer.backend == "eager":
        return Choice("eager", "the layer has backend='eager'")
    if layer.backend == "auto" and not x.is_cuda:
        return Choice("eager", f"x is on {x.device.type}, where plain PyTorch is the backend")
    obstacle = _obstacle(layer, x, dtype)
    if not obstacle:
        return Choice("triton", "its kernels support the call")
    if layer.backend == "triton":
        raise RuntimeError(
            f"backend='triton': {obstacle}. backend='auto' uses the eager backend for this call."
        )
    return Choice("eager", obstacle)


def explain(layer: Any, x: Tensor) -> str:
    """Says which backend a [`DMoE`][dmoe_layer.DMoE] uses for an input, and why.

    Args:
        layer: The layer.
        x: An input of the layer. Nothing is computed with it.

    Returns:
        A text: the backend's name, "eager" or "triton", and the reason. If the layer has
            ``backend="triton"`` and the kernels do not support this call, the text begins with
            "error" and says why.

    Raises:
        ValueError: The layer refuses the shape or the device of x, whatever the backend.
        TypeError: The layer refuses the dtype of x, whatever the backend.

    Examples:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> from dmoe_layer.backend import explain
        >>> explain(DMoE(16), torch.randn(2, 10, 16))
        'eager: x is on cpu, where plain PyTorch is the backend'
    """
    layer._check_input(x, None)
    x_BTD = rearrange(layer._samples_first(x), "b ... d -> b (...) d")
    dtype = autocast_dtype(x) or x.dtype
    try:
        choice = choose(layer, x_BTD, dtype)
    except RuntimeError as error:
        return f"error: {error}"
    reason = choice.reason
    if choice.backend == "triton":
        reason = _kernels_for(x_BTD.shape[-1], dtype, layer.activation)
    return f"{choice.backend}: {reason}"


def _kernels_for(dim: int, dtype: torch.dtype, activation: str) -> str:
    """Says which of the Triton kernels compute experts of this width."""
    from .fused.narrow import fuses_backward, fuses_forward

    if not fuses_forward(dim, dtype):
        return f"D = {dim} is wide, so that grouped matrix products compute the two layers"
    but = "" if fuses_backward(dim, dtype, activation) else ", except in backward"
    return f"D = {dim} is narrow, so that the hidden layer stays in registers{but}"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast, if it is on. As in PyTorch's own operators, fp64 stays fp64."""
    device = x.device.type
    if x.dtype == torch.float64 or not has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _obstacle(layer: Any, x_BTD: Tensor, dtype: torch.dtype) -> str:
    """Says why the kernels do not support the call; empty if they do."""
    if machine := _obstacle_of_machine(x_BTD.device.type, x_BTD.device.index or 0):
        return machine
    for what, given in (
        ("x", x_BTD.dtype),
        ("the parameters", layer.w1_EHD.dtype),
        ("the router's parameters", layer.router.w_A2ED.dtype),
        ("autocast", dtype),
    ):
        if given not in DTYPES:
            return f"{what}: {given}, but the kernels take only {', '.join(map(str, DTYPES))}"
    if not ACTIVATIONS[layer.activation].fused:
        return f"activation is {layer.activation}, which the kernels do not support"
    if layer.n_experts > MAX_EXPERTS:
        return f"n_experts is {layer.n_experts}, but the kernels take at most {MAX_EXPERTS}"
    if layer.k > MAX_K:
        return f"k is {layer.k}, but the kernels take at most {MAX_K}"
    samples, tokens = x_BTD.shape[:2]
    if samples * tokens * layer.k > MAX_PAIRS:
        return (
            f"{samples * tokens} tokens times k = {layer.k} is more than the kernels take, "
            f"{MAX_PAIRS}"
        )
    if layer.attribute_sizes is None:
        return ""
    if samples > MAX_SAMPLES:
        return (
            f"the batch has {samples} samples, but with attributes the kernels take at most "
            f"{MAX_SAMPLES}"
        )
    if tokens < MIN_TOKENS_PER_SAMPLE:
        return (
            f"a sample has {tokens} tokens, but with attributes the kernels need at least "
            f"{MIN_TOKENS_PER_SAMPLE}"
        )
    return ""


@constant_for_dynamo
def _obstacle_of_machine(device: str, index: int) -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return ""
    if device != "cuda":
        return f"x is on {device}, but the kernels need a GPU"
    if torch.version.hip is not None:
        return "PyTorch was built for ROCm, but the kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        major, minor = capability
        return f"the GPU has compute capability {major}.{minor}, but the kernels need 8.0"
    return ""
