"""No cell of a csv is misread: identifiers are text, and what is merged or unknown is said."""

import dataclasses
import json
import unicodedata

import pytest
from harness.checks import checked, errors
from harness.image_folders import ham_folder
from harness.nifti_folders import nnunet_folder

from reference_models.data import open_dataset
from reference_models.data.cases import UNKNOWN
from reference_models.errors import DataError


def table(root, *lines, n=6):
    """An nnU-Net folder of `n` cases with these lines as its attributes.csv."""
    settings = nnunet_folder(root, n=n)
    (root / "attributes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return settings


@pytest.mark.parametrize(
    "subjects",
    [
        [f"10000000000000000{i}" for i in range(6)],  # one float all of them
        ["1.1", "1.10", "1.100", "2.0", "2.00", "2"],
        ["01", "001", "1", "1e0", "1.", "+1"],
    ],
)
def test_subjects_are_compared_as_text(tmp_path, subjects):
    rows = [f"p{i},A,{subject}" for i, subject in enumerate(subjects)]
    settings = table(tmp_path, "case,site,subject", *rows)
    assert [case.subject for case in open_dataset(settings).cases] == subjects


def test_subjects_that_a_person_may_take_for_one_are_kept_apart_and_told(tmp_path):
    subjects = ["01", "1", "p7", "P7", "9", "1.2E+17"]
    rows = [f"p{i},A,{subject}" for i, subject in enumerate(subjects)]
    code, text = checked(table(tmp_path, "case,site,subject", *rows))
    assert code == 0
    assert (
        "warning: subject: these count as different, since their texts differ: '01' and '1', "
        "'P7' and 'p7'\n" in text
    )
    assert "warning: subject: 1.2E+17: a spreadsheet may have rounded long numbers" in text


def test_lesions_are_compared_as_text_too(tmp_path):
    lesions = [f"0{i // 6}" if i % 2 else f"{i // 6}" for i in range(12)]
    settings, _ = ham_folder(tmp_path, lesion_id=lesions)
    assert {case.subject for case in open_dataset(settings).cases} == {"0", "00", "1", "01"}
    assert "lesion_id: these count as different" in checked(settings)[1]


def test_whole_numbers_are_one_value_however_written_and_fractions_are_text(tmp_path):
    entries = ["3", "3.0", "03", "1.1", "1.10", "x"]
    settings = table(tmp_path, "case,grade", *(f"p{i},{text}" for i, text in enumerate(entries)))
    dataset = open_dataset(settings)
    assert dataset.attributes[0].values == ("1.1", "1.10", "3", "x")
    assert [case.attributes[0] for case in dataset.cases] == [2, 2, 2, 0, 1, 3]
    said = "grade: '03' and '3' and '3.0' count as one value, 3\n"
    assert said in checked(settings)[1]


def test_check_quotes_what_it_took_for_unknown_and_the_flag_says_otherwise(tmp_path):
    entries = ["none", "None", "arterial", "", "venous", "unknown"]
    settings = table(tmp_path, "case,phase", *(f"p{i},{text}" for i, text in enumerate(entries)))
    code, text = checked(settings)
    assert code == 0
    assert (
        "phase: these count as unknown: 1 empty cell, 'None' in 1 cell, 'none' in 1 cell, "
        "'unknown' in 1 cell; if 'None' or 'none' is a value in your data, give the other texts by "
        "--unknown-texts"
    ) in text
    own = dataclasses.replace(settings, unknown_texts=("nan",))
    with pytest.raises(
        DataError, match=r"'none' .* and 'None' .* differ only in upper and lower case"
    ):
        open_dataset(own)
    path = tmp_path / "attributes.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("None", "none"), encoding="utf-8")
    dataset = open_dataset(own)
    assert dataset.attributes[0].values == ("arterial", "none", "venous")
    # The word that stands for unknown on every page here cannot be a value.
    assert [case.attributes[0] for case in dataset.cases] == [1, 1, 0, UNKNOWN, 2, UNKNOWN]
    assert "'none'" not in checked(own)[1]


def test_photographs_take_the_same_list_and_quote_rare_sites(tmp_path):
    sites = ["ear", "ear", "N/A", *["Back"] * 9]
    settings, _ = ham_folder(tmp_path, localization=sites, Sex=["NULL", *"MF" * 5, "F"])
    text = checked(settings)[1]
    assert (
        "localization: these count as unknown: 'N/A' in 1 cell, 'ear' in 2 cells; if 'N/A' is a "
        "value "
    ) in text
    assert "sex: these count as unknown: 'NULL' in 1 cell" in text
    strict = dataclasses.replace(settings, unknown_texts=())
    text = checked(strict)[1]
    assert len(errors(text)) == 2  # N/A is no site and NULL no sex
    assert "'ear' in 1 cell\n" in text  # of the rows that are left; the flag would not change it


WAYS = {
    "sep=": ["sep=;", "case;site", "p0;A", "p1;B"],
    "comments": ["# of 2024, by hand", "case,site", "p0,A", '# "p9,B', "p1,B"],
    "both": ["SEP=\t", "# x", "case\tsite", "p0\tA", "p1\tB"],
    "a separator in the first name": ['case,"site; of; scan"', "p0,A", "p1,B"],
    "sep= of another program": ["sep=;,", "case,site", "p0,A", "p1,B"],
    "sep= with separators behind": ["sep=;,", "case;site", "p0;A", "p1;B"],
    "commas in the last name": ["case;site (clinical, path, x)", "p0;A", "p1;B"],
    "commas in cells of tabs": ["case\tsite\tage, sex, b", "p0\tA\tx, y", "p1\tB\t"],
    "as many commas throughout": ["case;site;at a, b, c", "p0;A;1,2,3", "p1;B;1,2,3"],
    "quotes that commas would break": ["case;site, now", '"p0";"A"', '"p1";"B"'],
    "two lines in a cell": ['case,site,"remark', '# of"', 'p0,A,"x', '#y"', "p1,B,"],
}


@pytest.mark.parametrize("way", WAYS)
def test_lines_that_are_no_rows_are_passed_over(tmp_path, way):
    dataset = open_dataset(table(tmp_path, *WAYS[way], n=2))
    assert dataset.attributes[0].values == ("A", "B")
    assert [case.attributes[0] for case in dataset.cases] == [0, 1]
    commented = any("begin" in note and "#" in note for note in dataset.notes)
    assert commented == (way in ("comments", "both"))


NO_TABLES = {
    "an Excel workbook": b"PK\x03\x04" + bytes(40),
    "an Excel workbook, expected": b"\xd0\xcf\x11\xe0" + bytes(40),
    "packed by gzip": b"\x1f\x8b\x08" + bytes(40),
    "text in UTF-16, expected text in UTF-8": "case,site\np0,A\n".encode("utf-16"),
    "text in UTF-16": b"\xfe\xff" + "case,site\np0,A\n".encode("utf-16-be"),
    "zero bytes, as text in UTF-16": "case,site\np0,A\n".encode("utf-16-le"),
}


@pytest.mark.parametrize("words", NO_TABLES)
def test_what_is_no_text_is_called_what_it_is(tmp_path, words):
    settings = table(tmp_path, "case,site")
    (tmp_path / "attributes.csv").write_bytes(NO_TABLES[words])
    (line,) = errors(checked(settings)[1])
    assert words in line
    assert "codec" not in line


ONE_ERROR = {
    "columns behind a #": (
        ["#case,site", "p0,A", "p1,B", "p2,B"],
        "'#case,site' is ignored, since",
    ),
    "a row cut short": (
        ["case,site", "p0,A", "p1", "p2,B"],
        ":3: this row has 1 cells, expected 2",
    ),
    "every row cut short": (
        ["case,site,age", "p0,A", "p1,B", "p2,B"],
        ":2: this row has 2 cells, expected 3",
    ),
    "another cohort": (["case,site", "x0,A", "x1,B", "x2,B"], "none of its 3 rows names a case"),
    "no column of cases": (["id,site", "p0", "p1", "p2"], "expected a column case"),
    "a zero lost": (["case,site", "00,A", "p1,B", "p2,B"], "write 0 if you mean that case"),
    "rows missing": (["case,site", "p1,A"], "no row for 2 cases: p0, p2"),
}


@pytest.mark.parametrize("mistake", ONE_ERROR)
def test_one_mistake_in_a_table_is_one_error_and_no_consequence(tmp_path, mistake):
    lines, words = ONE_ERROR[mistake]
    settings = table(tmp_path, *lines, n=3)
    if mistake == "a zero lost":
        for path in tmp_path.glob("*Tr/p0*"):
            path.rename(path.with_name(path.name.replace("p0", "0")))
    code, text = checked(settings)
    assert code == 1
    lines = errors(text)
    assert words in lines[0]
    assert all("cells, expected" in line for line in lines[1:])
    assert len(lines) == (3 if mistake == "every row cut short" else 1)
    assert "has no values" not in text


def test_a_row_cut_short_of_a_photograph_is_no_case_of_unknown_age(tmp_path):
    settings, _ = ham_folder(tmp_path)
    path = settings.root / "split/new_train.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].rsplit(",", 3)[0]]), encoding="utf-8")
    (line,) = errors(checked(settings)[1])
    assert f"{path}:9: this row has 5 cells, expected 8" in line
    ids = [f"ISIC_{i:07}" for i in range(12)]
    content = {"dataset": "ham10000", "seed": 0}
    content |= {"train": ids[:8], "validation": ids[8:10], "test": ids[10:]}
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps(content), encoding="utf-8")
    assert errors(checked(dataclasses.replace(settings, splits=splits))[1]) == [line]


@pytest.mark.parametrize(("in_file", "in_table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_may_be_written_in_two_ways_in_photographs_and_values(tmp_path, in_file, in_table):
    name = unicodedata.normalize(in_table, "Zoé")
    settings, _ = ham_folder(tmp_path)
    for path in settings.root.glob("HAM10000_*/ISIC_0000003*"):
        new = path.name.replace("ISIC_0000003", unicodedata.normalize(in_file, "Zoé"))
        path.rename(path.with_name(new))
    path = settings.root / "split/new_train.csv"
    path.write_text(
        path.read_text(encoding="utf-8").replace("ISIC_0000003", name), encoding="utf-8"
    )
    assert checked(settings)[0] == 0
    volumes = table(tmp_path / "v", f"case,{name}", f"p0,{name}", "p1,Zoé", n=2)
    chosen = dataclasses.replace(volumes, attributes=(unicodedata.normalize(in_file, "Zoé"),))
    assert open_dataset(chosen).attributes[0].values == ("Zoé",)


def test_a_column_that_names_patients_is_pointed_out(tmp_path):
    rows = [f"p{i},A,n{i}" for i in range(22)]
    text = checked(table(tmp_path, "case,site,patient", *rows, n=22))[1]
    assert (
        "patient: this column has 22 values, too many for groups, and is left out. If it names "
        "patients" in text
    )
