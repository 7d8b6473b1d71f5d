"""The study's tables in a page of markdown, made of the csv of its results.

`python -m reference_models.study.page reference_models/study/results reference_models/README.md`
renews those of this project's page.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tyro

from ..errors import DataError
from ..files import write_whole
from ..recipes.serial import flat
from .figures import FIGURES, FOLDER, write_figures
from .jobs import SHUFFLED, UNKNOWN, WRONG
from .methods import METHODS
from .results import Results, Row
from .scenes import SCENES

# What `statistics.Resampled` has found by simulation.
CAUTION = (
    "The intervals are of a bootstrap over seeds and test cases and are not corrected for their "
    "number. Where seeds differ more than cases do, those over five seeds hold the truth in about "
    "83 of 100 studies, not in 95: read them together with the count of seeds."
)
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
_NONE = "—"


def write_page(results: Path, page: Path) -> None:
    """Puts the tables between the marks of a page; a page that is not there is made of them.

    The page beside the results has all of them, another page the scores alone.

    Args:
        results: folder of the csv and figures, those of `tables` and `figures`.
        page: the markdown file; what lies outside the marks stays as it is.

    Raises:
        DataError: a file of the results is missing, or the page has no marks.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else f"# The study\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{page}: got none of {BEGIN} … {END}, expected both; add them.")
    figures = Path(os.path.relpath((results / FOLDER).resolve(), page.resolve().parent))
    whole = page.resolve().parent == results.resolve()
    new = f"{before}{BEGIN}\n{block(results, figures.as_posix(), whole=whole)}\n{END}{after}"
    write_whole(page, lambda target: target.write_bytes(new.encode()) and None)


def block(results: Path, figures: str, *, whole: bool) -> str:
    """What stands between the marks.

    Args:
        results: folder of the csv.
        figures: that of the figures, as the page's links name it.
        whole: all tables, or the scores alone.
    """
    read = Results(results)
    parts = [_head(read), _scores(read), _links(read, figures)]
    if whole:
        parts[2:2] = [_against(read), _told(read), _ablations(read), _rates(read), _spread(read)]
    return "\n\n".join(part for part in parts if part)


def quotation(row: Row) -> str:
    """A paired difference as pages quote it, of a row of differences.csv.

    >>> quotation({"difference": "0.1234", "low": "-0.0006", "high": "0.145", "ahead": "4",
    ...            "seeds": "5"})
    '+.123 (-.001 to .145; 4 of 5)'
    """
    return f"{_signed(row)} ({_interval(row)}; {row['ahead']} of {row['seeds']})"


def short(number: str) -> str:
    """Three decimals, and no nought before the point.

    >>> short("0.8765"), short("-0.0123"), short("1.0"), short("-0.0004")
    ('.876', '-.012', '1.000', '.000')
    """
    text = f"{round(float(number), 3) + 0.0:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _interval(row: Row) -> str:
    return f"{short(row['low'])} to {short(row['high'])}" if row["low"] else "no interval"


def _signed(row: Row) -> str:
    text = short(row["difference"])
    return text if text.startswith("-") else f"+{text}"


def _head(results: Results) -> str:
    """With what the study was made."""
    machine = results.machine
    told = flat(machine["settings"])
    settings = [
        f"{key.removeprefix('sizes.').replace('_', ' ')} "
        + (", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in told.items()
        if key not in ("quick", "scenes", "methods")
    ]
    versions = [
        f"{name} {machine[key]}"
        for key, name in (("python", "Python"), ("torch", "PyTorch"), ("dmoe_layer", "dmoe_layer"))
    ]
    minutes = f"{machine['seconds'] / 60:.0f} minutes of one core's work"
    text = "; ".join([*settings, machine["machine"], minutes, ", ".join(versions)])
    smoke = "**A smoke run: too little training, too few cases. It means nothing.** "
    return f"{smoke if results.smoke else ''}Made with {text}."


def _scores(results: Results) -> str:
    """Methods by scenes, and what they cost."""
    columns = []
    for scene in results.scenes:
        columns.append((_letter(scene), scene, "es_dice"))
        if scene == "two":
            columns.append((f"{_letter(scene)}, Dice of unseen combinations", scene, "unseen"))
    lines = []
    for method in _methods(results):
        cells = [METHODS[method].title]
        for _, scene, metric in columns:
            row = results.mean(scene, method, metric)
            cells.append(
                _NONE
                if row is None
                else f"**{short(row['mean'])}**<br>{_interval(row)}"
                f"<br>{short(row['lowest'])} … {short(row['highest'])}"
                f"{_beside(results, scene, method, metric)}"
            )
        lines.append([*cells, *_cost(results, method)])
    titles = [title for title, _, _ in columns]
    table = _table(["", *titles, "parameters", "multiply-adds", "time a step"], lines)
    return (
        "ES-Dice by scene: **mean over seeds**, its 95 % interval, the lowest and the highest seed,"
        " and the Dice of the worst group and of all, weighted by the shares. Time: of a training "
        f"step, as a multiple of the dense network's.\n\n{table}"
    )


def _beside(results: Results, scene: str, method: str, metric: str) -> str:
    """What ES-Dice is made of, since it rewards groups that are alike as well as good ones."""
    if metric != "es_dice":
        return ""
    worst, overall = (results.mean(scene, method, name) for name in ("worst", "overall"))
    shown = [short(row["mean"]) for row in (worst, overall) if row is not None]
    return f"<br>{', '.join(shown)}"


def _against(results: Results) -> str:
    """dMoE paired with what is no dMoE; its variants with it and with all that are told the
    attribute; the candidates with it and with FiLM."""
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
    table = _table(["", *map(_letter, results.scenes)], lines)
    return (
        "Differences in ES-Dice on the same seeds and cases (95 % interval; seeds on which the "
        f"first is ahead). {CAUTION} Of other scores they stand in differences.csv.\n\n{table}"
    )


def _told(results: Results) -> str:
    """What another attribute than the right one does."""
    conditions = (SHUFFLED, WRONG, UNKNOWN)
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
    table = _table([" / ".join(conditions), *map(_letter, results.scenes)], lines)
    return (
        "What telling a trained network a shuffled, a wrong or no attribute does to its ES-Dice "
        f"(bold: the interval does not hold 0 and all seeds agree):\n\n{table}"
    )


def _ablations(results: Results) -> str:
    """dMoE with one setting changed, paired with dMoE."""
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
    header = ["", "ES-Dice", "Dice of the worst group"]
    table = _table([*header, "parameters", "multiply-adds", "time a step"], lines)
    return f"dMoE with one setting changed, minus dMoE, on scene (a):\n\n{table}"


def _rates(results: Results) -> str:
    """The learning rates that were chosen."""
    chosen = {(row["scene"], row["method"]): row for row in results.rates if _true(row["chosen"])}
    lines = []
    for method in _methods(results):
        rows = [chosen.get((scene, method)) for scene in results.scenes]
        if any(rows):
            cells = [
                f"{float(row['learning_rate']):g}" + ("*" if _true(row["edge"]) else "")
                if row else _NONE for row in rows
            ]  # fmt: skip
            lines.append([METHODS[method].title, *cells])
        elif METHODS[method].rate_of:
            cells = [
                f"as {METHODS[METHODS[method].rate_of].title}" if m else _NONE
                for m in (results.mean(scene, method, "overall") for scene in results.scenes)
            ]
            lines.append([METHODS[method].title, *cells])
    if not lines:
        return ""
    grid = sorted({float(row["learning_rate"]) for row in results.rates})
    table = _table(["", *map(_letter, results.scenes)], lines)
    return (
        f"The learning rates chosen, of {', '.join(f'{rate:g}' for rate in grid)} by the first "
        f"seed's validation score (*: an end of the grid):\n\n{table}"
    )


def _spread(results: Results) -> str:
    """How much of the difference between seeds is the initialisation's."""
    if not results.spread or not all(row["over_inits"] for row in results.spread):
        return ""
    table = _table(
        ["", "initialisations of one data seed", "seeds"],
        [
            [
                f"{METHODS[row['method']].title}, {_letter(row['scene'])}",
                f"{short(row['over_inits'])} ({row['inits']})",
                f"{short(row['over_seeds'])} ({row['seeds']})",
            ]
            for row in results.spread
        ],
    )
    return f"Standard deviation of ES-Dice over initialisations and over seeds:\n\n{table}"


def _links(results: Results, figures: str) -> str:
    drawn = [name for name in FIGURES if (results.folder / FOLDER / f"{name}.png").exists()]
    links = [f"[{name}]({figures}/{name}.png)" for name in drawn]
    return f"Every seed is drawn in the figures: {', '.join(links)}." if links else ""


def _methods(results: Results) -> list[str]:
    """Those of any scene, without the ablations."""
    there = {method for methods in results.methods.values() for method in methods}
    return [name for name in METHODS if name in there and METHODS[name].kind != "ablation"]


def _letter(scene: str) -> str:
    return f"{SCENES[scene].title[:3]} {scene}"


def _quoted(results: Results, scene: str, a: str, b: str, metric: str = "es_dice") -> str:
    row = results.difference(scene, a, b, metric)
    return _NONE if row is None else quotation(row).replace(" (", "<br>(")


def _bold(row: Row) -> str:
    agree = row["ahead"] in ("0", row["seeds"])
    clear = agree and row["low"] and (float(row["low"]) > 0 or float(row["high"]) < 0)
    return f"**{_signed(row)}**" if clear else _signed(row)


def _cost(results: Results, method: str) -> list[str]:
    row = results.costs.get(method)
    if row is None:
        return [_NONE] * 3
    return [
        f"{int(row['parameters']):,}",
        f"{float(row['multiply_adds']) / 1e6:.2f} M",
        f"{float(row['milliseconds_of_dense']):.2f}" if row["milliseconds_of_dense"] else _NONE,
    ]


def _true(text: str) -> bool:
    return text == "yes"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def renew(results: Path, page: Path, /) -> None:
    """Draws the figures of a results folder again, and renews a page's tables.

    Args:
        results: folder with the csv.
        page: markdown file with the marks.
    """
    write_figures(results)
    write_page(results, page)


if __name__ == "__main__":
    try:
        tyro.cli(renew)
    except DataError as error:
        sys.exit(str(error))
