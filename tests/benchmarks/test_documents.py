"""The page that sums up the benchmarks quotes what the committed results have."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks.output import README, RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "benchmarks.md"


def table(heading):
    """The first table below a heading: its cells by line."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line
    ]


def timed(file):
    """By shape, provider and pass, the rows that were timed."""
    with (RESULTS / file).open(newline="", encoding="utf-8") as rows:
        return {
            (
                "×".join(row[key] for key in ("batch", "tokens", "dim")),
                row["provider"],
                row["which"],
            ): row
            for row in csv.DictReader(rows)
            if row["median_ms"]
        }


def test_shares_of_the_mask_loop_are_those_of_the_committed_rows():
    header, *lines = table("Beside the paper's code")
    assert len(lines) == 7
    sets = {"AVX-512": timed("cpu-avx512-float32.csv"), "AVX2": timed("cpu-avx2-float32.csv")}
    passes = {"forward": "forward", "step": "forward+backward"}
    for shape, *cells in lines:
        for title, cell in zip(header[1:], cells, strict=True):
            what, _, name = title.partition(", ")
            key, which = (
                ("peak_bytes", "step") if what.startswith("memory") else ("median_ms", what)
            )
            ours, loop = (
                float(sets[name][shape, provider, passes[which]][key])
                for provider in ("eager", "mask-loop")
            )
            assert f"{100 * ours / loop:.0f}" == cell, (shape, title)


@pytest.mark.parametrize(("line", "shape"), [(1, "2d"), (2, "stage-0"), (3, "stage-0-wide")])
def test_predictions_are_those_of_the_benchmarks_page(line, shape):
    predicted = README.read_text(encoding="utf-8").partition("<!-- predicted: begin -->")[2]
    (found,) = re.findall(
        rf"^\| {shape} \| [\d.]+ \| ((?:[\d.]+ \|? ?)+)$", predicted, re.MULTILINE
    )
    assert table("A GPU: predictions only")[line][1:] == re.findall(r"[\d.]+", found)
