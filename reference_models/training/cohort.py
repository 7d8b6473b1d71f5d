"""The cohort of a run: its splits, the cases that it leaves out, and their frames."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.cases import UNKNOWN, Dataset
from ..data.folds import deal_subjects
from ..data.loading import Frames
from ..data.splits import (
    VALIDATION_SHARE,
    Splits,
    absent_values,
    choose_splits,
    describe_unused,
    read_splits,
)
from ..errors import RunError, shown
from ..recipes.recipe import Recipe


@dataclass(frozen=True)
class Cohort:
    """The cases of a run.

    Args:
        recipe: the resolved recipe.
        dataset: the data set of the recipe.
        splits: the run's splits, which include the cases that are left out.
        left_out: ids of training and validation cases that are left out, since their attribute is
            unknown and the recipe says so.
    """

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    left_out: frozenset[str]

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset, *, resume: bool) -> Cohort:
        """Gathers the cases of a new run, or of the one in ``recipe.out``.

        Raises:
            RunError: some cases have an unknown attribute and the network refuses them, no cases
                are left, or there are fewer training cases than a batch needs.
            DataError: the splits cannot be read or made.
        """
        data, model = recipe.data, recipe.model
        if resume:
            needed = ("train",) if data.fold == "all" else ("train", "validation")
            splits = read_splits(recipe.out / "splits.json", dataset, needed=needed)
        else:
            splits = choose_splits(dataset, data.splits, data.split_seed, data.fold, data.folds)
        used = {*splits.train, *splits.validation}
        lacking = [c for c in dataset.cases if UNKNOWN in c.attributes and c.case_id in used]
        left_out: frozenset[str] = frozenset()
        if recipe.leave_out_unknown:
            left_out = frozenset(case.case_id for case in lacking)
        elif lacking and model.unknown == "error" and model.told:
            raise RunError(
                f"unknown: {len(lacking)} cases have an unknown attribute, such as "
                f"{lacking[0].case_id}, and the network refuses them; train without them by "
                "--leave-out-unknown, or give the unknown value a router by --unknown learned."
            )
        cohort = cls(recipe, dataset, splits, left_out)
        patches = recipe.framing.training_patches()
        each = patches.count if patches else 1
        if (most := len(cohort.train) * each) < recipe.batch_size:
            of_each = f" with {each} patches each" if patches else ""
            advice = f"; choose --batch-size {most} or less" if most else ""
            raise RunError(
                f"batch_size: got {recipe.batch_size}, but there are only {len(cohort.train)} "
                f"training cases{of_each}{advice}."
            )
        if not cohort.validation:
            raise RunError(
                f"leave_out_unknown: no validation case is left, since all "
                f"{len(splits.validation)} have an unknown attribute; name other splits by "
                "--splits, or train with --unknown learned."
            )
        return cohort

    @property
    def train(self) -> tuple[str, ...]:
        return tuple(case for case in self.splits.train if case not in self.left_out)

    @property
    def held_out(self) -> bool:
        """Whether there are validation cases, which choose the best checkpoint."""
        return bool(self.splits.validation)

    @property
    def validation(self) -> tuple[str, ...]:
        """The cases that are scored after each epoch: the validation split or, if no case is held
        out, as many of the training cases, to watch the training."""
        if self.held_out:
            return tuple(case for case in self.splits.validation if case not in self.left_out)
        trained = [case for case in self.dataset.cases if case.case_id in {*self.train}]
        dealt = deal_subjects(trained, round(1 / VALIDATION_SHARE), self.splits.seed)
        return tuple(case.case_id for case in trained if dealt[case.subject] == 0)

    def frames(self, case_ids: tuple[str, ...], *, training: bool = False) -> Frames:
        """Makes the frames of cases; for training they are augmented, and volumes are cut into
        patches."""
        recipe = self.recipe
        return Frames(
            self.dataset,
            case_ids,
            recipe.framing.build(),
            patches=recipe.framing.training_patches() if training else None,
            augment=recipe.framing.augment if training else "none",
            seed=recipe.seed,
            cache=recipe.data.cache,
        )

    def group_counts(self) -> Tensor:
        """Counts the training cases of each value of the first attribute; the last is unknown."""
        trained = set(self.train)
        found = Counter(c.attributes[0] for c in self.dataset.cases if c.case_id in trained)
        values = range(len(self.dataset.attributes[0].values))
        return torch.tensor([found[value] for value in values] + [found[UNKNOWN]])

    def remarks(self) -> list[str]:
        """Gives sentences on the run's cases, which its output shows."""
        lacking = absent_values(self.dataset, set(self.train))
        if self.recipe.leave_out_unknown:  # another remark says so
            unknown = {f"{a.name} {a.label(UNKNOWN)}" for a in self.dataset.attributes}
            lacking = [value for value in lacking if value not in unknown]
        said = [
            f"{what}: {shown(names)}"
            for what, names in (
                ("these cases are left out, since an attribute is unknown", sorted(self.left_out)),
                ("no training case has these values, so the router cannot learn them", lacking),
            )
            if names
        ]
        if unused := describe_unused(self.dataset, self.splits):
            said.append(unused)
        if not self.held_out:
            said.append(
                "no case is held out (--fold all): the validation scores below are those of "
                f"{len(self.validation)} training cases and choose nothing; training goes on to "
                "its last epoch, whose checkpoint counts as the best"
            )
        return said
