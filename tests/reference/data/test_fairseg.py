"""FairSeg's files are read as they stand, and what is wrong with one is said."""

import re

import numpy as np
import pytest
from harness.checks import checked
from harness.image_folders import disc, fairseg_folder, fundus, write_npz
from helpers import needs_links

from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import UNKNOWN


def header(shape):
    """An array's, without its numbers."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float32, np.uint16])
def test_fairseg_masks_mean_the_same_in_any_type(tmp_path, dtype):
    dataset = open_dataset(fairseg_folder(tmp_path, disc_cup_mask=disc().astype(dtype)))
    sample = dataset.load(dataset.cases[0])
    np.testing.assert_array_equal(sample.mask_S, -disc())
    assert sample.mask_S.dtype == np.uint8
    assert sample.image_CS.shape == (3, 24, 31)
    np.testing.assert_array_equal(sample.image_CS[2], fundus().astype(np.float32) / 255)
    assert dataset.regions["disc"] == (1, 2)


def test_fairseg_reads_older_names_lists_in_a_folder_and_the_patient(tmp_path):
    (tmp_path / "Training").mkdir()
    (tmp_path / "lists" / "final").mkdir(parents=True)
    older = {"slo_fundus": None, "disc_cup_mask": None, "ethnicity": None, "race": None}
    write_npz(
        tmp_path / "Training",
        1,
        **older,
        fundus_slo=fundus(),
        disc_cup=disc(),
        hispanic=0,
        pid="p7",
    )
    write_npz(tmp_path, 2, ethnicity=-1)
    (tmp_path / "lists" / "final" / "train.txt").write_text("data_00001.npz\n", encoding="utf-8")
    settings = DataSettings("fairseg", tmp_path, ("ethnicity", "race"))
    (tmp_path / "lists" / "final" / "test.txt").write_text("data_00002.npz\n", encoding="utf-8")
    case, test = open_dataset(settings).cases
    assert test.attributes == (UNKNOWN, 2)
    assert (case.case_id, case.subject, case.split) == ("data_00001", "p7", "train")
    assert case.attributes == (0, UNKNOWN)


@pytest.mark.parametrize(("factor", "unit"), [(1, "years"), (365, "days")])
def test_fairseg_ages_may_stand_in_years_or_in_days(tmp_path, factor, unit):
    fairseg_folder(tmp_path, age=61.0 * factor)
    write_npz(tmp_path, 1, age=59.0 * factor)
    write_npz(tmp_path, 2, age=-1)
    dataset = open_dataset(DataSettings("fairseg", tmp_path, ("age",)))
    assert [case.attributes[0] for case in dataset.cases[:4]] == [0, UNKNOWN, 1, 1]
    assert f"age: the files have it in {unit}" in checked(DataSettings("fairseg", tmp_path))[1]


BAD_NPZ = {
    "object mask": ({"disc_cup_mask": np.array([None, 1], object)}, "Python objects"),
    "object attribute": ({"race": np.array("White", object)}, "numpy.savez_compressed"),
    "label out of range": ({"disc_cup_mask": disc() * 2}, r"got also \[-4\]"),
    "empty mask": ({"disc_cup_mask": disc() * 0}, "only background"),
    "sizes differ": ({"disc_cup_mask": disc()[:-1]}, r"\(23, 31\)"),
    "no mask": ({"disc_cup_mask": None}, "expected disc_cup_mask or disc_cup in this file"),
    "no image": ({"slo_fundus": None}, "expected slo_fundus"),
    "nan": ({"slo_fundus": np.full((24, 31), np.nan)}, "intensities"),
    "already scaled": ({"slo_fundus": fundus() / 255.0}, "intensities"),
    "race 7": ({"race": 7}, "race is 7, expected 0..2"),
    "text": ({"gender": "F"}, "expected one number as gender"),
    "age in days": ({"age": 20000}, "is in days"),
    "two patients": ({"pid": [1, 2]}, r"expected one value as pid, got int64 \(2,\)"),
    "no array": ({"race": b"2"}, "The entry race holds bytes, but a NumPy array was expected."),
    "torn header": ({"race": header("(1")}, "race cannot be read"),
    "claims terabytes": (
        {"slo_fundus": header("(100000000000000,)}")},
        "slo_fundus cannot be read",
    ),
}


@pytest.mark.parametrize("fault", BAD_NPZ)
def test_check_names_a_bad_npz_and_says_what_is_wrong(tmp_path, fault):
    settings = fairseg_folder(tmp_path)
    assert checked(settings)[0] == 0
    members, words = BAD_NPZ[fault]
    path = write_npz(tmp_path, 5, **members)
    code, text = checked(settings)
    assert code == 1
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert re.search(words, text)


@needs_links
def test_fairseg_files_are_found_whatever_the_lists_and_folders_are_like(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
    fairseg_folder(elsewhere)
    (elsewhere / "data_00001.npz").rename(elsewhere / "data_00001.NPZ")
    (elsewhere / "data_00002.npz").rename(elsewhere / "data.v2.npz")
    (elsewhere / "._data_00003.npz").write_bytes(b"of macOS")
    (root / "Training").symlink_to(elsewhere)
    names = ["Training\\data_00001.npz", "data.v2", *(f"data_{i:05}.npz" for i in range(3, 13))]
    (root / "Train.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(names[:10]).encode())
    (root / "TEST.TXT").write_text("\n".join(names[10:]), encoding="utf-8")
    (elsewhere / "train.txt").unlink()
    (elsewhere / "test.txt").unlink()
    cases = open_dataset(DataSettings("fairseg", root)).cases
    assert [case.split for case in cases] == ["train"] * 10 + ["test"] * 2
    assert [case.case_id for case in cases[:3]] == ["data_00001", "data.v2", "data_00003"]
    (root / "Train.txt").unlink()
    (root / "TEST.TXT").unlink()
    assert len(open_dataset(DataSettings("fairseg", root)).cases) == 12


@pytest.mark.parametrize("pid", [-1, np.nan, ""])
def test_patients_who_are_not_known_are_not_one_patient(tmp_path, pid):
    settings = fairseg_folder(tmp_path, pid=pid)
    assert len({case.subject for case in open_dataset(settings).cases}) == 12
    assert checked(settings)[0] == 0
