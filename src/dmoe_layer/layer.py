"""DMoE, the layer: a mixture of expert MLPs whose router knows the sample's attribute.

Shape letters, here and everywhere: B batch, T tokens, D features, H hidden, E experts, K experts
a token, R (token, slot) pairs sorted by expert, A attribute values and so routers, N attributes a
sample. Where they are needed: C tokens of a chunk, X rows of a buffer, I and O what goes into a
product and comes out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .backend import BACKENDS, autocast_dtype, choose, load
from .checks import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_is_no_proxy,
    describe,
)
from .foreign.read_mlp import read_mlp
from .lazy import LazyDim
from .operators import draw_seed
from .router import AttributeRouter, BackendRoute, is_watched
from .scope import current_attributes, record, records
from .tensors import ExpertOptions, ExpertWeights, Routing
from .upcycling import upcycled

if TYPE_CHECKING:
    from typing_extensions import Self


class DMoE(LazyDim):
    """Distribution-aware mixture of experts: a drop-in for a transformer's or U-Net's MLP.

    For a token x of a sample whose attribute has value a (Oh et al., ICML 2025,
    arXiv:2502.00619)::

        y = Σ_i K_i(x) · Expert_i(x)        K: the k gates of a's own router (AttributeRouter)
        Expert(x) = Dropout(w2 · act(w1 · x + b1) + b2)

    All attribute values share the experts. The defaults are the paper's, except for the
    placement: there the layer is added to the block's output (``residual=True``), here it takes
    an MLP's place and the host block adds its own residual.

    Args:
        dim: width D of a token; None learns it from the first input or a state_dict. Deep copies
            of such a layer start with equal weights, as deep copies of any layer do.
        n_experts: E.
        k: experts a token.
        attribute_sizes: None (one router for all: a plain mixture of experts), an int (one
            attribute with that many values) or a tuple (several attributes).
        unknown: what the attribute value -1 does: "error", "average" or "learned".
        hidden_dim: width H inside an expert; None for 4·dim.
        activation: "relu", "gelu", "gelu_tanh", "quick_gelu" (OpenAI CLIP's) or "silu"; or gated,
            act(gate) · linear in place of act: "swiglu", "geglu" or "geglu_tanh".
        bias: whether the experts have biases; the router keeps its own.
        dropout: probability of zeroing an entry of an expert's output in training, rounded to
            1/65536. It is kept in the ``nn.Dropout`` named ``dropout``, whose ``p`` and
            ``training`` count: ``layer.dropout.train()`` alone gives Monte Carlo dropout.
        noise: when the router's scores are noisy: "train", "always" (what the paper's released
            code does) or "never".
        residual: adds x to the output.
        zero_init: starts w2 and b2 at zero, so that the layer adds nothing at first.
        channel_dim: the axis of x that holds D: 1 for (B, C, H, W) and (B, C, D, H, W).
        batch_dim: the axis of x that holds the samples: 1 for sequence-first models, (T, B, D).
        backend: "eager" (plain PyTorch, any device and dtype), "triton" (fused kernels; raises
            where they cannot take the call) or "auto": Triton on a GPU where it can take the
            call, else eager. ``dmoe_layer.backend.explain(layer, x)`` says which and why.
        device, dtype: of the parameters.

    Parameters, one tensor for all experts, so that an idle expert still gets a zero gradient:
        w1_EHD (E, H, D), w1_bias (E, H), w2_EDH (E, D, H), w2_bias (E, D), and the router's. If
        gated, w1_EHD is (E, 2H, D) and its bias (E, 2H): H rows of the gate, then H of the linear
        half.

    Raises:
        ValueError, TypeError: for options that do not fit, at construction.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> layer = DMoE(n_experts=8, k=2, attribute_sizes=3)
        >>> x = torch.randn(2, 10, 16)
        >>> layer(x, torch.tensor([0, 2])).shape
        torch.Size([2, 10, 16])
    """

    _dim_from = "w1_EHD"
    _is_overwritten = False
    w1_EHD: Tensor
    w1_bias: Tensor | None
    w2_EDH: Tensor
    w2_bias: Tensor | None

    def __init__(
        self,
        dim: int | None = None,
        *,
        n_experts: int = 8,
        k: int = 2,
        attribute_sizes: int | tuple[int, ...] | None = None,
        unknown: str = "error",
        hidden_dim: int | None = None,
        activation: str = "relu",
        bias: bool = True,
        dropout: float = 0.1,
        noise: str = "train",
        residual: bool = False,
        zero_init: bool = False,
        channel_dim: int = -1,
        batch_dim: int = 0,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim is not None:
            check_count("hidden_dim", hidden_dim)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        check_flag("bias", bias)
        check_flag("residual", residual)
        check_flag("zero_init", zero_init)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout: got {dropout!r}, expected a number from 0 to 1.")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout}, expected a number from 0 to 1.")
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim: got {channel_dim!r}, expected an int.")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
            raise TypeError(f"batch_dim: got {batch_dim!r}, expected an int.")
        if batch_dim < 0:
            raise ValueError(f"batch_dim: got {batch_dim}, expected 0 or more.")
        if channel_dim == batch_dim:
            raise ValueError(
                f"channel_dim: got {channel_dim}, which is the batch axis (batch_dim); expected "
                "another."
            )
        self.hidden_dim, self.activation, self.use_bias = hidden_dim, activation, bias
        self.residual, self.zero_init = residual, zero_init
        self.channel_dim, self.batch_dim, self.backend = channel_dim, batch_dim, backend
        # A module, so that what looks for dropout finds it; the backends draw it.
        self.dropout = nn.Dropout(float(dropout))
        self.router = AttributeRouter(
            dim,
            n_experts,
            k,
            attribute_sizes=attribute_sizes,
            unknown=unknown,
            noise=noise,
            device=device,
            dtype=dtype,
        )
        self.n_experts, self.k = n_experts, k
        self.attribute_sizes = attribute_sizes
        if not bias:
            self.register_parameter("w1_bias", None)
            self.register_parameter("w2_bias", None)
        self._create_parameters(dim, device, dtype)

    @classmethod
    def from_mlp(cls, mlp: nn.Module, n_experts: int = 8, k: int = 2, **options: Any) -> Self:
        """Upcycling: a layer whose every expert starts as ``mlp``.

        In eval mode its output equals the MLP's whatever is routed where, since gates sum to 1
        (Komatsuzaki et al., arXiv:2212.05055). Width, biases, activation, dropout rate, device,
        dtype and train/eval state are the MLP's. An MLP with a dropout after its activation
        loses that one: an expert has one dropout, at its end.

        Args:
            mlp: a block D -> H -> D with one of the known activations between its linear layers:
                two, or of a gated MLP two or three. They are ``nn.Linear``, Hugging Face's
                ``Conv1D``, or convolutions of size 1, for which ``channel_dim`` is 1.
            n_experts: E.
            k: experts a token.
            options: further arguments of :class:`DMoE`; ``dropout`` replaces the MLP's.

        Raises:
            ValueError: saying which part of the MLP could not be read.
            TypeError: for an option that the MLP decides.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from dmoe_layer import DMoE
            >>> mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()
            >>> x = torch.randn(2, 10, 16)
            >>> torch.allclose(DMoE.from_mlp(mlp, k=3)(x), mlp(x), atol=1e-5)
            True
        """
        read = read_mlp(mlp, upcycle=True, dropout=options.pop("dropout", None))
        return upcycled(cls, read, n_experts=n_experts, k=k, **options).train(mlp.training)

    def _shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        n_experts, hidden = self.n_experts, self.hidden_dim or 4 * dim
        first = 2 * hidden if ACTIVATIONS[self.activation].gated else hidden
        shapes: dict[str, tuple[int, ...]] = {
            "w1_EHD": (n_experts, first, dim),
            "w1_bias": (n_experts, first),
            "w2_EDH": (n_experts, dim, hidden),
            "w2_bias": (n_experts, dim),
        }
        return {n: s for n, s in shapes.items() if self.use_bias or not n.endswith("bias")}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the experts as ``nn.Linear`` does, each on its own; zeros w2, b2 if zero_init.

        A layer that does not know its width yet has nothing to draw.
        """
        if self.dim is None or self._is_overwritten:
            return
        for weight, bias in ((self.w1_EHD, self.w1_bias), (self.w2_EDH, self.w2_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            if self.zero_init and weight is self.w2_EDH:
                bound = 0.0
            nn.init.uniform_(weight, -bound, bound, generator)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound, generator)

    def initialize_parameters(
        self,
        x: Tensor,
        attributes: Any = None,
        *,
        mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> None:
        """Learns ``dim`` from the first input, once nothing is wrong with it."""
        self._check_input(x, mask)
        given = current_attributes() if attributes is None else attributes
        self.router.values_of(x, x.shape[self.batch_dim], given)
        self._learn_dim(x.shape[self.channel_dim])
        self.router._learn_dim(x.shape[self.channel_dim])

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, n_experts={self.n_experts}, k={self.k}, "
            f"attribute_sizes={self.attribute_sizes}, hidden_dim={self.hidden_dim}, "
            f"activation={self.activation!r}, bias={self.use_bias}, residual={self.residual}, "
            f"channel_dim={self.channel_dim}, batch_dim={self.batch_dim}, "
            f"backend={self.backend!r}"
        )

    def forward(
        self,
        x: Tensor,
        attributes: Any = None,
        *,
        mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Routes every token and sums its experts' outputs.

        Args:
            x: (batch, ..., D), or any layout with D at ``channel_dim`` and the samples at
                ``batch_dim``.
            attributes: integers, (batch,) or (batch, n); a batch of 1 or a scalar applies to
                every sample; -1 is unknown. They win over those of the open scope. Each call
                looks at their values, and so waits for a GPU that they are on; a scope looks once.
            mask: bool, the shape of x without ``channel_dim``. Tokens outside are not computed
                and come out as zero (as x, if ``residual``).
            return_routing: also returns the call's :class:`Routing`.

        Returns:
            A tensor of x's shape, dtype and memory format; or that and the routing.

        Raises:
            MissingAttributesError: if the layer has ``attribute_sizes`` and there are none.
            ValueError, TypeError: for input that does not fit, before anything is computed.
        """
        self._check_input(x, mask)
        given = current_attributes() if attributes is None else attributes
        # One copy for router and experts, which keep it for backward.
        moved = self._samples_first(x)
        x_BTD = rearrange(moved, "b ... d -> b (...) d").contiguous()
        # (B, T, D) or, of a mask, the tokens inside alone, sample after sample, (T, D).
        tokens, tokens_per_sample, inside_T = x_BTD, None, None
        if mask is not None:
            # Moved as one more channel is, so that its tokens stand as those of x.
            mask_like_x = mask.to(x.device).unsqueeze(self.channel_dim)
            mask_BT = self._samples_first(mask_like_x).reshape(x_BTD.shape[:2])
            tokens_per_sample, inside_T = mask_BT.sum(dim=1), mask_BT.reshape(-1).nonzero()[:, 0]
            tokens = x_BTD.flatten(0, 1).index_select(0, inside_T)

        dtype = autocast_dtype(x) or x.dtype
        backend = load(choose(self, x_BTD, dtype).backend)
        # The router is called as a module, so that its hooks run: offloading brings it in by one.
        wanted = return_routing or records() or is_watched(self.router)
        route = BackendRoute(backend.route, wanted)
        routing = self.router(tokens, given, tokens_per_sample=tokens_per_sample, route=route)
        # Somebody may have put an nn.Identity in its place, or None.
        p = getattr(self.dropout, "p", 0.0)
        seed = draw_seed() if p > 0 and self.dropout.training else None
        weights = ExpertWeights(self.w1_EHD, self.w1_bias, self.w2_EDH, self.w2_bias)
        options = ExpertOptions(self.activation, p, seed, dtype)
        # Of plain PyTorch the plan is the routing itself, as the router's hooks have left it.
        plan = routing.expert_indices if backend.plans_by_routing else route.plan_of(routing)
        y_TD = backend.experts(tokens.flatten(0, -2), plan, routing.gates, weights, options)

        if inside_T is not None:  # index_put, since index_copy and index_add keep y for backward
            y_TD = y_TD.new_zeros(x_BTD.flatten(0, 1).shape).index_put((inside_T,), y_TD)
        y = y_TD.reshape(moved.shape).movedim((0, -1), (self.batch_dim, self.channel_dim))
        y = _in_memory_format_of(x, y)
        y = x + y if self.residual else y
        record(routing, self.router.sizes)
        return (y, routing) if return_routing else y

    def _samples_first(self, x: Tensor) -> Tensor:
        """``x`` as a view (batch, ..., D)."""
        return x.movedim((self.batch_dim, self.channel_dim), (0, -1))

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        check_is_no_proxy(x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x: got {describe(x)}, expected a floating-point tensor.")
        axis = self.channel_dim + x.ndim if self.channel_dim < 0 else self.channel_dim
        if axis == self.batch_dim or not (0 <= axis < x.ndim and self.batch_dim < x.ndim):
            raise ValueError(
                f"x: got {describe(x)}, expected (batch, ..., dim), with dim at "
                f"channel_dim={self.channel_dim} and the batch at batch_dim={self.batch_dim}."
            )
        # A state_dict of only one of them may have told experts or router the width.
        width, known = x.shape[axis], (self.dim, self.router.dim)
        wrong = [f"dim={dim}" for dim in known if dim is not None and dim != width]
        if width == 0 or wrong:
            expected = wrong[0] if wrong else "at least 1"
            raise ValueError(
                f"x: got {describe(x)}, which has {width} at channel_dim={self.channel_dim}, "
                f"expected {expected}."
            )
        check_device(x, self.w1_EHD, "layer")
        if x.dtype != self.w1_EHD.dtype and autocast_dtype(x) is None:
            raise TypeError(
                f"x: got {x.dtype}, but the layer's parameters are {self.w1_EHD.dtype}. Convert "
                "one with .to(dtype), or run under torch.autocast."
            )
        if mask is None:
            return
        tokens = (*x.shape[:axis], *x.shape[axis + 1 :])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: got {describe(mask)}, expected a bool tensor {tokens}.")
        if mask.shape != tokens:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected {tokens}: one entry a token, "
                f"x's shape {tuple(x.shape)} without axis {axis}."
            )


def _in_memory_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``, as element-wise operators choose it."""
    if y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x).copy_(y)
