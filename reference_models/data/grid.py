"""From a volume as its file stores it to one grid of voxels for all volumes, and back.

By hand, since MONAI's Spacing does not antialias where an image shrinks, gives a mask the nearest
voxel's label, and on the way back holds the logits of all classes at native size at once.

Shapes: C channels, K classes, S spatial axes: of a frame left to right, back to front and below to
above (RAS+), of a sample as stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import nibabel
import numpy as np
import torch
from nibabel import orientations
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from .augmentation import Augment, Augmentation, augment_volumes
from .cases import IGNORED, Sample
from .framing import Frame, Framing, resampled_labels

_LARGEST = 2**31  # voxels of a frame: 8 GiB a channel
_SLAB = 2**22  # logits at a time on the way back: 16 MiB of them


@dataclass(frozen=True)
class VolumeFraming(Framing):
    """A volume turned to RAS+, resampled and padded; of an oblique one, to the closest axes.

    Resampling keeps the volume's extent, outer face to outer face, so that an axis of n voxels of
    s mm becomes one of round(n · s / spacing), and at least 1. Padding is shared out to both ends.

    Args:
        spacing: mm from left to right, back to front and below to above.
        least: voxels that a frame has at least, such as the patch.
        body: whether frames say where the body is.

    Raises:
        ValueError: a spacing that is not above 0 and finite, or less than 1 voxel.

    Example:
        >>> header = nibabel.Nifti1Image(np.zeros((20, 30, 5)), np.diag([-2, -2, 6, 1])).header
        >>> image_CS, mask_S = np.zeros((1, 20, 30, 5), np.float32), np.zeros((20, 30, 5), np.uint8)
        >>> sample = Sample("a", image_CS, mask_S, (0,), (2.0, 2.0, 6.0), header)
        >>> frame = VolumeFraming((2.0, 2.0, 3.0), least=(32, 16, 8)).apply(sample)
        >>> frame.image_CS.shape, frame.mask_S.shape
        ((1, 32, 30, 10), (32, 30, 10))
    """

    one_size: ClassVar[bool] = False

    spacing: tuple[float, float, float]
    least: tuple[int, int, int] = (1, 1, 1)
    body: bool = False

    def __post_init__(self) -> None:
        sizes = all(0 < size < math.inf for size in self.spacing)
        if not (len(self.spacing) == len(self.least) == 3 and sizes and min(self.least) >= 1):
            raise ValueError(
                "spacing must be three sizes above 0 and least three counts of 1 or more, got "
                f"spacing={self.spacing}, least={self.least}"
            )

    @property
    def affine(self) -> np.ndarray:
        """Without the volume's place, which differs from one to the next."""
        return np.diag([*self.spacing, 1.0])

    def augmentation(self, kind: Augment) -> Augmentation:
        return augment_volumes(kind)

    def apply(self, sample: Sample) -> Frame:
        """As of `Framing`: image float32, mask uint8, body bool, each channel padded with its
        minimum, the mask with 0 or, where parts of it are ignored, with `IGNORED`: patches are
        laid around what is not.

        Images are resampled linearly, with antialiasing where they shrink; of a mask each label's
        share is, at the voxel's middle, and the largest wins.

        Raises:
            ValueError: a sample that is no NIfTI volume.
            DataError: the frame would be larger than can be meant.
        """
        turn = _turn(sample)
        size, padding = self._size(sample)
        image_CS = np.stack([_turned(channel, turn) for channel in sample.image_CS])
        image_CS = _resampled(image_CS.astype(np.float32, copy=False), size)
        body_S = np.pad(find_body(image_CS), padding) if self.body else None
        mask_S = None
        if sample.mask_S is not None:
            mask_S = resampled_labels(_turned(sample.mask_S, turn), size)
            beyond = IGNORED if (mask_S == IGNORED).any() else 0
            mask_S = np.pad(mask_S, padding, constant_values=beyond)
        if any(sum(ends) for ends in padding):
            image_CS = np.stack(
                [np.pad(channel, padding, constant_values=channel.min()) for channel in image_CS]
            )
        return Frame(image_CS, mask_S, body_S)

    def restore(self, logits_KS: Tensor, sample: Sample) -> np.ndarray:
        """As of `Framing`: resampled linearly, on the logits' device and a slab at a time, so that
        no more than the mask itself grows with the native size."""
        turn = _turn(sample)
        size, padding = self._size(sample)
        padded = tuple(length + sum(ends) for length, ends in zip(size, padding, strict=True))
        if tuple(logits_KS.shape[1:]) != padded:
            raise ValueError(f"logits must be (K, {padded}), got {tuple(logits_KS.shape)}")
        x, y, z = (slice(low, low + n) for (low, _), n in zip(padding, size, strict=True))
        inside_KS = logits_KS[:, x, y, z]
        native = tuple(sample.native_size[axis] for axis in np.argsort(turn[:, 0]))
        mask_S = np.empty(native, np.uint8)
        # Along the first axis by hand, as slabs must not see their own ends as the volume's.
        middle = (torch.arange(native[0], dtype=torch.float64) + 0.5) * size[0] / native[0] - 0.5
        middle = middle.clamp(0, size[0] - 1).to(logits_KS.device, torch.float32)
        below = middle.long()
        above = (below + 1).clamp(max=size[0] - 1)
        share = (middle - below)[:, None, None]
        plane = max(size[1] * size[2], native[1] * native[2])
        rows = max(1, _SLAB // (len(logits_KS) * plane))
        for start in range(0, native[0], rows):
            part = slice(start, start + rows)
            low_KS, high_KS = (inside_KS[:, at[part]].float() for at in (below, above))
            slab_KS = torch.lerp(low_KS, high_KS, share[part])
            slab_KS = F.interpolate(slab_KS, native[1:], mode="bilinear", align_corners=False)
            # Its indices come seven times as fast as those of argmax on a CPU.
            mask_S[part] = slab_KS.max(0).indices.to(torch.uint8).cpu().numpy()
        back = orientations.ornt_transform(_RAS, turn)
        return np.ascontiguousarray(orientations.apply_orientation(mask_S, back))

    def _size(self, sample: Sample) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """A volume's voxels on the grid, and the padding at either end of each axis."""
        order = np.argsort(_turn(sample)[:, 0])
        size = tuple(
            max(1, round(sample.native_size[axis] * sample.spacing[axis] / wanted))
            for axis, wanted in zip(order, self.spacing, strict=True)
        )
        if math.prod(size) > _LARGEST:
            own = " x ".join(f"{length:g}" for length in sample.spacing)
            raise DataError(
                f"{sample.case_id}: its {sample.native_size} voxels of {own} mm would become "
                f"{size} of {self.spacing} mm, more than {_LARGEST}; if its affine is not in mm, "
                "correct it, else choose a larger --spacing"
            )
        lacking = [max(0, least - n) for least, n in zip(self.least, size, strict=True)]
        return size, [(n // 2, n - n // 2) for n in lacking]


def find_body(image_CS: np.ndarray) -> np.ndarray:
    """Where the body is in a volume of axes RAS+: bool (S).

    In any channel, what lies above a tenth of the way from the 2nd to the 98th percentile, the
    threshold of FSL's BET (Smith 2002, doi:10.1002/hbm.10062): above air in a CT, windowed or not,
    and in an MR. Of that, the largest connected part and those of at least a twentieth of it, since
    arms and the other leg are the patient's too, and a couch is thinner; then, in every axial
    slice, what these enclose, such as lungs. A couch that touches the body stays with it. Where
    that is less than 2 % of the volume, the rule does not fit, and all of it is taken.
    """
    found_S = np.zeros(image_CS.shape[1:], bool)
    for channel_S in image_CS:
        low, high = np.percentile(channel_S[::2, ::2, ::2], (2, 98))
        found_S |= channel_S > low + 0.1 * (high - low)
    parts_S, _ = ndimage.label(found_S)
    sizes = np.bincount(parts_S[found_S], minlength=1)
    found_S = (sizes >= max(1, sizes.max() / 20))[parts_S]
    in_plane = ndimage.generate_binary_structure(3, 1) & (np.arange(3) == 1)
    body_S = ndimage.binary_fill_holes(found_S, in_plane)
    return body_S if body_S.mean() >= 0.02 else np.ones_like(body_S)


_RAS = orientations.axcodes2ornt("RAS")


def _turn(sample: Sample) -> np.ndarray:
    """The canonical axis that each stored one becomes, and whether it is flipped."""
    if sample.header is None or len(sample.native_size) != 3:
        raise ValueError(
            f"{sample.case_id}: expected a volume with a NIfTI header, got {sample.native_size} "
            f"and header={sample.header}"
        )
    return nibabel.io_orientation(sample.header.get_best_affine())


def _turned(array_S: np.ndarray, turn: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(orientations.apply_orientation(array_S, turn))


def _resampled(image_CS: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """PyTorch antialiases in two dimensions: the last two axes together, then the first."""
    if image_CS.shape[1:] == size:
        return image_CS
    channels = []
    for volume_S in torch.from_numpy(image_CS):
        planes_XQ = _resized(volume_S, size[1:]).reshape(1, len(volume_S), -1)
        channels.append(_resized(planes_XQ, (size[0], planes_XQ.shape[2])).reshape(size))
    return torch.stack(channels).numpy()


def _resized(planes_NHW: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(
        planes_NHW[None], size, mode="bilinear", align_corners=False, antialias=True
    )[0]
