"""The phantom: made-up scans of an organ with a lesion, which an attribute may change.

With `effect="rule"` the attribute decides how the lesion is outlined, and no image shows it: only a
model that receives the attribute can be right for every group. With `effect="appearance"` all
lesions are outlined alike, and the attribute decides how bright the lesion is, which every image
shows. With `effect="none"` the attribute changes nothing. With `effect="two"` two attributes decide
the outline, and some of their combinations occur only in the test set.

There are two kinds of rule. "margin" decides how far from the lesion's middle the outline runs: it
grows evenly from `TIGHTEST` to `WIDEST` over the sites; two attributes contribute half each.
"direction" decides which half of the lesion is outlined: with V sites, the half of site v looks
2πv/V from right to down; with two attributes, the protocol decides how far out the outline runs.

With two attributes, the first site uses both protocols. Every other site uses one: the second site
the first protocol, the third site the second protocol, and so on in turn. So training shows every
site and every protocol, but for every site except the first it never shows one combination.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
from scipy.ndimage import gaussian_filter

from ..errors import DataError
from .cases import Attribute, Case, Dataset, Sample

Effect = Literal["rule", "appearance", "none", "two"]
Rule = Literal["margin", "direction"]

# Where the outline runs, in radii of the lesion: for the tightest and the widest margin, and where
# the attribute does not move it. The lesion fades towards its rim, so that no image shows which
# outline is the right one.
TIGHTEST, WIDEST, FIXED = 0.55, 1.0, 0.8
# How strongly a lesion stands out from its organ, for the first and the last site. The lesions of
# every second site are darker than the organ; the others are brighter. The texture's standard
# deviation is 0.08.
CLEAREST, FAINTEST = 0.45, 0.2
# How often each protocol is used at the site that uses both.
PROTOCOL_SHARES = (0.7, 0.3)


@dataclass(frozen=True)
class PhantomSettings:
    """Settings of the phantom data set; the same settings give the same data on any machine."""

    effect: Effect = "rule"
    """What the attribute changes.
    - rule: how the lesion is outlined, which no image
      shows.
    - appearance: how bright the lesion is.
    - none: nothing.
    - two: two attributes, site and protocol, change
      how the lesion is outlined."""
    rule: Rule = "margin"
    """How the attribute changes the outline.
    - margin: how far out the outline runs.
    - direction: which half of the lesion is outlined."""
    shares: tuple[float, ...] = (0.7, 0.2, 0.1)
    """Share of the training cases for each site. There
    are as many sites as shares, and the shares add up
    to 1."""
    cases: int = 400
    """Number of training cases."""
    validation_cases_per_group: int = 0
    """Number of validation cases for each site or, with
    two attributes, for each combination in training.
    0: some of the training cases become validation
    cases."""
    test_cases_per_group: int = 40
    """Number of test cases for each site or, with two
    attributes, for each combination."""
    image_size: int = 64
    """Number of rows and of columns of an image, in
    pixels; at least 32."""
    seed: int = 0
    """Seed of the images. It does not change the split
    or the training, which have seeds of their own."""


class Phantom(Dataset):
    """The phantom data set: the cases that `PhantomSettings` describe.

    Validation and test set have equally many cases of each site; training cases occur in the given
    shares, to the nearest case. The attribute is "site"; a second one is "protocol".

    Example:
        >>> phantom = Phantom(PhantomSettings(cases=10))
        >>> [case.attributes for case in phantom.cases[:10]].count((0,))
        7
        >>> phantom.load(phantom.cases[0]).image_CS.shape
        (1, 64, 64)
        >>> two = Phantom(PhantomSettings("two"))
        >>> sorted({case.attributes for case in two.cases if case.split == "train"})
        [(0, 0), (0, 1), (1, 0), (2, 1)]

    Raises:
        DataError: the shares do not add up to 1, or leave a site (or a combination that should
            occur in training) without a case; two attributes are asked for a single site; there is
            no test case; or images have fewer than 32 pixels a side, in which outlines coincide.
    """

    name = "phantom"
    classes = ("background", "organ", "lesion")
    regions = {"organ": (1, 2), "lesion": (2,)}  # noqa: RUF012
    channels = 1

    def __init__(self, settings: PhantomSettings) -> None:
        _require_possible(settings)
        self._settings = settings
        sites = len(settings.shares)
        seen: dict[tuple[int, ...], float] = {
            (s,): share for s, share in enumerate(settings.shares)
        }
        tested: list[tuple[int, ...]] = [*seen]
        self.attributes = (Attribute("site", tuple(f"site {s + 1}" for s in range(sites))),)
        self.population = {"site": settings.shares}
        if settings.effect == "two":
            seen = _seen_in_training(settings.shares)
            tested = [*product(range(sites), range(len(PROTOCOL_SHARES)))]
            self.attributes += (Attribute("protocol", ("protocol 1", "protocol 2")),)
            self.population["protocol"] = tuple(
                sum(share for values, share in seen.items() if values[1] == protocol)
                for protocol in range(len(PROTOCOL_SHARES))
            )
        # Largest remainders: the counts add up to `cases`, each within one of its share.
        ends = np.round(np.cumsum([*seen.values()]) * settings.cases).astype(int)
        counts = np.diff(ends, prepend=0)
        n_validation, n_test = settings.validation_cases_per_group, settings.test_cases_per_group
        if counts.min() < 1 or n_validation < 0 or n_test < 1 or settings.image_size < 32:
            raise DataError(
                "phantom: expected at least one training case and one test case of every site (or "
                "combination of site and protocol), 0 or more validation cases, and images of 32 "
                f"or more pixels a side; got {counts.tolist()} training cases, {n_validation} "
                f"validation and {n_test} test cases of each, and {settings.image_size} pixels"
            )
        lots = [("train", *lot) for lot in zip(seen, counts.tolist(), strict=True)]
        lots += [("validation", values, n_validation) for values in seen]
        lots += [("test", values, n_test) for values in tested]
        made = [(split, values) for split, values, count in lots for _ in range(count)]
        ids = [f"phantom{i:05}" for i in range(len(made))]
        self.cases = tuple(
            Case(case_id, case_id, values, split, stratum=values[0])
            for case_id, (split, values) in zip(ids, made, strict=True)
        )

    def load(self, case: Case) -> Sample:
        """Makes the image and mask of one case, the same every time."""
        rng = np.random.default_rng(
            [self._settings.seed, int(case.case_id.removeprefix("phantom"))]
        )
        size = self._settings.image_size
        axis = (np.arange(size) + 0.5) / size - 0.5
        place_2 = rng.uniform(-0.08, 0.08, 2)
        organ_HW = _distance(axis, place_2, rng.uniform(0.26, 0.36, 2), rng.uniform(0, np.pi))
        middle_2 = place_2 + rng.uniform(-0.07, 0.07, 2)
        lesion_HW = _distance(axis, middle_2, rng.uniform(0.11, 0.16, 2), rng.uniform(0, np.pi))
        texture_HW = np.zeros((size, size))
        for sigma, weight in ((1, 0.05), (size / 12, 0.06)):  # grain and clouds
            noise_HW = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
            texture_HW += weight * noise_HW / noise_HW.std()
        level, site = CLEAREST, case.attributes[0]
        if self._settings.effect == "appearance":
            last = max(len(self._settings.shares) - 1, 1)
            level = (CLEAREST + (FAINTEST - CLEAREST) * site / last) * (-1) ** site
        inside_HW = np.clip((1 - organ_HW) * 12 + 0.5, 0, 1)  # an edge of about two pixels
        fading_HW = np.clip(1.25 - lesion_HW, 0, 1)
        image_HW = 0.25 + inside_HW * (0.3 + level * fading_HW) + texture_HW
        mask_HW = (organ_HW <= 1).astype(np.uint8)
        mask_HW[self._outlined(case.attributes, axis, middle_2, lesion_HW) & (organ_HW <= 1)] = 2
        return Sample(
            case.case_id, image_HW[None].astype(np.float32), mask_HW, case.attributes, (1.0, 1.0)
        )

    def _outlined(
        self,
        values: tuple[int, ...],
        axis: np.ndarray,
        middle_2: np.ndarray,
        lesion_HW: np.ndarray,
    ) -> np.ndarray:
        """Outlines the lesion (H, W) as an expert would who follows the rule of these values."""
        settings = self._settings
        if settings.effect in ("appearance", "none"):
            return lesion_HW <= FIXED
        site, sites = values[0], len(settings.shares)
        if settings.rule == "direction":
            reach = FIXED
            if settings.effect == "two":
                reach = (TIGHTEST, WIDEST)[values[1]]
            angle = 2 * np.pi * site / sites
            y_H1, x_1W = (axis - middle_2[0])[:, None], (axis - middle_2[1])[None]
            return (lesion_HW <= reach) & (np.cos(angle) * x_1W + np.sin(angle) * y_H1 >= 0)
        generous, most = site, max(sites - 1, 1)
        if settings.effect == "two":
            generous, most = site + most * values[1], 2 * most
        return lesion_HW <= TIGHTEST + (WIDEST - TIGHTEST) * generous / most


def _require_possible(settings: PhantomSettings) -> None:
    """Checks each setting by itself.

    Raises:
        DataError: a setting is out of its range.
    """
    for name, value, known in (
        ("effect", settings.effect, get_args(Effect)),
        ("rule", settings.rule, get_args(Rule)),
    ):
        if value not in known:
            raise DataError(f"phantom.{name}: got {value}, expected one of {', '.join(known)}")
    if settings.seed < 0:
        raise DataError(f"phantom.seed: got {settings.seed}, expected 0 or more")
    sites = len(settings.shares)
    if sites < 1 or min(settings.shares) <= 0 or abs(sum(settings.shares) - 1) > 1e-6:
        raise DataError(
            f"phantom.shares: got {settings.shares}, expected shares above 0 that add up to 1"
        )
    if settings.effect == "two" and sites < 2:
        raise DataError(
            f"phantom.shares: got {settings.shares}, expected two sites or more with effect two, "
            "so that training can leave a combination out"
        )


def _seen_in_training(shares: tuple[float, ...]) -> dict[tuple[int, ...], float]:
    """Lists the combinations of site and protocol that occur in training, with their shares.

    Example:
        >>> _seen_in_training((0.5, 0.3, 0.2))
        {(0, 0): 0.35, (0, 1): 0.15, (1, 0): 0.3, (2, 1): 0.2}
    """
    first, *others = shares
    seen: dict[tuple[int, ...], float] = {}
    for protocol, share in enumerate(PROTOCOL_SHARES):
        seen[0, protocol] = first * share
    for site, share in enumerate(others, start=1):
        seen[site, (site + 1) % len(PROTOCOL_SHARES)] = share
    return seen


def _distance(
    axis: np.ndarray, centre_2: np.ndarray, radii_2: np.ndarray, turn: float
) -> np.ndarray:
    """Measures from the middle of a turned ellipse in its own radii (H, W); 1 on its edge."""
    y_HW, x_HW = np.meshgrid(axis - centre_2[0], axis - centre_2[1], indexing="ij")
    along_HW = (np.cos(turn) * x_HW + np.sin(turn) * y_HW) / radii_2[0]
    across_HW = (np.cos(turn) * y_HW - np.sin(turn) * x_HW) / radii_2[1]
    return np.hypot(along_HW, across_HW)
