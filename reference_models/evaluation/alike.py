"""Checks whether the networks of several runs can predict the same cases together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from ..errors import RunError
from ..recipes.recipe import Recipe
from ..recipes.serial import flat, to_json
from ..training.runs import Task

Loaded: TypeAlias = tuple[Recipe, Task, nn.Module]

# Settings of the data that may differ between networks that predict together: which case is in
# which split, and what the task says anyway.
_MAY_DIFFER = {"attributes", "cache", "fold", "folds", "split_seed", "splits"}


def require_alike(
    first: Path, expected: Loaded, folder: Path, found: Loaded, *, rooted: bool
) -> None:
    """Raises unless two networks can predict together.

    Args:
        first, expected: folder and content of the first run.
        folder, found: folder and content of the other run.
        rooted: whether the user has named the folder of the data.

    Raises:
        RunError: they were trained for other attributes, classes or channels, see other frames of
            the images, or treat unknown attributes differently.
    """
    differing = [
        difference.replace("the run has", f"{first} has").replace("the data", f"{folder}")
        for difference in expected[1].differences(found[1])
    ]
    here, there = (_terms(recipe, rooted) for recipe, _, _ in (expected, found))
    differing += [
        f"{name}: {first} has {here.get(name)}, {folder} {there.get(name)}"
        for name in here | there
        if here.get(name) != there.get(name)
    ]
    receiving = {
        recipe.model.told: run for run, (recipe, *_) in ((first, expected), (folder, found))
    }
    if len(receiving) > 1:
        differing.append(
            f"the network of {receiving[True]} receives the attributes, and the network of "
            f"{receiving[False]} does not"
        )
    if differing:
        raise RunError(
            f"{folder}: cannot predict together with {first}, because their settings differ; "
            + "; ".join(differing)
        )


def _terms(recipe: Recipe, rooted: bool) -> dict[str, Any]:
    """Lists what decides, beside the task, which image and attributes a network receives."""
    free = _MAY_DIFFER | ({"root"} if rooted else set())
    data, windows = flat(to_json(recipe.data)), recipe.framing.windows(1)
    framing = recipe.framing.build()
    return (
        {f"data.{name}": value for name, value in data.items() if name not in free}
        | {"framing": type(framing).__name__}
        | {f"framing.{name}": value for name, value in vars(framing).items()}
        | {f"windows.{name}": value for name, value in (vars(windows) if windows else {}).items()}
        | {
            "leave_out_unknown": recipe.leave_out_unknown,
            "unknown": recipe.model.unknown,
        }
    )
