"""`check` names all faults and oddities of a data set, and counts cases as training uses them."""

import dataclasses

import numpy as np
import pytest
from harness.checks import checked
from harness.image_folders import (
    disc,
    fairseg_folder,
    fundus,
    ham_folder,
    write_npz,
)

from reference_models.data import open_dataset
from reference_models.data.splits import make_splits, write_splits
from reference_models.errors import DataError


def test_an_empty_list_or_table_is_an_error_and_a_missing_one_is_said(tmp_path):
    settings = fairseg_folder(tmp_path)
    (tmp_path / "test.txt").write_text("\n", encoding="utf-8")
    code, text = checked(settings)
    assert code == 1
    assert f"error: {tmp_path / 'test.txt'}: this list names no file" in text
    (tmp_path / "test.txt").unlink()
    code, text = checked(settings)
    assert code == 0
    assert "split: validation and test cases were drawn from the rest with --split-seed 0\n" in text
    assert f"split: by the lists {tmp_path / 'train.txt'}\n" in text
    settings, _ = ham_folder(tmp_path)
    assert "drawn" not in checked(settings)[1]
    table = settings.root / "split" / "new_test.csv"
    table.write_text(table.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    code, text = checked(settings)
    assert code == 1
    assert f"error: {table}: this csv has no row" in text


def test_check_warns_of_images_and_masks_of_one_value(tmp_path):
    settings = fairseg_folder(tmp_path)
    write_npz(tmp_path, 4, slo_fundus=fundus() * 0)
    write_npz(tmp_path, 5, disc_cup_mask=np.minimum(disc(), -1))
    code, text = checked(settings)
    assert code == 0
    assert "warning: the image has a single intensity: 1 cases: data_00004" in text
    assert "warning: the mask has no background: 1 cases: data_00005" in text


def test_check_names_every_bad_file_of_many(tmp_path):
    settings = fairseg_folder(tmp_path, n=30)
    bad = [write_npz(tmp_path, i, disc_cup_mask=disc() * 0) for i in range(1, 15)]
    torn = tmp_path / "data_00016.npz"
    torn.write_bytes(torn.read_bytes()[:300])
    (tmp_path / "data_00017.npz").unlink()
    (tmp_path / "data_00018.npz").write_bytes(b"\x80\x04N.")  # a pickle of None
    code, text = checked(settings)
    assert code == 1
    assert all(f"error: {path}" in text for path in [*bad, torn, tmp_path / "data_00018.npz"])
    assert (
        f"error: data_00017.npz: {tmp_path / 'train.txt'} lists this file, but there is none"
        in text
    )
    assert "17 errors" in text
    with pytest.raises(DataError, match="data_00016") as raised:
        open_dataset(settings)
    assert "data_00017" in str(raised.value)


def test_check_finds_leaks_repeated_names_unknowns_and_missing_classes(tmp_path):
    settings = fairseg_folder(tmp_path)
    assert "race" in checked(settings)[1]
    write_npz(tmp_path, 2, pid=77)
    write_npz(tmp_path, 12, pid=77)
    write_npz(tmp_path, 3, language=-1, disc_cup_mask=np.maximum(disc(), -1))
    code, text = checked(settings)
    assert code == 1
    assert "subject 77 lies in several splits: data_00002 in train, data_00012 in test" in text
    assert "warning: language is unknown: 1 cases: data_00003" in text
    assert "warning: the mask has no cup: 1 cases: data_00003" in text
    (tmp_path / "test.txt").write_text("data_00001.npz\ndata_00011.npz\n", encoding="utf-8")
    lists = " and ".join(str(tmp_path / name) for name in ("test.txt", "train.txt"))
    assert f"data_00001.npz: {lists} both list this file" in checked(settings)[1]


def test_check_counts_each_value_by_split_as_training_would_use_it(tmp_path):
    settings = fairseg_folder(tmp_path, n=40)
    dataset = open_dataset(settings)
    race = {case.case_id: case.attributes[0] for case in dataset.cases}
    splits = make_splits(dataset, 0)
    fewer = dataclasses.replace(splits, train=splits.train[5:])
    write_splits(tmp_path / "fewer.json", fewer)
    for wanted, change in (
        (splits, {}),
        (make_splits(dataset, 7), {"split_seed": 7}),
        (fewer, {"splits": tmp_path / "fewer.json"}),
    ):
        code, text = checked(dataclasses.replace(settings, **change))
        assert code == 0
        # Cases that a splits file leaves out have a column of their own, behind the three.
        for value, name in enumerate(("Asian", "Black", "White")):
            (row,) = [line for line in text.splitlines() if line.startswith(f"│ {name}")]
            counts = [int(word) for word in row.replace("│", " ").split()[1:]]
            assert counts[:3] == [
                [race[case_id] for case_id in ids].count(value)
                for ids in (wanted.train, wanted.validation, wanted.test)
            ]
            assert sum(counts) == [*race.values()].count(value)
        assert ("no split" in text) == (wanted is fewer)
