"""Batches: framed and cached cases, augmented so that no sample depends on who loads it.

Shapes: B batch, C channels, S spatial axes (rows, columns), N attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from monai import transforms
from monai.data import get_track_meta, set_track_meta
from torch import Tensor
from torch.utils import data

from .cache import FrameCache, default_cache
from .cases import Case, DataError, Dataset
from .framing import Framing, Square

Augment = Literal["paper", "shift", "none"]
# What a seed is drawn for: order and samples get numbers of their own from one seed.
_ORDER, _SAMPLE = 1, 2

_Key = tuple[int, int | None]  # a case's index and the epoch, None where not augmented


@dataclass(frozen=True)
class Batch:
    """Framed cases side by side.

    Args:
        image_BCS: float32.
        mask_BS: int64 labels.
        attributes_BN: int64 indices, -1 where unknown.
        case_ids: one a sample.
        body_BS: bool, what the experts are to see; None where that is everything.
    """

    image_BCS: Tensor
    mask_BS: Tensor
    attributes_BN: Tensor
    case_ids: tuple[str, ...]
    body_BS: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network is called with, inside of `routing(attributes_BN)`."""
        return (self.image_BCS,) if self.body_BS is None else (self.image_BCS, self.body_BS)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        image, mask, attributes = (
            tensor.to(device) for tensor in (self.image_BCS, self.mask_BS, self.attributes_BN)
        )
        body = None if self.body_BS is None else self.body_BS.to(device)
        return Batch(image, mask, attributes, self.case_ids, body)


class Frames(data.Dataset[Batch | DataError]):
    """Cases of a split, framed and cached; augmented by (seed, epoch, index).

    Args:
        dataset: whose cases they are.
        case_ids: which, in this order.
        framing: to what the network sees.
        augment: "paper": half of the samples turned by a multiple of 90° and then flipped, a
            quarter rotated by up to 20°, a quarter left alone; "shift": all moved by up to a
            twelfth of the size along each axis, for images in one pose, the border repeated; or
            "none". Only training batches are augmented.
        seed: of order and augmentation.
        cache: folder of framed cases; None: `~/.cache/dmoe-frames`.

    Raises:
        DataError: an id is not in the data set, or the cache folder cannot be written to.
        ValueError: a negative seed.

    Example:
        >>> from reference_models.data import PhantomSettings
        >>> from reference_models.data.phantom import Phantom
        >>> phantom = Phantom(PhantomSettings())
        >>> frames = Frames(phantom, [case.case_id for case in phantom.cases], Square(32))
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
        augment: Augment = "none",
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        by_id = {case.case_id: case for case in dataset.cases}
        if unknown := [case_id for case_id in case_ids if case_id not in by_id]:
            raise DataError(f"{dataset.name} has no case {unknown[0]} ({len(unknown)} such ids)")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.dataset = dataset
        self.cases = tuple(by_id[case_id] for case_id in case_ids)
        self.framing = framing
        self.seed = seed
        self._augmentation = (
            _augmentation(augment, framing.size) if isinstance(framing, Square) else None
        )
        stored = any(case.files for case in self.cases)
        self._cache = FrameCache(cache or default_cache(), dataset, framing) if stored else None

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: _Key) -> Batch | DataError:
        """The sample at (index, epoch) as a batch of one; epoch None is not augmented.

        An error of the data is returned, since workers would dress it in their traceback.
        """
        index, epoch = key
        case = self.cases[index]
        try:
            frame = self._cache.frame(case, self._framed) if self._cache else self._framed(case)
        except DataError as error:
            return error
        pair = torch.from_numpy(frame.astype(np.float32))
        if self._augmentation is not None and epoch is not None:
            words = np.random.SeedSequence([self.seed, _SAMPLE, epoch, index]).generate_state(1)
            self._augmentation.set_random_state(int(words[0]))
            with _untracked():
                moved = self._augmentation({"image": pair[:-1], "mask": pair[-1:]})
            pair = torch.cat([moved["image"], moved["mask"]])
        return Batch(
            pair[None, :-1],
            pair[None, -1].round().to(torch.int64),
            torch.tensor([case.attributes], dtype=torch.int64),
            (case.case_id,),
        )

    def _framed(self, case: Case) -> np.ndarray:
        frame = self.framing.apply(self.dataset.load(case))
        assert frame.mask_S is not None  # unlabelled cases are in no split
        return np.concatenate([frame.image_CS, frame.mask_S[None]]).astype(np.float16)


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
    """One epoch's shuffled batches, or a rank's part of each.

    Args:
        frames: the training cases.
        batch_size: of the global batch; all ranks' parts together are what one process sees.
        epoch: gives another order and other augmentations; the same ones each time.
        rank, world_size: which part, of how many.
        first_batch: where to go on in mid-epoch; nothing before it is read.
        workers: processes that load; 0 loads in this one. The samples are the same.

    Raises:
        ValueError: the batch does not divide by `world_size`, there is no such rank or batch, or
            a batch has more samples than there are cases.
        DataError: a case cannot be read.
    """
    n_batches = batches_an_epoch(frames, batch_size)
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size must divide by world_size and rank be below it, got batch_size="
            f"{batch_size}, world_size={world_size}, rank={rank}"
        )
    if not 0 <= first_batch <= n_batches:
        raise ValueError(f"first_batch must lie in 0..{n_batches}, got {first_batch}")
    order = np.random.default_rng([frames.seed, _ORDER, epoch]).permutation(len(frames)).tolist()
    part = batch_size // world_size
    starts = [b * batch_size + rank * part for b in range(first_batch, n_batches)]
    keys: list[list[_Key]] = [
        [(index, epoch) for index in order[start : start + part]] for start in starts
    ]
    return _loaded(frames, keys, workers)


def batches_an_epoch(frames: Frames, batch_size: int) -> int:
    """Full batches in an epoch; the incomplete last one is dropped.

    Raises:
        ValueError: a batch has more samples than there are cases.
    """
    if not 1 <= batch_size <= len(frames):
        raise ValueError(f"batch_size must lie in 1..{len(frames)} (the cases), got {batch_size}")
    return len(frames) // batch_size


def eval_batches(frames: Frames, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every case once, in order and not augmented; the last batch may be smaller.

    Raises:
        ValueError: a batch size below 1.
        DataError: a case cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    keys: list[list[_Key]] = [
        [(index, None) for index in range(start, min(start + batch_size, len(frames)))]
        for start in range(0, len(frames), batch_size)
    ]
    return _loaded(frames, keys, workers)


def _loaded(frames: Frames, keys: Iterable[list[_Key]], workers: int) -> Iterator[Batch]:
    # A generator of its own, or the loader would draw from torch's and change a model's noise.
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
    return Batch(
        torch.cat([batch.image_BCS for batch in batches]),
        torch.cat([batch.mask_BS for batch in batches]),
        torch.cat([batch.attributes_BN for batch in batches]),
        tuple(case_id for batch in batches for case_id in batch.case_ids),
    )


@contextmanager
def _untracked() -> Iterator[None]:
    """Lets MONAI compute on plain tensors.

    Its own tensors, which remember what was done to them, take up to three times as long, and
    experts cannot take them.
    """
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def _augmentation(kind: Augment, size: int) -> transforms.Compose | None:
    """Acts on the frame, where the paper's code acts on the crop, and rotates images bilinearly."""
    keys = ("image", "mask")
    if kind == "none":
        return None
    if kind == "shift":
        return transforms.Compose(
            [
                transforms.BorderPadd(keys, size // 12, mode="edge"),
                transforms.RandSpatialCropd(keys, (size, size), random_size=False),
            ]
        )
    return transforms.OneOf(
        [
            transforms.Compose(
                [
                    transforms.RandRotate90d(keys, prob=1, max_k=4),  # 1 to 4 quarter turns
                    transforms.RandAxisFlipd(keys, prob=1),
                ]
            ),
            transforms.RandRotated(
                keys,
                range_x=math.radians(20),
                prob=1,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            transforms.Identityd(keys),
        ],
        weights=(0.5, 0.25, 0.25),
    )
