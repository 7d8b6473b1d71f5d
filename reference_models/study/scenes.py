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
    """A kind of data, and for how long a network is trained on it.

    Args:
        title: in words, for figures and tables.
        effect: what the phantom's attribute does to its images; None: the data are real MRI.
        region: the region that is scored.
        epochs: of training; they make about 240 steps of 8 images.
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
    "mri": Scene("(e) real MRI, a contouring protocol", None, region="outlined tissue", epochs=3),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is, in the study or in a smoke run.

    Args:
        cases: number of training cases of the phantom.
        validation_cases, test_cases: number of such cases of the phantom in each group; where there
            are two attributes, half as many of each combination of their values.
        epochs: the most that a scene is trained for; it may have fewer.
        image_size: rows and columns that the network sees.
        batch_size: images of a training step.
    """

    cases: int = 480
    validation_cases: int = 20
    test_cases: int = 60
    epochs: int = 4
    image_size: int = 64
    batch_size: int = 8


FULL, QUICK = Sizes(), Sizes(64, 4, 4, 1, 32, 32)


@dataclass(frozen=True)
class Design:
    """What all jobs of a study have in common.

    Args:
        sizes: how much of everything there is.
        shares: of the attribute's values in the phantom's training cases.
        rule: what the phantom's attribute means for the outline, where it means anything.
    """

    sizes: Sizes = FULL
    shares: tuple[float, ...] = SHARES
    rule: Rule = "margin"

    def recipe(self, job: Job, folder: Path) -> Recipe:
        """The recipe that a job trains by; its run and its images lie in the study's folder."""
        scene, method = SCENES[job.scene], METHODS[job.method]
        recipe = PRESETS["study"]
        if scene.effect is None:
            # One head in one pose: without shifts its slices are learned by heart.
            framing = ImageFramingSettings(self.sizes.image_size, "whole", "shift")
            # What might be a better layer was first tried on the middle block.
            data = DataSettings("mni152", cache=folder / "frames", mni152="upper")
        else:
            framing = ImageFramingSettings(self.sizes.image_size, "whole", "none")
            part = 2 if scene.effect == "two" else 1
            data = DataSettings(
                "phantom",
                cache=folder / "frames",
                phantom=PhantomSettings(
                    effect=scene.effect,
                    rule=self.rule,
                    shares=self.shares,
                    cases=self.sizes.cases,
                    validation_cases_per_group=self.sizes.validation_cases // part,
                    test_cases_per_group=self.sizes.test_cases // part,
                    image_size=64,
                    seed=job.data_seed,
                ),
            )
        return dataclasses.replace(
            method.of(recipe),
            data=data,
            framing=framing,
            out=folder / "runs" / job.name,
            seed=job.init_seed,
            batch_size=self.sizes.batch_size,
            epochs=min(scene.epochs, self.sizes.epochs),
            learning_rate=job.learning_rate,
        )
