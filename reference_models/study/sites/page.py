"""The page of the study of many sites: what has been run, and what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_whole
from ...markdown import markdown_table
from ..csv_table import read_result
from ..methods import METHODS
from ..quote import short
from ..statistics import student_interval
from . import plan as design
from .plan import COMPARED, FIRST_SEEDS, LABELLED, MAIN, RIVALS, SCENES, SEEDS, VARIANTS
from .runner import MADE_WITH, SiteRows
from .tables import SiteRun

PAGE = "README.md"
_NONE = "—"
_NOT_RUN = "not run"


def write_page(results: Path) -> None:
    """Writes the page beside the csv.

    Raises:
        DataError: a file of the results is missing, or holds something else.
    """
    made = json.loads(read_result(results / MADE_WITH))
    page = text_of(SiteRows.read(results), made["machines"])
    path = results / PAGE
    write_whole(path, lambda target: target.write_text(page, encoding="utf-8"))


def text_of(rows: SiteRows, machines: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        rows: what is done.
        machines: what they were made with.
    """
    parts = [
        "# Many sites, few protocols",
        "Written by `python -m reference_models.study.sites`, which goes on with what is not run.",
        "## How it was designed, before the first run",
        (design.__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(),
        "## What has been run",
        progress(rows),
        *(f"- {_machine(machine)}" for machine in machines),
        "## Where dMoE is ahead",
        compared(rows),
        "## Site unknown",
        unknown(rows),
        "## A new site",
        newcomers(rows),
        "## Variants",
        variants(rows),
        "## Learning rates",
        rates(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def progress(rows: SiteRows) -> str:
    """How far every part of the plan is."""
    lines = []
    for name, scene in SCENES.items():
        tuned = sum(rows.plan.rate(name, method) is not None for method in COMPARED)
        seeds = _complete(rows, name, COMPARED)
        wanted = len(rows.plan.seeds(name))
        more = "" if name in MAIN or wanted == len(SEEDS) else f", {len(SEEDS)} if needed"
        adapted = {
            row.seed
            for row in rows.adaptations
            if row.scene == name and row.seed in SEEDS[:FIRST_SEEDS]
        }
        tried = _complete(rows, name, (*VARIANTS, "dmoe"))
        lines.append(
            [
                f"`{name}`: {scene.title}",
                f"{tuned} of {len(COMPARED)}",
                f"{len(seeds)} of {wanted}{more}",
                f"{len(adapted)} of {FIRST_SEEDS} begun" if name in MAIN else _NONE,
                f"{len(tried)} of {FIRST_SEEDS}" if name in MAIN else _NONE,
            ]
        )
    header = [
        "scene",
        "methods tuned",
        "seeds with all methods",
        "new sites, seeds",
        "variants, seeds",
    ]
    seconds = sum(run.seconds for run in rows.runs)
    count = len(rows.runs)
    text = f"{count} trainings, {seconds / 60:.0f} minutes of one core's work."
    trained = [run for run in rows.runs if run.task == "train"]
    cut_off = sum(not run.stopped for run in trained)
    text += f" Of {len(trained)} that were to go on until validation stops rising, {cut_off} ran "
    text += "out of steps."
    return f"{text}\n\n{markdown_table(header, lines)}"


def compared(rows: SiteRows) -> str:
    """Every method's Dice in every scene, and dMoE's difference from it."""
    parts = []
    for name, scene in SCENES.items():
        title = f"### `{name}`: {scene.title}"
        if not any(_runs(rows, name, method) for method in COMPARED):
            parts.append(f"{title}\n\n{_NOT_RUN}.")
            continue
        lines = []
        for method in COMPARED:
            runs = _runs(rows, name, method)
            cells = [
                of_seeds([run.dice for run in runs]),
                of_seeds([r.worst_tenth for r in runs]),
            ]
            cells.append(_NONE)
            if method != "dmoe":
                cells[-1] = difference(rows.plan.differences(name, "dmoe", method))
            cost = f"{runs[0].multiply_adds / 1e6:.2f} M" if runs else _NONE
            steps = f"{np.median([run.steps for run in runs]):.0f}" if runs else _NONE
            lines.append([METHODS[method].title, *cells, cost, steps])
        table = markdown_table(
            ["", "Dice", "lowest tenth of sites", "dMoE minus this", "multiply-adds", "steps"],
            lines,
        )
        parts.append(f"{title}\n\n{verdict(rows, name)}\n\n{table}")
    legend = (
        "Dice: of the test cases, its mean over seeds (lowest … highest; number of seeds). "
        "Difference: paired by seed, Student's 95 % interval, and on how many seeds dMoE is ahead. "
        "Steps: the median of those to the weights that were kept."
    )
    return "\n\n".join([legend, *parts])


def verdict(rows: SiteRows, scene: str) -> str:
    """What can be said of a scene."""
    wanted = rows.plan.seeds(scene)
    done = _complete(rows, scene, COMPARED)
    if len(done) < len(wanted):
        return f"**{len(done)} of {len(wanted)} seeds have all methods: nothing is settled.**"
    words = []
    for rival in RIVALS:
        limits = student_interval(rows.plan.differences(scene, "dmoe", rival, wanted))
        low, high = limits or (0.0, 0.0)
        state = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
        words.append(f"{state} {METHODS[rival].title}")
    return f"**dMoE is {', '.join(words)}, on all {len(wanted)} seeds of the plan.**"


def unknown(rows: SiteRows) -> str:
    """What is lost where the site is not known, by two ways to predict."""
    lines = []
    for scene in SCENES:
        for method in COMPARED:
            runs = [run for run in _runs(rows, scene, method) if run.policy is not None]
            blind = {run.seed: run.dice for run in _runs(rows, scene, "wide")}
            if not runs:
                continue
            gains = [run.outputs - run.policy for run in runs]  # type: ignore[operator]
            lines.append(
                [
                    scene,
                    METHODS[method].title,
                    *(
                        of_seeds([getattr(r, n) for r in runs])
                        for n in ("known", "policy", "outputs")
                    ),
                    difference(gains),
                    of_seeds([blind[run.seed] for run in runs if run.seed in blind]),
                ]
            )
    if not lines:
        return f"{_NOT_RUN}."
    header = [
        "scene", "", "site known", "unknown: the network's average",
        "unknown: outputs averaged over all sites", "outputs minus network's", "blind network",
    ]  # fmt: skip
    return (
        "The same networks, told that the site is not known: the routers or embeddings of all "
        "sites averaged, in one forward pass; and the probabilities averaged, in one pass for each "
        "site. The blind network has all test cases, the others two of each site.\n\n"
        + markdown_table(header, lines)
    )


def newcomers(rows: SiteRows) -> str:
    """What a few labelled cases of a new site are good for."""
    tested = [row for row in rows.adaptations if row.seed in SEEDS]
    parts = []
    for scene in MAIN:
        lines = []
        for method in COMPARED:
            for part in ("none", "own", "all"):
                found = [
                    row
                    for row in tested
                    if (row.scene, row.method, row.part) == (scene, method, part)
                ]
                if not found:
                    continue
                cells = [
                    of_seeds([row.dice for row in found if row.cases == cases])
                    for cases in (0, *LABELLED)
                ]
                lines.append([METHODS[method].title, part, f"{found[0].numbers:,}", *cells])
        title = f"### `{scene}`: {SCENES[scene].title}"
        header = ["", "adapted", "numbers", "no case", *(f"{n} cases" for n in LABELLED)]
        table = markdown_table(header, lines) if lines else f"{_NOT_RUN}."
        parts.append(f"{title}\n\n{table}")
    legend = (
        "Dice of the new sites' test cases. Adapted: none (told that the site is unknown), what "
        "the network has of the new site alone (own: a router, a row of FiLM's, an MLP, an input "
        "channel's weights), or all weights."
    )
    return "\n\n".join([legend, *parts])


def variants(rows: SiteRows) -> str:
    """The layer with one setting changed, where there is more than one scene to tell by."""
    lines = []
    for method, base in VARIANTS.items():
        cells = [difference(rows.plan.differences(scene, method, base)) for scene in MAIN]
        if any(cell != _NOT_RUN for cell in cells):
            lines.append([METHODS[method].title, METHODS[base].title, *cells])
    if not lines:
        return f"{_NOT_RUN}."
    return markdown_table(["", "minus", *MAIN], lines)


def rates(rows: SiteRows) -> str:
    """The learning rates chosen."""
    lines = [
        [scene, *(f"{rate:g}" if rate else _NONE for rate in found)]
        for scene in SCENES
        if any(found := [rows.plan.rate(scene, method) for method in COMPARED])
    ]
    if not lines:
        return f"{_NOT_RUN}."
    return markdown_table(["", *(METHODS[method].title for method in COMPARED)], lines)


def difference(by_seed: Sequence[float]) -> str:
    """The mean of a difference, its interval, and on how many seeds it is above zero.

    Example:
        >>> difference([0.01, 0.02, 0.03]), difference([0.01]), difference([])
        ('+.020 (-.005 to .045; 3 of 3)', '+.010 (no interval; 1 of 1)', 'not run')
    """
    if not by_seed:
        return _NOT_RUN
    mean = short(float(np.mean(by_seed)))
    limits = student_interval(by_seed)
    between = f"{short(limits[0])} to {short(limits[1])}" if limits else "no interval"
    sign = "" if mean.startswith("-") else "+"
    return f"{sign}{mean} ({between}; {sum(d > 0 for d in by_seed)} of {len(by_seed)})"


def _runs(rows: SiteRows, scene: str, method: str) -> list[SiteRun]:
    """The tested trainings, one a seed."""
    return [
        run
        for run in rows.runs
        if (run.task, run.scene, run.method) == ("train", scene, method) and run.seed in SEEDS
    ]


def _complete(rows: SiteRows, scene: str, methods: Sequence[str]) -> set[int]:
    """The seeds that all of the methods have."""
    return set.intersection(*({r.seed for r in _runs(rows, scene, m)} for m in methods))


def of_seeds(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return _NONE
    mean = short(float(np.mean(found)))
    return f"**{mean}** ({short(min(found))} … {short(max(found))}; {len(found)})"


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['machine']}, {machine['cores']} cores, {machine['instructions']}, "
        f"PyTorch {machine['torch']}, dmoe_layer {machine['dmoe_layer']}"
    )
