"""The report of an evaluation: one HTML page that needs nothing but a browser, and its pictures.

Words and layout are in `report.html.j2`; here is what they need besides the `Summary` itself.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from .files import write_whole
from .scores import CaseScore, Condition, Estimate, GroupScores, RegionScores, Summary

# Okabe and Ito's colours, which colour-blind readers tell apart, in the order in which they stand
# out best from grey, skin and retina.
COLOURS = ("#56B4E9", "#E69F00", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
FILL = 0.4  # opacity of the prediction
HALO = 0.35  # brightness left around a truth outline, so that it shows on a bright image
LONGEST = 480  # pixels of a picture's longer side in the page


@dataclass(frozen=True)
class Picture:
    """A case to be looked at, at native resolution.

    Args:
        case_id: the case's.
        image_HW3: uint8, RGB.
        truth_HW, predicted_HW: uint8, indices into the classes.

    Raises:
        ValueError: the image is not uint8 RGB, or a mask does not have its size.
    """

    case_id: str
    image_HW3: np.ndarray
    truth_HW: np.ndarray
    predicted_HW: np.ndarray

    @classmethod
    def of(
        cls, case_id: str, image_CHW: np.ndarray, truth_HW: np.ndarray, predicted_HW: np.ndarray
    ) -> Picture:
        """From an image of any intensities: its darkest becomes black, its brightest white."""
        image_CHW = image_CHW if len(image_CHW) == 3 else image_CHW.mean(0, keepdims=True)
        low, high = float(image_CHW.min()), float(image_CHW.max())
        bytes_CHW = ((image_CHW - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)
        image_HW3 = np.broadcast_to(bytes_CHW, (3, *bytes_CHW.shape[1:])).transpose(1, 2, 0)
        masks = (truth_HW.astype(np.uint8), predicted_HW.astype(np.uint8))
        return cls(case_id, np.ascontiguousarray(image_HW3), *masks)

    def __post_init__(self) -> None:
        image = self.image_HW3
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"image_HW3 of {self.case_id}: got {image.dtype} {image.shape}, expected uint8 "
                "(H, W, 3); repeat a single channel three times."
            )
        for name, mask_HW in (("truth_HW", self.truth_HW), ("predicted_HW", self.predicted_HW)):
            if mask_HW.shape != image.shape[:2]:
                raise ValueError(
                    f"{name} of {self.case_id}: got {mask_HW.shape}, expected the image's "
                    f"{image.shape[:2]}; bring it to native resolution first."
                )


def colour_of(label: int) -> tuple[int, int, int]:
    """A class's RGB; from the eighth foreground class on they come back, half way to white."""
    lap, place = divmod(label - 1, len(COLOURS))
    channels = (int(COLOURS[place][i : i + 2], 16) for i in (1, 3, 5))
    red, green, blue = (255 - (255 - channel) // 2**lap for channel in channels)
    return red, green, blue


def overlay(picture: Picture, classes: Sequence[str]) -> np.ndarray:
    """The image with each class's prediction as a translucent fill and its truth as an outline.

    The outline lies on the outermost pixels of the truth, one pixel wide up to a longer side of
    360 and wider in proportion above.

    Args:
        picture: the case.
        classes: names by label, the background first.

    Returns:
        uint8, (H, W, 3), of the image's size.

    Raises:
        ValueError: a mask has a label that is no class.

    Example:
        >>> import numpy as np
        >>> blank_HW = np.zeros((4, 4), np.uint8)
        >>> filled_HW = blank_HW + np.uint8(1)
        >>> black = Picture("1", np.zeros((4, 4, 3), np.uint8), blank_HW, filled_HW)
        >>> overlay(black, ("background", "lesion"))[0, 0].tolist()
        [34, 72, 93]
    """
    for name, mask_HW in (("truth", picture.truth_HW), ("prediction", picture.predicted_HW)):
        if mask_HW.max() >= len(classes):
            raise ValueError(
                f"{name} of {picture.case_id}: got label {mask_HW.max()}, expected labels below "
                f"{len(classes)}, the number of classes."
            )
    shown_HW3 = picture.image_HW3.astype(np.float32)
    width = max(1, round(max(shown_HW3.shape) / 240))
    labels = range(1, len(classes))
    for label in labels:
        filled_HW = picture.predicted_HW == label
        shown_HW3[filled_HW] += FILL * (np.array(colour_of(label)) - shown_HW3[filled_HW])
    foreground_HW = picture.truth_HW > 0
    shown_HW3[binary_dilation(foreground_HW, iterations=width) & ~foreground_HW] *= HALO
    for label in labels:
        truth_HW = picture.truth_HW == label
        shown_HW3[truth_HW & ~binary_erosion(truth_HW, iterations=width)] = colour_of(label)
    return shown_HW3.round().astype(np.uint8)


def pictures_wanted(
    cases: Sequence[CaseScore], attributes: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Ids of the best, the median and the worst case of each subgroup, each id once.

    A case's score is its mean Dice over the regions. Among equal ones the order is that of their
    ids; the median of an even number is the lower of the two in the middle.

    Args:
        cases: all of them, a row a region.
        attributes: names, each with the names of its values.
    """
    wanted = {
        shown.case_id
        for attribute, values in attributes.items()
        for value in (*values, "unknown")
        for shown in _examples(cases, attribute, value)
    }
    return tuple(
        case_id for case_id in dict.fromkeys(c.case_id for c in cases) if case_id in wanted
    )


def write_report(
    path: Path,
    summary: Summary,
    cases: Sequence[CaseScore],
    pictures: Mapping[str, Picture],
    classes: tuple[str, ...],
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: of the HTML file.
        summary: what is reported.
        cases: the cases under the first condition, a row a region: the points of the charts.
        pictures: by case id, those of `pictures_wanted` as far as there are any.
        classes: names by label, the background first.

    Raises:
        ValueError: a picture has a label that is no class.
    """
    examples = {
        attribute: {
            value: shown
            for value in (*values, "unknown")
            if (shown := _examples(cases, attribute, value))
        }
        for attribute, values in summary.attributes.items()
    }
    wanted = pictures_wanted(cases, summary.attributes)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        given=summary.conditions[0],
        run=[condition for condition in summary.conditions if condition.scores],
        examples=examples,
        pictures={i: _data_uri(pictures[i], classes) for i in wanted if i in pictures},
        legend=[(name, colour_of(label)) for label, name in enumerate(classes) if label],
        chart=lambda attribute, scores: _chart(cases, attribute, scores),
        finding=_finding,
        heat=_heat,
        rows=_rows,
        zip=zip,
        longest=LONGEST,
    )
    # A file name that is no UTF-8 does not cost the report.
    content = page.encode("utf-8", errors="replace")
    write_whole(path, lambda target: target.write_bytes(content) and None)


@dataclass(frozen=True)
class Example:
    """A case picked to be looked at: as what, and its Dice by region."""

    role: str
    case_id: str
    dice: Mapping[str, float]


def _examples(cases: Sequence[CaseScore], attribute: str, value: str) -> list[Example]:
    """Best, median and worst of a subgroup; fewer where it has fewer cases."""
    dice: dict[str, dict[str, float]] = {}
    for case in cases:
        if case.attributes[attribute] == value:
            dice.setdefault(case.case_id, {})[case.region] = case.dice
    ordered = sorted(dice, key=lambda i: (math.fsum(dice[i].values()) / len(dice[i]), i))
    picks = {
        0: (),
        1: (("only case", 0),),
        2: (("best", 1), ("worst", 0)),
    }.get(len(ordered), (("best", -1), ("median", (len(ordered) - 1) // 2), ("worst", 0)))
    return [Example(role, ordered[place], dice[ordered[place]]) for role, place in picks]


@dataclass(frozen=True)
class Pair:
    """The lowest and the highest of some groups by Dice."""

    low: GroupScores
    high: GroupScores

    @property
    def overlap(self) -> bool | None:
        """Whether their intervals overlap; None where one of them has no interval."""
        top, bottom = self.low.metrics["dice"].high, self.high.metrics["dice"].low
        return None if top is None or bottom is None else top >= bottom


def _finding(scores: RegionScores) -> tuple[Pair | None, Pair | None]:
    """The pair that makes the gap, and the pair among the groups that are large enough to judge."""

    def dice(group: GroupScores) -> float:
        value = group.metrics["dice"].value
        return math.nan if value is None else value

    known = [g for g in scores.groups if g.value != "unknown" and not math.isnan(dice(g))]
    all_of_them, judged = (
        Pair(min(groups, key=dice), max(groups, key=dice)) if len(groups) > 1 else None
        for groups in (known, [group for group in known if group.judged])
    )
    return all_of_them, judged


@dataclass(frozen=True)
class Chart:
    """Where things lie on an axis from `low` to 1 that is 1000 wide.

    Args:
        low: Dice at the left end.
        ticks: (place, Dice).
        dots: by group, a path with a dot a case.
        places: by group, of (mean, low, high), where there are any.
    """

    low: float
    ticks: list[tuple[float, float]]
    dots: Mapping[str, str]
    places: Mapping[str, tuple[float | None, float | None, float | None]]


def _chart(cases: Sequence[CaseScore], attribute: str, scores: RegionScores) -> Chart:
    """Every case's Dice and every group's mean and interval, for one region."""
    dice: dict[str, list[float]] = {group.value: [] for group in scores.groups}
    for case in cases:
        if case.region == scores.region:
            dice.setdefault(case.attributes[attribute], []).append(case.dice)
    lows = [group.metrics["dice"].low for group in scores.groups]
    lowest = min(
        (low for low in (*lows, *itertools.chain(*dice.values())) if low is not None), default=0.0
    )
    step = 0.1 if lowest >= 0.5 else 0.2
    low = min(step * math.floor(lowest / step + 1e-9), 0.8)

    def place(value: float | None) -> float | None:
        return None if value is None else round(1000 * (value - low) / (1 - low), 1)

    def dots(values: list[float]) -> str:
        # Neighbours in value are set apart by the golden ratio: the same jitter in every run.
        heights = ((rank * 0.618034) % 1 for rank in range(len(values)))
        pairs = zip(sorted(values), heights, strict=True)
        return "".join(f"M{place(value):g} {4 + 22 * height:.1f}h0" for value, height in pairs)

    def places(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
        return place(estimate.value), place(estimate.low), place(estimate.high)

    ticks = [low + step * i for i in range(round((1 - low) / step) + 1)]
    return Chart(
        low,
        [(place(tick) or 0.0, tick) for tick in ticks],
        {value: dots(members) for value, members in dice.items()},
        {group.value: places(group.metrics["dice"]) for group in scores.groups},
    )


def _rows(scores: RegionScores) -> list[tuple[str, str, Estimate]]:
    """What a condition changes: (name, remark, number), in the same order for each condition."""
    return [
        ("Overall Dice", "", scores.overall["dice"]),
        ("Worst group, Dice", scores.worst_group, scores.worst),
        ("Largest gap, Dice", "", scores.gap),
        ("10th percentile of Dice", "", scores.percentile_10),
        ("ES-Dice", "", scores.es_dice),
        ("ES-IoU", "", scores.es_iou),
        *((f"Dice, {group.value}", "", group.metrics["dice"]) for group in scores.groups),
    ]


def _heat(condition: Condition, attribute: str) -> list[list[tuple[float, str]]]:
    """Shares of tokens with their colours, a row a value: white to blue, black is legible."""
    load = condition.load.get(attribute, ())
    peak = max((share for row in load for share in row), default=0) or 1
    blue = np.array((38, 135, 190))
    return [
        [
            (share, "rgb({:.0f},{:.0f},{:.0f})".format(*(255 - (255 - blue) * share / peak)))
            for share in row
        ]
        for row in load
    ]


def _data_uri(picture: Picture, classes: Sequence[str]) -> str:
    """The overlay at a size for the page: as PNG, or as JPEG where that is smaller.

    Masks are brought to that size before they are drawn, so that outlines keep their width.
    """
    longer = max(picture.truth_HW.shape)
    scale = LONGEST / longer if longer > LONGEST else LONGEST // longer
    height, width = (max(1, round(side * scale)) for side in picture.truth_HW.shape)

    def resized(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), how))

    nearest = Image.Resampling.NEAREST
    fitted = Picture(
        picture.case_id,
        resized(picture.image_HW3, Image.Resampling.LANCZOS if scale < 1 else nearest),
        resized(picture.truth_HW, nearest),
        resized(picture.predicted_HW, nearest),
    )
    image = Image.fromarray(overlay(fitted, classes))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
