"""The parts of the study's page: sentences and Markdown tables, made of its results.

A part about something that the results do not have is an empty text.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import markdown_table
from ..recipes.serial import flat
from .figures import FIGURES, FOLDER
from .jobs import TOLD_SHUFFLED, TOLD_UNKNOWN, TOLD_WRONG
from .methods import METHODS
from .quote import EXPLAINED, interval, quotation, short, signed
from .results import Results
from .scenes import SCENES
from .statistics import BLOCKS
from .strict import StrictDifference, StrictTerms
from .tables import Difference, TriedRate

# What simulations of `statistics.Resampled` have found.
CAUTION = (
    "The intervals come from a bootstrap, which draws seeds and test cases again with replacement. "
    "They are not corrected for how many there are. Where seeds differ more than cases do, an "
    "interval over five seeds contains the true value in about 83 of 100 studies instead of 95. "
    "Read an interval together with the count of seeds, and with the stricter intervals below."
)
_NONE = "—"
_COSTS = ("parameters", "multiply-adds", "time of a step")


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
    smoke = "**A smoke run: too little training and too few cases. Its numbers mean nothing.** "
    return (
        f"{smoke if results.smoke else ''}The command `study` wrote these tables from the csv "
        f"files beside this page. {EXPLAINED} explains the scenes, the methods and the "
        "findings.\n\n"
        "**ES-Dice** is Dice / (1 + Σ_g |Dice − Dice_g|), summed over the groups g, which are the "
        "values of the first attribute. It falls when the mean Dice falls and when groups differ. "
        "A *blind* network does not receive the attribute.\n\n"
        f"Made with {text}."
    )


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
        "A cell has four lines: the **mean ES-Dice over seeds**, its 95 % interval, the lowest and "
        "the highest seed, and two Dice scores, of the worst group and of all cases weighted by "
        "the groups' shares. Multiply-adds are those of a forward pass over one image. The time is "
        f"that of a training step, as a multiple of the dense network's.\n\n{table}"
    )


def against(results: Results) -> str:
    """How methods differ.

    dMoE is compared with all methods that are no dMoE, its variants with dMoE and with all methods
    that receive the attribute, and the candidates with dMoE and FiLM.
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
        "A cell has the mean difference in ES-Dice, first method minus second, on the same seeds "
        "and test cases. In parentheses stand its 95 % interval and the number of seeds on which "
        f"the first method is ahead. {CAUTION} The file differences.csv has the differences in "
        f"other scores.\n\n{table}"
    )


def told(results: Results) -> str:
    """How scores change when networks receive another attribute than the right one."""
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
        "How the ES-Dice of a trained network changes in testing, when it receives the attributes "
        "of other cases (shuffled), always a wrong value (wrong), or the value that means "
        "unknown (unknown). A number is bold where its interval excludes 0 and all seeds agree.\n\n"
        f"{table}"
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
    return (
        "The differences are of dMoE with one setting changed, minus dMoE as it is, on scene (a)."
        f"\n\n{table}"
    )


def costs(results: Results, methods: Sequence[str]) -> str:
    """What some methods cost on scene (a), and what a wrong attribute costs them."""
    lines = []
    for method in methods:
        wrong = results.difference("rule", f"{method}@{TOLD_WRONG}", method)
        lost = "receives none" if wrong is None else quotation(wrong)
        lines.append([METHODS[method].title, *_cost(results, method), lost])
    return markdown_table(["", *_COSTS, "ES-Dice with wrong attributes, on (a)"], lines)


def strict(results: Results) -> str:
    """dMoE against other methods by stricter intervals, and how many differences stay clear."""
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
        "These are the same differences with Student's t interval, which takes into account that "
        f"there are only {len(told_right[0].by_seed)} seeds. On real MRI it treats {BLOCKS} blocks "
        f"of neighbouring slices as {BLOCKS} independent cases. The second line of a cell leaves "
        "out the first seed, because the learning rates were chosen by that seed's validation "
        "split.\n\n"
        f"There are {len(told_right)} differences in ES-Dice between two methods that receive the "
        f"right attribute. The bootstrap interval excludes 0 in {len(clear)} of them. Student's "
        f"interval excludes 0 in {left[False]} of these, and in {left[True]} without the first "
        "seed. Four blocks of one head are few: in simulations such intervals contain the true "
        "value in 84 to 92 of 100 cases, and they say nothing about another head. No table has "
        "what a wrong attribute does to single slices, so those differences have no stricter "
        f"interval.\n\n{table}"
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
        f"Each learning rate was chosen from {', '.join(f'{rate:g}' for rate in grid)} by the "
        "validation score of the first seed. A star marks a rate at an end of the grid, beyond "
        f"which nothing was tried.\n\n{table}"
    )


def spread(results: Results) -> str:
    """How much of the difference between seeds comes from the initial weights."""
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
    return (
        "How much ES-Dice varies when only the initial weights change, and when the whole seed "
        "changes, which also changes the data: standard deviations, with the number of trainings "
        f"in parentheses.\n\n{table}"
    )


def links(results: Results) -> str:
    """Links to the figures that have been drawn beside the csv."""
    drawn = [name for name in FIGURES if (results.folder / FOLDER / f"{name}.png").exists()]
    named = [f"[{name}]({FOLDER}/{name}.png)" for name in drawn]
    return f"These figures show every seed: {', '.join(named)}." if named else ""


def _methods(results: Results) -> list[str]:
    """The methods of all scenes, without the ablations."""
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
