"""The commands that pages show: their modules are there, and the benchmarks' take the flags."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"]
SHOWN += (ROOT / "reference_models").rglob("*.md")
PARSERS = {
    "benchmarks": "benchmarks.layer.command",
    "benchmarks.growth": "benchmarks.growth.command",
    "benchmarks.volumes": "benchmarks.volumes.command",
    "benchmarks.export": "benchmarks.export.command",
    "benchmarks.kernels": "benchmarks.kernels.__main__",
}


def of_benchmarks():
    """The command lines that start or stand in a line of a block, without their comments."""
    for page in SHOWN:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in "".join(blocks).splitlines():
            for module, words in re.findall(r"python -m (benchmarks[\w.]*)([^#;]*)", line):
                yield pytest.param(module, words, id=f"{module}{words.rstrip()}")


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_modules_that_a_page_runs_are_there(page):
    for module in re.findall(
        r"python -m ((?:benchmarks|reference_models)[\w.]*)", page.read_text(encoding="utf-8")
    ):
        name = module.rstrip(".")
        found = importlib.util.find_spec(name)
        assert found, name
        if found.submodule_search_locations:
            assert importlib.util.find_spec(f"{name}.__main__"), name


@pytest.mark.parametrize(("module", "words"), [*of_benchmarks()])
def test_the_benchmarks_commands_have_the_flags_that_there_are(module, words):
    parser = importlib.import_module(PARSERS[module])._parser()
    parser.parse_args(shlex.split(words.replace("$n", "1")))
