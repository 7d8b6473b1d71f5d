"""DMoE, the layer: a mixture of expert MLPs whose router knows the sample's attribute.

A suffix of a tensor's name gives its shape. The letters mean the same in the whole package:
B samples, T tokens, D features, H hidden units, E experts, K experts of a token, R pairs of a token
and one of its experts (sorted by expert), A attribute values (each has a router), N attributes of a
sample. Some files need more: C tokens of a chunk, X rows of a buffer, I the inputs and O the
outputs of a product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
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
    """A mixture of expert MLPs whose router knows each sample's attribute (dMoE).

    The layer takes the place of an MLP in a transformer or a U-Net. An *expert* is one small MLP of
    this layer. The *router* scores all experts for each token, and sends the token to the ``k``
    experts with the highest scores (top-k routing). An *attribute* is a fact about a whole sample,
    such as its site or its patient's age group, given as an integer. Each attribute value has a
    router of its own. All values share the experts.

    For a token x of a sample whose attribute has the value a, the layer computes (Oh et al., ICML
    2025, [arXiv:2502.00619](https://arxiv.org/abs/2502.00619)):

        y           = Σ_i K_i(x) · Expert_i(x)
        Expert_i(x) = Dropout(w2_i · act(w1_i · x + b1_i) + b2_i)

    The gate K_i(x) of expert i comes from the router of a; [`AttributeRouter`][] has its formula.

    All defaults but one are the paper's. The paper adds the layer's output to that of a whole
    block (``residual=True``). By default this layer replaces an MLP, and the block around it adds
    its own residual.

    Args:
        dim: The width D of a token. If it is None, the layer learns its width from the first input
            or from a state_dict. Deep copies of a layer that does not know its width yet start
            with equal weights, as deep copies of any layer do.
        n_experts: The number of experts, E.
        k: The number of experts to which each token goes.
        attribute_sizes: The number of values of each attribute. An int stands for one attribute
            with that many values, and a tuple for several attributes. None gives one router for
            all samples, which is a plain mixture of experts.
        unknown: What the layer does with the attribute value -1, which stands for "unknown".
            "error" raises an error. "average" averages the scores of that attribute's routers.
            "learned" gives the unknown value a router of its own.
        hidden_dim: The width H of the hidden layer of an expert. None stands for 4·D.
        activation: The activation of an expert: "relu", "gelu", "gelu_tanh", "quick_gelu" (that of
            OpenAI's CLIP) or "silu". "swiglu", "geglu" and "geglu_tanh" are gated: they compute
            act(gate) · linear from two halves of a first layer that is twice as wide.
        bias: Whether the experts have biases. The router always has biases.
        dropout: The probability with which training sets an entry of an expert's output to zero.
            It is rounded to a multiple of 1/65536. The layer reads it from its ``nn.Dropout``
            named ``dropout``, whose ``p`` and ``training`` may be changed later. For example,
            ``layer.dropout.train()`` gives Monte Carlo dropout.
        noise: When the router adds noise to its scores: "train" (in training only), "always" (as
            the paper's released code does) or "never".
        residual: Whether the layer adds x to its output.
        zero_init: Whether w2 and b2 start at zero, so that the experts' output is zero at first.
        channel_dim: The axis of x along which the D features of a token lie. It is 1 for
            (B, C, H, W) and (B, C, D, H, W).
        batch_dim: The axis of x along which the samples lie. It is 1 for a sequence-first model,
            whose tensors are (tokens, batch, D).
        backend: What computes the layer. "eager" is plain PyTorch and runs on every device and
            dtype. "triton" uses fused GPU kernels, and raises an error for a call that they do not
            support. "auto" takes Triton on a GPU where it supports the call, and eager elsewhere.
            [`explain`][dmoe_layer.backend.explain] says which one a call takes, and why.
        device: The device of the parameters.
        dtype: The floating-point dtype of the parameters.

    Attributes:
        dim: The width D of a token, or None as long as the layer does not know it.
        w1_EHD: The first weights of all experts, (E, H, D). Gated experts have (E, 2H, D): first
            the H rows of the gate, then the H rows of the linear half.
        w1_bias: The first biases of all experts, (E, H), or (E, 2H) if gated. None without biases.
        w2_EDH: The second weights of all experts, (E, D, H).
        w2_bias: The second biases of all experts, (E, D). None without biases.
        router: The [`AttributeRouter`][].
        dropout: The ``nn.Dropout`` that holds the dropout's probability.

    One tensor holds the weights of all experts. So an expert that no token went to still gets a
    gradient, which is zero, and distributed training does not stall.

    Raises:
        ValueError: An option is out of range, or two options do not fit together. The error comes
            at construction.
        TypeError: An option has the wrong type. The error comes at construction.

    Examples:
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
        # A module, so that code that looks for dropout finds it. The backends draw the dropout.
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
        """Makes a layer in which every expert starts as a copy of ``mlp`` (upcycling).

        In eval mode the new layer's output equals the MLP's for every token, because the gates of
        a token sum to 1 (Komatsuzaki et al.,
        [arXiv:2212.05055](https://arxiv.org/abs/2212.05055)). The layer takes its width, biases,
        activation, dropout rate, device, dtype and train/eval state from the MLP. An expert has
        one dropout, at its end. If the MLP also has a dropout behind its activation, the layer
        drops that one.

        Args:
            mlp: A block D -> H -> D: two linear layers with one of the known activations between
                them. A gated MLP may have two or three linear layers. A linear layer is an
                ``nn.Linear``, a ``Conv1D`` of Hugging Face, or a convolution of size 1. If it is a
                convolution, the new layer has ``channel_dim=1``.
            n_experts: The number of experts, E.
            k: The number of experts to which each token goes.
            **options: Further arguments of [`DMoE`][]. ``dropout`` replaces the MLP's rate.

        Returns:
            The new layer. The MLP itself is not changed.

        Raises:
            ValueError: The block could not be read as an MLP. The error names the part.
            TypeError: An option was passed that the MLP decides, such as ``hidden_dim``.

        Examples:
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
        """Draws each expert's weights as ``nn.Linear`` does; ``zero_init`` zeros w2 and b2.

        A layer that does not know its width yet has no weights, and nothing happens.
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
        """Checks the first input, and learns ``dim`` from it."""
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
        """Sends every token to its k experts, and sums their outputs weighted by the gates.

        Args:
            x: The tokens of a batch of samples, (batch, ..., D). Other layouts have D at
                ``channel_dim`` and the samples at ``batch_dim``.
            attributes: The samples' attribute values: integers of shape (batch,), or (batch, n)
                for n attributes. A scalar or a batch of 1 applies to every sample. -1 means
                unknown. Without this argument the layer takes the attributes of the open
                [`routing`][] scope. The layer looks at the values at each call, and so waits for
                a GPU on which they lie. A scope looks at them once.
            mask: A bool tensor with the shape of x without ``channel_dim``. The layer does not
                compute the tokens where it is False. Their output is zero, or x if ``residual``.
            return_routing: Whether to return the call's [`Routing`][] too.

        Returns:
            The output, with the shape, the dtype and the memory format of x. With
                ``return_routing`` a pair: the output and the [`Routing`][].

        Raises:
            MissingAttributesError: The layer has ``attribute_sizes``, and neither the call nor an
                open scope gives attributes.
            ValueError: The shape, the device or an attribute value does not fit. The error comes
                before anything is computed.
            TypeError: x, the attributes or the mask have the wrong dtype. The error comes before
                anything is computed.
            RuntimeError: The layer has ``backend="triton"``, and Triton does not support the call.
        """
        self._check_input(x, mask)
        given = current_attributes() if attributes is None else attributes
        # One copy for router and experts, which keep it for backward. The router gets a view of it,
        # and the experts the copy itself: their gradient comes first, and PyTorch adds the router's
        # to it in place, as it would not if it were that of a view.
        moved = self._samples_first(x)
        x_TD = moved.flatten(0, -2).contiguous()
        x_BTD = x_TD.view(moved.shape[0], math.prod(moved.shape[1:-1]), moved.shape[-1])
        # (B, T, D) or, of a mask, the tokens inside alone, sample after sample, (T, D).
        tokens, tokens_per_sample, inside_T = x_BTD, None, None
        if mask is not None:
            # Moved as one more channel is, so that its tokens stand as those of x.
            mask_like_x = mask.to(x.device).unsqueeze(self.channel_dim)
            mask_BT = self._samples_first(mask_like_x).reshape(x_BTD.shape[:2])
            tokens_per_sample, inside_T = mask_BT.sum(dim=1), mask_BT.reshape(-1).nonzero()[:, 0]
            tokens = x_TD = x_TD.index_select(0, inside_T)

        dtype = autocast_dtype(x) or x.dtype
        backend = load(choose(self, x_BTD, dtype).backend)
        # The router is called as a module, so that its hooks run: offloading brings it in by one.
        router = self.router
        watched = is_watched(router)
        wanted = return_routing or records() or watched
        route = BackendRoute(backend.route, wanted, passes_x=not watched)
        routing = router(tokens, given, tokens_per_sample=tokens_per_sample, route=route)
        # A user may have replaced it by an nn.Identity or by None.
        dropout = self.dropout
        p = getattr(dropout, "p", 0.0)
        seed = draw_seed() if p > 0 and dropout.training else None
        weights = ExpertWeights(self.w1_EHD, self.w1_bias, self.w2_EDH, self.w2_bias)
        options = ExpertOptions(self.activation, p, seed, dtype)
        # Of plain PyTorch the plan is the routing itself, as the router's hooks have left it.
        plan: Any = routing.expert_indices
        if not backend.plans_by_routing:
            plan = route.plan_of(routing)
        y_TD = backend.experts(x_TD, plan, routing.gates, weights, options)

        if inside_T is not None:  # index_put, since index_copy and index_add keep y for backward
            y_TD = y_TD.new_zeros(x_BTD.shape).flatten(0, 1).index_put((inside_T,), y_TD)
        y = y_TD.reshape(moved.shape)
        if moved is not x:
            y = y.movedim((0, -1), (self.batch_dim, self.channel_dim))
        y = _in_memory_format_of(x, y)
        y = x + y if self.residual else y
        record(routing, router.sizes)
        return (y, routing) if return_routing else y

    def _samples_first(self, x: Tensor) -> Tensor:
        """``x`` as (batch, ..., D): itself, or a view of it."""
        if self.batch_dim == 0 and self.channel_dim in (-1, x.ndim - 1):
            return x
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
        # A state_dict that holds only the experts or only the router gives the width to that part.
        width, known = x.shape[axis], (self.dim, self.router.dim)
        wrong = [f"dim={dim}" for dim in known if dim is not None and dim != width]
        if width == 0 or wrong:
            expected = wrong[0] if wrong else "at least 1"
            raise ValueError(
                f"x: got {describe(x)}, which has {width} at channel_dim={self.channel_dim}, "
                f"expected {expected}."
            )
        w1_EHD = self.w1_EHD
        check_device(x, w1_EHD, "layer")
        if x.dtype != w1_EHD.dtype and autocast_dtype(x) is None:
            raise TypeError(
                f"x: got {x.dtype}, but the layer's parameters are {w1_EHD.dtype}. Convert "
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
    # y has no gaps. If its strides are those of x, x has none either, and what is like x has them.
    if y.stride() == x.stride() or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x).copy_(y)
