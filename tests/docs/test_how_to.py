"""What the how-to pages claim beside what their examples print."""

import re
import subprocess
import sys

import pytest
import torch
from test_pages import ROOT, blocks

from dmoe_layer import routing
from reference_models.models import blocks as study
from reference_models.study.quote import quotation
from reference_models.study.results import Results

HOW_TO = ROOT / "docs" / "how-to"


def test_the_film_of_the_page_computes_what_the_study_s_does():
    namespace = {}
    exec(blocks(HOW_TO / "film.md", "python")[0], namespace)
    theirs = study.FiLM(8, study.Membership((3,), "error"))
    ours = namespace["FiLM"](3, 8)
    assert not ours.scale_shift.weight.any()
    with torch.no_grad():
        ours.scale_shift.weight.copy_(theirs.scale_shift.weight.T)
    x_BHWD, site = torch.randn(2, 4, 5, 8), torch.tensor([0, 2])
    with routing(site):
        expected_BHWD = theirs(x_BHWD)
    found_BTD = ours(x_BHWD.flatten(1, 2), site)
    torch.testing.assert_close(found_BTD.view_as(x_BHWD), expected_BHWD)


def test_the_script_for_several_processes_gives_them_the_same_weights(tmp_path):
    page = HOW_TO / "distributed.md"
    (script,), (command,) = blocks(page, "python"), blocks(page, "bash")
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    torchrun, *arguments = command.split()
    assert torchrun == "torchrun"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=tmp_path, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    # Not by its exit code: now and then PyTorch 2.13 aborts a process that ends, since a thread of
    # Gloo still frees what is left of the barrier (github.com/pytorch/pytorch/pull/179291).
    sums = dict(re.findall(r"process (\d): weights sum to ([\d.]+)", run.stdout))
    assert sums.keys() == {"0", "1"}, run.stderr
    assert sums["0"] == sums["1"]


@pytest.mark.parametrize("name", ["film", "unknown-attribute"])
def test_every_number_that_a_page_quotes_is_a_row_of_the_studys_csv(name):
    prose = (HOW_TO / f"{name}.md").read_text(encoding="utf-8")
    quoted = re.findall(
        r"[+-]\.\d{3} \(-?\.\d{3} to -?\.\d{3}; \d of \d\)", " ".join(prose.split())
    )
    assert len(quoted) >= 4
    rows = Results(ROOT / "reference_models" / "study" / "results").differences
    assert {*quoted} <= {quotation(row) for row in rows}


def test_every_error_that_a_page_quotes_is_one_that_the_code_raises():
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    code = "\n".join(re.sub(r'"\s*\n\s*f?"', "", file) for file in files)
    pages = (path.read_text(encoding="utf-8") for path in HOW_TO.glob("*.md"))
    prose = " ".join("\n".join(pages).split())
    quoted = re.findall(r"(?:says|raises|refused:) `([^`]+)`", prose)
    assert len(quoted) >= 4
    assert {text for text in quoted if text not in code} == set()
