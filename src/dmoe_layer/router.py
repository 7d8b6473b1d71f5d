"""The router: scores every token by the router of its sample, and selects the k best experts."""

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
    """The ``route`` function of a backend, in the form in which a layer passes it to its router.

    The router returns only the Routing, whoever calls it, and its hooks see nothing else. The
    layer finds the backend's plan here.

    Attributes:
        plan: What the backend's ``experts`` needs from the call. It is set when the call is over.
            A named tuple, or None.
        wants_attributes: Whether anyone will read the attributes of the Routing, one per token.
    """

    def __init__(
        self,
        route: Callable[..., tuple[Routing, Any]],
        wants_attributes: bool = True,
        passes_x: bool = False,
    ) -> None:
        """With ``passes_x`` the experts take the plan's x.

        Not with a router that anyone watches: the gradient of its input would have theirs in it,
        and a hook might give it other tokens.
        """
        self._route, self.wants_attributes, self._passes_x = route, wants_attributes, passes_x
        self.plan: Any = None
        self._indices: Tensor | None = None

    def __call__(self, *inputs: Any) -> Routing:
        routing, self.plan = self._route(*inputs)
        self._indices = routing.expert_indices
        return routing

    def plan_of(self, routing: Routing) -> Any:
        """Returns the plan; raises if a hook or a user's own router has chosen other experts."""
        replaced = not torch.compiler.is_compiling() and routing.expert_indices is not self._indices
        if self.plan is None or replaced:
            raise RuntimeError(
                "backend='triton': a hook or a router of your own replaced the router's experts, "
                "but the kernels have already sorted the tokens by expert. Use backend='eager', "
                "which takes the new experts."
            )
        if self._passes_x or self.plan.x is None:
            return self.plan
        return self.plan._replace(x=None)


class AttributeRouter(LazyDim):
    """The router of a [`DMoE`][] by itself: noisy top-k gating, a router for each attribute value.

    For a token x of a sample whose attribute has the value a, the router computes a score R for
    each expert, and the gates K of the k experts with the highest scores (Oh et al., ICML 2025,
    [arXiv:2502.00619](https://arxiv.org/abs/2502.00619), after Shazeer et al.,
    [arXiv:1701.06538](https://arxiv.org/abs/1701.06538)):

        R(x) = x·W_a + b_a + N(0,1) * softplus(x·W'_a + b'_a)
        K(x) = softmax over the k largest of R(x)

    The second term of R is noise. ``noise`` says when it is added. Scores and gates are at least
    fp32, under autocast too.

    Args:
        dim: The width D of a token. If it is None, the router learns its width from the first
            input or from a state_dict.
        n_experts: The number of experts, E.
        k: The number of experts to which each token goes.
        attribute_sizes: The number of values of each attribute. An int stands for one attribute
            with that many values. With a tuple there are several attributes, and the scores of
            their routers are summed, noise included. None gives one router for all samples.
        unknown: What the router does with the attribute value -1, which stands for "unknown".
            "error" raises an error. "average" averages the scores of that attribute's routers.
            "learned" gives the unknown value a router of its own.
        noise: When noise is added to the scores: "train" (in training only), "always" (as the
            paper's released code does) or "never".
        device: The device of the parameters.
        dtype: The floating-point dtype of the parameters.

    Attributes:
        dim: The width D of a token, or None as long as the router does not know it.
        w_A2ED: The weights of all A routers, (A, 2, E, D). Index 0 of the axis of length 2 holds
            W, and index 1 holds W'.
        bias: The biases of all routers, (A, 2, E). Index 0 holds b, and index 1 holds b'.

    One tensor holds the weights of all routers. So the router of a value that a batch does not
    contain still gets a gradient, which is zero.

    Raises:
        ValueError: An option is out of range, or two options do not fit together. The error comes
            at construction.
        TypeError: An option has the wrong type. The error comes at construction.

    Examples:
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
        """Draws weights and biases as ``nn.Linear`` does, if the router knows its width."""
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
        """Checks the first input, and learns ``dim`` from it."""
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
        """Chooses the experts of every token.

        Args:
            x: The tokens, (B, T, D). With ``tokens_per_sample`` they are (T, D): all tokens of
                the first sample, then those of the second, and so on.
            attributes: The samples' attribute values: integers of shape (B,), or (B, n) for n
                attributes. A scalar or a batch of 1 applies to every sample. -1 means unknown.
            tokens_per_sample: How many tokens each sample has, (B,) int64, if the samples differ.
            route: The backend of the calling [`DMoE`][], which has checked x. None stands for
                plain PyTorch.

        Returns:
            The routing of all tokens, sample after sample.

        Raises:
            MissingAttributesError: The router has ``attribute_sizes``, and there are no attributes.
            ValueError: The shape, the device or an attribute value does not fit.
            TypeError: x or the attributes have the wrong dtype.
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
        """Returns the attribute values of ``batch`` samples, (B, n) on ``x``'s device, or raises.

        A router without ``attribute_sizes`` accepts attributes of a scope, which are only recorded.
        It refuses attributes that are passed to the call, and returns None if there are none.
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
        """The routers of all values, then those of the unknown values."""
        if self.unknown != "average" or self.sizes is None:
            return parameter
        parameter = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        means = [part.mean(dim=0, keepdim=True) for part in parameter.split(self.sizes)]
        return torch.cat([parameter, *means])

    def _rows(self, values_BN: Tensor) -> Tensor:
        """The row of the table for each sample and attribute, whose value may be unknown."""
        sizes = self.sizes or ()
        if len(sizes) == 1 and self.unknown == "error":
            return values_BN
        starts = (0, *itertools.accumulate(sizes))
        columns = []
        for i, values_B in enumerate(values_BN.unbind(dim=1)):
            rows_B = values_B + starts[i] if i else values_B
            if self.unknown != "error":
                rows_B = torch.where(values_B < 0, starts[-1] + i, rows_B)
            columns.append(rows_B)
        return torch.stack(columns, dim=1) if len(columns) > 1 else columns[0][:, None]


def is_watched(router: nn.Module) -> bool:
    """Whether anyone but the layer sees what a router is given and returns.

    It may be a hook, a class of the user's, or a function in the place of ``forward``.
    """
    is_own = type(router) is AttributeRouter and "forward" not in router.__dict__
    return not is_own or has_forward_hooks(router)
