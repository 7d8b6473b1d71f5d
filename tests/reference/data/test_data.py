"""Data sets: the files' formats are read as they stand, and what is wrong with a file is said."""

import dataclasses
import io
import re
import zipfile

import numpy as np
import pytest
from helpers import needs_links
from PIL import Image
from rich.console import Console

from reference_models.data import DataSettings, PhantomSettings, open_dataset
from reference_models.data.cases import UNKNOWN
from reference_models.data.check import check
from reference_models.data.splits import make_splits, write_splits
from reference_models.errors import DataError

CODES = {"race": 2, "gender": 0, "ethnicity": 1, "language": 0, "maritalstatus": 3}


def fundus():
    return np.arange(24 * 31, dtype=np.uint8).reshape(24, 31)


def disc(dtype=np.int8):
    mask = np.zeros((24, 31), np.int16)
    mask[8:16, 10:22], mask[10:14, 13:18] = -1, -2
    return mask.astype(dtype)


def write_npz(root, number, **members):
    """One file in the real format; None leaves a member out."""
    content = {"slo_fundus": fundus(), "disc_cup_mask": disc(), "age": 64.0, **CODES} | members
    path = root / f"data_{number:05}.npz"
    raw = {name: content.pop(name) for name in [*content] if isinstance(content[name], bytes)}
    np.savez_compressed(path, **{k: np.asarray(v) for k, v in content.items() if v is not None})
    with zipfile.ZipFile(path, "a") as archive:
        for name, stored in raw.items():
            archive.writestr(f"{name}.npy", stored)
    return path


def header(shape):
    """An array's, without its numbers."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def fairseg_folder(root, n=12, **members):
    for number in range(1, n + 1):
        write_npz(root, number, **{"race": number % 3} | members)
    names = [f"data_{number:05}.npz" for number in range(1, n + 1)]
    (root / "train.txt").write_text("\n".join(names[: n - 2]) + "\n", encoding="utf-8")
    (root / "test.txt").write_text("\n".join(names[n - 2 :]), encoding="utf-8")
    return DataSettings("fairseg", root)


def ham_folder(root, n=12, name="HAM10000", **columns):
    root = root / name
    for folder in ("HAM10000_images", "HAM10000_segmentations", "split"):
        (root / folder).mkdir(parents=True)
    rows = []
    for i in range(n):
        image_id = f"ISIC_{i:07}"
        pixels = np.full((20, 30, 3), (200, 120, 40), np.uint8)
        Image.fromarray(pixels).save(root / f"HAM10000_images/{image_id}.jpg", quality=95)
        mask = np.zeros((20, 30), np.uint8)
        mask[5:15, 10:25] = 255
        Image.fromarray(mask).save(root / f"HAM10000_segmentations/{image_id}_segmentation.png")
        row = {
            "": i,
            "lesion_id": f"HAM_{i // 2:07}",
            "image_id": image_id,
            "age": 45.0,
            "Path": f"HAM10000_images/{image_id}.jpg",
            "Sex": "MF"[i % 2],
            "Age_multi": i % 5,
            "localization": "lower extremity",
        }
        rows.append(row | {k: v[i] if isinstance(v, list) else v for k, v in columns.items()})
    write_ham_tables(root, rows)
    return DataSettings("ham10000", root), rows


def write_ham_tables(root, rows):
    for split, part in (("train", rows[:8]), ("val", rows[8:10]), ("test", rows[10:])):
        lines = [",".join(part[0]), *(",".join(map(str, row.values())) for row in part)]
        (root / "split" / f"new_{split}.csv").write_text("\n".join(lines), encoding="utf-8")


def checked(settings):
    """(exit code, what `check` printed)"""
    text = io.StringIO()
    return check(settings, Console(file=text, width=80)), text.getvalue()


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
    assert f"age: in {unit}" in checked(DataSettings("fairseg", tmp_path))[1]


BAD_NPZ = {
    "object mask": ({"disc_cup_mask": np.array([None, 1], object)}, "Python objects"),
    "object attribute": ({"race": np.array("White", object)}, "numpy.savez_compressed"),
    "label out of range": ({"disc_cup_mask": disc() * 2}, r"got also \[-4\]"),
    "empty mask": ({"disc_cup_mask": disc() * 0}, "all background"),
    "sizes differ": ({"disc_cup_mask": disc()[:-1]}, r"\(23, 31\)"),
    "no mask": ({"disc_cup_mask": None}, "no disc_cup_mask or disc_cup"),
    "no image": ({"slo_fundus": None}, "no slo_fundus"),
    "nan": ({"slo_fundus": np.full((24, 31), np.nan)}, "intensities"),
    "already scaled": ({"slo_fundus": fundus() / 255.0}, "intensities"),
    "race 7": ({"race": 7}, "race must be 0..2"),
    "text": ({"gender": "F"}, "gender must be one number"),
    "age in days": ({"age": 20000}, "would be in days"),
    "two patients": ({"pid": [1, 2]}, r"pid must be one value, got int64 \(2,\)"),
    "no array": ({"race": b"2"}, r"race cannot be read \(no array\)"),
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


def test_an_empty_list_or_table_is_an_error_and_a_missing_one_is_said(tmp_path):
    settings = fairseg_folder(tmp_path)
    (tmp_path / "test.txt").write_text("\n", encoding="utf-8")
    code, text = checked(settings)
    assert code == 1
    assert f"error: {tmp_path / 'test.txt'}: names no file" in text
    (tmp_path / "test.txt").unlink()
    code, text = checked(settings)
    assert code == 0
    assert "split: validation and test drawn by seed 0 from the rest" in text
    assert f"split: by {tmp_path / 'train.txt'}\n" in text
    settings, _ = ham_folder(tmp_path)
    assert "drawn" not in checked(settings)[1]
    table = settings.root / "split" / "new_test.csv"
    table.write_text(table.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    code, text = checked(settings)
    assert code == 1
    assert f"error: {table}: has no row" in text


def test_check_warns_of_images_and_masks_of_one_value(tmp_path):
    settings = fairseg_folder(tmp_path)
    write_npz(tmp_path, 4, slo_fundus=fundus() * 0)
    write_npz(tmp_path, 5, disc_cup_mask=np.minimum(disc(), -1))
    code, text = checked(settings)
    assert code == 0
    assert "warning: image of one intensity: 1 cases: data_00004" in text
    assert "warning: mask without background: 1 cases: data_00005" in text


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
    assert "error: data_00017.npz: in" in text
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
    assert "warning: language unknown: 1 cases: data_00003" in text
    assert "warning: mask without cup: 1 cases: data_00003" in text
    (tmp_path / "test.txt").write_text("data_00001.npz\ndata_00011.npz\n", encoding="utf-8")
    assert "data_00001.npz: in" in checked(settings)[1]


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


def test_ham10000_is_read_as_medfair_lays_it_out(tmp_path):
    settings, _ = ham_folder(
        tmp_path,
        name="my_images",  # the rule for masks must not touch the root's own name
        Age_multi=[0, 1, 2, 3, 4, "", "nan", "3.0", 0, 0, 0, 0],
        Sex=["M", "F", "unknown", "", *"MFMFMFMF"],
        localization=["scalp", "foot", "ear", "unknown", *["back"] * 8],
    )
    settings = DataSettings("ham10000", settings.root, ("age", "sex", "localization"))
    dataset = open_dataset(settings)
    age, sex, site = zip(*(case.attributes for case in dataset.cases), strict=True)
    assert age[:8] == (0, 1, 2, 3, 4, UNKNOWN, UNKNOWN, 3)
    assert sex[:5] == (1, 0, UNKNOWN, UNKNOWN, 1)
    assert site[:5] == (0, 9, UNKNOWN, UNKNOWN, 2)
    assert [case.split for case in dataset.cases] == ["train"] * 8 + ["validation"] * 2 + [
        "test"
    ] * 2
    assert dataset.cases[3].subject == "HAM_0000001"
    sample = dataset.load(dataset.cases[0])
    assert sample.image_CS.shape == (3, 20, 30)
    np.testing.assert_allclose(sample.image_CS[:, 0, 0] * 255, (200, 120, 40), atol=3)
    assert sample.mask_S[5:15, 10:25].all()
    assert sample.mask_S.sum() == 150
    assert checked(settings)[0] == 0


def test_ham10000_single_metadata_file_is_read_and_left_open(tmp_path):
    settings, rows = ham_folder(tmp_path)
    for table in (settings.root / "split").iterdir():
        table.unlink()
    ages = [0, 19, 20, 39, 40, 59, 60, 79, 80, 95, "", 5]
    lines = ["lesion_id,image_id,dx,age,sex,localization"]
    lines += [
        f"{row['lesion_id']},{row['image_id']},nv,{age},male,back"
        for row, age in zip(rows, ages, strict=True)
    ]
    (settings.root / "HAM10000_metadata.csv").write_text(
        "\ufeff" + "\n".join(lines), encoding="utf-8"
    )
    dataset = open_dataset(settings)
    assert [case.attributes[0] for case in dataset.cases] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1, 0]
    assert {case.split for case in dataset.cases} == {None}


def test_a_bad_row_is_named_by_its_line_and_paths_may_be_of_windows(tmp_path):
    settings, rows = ham_folder(
        tmp_path, Path=[f"HAM10000_images\\ISIC_{i:07}.jpg" for i in range(12)]
    )
    assert len(open_dataset(settings).cases) == 12
    rows[3]["Sex"] = "x"
    write_ham_tables(settings.root, rows)
    table = settings.root / "split" / "new_train.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([*lines[:2], "", "", *lines[2:]]), encoding="utf-8")
    assert f"error: {table}:7: ISIC_0000003" in checked(settings)[1]
    table.write_text(table.read_text(encoding="utf-8").replace(",", ";"), encoding="utf-8")
    with pytest.raises(DataError, match="the first has ;lesion_id;image_id"):
        open_dataset(settings)


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    settings, _ = ham_folder(tmp_path)
    path = settings.root / "HAM10000_images/ISIC_0000000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise when shown
    with Image.open(path) as image:
        lying = np.asarray(image).transpose(1, 0, 2)[::-1].copy()
    Image.fromarray(lying).save(path, exif=exif)
    dataset = open_dataset(settings)
    assert dataset.load(dataset.cases[0]).image_CS.shape == (3, 20, 30)


def _damage_ham(root, rows, fault):
    image = root / "HAM10000_images/ISIC_0000003.jpg"
    mask = root / "HAM10000_segmentations/ISIC_0000003_segmentation.png"
    grey = np.zeros((20, 30), np.uint8)
    if fault == "missing mask":
        mask.unlink()
    elif fault == "missing image":
        image.unlink()
    elif fault == "torn image":
        image.write_bytes(image.read_bytes()[:400])
    elif fault == "empty mask":
        Image.fromarray(grey).save(mask)
    elif fault == "grey mask":
        Image.fromarray(grey + 7).save(mask)
    elif fault == "sizes differ":
        Image.fromarray(grey[:10] + 255).save(mask)
    elif fault == "not an image":
        mask.write_text("sorry", encoding="utf-8")
    elif fault == "16 bits":
        Image.fromarray(grey.astype(np.uint16) + 30000).save(image, format="PNG")
    elif fault == "16-bit mask":
        Image.fromarray(grey.astype(np.uint16) + 300).save(mask)
    elif fault == "coloured mask":
        Image.fromarray(np.stack([grey + 255, grey + 255, grey + 252], -1)).save(mask)
    elif fault == "mask in alpha":
        Image.fromarray(np.stack([grey + 255] * 3 + [grey], -1)).save(mask)
    elif fault == "hidden name":
        rows[3]["image_id"] = ".ISIC_0000003"
    elif fault == "age group 9":
        rows[3]["Age_multi"] = 9
    elif fault == "sex":
        rows[3]["Sex"] = "x"
    elif fault == "listed twice":
        rows[5]["image_id"], rows[5]["Path"] = rows[3]["image_id"], rows[3]["Path"]
    elif fault == "leak":
        rows[11]["lesion_id"] = rows[3]["lesion_id"]
    write_ham_tables(root, rows)


@pytest.mark.parametrize(
    "fault",
    ["missing mask", "missing image", "torn image", "empty mask", "grey mask", "sizes differ",
     "not an image", "16 bits", "16-bit mask", "coloured mask", "mask in alpha", "hidden name",
     "age group 9", "sex", "listed twice", "leak"],
)  # fmt: skip
def test_check_names_a_bad_photograph_mask_or_row(tmp_path, fault):
    settings, rows = ham_folder(tmp_path)
    assert checked(settings)[0] == 0
    _damage_ham(settings.root, rows, fault)
    code, text = checked(settings)
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert ("HAM_0000001" if fault == "leak" else "ISIC_0000003") in line


def test_no_damaged_byte_of_a_png_mask_goes_unnoticed(tmp_path):
    settings, _ = ham_folder(tmp_path)
    dataset = open_dataset(settings)
    whole = dataset.load(dataset.cases[0]).mask_S
    path = settings.root / "HAM10000_segmentations/ISIC_0000000_segmentation.png"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            mask = dataset.load(dataset.cases[0]).mask_S
        except DataError:
            continue
        np.testing.assert_array_equal(mask, whole, err_msg=str(place))
    path.write_bytes(content[:-20])
    with pytest.raises(DataError, match="ISIC_0000000"):
        dataset.load(dataset.cases[0])


def test_settings_that_fit_no_data_set_are_refused(tmp_path):
    for settings, words in (
        (DataSettings("fairseg"), "root"),
        (DataSettings("fairseg", tmp_path / "nowhere"), "nowhere"),
        (DataSettings("fairseg", tmp_path), "no .npz file"),
        (DataSettings("ham10000", tmp_path), "expected a train.csv"),
        (DataSettings("phantom", tmp_path), "leave root"),
        (DataSettings("mni152", attributes=("race",)), "protocol"),
        (DataSettings("fairseg", tmp_path, ("rase",)), "race, gender"),
        (DataSettings("phantom", phantom=PhantomSettings(shares=(0.5, 0.4))), "add up to 1"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(settings)
        assert checked(settings)[0] == 1
    fairseg_folder(tmp_path, race=None)
    with pytest.raises(DataError, match="no file has the attribute race"):
        open_dataset(DataSettings("fairseg", tmp_path))
