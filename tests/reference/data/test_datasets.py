"""The table of data sets: the command line, its help and the errors say what stands in it."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tyro
from harness.checks import checked
from harness.image_folders import fairseg_folder, ham_folder
from harness.nifti_folders import nnunet_folder

from reference_models.data import DataSettings, PhantomSettings, open_dataset
from reference_models.data.datasets import DATASETS, FORMER_NAMES, find_axes, unused_settings
from reference_models.errors import DataError


def test_settings_take_the_tables_names_and_the_help_tells_its_attributes(capsys):
    assert set(get_args(get_type_hints(DataSettings)["data"])) == DATASETS.keys() | FORMER_NAMES
    with pytest.raises(SystemExit):
        tyro.cli(DataSettings, args=["--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, source in DATASETS.items():
        if source.attributes:
            assert "the first of these is used:" in text
            assert f"- {name}: {', '.join(source.attributes)}." in text


def test_the_tables_axes_are_those_of_the_data_sets(tmp_path):
    (tmp_path / "fairseg").mkdir()
    folders = {
        "fairseg": fairseg_folder(tmp_path / "fairseg"),
        "ham10000": ham_folder(tmp_path)[0],
        "folder": nnunet_folder(tmp_path / "folder"),
    }
    for name, source in DATASETS.items():
        settings = folders[name] if source.needs_root else DataSettings(name)
        assert open_dataset(settings).axes == find_axes(settings), name


def test_settings_that_are_another_data_sets_alone_are_known_as_such():
    others = ("data.mni152", "data.mni152_normalised", "data.phantom")
    assert unused_settings("folder") == others
    assert unused_settings("fairseg") == (*others, "data.ct_window")
    names = {f"data.{field.name}" for field in dataclasses.fields(DataSettings)}
    assert {*unused_settings("phantom")} < names


def test_a_data_set_needs_a_folder_or_takes_none_as_the_table_says(tmp_path):
    for name, source in DATASETS.items():
        words = f"the files of {name};" if source.needs_root else f"{name} is not read from files"
        with pytest.raises(DataError, match=words):
            open_dataset(DataSettings(name, tmp_path / "none" if source.needs_root else tmp_path))
    with pytest.raises(DataError, match="got 'fairsag', expected one of fairseg, ham10000"):
        open_dataset(DataSettings("fairsag"))


def test_attributes_are_named_once_and_are_the_tables(tmp_path):
    for name, source in DATASETS.items():
        if not source.needs_root:
            continue
        twice = (source.attributes[0] if source.attributes else "T-stage",) * 2
        with pytest.raises(
            DataError, match=f"got {twice[0]}, {twice[0]}.* each once|name each attribute once"
        ):
            open_dataset(DataSettings(name, tmp_path, twice))
        if source.attributes:
            with pytest.raises(
                DataError, match=f"{name} has {', '.join(source.attributes)}; name some"
            ):
                open_dataset(DataSettings(name, tmp_path, ("rase",)))


def test_what_takes_seconds_to_import_waits_until_it_is_needed():
    code = "import sys, reference_models.data; print('nilearn' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, cwd=root, encoding="utf-8"
    )
    assert done.stdout.strip() == "False"


def test_settings_that_fit_no_data_set_are_refused(tmp_path):
    for settings, words in (
        (DataSettings("fairseg"), "root"),
        (DataSettings("fairseg", tmp_path / "nowhere"), "nowhere"),
        (DataSettings("fairseg", tmp_path), "no .npz file"),
        (DataSettings("ham10000", tmp_path), "expected HAM10000_metadata .* a train.csv"),
        (DataSettings("phantom", tmp_path), "leave --root out"),
        (DataSettings("mni152", attributes=("race",)), "protocol"),
        (DataSettings("fairseg", tmp_path, ("rase",)), "race, gender"),
        (DataSettings("phantom", phantom=PhantomSettings(shares=(0.5, 0.4))), "add up to 1"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(settings)
        assert checked(settings)[0] == 1
    fairseg_folder(tmp_path, race=None)
    with pytest.raises(DataError, match="no file has the attribute race"):
        open_dataset(DataSettings("fairseg", tmp_path))
