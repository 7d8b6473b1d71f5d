"""The demo: its scores are what they say, and it runs to the end."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from reference_models import fairness
from reference_models.data.mni152 import PROTOCOLS

ROOT = Path(__file__).parent.parent


def test_es_dice_is_what_its_formula_says():
    means, shares = {0: 0.9, 1: 0.6, 2: 0.3}, {0: 0.5, 1: 0.25, 2: 0.25}
    assert fairness.overall(means, shares) == pytest.approx(0.675)
    assert fairness.es_dice(means, shares) == pytest.approx(0.675 / (1 + 0.225 + 0.075 + 0.375))
    with pytest.raises(ValueError, match="groups"):
        fairness.overall({0: 0.9}, shares)


def test_the_demo_runs_to_its_table_figure_and_csv(tmp_path):
    command = [sys.executable, "-m", "reference_models.demo", "--steps", "2", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("ES-Dice", "worst", "shuffled", "does not show", "expert"):
        assert words in done.stdout
    with (tmp_path / "dice.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["protocol"] for row in rows] == list(PROTOCOLS) * 4
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert (tmp_path / "slices.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dice.csv", "slices.png"]
