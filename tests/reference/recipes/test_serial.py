"""Settings as json and back: what comes back, and what is refused."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from reference_models.data import DataSettings
from reference_models.errors import RunError
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings, UNetSettings
from reference_models.recipes.presets import PRESETS
from reference_models.recipes.recipe import Recipe, resolve
from reference_models.recipes.serial import flat, from_json, to_json


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_comes_back_from_json_as_it_was(name):
    recipe = resolve(PRESETS[name])
    recipe = dataclasses.replace(recipe, patience=3, out=Path("a/b"))
    assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


@dataclass(frozen=True)
class DeeperSettings(UNetSettings):
    """A network's settings that no recipe knows of, as the study has them."""

    depth: int = 2


VOLUMES = Recipe(DataSettings("folder"), ResUNet3DSettings(), VolumeFramingSettings())


@pytest.mark.parametrize("model", [UNetSettings(k=3), DeeperSettings(k=3)], ids=type)
def test_json_says_of_which_class_settings_are_also_one_from_elsewhere(model):
    recipe = Recipe(DataSettings("phantom"), model)
    content = json.loads(json.dumps(to_json(recipe)))
    assert content["model"]["kind"] == type(model).__name__
    assert content["framing"]["kind"] == "ImageFramingSettings"
    back = from_json(Recipe, content)
    assert back == recipe
    assert type(back.model) is type(model)
    assert flat(content)["model.kind"] == type(model).__name__


@pytest.mark.parametrize("kind", [None, "SquareSettings", "TransUNetSettings"])
def test_settings_of_no_class_or_another_one_are_refused(kind):
    content = to_json(VOLUMES)
    content["framing"]["kind"] = kind
    if kind is None:  # as an earlier version wrote it
        del content["framing"]["kind"]
    words = (
        rf"^run.json: recipe.framing.kind: got {kind!r}, expected one of ImageFramingSettings, "
        "VolumeFramingSettings; perhaps another version .* wrote it.* Or its network belongs to a "
        "program that is not loaded here, such as the study"
    )
    with pytest.raises(RunError, match=words):
        from_json(Recipe, content, "run.json: recipe")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed", True),
        ("seed", 1.0),
        ("seed", "1"),
        ("learning_rate", True),
        ("learning_rate", "0.1"),
        ("leave_out_unknown", 1),
        ("leave_out_unknown", "yes"),
        ("patience", "None"),
        ("schedule", "linear"),
        ("out", 3),
        ("out", None),
        ("data.root", 3),
        ("data.attributes", "age"),
        ("data.attributes", [3]),
        ("model.stages", [1, 2.0]),
        ("model.stages", {"1": 2}),
        ("framing.spacing", [1.0, 2.0]),
        ("framing.spacing", "mean"),
        ("framing.patch", [32, 32, True]),
        ("model.weights", 0),
        ("data", ["phantom"]),
        ("model", "UNetSettings"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(setting, value):
    content = to_json(VOLUMES)
    place = content
    *rooms, name = setting.split(".")
    for room in rooms:
        place = place[room]
    place[name] = value
    with pytest.raises(RunError, match=rf"^run.json: recipe.{setting}: got "):
        from_json(Recipe, content, "run.json: recipe")


def test_whole_numbers_stand_for_fractions_and_lists_for_tuples():
    content = to_json(VOLUMES)
    content["learning_rate"] = 1
    content["framing"]["spacing"] = [1, 2, 3]
    back = from_json(Recipe, content)
    assert (back.learning_rate, back.framing.spacing) == (1.0, (1.0, 2.0, 3.0))
    assert {type(size) for size in (back.learning_rate, *back.framing.spacing)} == {float}


def test_mappings_come_back_and_name_what_is_wrong_in_them():
    @dataclass
    class Shares:
        by_value: Mapping[str, tuple[float, ...]]

    shares = Shares({"a": (0.5, 1.0), "b": ()})
    assert from_json(Shares, json.loads(json.dumps(to_json(shares)))) == shares
    with pytest.raises(RunError, match=r"^shares\.by_value\.b: got 'none'"):
        from_json(Shares, {"by_value": {"a": [1], "b": ["none"]}}, "shares")


@pytest.mark.parametrize("value", ["seed", ["seed"], 3, None])
def test_what_is_no_mapping_is_no_settings(value):
    @dataclass
    class Seeded:
        seed: int

    words = rf"^seeded: got {re.escape(repr(value))}, expected settings by name; perhaps another"
    with pytest.raises(RunError, match=words):
        from_json(Seeded, value, "seeded")
