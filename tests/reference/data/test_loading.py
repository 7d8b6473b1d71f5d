"""Splits and batches: seeded, leak-free, the same for any number of workers or ranks."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rewrite
from monai.data import get_track_meta

from reference_models.data import PhantomSettings
from reference_models.data.cache import FrameCache
from reference_models.data.cases import Attribute, Case, Dataset, Sample
from reference_models.data.framing import ImageFraming
from reference_models.data.loading import Frames, batches_an_epoch, eval_batches, train_batches
from reference_models.data.phantom import Phantom
from reference_models.data.splits import absent_values, make_splits, read_splits, write_splits
from reference_models.errors import DataError

ROOT = Path(__file__).parents[3]


class Lesions(Dataset):
    """Cases of two images a subject, read from files that hold one number."""

    name = "lesions"
    classes = ("background", "lesion")
    regions = {"lesion": (1,)}  # noqa: RUF012
    attributes = (Attribute("sex", ("f", "m")), Attribute("site", ("a", "b", "c")))
    channels = 1

    def __init__(self, n=120, splits=None, files=()):
        self.loads = 0
        self.cases = tuple(
            Case(
                f"case{i:03}",
                f"lesion{i // 2}",
                (int(i // 2 % 4 == 0), i // 2 % 3 if i // 2 % 5 else -1),
                splits(i) if splits else None,
                files[i : i + 1],
                int(i // 2 % 4 == 0),
            )
            for i in range(n)
        )

    def load(self, case):
        self.loads += 1
        if case.files:
            with open(case.files[0], encoding="utf-8") as file:
                number = file.read()
            if not number.isdigit():
                raise DataError(f"{case.files[0]}: not a number")
        else:
            number = case.case_id[-3:]
        image = np.full((1, 20, 30), int(number), np.float32)
        return Sample(case.case_id, image, (image[0] > 0).astype(np.uint8), case.attributes, (1, 1))


def by_split(splits):
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def test_splits_are_seeded_stratified_and_grouped_by_subject():
    dataset = Lesions(600)
    splits = make_splits(dataset, 1)
    assert splits == make_splits(dataset, 1)
    assert splits != make_splits(dataset, 2)
    cases = {case.case_id: case for case in dataset.cases}
    parts = by_split(splits)
    assert sorted(sum(parts.values(), ())) == sorted(cases)
    subjects = {split: {cases[i].subject for i in ids} for split, ids in parts.items()}
    assert not subjects["train"] & (subjects["validation"] | subjects["test"])
    assert not subjects["validation"] & subjects["test"]
    assert len(parts["test"]) == pytest.approx(120, abs=2)
    assert len(parts["validation"]) == pytest.approx(48, abs=2)
    for stratum in (0, 1):
        count = {s: sum(cases[i].stratum == stratum for i in parts[s]) for s in parts}
        # Within one subject, which is two cases, of its share.
        assert abs(count["test"] - 0.2 * sum(count.values())) <= 2
        assert abs(count["validation"] - 0.1 * (count["train"] + count["validation"])) <= 2


def test_splits_do_not_depend_on_the_attributes_that_a_model_is_told():
    dataset, other = Lesions(), Lesions()
    other.attributes = other.attributes[1:]
    other.cases = [dataclasses.replace(c, attributes=c.attributes[1:]) for c in other.cases]
    assert make_splits(dataset, 0) == make_splits(other, 0)


def test_values_that_no_training_case_has_are_named():
    dataset = Lesions(30)
    train = [c.case_id for c in dataset.cases if c.attributes[1] != 2 and c.attributes[0] == 0]
    assert absent_values(dataset, train) == ["sex m", "site c"]
    assert absent_values(dataset, [case.case_id for case in dataset.cases]) == []


def test_splits_keep_the_data_sets_own_and_carve_validation_from_train():
    own = make_splits(Lesions(100, lambda i: "test" if i >= 80 else "train"), 0)
    assert own.test == tuple(f"case{i:03}" for i in range(80, 100))
    assert set(own.train) | set(own.validation) == {f"case{i:03}" for i in range(80)}
    assert len(own.validation) == 8
    three = ("validation",) * 10 + ("test",) * 10 + ("train",) * 10
    assert make_splits(Lesions(30, lambda i: three[i]), 0) == make_splits(
        Lesions(30, lambda i: three[i]), 0
    )
    assert make_splits(Lesions(30, lambda i: three[i]), 5).validation == tuple(
        f"case{i:03}" for i in range(10)
    )
    with pytest.raises(
        DataError, match="lesion40 lies in several splits: case080 in test, case081"
    ):
        make_splits(Lesions(100, lambda i: "test" if i == 80 else "train"), 0)
    with pytest.raises(DataError, match="1 subjects, which are too few: none is left for train"):
        make_splits(Lesions(2), 0)


def test_a_splits_file_comes_back_and_a_wrong_one_says_why(tmp_path):
    dataset = Lesions()
    splits = make_splits(dataset, 3)
    path = tmp_path / "splits.json"
    write_splits(path, splits)
    assert read_splits(path, dataset) == splits
    good = json.loads(path.read_text(encoding="utf-8"))
    for change, words in (
        ({"dataset": "fairseg"}, "splits of fairseg, but the data set is lesions"),
        ({"test": ["case999"]}, "case999: not in the data set"),
        ({"test": [*good["test"], good["train"][0]]}, "named more than once"),
        ({"test": [*good["test"], good["train"][0]], "train": good["train"][1:]}, "several splits"),
        ({"validation": []}, "validation: without a case"),
        ({"train": 7}, "not a splits file"),
    ):
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(DataError, match=words) as raised:
            read_splits(path, dataset)
        assert str(path) in str(raised.value)
    for content in ("{", json.dumps([1]), json.dumps({"train": []})):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="not a splits file"):
            read_splits(path, dataset)
    with pytest.raises(DataError, match="nowhere"):
        read_splits(tmp_path / "nowhere.json", dataset)


def phantom_frames(**options):
    phantom = Phantom(PhantomSettings(cases=22, test_cases_per_group=1, image_size=32))
    ids = [case.case_id for case in phantom.cases if case.split == "train"]
    return Frames(phantom, ids, ImageFraming(32), augment="paper", **options)


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return bool(pairs) and all(
        torch.equal(a.image_BCS, b.image_BCS)
        and torch.equal(a.mask_BS, b.mask_BS)
        and torch.equal(a.attributes_BN, b.attributes_BN)
        and a.case_ids == b.case_ids
        for a, b in pairs
    )


def test_samples_depend_on_seed_and_epoch_alone():
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = list(train_batches(phantom_frames(), batch_size=4, epoch=3))
    assert len(whole) == batches_an_epoch(phantom_frames(), 4) == 5
    assert same(whole, train_batches(phantom_frames(), batch_size=4, epoch=3, workers=2))
    assert not same(whole, train_batches(phantom_frames(), batch_size=4, epoch=4))
    assert not same(whole, train_batches(phantom_frames(seed=1), batch_size=4, epoch=3))
    ids = [case_id for batch in whole for case_id in batch.case_ids]
    assert len(set(ids)) == 20
    assert (np.random.get_state()[1] == np_state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_ranks_see_together_what_one_process_sees():
    whole = list(train_batches(phantom_frames(), batch_size=4, epoch=0))
    ranks = [
        list(train_batches(phantom_frames(), batch_size=4, epoch=0, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.image_BCS, torch.cat([part.image_BCS for part in parts]))
        assert torch.equal(batch.mask_BS, torch.cat([part.mask_BS for part in parts]))
        assert batch.case_ids == parts[0].case_ids + parts[1].case_ids


def test_an_epoch_goes_on_in_the_middle_without_reading_what_came_before():
    ids = [f"case{i:03}" for i in range(20)]
    whole, frames = (Frames(Lesions(20), ids, ImageFraming(8), augment="paper") for _ in range(2))
    whole = list(train_batches(whole, batch_size=3, epoch=1))
    assert same(whole[4:], train_batches(frames, batch_size=3, epoch=1, first_batch=4))
    assert frames.dataset.loads == 6
    assert list(train_batches(frames, batch_size=3, epoch=1, first_batch=6)) == []


@pytest.mark.parametrize("augment", ["none", "paper", "shift"])
def test_made_cases_are_made_once_and_give_the_same_batches_ever_after(augment):
    def frames():
        # The first numbers stay whole in float16, the others need float32 and are kept as such.
        ids = [f"case{i:03}" for i in (3, 5, 6, 7, 8)]
        dataset = Lesions(20)
        made = dataset.load
        dataset.load = lambda case: dataclasses.replace(
            made(case), image_CS=made(case).image_CS ** (4 if case.case_id > "case006" else 1)
        )
        return Frames(dataset, ids, ImageFraming(24), augment=augment)

    kept = frames()
    for epoch in range(3):
        assert same(
            list(train_batches(frames(), batch_size=2, epoch=epoch)),
            train_batches(kept, batch_size=2, epoch=epoch),
        )
        assert same(list(eval_batches(frames(), batch_size=1)), eval_batches(kept, batch_size=1))
    assert kept.dataset.loads == 2 * 5  # two each, by the lambda above


def test_evaluation_sees_every_case_once_in_order_and_untouched():
    frames = phantom_frames()
    batches = list(eval_batches(frames, batch_size=5))
    assert [len(batch.case_ids) for batch in batches] == [5, 5, 5, 5, 2]
    assert [i for b in batches for i in b.case_ids] == [case.case_id for case in frames.cases]
    assert same(batches, eval_batches(frames, batch_size=5, workers=2))
    truth = frames.dataset.load(frames.cases[0])
    np.testing.assert_allclose(batches[0].image_BCS[0], truth.image_CS, atol=1e-3)
    assert (batches[0].mask_BS[0].numpy() == truth.mask_S).all()
    assert batches[0].attributes_BN.dtype == torch.int64


def test_augmentation_is_the_papers_and_moves_image_and_mask_together():
    frames = Frames(Lesions(2), ["case001"], ImageFraming(24), augment="paper")
    # An image that is its own mask, without symmetry, in the third class: half of it, as mixing
    # neighbours would make at the edges, is the second, and must never be there.
    mark = np.zeros((24, 24), np.uint8)
    mark[8:17, 9:12], mark[8:10, 12:16] = 1, 1
    frames.dataset.load = lambda case: Sample(
        case.case_id, mark[None].astype(np.float32), 2 * mark, case.attributes, (1, 1)
    )
    kinds = {"left alone": 0, "turned and flipped": 0, "rotated": 0}
    assert get_track_meta()  # MONAI's setting, which others may rely on
    turned = [np.flip(np.rot90(mark, k), axis) for k in range(4) for axis in (0, 1)]
    for epoch in range(400):
        sample = frames[0, epoch]
        image, mask = sample.image_BCS[0, 0].numpy(), sample.mask_BS[0].numpy()
        assert set(np.unique(mask)) == {0, 2}
        assert type(sample.image_BCS) is torch.Tensor
        mask = mask // 2
        assert (mask == (image >= 0.5)).mean() > 0.97
        if (mask == mark).all() and (image == mark).all():
            kinds["left alone"] += 1
        elif any((mask == other).all() for other in turned) and set(np.unique(image)) == {0, 1}:
            kinds["turned and flipped"] += 1
        else:
            kinds["rotated"] += 1
            y, x = np.nonzero(mask)
            assert np.hypot(y.mean() - 11.5, x.mean() - 11.5) < 3  # turned about the middle
    assert get_track_meta()
    # 200, 100 and 100 expected; three standard deviations are 30 and 26.
    assert abs(kinds["turned and flipped"] - 200) < 30
    assert abs(kinds["rotated"] - 100) < 26


def test_wrong_numbers_are_refused_before_anything_is_read():
    frames = phantom_frames()
    for options, words in (
        ({"batch_size": 23}, "got 23, expected 1 to 22"),
        ({"batch_size": 0}, "got 0, expected 1 to 22"),
        ({"batch_size": 5, "world_size": 2}, "divide"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "got 4, 2 and 2, expected"),
        ({"batch_size": 4, "first_batch": 6}, "got 6, expected 0 to 5"),
    ):
        with pytest.raises(ValueError, match=words):
            train_batches(frames, epoch=0, **options)
    with pytest.raises(DataError, match="no case nobody"):
        Frames(frames.dataset, ["nobody"], ImageFraming(8))


def lesion_files(tmp_path, n=6):
    files = tuple(str(tmp_path / f"{i}.txt") for i in range(n))
    for i, name in enumerate(files):
        Path(name).write_text(str(i + 1), encoding="utf-8")
    return files


def test_what_was_read_once_is_cached_for_workers_and_later_runs(tmp_path):
    files = lesion_files(tmp_path)
    cache = tmp_path / "cache"

    def frames(size=8):
        ids = [f"case{i:03}" for i in range(6)]
        return Frames(Lesions(6, files=files), ids, ImageFraming(size), cache=cache)

    first = list(eval_batches(frames(), batch_size=6, workers=2))
    assert len(list(cache.iterdir())) == 6
    later = frames()
    assert same(first, eval_batches(later, batch_size=6))
    assert later.dataset.loads == 0
    # Another framing, a changed file and a torn cache file are read anew.
    bigger = frames(size=10)
    assert next(iter(eval_batches(bigger, batch_size=6))).image_BCS.shape == (6, 1, 10, 10)
    assert bigger.dataset.loads == 6
    rewrite(files[2], "9")
    changed = frames()
    (batch,) = eval_batches(changed, batch_size=6)
    assert changed.dataset.loads == 1
    assert batch.image_BCS[2].max() == 9
    # So is one of the same size and, as an archive may set it, the same time.
    if sys.platform != "win32":  # which keeps no time of a change
        times = os.stat(files[2]).st_atime_ns, os.stat(files[2]).st_mtime_ns
        rewrite(files[2], "8")
        os.utime(files[2], ns=times)
        (batch,) = eval_batches(frames(), batch_size=6)
        assert batch.image_BCS[2].max() == 8
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    torn = frames()
    assert same([batch], eval_batches(torn, batch_size=6))
    assert torn.dataset.loads == 6


def test_a_cache_folder_that_cannot_be_made_is_an_error_of_the_settings(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="choose another"):
        FrameCache(tmp_path / "file" / "cache", Lesions(1), ImageFraming(8))


def test_a_full_cache_is_an_error_that_says_so(tmp_path):
    resource = pytest.importorskip("resource", reason="no limit to the size of files here")
    files = lesion_files(tmp_path, n=1)
    frames = Frames(
        Lesions(1, files=files), ["case000"], ImageFraming(99), cache=tmp_path / "cache"
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            DataError, match=r"cache: a frame cannot .*too large.*; make room, or choose another"
        ):
            next(eval_batches(frames, batch_size=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [*(tmp_path / "cache").iterdir()] == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named_by_workers_too(tmp_path, workers):
    files = lesion_files(tmp_path)
    Path(files[4]).write_text("x", encoding="utf-8")
    frames = Frames(
        Lesions(6, files=files), ["case003", "case004"], ImageFraming(8), cache=tmp_path / "cache"
    )
    with pytest.raises(DataError) as raised:
        list(eval_batches(frames, batch_size=1, workers=workers))
    assert str(raised.value) == f"{files[4]}: not a number"
    Path(files[4]).unlink()
    with pytest.raises(DataError, match=r"4\.txt"):
        list(eval_batches(frames, batch_size=1, workers=workers))


def test_workers_may_be_spawned():
    code = (
        "import torch\n"
        "import sys; sys.path[:0] = ['tests', 'tests/reference/data']\n"
        "from test_loading import phantom_frames, same, train_batches\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        "    runs = [train_batches(phantom_frames(), batch_size=11, epoch=0, workers=w)"
        " for w in (0, 1)]\n"
        "    print(same(*runs))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "True", done.stderr
