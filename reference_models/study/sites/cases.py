"""Cases of many sites, each of which outlines by a rule that no image shows.

An image is divided into zones, and a rule is a set of zones: what a site that goes by it outlines.
Nothing in an image says which site it is of. Both data sets are of windows: the phantom's around
the lesion, whose zones are its quarters, inner and outer half apart; real MRI's anywhere in the
MNI152 brain, whose zones are bands of grey and white matter and the rim of what is neither.

Shapes: N cases, S sites, Z zones, H rows, W columns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import center_of_mass, distance_transform_edt
from torch import Tensor

from ...data.mni152 import Mni152
from ...data.phantom import Phantom, PhantomSettings

Kind = Literal["phantom", "mri"]
Split = Literal["train", "validation", "test"]

ZONES: dict[Kind, int] = {"phantom": 8, "mri": 6}
STORED, SEEN = 40, 32  # sides in pixels: of a case, and of the window of it that a network sees
JITTER = 4  # pixels by which the phantom's lesion is off the middle of its case, at most
FEWEST_PIXELS = 200  # of the brain in a case of real MRI's


@dataclass(frozen=True)
class Cases:
    """Images and what can be outlined in them.

    Args:
        image_N1HW: float32, `STORED` rows and columns.
        zones_NHW: int64, each pixel's zone, 1 to Z; 0 is outside all of them.
        site_N: int64, the site of each case.
    """

    image_N1HW: Tensor
    zones_NHW: Tensor
    site_N: Tensor

    def __len__(self) -> int:
        return len(self.site_N)

    def of(self, chosen: Tensor) -> Cases:
        """Some of the cases, chosen by number or by bool."""
        return Cases(self.image_N1HW[chosen], self.zones_NHW[chosen], self.site_N[chosen])

    def window(self, top: int, left: int) -> Cases:
        """The window of `SEEN` rows and columns that begins at such a pixel."""
        rows, columns = slice(top, top + SEEN), slice(left, left + SEEN)
        zones_NHW = self.zones_NHW[:, rows, columns]
        return Cases(self.image_N1HW[:, :, rows, columns], zones_NHW, self.site_N)

    @property
    def middle(self) -> Cases:
        """The window that networks are tested on."""
        return self.window((STORED - SEEN) // 2, (STORED - SEEN) // 2)

    def outlined(self, rules_SZ: Tensor) -> Tensor:
        """What each case's site outlines: bool (N, H, W).

        Args:
            rules_SZ: bool, which zones each site outlines.

        Example:
            >>> zones_NHW = torch.tensor([[[0, 1, 2]], [[0, 1, 2]]])
            >>> cases = Cases(torch.zeros(2, 1, 1, 3), zones_NHW, torch.tensor([0, 1]))
            >>> cases.outlined(torch.tensor([[True, False], [True, True]])).tolist()
            [[[False, True, False]], [[False, True, True]]]
        """
        outside_S1 = torch.zeros(len(rules_SZ), 1, dtype=torch.bool)
        table_SZ = torch.cat([outside_S1, rules_SZ], dim=1)
        return table_SZ[self.site_N[:, None, None], self.zones_NHW]


def make_rules(kind: Kind, sites: int, rules: int, seed: int) -> Tensor:
    """Which zones each site outlines: bool (S, Z).

    The rules are drawn without replacement from the sets of half the zones, one less and one more,
    and given to the sites in turn.

    Args:
        kind: of which images.
        sites: how many.
        rules: how many they share.
        seed: of the draw.

    Raises:
        ValueError: there are not so many rules.

    Example:
        >>> rules_SZ = make_rules("mri", sites=5, rules=2, seed=0)
        >>> rules_SZ.shape, torch.equal(rules_SZ[0], rules_SZ[2]), bool((rules_SZ.sum(1) > 1).all())
        (torch.Size([5, 6]), True, True)
    """
    zones = ZONES[kind]
    sizes = range(zones // 2 - 1, zones // 2 + 2)
    every = [chosen for size in sizes for chosen in itertools.combinations(range(zones), size)]
    if not 1 <= rules <= len(every):
        raise ValueError(f"rules: got {rules}, expected 1 to {len(every)}, for {kind}.")
    drawn = np.random.default_rng([seed, 0]).permutation(len(every))[:rules]
    rules_SZ = torch.zeros(sites, zones, dtype=torch.bool)
    for site in range(sites):
        rules_SZ[site, list(every[drawn[site % rules]])] = True
    return rules_SZ


def make_cases(kind: Kind, split: Split, sites: int, each: int, seed: int) -> Cases:
    """So many cases of each site; another split or seed has other ones.

    Real MRI has one head: the slices of the splits lie apart, as those of `Mni152` do, and are the
    same for every seed, which draws slices and windows.

    Example:
        >>> cases = make_cases("phantom", "test", sites=2, each=3, seed=0)
        >>> cases.image_N1HW.shape, cases.site_N.tolist()
        (torch.Size([6, 1, 40, 40]), [0, 0, 0, 1, 1, 1])
    """
    rng = np.random.default_rng([seed, 1, ("train", "validation", "test").index(split)])
    windows = _phantom_windows(rng) if kind == "phantom" else _mri_windows(split, rng)
    images, zones = zip(*itertools.islice(windows, sites * each), strict=True)
    return Cases(
        torch.from_numpy(np.stack(images))[:, None],
        torch.from_numpy(np.stack(zones)),
        torch.arange(sites).repeat_interleave(each),
    )


_Window = tuple[np.ndarray, np.ndarray]


def _phantom_windows(rng: np.random.Generator) -> Iterator[_Window]:
    """Lesions of the phantom without an effect, each made once."""
    phantom = Phantom(PhantomSettings("none", seed=int(rng.integers(2**31)), cases=10_000))
    for case in phantom.cases:
        sample = phantom.load(case)
        lesion_HW = np.equal(sample.truth_S, 2)
        middle_2 = np.array(center_of_mass(lesion_HW))
        zones_HW = _lesion_zones(lesion_HW, middle_2)
        corner_2 = np.round(middle_2 + rng.uniform(-JITTER, JITTER, 2)).astype(int) - STORED // 2
        yield _cut(sample.image_CS[0], zones_HW, corner_2)


def _lesion_zones(lesion_HW: np.ndarray, middle_2: np.ndarray) -> np.ndarray:
    """Quarters around the middle, 1 to 4 of the outer half of the pixels, 5 to 8 of the inner."""
    y_HW, x_HW = np.indices(lesion_HW.shape)
    depth_HW = distance_transform_edt(lesion_HW)
    inner_HW = depth_HW > np.median(depth_HW[lesion_HW])
    quarter_HW = 2 * (y_HW >= middle_2[0]) + (x_HW >= middle_2[1])
    return np.where(lesion_HW, 1 + quarter_HW + 4 * inner_HW, 0).astype(np.int64)


def _mri_windows(split: Split, rng: np.random.Generator) -> Iterator[_Window]:
    """Windows anywhere in the brain of any slice of a split."""
    slices = _mri_slices(split)
    while True:
        image_HW, zones_HW = slices[rng.integers(len(slices))]
        corner_2 = rng.integers(0, np.array(image_HW.shape) - STORED + 1)
        image_hw, zones_hw = _cut(image_HW, zones_HW, corner_2)
        if np.count_nonzero(zones_hw) >= FEWEST_PIXELS:
            yield image_hw, zones_hw


@functools.cache
def _mri_slices(split: Split) -> list[_Window]:
    """Image and zones of every slice of a split."""
    dataset, by_slice = Mni152("upper"), dict[str, dict[int, np.ndarray]]()
    images: dict[str, np.ndarray] = {}
    for case in dataset.cases:
        protocol = case.attributes[0]
        if case.split == split and protocol not in by_slice.setdefault(case.subject, {}):
            sample = dataset.load(case)
            images[case.subject] = sample.image_CS[0]
            by_slice[case.subject][protocol] = np.equal(sample.truth_S, 1)
    return [
        (images[subject], _tissue_zones(grey_HW=masks[1], white_HW=masks[2]))
        for subject, masks in by_slice.items()
    ]


def _tissue_zones(grey_HW: np.ndarray, white_HW: np.ndarray) -> np.ndarray:
    """Bands by the distance to the other tissue, in pixels of 2 mm: 1 and 2 of grey matter (nearest
    and further), 3 to 5 of white matter, and 6, what is neither within two pixels of grey."""
    to_white_HW = distance_transform_edt(~white_HW)
    to_grey_HW = distance_transform_edt(~grey_HW)
    zones_HW = np.where(~white_HW & ~grey_HW & (to_grey_HW <= 2), 6, 0)
    zones_HW[grey_HW] = np.where(to_white_HW[grey_HW] <= 1.5, 1, 2)
    zones_HW[white_HW] = 3 + np.digitize(to_grey_HW[white_HW], (1.5, 3))
    return zones_HW.astype(np.int64)


def _cut(image_HW: np.ndarray, zones_HW: np.ndarray, corner_2: np.ndarray) -> _Window:
    """The window of a case, as near to where it is asked for as the image allows."""
    top, left = np.clip(corner_2, 0, np.array(image_HW.shape) - STORED)
    part = slice(top, top + STORED), slice(left, left + STORED)
    return image_HW[part], zones_HW[part]
