"""Maps volumes from the voxels in their files to one grid for all volumes, and predictions back.

MONAI's Spacing is not used: it does not antialias an image that shrinks, it gives a mask the
nearest voxel's label, and on the way back it holds the logits of all classes at native size at
once.

Shapes: C channels, K classes, S spatial axes: left to right, back to front and below to above
(RAS+) in a frame, as stored in a sample.
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

_LARGEST = 2**31  # most voxels of a frame: 8 GiB for each channel
_SLAB = 2**22  # number of logits that are resampled at a time on the way back: 16 MiB


@dataclass(frozen=True)
class VolumeFraming(Framing):
    """Turns a volume to RAS+ (an oblique one to the closest axes), resamples it and pads it.

    Resampling preserves the volume's extent from outer face to outer face: an axis of n voxels of
    s mm gets round(n · s / spacing) voxels, and at least 1. Padding is divided between both ends.

    Args:
        spacing: size of a voxel in mm, left to right, back to front and below to above.
        least: smallest number of voxels of a frame along each axis, such as the patch.
        body: whether frames say where the body is.

    Raises:
        ValueError: a spacing is not above 0 and finite, or a number of voxels is below 1.

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
                f"spacing, least: got {self.spacing} and {self.least}, expected three sizes above "
                "0 and three numbers of 1 or more"
            )

    @property
    def affine(self) -> np.ndarray:
        """The affine (4, 4) of the voxels' sizes, without a volume's position."""
        return np.diag([*self.spacing, 1.0])

    def augmentation(self, kind: Augment) -> Augmentation:
        return augment_volumes(kind)

    def apply(self, sample: Sample) -> Frame:
        """Makes the frame: image float32, mask uint8, body bool.

        Images are resampled linearly, with antialiasing if they shrink. Each label's share of a
        mask is resampled at the middle of the voxel, and the largest share wins. Each channel is
        padded with its minimum. The mask is padded with 0 or, if it has pixels that are `IGNORED`,
        with `IGNORED`, since patches then lie around pixels that are not ignored.

        Raises:
            ValueError: the sample is not a volume with a NIfTI header.
            DataError: the frame would be too large.
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
        """Does as `Framing.restore`: logits are resampled linearly, on their device and one slab at
        a time, so that only the mask needs memory for the native size."""
        turn = _turn(sample)
        size, padding = self._size(sample)
        padded = tuple(length + sum(ends) for length, ends in zip(size, padding, strict=True))
        if tuple(logits_KS.shape[1:]) != padded:
            raise ValueError(
                f"logits: got shape {tuple(logits_KS.shape)}, expected "
                f"(K, {', '.join(map(str, padded))})"
            )
        x, y, z = (slice(low, low + n) for (low, _), n in zip(padding, size, strict=True))
        inside_KS = logits_KS[:, x, y, z]
        native = tuple(sample.native_size[axis] for axis in np.argsort(turn[:, 0]))
        mask_S = np.empty(native, np.uint8)
        # The first axis is resampled here, since the ends of a slab are not the ends of the volume.
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
            # On a CPU, max gives its indices seven times as fast as argmax.
            mask_S[part] = slab_KS.max(0).indices.to(torch.uint8).cpu().numpy()
        back = orientations.ornt_transform(_RAS, turn)
        return np.ascontiguousarray(orientations.apply_orientation(mask_S, back))

    def _size(self, sample: Sample) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Gives a volume's number of voxels on the grid, and the padding at both ends of each "
        "axis."""
        order = np.argsort(_turn(sample)[:, 0])
        size = tuple(
            max(1, round(sample.native_size[axis] * sample.spacing[axis] / wanted))
            for axis, wanted in zip(order, self.spacing, strict=True)
        )
        if math.prod(size) > _LARGEST:
            own = " x ".join(f"{length:g}" for length in sample.spacing)
            raise DataError(
                f"{sample.case_id}: its {sample.native_size} voxels of {own} mm would become "
                f"{size} voxels of {self.spacing} mm, more than {_LARGEST}; if its affine is not "
                "in mm, correct it, else choose a larger --spacing"
            )
        lacking = [max(0, least - n) for least, n in zip(self.least, size, strict=True)]
        return size, [(n // 2, n - n // 2) for n in lacking]


def find_body(image_CS: np.ndarray) -> np.ndarray:
    """Finds the patient's body in a volume with axes RAS+: bool (S).

    1. A voxel counts if in any channel it is above a tenth of the way from the 2nd to the 98th
       percentile. That is the threshold of FSL's BET (Smith 2002, doi:10.1002/hbm.10062), which is
       above air in a CT, windowed or not, and in an MR.
    2. The largest connected part counts, and parts of at least a twentieth of it, since arms and
       the other leg belong to the patient, and a couch is thinner.
    3. In every axial slice, regions that these enclose count, such as lungs.

    A couch that touches the body counts as body. If less than 2 % of the volume remains, the rule
    does not fit, and the whole volume is returned.
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
    """Gives the RAS+ axis that each stored axis becomes, and whether it is flipped."""
    if sample.header is None or len(sample.native_size) != 3:
        raise ValueError(
            f"{sample.case_id}: expected a volume with a NIfTI header, got {sample.native_size} "
            f"and header={sample.header}"
        )
    return nibabel.io_orientation(sample.header.get_best_affine())


def _turned(array_S: np.ndarray, turn: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(orientations.apply_orientation(array_S, turn))


def _resampled(image_CS: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resamples the last two axes together and then the first, as PyTorch antialiases in 2D "
    "only."""
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
