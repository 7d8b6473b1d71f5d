"""What each kernel computes and moves, and the share of the roofline that its launch allows.

A model, not a measurement: the time of the useful operations or of the least traffic, whichever is
longer, over the time of the operations issued (blocks are padded to powers of two) or of the
traffic at the bandwidth that the resident programs can keep busy (Little's law: a program has one
tile's loads under way, and ``LATENCY`` passes until they arrive).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..paper import HIDDEN_RATIO, N_EXPERTS, K
from .gpus import GPU

LATENCY = 700e-9  # seconds


class Work(NamedTuple):
    """For one row (token and slot) or, in the router, one token.

    ``useful`` is how much of the padded operations the ``operations`` are; ``loaded`` and
    ``stored`` are bytes; ``rows`` are in one tile.
    """

    operations: float
    useful: float
    loaded: float
    stored: float
    rows: int


def kernel_work(kernel: str, options: dict[str, Any], d: int, element: int) -> Work | None:
    """None for the small reductions.

    Args:
        options: of the launch, block sizes among them.
        d: the layer's width.
        element: bytes of a number.
    """
    h, row = HIDDEN_RATIO * d, d * element
    gated = bool(options.get("GATED"))
    first = 2 * h if gated else h  # rows of w1

    def fill(size: int, block: str) -> float:
        return size / (math.ceil(size / options[block]) * options[block])

    match kernel:
        case "route_kernel":
            written = 4 * N_EXPERTS + 12 * K
            return Work(4 * N_EXPERTS * d, fill(d, "DIM"), row, written, options["TOKENS"])
        case "route_backward_kernel":
            read = row + 4 * N_EXPERTS + 16 * K
            return Work(12 * N_EXPERTS * d, fill(d, "DIM"), read, row, options["TOKENS"])
        case "sort_kernel":
            return Work(0, 1, 8 * K, 4 * K, options["TOKENS"])
        case "sum_pairs_kernel":
            return Work(0, 1, K * row, row, options["ROWS"])
        case "mlp_kernel":
            useful = fill(d, "DIM") * fill(h, "HIDDEN")
            return Work(2 * d * (first + h), useful, row + 8, row, options["ROWS"])
        case "mlp_backward_kernel":
            # The hidden layer and its gradient, then x's.
            useful = fill(d, "DIM") * fill(h, "HIDDEN")
            return Work(2 * d * (2 * first + h), useful, 2 * row + 8, row + 4, options["ROWS"])
        case "weight_gradients_kernel":
            # The same of every slice, then the weights'.
            useful = fill(d, "DIM") * fill(h, "HIDDEN")
            return Work(4 * d * (first + h), useful, 2 * row + 8, 0, options["ROWS"])
        case "hidden_kernel":
            written = (first + h if gated else h) * element
            return Work(2 * d * first, fill(first, "COLUMNS"), row, written, options["ROWS"])
        case "output_kernel":
            depth = options["hidden"]  # of a product with w1 its rows
            return Work(2 * d * depth, fill(d, "COLUMNS"), depth * element, row, options["ROWS"])
        case "gather_gradient_kernel":
            return Work(0, 1, row, 2 * row, options["ROWS"])
        case "hidden_backward_kernel":
            read, written = row + first * element, (first + h if gated else h) * element
            return Work(2 * d * h, fill(h, "COLUMNS"), read, written, options["ROWS"])
        case "weight_backward_kernel":
            sides = options["a_columns"], options["b_columns"]
            read = sum(sides) * element
            return Work(2 * math.prod(sides), fill(d, "COLUMNS"), read, 0, options["ROWS"])
        case _:
            return None


def roofline_share(work: Work, flops: float, gpu: GPU, resident: int) -> float:
    """The share that a launch allows.

    Args:
        flops: the GPU's, of the dtype.
        resident: programs that a multiprocessor holds at one time.
    """
    on_its_way = resident * work.rows * work.loaded * gpu.multiprocessors
    bandwidth = min(gpu.bandwidth, on_its_way / LATENCY)
    traffic = work.loaded + work.stored
    possible = max(work.operations / work.useful / flops, traffic / bandwidth)
    return round(max(work.operations / flops, traffic / gpu.bandwidth) / possible, 3)
