"""The study's scenes: what the attribute does to the images and to the outlines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..data import DataSettings, PhantomSettings
from ..data.phantom import Effect, Rule
from ..recipes.framings import ImageFramingSettings
from ..recipes.presets import PRESETS
from ..recipes.recipe import Recipe
from .jobs import Job
from .methods import METHODS

# Of the phantom's attribute in training: a majority, and a minority of 24 cases.
SHARES = (0.6, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class Scene:
    """One of them.

    Args:
        title: in words, for figures and tables.
        effect: of the phantom; None: real MRI.
        region: that is scored.
        epochs: about 240 steps of 8.
    """

    title: str
    effect: Effect | None
    region: str = "lesion"
    epochs: int = 4


SCENES: dict[str, Scene] = {
    "rule": Scene("(a) a contouring rule that the image does not show", "rule"),
    "appearance": Scene("(b) an appearance that the image shows", "appearance"),
    "none": Scene("(c) an attribute without effect", "none"),
    "two": Scene("(d) two attributes, some combinations unseen in training", "two"),
    "mri": Scene("(e) real MRI, a contouring protocol", None, region="outlined", epochs=3),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the study's, or a smoke run's.

    Args:
        cases: training cases of the phantom.
        validation_cases, test_cases: of the phantom, of each group; of two attributes, half as many
            of each combination of their values.
        epochs: at most; a scene may have fewer.
        image_size: that the network sees, rows and columns.
        batch_size: of training.
    """

    cases: int = 480
    validation_cases: int = 20
    test_cases: int = 60
    epochs: int = 4
    image_size: int = 64
    batch_size: int = 8


FULL, QUICK = Sizes(), Sizes(64, 4, 4, 1, 32, 32)


def recipe_of(
    job: Job,
    sizes: Sizes,
    out: Path,
    *,
    shares: tuple[float, ...],
    rule: Rule,
    cache: Path,
) -> Recipe:
    """What a job trains by."""
    scene, method = SCENES[job.scene], METHODS[job.method]
    recipe = PRESETS["study"]
    if scene.effect is None:
        # One head in one pose: without shifts its slices are learned by heart.
        framing = ImageFramingSettings(sizes.image_size, "whole", "shift")
        # What might be a better layer was first tried on the middle block.
        data = DataSettings("mni152", cache=cache, mni152="upper")
    else:
        framing = ImageFramingSettings(sizes.image_size, "whole", "none")
        part = 2 if scene.effect == "two" else 1
        data = DataSettings(
            "phantom",
            cache=cache,
            phantom=PhantomSettings(
                effect=scene.effect,
                rule=rule,
                shares=shares,
                cases=sizes.cases,
                validation_cases_per_group=sizes.validation_cases // part,
                test_cases_per_group=sizes.test_cases // part,
                image_size=64,
                seed=job.data_seed,
            ),
        )
    return dataclasses.replace(
        method.of(recipe),
        data=data,
        framing=framing,
        out=out,
        seed=job.init_seed,
        batch_size=sizes.batch_size,
        epochs=min(scene.epochs, sizes.epochs),
        learning_rate=job.learning_rate,
    )
