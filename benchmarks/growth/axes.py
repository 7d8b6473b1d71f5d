"""The numbers that grow one at a time, and the shapes along each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..layer.shapes import Shape


@dataclass(frozen=True)
class Axis:
    """A number of the layer that takes ``values``, rising, while all others stay those of ``base``.

    Attributes:
        name: a field of `Shape`, or "total_tokens": those of all samples together.
        title: what it is called in tables and figures.
    """

    name: str
    title: str
    base: Shape
    values: tuple[int, ...]

    def shapes(self) -> list[tuple[int, Shape]]:
        """The shapes, each with its value.

        >>> axis = Axis("k", "k", Shape("", 2, 8, 16, 4), (1, 4))
        >>> [(value, shape.k, shape.experts) for value, shape in axis.shapes()]
        [(1, 1, 8), (4, 4, 8)]
        """
        return [(value, self._at(value)) for value in self.values]

    def _at(self, value: int) -> Shape:
        name = f"{self.name}-{value}"
        if self.name == "total_tokens":
            return replace(self.base, name=name, tokens=value // self.base.batch)
        changes: dict[str, int] = {self.name: value}
        return replace(self.base, name=name, **changes)


def axes(quick: bool = False) -> list[Axis]:
    """All numbers that grow; ``quick``: two points of each, with few tokens."""
    tokens = 256 if quick else 8192
    base = Shape("base", 2, tokens, 48, 4)
    # Of sixteen samples, so that sixteen values are in use wherever there are so many.
    of_samples = Shape("base", 16, tokens // 8, 48, 4)
    # Its arithmetic grows with the square, so fewer tokens.
    of_width = Shape("base", 2, tokens // 8, 48, 4)
    found = [
        Axis("total_tokens", "tokens", base, tuple(2**n for n in range(10, 21, 2))),
        Axis("experts", "experts", base, (2, 4, 8, 16, 32, 64)),
        Axis("k", "k", base, (1, 2, 4, 8)),
        Axis("values", "attribute values", of_samples, (1, 4, 16, 64, 256, 1000)),
        Axis("dim", "D", of_width, tuple(2**n for n in range(4, 11))),
    ]
    return [replace(axis, values=axis.values[:2]) for axis in found] if quick else found
