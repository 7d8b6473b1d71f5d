"""Cases whose attribute is not known: refused, left out or learned from, or made so on purpose."""

import dataclasses

import pytest
import torch
from harness.trainings import (
    TINY,
    state_of,
)

from reference_models.data import open_dataset
from reference_models.data.cases import Attribute
from reference_models.data.phantom import Phantom
from reference_models.data.splits import make_splits, write_splits
from reference_models.errors import RunError
from reference_models.recipes.networks import UNetSettings
from reference_models.training import loop as training
from reference_models.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cases_without_an_attribute_need_a_router_that_takes_them(tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", epochs=1)
    dataset = open_dataset(recipe.data)
    unknown = make_splits(dataset, 0).train[3]
    dataset.cases = [
        dataclasses.replace(c, attributes=(-1,)) if c.case_id == unknown else c
        for c in dataset.cases
    ]
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    with pytest.raises(
        RunError, match=f"1 cases have an unknown attribute, such as {unknown}, and"
    ):
        train(recipe)
    assert not recipe.out.exists()
    learned = dataclasses.replace(recipe.model, unknown="learned")
    train(dataclasses.replace(recipe, model=learned, fairness="group-dro"))
    weights_G = state_of(recipe.out)["objective"]["weights_G"]
    assert weights_G.shape == (4,)
    assert weights_G[3] > 0


def test_cases_without_an_attribute_can_be_left_out_and_are_named(tmp_path, monkeypatch, capsys):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", epochs=1, leave_out_unknown=True)
    dataset = open_dataset(recipe.data)
    splits = make_splits(dataset, 0)
    left_out = (splits.train[3], splits.validation[0])
    dataset.cases = [
        dataclasses.replace(c, attributes=(-1,)) if c.case_id in left_out else c
        for c in dataset.cases
    ]
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    seen = []
    load = Phantom.load
    monkeypatch.setattr(Phantom, "load", lambda *a: seen.append(a[1].case_id) or load(*a))
    train(recipe)
    printed = capsys.readouterr().out
    assert (
        f"these cases are left out, since an attribute is unknown: {', '.join(sorted(left_out))}"
        in printed
    )
    assert "no training case has" not in printed
    assert not set(left_out) & set(seen)
    assert set(splits.validation[1:]) <= set(seen)


def test_leaving_out_the_unknown_must_leave_a_validation_case(tmp_path, monkeypatch):
    dataset = open_dataset(TINY.data)
    splits = make_splits(dataset, 0)
    write_splits(tmp_path / "splits.json", splits)
    data = dataclasses.replace(TINY.data, splits=tmp_path / "splits.json")
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", data=data, leave_out_unknown=True)
    left_out = splits.validation
    dataset.cases = [
        dataclasses.replace(c, attributes=(-1,)) if c.case_id in left_out else c
        for c in dataset.cases
    ]
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    with pytest.raises(
        RunError,
        match="no validation case is left, since all 2 have an unknown attribute; name other",
    ):
        train(recipe)
    assert not recipe.out.exists()


@pytest.fixture
def two_attributes(monkeypatch):
    """The phantom with a second attribute, which means nothing."""
    dataset = open_dataset(TINY.data)
    dataset.attributes = (*dataset.attributes, Attribute("side", ("left", "right")))
    dataset.cases = [
        dataclasses.replace(case, attributes=(*case.attributes, place % 2))
        for place, case in enumerate(dataset.cases)
    ]
    load = dataset.load

    def loaded(case):
        sample = load(dataclasses.replace(case, attributes=case.attributes[:1]))
        return dataclasses.replace(sample, attributes=case.attributes)

    dataset.load = loaded
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    return {case.case_id: list(case.attributes) for case in dataset.cases}


def test_samples_are_told_to_be_unknown_as_often_as_asked_for_and_groups_stay(
    tmp_path, monkeypatch, two_attributes
):
    told, batches, grouped = [], [], []
    call, step = training.forward_with_attributes, training.Run.step
    forward = training.Objective.forward

    def listening(model, inputs, told_BA):
        told.append(told_BA)
        return call(model, inputs, told_BA)

    def grouping(self, logits, mask, group_B):
        grouped.append(group_B)
        return forward(self, logits, mask, group_B)

    def stepping(self, batch, rate):
        batches.append(batch)
        return step(self, batch, rate)

    monkeypatch.setattr(training, "forward_with_attributes", listening)
    monkeypatch.setattr(training.Objective, "forward", grouping)
    monkeypatch.setattr(training.Run, "step", stepping)
    recipe = dataclasses.replace(
        TINY,
        out=tmp_path / "run",
        model=UNetSettings(widths=(4,), block="film", hidden=1, unknown="learned"),
        attribute_dropout=0.25,
        epochs=20,
    )
    train(recipe)
    told_NA = torch.cat(told)
    truth_NA = torch.tensor([two_attributes[case] for batch in batches for case in batch.case_ids])
    unknown_N = (told_NA == -1).all(1)
    assert len(told_NA) == 20 * 4 * 4
    assert torch.equal(told_NA[~unknown_N], truth_NA[~unknown_N])  # both are dropped, or neither
    # 320 draws of 1/4: 80, with a standard deviation of 7.7.
    assert 80 - 3 * 7.7 < int(unknown_N.sum()) < 80 + 3 * 7.7
    assert len({tuple((part == -1)[:, 0].tolist()) for part in told}) > 5
    assert torch.equal(torch.cat(grouped), truth_NA[:, 0])
