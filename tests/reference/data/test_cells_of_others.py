"""Cells of unknown patients, of other cases and of odd texts are told and never misread."""

import dataclasses

from harness.checks import checked, errors
from harness.image_folders import fairseg_folder, write_npz
from harness.nifti_folders import nnunet_folder

from reference_models.data import open_dataset


def table(root, *lines, n=6):
    """An nnU-Net folder of `n` cases with these lines as its attributes.csv."""
    settings = nnunet_folder(root, n=n)
    (root / "attributes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return settings


ALONE = "each such case counts as a subject of its own"


def test_subjects_that_are_not_known_are_counted_and_told(tmp_path):
    subjects = ["NA", "NA", "one", "one", "", "-1"]
    rows = [f"p{i},A,{subject}" for i, subject in enumerate(subjects)]
    settings = table(tmp_path, "case,site,subject", *rows)
    code, text = checked(settings)
    assert code == 0
    assert (
        "subject: these count as unknown: 1 empty cell, '-1' in 1 cell, 'NA' in 2 cells; "
        f"{ALONE}; if" in text
    )
    own = dataclasses.replace(settings, unknown_texts=("-1",))
    assert [case.subject for case in open_dataset(own).cases[:2]] == ["NA", "NA"]
    assert "'NA'" not in checked(own)[1]
    (tmp_path / "attributes.csv").write_text(
        "\n".join(["case,site", *(f"p{i},A" for i in range(6))]), encoding="utf-8"
    )
    assert ALONE not in checked(settings)[1]  # a csv without subjects says nothing of them


def test_patients_that_are_not_known_are_counted_and_told(tmp_path):
    settings = fairseg_folder(tmp_path)
    assert ALONE not in checked(settings)[1]
    for number, patient in ((1, "NA"), (2, "NA"), (3, 77)):
        write_npz(tmp_path, number, pid=patient)
    code, text = checked(settings)
    assert code == 0
    assert f"pid: these count as unknown: 'NA' in 2 cells; {ALONE}; if" in text


def test_a_row_with_the_exact_name_wins_over_one_with_a_channels(tmp_path):
    settings = table(tmp_path, "case,site", "p0_0001,A", "p0,B", "p1,A", "p2,B", n=3)
    code, text = checked(settings)
    assert code == 1
    (line,) = errors(text)
    assert f"{tmp_path / 'attributes.csv'}:2: the case p0 has a row already, in line 3" in line


def test_cells_that_look_like_markup_are_printed_as_they_are(tmp_path):
    values = ["[unknown]", "[/]", "[red]"] * 2
    rows = [f"p{i},{value}" for i, value in enumerate(values)]
    code, text = checked(table(tmp_path, "case,[b]site[/b]", *rows))
    assert code == 0
    assert "cases by [b]site[/b]" in text
    for value in ("[unknown]", "[/]", "[red]"):
        assert f"│ {value} " in text
