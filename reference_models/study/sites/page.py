"""The page of the study of many sites: what has been run, and the results."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_whole
from ...markdown import markdown_table
from ..csv_table import read_result
from ..methods import METHODS
from ..quote import EXPLAINED, short
from ..statistics import student_interval
from . import plan as design
from .learning import TRAINING
from .plan import COMPARED, FIRST_SEEDS, LABELLED, MAIN, RIVALS, SCENES, SEEDS, VARIANTS
from .runner import MADE_WITH, SiteRows
from .tables import SiteRun

PAGE = "README.md"
_NONE = "—"
_NOT_RUN = "not run"
# A training whose best weights come this soon had hardly begun: most take thousands of steps.
EARLY_STEPS = 500


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
        "The command `python -m reference_models.study.sites` writes this page and continues the "
        f"study. {EXPLAINED} says what the results mean. Dice is the mean Dice of the test cases. "
        "A *blind* network does not receive the site.",
        "## The design, fixed before the first run",
        (design.__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(),
        "## What has been run",
        progress(rows),
        *(f"- {_machine(machine)}" for machine in machines),
        "## Where dMoE is ahead",
        compared(rows),
        "## When the site is unknown",
        unknown(rows),
        "## A new site",
        newcomers(rows),
        "## Variants of the layer",
        variants(rows),
        "## Learning rates",
        rates(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def progress(rows: SiteRows) -> str:
    """How much of every part of the plan has been run."""
    lines = []
    for name, scene in SCENES.items():
        tuned = sum(rows.plan.rate(name, method) is not None for method in COMPARED)
        seeds = _complete(rows, name, COMPARED)
        wanted = len(rows.plan.seeds(name))
        more = "" if name in MAIN or wanted == len(SEEDS) else f", {len(SEEDS)} if needed"
        adapted = {row.seed for row in rows.adaptations if row.scene == name and row.seed in SEEDS}
        tried = _complete(rows, name, (*VARIANTS, "dmoe"))
        lines.append(
            [
                f"`{name}`: {scene.title}",
                f"{tuned} of {len(COMPARED)}",
                f"{len(seeds)} of {wanted}{more}",
                f"{len(adapted)} of {len(SEEDS)} started" if name in MAIN else _NONE,
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
    text = f"{count} trainings took {seconds / 60:.0f} minutes of one core."
    trained = [run for run in rows.runs if run.task == "train"]
    cut_off = sum(not run.stopped for run in trained)
    text += (
        f" {len(trained)} of them were to end when validation stopped rising; {cut_off} of these "
    )
    text += "reached the largest number of steps before that."
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
        parts.append(f"{title}\n\n{verdict(rows, name)}\n\n{table}\n\n{endings(rows, name)}")
    legend = (
        "Dice is the **mean over seeds** (lowest … highest seed; number of seeds). A column named "
        "minus has the mean difference, paired by seed, with Student's 95 % interval and the "
        "number of seeds on which dMoE is ahead. Multiply-adds are those of a forward pass over "
        "one image. Steps are those until the retained weights, as a median over seeds."
    )
    return "\n\n".join([legend, overview(rows), *parts])


def verdict(rows: SiteRows, scene: str) -> str:
    """What the results of a scene show."""
    wanted = rows.plan.seeds(scene)
    done = _complete(rows, scene, COMPARED)
    if len(done) < len(wanted):
        return f"**{len(done)} of {len(wanted)} seeds have all methods: nothing is decided yet.**"
    words: dict[str, list[str]] = {}
    for rival in RIVALS:
        limits = student_interval(rows.plan.differences(scene, "dmoe", rival, wanted))
        low, high = limits or (0.0, 0.0)
        state = "ahead of" if low > 0 else "behind" if high < 0 else "not distinguishable from"
        words.setdefault(state, []).append(METHODS[rival].title)
    states = "; ".join(f"{state} {', '.join(names)}" for state, names in words.items())
    return f"**On all {len(wanted)} seeds of the plan dMoE is {states}.**"


def endings(rows: SiteRows, scene: str) -> str:
    """How the trainings of a scene ended, and the differences without those that ended early."""
    runs = [run for method in COMPARED for run in _runs(rows, scene, method)]
    cut_off = sum(not run.stopped for run in runs)
    text = (
        f"{cut_off} of the {len(runs)} trainings reached {TRAINING.most} steps before validation "
        "stopped rising"
    )
    text += ", so longer training could change these scores." if cut_off else "."
    early = {
        method: {run.seed for run in _runs(rows, scene, method) if run.steps <= EARLY_STEPS}
        for method in COMPARED
    }
    found = [
        f"{METHODS[method].title} on seed {', '.join(map(str, sorted(seeds)))}"
        for method, seeds in early.items()
        if seeds
    ]
    if not found:
        return text
    text += f" The best weights were those of step {EARLY_STEPS} or before with "
    text += f"{'; '.join(found)}."
    without = []
    for rival in early:
        if rival != "dmoe" and (left_out := early["dmoe"] | early[rival]):
            seeds = [seed for seed in SEEDS if seed not in left_out]
            if by_seed := rows.plan.differences(scene, "dmoe", rival, seeds):
                without.append(f"dMoE minus {METHODS[rival].title} is {difference(by_seed)}")
    if without:
        text += " Without the seeds on which one of the two networks did so, "
        text += f"{'; '.join(without)}. This second comparison was not planned."
    return text


def overview(rows: SiteRows) -> str:
    """How many scenes are done, and how dMoE differs from the others in each that was begun."""
    lines, done = [], 0
    for name, scene in SCENES.items():
        seeds = sorted(_complete(rows, name, COMPARED))
        wanted = len(rows.plan.seeds(name))
        done += len(seeds) == wanted
        if seeds:
            scores = [run.dice for run in _runs(rows, name, "dmoe") if run.seed in seeds]
            cells = [scene.title, f"{len(seeds)} of {wanted}", of_seeds(scores)]
            cells += [difference(rows.plan.differences(name, "dmoe", r, seeds)) for r in RIVALS]
            lines.append(cells)
    header = ["scene", "seeds", "dMoE, Dice", *(f"dMoE minus {METHODS[r].title}" for r in RIVALS)]
    count = f"{done} of the {len(SCENES)} scenes have all seeds of the plan."
    return f"{count}\n\n{markdown_table(header, lines)}" if lines else count


def unknown(rows: SiteRows) -> str:
    """What is lost when the site is not known, with two methods of prediction."""
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
        "scene", "", "site known", "site unknown: routers or embeddings averaged",
        "site unknown: outputs averaged", "outputs minus routers", "blind network",
    ]  # fmt: skip
    return (
        "These are the same networks, which now receive the value that means unknown. In the "
        "fourth column they average the routers or embeddings of all sites, in one forward pass. "
        "In the fifth column their output probabilities for all sites are averaged, in one forward "
        "pass for each site. The blind network is scored on all test cases, the others on two of "
        "each site.\n\n" + markdown_table(header, lines)
    )


def newcomers(rows: SiteRows) -> str:
    """How much a few labelled cases of a new site help."""
    scores: defaultdict[tuple[str, str, str, int], dict[int, float]] = defaultdict(dict)
    numbers: dict[tuple[str, str, str], int] = {}
    for row in rows.adaptations:
        if row.seed in SEEDS:
            scores[row.scene, row.method, row.part, row.cases][row.seed] = row.dice
            numbers[row.scene, row.method, row.part] = row.numbers
    parts = []
    for scene in MAIN:
        lines, minus = [], []
        for method, part in itertools.product(COMPARED, ("none", "own", "all")):
            if (scene, method, part) not in numbers:
                continue
            of_cases = [scores[scene, method, part, cases] for cases in (0, *LABELLED)]
            cells = [of_seeds([*of_seed.values()]) for of_seed in of_cases]
            title = METHODS[method].title
            lines.append([title, part, f"{numbers[scene, method, part]:,}", *cells])
            if part == "none" or (method, part) == ("dmoe", "own"):
                continue
            pairs = [
                (scores[scene, "dmoe", "own", cases], of_seed)
                for cases, of_seed in zip(LABELLED, of_cases[1:], strict=True)
            ]
            cells = [difference([a[s] - b[s] for s in sorted(a.keys() & b)]) for a, b in pairs]
            minus.append([title, part, *cells])
        cases = [f"{n} case{'s' * (n > 1)}" for n in LABELLED]
        parts.append(f"### `{scene}`: {SCENES[scene].title}")
        if not lines:
            parts.append(f"{_NOT_RUN}.")
            continue
        parts.append(markdown_table(["", "adapted", "numbers", "no case", *cases], lines))
        parts.append("The Dice of dMoE, whose router alone is adapted, minus that of:")
        parts.append(markdown_table(["", "adapted", *cases], minus))
    legend = (
        "The scores are the Dice of the new sites' test cases. The second column says which "
        "weights were adapted: none, and the network receives the value that means unknown; own, "
        "those that only the new site uses (a router, a row of FiLM's table, an MLP, or the "
        "weights of an input channel); or all. The third column counts the adapted numbers."
    )
    return "\n\n".join([legend, *parts])


def variants(rows: SiteRows) -> str:
    """The layer with one setting changed, in the two main scenes."""
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
