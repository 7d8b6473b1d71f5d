"""Balance losses: functions of the routing of one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import Routing


def load_balancing_loss(routing: Routing, *, per_attribute: bool = False) -> Tensor:
    """The load-balancing loss of Switch Transformer and GShard: 1 at perfect balance, at most E.

    The loss is small if all experts get equally many tokens:

        loss = E · Σ_e f_e · P_e

    f_e is the share of the T·k assignments that went to expert e. P_e is the mean over the tokens
    of the softmax of all logits. Only P has a gradient (Fedus et al.,
    [arXiv:2101.03961](https://arxiv.org/abs/2101.03961), eq. 4-6; Lepikhin et al.,
    [arXiv:2006.16668](https://arxiv.org/abs/2006.16668)).

    Args:
        routing: The routing of one call.
        per_attribute: Computes the loss within each attribute value that is present, and returns
            their unweighted mean. So a group with few tokens counts as much as one with many.
            Unknown (-1) counts as a value. With several attributes, every value of each of them
            counts alike.

    Returns:
        A scalar with the dtype of the logits. It is 0 if there are no tokens.

    Raises:
        ValueError: ``per_attribute`` is set, but the routing has no attributes.

    Examples:
        >>> import torch
        >>> from dmoe_layer import Routing, load_balancing_loss
        >>> logits = torch.zeros(4, 2)
        >>> even = Routing(torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1), logits)
        >>> load_balancing_loss(even)
        tensor(1.)
    """
    probabilities_TE = F.softmax(routing.logits, dim=-1)
    if not per_attribute:
        everyone = routing.expert_indices.new_zeros(len(probabilities_TE))
        return _grouped_balance(routing, probabilities_TE, everyone, 1).mean()
    if routing.attributes is None:
        raise ValueError(
            "per_attribute=True: this routing has no attributes. Pass them to the layer, or open "
            "`with routing(attributes):` around its call."
        )
    if not len(probabilities_TE):
        return probabilities_TE.sum()
    losses = []
    for values_T in routing.attributes.reshape(len(probabilities_TE), -1).unbind(dim=1):
        values, groups_T = values_T.unique(return_inverse=True)
        losses.append(_grouped_balance(routing, probabilities_TE, groups_T, len(values)))
    return torch.cat(losses).mean()


def importance_loss(routing: Routing) -> Tensor:
    """The squared coefficient of variation of the experts' gates: 0 at perfect balance.

    The importance of an expert is the sum of its gates over all tokens (Shazeer et al.,
    [arXiv:1701.06538](https://arxiv.org/abs/1701.06538), eq. 6-7):

        loss = variance over the experts of the importance / (mean of the importance)²

    The variance is that of a population: it divides by E.

    Args:
        routing: The routing of one call.

    Returns:
        A scalar with the dtype of the gates. It is 0 if there are no tokens.

    Examples:
        >>> import torch
        >>> from dmoe_layer import Routing, importance_loss
        >>> all_to_0 = torch.zeros(4, 1, dtype=torch.int64)
        >>> importance_loss(Routing(all_to_0, torch.ones(4, 1), torch.zeros(4, 2)))
        tensor(1.)
    """
    gates, n_experts = routing.gates, routing.logits.shape[-1]
    importance_E = gates.new_zeros(n_experts).index_add(
        0, routing.expert_indices.reshape(-1), gates.reshape(-1)
    )
    # The mean is 0 only where there are no tokens, and then the variance is 0 too.
    squared_mean = importance_E.mean().square().clamp_min(torch.finfo(gates.dtype).tiny)
    return importance_E.var(correction=0) / squared_mean


def router_z_loss(routing: Routing) -> Tensor:
    """The router z-loss: the mean over the tokens of logsumexp(logits)².

    It pulls the router's logits towards small values, which makes training more stable (Zoph et
    al., ST-MoE, [arXiv:2202.08906](https://arxiv.org/abs/2202.08906), eq. 5).

    Args:
        routing: The routing of one call.

    Returns:
        A scalar with the dtype of the logits. It is 0 if there are no tokens.

    Examples:
        >>> import torch
        >>> from dmoe_layer import Routing, router_z_loss
        >>> all_to_0 = torch.zeros(4, 1, dtype=torch.int64)
        >>> router_z_loss(Routing(all_to_0, torch.ones(4, 1), torch.full((4, 1), 3.0)))
        tensor(9.)
    """
    squares_T = routing.logits.logsumexp(dim=-1).square()
    return squares_T.sum() / max(len(squares_T), 1)


def count_assignments(
    expert_indices_TK: Tensor, groups_T: Tensor, shape: tuple[int, int]
) -> Tensor:
    """How many (token, slot) pairs of each group went to each expert: int64 of ``shape`` (G, E)."""
    n_groups, n_experts = shape
    cells = groups_T[:, None] * n_experts + expert_indices_TK
    counts = cells.new_zeros(n_groups * n_experts)
    return counts.index_add_(0, cells.reshape(-1), torch.ones_like(cells).reshape(-1)).view(shape)


def _grouped_balance(
    routing: Routing, probabilities_TE: Tensor, groups_T: Tensor, n_groups: int
) -> Tensor:
    """The load-balancing loss within each group: (G,)."""
    k, n_experts = routing.expert_indices.shape[-1], probabilities_TE.shape[-1]
    counts_GE = count_assignments(routing.expert_indices, groups_T, (n_groups, n_experts))
    counts_GE = counts_GE.to(probabilities_TE.dtype)
    tokens_G1 = counts_GE.sum(dim=1, keepdim=True).clamp(min=1) / k
    f_GE = counts_GE / (tokens_G1 * k)
    summed_GE = probabilities_TE.new_zeros(n_groups, n_experts).index_add(
        0, groups_T, probabilities_TE
    )
    return n_experts * (f_GE * summed_GE / tokens_G1).sum(dim=1)
