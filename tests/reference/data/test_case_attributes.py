"""nnU-Net's cases are told what attributes.csv says of them, or training and prediction refuse."""

import re
import unicodedata

import pytest
import torch

from reference_models.data.case_attributes import CaseAttributes
from reference_models.errors import DataError

CASES = ["p1", "p2", "p3", "p4"]
ROWS = ["p1,B,old", "p2,A,young", "p3,B,", "p4,A,old"]


@pytest.fixture
def csv(tmp_path):
    def write(rows=ROWS, header="case,site,age"):
        path = tmp_path / "attributes.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return write


def refused(text):
    return pytest.raises(DataError, match=re.escape(text))


def test_each_case_has_its_values_in_the_order_that_is_asked_for(csv):
    attributes = CaseAttributes.read(csv(), CASES)
    assert attributes.values == {"site": ["A", "B"]}
    assert attributes.of(["p4", "p1", "p1"]).tolist() == [[0], [1], [1]]
    assert attributes.of(["p4"]).dtype == torch.int64


def test_columns_are_read_in_the_order_in_which_they_are_named(csv):
    attributes = CaseAttributes.read(csv(), CASES, ("age", "site"))
    assert [*attributes.values.items()] == [("age", ["old", "young"]), ("site", ["A", "B"])]
    assert attributes.of(["p1", "p2"]).tolist() == [[0, 1], [1, 0]]


def test_values_keep_the_place_that_the_model_knows_them_by(csv):
    known = {"site": ["C", "B", "A"]}
    attributes = CaseAttributes.read(csv(), CASES, known=known)
    assert attributes.values == known
    assert attributes.of(CASES).tolist() == [[1], [2], [1], [2]]


def test_the_columns_are_those_that_the_model_knows_and_not_the_first(csv):
    attributes = CaseAttributes.read(csv(), ["p1", "p2"], known={"age": ["young", "old"]})
    assert attributes.of(["p1", "p2"]).tolist() == [[1], [0]]


def test_rows_of_other_cases_are_passed_over_with_whatever_they_say(csv):
    path = csv([*ROWS, "p5,Z,old", "p5,,"])
    attributes = CaseAttributes.read(path, ["p1", "p2"], known={"site": ["A", "B"]})
    assert attributes.of(["p1", "p2"]).tolist() == [[1], [0]]
    with refused("1 of 2 cases have an unknown attribute (p5)"):
        attributes.of(["p1", "p5"])


def test_a_case_without_a_row_or_with_two_is_refused(csv):
    with refused("no row for case p9"):
        CaseAttributes.read(csv(), [*CASES, "p9"])
    with refused("p1 has a row already"):
        CaseAttributes.read(csv([*ROWS, "p1,A,old"]), CASES)


def test_a_value_or_column_that_the_model_does_not_know_is_refused(csv):
    with refused("p1: site is 'B', expected one of A, or an empty cell"):
        CaseAttributes.read(csv(), CASES, known={"site": ["A"]})
    with refused("expected a column scanner; the attributes in it are site, age"):
        CaseAttributes.read(csv(), CASES, known={"scanner": ["1"]})


def test_an_unknown_attribute_is_refused_where_its_case_is_asked_for(csv):
    attributes = CaseAttributes.read(csv(), CASES, ("age",))
    assert attributes.of(["p1", "p4"]).tolist() == [[0], [0]]
    with refused("1 of 2 cases have an unknown attribute (p3)"):
        attributes.of(["p1", "p3"])


def test_a_fold_trains_on_every_value_of_every_attribute(csv):
    attributes = CaseAttributes.read(csv(), CASES, ("site", "age"))
    attributes.require_trained(["p1", "p2"])
    with refused("no training case of this fold has age young"):
        attributes.require_trained(["p1", "p4"])


def test_accents_may_be_taken_apart_in_the_names_of_files(csv):
    apart = unicodedata.normalize("NFD", "jérôme")
    attributes = CaseAttributes.read(csv(["jérôme,A,old", "p2,B,old"]), [apart, "p2"])
    assert attributes.of([apart]).tolist() == [[0]]


def test_another_case_whose_name_ends_like_a_channel_is_not_taken_for_the_case(csv):
    path = csv(["pat_0001,A,old", "pat,B,young"])
    attributes = CaseAttributes.read(path, ["pat"], known={"site": ["A", "B"]})
    assert attributes.of(["pat"]).tolist() == [[1]]
    with refused("no row for case pat"):
        CaseAttributes.read(csv(["pat_0001,A,old"]), ["pat"], known={"site": ["A", "B"]})


def test_a_column_that_the_model_does_not_use_refuses_nothing(csv):
    path = csv(["p1,Male,old", "p2,male,young"], header="case,sex,age")
    attributes = CaseAttributes.read(path, ["p1", "p2"], known={"age": ["young", "old"]})
    assert attributes.of(["p1", "p2"]).tolist() == [[1], [0]]
