"""The shapes that are measured, and what a layer of such a shape must compute and move at least."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..arguments import ArgumentError
from ..paper import HIDDEN_RATIO, N_EXPERTS, K


@dataclass(frozen=True)
class Shape:
    """A batch of samples with ``tokens`` tokens each, of width ``dim``; ``values`` routers.

    ``experts`` of which each token takes ``k``.
    """

    name: str
    batch: int
    tokens: int
    dim: int
    values: int
    experts: int = N_EXPERTS
    k: int = K

    @property
    def total_tokens(self) -> int:
        """Tokens in the batch, T."""
        return self.batch * self.tokens

    @property
    def hidden(self) -> int:
        """Width inside an expert, H."""
        return HIDDEN_RATIO * self.dim

    def __str__(self) -> str:
        return f"{self.batch}×{self.tokens}×{self.dim}, {self.values} values"


# The 3D model takes 384×384×128 voxels and halves every dimension at every stage.
_STAGE_TOKENS = tuple((384 * 384 * 128) >> 3 * (stage + 1) for stage in range(5))
_STAGE_DIMS = (24, 24, 48, 96, 192)
# The width at which time and memory are drawn against the number of tokens.
SWEEP_DIM = 48


def _stages(batch: int, first: int) -> list[Shape]:
    stages = enumerate(zip(_STAGE_TOKENS, _STAGE_DIMS, strict=True))
    return [Shape(f"stage-{i}", batch, t, d, 4) for i, (t, d) in stages][first:]


def _sweep(*tokens: int) -> list[Shape]:
    return [Shape(f"sweep-{2 * t}", 2, t, SWEEP_DIM, 4) for t in tokens]


_QUICK = [Shape("quick-24", 2, 1024, 24, 4), Shape("quick-48", 2, 196, 48, 3)]

# Cut to fit on a CPU: the 2D batch from 42 to 8, stage 0 from 192·192·64 tokens to 2·131072.
CPU_SHAPES = {
    "goals": [
        Shape("stage-0-cut", 2, 131072, 24, 4),
        Shape("wide-48", 2, 65536, 48, 4),
        Shape("wide-192", 2, 8192, 192, 4),
        Shape("2d-cut", 8, 196, 768, 3),
    ],
    "stages": [Shape("stage-1", 1, _STAGE_TOKENS[1], 24, 4), *_stages(2, 2)],
    "sweep": _sweep(1024, 4096, 16384),
    # One image in a ViT-B, one window and one image in a Swin; features of 64 images and of one.
    "small": [
        Shape("small-196", 1, 196, 768, 3),
        Shape("small-49", 1, 49, 384, 3),
        Shape("small-1024", 1, 1024, 96, 4),
        Shape("pooled-64", 64, 1, 768, 3),
        Shape("pooled-1", 1, 1, 768, 3),
    ],
}
GPU_SHAPES = {
    "goals": [
        Shape("2d", 42, 196, 768, 3),
        Shape("stage-0", 1, _STAGE_TOKENS[0], 24, 4),
        Shape("stage-0-wide", 1, _STAGE_TOKENS[0], 48, 4),
    ],
    "stages": _stages(4, 1),
    "sweep": _sweep(8192, 32768, 131072, 524288),
}
SHAPES = {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES}


def all_shapes(device: str) -> list[Shape]:
    """The shapes of all groups, which the README's section of the device shows."""
    return [shape for group in SHAPES[device].values() for shape in group]


def parse_shapes(text: str, device: str) -> list[Shape]:
    """Shapes from a comma-separated list of groups, names and ``BxTxDxA``.

    Raises:
        ArgumentError: a word of it is none of these.

    >>> [str(shape) for shape in parse_shapes("stage-4,2x100x16x3", "cpu")]
    ['2×576×192, 4 values', '2×100×16, 3 values']
    """
    groups = SHAPES[device]
    by_name = {shape.name: shape for shape in all_shapes(device)}
    shapes: list[Shape] = []
    for word in text.split(","):
        if word == "all":
            shapes += by_name.values()
        elif word == "quick":
            shapes += _QUICK
        elif word in groups:
            shapes += groups[word]
        elif word in by_name:
            shapes.append(by_name[word])
        elif re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", word):
            shapes.append(Shape(word, *(int(number) for number in word.split("x"))))
        else:
            raise ArgumentError(
                f"shapes: got {word!r}, expected one of all, quick, {', '.join(groups)}, "
                f"{', '.join(by_name)}, or batch x tokens x dim x attribute values, as in "
                "2x1024x48x4."
            )
    return list(dict.fromkeys(shapes))


def flops(shape: Shape, which: str, *, routes: bool = True) -> int:
    """Multiply-adds counted as two, without softmax, noise and activations.

    Forward: 2·(2·k·T·D·H) for the experts, 2·2·E·D·T for the clean and the noise router. Backward:
    twice that; what a layer recomputes is not counted. Eval: forward without the noise router.
    ``routes=False`` leaves the router out.

    >>> flops(Shape("", 1, 10, 3, 1), "forward")  # 2·2·2·10·3·12 + 2·2·8·3·10
    3840
    """
    routers = 0 if not routes else 1 if which == "eval" else 2
    router = routers * 2 * shape.experts * shape.dim * shape.total_tokens
    if which.startswith("router"):
        return router
    experts = 2 * (2 * shape.k * shape.total_tokens * shape.dim * shape.hidden)
    return (experts + router) * (3 if which == "forward+backward" else 1)


def min_bytes(shape: Shape, which: str, element_size: int, *, routes: bool = True) -> int:
    """The bytes that must cross the memory bus if all else stays on the chip.

    Forward: x read, y written, every parameter read. Backward: x and y's gradient read, x's
    gradient written, every parameter read and its gradient written. Router alone: x and the
    router's parameters read, k int64 indices, k fp32 gates and E fp32 logits a token written.
    Eval: forward without the noise router's parameters. Of T tokens fewer than E / k, the
    parameters of k·T experts count.

    >>> min_bytes(Shape("", 1, 10, 3, 1), "router", 4)  # 4·(30 + 64) + 10·(16 + 8 + 32)
    936
    """
    d, h, t = shape.dim, shape.hidden, shape.total_tokens
    routers = 0 if not routes else 1 if which == "eval" else 2
    router = routers * shape.values * shape.experts * (d + 1)
    if which.startswith("router"):
        return element_size * (t * d + router) + t * (8 * shape.k + 4 * shape.k + 4 * shape.experts)
    # A dense MLP of equal active FLOPs has k experts' weights; few tokens cannot reach all experts.
    used = min(shape.experts, shape.k * t) if routes else shape.k
    parameters = router + used * (2 * d * h + h + d)
    forward = 2 * t * d + parameters
    both = forward + 3 * t * d + 2 * parameters
    return element_size * (both if which == "forward+backward" else forward)
