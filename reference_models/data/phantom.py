"""Made-up scans of an organ with a lesion, whose attribute changes either the rule or the looks.

With `effect="rule"` the attribute says how generously the lesion is outlined, and no image shows
it: only a model that is told the attribute can be right for every group. With
`effect="appearance"` the rule is one, and the attribute changes how bright the lesion is, which
every image shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter

from .cases import Attribute, Case, DataError, Dataset, Sample

# Where the outline runs, in radii of the lesion, for the first and the last value; the others lie
# evenly between. The lesion fades towards its rim, so that no outline is the visible one.
TIGHTEST, WIDEST = 0.55, 1.0
# How strongly a lesion stands out from its organ, likewise; every other value's is darker than the
# organ rather than brighter. The texture's standard deviation is 0.08.
CLEAREST, FAINTEST = 0.45, 0.2


@dataclass(frozen=True)
class PhantomSettings:
    """What the phantom data set is made of; the same settings give the same data anywhere."""

    effect: Literal["rule", "appearance"] = "rule"
    """What the attribute changes: how the lesion is outlined, or how it looks."""
    shares: tuple[float, ...] = (0.7, 0.2, 0.1)
    """Each attribute value's share of the training cases; as many values as shares."""
    cases: int = 400
    """Training cases, some of which become validation cases."""
    test_cases_per_group: int = 40
    """Test cases of each attribute value."""
    image_size: int = 64
    """Rows and columns."""
    seed: int = 0
    """Of the images; independent of the seeds of splits and of training."""


class Phantom(Dataset):
    """The phantom data set: `effect` and the rest of `PhantomSettings` made into cases.

    The test set is balanced; training cases occur in the given shares, to the nearest case.

    Example:
        >>> phantom = Phantom(PhantomSettings(cases=10))
        >>> [case.attributes for case in phantom.cases[:10]].count((0,))
        7
        >>> phantom.load(phantom.cases[0]).image_CS.shape
        (1, 64, 64)

    Raises:
        DataError: shares that do not add up to 1 or leave a value without a training case, no
            test case, or an image of less than 32 pixels, in which a lesion's outlines coincide.
    """

    name = "phantom"
    classes = ("background", "organ", "lesion")
    regions = {"organ": (1, 2), "lesion": (2,)}  # noqa: RUF012
    channels = 1

    def __init__(self, settings: PhantomSettings) -> None:
        self._settings = settings
        values = len(settings.shares)
        if settings.seed < 0:
            raise DataError(f"the phantom's seed must be 0 or more, got {settings.seed}")
        if values < 1 or min(settings.shares) <= 0 or abs(sum(settings.shares) - 1) > 1e-6:
            raise DataError(
                f"phantom shares must be positive and add up to 1, got {settings.shares}"
            )
        # Largest remainders: the counts add up to `cases`, each within one of its share.
        ends = np.round(np.cumsum(settings.shares) * settings.cases).astype(int)
        counts = np.diff(ends, prepend=0)
        if counts.min() < 1 or settings.test_cases_per_group < 1 or settings.image_size < 32:
            raise DataError(
                "phantom needs a training and a test case of every attribute value and images of "
                f"32 pixels or more, got {counts.tolist()} training cases, "
                f"{settings.test_cases_per_group} test cases of each and {settings.image_size} "
                "pixels"
            )
        self.attributes = (Attribute("site", tuple(f"site {i + 1}" for i in range(values))),)
        self.population = {"site": settings.shares}
        sites = [*np.repeat(np.arange(values), counts).tolist()]
        sites += np.repeat(np.arange(values), settings.test_cases_per_group).tolist()
        ids = [f"phantom{i:05}" for i in range(len(sites))]
        self.cases = tuple(
            Case(case_id, case_id, (site,), "train" if i < settings.cases else "test", stratum=site)
            for i, (case_id, site) in enumerate(zip(ids, sites, strict=True))
        )

    def load(self, case: Case) -> Sample:
        """Makes one case, each time the same."""
        (site,) = case.attributes
        last = max(len(self._settings.shares) - 1, 1)
        rng = np.random.default_rng(
            [self._settings.seed, int(case.case_id.removeprefix("phantom"))]
        )
        size = self._settings.image_size
        axis = (np.arange(size) + 0.5) / size - 0.5
        place_2 = rng.uniform(-0.08, 0.08, 2)
        organ_HW = _distance(axis, place_2, rng.uniform(0.26, 0.36, 2), rng.uniform(0, np.pi))
        lesion_HW = _distance(
            axis,
            place_2 + rng.uniform(-0.07, 0.07, 2),
            rng.uniform(0.11, 0.16, 2),
            rng.uniform(0, np.pi),
        )
        texture_HW = np.zeros((size, size))
        for sigma, weight in ((1, 0.05), (size / 12, 0.06)):  # grain and clouds
            noise_HW = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
            texture_HW += weight * noise_HW / noise_HW.std()
        level, outline = CLEAREST, 0.8
        if self._settings.effect == "rule":
            outline = TIGHTEST + (WIDEST - TIGHTEST) * site / last
        else:
            level = (CLEAREST + (FAINTEST - CLEAREST) * site / last) * (-1) ** site
        inside_HW = np.clip((1 - organ_HW) * 12 + 0.5, 0, 1)  # an edge of about two pixels
        fading_HW = np.clip(1.25 - lesion_HW, 0, 1)
        image_HW = 0.25 + inside_HW * (0.3 + level * fading_HW) + texture_HW
        mask_HW = (organ_HW <= 1).astype(np.uint8)
        mask_HW[(lesion_HW <= outline) & (organ_HW <= 1)] = 2
        return Sample(
            case.case_id, image_HW[None].astype(np.float32), mask_HW, case.attributes, (1.0, 1.0)
        )


def _distance(
    axis: np.ndarray, centre_2: np.ndarray, radii_2: np.ndarray, turn: float
) -> np.ndarray:
    """Distance from the middle of a turned ellipse in its own radii (H, W); 1 on its edge."""
    y_HW, x_HW = np.meshgrid(axis - centre_2[0], axis - centre_2[1], indexing="ij")
    along_HW = (np.cos(turn) * x_HW + np.sin(turn) * y_HW) / radii_2[0]
    across_HW = (np.cos(turn) * y_HW - np.sin(turn) * x_HW) / radii_2[1]
    return np.hypot(along_HW, across_HW)
