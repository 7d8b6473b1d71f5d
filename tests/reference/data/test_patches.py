"""Patches of volumes: where they lie, how often on foreground, and what of a disk they read."""

import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import rewrite

from reference_models.data import DataSettings
from reference_models.data.cases import Attribute, Case, Dataset, Sample
from reference_models.data.grid import VolumeFraming
from reference_models.data.loading import Frames, batches_an_epoch, eval_batches, train_batches
from reference_models.data.patches import Patches, find_voxels
from reference_models.data.splits import Splits
from reference_models.errors import DataError, RunError
from reference_models.recipes.presets import PRESETS
from reference_models.training.cohort import Cohort


class Volumes(Dataset):
    """Volumes of two channels, the first of which tells the voxel's place, and of many sizes."""

    name = "nifti"
    classes = ("background", "organ", "tumour")
    regions = {"organ": (1, 2), "tumour": (2,)}  # noqa: RUF012
    attributes = (Attribute("stage", ("T1", "T2")),)
    channels, axes, unit = 2, 3, "mm"
    spacing = (1.0, 1.0, 1.0)

    def __init__(self, n=4, files=(), size=None):
        self.loads, self.size = 0, size
        self.cases = tuple(
            Case(f"case{i}", f"subject{i}", (i % 2,), files=files[i : i + 1]) for i in range(n)
        )

    def load(self, case):
        self.loads += 1
        number = int(case.case_id[4:])
        factor = float(Path(case.files[0]).read_text(encoding="utf-8")) if case.files else 1
        size = self.size or (10 + number, 12, 9 + 2 * number)
        place_S = np.arange(np.prod(size), dtype=np.float32).reshape(size) / np.prod(size)
        mask_S = np.zeros(size, np.uint8)
        mask_S[2:6, 3:8, 2:7] = 1
        mask_S[3, 4, 5] = 2
        header = nibabel.Nifti1Image(mask_S, np.eye(4)).header
        image_CS = np.stack([factor * place_S, mask_S.astype(np.float32)])
        return Sample(case.case_id, image_CS, mask_S, case.attributes, (1, 1, 1), header)


GRID = VolumeFraming((1.0, 1.0, 1.0), (8, 8, 8), body=True)


def patches_of(dataset=None, framing=GRID, augment="paper", **options):
    dataset = dataset or Volumes()
    patches = options.pop("patches", Patches((8, 8, 8), count=3))
    ids = [case.case_id for case in dataset.cases]
    return Frames(dataset, ids, framing, patches=patches, augment=augment, **options)


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return bool(pairs) and all(
        torch.equal(a.image_BCS, b.image_BCS)
        and torch.equal(a.mask_BS, b.mask_BS)
        and torch.equal(a.body_BS, b.body_BS)
        and torch.equal(a.attributes_BN, b.attributes_BN)
        and a.case_ids == b.case_ids
        for a, b in pairs
    )


def start_of(window):
    return tuple(side.start for side in window)


def test_patches_lie_everywhere_and_none_beyond_the_volume():
    patches, random = Patches((3, 2, 4), foreground=0.5), np.random.default_rng(0)
    voxels = {"1": torch.tensor([[1, 1, 1]])}
    windows = [patches.draw((5, 4, 6), voxels, random) for _ in range(3000)]
    assert {start_of(window) for window in windows} == {*itertools.product(*map(range, (3, 3, 3)))}
    assert {tuple(side.stop - side.start for side in window) for window in windows} == {(3, 2, 4)}
    covered = np.zeros((5, 4, 6), bool)
    for window in windows:
        covered[window] = True
    assert covered.all()
    assert patches.draw((3, 2, 4), {}, random) == (slice(0, 3), slice(0, 2), slice(0, 4))
    with pytest.raises(
        ValueError,
        match=r"volume: got \(3, 1, 4\) voxels, expected at least a patch of \(3, 2, 4\)",
    ):
        patches.draw((3, 1, 4), {}, random)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_patches_as_asked_for_are_laid_around_the_foreground(share):
    # By chance a patch of 2³ in 11³ holds the one voxel in 8 of 1000 cases.
    patches, random = Patches((2, 2, 2), foreground=share), np.random.default_rng(0)
    voxels = {"1": torch.tensor([[4, 0, 10]])}
    draws = 3000
    held = Counter()
    for _ in range(draws):
        window = patches.draw((11, 11, 11), voxels, random)
        inside = [s.start <= v < s.stop for s, v in zip(window, (4, 0, 10), strict=True)]
        held[start_of(window) if all(inside) else None] += 1
    expected = share + (1 - share) * 2 / 1000
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert abs(draws - held.pop(None, 0) - draws * expected) <= 4 * deviation
    if share:  # anywhere in the patch, as far as the volume reaches
        assert {*held} == {(3, 0, 9), (4, 0, 9)}
        assert min(held.values()) > 0.4 * sum(held.values())
    # Without any foreground they lie anywhere.
    assert len({start_of(patches.draw((11, 11, 11), {}, random)) for _ in range(200)}) > 150


def test_a_small_label_is_looked_at_as_often_as_a_large_one():
    mask_S = np.zeros((20, 20, 20), np.uint8)
    mask_S[:8], mask_S[19, 19, 19] = 1, 7
    found = {name: torch.from_numpy(voxels) for name, voxels in find_voxels(mask_S).items()}
    patches, random = Patches((2, 2, 2), foreground=1), np.random.default_rng(0)
    small = sum(patches.draw((20, 20, 20), found, random)[0].stop == 20 for _ in range(1000))
    assert abs(small - 500) < 4 * np.sqrt(250)


def test_the_voxels_of_a_label_are_all_or_ten_thousand_drawn_from_all_of_them():
    random = np.random.default_rng(0)
    mask_S = random.integers(0, 4, (5, 6, 7)).astype(np.uint8)
    mask_S[mask_S == 2] = 0
    found = find_voxels(mask_S)
    assert {*found} == {"1", "3"}
    for name, voxels_V3 in found.items():
        np.testing.assert_array_equal(voxels_V3, np.argwhere(mask_S == int(name)))
    large_S = np.zeros((60, 50, 40), np.uint8)
    large_S[5:55] = 1
    (voxels_V3,) = find_voxels(large_S).values()
    assert len(voxels_V3) == len({tuple(voxel) for voxel in voxels_V3}) == 10_000
    assert large_S[tuple(voxels_V3.T)].all()
    shares = np.bincount(voxels_V3[:, 0], minlength=60) / 10_000
    np.testing.assert_allclose(shares[5:55], 1 / 50, atol=4 * np.sqrt(1 / 50 / 10_000))
    np.testing.assert_array_equal(find_voxels(large_S)["1"], voxels_V3)
    assert find_voxels(np.zeros((2, 2, 2), np.uint8)) == {}


def test_an_epoch_has_so_many_patches_of_each_volume_and_the_next_has_others():
    frames = patches_of(augment="none")
    assert len(frames) == 12
    assert batches_an_epoch(frames, 4) == 3
    epochs = [list(train_batches(frames, batch_size=4, epoch=epoch)) for epoch in range(2)]
    for batches in epochs:
        counted = Counter(case_id for batch in batches for case_id in batch.case_ids)
        assert counted == {f"case{i}": 3 for i in range(4)}
        assert all(batch.image_BCS.shape == (4, 2, 8, 8, 8) for batch in batches)
        assert all(batch.mask_BS.dtype == torch.int64 for batch in batches)
    places = [
        {(case_id, place) for b in batches
         for case_id, place in zip(b.case_ids, b.image_BCS[:, 0, 0, 0, 0].tolist(), strict=True)}
        for batches in epochs
    ]  # fmt: skip
    assert len(places[0]) > 9
    assert len(places[0] & places[1]) < 6
    with pytest.raises(ValueError, match=r"got 13, expected 1 to 12"):
        batches_an_epoch(frames, 13)


def test_a_patch_depends_on_seed_epoch_and_index_alone(tmp_path):
    whole = list(train_batches(patches_of(), batch_size=4, epoch=2))
    assert len(whole) == 3
    for workers in (0, 2):
        cached = Volumes(files=volume_files(tmp_path))
        for _ in range(2):  # made, and then read
            frames = patches_of(cached, cache=tmp_path / "cache")
            batches = train_batches(frames, batch_size=4, epoch=2, workers=workers)
            assert same(whole, batches)
    assert same(whole[1:], train_batches(patches_of(), batch_size=4, epoch=2, first_batch=1))
    ranks = [
        list(train_batches(patches_of(), batch_size=4, epoch=2, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name in ("image_BCS", "mask_BS", "body_BS", "attributes_BN"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(getattr(batch, name), together)
        assert batch.case_ids == parts[0].case_ids + parts[1].case_ids
    assert not same(whole, train_batches(patches_of(seed=1), batch_size=4, epoch=2))
    assert not same(whole, train_batches(patches_of(), batch_size=4, epoch=3))


def test_image_mask_and_body_are_cut_and_flipped_alike_and_intensities_moved_a_little():
    dataset = Volumes(1)
    frame = GRID.apply(dataset.load(dataset.cases[0]))
    assert 0 < frame.body_S.mean() < 1
    image_CS = np.float32(np.float16(frame.image_CS))
    plain, changed = patches_of(dataset, augment="none"), patches_of(dataset)
    flips, factors, shifts = Counter(), [], []
    for epoch in range(80):
        batch = plain[0, epoch]
        corner = batch.image_BCS[0, 0, 0, 0, 0].item()
        (start,) = np.argwhere(image_CS[0] == corner)
        x, y, z = (slice(low, low + 8) for low in start)
        np.testing.assert_array_equal(batch.image_BCS[0], image_CS[:, x, y, z])
        np.testing.assert_array_equal(batch.mask_BS[0], frame.mask_S[x, y, z])
        np.testing.assert_array_equal(batch.body_BS[0], frame.body_S[x, y, z])
        other = changed[0, epoch]
        assert type(other.image_BCS) is torch.Tensor
        assert other.mask_BS.dtype == torch.int64
        assert other.body_BS.dtype == torch.bool
        first = other.image_BCS[0, 0].numpy()
        # The place rises along each axis, unless that is flipped.
        steps = [first[1, 0, 0] - first[0, 0, 0], first[0, 1, 0] - first[0, 0, 0],
                 first[0, 0, 1] - first[0, 0, 0]]  # fmt: skip
        axes = tuple(axis for axis, step in enumerate(steps) if step < 0)
        flips[axes] += 1
        np.testing.assert_array_equal(other.mask_BS[0], np.flip(batch.mask_BS[0].numpy(), axes))
        np.testing.assert_array_equal(other.body_BS[0], np.flip(batch.body_BS[0].numpy(), axes))
        original = np.flip(batch.image_BCS[0, 0].numpy(), axes)
        factor, shift = np.polyfit(original.ravel(), first.ravel(), 1)
        np.testing.assert_allclose(first, factor * original + shift, atol=1e-5)
        factors.append(factor)
        shifts.append(shift)
    assert len(flips) == 8
    for values, middle in ((factors, 1), (shifts, 0)):
        assert middle - 0.1001 < min(values) < middle - 0.08
        assert middle + 0.08 < max(values) < middle + 0.1001
    with pytest.raises(ValueError, match="augment: got shift, expected paper or none for volumes"):
        patches_of(augment="shift")


def test_evaluation_sees_each_volume_once_whole_and_alone():
    dataset = Volumes()
    for frames in (patches_of(dataset), patches_of(dataset, patches=None)):
        batches = list(eval_batches(frames, batch_size=3))
        assert [batch.case_ids for batch in batches] == [(f"case{i}",) for i in range(4)]
        assert same(batches, eval_batches(frames, batch_size=1, workers=1))
        for batch, case in zip(batches, dataset.cases, strict=True):
            frame = GRID.apply(dataset.load(case))
            np.testing.assert_allclose(batch.image_BCS[0], frame.image_CS, atol=1e-3)
            np.testing.assert_array_equal(batch.mask_BS[0], frame.mask_S)
            np.testing.assert_array_equal(batch.body_BS[0], frame.body_S)
            assert batch.image_BCS.dtype == torch.float32
            assert batch.mask_BS.dtype == torch.uint8
            assert len(batch.inputs) == 2
    without = patches_of(dataset, dataclasses.replace(GRID, body=False))
    assert next(iter(train_batches(without, batch_size=4, epoch=0))).body_BS is None


def volume_files(folder, n=4):
    files = tuple(str(folder / f"{i}.txt") for i in range(n))
    for name in files:
        Path(name).write_text("1", encoding="utf-8")
    return files


def test_a_cached_volume_is_made_anew_when_it_is_damaged_or_made_from_something_else(tmp_path):
    files = volume_files(tmp_path)
    cache = tmp_path / "cache"

    def loads(framing=GRID, made_with=()):
        dataset = Volumes(files=files)
        dataset.made_with = made_with
        frames = patches_of(dataset, framing, cache=cache)
        batches = list(train_batches(frames, batch_size=4, epoch=0))
        return dataset.loads, batches

    first, batches = loads()
    assert first == 4  # of 12 patches
    assert loads()[0] == 0
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    again, anew = loads()
    assert again == 4
    assert same(batches, anew)
    assert loads()[0] == 0
    assert loads(made_with=(-175.0, 250.0))[0] == 4
    assert loads(made_with=(-160.0, 240.0))[0] == 4
    assert loads(VolumeFraming((1.0, 1.0, 1.1), (8, 8, 8), body=True))[0] == 4
    assert loads(VolumeFraming((1.0, 1.0, 1.0), (8, 8, 10), body=True))[0] == 4
    assert loads(VolumeFraming((1.0, 1.0, 1.0), (8, 8, 8)))[0] == 4
    rewrite(files[2], "3")
    changed, moved = loads()
    assert changed == 1
    assert not same(batches, moved)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's memory counts")
def test_a_patch_of_a_large_cached_volume_reads_little_of_it(tmp_path):
    dataset = Volumes(1, volume_files(tmp_path), size=(600, 96, 96))
    frames = patches_of(dataset, augment="none", cache=tmp_path / "cache")
    frames[0, 0]  # made
    (stored,) = (tmp_path / "cache").iterdir()
    assert stored.stat().st_size > 33e6
    mapped, frame = [], frames._cache.frame
    frames._cache.frame = lambda *given: mapped.append(frame(*given)) or mapped[-1]

    def resident():
        """Bytes of the stored file that this process has in memory, whatever else it has there."""
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
        sizes = re.findall(rf"{re.escape(str(stored))}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
        return 1024 * sum(map(int, sizes))

    assert frames[0, 1].image_BCS.shape == (1, 2, 8, 8, 8)
    assert 0 < resident() < 10e6  # a system may map up to 2 MiB around what is read
    mapped[0]["image"].sum()
    assert resident() > 22e6  # what reading all of the image shows


@pytest.mark.parametrize("largest", [1.0, 2000.0, 3071.0, 65535.0])
def test_intensities_are_kept_to_a_thousandth_or_a_whole_number(largest):
    dataset = Volumes(1)
    load = dataset.load

    def whole(case):
        sample = load(case)
        image_CS = np.round(sample.image_CS * largest) if largest > 1 else sample.image_CS
        return dataclasses.replace(sample, image_CS=image_CS)

    dataset.load = whole
    (batch,) = eval_batches(patches_of(dataset, patches=None), batch_size=1)
    expected = GRID.apply(whole(dataset.cases[0])).image_CS
    np.testing.assert_allclose(batch.image_BCS[0], expected, atol=1e-3 if largest == 1 else 0)


def test_a_volume_without_a_mask_is_in_no_training_or_validation():
    dataset = Volumes()
    dataset.cases = [*dataset.cases[:3], dataclasses.replace(dataset.cases[3], labelled=False)]
    with pytest.raises(DataError, match=r"case3: no mask"):
        patches_of(dataset)


def test_a_run_trains_on_patches_and_validates_on_volumes(tmp_path):
    recipe = PRESETS["small3d"]
    framing = dataclasses.replace(
        recipe.framing, spacing=(1.0, 1.5, 2.0), patch=(32, 64, 32), patches=2, foreground=0.5
    )
    recipe = dataclasses.replace(
        recipe, framing=framing, batch_size=4, seed=3, data=DataSettings("folder", cache=tmp_path)
    )
    dataset = Volumes()
    splits = Splits("nifti", 0, ("case0", "case1"), ("case2",), ("case3",))
    cohort = Cohort(recipe, dataset, splits, frozenset())
    assert recipe.framing.build() == VolumeFraming((1.0, 1.5, 2.0), (32, 64, 32), body=False)
    training = cohort.frames(cohort.train, training=True)
    assert training.patches == Patches((32, 64, 32), 2, 0.5)
    assert len(training) == 4
    (batch,) = train_batches(training, batch_size=4, epoch=0)
    assert batch.image_BCS.shape == (4, 2, 32, 64, 32)
    validation = cohort.frames(cohort.validation)
    assert validation.patches is None
    assert len(validation) == 1


def test_a_batch_may_hold_as_many_patches_as_an_epoch_has(tmp_path, monkeypatch):
    dataset = Volumes()
    splits = Splits("nifti", 0, ("case0", "case1"), ("case2",), ("case3",))
    monkeypatch.setattr("reference_models.training.cohort.choose_splits", lambda *_: splits)
    recipe = PRESETS["small3d"]
    for count, fits in ((2, True), (1, False)):
        framing = dataclasses.replace(recipe.framing, patches=count)
        chosen = dataclasses.replace(recipe, framing=framing, batch_size=4)
        if fits:
            assert Cohort.of(chosen, dataset, resume=False).train == ("case0", "case1")
        else:
            with pytest.raises(
                RunError, match="got 4, but there are only 2 training cases with 1 p"
            ):
                Cohort.of(chosen, dataset, resume=False)
