"""What each kernel computes and moves, and the share of the roofline that its launch allows.

A model, not a measurement: the time of the useful operations or of the least traffic, whichever is
longer, over the time of the operations issued (blocks are padded to powers of two) or of the
traffic at the bandwidth that the resident programs can keep busy (Little's law: a program has one
tile's loads under way, and ``LATENCY`` passes until they arrive).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from ..paper import HIDDEN_RATIO, N_EXPERTS, K
from .gpus import GPU
from .launches import Launch

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
    slope = 4 if element == 4 else 2  # bytes of the noise's slope
    gated = bool(options.get("GATED"))
    first = 2 * h if gated else h  # rows of w1
    kept = 4 * math.ceil(d / 32)  # dropout's bits

    def fill(size: int, block: str) -> float:
        return size / (math.ceil(size / options[block]) * options[block])

    match kernel:
        case "route_kernel":
            # Logits and slopes; experts twice, and gates.
            written = (4 + slope) * N_EXPERTS + (8 + 1 + 4) * K
            return Work(4 * N_EXPERTS * d, fill(d, "DIM"), row, written, options["TOKENS"])
        case "route_backward_kernel":
            # Beside x the gradient of the experts, to which it adds its own.
            read = 2 * row + (4 + slope) * N_EXPERTS + (1 + 4 + 4) * K
            return Work(8 * N_EXPERTS * d, fill(d, "DIM"), read, row, options["TOKENS"])
        case "sort_kernel":
            return Work(0, 1, K, 4 * K, options["TOKENS"])
        case "sum_pairs_kernel":
            return Work(0, 1, K * row, row, options["ROWS"])
        case "draw_kept_kernel":
            return Work(0, 1, 0, kept, options["BLOCK"])
        case "mlp_kernel":
            useful = fill(d, "DIM") * fill(h, "HIDDEN")
            return Work(2 * d * (first + h), useful, row + 8 + kept, row, options["ROWS"])
        case "mlp_backward_kernel" | "weight_gradients_kernel":
            # Both compute the hidden layer and its gradient; one product with each weight follows.
            of_rows = kernel == "mlp_backward_kernel"
            useful = fill(d, "DIM") * fill(h, "HIDDEN")
            operations = 2 * d * (2 * first + h + (0 if of_rows else h))
            written = row + 4 if of_rows else 0
            return Work(operations, useful, 2 * row + 8 + kept, written, options["ROWS"])
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
            read = (first + h) * element + 2 * row
            return Work(2 * d * (first + h), fill(d, "COLUMNS"), read, 0, options["ROWS"])
        case _:
            return None


def warp_instructions(launch: Launch, by_depth: Sequence[int]) -> float:
    """What the launch's warps run together, each loop as often as the launch's sizes say.

    Args:
        by_depth: of the binary, ``loops.instructions_by_depth``.
    """
    # Of the weights' products a program computes one, in one of its kernel's four branches. Few
    # instructions stand outside of these.
    total, times = 0.0, 1 / 4 if launch.kernel.__name__ == "weight_backward_kernel" else 1.0
    for count, passes in zip_longest(by_depth, (1, *trips(launch)), fillvalue=1):
        times *= passes
        total += count * times
    return launch.programs * launch.options.get("num_warps", 4) * total


def trips(launch: Launch) -> tuple[float, ...]:
    """How often a program passes its loop, and the loop inside of it, on average.

    Of loops that the compiler unrolls the binary has none, and nothing is multiplied.
    """
    options = launch.options

    def cut(size: float, block: str) -> int:
        return math.ceil(size / options[block])

    match launch.kernel.__name__:
        case "mlp_kernel" | "mlp_backward_kernel":
            return (cut(options["hidden"], "HIDDEN"),)
        case "weight_gradients_kernel":
            return (cut(launch.window_rows, "ROWS"),)
        case "route_kernel":
            return (cut(options["dim"], "DIM"),)
        case "route_backward_kernel":
            return (cut(launch.value("chunk_tokens"), "TOKENS"),)
        case "hidden_kernel" | "hidden_backward_kernel":
            return (cut(options["dim"], "DEPTH"),)
        case "output_kernel":
            return (cut(options["hidden"], "DEPTH"),)
        case "gather_gradient_kernel":
            return (cut(options["dim"], "COLUMNS"),)
        case "weight_backward_kernel":
            rows = launch.value("order_ptr").shape[0] / options["n_experts"]
            return (cut(launch.window_rows if options["SPLIT"] else rows, "ROWS"),)
        case _:
            return ()


def roofline_share(work: Work, flops: float, gpu: GPU, resident: int) -> float:
    """The share that a launch allows.

    Args:
        flops: the GPU's, of the dtype.
        resident: programs that a multiprocessor holds at one time.
    """
    on_its_way = resident * work.rows * work.loaded * gpu.multiprocessors
    # What only stores waits for nothing.
    bandwidth = min(gpu.bandwidth, on_its_way / LATENCY) if work.loaded else gpu.bandwidth
    traffic = work.loaded + work.stored
    possible = max(work.operations / work.useful / flops, traffic / bandwidth)
    return round(max(work.operations / flops, traffic / gpu.bandwidth) / possible, 3)
