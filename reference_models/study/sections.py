"""The parts of the study's page: sentences and Markdown tables, made of its results.

A part about something that the results do not have is an empty text.
"""

from __future__ import annotations

from ..markdown import markdown_table
from ..recipes.serial import flat
from .figures import FIGURES, FOLDER
from .jobs import TOLD_SHUFFLED, TOLD_UNKNOWN, TOLD_WRONG
from .methods import METHODS
from .quote import interval, quotation, short, signed
from .results import Results
from .scenes import SCENES
from .statistics import BLOCKS
from .strict import StrictDifference, StrictTerms
from .tables import Difference, TriedRate

# What `statistics.Resampled` has found by simulation.
CAUTION = (
    "The intervals are of a bootstrap over seeds and test cases and are not corrected for their "
    "number. Where seeds differ more than cases do, those over five seeds hold the truth in about "
    "83 of 100 studies, not in 95: read them together with the count of seeds, and with the "
    "stricter terms below."
)
_NONE = "—"
_COSTS = ("parameters", "multiply-adds", "time a step")


def made_with(results: Results) -> str:
    """The settings, the machine and the versions."""
    made = results.made_with
    settings = [
        f"{key.removeprefix('sizes.').replace('_', ' ')} "
        + (", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in flat(made["settings"]).items()
        if key not in ("quick", "scenes", "methods")
    ]
    minutes = f"{made['seconds'] / 60:.0f} minutes of one core's work"
    versions = f"Python {made['python']}, PyTorch {made['torch']}, dmoe_layer {made['dmoe_layer']}"
    text = "; ".join([*settings, made["machine"], minutes, versions])
    smoke = "**A smoke run: too little training, too few cases. It means nothing.** "
    return f"{smoke if results.smoke else ''}Made with {text}."


def scores(results: Results) -> str:
    """Every method's scores in every scene, and what it costs."""
    columns = []
    for scene in results.scenes:
        columns.append((_letter(scene), scene, "es_dice"))
        if scene == "two":
            columns.append((f"{_letter(scene)}, Dice of unseen combinations", scene, "unseen"))
    lines = []
    for method in _methods(results):
        cells = [_score(results, scene, method, metric) for _, scene, metric in columns]
        lines.append([METHODS[method].title, *cells, *_cost(results, method)])
    titles = [title for title, _, _ in columns]
    table = markdown_table(["", *titles, *_COSTS], lines)
    return (
        "ES-Dice by scene: **mean over seeds**, its 95 % interval, the lowest and the highest seed,"
        " and the Dice of the worst group and of all, weighted by the shares. Time: of a training "
        f"step, as a multiple of the dense network's.\n\n{table}"
    )


def against(results: Results) -> str:
    """How methods differ.

    dMoE is compared with what is no dMoE; its variants with dMoE and with all that are told the
    attribute; the candidates with dMoE and FiLM.
    """
    methods = _methods(results)
    pairs = [("dmoe", b) for b in methods if METHODS[b].kind in ("baseline", "robust")]
    variants = [a for a in methods if METHODS[a].kind == "dmoe" and a != "dmoe"]
    rivals = [b for b in methods if METHODS[b].kind == "baseline" and METHODS[b].settings.told]
    pairs += [(a, b) for a in variants for b in (*rivals, "dmoe")]
    candidates = [a for a in methods if METHODS[a].kind == "candidate"]
    pairs += [(a, b) for a in candidates for b in ("film", "dmoe")]
    lines = []
    for a, b in pairs:
        cells = [_quoted(results, scene, a, b) for scene in results.scenes]
        if any(cell != _NONE for cell in cells):
            lines.append([f"{METHODS[a].title} against {METHODS[b].title}", *cells])
    if not lines:
        return ""
    table = markdown_table(["", *map(_letter, results.scenes)], lines)
    return (
        "Differences in ES-Dice on the same seeds and cases (95 % interval; seeds on which the "
        f"first is ahead). {CAUTION} Of other scores they stand in differences.csv.\n\n{table}"
    )


def told(results: Results) -> str:
    """What another attribute than the right one does."""
    conditions = (TOLD_SHUFFLED, TOLD_WRONG, TOLD_UNKNOWN)
    lines = []
    for method in _methods(results):
        cells = []
        for scene in results.scenes:
            rows = [results.difference(scene, f"{method}@{c}", method) for c in conditions]
            cells.append(" / ".join(_bold(row) if row else _NONE for row in rows))
        if METHODS[method].settings.told:
            lines.append([METHODS[method].title, *cells])
    if not lines:
        return ""
    table = markdown_table([" / ".join(conditions), *map(_letter, results.scenes)], lines)
    return (
        "What telling a trained network a shuffled, a wrong or no attribute does to its ES-Dice "
        f"(bold: the interval does not hold 0 and all seeds agree):\n\n{table}"
    )


def ablations(results: Results) -> str:
    """dMoE with one setting changed, compared with dMoE."""
    lines = [
        [
            METHODS[method].title,
            _quoted(results, "rule", method, "dmoe"),
            _quoted(results, "rule", method, "dmoe", "worst"),
            *_cost(results, method),
        ]
        for method in results.methods.get("rule", [])
        if METHODS[method].kind == "ablation" and results.difference("rule", method, "dmoe")
    ]
    if not lines:
        return ""
    table = markdown_table(["", "ES-Dice", "Dice of the worst group", *_COSTS], lines)
    return f"dMoE with one setting changed, minus dMoE, on scene (a):\n\n{table}"


def strict(results: Results) -> str:
    """dMoE against what is no dMoE by stricter terms, and what is left of all differences."""
    lines, terms = [], StrictTerms(results)
    for method in (m for m in _methods(results) if METHODS[m].kind in ("baseline", "robust")):
        cells = []
        for scene in results.scenes:
            both = (terms.difference(scene, "dmoe", method, untuned=u) for u in (False, True))
            cells.append("<br>".join(_strict(found) for found in both))
        if any(_strict(None) != cell.partition("<br>")[0] for cell in cells):
            lines.append([METHODS[method].title, *cells])
    if not lines:
        return ""
    told_right = [
        row for row in results.differences if row.metric == "es_dice" and "@" not in row.a
    ]
    clear = [row for row in told_right if _clear(row)]
    left = {
        untuned: sum(
            found is not None and found.clear
            for row in clear
            for found in [terms.difference(row.scene, row.a, row.b, untuned=untuned)]
        )
        for untuned in (False, True)
    }
    table = markdown_table(["dMoE against", *map(_letter, results.scenes)], lines)
    return (
        "The same differences by stricter terms: Student's interval, which knows that there are "
        f"{len(told_right[0].by_seed)} seeds and, of real MRI, takes {BLOCKS} blocks of "
        "neighbouring slices for as many independent cases; below, without the first seed, by "
        "whose validation split the learning rates were chosen. Of all differences in ES-Dice "
        f"between two methods told right, {len(told_right)}, the bootstrap's interval leaves out 0 "
        f"in {len(clear)}, Student's in {left[False]} of these, and in {left[True]} without that "
        "seed. Four blocks of one head are little: such intervals hold the truth in 84 to 92 of "
        "100 simulations, and speak of no other head. What a wrong attribute does to single slices "
        "is in no table, so that those "
        f"differences stay as they are.\n\n{table}"
    )


def rates(results: Results) -> str:
    """The learning rates that were chosen."""
    chosen = {(row.scene, row.method): row for row in results.rates if row.chosen}
    lines = []
    for method in _methods(results):
        rows = [chosen.get((scene, method)) for scene in results.scenes]
        if any(rows):
            lines.append([METHODS[method].title, *map(_rate, rows)])
        elif METHODS[method].rate_of:
            cells = [
                f"as {METHODS[METHODS[method].rate_of].title}" if m else _NONE
                for m in (results.mean(scene, method, "overall") for scene in results.scenes)
            ]
            lines.append([METHODS[method].title, *cells])
    if not lines:
        return ""
    grid = sorted({row.learning_rate for row in results.rates})
    table = markdown_table(["", *map(_letter, results.scenes)], lines)
    return (
        f"The learning rates chosen, of {', '.join(f'{rate:g}' for rate in grid)} by the first "
        f"seed's validation score (*: an end of the grid):\n\n{table}"
    )


def spread(results: Results) -> str:
    """How much of the difference between seeds is the initialisation's."""
    lines = [
        [
            f"{METHODS[row.method].title}, {_letter(row.scene)}",
            f"{short(row.over_inits)} ({row.inits})",
            f"{short(row.over_seeds)} ({row.seeds})",
        ]
        for row in results.spread
        if row.over_inits is not None and row.over_seeds is not None
    ]
    if not lines:
        return ""
    table = markdown_table(["", "initialisations of one data seed", "seeds"], lines)
    return f"Standard deviation of ES-Dice over initialisations and over seeds:\n\n{table}"


def links(results: Results, figures: str) -> str:
    """Links to the figures that are there.

    Args:
        results: beside whose csv the figures lie.
        figures: their folder, as the page's links name it.
    """
    drawn = [name for name in FIGURES if (results.folder / FOLDER / f"{name}.png").exists()]
    named = [f"[{name}]({figures}/{name}.png)" for name in drawn]
    return f"Every seed is drawn in the figures: {', '.join(named)}." if named else ""


def _methods(results: Results) -> list[str]:
    """Those of any scene, without the ablations."""
    there = {method for methods in results.methods.values() for method in methods}
    return [name for name in METHODS if name in there and METHODS[name].kind != "ablation"]


def _letter(scene: str) -> str:
    return f"{SCENES[scene].title[:3]} {scene}"


def _score(results: Results, scene: str, method: str, metric: str) -> str:
    row = results.mean(scene, method, metric)
    if row is None:
        return _NONE
    lines = [f"**{short(row.mean)}**", interval(row), f"{short(row.lowest)} … {short(row.highest)}"]
    if metric == "es_dice":
        # What it is made of, since it rewards groups that are alike as well as good ones.
        parts = (results.mean(scene, method, name) for name in ("worst", "overall"))
        lines.append(", ".join(short(part.mean) for part in parts if part is not None))
    return "<br>".join(lines)


def _quoted(results: Results, scene: str, a: str, b: str, metric: str = "es_dice") -> str:
    row = results.difference(scene, a, b, metric)
    return _NONE if row is None else quotation(row).replace(" (", "<br>(")


def _bold(row: Difference) -> str:
    """The mean of a difference, bold where its interval does not hold 0 and all seeds agree."""
    agree = row.ahead in (0, row.seeds)
    return f"**{signed(row)}**" if agree and _clear(row) else signed(row)


def _clear(row: Difference) -> bool:
    """Whether the interval leaves out 0."""
    return row.low is not None and row.high is not None and (row.low > 0 or row.high < 0)


def _strict(found: StrictDifference | None) -> str:
    if found is None:
        return _NONE
    text = f"{short(found.value)} ({short(found.low)} to {short(found.high)})"
    return text if text.startswith("-") else f"+{text}"


def _rate(row: TriedRate | None) -> str:
    return _NONE if row is None else f"{row.learning_rate:g}{'*' if row.edge else ''}"


def _cost(results: Results, method: str) -> list[str]:
    """The cells under `_COSTS`."""
    cost = results.costs.get(method)
    if cost is None:
        return [_NONE] * len(_COSTS)
    time = cost.milliseconds_of_dense
    return [
        f"{cost.parameters:,}",
        f"{cost.multiply_adds / 1e6:.2f} M",
        _NONE if time is None else f"{time:.2f}",
    ]
