"""Whom a run learns from: its splits, the cases that it leaves out, and their frames."""

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
    read_splits,
)
from ..errors import RunError, shown
from ..recipes.recipe import Recipe


@dataclass(frozen=True)
class Cohort:
    """The cases of a run.

    Args:
        recipe: resolved.
        dataset: the recipe's.
        splits: the run's; the cases left out stand in them too.
        left_out: ids of training and validation cases whose attribute is not known, where those
            are to be left out.
    """

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    left_out: frozenset[str]

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset, *, resume: bool) -> Cohort:
        """Gathers the cases of a new run, or of the one in ``recipe.out``.

        Raises:
            RunError: cases lack an attribute and the router is to refuse them, none are left, or
                there are fewer training cases than a batch has.
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
                f"unknown: {len(lacking)} cases lack an attribute ({lacking[0].case_id} is one) "
                "and the network is to refuse them; --leave-out-unknown trains without them, and "
                "--unknown learned has a route for them."
            )
        cohort = cls(recipe, dataset, splits, left_out)
        patches = recipe.framing.training_patches()
        each = patches.count if patches else 1
        if (most := len(cohort.train) * each) < recipe.batch_size:
            of_each = f", of {each} patches each" if patches else ""
            advice = f"; choose --batch-size {most} or less" if most else ""
            raise RunError(
                f"batch_size: got {recipe.batch_size}, but there are {len(cohort.train)} training "
                f"cases{of_each}{advice}."
            )
        if not cohort.validation:
            raise RunError(
                f"leave_out_unknown: leaves no validation case (of {len(splits.validation)}); "
                "name others by --splits, or train with --unknown learned."
            )
        return cohort

    @property
    def train(self) -> tuple[str, ...]:
        return tuple(case for case in self.splits.train if case not in self.left_out)

    @property
    def held_out(self) -> bool:
        """Whether there are cases to choose the best checkpoint by that are not trained on."""
        return bool(self.splits.validation)

    @property
    def validation(self) -> tuple[str, ...]:
        """Cases that are scored after each epoch: the validation split or, where none is held out,
        as many of the training cases, to watch the training by."""
        if self.held_out:
            return tuple(case for case in self.splits.validation if case not in self.left_out)
        trained = [case for case in self.dataset.cases if case.case_id in {*self.train}]
        dealt = deal_subjects(trained, round(1 / VALIDATION_SHARE), self.splits.seed)
        return tuple(case.case_id for case in trained if dealt[case.subject] == 0)

    def frames(self, case_ids: tuple[str, ...], *, training: bool = False) -> Frames:
        """These cases as the network sees them: augmented and, of volumes, by patches if it is
        to train on them."""
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
        """Training cases by value of the first attribute, the unknown last."""
        trained = set(self.train)
        found = Counter(c.attributes[0] for c in self.dataset.cases if c.case_id in trained)
        values = range(len(self.dataset.attributes[0].values))
        return torch.tensor([found[value] for value in values] + [found[UNKNOWN]])

    def remarks(self) -> list[str]:
        """What a reader of the run's output should know of its cases."""
        lacking = absent_values(self.dataset, set(self.train))
        if self.recipe.leave_out_unknown:  # which is said already
            unknown = {f"{a.name} {a.label(UNKNOWN)}" for a in self.dataset.attributes}
            lacking = [value for value in lacking if value not in unknown]
        told = [
            f"{what}: {shown(names)}"
            for what, names in (
                ("left out, an attribute not known", sorted(self.left_out)),
                ("without a training case, so never learned", lacking),
            )
            if names
        ]
        if not self.held_out:
            told.append(
                "no case is held out (--fold all): what is called validation here is of "
                f"{len(self.validation)} training cases and decides nothing; training goes on to "
                "its last epoch, whose checkpoint is the best and the last"
            )
        return told
