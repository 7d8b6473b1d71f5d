"""attributes.csv is read as spreadsheets write it; what cannot be read is named by its line."""

import dataclasses
import re
import unicodedata

import numpy as np
import pytest
from harness.checks import checked, errors
from harness.nifti_folders import (
    nnunet_folder,
    set_voxel,
    voxels,
)

from reference_models.data import open_dataset
from reference_models.data.cases import UNKNOWN, Attribute
from reference_models.errors import DataError

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
    assert "weight: this column has 22 values, too many for groups, and is left out" in text
    assert "nothing: this column has 0 values" in text
    assert "cases by site" in text
    for name, words in (
        ("weight", "22 values"),
        ("nothing", "no values"),
        ("age", "expected a column age; the attributes in it are "),
    ):
        with pytest.raises(DataError, match=re.escape(f"{table}: ") + ".*" + words):
            open_dataset(dataclasses.replace(settings, attributes=(name,)))
        assert checked(dataclasses.replace(settings, attributes=(name,)))[0] == 1
    with pytest.raises(DataError, match="name each attribute once"):
        open_dataset(dataclasses.replace(settings, attributes=("site", "site")))
    table.write_text(
        "\n".join(["case,weight,site", *(f"p{i},{i},a" for i in range(22))]), encoding="utf-8"
    )
    assert "divide them into 1 to 20 groups" in checked(settings)[1]  # since it is the default now
    dataset = open_dataset(dataclasses.replace(settings, attributes=("site",)))
    assert {case.stratum for case in dataset.cases} == {UNKNOWN}


BAD_TABLES = {
    "none": (None, "{table}: there is no such file; write one"),
    "empty": ("", "{table}: this csv has no row"),
    "columns alone": ("case,T-stage\n", "{table}: this csv has no row"),
    "no case": ("id,T-stage\np0,T1", "{table}: expected a column case"),
    "no attribute": ("case,split\np0,", "{table}: expected a column case and a column for"),
    "one column twice": (
        "case,T-stage,T-stage\np0,1,2",
        "{table}: two columns have the name T-stage",
    ),
    "in another code": ("case,T-stage\np0,größer".encode("latin-1"), "{table}: not a readable csv"),
    "in 16 bits": ("case,T-stage\np0,T1".encode("utf-16"), "{table}: not a readable csv"),
    "a quote that stays open": ('case,T-stage\np0,"T1', "{table}: not a readable csv"),
    "a cell too few": ("{rows}\np3", "{table}:5: this row has 1 cells, expected 2 (case, T-stage)"),
    "a cell too many": ("{rows}\np3,T1,x", "{table}:5: this row has 3 cells, expected 2"),
    "no row": ("{rows}", "{table}: there is no row for case p3"),
    "no such case": ("{rows}\np3,T1\np4,T1", "{table}:6: 'p4' is not a case of the folder"),
    "a case twice": ("{rows}\np3,T1\np0,T1", "{table}:6: the case p0 has a row already, in line 2"),
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
    set_voxel((0, 0, 0), np.nan)(tmp_path / "imagesTr/p1_0000.nii.gz", voxels())
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
        f"{table}:2: p0: split is 'tset', expected train, validation, test, or an empty cell",
        f"{table}:4: p2: its split is train, but its image is in {tmp_path / 'imagesTs'}",
        f"{table}:5: p3: its split is test, but it has no mask",
    ):
        assert any(line.startswith(f"error: {words}") for line in lines)
