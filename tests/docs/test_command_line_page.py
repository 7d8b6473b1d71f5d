"""The page of the command line holds every flag of every command, as the commands have them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from docs import command_line
from reference_models.__main__ import COMMANDS, main

SOURCE = Path(__file__).parent.parent.parent / "docs" / command_line.PAGE


@pytest.fixture(scope="module")
def page():
    page = SimpleNamespace(file=SimpleNamespace(src_uri=command_line.PAGE))
    return command_line.on_page_markdown(SOURCE.read_text(encoding="utf-8"), page)


def section(page, title):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def listed(text):
    """The flags in the first column of tables."""
    cells = re.findall(r"^\| ((?:`--[\w.-]+` ?)+)\|", text, re.MULTILINE)
    return set(re.findall(r"`(--[\w.-]+)`", " ".join(cells)))


def helped(capsys, command):
    """The flags that --help shows, each at the start of its line."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    starts = re.findall(r"^[^\w-]*((?:--[a-z][\w.-]*(?:, )?)+)", text, re.MULTILINE)
    return set(re.findall(r"--[\w.-]+", " ".join(starts))) - {"--help"}


def test_every_command_has_a_section(page):
    for command in COMMANDS:
        assert re.search(rf"^## {command}\b", page, re.MULTILINE), command
    assert "<!--" not in page


@pytest.mark.parametrize(
    "command", ["convert", "evaluate run", "predict", "export", "demo", "example", "study"]
)
def test_a_section_lists_the_flags_that_help_shows(command, page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert listed(section(page, command)) == helped(capsys, command) != set()


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        ("check", ["The data { #data }"]),
        ("train", ["The data { #data }", "train"]),
        ("evaluate predictions", ["The data { #data }", "evaluate predictions"]),
    ],
)
def test_tables_that_commands_share_are_complete_together(command, sections, page):
    together = set.union(*(listed(section(page, title)) for title in sections))
    assert together == {name for flag in command_line.flags(command) for name in flag.names}


def test_cross_validation_takes_what_the_page_says():
    of_train, of_all = (command_line.flags(c) for c in ("train", "cross-validate"))
    assert {f.names for f in of_train} - {f.names for f in of_all} == {("--resume", "--no-resume")}
    assert of_all.keys() <= of_train.keys()


def test_the_default_of_every_preset_is_shown(page):
    rows = re.findall(r"^\| `--learning-rate` \| (.*) \|$", page, re.MULTILINE)
    defaults = next(
        d for f, d in command_line.flags("train").items() if "--learning-rate" in f.names
    )
    assert " | ".join(defaults.values()) in rows
    assert len({*defaults.values()}) > 2


@pytest.mark.parametrize(
    ("metavar", "words"),
    [
        ("PATH", "a path"),
        ("{None}|INT|{all}", "a whole number or `all`"),
        ("{None}|{[INT [INT ...]]}", "whole numbers"),
        ("PATH|{[PATH [PATH ...]]}", "paths"),
        ("FLOAT FLOAT FLOAT|{median}", "3 numbers or `median`"),
        ("{paper,whole}|INT", "`paper` or `whole` or a whole number"),
    ],
)
def test_what_a_flag_takes_is_said_in_words(metavar, words):
    assert command_line._takes(SimpleNamespace(choices=None, metavar=metavar)) == words


def test_characters_of_markdown_are_shown_as_they_are():
    assert command_line._escaped("a_b <c> | `d_e`") == r"a\_b &lt;c&gt; \| `d_e`"


def test_a_list_in_a_flags_help_stays_a_list():
    text = "When\nnoise is added.\n- train: in\n  training.\n- never: not. (default: train)"
    meaning, default = command_line._meaning_and_default(text)
    assert meaning == "When noise is added.<br>- train: in training.<br>- never: not."
    assert default == "train"
    assert command_line._meaning_and_default("Folder. (default: None)") == ("Folder.", "")
    assert command_line._meaning_and_default("Folder. (required)") == ("Folder.", "required")
    with pytest.raises(ValueError, match="expected its default"):
        command_line._meaning_and_default("Folder.")
