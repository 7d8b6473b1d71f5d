"""The study's figures: one for each scene, one of the ablations, one of the experts' loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .jobs import TOLD_RIGHT, TOLD_SHUFFLED, TOLD_UNKNOWN, TOLD_WRONG
from .methods import METHODS
from .results import Results
from .scenes import SCENES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that the colour-blind tell apart (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_ES_DICE = ("es_dice", "ES-Dice", _BLUE)
_WORST = ("worst", "Dice of the worst group", _ORANGE)
_CONDITIONS = (
    (TOLD_RIGHT, "the right one (or a blind network)", _BLUE),
    (TOLD_SHUFFLED, "another case's (shuffled)", _GREEN),
    (TOLD_WRONG, "always a wrong one", _ORANGE),
    (TOLD_UNKNOWN, "unknown", _PURPLE),
)
FOLDER = "figures"
_WIDTH = 11  # inches, of 100 pixels each
_LOADED = ("none", "rule")  # scenes: the control, and the one where the attribute matters most


def write_figures(results: Path) -> None:
    """Draws the csv of a results folder, as png files in its folder `figures`.

    A figure that has nothing to draw, such as that of a scene that was left out, is not written,
    and an older one of that name is removed.

    Raises:
        DataError: a file of the results is missing.
    """
    read = Results(results)
    folder = results / FOLDER
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw(read)
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        if read.smoke:
            figure.text(
                *(0.5, 0.5), "smoke run: means nothing", ha="center", va="center",
                fontsize=44, rotation=20, color="black", alpha=0.15,
            )  # fmt: skip
        write_whole(path, partial(figure.savefig, format="png", dpi=100))


def _scene(name: str, results: Results) -> Figure | None:
    """Scores, scores with other attributes, and those of combinations that training lacked."""
    if name not in results.scenes:
        return None
    methods = [m for m in results.methods[name] if METHODS[m].kind != "ablation"]
    panels: list[tuple[str, list[tuple[str, str, str, str]]]] = [
        ("With the right attribute", [(*_ES_DICE, TOLD_RIGHT), (*_WORST, TOLD_RIGHT)]),
        (
            "ES-Dice, by the attribute received",
            [("es_dice", label, colour, c) for c, label, colour in _CONDITIONS],
        ),
    ]
    if any(results.seeds(name, method, "unseen") for method in methods):
        panels.append(
            (
                "Dice by combination of values",
                [
                    ("seen", "seen in training", _BLUE, TOLD_RIGHT),
                    ("unseen", "not seen in training", _ORANGE, TOLD_RIGHT),
                ],
            )
        )
    figure, all_axes = _rows_of([METHODS[m].title for m in methods], len(panels), 0.52)
    for axes, (title, series) in zip(all_axes, panels, strict=True):
        for place, method in enumerate(methods):
            for (metric, _, colour, condition), y in zip(
                series, _places(place, len(series)), strict=True
            ):
                seeds = results.seeds(name, method, metric, condition)
                mean = results.mean(name, method, metric, condition)
                if mean is not None:
                    _draw_mean(axes, y, seeds, mean.mean, mean.low, mean.high, colour)
        _finish(axes, title, [(label, colour) for _, label, colour, _ in series])
    _title(figure, SCENES[name].title)
    return figure


def _ablations(results: Results) -> Figure | None:
    """Differences from dMoE on the scene "rule"."""
    methods = [
        m for m in results.methods.get("rule", []) if results.difference("rule", m, "dmoe")
        and METHODS[m].kind in ("dmoe", "ablation")
    ]  # fmt: skip
    if not methods:
        return None
    figure, all_axes = _rows_of([METHODS[m].title for m in methods], 2, 0.34)
    for axes, (metric, label, colour) in zip(all_axes, (_ES_DICE, _WORST), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, method in enumerate(methods):
            row = results.difference("rule", method, "dmoe", metric)
            if row is not None:
                _draw_mean(axes, place, row.by_seed, row.difference, row.low, row.high, colour)
        _finish(axes, f"{label}: difference from dMoE", [])
    _title(figure, "The layer with one setting changed, scene (a)")
    return figure


def _loads(results: Results) -> Figure | None:
    """Where dMoE's routers send the tokens: without an effect of the attribute, and with one."""
    tables: dict[str, dict[int, list[Sequence[float]]]] = {scene: {} for scene in _LOADED}
    for row in results.loads:
        if (row.method, row.condition) == ("dmoe", TOLD_RIGHT) and row.scene in tables:
            tables[row.scene].setdefault(row.data_seed, []).append(row.shares)
    scenes = [scene for scene in _LOADED if tables[scene]]
    if not scenes:
        return None
    from matplotlib.figure import Figure

    seeds = [*tables[scenes[0]]]
    most = max(max(shares) for by_seed in tables.values() for t in by_seed.values() for shares in t)
    figure = Figure(figsize=(_WIDTH, 1.5 + 1.8 * len(scenes)), layout="constrained")
    ratios = [*[1] * len(seeds), max(1, len(seeds) / 5)]
    grid = figure.subplots(len(scenes), len(ratios), squeeze=False, width_ratios=ratios)
    for scene, (*of_seeds, of_distances) in zip(scenes, grid, strict=True):
        for seed, axes in zip(seeds, of_seeds, strict=True):
            image = _draw_table(axes, tables[scene][seed], most)
            axes.set_title(f"seed {seed}", fontsize=9)
        of_seeds[0].set_ylabel(f"scene {SCENES[scene].title[:3]}, attribute value", fontsize=9)
        distances = [
            row.distance
            for row in results.load_distances
            if (row.scene, row.method) == (scene, "dmoe") and row.distance is not None
        ]
        _draw_distances(of_distances, distances)
    grid[-1, 0].set_xlabel("expert", fontsize=9)
    figure.colorbar(
        image, ax=grid[:, :-1], label="share of tokens", location="bottom", fraction=0.04, aspect=50
    )
    titles = "; ".join(SCENES[scene].title for scene in scenes)
    figure.suptitle(f"Loads of dMoE's experts: {titles}", fontsize=11, x=0.01, ha="left")
    return figure


def _draw_table(axes: Any, table_VE: Sequence[Sequence[float]], most: float) -> Any:
    """A load table as an image; `most` is the share with the darkest blue."""
    image = axes.imshow(table_VE, vmin=0, vmax=most, cmap="Blues", aspect="auto")
    experts = len(table_VE[0])
    axes.set_xticks([0, experts - 1], [1, experts], fontsize=8)
    axes.set_yticks(range(len(table_VE)), range(1, len(table_VE) + 1), fontsize=8)
    return image


def _draw_distances(axes: Any, distances: Sequence[float]) -> None:
    """How far the loads of the attribute's values lie apart, a dot for each seed."""
    axes.plot(distances, [0] * len(distances), "o", color=_BLUE, alpha=0.5)
    axes.set(xlim=(0, 1), yticks=[])
    axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=8)
    axes.set_title("distance between values", fontsize=9)
    axes.set_xlabel("0: equal, 1: apart", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    **{name: partial(_scene, name) for name in SCENES},
    "ablations": _ablations,
    "loads": _loads,
}


def _rows_of(names: Sequence[str], panels: int, inches: float) -> tuple[Figure, Sequence[Any]]:
    """A figure of panels side by side that share their rows, the first name on top."""
    from matplotlib.figure import Figure

    height = 1.4 + inches * len(names)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    all_axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    all_axes[0].set_yticks(range(len(names)), names, fontsize=9.5)
    all_axes[0].set_ylim(len(names) - 0.5, -0.5)
    for axes in all_axes:
        for place in range(0, len(names), 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda x, _: _tick(x))
    return figure, all_axes


def _tick(x: float) -> str:
    """Two decimals, three where it needs them, and no nought before the point.

    >>> [_tick(x) for x in (0.7, -0.005, 1.0)]
    ['.70', '-.005', '1.00']
    """
    return f"{x:.3f}".removesuffix("0").replace("0.", ".", 1)


def _places(place: int, series: int) -> list[float]:
    """Where in a row of height 1 its series lie."""
    return [place + 0.8 * ((i + 0.5) / series - 0.5) for i in range(series)]


def _draw_mean(
    axes: Any,
    y: float,
    seeds: Sequence[float],
    mean: float,
    low: float | None,
    high: float | None,
    colour: str,
) -> None:
    """The interval as a line, the mean as a bar on it, and a dot for each seed.

    A single seed has no interval.
    """
    if low is not None:
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6, alpha=0.8)
    axes.plot([mean], [y], "|", color=colour, markersize=9, markeredgewidth=2.2)
    axes.plot(seeds, [y] * len(seeds), "o", color=colour, markersize=4.2, alpha=0.5, mew=0)


def _finish(axes: Any, title: str, legend: Sequence[tuple[str, str]]) -> None:
    axes.set_title(title, loc="left", fontsize=10.5)
    for label, colour in legend:
        axes.plot([], [], "o-", color=colour, label=label, markersize=4.2)
    if legend:
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=2.5,
                    frameon=False, fontsize=9)  # fmt: skip


def _title(figure: Figure, title: str) -> None:
    marks = "(a dot is a seed; bar and line are the mean and its 95 % interval)"
    figure.suptitle(f"{title}    {marks}", fontsize=11, x=0.01, ha="left")
