"""What a scope has recorded: a chain of calls, and the table of the experts' loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .losses import count_assignments
from .tensors import Routing


class Recorded:
    """One recorded call, and the call before it. The first item of a chain is empty.

    This is a chain and not a list, because torch.compile guards on the length of a list and on
    every item in it. It would compile each block of a model again for its place in the list.
    """

    def __init__(self, routed: Any, sizes: tuple[int, ...] | None, before: Any) -> None:
        self.routed: Routing = routed
        self.sizes = sizes
        self.before: Recorded = before


def calls_in_order(last: Recorded) -> list[Recorded]:
    """The calls of the chain that ends with ``last``, the first one first."""
    calls, call = [], last
    while call.before is not None:
        calls.append(call)
        call = call.before
    return calls[::-1]


def load_table(calls: list[Recorded], per_call: bool, attribute: int) -> Tensor:
    """How the tokens of each value are shared among the experts; see ``routing.load_table``."""
    n_experts = sorted({call.routed.logits.shape[-1] for call in calls})
    if len(n_experts) != 1:
        raise ValueError(
            "load_table: no DMoE was called inside this scope."
            if not calls
            else f"load_table: the calls have different numbers of experts, {n_experts}, so "
            "that one table cannot hold them. Look at `routings` one by one."
        )
    # If no call has attributes, one row counts all tokens. Beside calls that have some, a call
    # without attributes counts in no row.
    some = any(call.routed.attributes is not None for call in calls)
    values = [_values_of(call.routed, attribute, default=-1 if some else 0) for call in calls]
    n_values = max(_n_values(call, v, attribute) for call, v in zip(calls, values, strict=True))
    counts = [_count(call.routed, v, n_values) for call, v in zip(calls, values, strict=True)]
    # A model may be spread over devices.
    counts_CAE = torch.stack([count.to(counts[0].device) for count in counts])
    counts_CAE = counts_CAE if per_call else counts_CAE.sum(dim=0)
    return counts_CAE.float() / counts_CAE.sum(dim=-1, keepdim=True).clamp(min=1)


def _values_of(routed: Routing, attribute: int, default: int) -> Tensor:
    """The value of one attribute for each token, or the default if there are none: (T,)."""
    values = routed.attributes
    if values is None:
        values = routed.expert_indices.new_full((len(routed.logits),), default)
    n = 1 if values.ndim == 1 else values.shape[1]
    if not 0 <= attribute < n and not (routed.attributes is None and default == -1):
        raise ValueError(f"attribute: got {attribute}, expected 0 .. {n - 1}.")
    return values if values.ndim == 1 else values[:, attribute]


def _n_values(call: Recorded, values_T: Tensor, attribute: int) -> int:
    if call.sizes is not None:
        return call.sizes[attribute]
    return max(int(values_T.max()) + 1, 1) if len(values_T) else 1


def _count(routed: Routing, values_T: Tensor, n_values: int) -> Tensor:
    # Row 0 counts the unknown, and is dropped.
    shape = (n_values + 1, routed.logits.shape[-1])
    return count_assignments(routed.expert_indices, values_T + 1, shape)[1:]
