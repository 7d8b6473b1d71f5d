"""Makes batches of framed, cached and augmented cases; a batch does not depend on who loads it.

Shapes: B batch, C channels, S spatial axes (rows, columns; in 3D those of the grid), N attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from ..errors import DataError, shown
from .augmentation import Augment
from .cache import FrameCache, default_cache
from .cases import Case, Dataset
from .framing import Framing
from .patches import Patches, find_voxels

# The purposes of a seed: order, samples and patches draw different numbers from the same seed.
_ORDER, _SAMPLE, _PATCH = 1, 2, 3

# The index of a sample in an epoch, and the epoch; or the index of a case, and None for no epoch.
_Key = tuple[int, int | None]


@dataclass(frozen=True)
class Batch:
    """A batch of framed cases.

    Args:
        image_BCS: the images, float32.
        mask_BS: the labels: int64 in training, as losses need them; uint8 in evaluation, to save
            memory for whole volumes.
        attributes_BN: the indices of the attributes' values, int64; -1 means unknown.
        case_ids: the id of each sample's case.
        body_BS: bool, which pixels go to the experts; None if all do.
    """

    image_BCS: Tensor
    mask_BS: Tensor
    attributes_BN: Tensor
    case_ids: tuple[str, ...]
    body_BS: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the network, which is called inside `routing(attributes_BN)`."""
        return (self.image_BCS,) if self.body_BS is None else (self.image_BCS, self.body_BS)

    def to(self, device: torch.device | str) -> Batch:
        """Gives the same batch with its tensors on `device`."""
        image, mask, attributes = (
            tensor.to(device) for tensor in (self.image_BCS, self.mask_BS, self.attributes_BN)
        )
        body = None if self.body_BS is None else self.body_BS.to(device)
        return Batch(image, mask, attributes, self.case_ids, body)


class Frames(data.Dataset[Batch | DataError]):
    """The framed and cached cases of a split; (seed, epoch, index) decides their augmentation.

    Frames of cases without files stay in memory, since such data sets are small. Do not change a
    batch in place, since it may share that memory.

    Args:
        dataset: the data set.
        case_ids: the cases, in this order.
        framing: makes the frames.
        patches: which patches training draws from volumes; None: whole frames.
        augment: the kind of augmentation, as for `Framing.augmentation`. Only training batches are
            augmented.
        seed: the seed of order, patches and augmentation.
        cache: the folder that stores frames; None: `~/.cache/dmoe-frames`.

    Raises:
        DataError: an id is not in the data set, a case has no mask, or the cache folder cannot be
            written to.
        ValueError: the seed is negative, or the augmentation is not for such frames.

    Example:
        >>> from reference_models.data import PhantomSettings
        >>> from reference_models.data.framing import ImageFraming
        >>> from reference_models.data.phantom import Phantom
        >>> phantom = Phantom(PhantomSettings())
        >>> frames = Frames(phantom, [case.case_id for case in phantom.cases], ImageFraming(32))
        >>> batch = next(iter(train_batches(frames, batch_size=4, epoch=0)))
        >>> batch.image_BCS.shape, batch.mask_BS.shape, batch.attributes_BN.shape
        (torch.Size([4, 1, 32, 32]), torch.Size([4, 32, 32]), torch.Size([4, 1]))
    """

    def __init__(
        self,
        dataset: Dataset,
        case_ids: Sequence[str],
        framing: Framing,
        *,
        patches: Patches | None = None,
        augment: Augment = "none",
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        by_id = {case.case_id: case for case in dataset.cases}
        if unknown := [case_id for case_id in case_ids if case_id not in by_id]:
            raise DataError(
                f"{dataset.name} has no case {unknown[0]} ({len(unknown)} ids without a case)"
            )
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more")
        self.dataset = dataset
        self.cases = tuple(by_id[case_id] for case_id in case_ids)
        if bare := [case.case_id for case in self.cases if not case.labelled]:
            raise DataError(
                f"{shown(bare)}: no mask, so that these cases cannot be trained or validated on."
            )
        self.framing = framing
        self.patches = patches
        self.seed = seed
        self._augmentation = framing.augmentation(augment)
        stored = any(case.files for case in self.cases)
        self._cache = FrameCache(cache or default_cache(), dataset, framing) if stored else None
        self._made: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """The number of samples in a training epoch."""
        return len(self.cases) * (self.patches.count if self.patches else 1)

    def __getitem__(self, key: _Key) -> Batch | DataError:
        """Gives the sample (index, epoch) as a batch of one; with epoch None, the unchanged case.

        A DataError is returned and not raised, since a worker would add its traceback to it.
        """
        index, epoch = key
        patches = None if epoch is None else self.patches
        case = self.cases[index // patches.count if patches else index]
        try:
            stored = self._stored(case)
        except DataError as error:
            return error
        # These are views of the file on disk, of which only the part of the patch is read.
        parts = {name: part for name, part in stored.items() if name in ("image", "mask", "body")}
        if patches and epoch is not None:
            voxels = {name: part for name, part in stored.items() if name not in parts}
            random = np.random.default_rng(self._drawn(_PATCH, epoch, index))
            x, y, z = patches.draw(tuple(parts["mask"].shape[1:]), voxels, random)
            parts = {name: part[:, x, y, z] for name, part in parts.items()}
        parts["image"] = parts["image"].float()
        if epoch is not None:
            parts = self._augmentation(parts, self._drawn(_SAMPLE, epoch, index))
            parts["mask"] = parts["mask"].to(torch.int64)
        return Batch(
            parts["image"][None],
            parts["mask"],
            torch.tensor([case.attributes], dtype=torch.int64),
            (case.case_id,),
            parts.get("body"),
        )

    def _drawn(self, purpose: int, epoch: int, index: int) -> int:
        """Draws the seed of one sample."""
        entropy = [self.seed, purpose, epoch, index]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _stored(self, case: Case) -> dict[str, Tensor]:
        """Gives the frame of a case, from the disk, from memory or newly made."""
        if case.files and self._cache:
            return self._cache.frame(case, self._framed)
        if case.case_id not in self._made:
            self._made[case.case_id] = self._framed(case)
        return self._made[case.case_id]

    def _framed(self, case: Case) -> dict[str, Tensor]:
        """Makes the frame of a case: image (C, S), mask and body (1, S), and for volumes the places
        of each label's voxels."""
        frame = self.framing.apply(self.dataset.load(case))
        if frame.mask_S is None:
            raise DataError(f"{case.case_id}: its mask was not read; look at {case.files}.")
        # float16 holds 8-bit and normalised intensities to a 2000th of them, but whole numbers,
        # such as those of an unscaled CT, only up to 2048.
        largest = max(frame.image_CS.max(), -frame.image_CS.min())
        image_CS = frame.image_CS.astype(np.float16 if largest <= 2048 else np.float32)
        kept = {"image": image_CS, "mask": frame.mask_S[None]}
        if frame.body_S is not None:
            kept["body"] = frame.body_S[None]
        if frame.mask_S.ndim == 3:
            kept |= find_voxels(frame.mask_S)
        return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in kept.items()}


def train_batches(
    frames: Frames,
    *,
    batch_size: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    first_batch: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Gives the shuffled batches of an epoch, or one rank's part of each.

    Args:
        frames: the training cases.
        batch_size: the size of the global batch, which is divided among the ranks.
        epoch: the number of the epoch, which decides order and augmentation.
        rank, world_size: this process's rank, and the number of processes.
        first_batch: the batch to begin with, to go on in the middle of an epoch.
        workers: number of processes that load; 0 loads in this process. The samples are the same.

    Raises:
        ValueError: `world_size` does not divide the batch size, there is no such rank or batch, or
            a batch has more samples than an epoch.
        DataError: a case cannot be read.
    """
    n_batches = batches_an_epoch(frames, batch_size)
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size, world_size, rank: got {batch_size}, {world_size} and {rank}, expected a "
            "batch_size that world_size divides, and a rank below world_size"
        )
    if not 0 <= first_batch <= n_batches:
        raise ValueError(f"first_batch: got {first_batch}, expected 0 to {n_batches}")
    order = np.random.default_rng([frames.seed, _ORDER, epoch]).permutation(len(frames)).tolist()
    part = batch_size // world_size
    starts = [b * batch_size + rank * part for b in range(first_batch, n_batches)]
    keys: list[list[_Key]] = [
        [(index, epoch) for index in order[start : start + part]] for start in starts
    ]
    return _loaded(frames, keys, workers)


def batches_an_epoch(frames: Frames, batch_size: int) -> int:
    """Counts the full batches of an epoch; an incomplete last batch is dropped.

    Raises:
        ValueError: a batch has more samples than an epoch.
    """
    if not 1 <= batch_size <= len(frames):
        raise ValueError(
            f"batch_size: got {batch_size}, expected 1 to {len(frames)}, the samples of an epoch"
        )
    return len(frames) // batch_size


def eval_batches(frames: Frames, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Gives every case once, in order, whole and not augmented; the last batch may be smaller.

    Volumes differ in size and come one at a time, whatever `batch_size` is.

    Raises:
        ValueError: the batch size is below 1.
        DataError: a case cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1 or more")
    if not frames.framing.one_size:
        batch_size = 1
    cases = range(len(frames.cases))
    keys: list[list[_Key]] = [
        [(index, None) for index in cases[start : start + batch_size]]
        for start in cases[::batch_size]
    ]
    return _loaded(frames, keys, workers)


def _loaded(frames: Frames, keys: Iterable[list[_Key]], workers: int) -> Iterator[Batch]:
    # The loader gets its own generator, since it would otherwise draw from torch's and change the
    # noise of a model.
    loader = data.DataLoader(
        frames,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collated,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _collated(samples: Sequence[Batch | DataError]) -> Batch | DataError:
    batches = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        batches.append(sample)
    if len(batches) == 1:  # such as a whole volume, which should not be copied
        return batches[0]
    bodies = [batch.body_BS for batch in batches if batch.body_BS is not None]
    return Batch(
        torch.cat([batch.image_BCS for batch in batches]),
        torch.cat([batch.mask_BS for batch in batches]),
        torch.cat([batch.attributes_BN for batch in batches]),
        tuple(case_id for batch in batches for case_id in batch.case_ids),
        torch.cat(bodies) if bodies else None,
    )
