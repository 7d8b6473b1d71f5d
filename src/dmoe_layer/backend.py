"""Which backend computes a call, and why: the conditions stand here and nowhere else.

A backend is two functions. ``route`` scores the tokens and keeps the k best experts of each; it
returns a Routing and a plan, which is whatever its ``experts`` needs to run the experts. To add a
backend: a folder with two such functions, which takes its place among the rooms in pyproject.toml
and README.md; its name in ``BACKENDS``; how to import it in ``load``; and in ``choose`` the
conditions under which it is taken.

``eager`` is plain PyTorch and takes everything. ``triton``, the folder ``fused``, has the router's
top-k and dispatch and the experts' MLPs fused into kernels of its own, for what ``_obstacle`` finds
nothing against. Both use the same parameters. They draw other noise and dropout from the same seed.
``aten`` takes the place of either while a program is exported: none of their operators is in it.
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

BACKENDS = ("auto", "eager", "triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS, MAX_K = 64, 8
# A tile holds tokens of one sample, since each sample has a router. With few tokens a sample most
# of a tile would be empty, and a sample's share of the router's gradient larger than its x;
# and each program looks through the samples to find its own.
MIN_TOKENS_PER_SAMPLE, MAX_SAMPLES = 16, 4096
# Numbers of (token, slot) pairs are kept in 32 bits; what they point to may be larger.
MAX_PAIRS = 2**31 - 1


class Choice(NamedTuple):
    """The backend of a call, and the reason in words."""

    backend: str
    reason: str


class Backend(NamedTuple):
    """The two functions of a backend.

    Attributes:
        route: (x, weights, rows_BN, tokens_per_sample, k, seed) -> (Routing, plan); see
            ``eager.router.route``.
        experts: (x_TD, plan, gates_TK, weights, options) -> y_TD; see ``eager.experts.experts``.
        plans_by_routing: whether its plan is the routing's ``expert_indices``.
    """

    route: Callable[..., tuple[Routing, Any]]
    experts: Callable[..., Tensor]
    plans_by_routing: bool = False


def load(name: str) -> Backend:
    """The backend that :func:`choose` has named; Triton is imported only here."""
    if name == "eager":
        return Backend(eager_router.route, eager_experts.experts, plans_by_routing=True)
    if name == "aten":
        return Backend(aten.route, aten.experts, plans_by_routing=True)
    if name == "triton":
        from .fused import experts as fused_experts
        from .fused import router as fused_router

        return Backend(fused_router.route, fused_experts.experts)
    raise ValueError(f"backend: got {name!r}, which is none that could be loaded.")


def choose(layer: Any, x: Tensor, dtype: torch.dtype) -> Choice:
    """The backend that ``layer``, a :class:`DMoE`, takes for its tokens x (B, T, D).

    Args:
        dtype: what the experts compute in: x's, or autocast's.

    Raises:
        RuntimeError: if the layer was told to use Triton, which cannot take this call.
    """
    check_choice("backend", layer.backend, BACKENDS)
    if exporting():
        return Choice("aten", "a program is being exported, and may run where this package is not")
    if layer.backend == "eager":
        return Choice("eager", "the layer was told to use it")
    if layer.backend == "auto" and not x.is_cuda:
        return Choice("eager", f"x is on {x.device.type}, where plain PyTorch is the backend")
    obstacle = _obstacle(layer, x, dtype)
    if not obstacle:
        return Choice("triton", "nothing stands against it")
    if layer.backend == "triton":
        raise RuntimeError(
            f"backend='triton': {obstacle}. backend='auto' would take the eager backend."
        )
    return Choice("eager", obstacle)


def explain(layer: Any, x: Tensor) -> str:
    """Which backend a :class:`DMoE` takes for the input x, and why; or the error of the backend.

    Raises:
        ValueError, TypeError: for input that the layer refuses whatever its backend.

    Example:
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
    """Which of the Triton kernels compute experts of this width, in words."""
    from .fused.narrow import fuses_backward, fuses_forward

    if not fuses_forward(dim, dtype, activation):
        return f"D = {dim} is wide, grouped matrix products with the hidden layer between them"
    but = "" if fuses_backward(dim, dtype, activation) else " but in backward"
    return f"D = {dim} is narrow, the hidden layer stays in registers{but}"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for, if it is on. Like PyTorch's own, it leaves fp64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _obstacle(layer: Any, x_BTD: Tensor, dtype: torch.dtype) -> str:
    """What keeps the kernels from taking the call, in words; empty if nothing does."""
    if machine := _obstacle_of_machine(x_BTD.device.type, x_BTD.device.index or 0):
        return machine
    for what, given in (
        ("x", x_BTD.dtype),
        ("the parameters", layer.w1_EHD.dtype),
        ("the router's parameters", layer.router.w_A2ED.dtype),
        ("autocast", dtype),
    ):
        if given not in DTYPES:
            return f"{what}: {given}; the kernels take {', '.join(map(str, DTYPES))}"
    if not ACTIVATIONS[layer.activation].fused:
        return f"activation is {layer.activation}, which the kernels do not have"
    if layer.n_experts > MAX_EXPERTS:
        return f"n_experts is {layer.n_experts}; the kernels take up to {MAX_EXPERTS}"
    if layer.k > MAX_K:
        return f"k is {layer.k}; the kernels take up to {MAX_K}"
    samples, tokens = x_BTD.shape[:2]
    if samples * tokens * layer.k > MAX_PAIRS:
        return f"{samples * tokens} tokens with k = {layer.k}; the kernels take 2³¹ - 1 pairs"
    if layer.attribute_sizes is None:
        return ""
    if samples > MAX_SAMPLES:
        return f"{samples} samples; with attributes the kernels take up to {MAX_SAMPLES}"
    if tokens < MIN_TOKENS_PER_SAMPLE:
        return (
            f"{tokens} tokens a sample; with attributes the kernels take at least "
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
        return f"x is on {device}; the kernels need a GPU"
    if torch.version.hip is not None:
        return "ROCm; the kernels are written for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    return ""
