"""What cannot be read of a folder of volumes is refused with its file's name."""

import dataclasses
import gzip
import re
import unicodedata

import nibabel as nib
import numpy as np
import pytest
from harness.nifti_folders import (
    AFFINE,
    GRIDS,
    SHAPE,
    checked,
    errors,
    mask,
    nnunet_folder,
    read,
    save,
    voxels,
    write_layout,
)

from reference_models.data import open_dataset
from reference_models.data.cases import UNKNOWN, Attribute
from reference_models.data.volumes import open_volume, read_voxels
from reference_models.errors import DataError


def _bad_header(**fields):
    return lambda path, array: save(path, array, **fields)


def _with_affine(change):
    affine = AFFINE.copy()
    affine[:3] = change(affine[:3])

    def damage(path, array):
        header = nib.Nifti1Header()
        header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
        header["sform_code"] = 1
        header.set_data_shape(array.shape)
        header.set_data_dtype(array.dtype)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        content = header.binaryblock + bytes(4) + array.tobytes(order="F")
        path.write_bytes(gzip.compress(content))

    return damage


def _at(index, value):
    def damage(path, array):
        array = array.astype(np.float32)
        array[index] = value
        save(path, array)

    return damage


def _bytes(change):
    def damage(path, array):
        path.write_bytes(change(path.read_bytes()))

    return damage


def _moved(x):
    affine = AFFINE.copy()
    affine[0, 3] += x
    return affine


COLOURS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
# What is done to a file, and what is said of it.
BAD_FILES = {
    "4D": (lambda p, a: save(p, np.stack([a, a], -1)), "4 dimensions .6, 5, 4, 2."),
    "one time point": (lambda p, a: save(p, a[..., None]), "4 dimensions"),
    "2D": (lambda p, a: save(p, a[..., 0]), "2 dimensions"),
    "complex": (lambda p, a: save(p, a.astype(np.complex64)), "complex"),
    "colours": (lambda p, a: save(p, np.zeros(SHAPE, COLOURS)), "colours"),
    "NaN": (_at((1, 2, 3), np.nan), r"1 voxels are NaN or infinite, the first at .* \(1, 2, 3\)"),
    "infinite": (_at((0, 0), np.inf), "4 voxels are NaN or infinite"),
    "other shape": (lambda p, a: save(p, a[:, :, 1:]), r"\(6, 5, 3\) voxels.*has \(6, 5, 4\)"),
    "elsewhere": (lambda p, a: save(p, a, _moved(0.2)), "corners are up to 0.2 voxels away"),
    "flipped": (lambda p, a: save(p, a, GRIDS["negative determinant"]), "lies elsewhere"),
    "other spacing": (lambda p, a: save(p, a, AFFINE @ np.diag([1, 1, 1.1, 1])), "lies elsewhere"),
    "singular": (_with_affine(lambda m: m * [1, 1, 0, 1]), "singular"),
    "axes alike": (_with_affine(lambda m: m[:, [0, 0, 2, 3]]), "singular"),
    "not finite": (_with_affine(lambda m: m * [1, np.nan, 1, 1]), "singular or not finite"),
    "tilted": (_with_affine(lambda m: m + np.outer([0, 0, 1], [0, 0.5, 0, 0])), "14.0° off right"),
    "in metres": (_bad_header(xyzt_units=1), "lengths are in meter, expected mm"),
    "in no unit": (_bad_header(xyzt_units=7), "lengths are in unit 7, expected mm"),
    "more than it claims": (
        _bytes(lambda b: gzip.compress(gzip.decompress(b) + bytes(5))), "5 bytes more than"
    ),
    "cut off": (_bytes(lambda b: b[:-30]), "not a readable NIfTI"),
    "cut off at once": (_bytes(lambda b: b[:60]), "not a readable NIfTI"),
    "empty": (_bytes(lambda b: b""), "not a readable NIfTI"),
    "text": (_bytes(lambda b: b"sorry"), "not a readable NIfTI"),
    "not deflated": (_bytes(gzip.decompress), "not a readable NIfTI"),
    "deflated twice": (_bytes(gzip.compress), "not a readable NIfTI"),
    "a byte off": (_bytes(lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:]), "not a readable NIfTI"),
    "header alone": (
        _bytes(lambda b: gzip.compress(gzip.decompress(b)[:352])), "not a readable NIfTI"
    ),
    "claims terabytes": (
        _bytes(lambda b: gzip.compress(_claiming(gzip.decompress(b)))), "cut off: its header claims"
    ),
}  # fmt: skip
BAD_LABELS = {
    "label out of range": (_at((0, 0, 0), 3), "labels must be 0 to 2 .*; got also 3;"),
    "negative label": (_at((0, 0, 0), -1), "got also -1;"),
    "label of 256": (_at((0, 0, 0), 256), "got also 256;"),
    "smoothed label": (_at((0, 0, 0), 0.5), "whole numbers, .* got 0.5;"),
    "scaled label": (_bad_header(scl_slope=0.25, scl_inter=0), "whole numbers"),
}


def _claiming(content):
    header = nib.Nifti1Header(content[:348])
    header.set_data_shape((30000, 30000, 30000))
    return header.binaryblock + content[348:]


@pytest.mark.parametrize(
    ("which", "fault"),
    [("imagesTr/p4_0001", fault) for fault in BAD_FILES]
    + [("labelsTr/p4", fault) for fault in (*BAD_FILES, *BAD_LABELS)],
)
def test_check_names_a_bad_volume_and_says_what_is_wrong(tmp_path, which, fault):
    settings = nnunet_folder(tmp_path, n=5, channel_names={"0": "CT", "1": "MR"})
    for i in range(5):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i))
    damage, words = (BAD_FILES | BAD_LABELS)[fault]
    path = tmp_path / f"{which}.nii.gz"
    array = mask() if "labels" in which else voxels()
    save(path, array, _moved(0.05))  # which is rounding
    assert checked(settings)[0] == 0
    damage(save(path, array), array)
    code, text = checked(settings)
    assert code == 1
    assert len(errors(text)) == 1
    assert str(path) in errors(text)[0]
    assert re.search(words, text)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read(settings, 4)


def test_no_damaged_byte_of_a_deflated_volume_goes_unnoticed(tmp_path):
    # More than a reader takes at once, and of noise, so that no two streams stand for the same.
    whole_S = np.random.default_rng(0).integers(0, 256, (64, 64, 80)).astype(np.uint8)
    path = save(tmp_path / "p0.nii.gz", whole_S)
    image = open_volume(str(path))
    np.testing.assert_array_equal(read_voxels(str(path), image), whole_S)
    content = path.read_bytes()
    end = len(content)
    for place in (*range(10, end, end // 40), *range(end - 8, end)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(f"{path}: ") + "not a readable NIfTI"):
            read_voxels(str(path), image)


def test_check_warns_of_what_is_odd_but_can_be_read(tmp_path, caplog):
    settings = nnunet_folder(tmp_path)
    image = nib.Nifti1Image(voxels(), AFFINE)
    image.set_qform(GRIDS["oblique"], code=1)
    nib.save(image, tmp_path / "imagesTr/p0_0000.nii.gz")
    for path in (tmp_path / "imagesTr/p1_0000.nii.gz", tmp_path / "labelsTr/p1.nii.gz"):
        nib.save(nib.Nifti1Image(voxels() % 3, None), path)
    save(tmp_path / "imagesTr/p2_0000.nii.gz", voxels(), pixdim=[1, 3, 3, 3, 1, 1, 1, 1])
    save(tmp_path / "imagesTr/p3_0000.nii.gz", voxels() + 1024)
    save(tmp_path / "labelsTr/p4.nii.gz", mask() * 0)
    path = tmp_path / "imagesTr/p5_0000.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = np.float32(-1).tobytes()  # pixdim[1]
    path.write_bytes(gzip.compress(content))
    (tmp_path / "imagesTr/p5.nrrd").write_text("another format", encoding="utf-8")
    code, text = checked(settings)
    assert code == 0
    for warning in (
        "sform and qform disagree; the sform is used: 1 cases: p0",
        "neither sform nor qform, so which side is left is not known; taken from right to left: "
        "1 cases: p1",
        "pixdim and sform disagree on the voxels' size; the sform's is used: 1 cases: p2",
        "header: pixdim[1,2,3] should be positive: 1 cases: p5",
        "CT without a voxel below 0 HU, as if offset or scaled already: 2 cases: p1, p3",
        "mask without tumour: 1 cases: p4",
        "mask without node: 1 cases: p4",
        f"{tmp_path / 'imagesTr'}: not .nii.gz and left out: p5.nrrd",
    ):
        assert f"warning: {warning}\n" in text
    assert "of one intensity" not in text
    assert "as if not in mm" not in text
    assert not caplog.records  # nibabel's own remarks name no file
    assert read(settings, 0).spacing == (1, 2, 3)  # of the sform


def test_check_warns_of_an_empty_channel_and_of_a_volume_in_cm(tmp_path):
    settings = nnunet_folder(tmp_path, n=5, channel_names={"0": "CT", "1": "MR"})
    for i in range(5):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i) * (i != 3))
    for path in tmp_path.glob("*Tr/p2*"):
        save(path, np.asarray(nib.load(path).dataobj), AFFINE * [0.1, 0.1, 0.1, 1])
    code, text = checked(settings)
    assert code == 0
    assert "warning: channel 0001 of one intensity: 1 cases: p3\n" in text
    assert "as if not in mm: 1 cases: p2\n" in text


def _rename(old, new):
    return lambda root: (root / old).rename(root / new)


def _remove(name):
    return lambda root: (root / name).unlink()


def _copy(old, new):
    def change(root):
        (root / new).parent.mkdir(exist_ok=True)
        (root / new).write_bytes((root / old).read_bytes())

    return change


BAD_FOLDERS = {
    "no label": (_remove("labelsTr/p3.nii.gz"), "{root}/labelsTr/p3.nii.gz: no such file"),
    "no image": (_remove("imagesTr/p3_0000.nii.gz"), "{root}/labelsTr/p3.nii.gz: no image for it"),
    "no first channel": (
        _rename("imagesTr/p3_0000.nii.gz", "imagesTr/p3_0001.nii.gz"),
        "{root}/imagesTr/p3_0001.nii.gz: channel 0001, but",
    ),
    "one channel too many": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTr/p3_0001.nii.gz"),
        "{root}/imagesTr/p3_0001.nii.gz: channel 0001, but {root}/dataset.json names 1",
    ),
    "also not deflated": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTr/p3_0000.nii"),
        "{root}/imagesTr/p3_0000.nii: ends in .nii, but the file_ending of",
    ),
    "two spellings": (
        _copy("labelsTr/p3.nii.gz", "labelsTr/p3.NII.GZ"), "the same name as"
    ),
    "with and without channel": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTr/p3.nii.gz"), "the same channel as"
    ),
    "trained and tested on": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTs/p3_0000.nii.gz"),
        "{root}/imagesTs/p3_0000.nii.gz: case p3 is in {root}/imagesTr already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_check_names_files_that_make_up_no_case(tmp_path, fault):
    settings = nnunet_folder(tmp_path)
    change, words = BAD_FOLDERS[fault]
    change(tmp_path)
    code, text = checked(settings)
    assert code == 1
    (line,) = [line for line in errors(text) if "attributes.csv" not in line]
    assert words.format(root=tmp_path.as_posix()) in line.replace("\\", "/")


def test_a_channel_that_is_missing_is_named_and_so_is_a_4d_image_without_channels(tmp_path):
    settings = nnunet_folder(tmp_path, n=4, channel_names={"0": "T1", "1": "T2"})
    for i in (0, 2, 3):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i))
    path = tmp_path / "imagesTr/p2_0000.nii.gz"
    path.rename(path.with_name("p2.nii.gz"))
    with pytest.raises(DataError) as raised:
        open_dataset(settings)
    images, said = tmp_path / "imagesTr", str(raised.value)
    assert f"{images / 'p1_0001.nii.gz'}: no such file (channel T2)" in said
    assert f"{images / 'p2.nii.gz'}: expected a file for each of the 2" in said


def test_hidden_files_and_other_peoples_files_are_no_cases(tmp_path):
    settings = nnunet_folder(tmp_path)
    for name in ("._p0_0000.nii.gz", ".DS_Store", "notes.txt"):
        (tmp_path / "imagesTr" / name).write_bytes(b"of macOS")
    assert len(open_dataset(settings).cases) == 10
    assert "not .nii.gz and left out: notes.txt\n" in checked(settings)[1]


BAD_LAYOUTS = {
    "none": (None, "no such file; write one"),
    "trailing comma": ('{"labels": {"background": 0,},}', "not readable json .*line 1"),
    "a list": ("[]", "expected an object"),
    "a dataset key": ({"dataset": {}}, "by the key 'dataset'"),
    "other ending": ({"file_ending": ".nrrd"}, "file_ending is '.nrrd', expected .nii.gz or .nii"),
    "no channels": ({"channel_names": None}, "channel_names must name"),
    "empty channels": ({"channel_names": {}}, "names no channel"),
    "channels from 1": ({"channel_names": {"1": "CT"}}, "channel_names must name"),
    "no labels": ({"labels": None}, "labels must be an object"),
    "a gap": ({"labels": {"background": 0, "tumour": 2}}, r"without a gap.*got \[0, 2\]"),
    "background alone": ({"labels": {"background": 0}}, "at least 0 and 1"),
    "ignore": ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "ignore label"),
    "fraction": ({"labels": {"background": 0, "tumour": 1.5}}, "'tumour' must be a whole number"),
    "text": ({"labels": {"background": 0, "tumour": "one"}}, "'tumour' must be a whole number"),
    "two names": ({"labels": {"background": 0, "a": 1, "b": 1}}, "two names for one"),
    "no background": ({"labels": {"all": [0, 1], "a": 1}}, "must name 0 alone"),
    "one name twice": ({"labels": {"0": "background", "1": "a", "2": "a"}}, "one thing twice"),
    "257 labels": ({"labels": {str(i): f"l{i}" for i in range(257)}}, "at most 256"),
}


@pytest.mark.parametrize("fault", BAD_LAYOUTS)
def test_a_dataset_json_that_cannot_be_used_is_refused(tmp_path, fault):
    settings = nnunet_folder(tmp_path, n=3)
    content, words = BAD_LAYOUTS[fault]
    path = tmp_path / "dataset.json"
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_layout(tmp_path, **content)
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + ".*" + words):
        open_dataset(settings)
    assert checked(settings)[0] == 1


def test_a_folder_without_images_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    settings = nnunet_folder(tmp_path, n=3)
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(open_dataset(settings).cases) == 3
    (tmp_path / "imagesTr").rename(tmp_path / "images")
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path}: ") + r"no \.nii\.gz file in its folder imagesTr"
    ):
        open_dataset(settings)
    for low, high in ((250, -175), (0, 0), (np.nan, 1), (-np.inf, 1)):
        with pytest.raises(DataError, match="ct_window"):
            open_dataset(dataclasses.replace(settings, ct_window=(low, high)))


TABLES = {
    "byte order mark": "\ufeffcase,T-stage\n{a},T1\n{b},T2\n{c},\n",
    "semicolons": "case;T-stage\r\n{a};T1\r\n{b};T2\r\n{c};\r\n;\r\n\r\n",
    "tabs": "case\tT-stage\n{a}\tT1\n{b}\tT2\n{c}\t",
    "blanks": " Case , T-stage \n {a} ,T1 \n{b}\xa0,\tT2\n{c}, NaN\n  ,\n",
    "quotes": '"case","T-stage"\n"{a}","T1"\n"{b}","T2"\n"{c}","Unknown"\n',
    "cells behind": "case,T-stage\n{a},T1,,\n{b},T2,\n{c},n/a",
    "an index": ",case,T-stage\n0,{a},T1\n1,{b},T2\n2,{c},None\n",
    "file names": "case,T-stage\n{a}.nii.gz,T1\nimagesTr\\{b}_0000.NII.GZ,T2\nx/{c}.nii,na\n",
    "subjects unknown": "case,subject,T-stage\n{a},nan,T1\n{b},NaN,T2\n{c},n/a,\n",
    "others behind": "subject,case,split,T-stage,age\n7,{a},,T1,40\n8,{b},Val,T2,41\n,{c},,,42\n",
}


@pytest.mark.parametrize("way", TABLES)
def test_the_table_is_read_in_whatever_way_spreadsheets_write_it(tmp_path, way):
    settings = nnunet_folder(tmp_path, n=3)
    names = dict(zip("abc", ("p0", "pat 1.v2_b", "p2"), strict=True))
    (tmp_path / "imagesTr/p1_0000.nii.gz").rename(tmp_path / "imagesTr/pat 1.v2_b_0000.nii.gz")
    (tmp_path / "labelsTr/p1.nii.gz").rename(tmp_path / "labelsTr/pat 1.v2_b.nii.gz")
    (tmp_path / "attributes.csv").write_bytes(TABLES[way].format(**names).encode())
    dataset = open_dataset(settings)
    assert dataset.attributes == (Attribute("T-stage", ("T1", "T2")),)
    cases = {case.case_id: case for case in dataset.cases}
    assert {name: case.attributes for name, case in cases.items()} == {
        "p0": (0,), "pat 1.v2_b": (1,), "p2": (UNKNOWN,)
    }  # fmt: skip
    if way == "subjects unknown":
        assert {case.subject for case in dataset.cases} == {*cases}
    if way == "others behind":
        assert [cases[name].subject for name in names.values()] == ["7", "8", "p2"]
        assert [cases[name].split for name in names.values()] == [None, "validation", None]


def test_a_name_is_one_whichever_way_its_accents_are_written(tmp_path):
    apart, together = (unicodedata.normalize(form, "Zoé") for form in ("NFD", "NFC"))
    settings = nnunet_folder(tmp_path, n=2, rows=[f"{apart},T1", "p1,T2"])
    (tmp_path / "imagesTr/p0_0000.nii.gz").rename(tmp_path / f"imagesTr/{apart}_0000.nii.gz")
    (tmp_path / "labelsTr/p0.nii.gz").rename(tmp_path / f"labelsTr/{together}.nii.gz")
    dataset = open_dataset(settings)
    assert [case.case_id for case in dataset.cases] == [together, "p1"]
    assert dataset.load(dataset.cases[0]).mask_S is not None


def test_values_stand_in_natural_order_and_a_number_is_one_however_it_is_written(tmp_path):
    entries = ["10", "2.0", "-1.5", "02", "10.0", "", "T10b", "T2b", "T2a", "x"]
    rows = [f"p{i},{entry},{entry}" for i, entry in enumerate(entries)]
    settings = nnunet_folder(tmp_path, rows=rows)
    table = tmp_path / "attributes.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("case,T-stage", "case,T-stage,again", 1),
        encoding="utf-8",
    )
    dataset = open_dataset(dataclasses.replace(settings, attributes=("again", "T-stage")))
    values = ("-1.5", "2", "10", "T2a", "T2b", "T10b", "x")
    assert dataset.attributes == (Attribute("again", values), Attribute("T-stage", values))
    assert [case.attributes[1] for case in dataset.cases] == [2, 1, 0, 1, 2, UNKNOWN, 5, 4, 3, 6]
    assert [case.stratum for case in dataset.cases] == [
        case.attributes[1] for case in dataset.cases
    ]


def test_columns_that_are_no_groups_are_refused_where_they_are_asked_for(tmp_path):
    settings = nnunet_folder(tmp_path, n=22, rows=[f"p{i},T{i % 2},{i},,é" for i in range(22)])
    table = tmp_path / "attributes.csv"
    columns = "case,T-stage,weight,nothing,site"
    table.write_text(
        table.read_text(encoding="utf-8").replace("case,T-stage", columns, 1), encoding="utf-8"
    )
    code, text = checked(settings)
    assert code == 0
    assert "weight: 22 values, which is no group; left out" in text
    assert "nothing: 0 values" in text
    assert "cases by site" in text
    for name, words in (
        ("weight", "22 values"),
        ("nothing", "no values"),
        ("age", "no column age"),
    ):
        with pytest.raises(DataError, match=re.escape(f"{table}: ") + ".*" + words):
            open_dataset(dataclasses.replace(settings, attributes=(name,)))
        assert checked(dataclasses.replace(settings, attributes=(name,)))[0] == 1
    with pytest.raises(DataError, match="name each once"):
        open_dataset(dataclasses.replace(settings, attributes=("site", "site")))
    table.write_text(
        "\n".join(["case,weight,site", *(f"p{i},{i},a" for i in range(22))]), encoding="utf-8"
    )
    assert "make groups of them" in checked(settings)[1]  # since it is the default now
    dataset = open_dataset(dataclasses.replace(settings, attributes=("site",)))
    assert {case.stratum for case in dataset.cases} == {UNKNOWN}


BAD_TABLES = {
    "none": (None, "{table}: no such file; write one"),
    "empty": ("", "{table}: has no row"),
    "columns alone": ("case,T-stage\n", "{table}: has no row"),
    "no case": ("id,T-stage\np0,T1", "{table}: must have a column case"),
    "no attribute": ("case,split\np0,", "{table}: must have a column case and one for"),
    "one column twice": ("case,T-stage,T-stage\np0,1,2", "{table}: two columns are called T-stage"),
    "in another code": ("case,T-stage\np0,größer".encode("latin-1"), "{table}: not a readable csv"),
    "in 16 bits": ("case,T-stage\np0,T1".encode("utf-16"), "{table}: not a readable csv"),
    "a quote that stays open": ('case,T-stage\np0,"T1', "{table}: not a readable csv"),
    "a cell too few": ("{rows}\np3", "{table}:5: 1 cells, expected 2 (case, T-stage)"),
    "a cell too many": ("{rows}\np3,T1,x", "{table}:5: 3 cells, expected 2"),
    "no row": ("{rows}", "{table}: no row for case p3"),
    "no such case": ("{rows}\np3,T1\np4,T1", "{table}:6: 'p4' is no case of the folder"),
    "a case twice": ("{rows}\np3,T1\np0,T1", "{table}:6: p0 has a row already, line 2"),
    "upper case": ("{rows}\np3,t1", "{table}: T-stage: 'T1' (line 2) and 't1' (line 5) differ"),
}


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_check_names_what_is_wrong_with_the_table_and_reads_the_volumes_all_the_same(
    tmp_path, fault
):
    settings = nnunet_folder(tmp_path, n=4)
    table = tmp_path / "attributes.csv"
    content, words = BAD_TABLES[fault]
    if content is None:
        table.unlink()
    elif isinstance(content, bytes):
        table.write_bytes(content)
    else:
        table.write_text(
            content.replace("{rows}", "case,T-stage\np0,T1\np1,T2\np2,T1"), encoding="utf-8"
        )
    _at((0, 0, 0), np.nan)(tmp_path / "imagesTr/p1_0000.nii.gz", voxels())
    code, text = checked(settings)
    assert code == 1
    assert f"error: {words.format(table=table)}" in text
    assert f"error: {tmp_path / 'imagesTr/p1_0000.nii.gz'}: 1 voxels are NaN" in text
    assert "2 errors" in text
    with pytest.raises(DataError, match=re.escape(words.format(table=table))):
        open_dataset(settings)


def test_splits_that_contradict_the_folders_are_refused(tmp_path):
    settings = nnunet_folder(tmp_path, n=4)
    (tmp_path / "imagesTs").mkdir()
    for name in ("p2", "p3"):
        image = tmp_path / f"imagesTr/{name}_0000.nii.gz"
        image.rename(tmp_path / f"imagesTs/{name}_0000.nii.gz")
    (tmp_path / "labelsTs").mkdir()
    (tmp_path / "labelsTr/p2.nii.gz").rename(tmp_path / "labelsTs/p2.nii.gz")
    (tmp_path / "labelsTr/p3.nii.gz").unlink()
    table = tmp_path / "attributes.csv"
    table.write_text(
        "case,T-stage,split\np0,T1,tset\np1,T1,train\np2,T1,train\np3,T1,test", encoding="utf-8"
    )
    lines = errors(checked(settings)[1])
    for words in (
        f"{table}:2: p0: split must be train, validation, test or nothing, got 'tset'",
        f"{table}:4: p2: split is train, but its image is in {tmp_path / 'imagesTs'}",
        f"{table}:5: p3: split is test, but it has no label",
    ):
        assert any(line.startswith(f"error: {words}") for line in lines)


def test_check_names_all_that_is_wrong_in_one_run(tmp_path):
    settings = nnunet_folder(tmp_path, n=30)
    bad = [tmp_path / f"imagesTr/p{i}_0000.nii.gz" for i in range(14)]
    for i, path in enumerate(bad):
        (_at((0, 0, 0), np.nan) if i % 2 else BAD_FILES["cut off at once"][0])(path, voxels())
    (tmp_path / "labelsTr/p20.nii.gz").unlink()
    table = tmp_path / "attributes.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("p21,T10", "p21,").replace("p22,T2", "p99,T2"),
        encoding="utf-8",
    )
    code, text = checked(settings)
    assert code == 1
    lines = errors(text)
    assert len(lines) == 18
    for name in (*bad, tmp_path / "labelsTr/p20.nii.gz", f"{table}:24: 'p99'", f"{table}: no row"):
        assert sum(str(name) in line for line in lines) == 1
    assert "warning: T-stage unknown: 1 cases: p21" in text
    with pytest.raises(DataError, match="more; `check` names them all"):
        open_dataset(settings)
