"""The study's scenes: what the attribute does to the images and to the outlines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data import DataSettings, PhantomSettings
from ..presets import PRESETS
from ..recipe import Recipe, SquareSettings


@dataclass(frozen=True)
class Scene:
    """One of them.

    Args:
        title: in words, for figures and tables.
        effect: of the phantom; None: real MRI.
        region: that is scored.
        seen: whether a combination of attribute values occurs in training; of one attribute all do.
    """

    title: str
    effect: Literal["rule", "appearance", "none", "two"] | None
    region: str = "lesion"


SCENES: dict[str, Scene] = {
    "rule": Scene("(a) a contouring rule that the image does not show", "rule"),
    "appearance": Scene("(b) an appearance that the image shows", "appearance"),
    "none": Scene("(c) an attribute without effect", "none"),
    "two": Scene("(d) two attributes, some combinations unseen in training", "two"),
    "mri": Scene("(e) real MRI, a contouring protocol", None, region="outlined"),
}

CASES = 480  # training cases of the phantom: 60 steps of 8 an epoch
VALIDATION_CASES, TEST_CASES = 25, 100  # of every group of the phantom
SHARES = (0.6, 0.25, 0.1, 0.05)
