"""One command makes a folder that can be read of images, masks and a csv as people have them."""

import dataclasses
import os
import shlex
import shutil
import stat

import nibabel
import numpy as np
import pytest
from harness.checks import checked
from harness.loose_files import SIZE, converted, labels_in, loose, mask_of
from harness.nifti_folders import AFFINE, SHAPE, read, save
from helpers import needs_links
from PIL import Image

from reference_models.__main__ import main
from reference_models.convert.command import ConvertSettings, convert
from reference_models.data import DataSettings
from reference_models.errors import DataError


def tree(folder):
    """Every file's content, mode and times."""
    return {
        path: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def trained(sentence, monkeypatch):
    """The settings with which the command at a sentence's end trains."""
    settings = []
    monkeypatch.setattr(
        "reference_models.__main__.train", lambda recipe, **_: settings.append(recipe)
    )
    assert main(shlex.split(sentence.partition("-m reference_models ")[2])) == 0
    return settings[0]


def test_pngs_and_a_csv_become_a_folder_by_one_command(tmp_path, monkeypatch, capsys):
    settings = loose(tmp_path)
    for folder in ("a", "b"):
        for path in (tmp_path / folder).iterdir():
            path.chmod(0o400)
    before = tree(tmp_path)
    flags = {"images": "a", "masks": "b", "attributes": "c.csv", "to": "out"}
    arguments = [part for flag, name in flags.items() for part in (f"--{flag}", tmp_path / name)]
    assert main(["convert", *map(str, arguments)]) == 0
    check, train = capsys.readouterr().out.splitlines()[-2:]
    to = settings.to
    assert check.endswith(f"python -m reference_models check --data folder --root {to}")
    assert train == (
        f"Then train: python -m reference_models train small --data folder --root {to} "
        "--attributes sex"
    )
    assert trained(train, monkeypatch).data == DataSettings("folder", to, ("sex",))
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before  # and no mode of theirs changed
    assert sorted(path.name for path in to.iterdir()) == [
        "attributes.csv", "dataset.json", "imagesTr", "labelsTr"
    ]  # fmt: skip
    image = to / "imagesTr/us_002_0000.png"
    assert image.read_bytes() == (tmp_path / "a/us_002.png").read_bytes()
    np.testing.assert_array_equal(labels_in(to / "labelsTr/us_002.png"), mask_of(1, 2))
    assert stat.S_IMODE((to / "labelsTr/us_002.png").stat().st_mode) & 0o044
    code, text = checked(DataSettings("folder", to))
    assert (code, "folder: no errors" in text) == (0, True), text


@needs_links
def test_files_are_linked_and_masks_that_hold_labels_are_too(tmp_path):
    settings = loose(tmp_path, mask="us_{:03}.png", value=1)
    said, content, *_ = converted(settings)
    for kind, name in (("imagesTr", "us_001_0000.png"), ("labelsTr", "us_001.png")):
        assert (settings.to / kind / name).is_symlink()
    assert "The files are links to your files" in " ".join(said)
    assert content["labels"] == {"background": 0, "foreground": 1}
    # They lead there from wherever the folder is moved to.
    moved = settings.to.rename(tmp_path / "elsewhere")
    linked = moved / "imagesTr/us_001_0000.png"
    assert linked.resolve() == (tmp_path / "a/us_001.png").resolve()


def test_where_links_are_refused_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("a privilege is missing")

    monkeypatch.setattr(os, "symlink", refuse)
    settings = loose(tmp_path, n=3)
    said, *_ = converted(settings)
    image = settings.to / "imagesTr/us_001_0000.png"
    assert not image.is_symlink()
    assert image.read_bytes() == (tmp_path / "a/us_001.png").read_bytes()
    assert "3 files were copied, since the system allows no links here." in said


def test_a_folder_that_is_there_is_never_written_to_and_none_is_left_after_an_error(tmp_path):
    settings = loose(tmp_path)
    settings.to.mkdir()
    (settings.to / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"this folder \(--to\) exists already"):
        convert(settings)
    assert (settings.to / "mine.txt").read_text(encoding="utf-8") == "mine"
    shutil.rmtree(settings.to)
    mask = tmp_path / "b/us_005_mask.png"
    mask.write_bytes(mask.read_bytes()[:60])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"us_005_mask\.png: cannot be read"):
        convert(settings)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_paired_and_what_has_no_row_is_said_in_sentences(tmp_path):
    settings = loose(tmp_path)
    (tmp_path / "b/us_004_mask.png").unlink()
    Image.fromarray(mask_of()).save(tmp_path / "b/US_4_mask.png")
    (tmp_path / "a/notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "c.csv").write_text(
        "file,sex\nus_000.png,M\nus_001,F\nx\\us_002_mask.png,F\nus_003.png,M\nzz.png,M\n",
        encoding="utf-8",
    )
    said, content, rows, labels = converted(settings)
    assert content["numTraining"] == 5
    assert labels == [f"us_{i:03}.png" for i in (0, 1, 2, 3, 5)]
    assert rows == [
        ["case", "sex"], ["us_000", "M"], ["us_001", "F"], ["us_002", "F"], ["us_003", "M"],
        ["us_005", ""],
    ]  # fmt: skip
    assert "1 image has no mask and is left out: us_004.png." in said
    assert "1 mask has no image and is left out: US_4_mask.png." in said
    assert f"The column file of {tmp_path / 'c.csv'} names the images." in said
    assert any("1 of 5 rows" in line and line.endswith("left out: zz.png.") for line in said)
    assert any("1 of 5 cases" in line and line.endswith("unknown: us_005.") for line in said)


def test_the_patients_column_is_named_or_asked_for(tmp_path, monkeypatch):
    rows = ["patient id;file;the sex", *(f"P{i // 2};us_{i:03}.png;M" for i in range(6))]
    settings = loose(tmp_path, rows=rows)
    said, _, rows, _ = converted(settings)
    assert rows[0] == ["case", "patient id", "the sex"]
    assert trained(said[-1], monkeypatch).data.attributes == ("the sex",)  # not the patient
    assert any("--subject 'patient id'" in line for line in said)
    shutil.rmtree(settings.to)
    said, _, rows, _ = converted(settings, subject="patient id")
    assert rows[:2] == [["case", "subject", "the sex"], ["us_000", "P0", "M"]]
    assert not any("--subject" in line for line in said)


BAD_ROWS = {
    "no column of images": (
        ["name,sex", "x,M", "y,F"],
        r"no column names the images.*name \('x'\)",
    ),
    "two rows of one": (["f,sex", "us_000,M", "us_000.png,F"], r"c\.csv:3: us_000 has another row"),
    "no attribute": (
        ["file", "us_000"],
        "expected a column for each attribute; there is only file",
    ),
    "two columns of images": (
        ["nr,file,sex", "us_001,us_000.png,M", "us_000,us_001.png,F"],
        r"c\.csv:2: the columns nr and file both name images.*by --case",
    ),
    "case is another thing": (["case,file,sex", "control,us_000,M"], "there is also a column case"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_csv_that_cannot_be_used_is_refused(tmp_path, fault):
    rows, words = BAD_ROWS[fault]
    settings = loose(tmp_path, n=2, rows=rows)
    with pytest.raises(DataError, match=words):
        convert(settings)
    with pytest.raises(DataError, match="there is no column nobody"):
        convert(dataclasses.replace(settings, subject="nobody"))
    with pytest.raises(
        DataError, match=r"no cell of the column sex names|no column sex|also a column case"
    ):
        convert(dataclasses.replace(settings, case="sex"))
    assert not settings.to.exists()


def test_photographs_get_masks_of_png_and_three_channels(tmp_path):
    settings = loose(tmp_path, n=3, image="P{}.JPEG", mask="P{}.bmp", value=1)
    for path in (tmp_path / "a").iterdir():
        Image.open(path).convert("RGB").save(path)
    _, content, _, labels = converted(settings)
    assert labels == ["P0.png", "P1.png", "P2.png"]
    assert sorted(path.name for path in (settings.to / "imagesTr").iterdir())[0] == "P0_0000.jpg"
    assert content["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert content["file_ending"] == ".jpg"
    assert read(DataSettings("folder", settings.to), 1).image_CS.shape == (3, *SIZE)
    shutil.rmtree(settings.to)
    _, content, *_ = converted(settings, channels=("rgb_to_0_1",) * 3)
    assert content["channel_names"]["2"] == "rgb_to_0_1"
    shutil.rmtree(settings.to)
    with pytest.raises(DataError, match="the images have 3 channels; give one name for each"):
        convert(dataclasses.replace(settings, channels=("a", "b")))
    Image.fromarray(mask_of()).save(tmp_path / "a/P1.JPEG")  # in grey
    _, content, *_ = converted(settings)
    assert [*content["channel_names"].values()] == ["R", "G", "B"]


@pytest.mark.parametrize("value", [1, 255])
def test_volumes_are_laid_out_with_their_place(tmp_path, monkeypatch, value):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        mask = np.zeros(SHAPE, np.int16)
        mask[1:3, 1:3] = value
        save(tmp_path / f"a/p{i}_0000.nii.gz", np.full(SHAPE, i, np.int16))
        save(tmp_path / f"a/p{i}_0001.nii.gz", np.full(SHAPE, i, np.int16))
        save(tmp_path / f"b/p{i}_seg.nii", mask)
    (tmp_path / "c.csv").write_text("case,site\np0,A\np1,B\np2,A\n", encoding="utf-8")
    settings = ConvertSettings(
        (tmp_path / "a",), (tmp_path / "b",), tmp_path / "c.csv", tmp_path / "out",
        ("background", "tumour"), ("CT", "PET"),
    )  # fmt: skip
    said, content, _, labels = converted(settings)
    recipe = trained(said[-1], monkeypatch)
    assert recipe.model.axes == 3
    assert recipe.data.attributes == ("site",)
    assert content == {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    assert labels == ["p0.nii.gz", "p1.nii.gz", "p2.nii.gz"]
    written = nibabel.load(settings.to / "labelsTr/p1.nii.gz")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, AFFINE)
    assert np.asarray(written.dataobj).sum() == 2 * 2 * SHAPE[2]
    assert not any("The channels are named" in line for line in said)
    sample = read(DataSettings("folder", settings.to), 1)
    assert sample.image_CS.shape == (2, *SHAPE)
    assert sample.truth_S.sum() == 2 * 2 * SHAPE[2]


def test_files_of_other_formats_are_linked_by_their_ending_alone(tmp_path):
    for folder, suffix in (("a", ""), ("b", ".seg")):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / f"p{i}{suffix}.nrrd").write_bytes(b"looked into by nobody")
    (tmp_path / "c.csv").write_text("case,site\np0,A\np1,B\n", encoding="utf-8")
    settings = ConvertSettings(
        (tmp_path / "a",), (tmp_path / "b",), tmp_path / "c.csv", tmp_path / "out"
    )
    with pytest.raises(DataError, match="name their labels, as in --labels background tumour"):
        convert(settings)
    _, content, _, labels = converted(settings, labels=("background", "node", "tumour"))
    assert labels == ["p0.nrrd", "p1.nrrd"]
    assert content["labels"] == {"background": 0, "node": 1, "tumour": 2}
