"""HAM10000 is read as MEDFAIR lays it out, and what is wrong with a file or a row is said."""

import numpy as np
import pytest
from harness.checks import checked
from harness.image_folders import ham_folder, write_ham_tables
from PIL import Image

from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import UNKNOWN
from reference_models.errors import DataError


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
    assert f"error: {table}:7: ISIC_0000003" in checked(settings)[1]
    table.write_text(
        table.read_text(encoding="utf-8").replace("lesion_id", "lesion"), encoding="utf-8"
    )
    with pytest.raises(
        DataError, match="lack the columns lesion_id; the first file has , lesion, image_id"
    ):
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
