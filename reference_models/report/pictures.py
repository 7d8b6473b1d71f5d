"""Picks cases to be looked at, and outlines truth and prediction on their images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion

from ..data.cases import IGNORED
from ..metrics.scores import CaseScore

# Okabe and Ito's colours, which colour-blind readers tell apart, in the order in which they stand
# out best from grey, skin and retina.
COLOURS = ("#56B4E9", "#E69F00", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
HALO = 0.35  # brightness left on both sides of an outline
LETTERS = 11  # height in pixels of a panel's title, per pixel of an outline's width
LONGEST = 480  # pixels in the page of a picture's longer side, of a volume's longest plane
GAP = 8  # pixels between panels, and between a volume's planes; more than a halo is wide


@dataclass(frozen=True)
class Picture:
    """A case to be looked at, at native resolution, with its truth and its prediction.

    Args:
        case_id: the case's.
        image_HW3: uint8, RGB.
        truth_HW: uint8, indices into the classes; None where the truth is not known.
        predicted_HW: likewise; every picture has it.
        planes: how many of them stand side by side: 3 of a volume.

    Raises:
        ValueError: the image is not uint8 RGB, or a mask does not have its size.
    """

    case_id: str
    image_HW3: np.ndarray
    truth_HW: np.ndarray | None
    predicted_HW: np.ndarray
    planes: int = 1

    @classmethod
    def of(
        cls,
        case_id: str,
        image_CS: np.ndarray,
        truth_S: np.ndarray | None,
        predicted_S: np.ndarray,
        affine: np.ndarray | None = None,
    ) -> Picture:
        """Makes a picture of any intensities: the darkest becomes black, the brightest white.

        Of a volume, the first channel's axial, coronal and sagittal planes, in pixels as wide as
        they are high, each through the slice with the largest truth or, where there is none, the
        largest prediction. In all of them the patient's right or front is on the left.

        Args:
            case_id: the case's.
            image_CS: 3 channels of a 2D image are colours; of others, the mean is shown.
            truth_S: labels; None where nobody knows them. What is `IGNORED` gets no outline.
            predicted_S: labels.
            affine: of a volume, from indices to mm (RAS+), (4, 4).
        """
        predicted_S = predicted_S.astype(np.uint8)
        if truth_S is not None:
            truth_S = np.where(truth_S == IGNORED, 0, truth_S).astype(np.uint8)
        if affine is not None:
            seen_HW, truth_HW, predicted_HW = _planes(image_CS[0], truth_S, predicted_S, affine)
            return cls(case_id, np.stack([seen_HW] * 3, -1), truth_HW, predicted_HW, planes=3)
        image_CS = image_CS if len(image_CS) == 3 else image_CS.mean(0, keepdims=True)
        image_HW3 = np.broadcast_to(_grey(image_CS), (3, *image_CS.shape[1:])).transpose(1, 2, 0)
        return cls(case_id, np.ascontiguousarray(image_HW3), truth_S, predicted_S)

    def __post_init__(self) -> None:
        image = self.image_HW3
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"image_HW3 of {self.case_id}: got {image.dtype} {image.shape}, expected uint8 "
                "(H, W, 3); repeat a single channel three times."
            )
        for name, mask_HW in (("truth_HW", self.truth_HW), ("predicted_HW", self.predicted_HW)):
            if mask_HW is not None and mask_HW.shape != image.shape[:2]:
                raise ValueError(
                    f"{name} of {self.case_id}: got {mask_HW.shape}, expected the image's "
                    f"{image.shape[:2]}; bring it to native resolution first."
                )

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """The masks to be shown, by their titles: the truth, where it is known, stands first."""
        known = {} if self.truth_HW is None else {"truth": self.truth_HW}
        return known | {"prediction": self.predicted_HW}

    @property
    def longer(self) -> int:
        """Pixels of the longer side, of a volume's planes on average."""
        height, width = self.predicted_HW.shape
        return max(height, width // self.planes)


def colour_of(label: int) -> tuple[int, int, int]:
    """A class's RGB; from the eighth foreground class on they come back, half way to white."""
    lap, place = divmod(label - 1, len(COLOURS))
    channels = (int(COLOURS[place][i : i + 2], 16) for i in (1, 3, 5))
    red, green, blue = (255 - (255 - channel) // 2**lap for channel in channels)
    return red, green, blue


def outlined(picture: Picture, title: str, classes: Sequence[str]) -> np.ndarray:
    """Draws the outline of each class of a mask on the image, which stays visible everywhere else.

    An outline lies on the outermost pixels of its class. It is one pixel wide up to a longer side
    of 360 pixels (of a plane, where there are several) and wider in proportion above. A dark border
    of the same width on both sides lets it stand out from bright tissue.

    Args:
        picture: the case.
        title: of one of its masks, "truth" or "prediction".
        classes: names by label, the background first.

    Returns:
        uint8, (H, W, 3), of the image's size.

    Raises:
        ValueError: the mask has a label that is no class.

    Example:
        >>> import numpy as np
        >>> filled_HW = np.ones((5, 5), np.uint8)
        >>> black = Picture("1", np.zeros((5, 5, 3), np.uint8), None, filled_HW)
        >>> shown_HW3 = outlined(black, "prediction", ("background", "lesion"))
        >>> shown_HW3[0, 0].tolist(), shown_HW3[2, 2].tolist()
        ([86, 180, 233], [0, 0, 0])
    """
    mask_HW = picture.masks[title]
    if mask_HW.max() >= len(classes):
        raise ValueError(
            f"{title} of {picture.case_id}: got label {mask_HW.max()}, expected labels below "
            f"{len(classes)}, the number of classes."
        )
    width = _line_width(picture)
    shown_HW3 = picture.image_HW3.astype(np.float32)
    lines_HW = np.zeros_like(mask_HW)
    for label in range(1, len(classes)):
        region_HW = mask_HW == label
        lines_HW[region_HW & ~binary_erosion(region_HW, iterations=width)] = label
    shown_HW3[binary_dilation(lines_HW > 0, iterations=width)] *= HALO
    for label in range(1, len(classes)):
        shown_HW3[lines_HW == label] = colour_of(label)
    return shown_HW3.round().astype(np.uint8)


def _line_width(picture: Picture) -> int:
    return max(1, round(picture.longer / 240))


def overlay(picture: Picture, classes: Sequence[str]) -> np.ndarray:
    """Puts the outlined truth beside the outlined prediction, each under its title.

    The planes of a volume stand in two rows, with the truth above the prediction. Where the truth
    is not known, the prediction stands alone.

    Args:
        picture: the case.
        classes: names by label, the background first.

    Returns:
        uint8, (H, W, 3); panels have the image's size.

    Raises:
        ValueError: a mask has a label that is no class.
    """
    # A title fits into the narrowest image.
    size = max(1, min(LETTERS * _line_width(picture), picture.predicted_HW.shape[1] // 6))
    font = ImageFont.load_default(size)
    panels = []
    for title in picture.masks:
        shown_HW3 = outlined(picture, title, classes)
        strip = Image.new("RGB", (shown_HW3.shape[1], 2 * size))
        ImageDraw.Draw(strip).text((size // 2, size // 3), title, "white", font)
        panels.append(np.concatenate([np.asarray(strip), shown_HW3]))
    below = picture.planes > 1
    margin = ((GAP, 0), (0, 0), (0, 0)) if below else ((0, 0), (GAP, 0), (0, 0))
    rest = [np.pad(panel, margin) for panel in panels[1:]]
    return np.concatenate([panels[0], *rest], axis=0 if below else 1)


@dataclass(frozen=True)
class Example:
    """A case picked to be looked at: its role, such as "worst case", and its Dice by region."""

    role: str
    case_id: str
    dice: Mapping[str, float]


def examples(
    cases: Sequence[CaseScore], attributes: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, list[Example]]]:
    """Picks the median, worst and best case of each subgroup; fewer where it has fewer cases.

    A case's score is its mean Dice over the regions. Among equal ones the order is that of their
    ids; the median of an even number is the lower of the two in the middle.

    Args:
        cases: all of them, a row a region.
        attributes: names, each with the names of its values.

    Returns:
        By attribute and value, the unknown ones last, the groups that have a case. The median
        comes first; a group of two cases has none.
    """
    dice: dict[str, dict[str, float]] = {}
    attributes_of: dict[str, Mapping[str, str]] = {}
    for case in cases:
        dice.setdefault(case.case_id, {})[case.region] = case.dice
        attributes_of[case.case_id] = case.attributes
    ordered = sorted(dice, key=lambda i: (math.fsum(dice[i].values()) / len(dice[i]), i))
    groups = {
        attribute: {
            value: [case_id for case_id in ordered if attributes_of[case_id][attribute] == value]
            for value in (*values, "unknown")
        }
        for attribute, values in attributes.items()
    }
    return {
        attribute: {
            value: [Example(role, members[at], dice[members[at]]) for role, at in _picks(members)]
            for value, members in values.items()
            if members
        }
        for attribute, values in groups.items()
    }


def _picks(ordered: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Lists roles, each with its place in `ordered`, which has a case or more, the worst first."""
    if len(ordered) == 1:
        return (("only case", 0),)
    median = (("median case", (len(ordered) - 1) // 2),) if len(ordered) > 2 else ()
    return (*median, ("worst case", 0), ("best case", -1))


def pictures_wanted(
    cases: Sequence[CaseScore], attributes: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Lists the ids of the `examples`, each once, in the order of the cases."""
    wanted = {
        example.case_id
        for groups in examples(cases, attributes).values()
        for chosen in groups.values()
        for example in chosen
    }
    return tuple(i for i in dict.fromkeys(case.case_id for case in cases) if i in wanted)


def data_uris(picture: Picture, classes: Sequence[str]) -> dict[str, str]:
    """Encodes the outlined masks, by their titles, at a size for the page.

    Each is a PNG, or a JPEG where that is smaller. Masks are brought to that size before they are
    drawn, so that outlines keep their width.
    """
    longer = picture.longer
    scale = LONGEST / longer if longer > LONGEST else LONGEST // longer
    height, width = (max(1, round(side * scale)) for side in picture.predicted_HW.shape)

    def resized(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), how))

    nearest = Image.Resampling.NEAREST
    fitted = Picture(
        picture.case_id,
        resized(picture.image_HW3, Image.Resampling.LANCZOS if scale < 1 else nearest),
        None if picture.truth_HW is None else resized(picture.truth_HW, nearest),
        resized(picture.predicted_HW, nearest),
        picture.planes,
    )
    return {
        title: _data_uri(Image.fromarray(outlined(fitted, title, classes)))
        for title in fitted.masks
    }


def _data_uri(image: Image.Image) -> str:
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _grey(intensities: np.ndarray) -> np.ndarray:
    """Scales intensities to 8 bits, from the darkest to the brightest."""
    low, high = float(intensities.min()), float(intensities.max())
    return ((intensities - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)


def _planes(
    image_S: np.ndarray, truth_S: np.ndarray | None, predicted_S: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Puts axial, coronal and sagittal plane side by side: (H, W) of image, truth, prediction."""
    # To the patient's left, back and feet: rows and columns then run as a radiologist expects.
    stored = orientations.io_orientation(affine)
    turn = orientations.ornt_transform(stored, orientations.axcodes2ornt("LPI"))
    image_S, predicted_S = (
        orientations.apply_orientation(array_S, turn) for array_S in (image_S, predicted_S)
    )
    if truth_S is not None:
        truth_S = orientations.apply_orientation(truth_S, turn)
    # Pixels are as wide as they are high: as the smallest side of a voxel.
    lengths = image_S.shape * voxel_sizes(affine)[np.argsort(turn[:, 0])]
    sides = [max(1, round(length / voxel_sizes(affine).min())) for length in lengths]
    marked_S = predicted_S if truth_S is None or not truth_S.any() else truth_S
    cuts = []
    for axis in (2, 1, 0):
        columns, rows = sorted({0, 1, 2} - {axis})
        areas = np.count_nonzero(marked_S, (columns, rows))
        at = int(areas.argmax()) if areas.any() else len(areas) // 2
        cuts.append((axis, at, (sides[columns], sides[rows])))

    def cut(array_S: np.ndarray, how: Image.Resampling) -> np.ndarray:
        planes = []
        for axis, at, size in cuts:
            plane = Image.fromarray(np.ascontiguousarray(array_S.take(at, axis).T))
            planes.append(np.asarray(plane.resize(size, how)))
        return _beside(planes)

    nearest = Image.Resampling.NEAREST
    image_HW = _grey(cut(image_S, Image.Resampling.BILINEAR))
    truth_HW = None if truth_S is None else cut(truth_S, nearest)
    return image_HW, truth_HW, cut(predicted_S, nearest)


def _beside(planes: Sequence[np.ndarray]) -> np.ndarray:
    """Puts planes in a row, each at middle height and `GAP` pixels from the next."""
    height, low = max(map(len, planes)), min(plane.min() for plane in planes)
    above = [(height - len(plane)) // 2 for plane in planes]
    padded = [
        np.pad(plane, ((top, height - len(plane) - top), (0, GAP)), constant_values=low)
        for plane, top in zip(planes, above, strict=True)
    ]
    return np.concatenate(padded, 1)[:, :-GAP]
