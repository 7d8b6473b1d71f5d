"""HAM10000 is read as Dataverse's and Kaggle's archives unpack, with nothing moved or renamed."""

import shutil
import sys

import pytest
from harness.checks import checked, errors
from harness.image_folders import ham_folder

from reference_models.data import DataSettings, open_dataset
from reference_models.errors import DataError

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
IMAGES, MASKS = "HAM10000_images", "HAM10000_segmentations"


def metadata(rows, separator=",", quote=""):
    cells = [COLUMNS] + [
        (row["lesion_id"], row["image_id"], "nv", "histo", "45.0", "male", "lower extremity")
        for row in rows
    ]
    return "\n".join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in cells)


def archives(tmp_path, *, images, masks, table="HAM10000_metadata", separator=",", quote=""):
    """The files of `ham_folder` laid out otherwise: photographs in turn into the folders given."""
    settings, rows = ham_folder(tmp_path)
    root = settings.root
    shutil.rmtree(root / "split")
    for kind, folders in ((IMAGES, images), (MASKS, masks)):
        (root / kind).rename(root / "all")
        for place, path in enumerate(sorted((root / "all").iterdir())):
            folder = root / folders[place % len(folders)]
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name)
        (root / "all").rmdir()
    (root / table).write_text(metadata(rows, separator, quote), encoding="utf-8")
    return settings, rows


PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")
TSCHANDL = "HAM10000_segmentations_lesion_tschandl"
LAYOUTS = {
    "Dataverse, original": {"images": PARTS, "masks": (TSCHANDL,)},
    "Dataverse, tabulated": {
        "images": PARTS,
        "masks": (f"{TSCHANDL}/{TSCHANDL}",),
        "table": "HAM10000_metadata.tab",
        "separator": "\t",
        "quote": '"',
    },
    "Kaggle": {
        "images": tuple(map(str.lower, PARTS)),
        "masks": (TSCHANDL.lower(),),
        "table": "HAM10000_metadata.csv",
    },
    "another of Kaggle's": {"images": ("images",), "masks": ("masks",)},
    "unpacked in place": {"images": (".",), "masks": (".",), "table": "ham10000_metadata.CSV"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_way_of_unpacking_gives_the_same_cases(tmp_path, layout):
    settings, rows = archives(tmp_path, **LAYOUTS[layout])
    for other in ("hmnist_28_28_L.csv", "ISIC2018_Task3_Test_GroundTruth.csv", "README.txt"):
        (settings.root / other).write_text("image,MEL\n1,0\n", encoding="utf-8")
    (settings.root / "__MACOSX" / IMAGES).mkdir(parents=True)
    (settings.root / "__MACOSX" / IMAGES / "._ISIC_0000000.jpg").write_bytes(b"of macOS")
    dataset = open_dataset(settings)
    assert [case.case_id for case in dataset.cases] == [row["image_id"] for row in rows]
    assert {case.attributes for case in dataset.cases} == {(2,)}
    assert dataset.cases[3].subject == "HAM_0000001"
    assert dataset.load(dataset.cases[3]).truth_S.sum() == 150
    assert "twice" not in "".join(dataset.notes)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these two folders are one")
def test_kaggles_second_copy_in_lower_case_is_passed_over_and_said(tmp_path):
    settings, _ = archives(tmp_path, images=PARTS, masks=(TSCHANDL,))
    shutil.copytree(settings.root / PARTS[0], settings.root / PARTS[0].lower())
    dataset = open_dataset(settings)
    assert all("/HAM10000_images" in case.files[0] for case in dataset.cases)
    (note,) = [note for note in dataset.notes if "twice" in note]
    assert note.startswith("6 photographs exist twice, such as ")


def test_what_is_not_there_is_one_error_that_names_what_was_looked_for(tmp_path):
    settings, _ = archives(tmp_path, images=PARTS, masks=(TSCHANDL,))
    (settings.root / PARTS[0] / "ISIC_0000004.jpg").unlink()
    assert errors(checked(settings)[1]) == [
        f"error: {settings.root / 'HAM10000_metadata'}:6: ISIC_0000004: there is no such file: "
        "ISIC_0000004.jpg (photographs)"
    ]
    shutil.rmtree(settings.root / TSCHANDL)
    (error,) = errors(checked(settings)[1])
    assert "there are no outlines: neither this folder nor" in error
    assert "has a *_segmentation.png;" in error
    assert "HAM10000_segmentations or masks" in error
    for part in PARTS:
        shutil.rmtree(settings.root / part)
    (error,) = errors(checked(settings)[1])
    assert "no photographs" in error
    (settings.root / "HAM10000_metadata").unlink()
    with pytest.raises(DataError, match=r"expected HAM10000_metadata \(with .csv, .tab or no end"):
        open_dataset(settings)


def test_of_two_tables_the_csv_is_read_and_the_other_named(tmp_path):
    settings, _ = archives(tmp_path, images=PARTS, masks=(TSCHANDL,), table="HAM10000_metadata")
    (settings.root / "HAM10000_metadata.tab").write_text("lesion_id\timage_id\n", encoding="utf-8")
    dataset = open_dataset(settings)
    assert len(dataset.cases) == 12
    assert f"{settings.root / 'HAM10000_metadata'} is read; HAM10000_metadata.tab is not" in (
        dataset.notes
    )


def test_medfairs_paths_that_lead_nowhere_are_found_in_the_archives(tmp_path):
    settings, _ = ham_folder(tmp_path)
    (settings.root / IMAGES).rename(settings.root / PARTS[0])
    (settings.root / MASKS).rename(settings.root / TSCHANDL)
    dataset = open_dataset(DataSettings("ham10000", settings.root))
    assert [case.split for case in dataset.cases].count("train") == 8
    assert PARTS[0] in dataset.cases[0].files[0]
