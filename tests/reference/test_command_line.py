"""The commands, as a user types them: from check to report, and what they say when they cannot."""

import csv
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from reference_models.__main__ import main
from reference_models.data import example

ROOT = Path(__file__).parents[2]
# As small as still has every group in every split.
PHANTOM = ["--data", "phantom", "--phantom.cases", "30", "--phantom.test-cases-per-group", "2"]
PHANTOM += ["--phantom.image-size", "32"]
RUN = ["train", "small", *PHANTOM, "--size", "32", "--epochs", "1", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "phantom"
    assert main([*RUN, "--out", str(folder)]) == 0
    return folder


def test_the_studys_preset_trains_and_is_scored(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--size", "32", "--epochs", "1", "--block", "film", "--hidden", "2"]
    flags += ["--unknown", "learned", "--attribute-dropout", "0.2", "--fairness", "reweight"]
    assert main(["train", "study", *PHANTOM, *flags, "--out", str(out)]) == 0
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    assert (recipe["model"]["block"], recipe["model"]["hidden"]) == ("film", 2)
    assert (recipe["attribute_dropout"], recipe["fairness"]) == (0.2, "reweight")
    assert main(["evaluate", "run", "--run", str(out), "--resamples", "100"]) == 0
    summary = json.loads((out / "evaluation-test" / "summary.json").read_text(encoding="utf-8"))
    scored = [c["name"] for c in summary["conditions"] if c["scores"]]
    assert scored == ["as given", "shuffled", "wrong", "unknown"]
    assert main(["predict", "--run", str(out)]) == 0


@pytest.mark.parametrize("flag", ["--block", "--hidden", "--widths", "--n-experts"])
def test_the_studys_flags_are_those_of_its_preset_alone(flag, capsys):
    for preset in ("paper", "small", "small3d"):
        with pytest.raises(SystemExit):
            main(["train", preset, "--help"])
        assert flag not in re.findall(r"--[\w-]+", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["train", "study", "--help"])
    offered = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert flag in offered
    assert not {"--moe", "--variant", "--stages"} & {*offered}
    # What the study tried and no user needs.
    tried = {"--merge", "--modulate", "--film-identity", "--router", "--placement"}
    assert not tried & {*offered}


def test_check_counts_the_cases_of_each_group_and_split(capsys):
    assert main(["check", *PHANTOM]) == 0
    printed = capsys.readouterr().out
    assert "site 3" in printed
    assert "no errors" in printed


def test_a_run_is_scored_predicted_and_scored_again_from_its_masks(run, tmp_path, capsys):
    assert main(["evaluate", "run", "--run", str(run), "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    assert f"report: {run / 'evaluation-test' / 'report.html'}" in printed
    assert printed.count("Groups served exactly alike would show a gap") == 2  # one a region
    assert main(["predict", "--run", str(run), "--out", str(tmp_path / "predicted")]) == 0
    masks, again = tmp_path / "predicted" / "masks", tmp_path / "again"
    scored = ["--folder", str(masks), *PHANTOM, "--out", str(again), "--resamples", "100"]
    assert main(["evaluate", "predictions", *scored]) == 0
    assert f"report: {again / 'report.html'}" in capsys.readouterr().out
    of_run, of_masks = run / "evaluation-test", again
    assert (of_run / "cases.csv").read_bytes() == (of_masks / "cases.csv").read_bytes()
    with (of_run / "cases.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6 * 2  # regions
    summaries = [
        json.loads((f / "summary.json").read_text(encoding="utf-8")) for f in (of_run, of_masks)
    ]
    as_given = [summary["conditions"][0]["scores"] for summary in summaries]
    assert as_given[0] == as_given[1]
    assert "<html" in (of_run / "report.html").read_text(encoding="utf-8")
    assert Image.open(next((tmp_path / "predicted" / "overlays").iterdir())).mode == "RGB"


def test_all_cases_are_predicted_of_data_that_the_runs_splits_do_not_name(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    splits = json.loads((other / "splits.json").read_text(encoding="utf-8"))
    splits["test"] = ["a case that is elsewhere"]
    (other / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    assert main(["predict", "--run", str(other)]) == 1
    assert main(["predict", "--run", str(other), "--split", "all"]) == 0
    assert len([*(other / "predictions-all" / "masks").iterdir()]) == 30 + 3 * 2


def test_a_run_goes_on_by_the_same_command_with_resume(run, capsys):
    before = {path: path.read_bytes() for path in run.glob("*/model.safetensors")}
    assert main([*RUN, "--out", str(run)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*RUN, "--out", str(run), "--resume"]) == 0
    assert main([*RUN, "--out", str(run), "--resume", "--learning-rate", "0.1"]) == 1
    assert "learning_rate" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.glob("*/model.safetensors")}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "--data", "fairseg"], "root"),
        (["train", "paper", "--data", "phantom", "--out", "{tmp}/run"], "epochs"),
        (["evaluate", "run", "--run", "{tmp}"], "no run here"),
        (["predict", "--run", "{tmp}/missing"], "no run here"),
        (["evaluate", "predictions", "--folder", "{tmp}", *PHANTOM, "--out", "{tmp}/e"], "{tmp}"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_and_nothing_is_written(
    arguments, told, tmp_path, capsys
):
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr()
    assert told.format(tmp=tmp_path) in error.err + error.out
    assert "Traceback" not in error.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("encoding", "bullet", "name"),
    [
        ("ascii", r"\u2022", r"\u6d4b\udcff"),
        ("cp1252", "•", r"\u6d4b\udcff"),
        ("utf-8", "•", r"测\udcff"),
    ],
)
def test_what_a_pipe_has_no_letter_for_is_printed_all_the_same(
    tmp_path, monkeypatch, encoding, bullet, name
):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", pipe)
    assert main(["check", "--data", "folder", "--root", str(tmp_path / "测\udcff")]) == 1
    with pytest.raises(SystemExit):
        main(["--help"])
    pipe.flush()
    printed = pipe.buffer.getvalue().decode(encoding)
    assert name in printed
    assert f"{bullet} train" in printed


def test_an_unknown_flag_is_refused_with_what_there_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "small", "--learnign-rate", "1"])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def commands_shown():
    """Every command line of the recipes that README.md and the pages show, as a reader types it."""
    pages = [
        ROOT / "README.md",
        ROOT / "reference_models/README.md",
        ROOT / "reference_models/demo/results/README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
    for page in sorted(pages):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(
            r"^ *python -m reference_models (.+?)\s*(?:\s#.*)?$", text, re.MULTILINE
        ):
            if "--help" not in command:
                yield pytest.param(command, id=f"{page.relative_to(ROOT).as_posix()}: {command}")


@pytest.mark.parametrize("command", [*commands_shown()])
def test_the_commands_that_pages_show_have_the_flags_that_there_are(command, monkeypatch):
    called = []
    for name in (
        "__main__.check",
        "__main__.train",
        "evaluation.evaluate.evaluate_run",
        "evaluation.evaluate.evaluate_predictions",
        "__main__.predict",
        "__main__.export",
        "__main__.demo",
        "__main__.study",
    ):
        command_name = name.split(".")[-1].split("_")[0]
        monkeypatch.setattr(
            f"reference_models.{name}",
            lambda *a, name=command_name, **k: called.append(name) or 0,
        )
    monkeypatch.setattr(
        "reference_models.__main__.cross_validate",
        lambda recipe: called.append("cross-validate") or (recipe.out, None),
    )
    monkeypatch.setattr("reference_models.__main__.findings", lambda summary: ())
    monkeypatch.setattr(example, "write_example", lambda out: called.append("example") or out)
    monkeypatch.setattr(
        "reference_models.__main__.convert", lambda settings: called.append("convert") or []
    )
    assert main(shlex.split(command)) == 0
    assert called == [command.split()[0]]


def test_the_readmes_commands_train_a_network_and_report_it_by_group(tmp_path, monkeypatch, capsys):
    """As they stand there, one after another, on small images for one epoch."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    train, evaluate = re.findall(r"^python -m reference_models (.+)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(train), "--epochs", "1", "--size", "32"]) == 0
    assert main([*shlex.split(evaluate), "--resamples", "100"]) == 0
    report = re.search(r"^report: (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert Path(report).parts[:2] == ("runs", "brain")
    written = Path(report).read_text(encoding="utf-8")
    assert all(f"protocol: {group}" in written for group in ("brain", "grey matter"))


def test_a_stopped_command_says_so_without_a_traceback(monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("reference_models.__main__.train", stopped)
    assert main(["train", "small"]) == 130
    assert (
        "Stopped. To go on, give the same command again; add --resume to train."
        in capsys.readouterr().err
    )
