"""The demo: what it says follows its scores, its picture its masks; it goes on where it was."""

import dataclasses
import html
import shutil
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from reference_models.__main__ import main
from reference_models.data import DataSettings, open_dataset
from reference_models.data.phantom import PhantomSettings
from reference_models.demo import command, picture
from reference_models.demo.page import write_page
from reference_models.demo.picture import write_picture
from reference_models.demo.scores import Row, read_rows, write_rows
from reference_models.demo.verdict import Verdict, judge
from reference_models.metrics.scores import Estimate
from reference_models.recipes.framings import ImageFramingSettings

PHANTOM = DataSettings(
    "phantom", phantom=PhantomSettings(cases=30, test_cases_per_group=2, image_size=32)
)


def scored(es_dice, shuffled=None):
    """What `judge` reads of a summary."""
    given = {"as given": es_dice} | ({} if shuffled is None else {"shuffled": shuffled})
    return SimpleNamespace(
        population={"site": (0.5, 0.3, 0.15, 0.05)},
        conditions=[
            SimpleNamespace(
                name=name,
                scores={"site": [SimpleNamespace(groups=(), es_dice=Estimate(value))]},
            )
            for name, value in given.items()
        ],
    )


def verdict_of(dense, plain, film, dmoe, film_shuffled=0.5, dmoe_shuffled=0.5):
    told = {"FiLM": scored(film, film_shuffled), "dMoE": scored(dmoe, dmoe_shuffled)}
    return judge({"dense": scored(dense), "plain MoE": scored(plain), **told})


@pytest.mark.parametrize(
    "scores",
    [
        (0.57, 0.57, 0.75, 0.61),  # dMoE has hardly gained
        (0.57, 0.57, 0.61, 0.75),  # FiLM has not
        (0.57, 0.72, 0.75, 0.75),  # nor do they need to receive it
        (0.57, 0.57, 0.75, 0.75, 0.6, 0.5),  # nor the right one
        (0.57, 0.57, 0.75, 0.75, 0.5, 0.6),
    ],
)
def test_a_demo_without_a_clear_gain_says_so(scores):
    verdict = verdict_of(*scores)
    assert "no clear gain" in verdict.sentences
    assert "not every network" in verdict.title


@pytest.mark.parametrize(
    ("film", "dmoe", "said"),
    [
        (0.75, 0.77, "and dMoE are level. Try FiLM first, because it is simpler and faster."),
        (0.70, 0.76, "dMoE is ahead of the other by 0.060"),
        (0.76, 0.70, "FiLM is ahead of the other by 0.060"),
    ],
)
def test_a_demo_with_a_clear_gain_says_whose_it_is(film, dmoe, said):
    verdict = verdict_of(0.57, 0.58, film, dmoe)
    assert said in verdict.sentences
    assert f"dense 0.570, plain MoE 0.580, FiLM {film:.3f}, dMoE {dmoe:.3f}" in verdict.sentences
    assert "follows that site's rule" in verdict.title


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [
        Row(
            seed,
            "AVX2",
            "dMoE",
            attributes,
            {"brain": 0.9812, "white matter": 0.83, "ES-Dice": 0.7},
        )
        for seed, attributes in ((0, "as given"), (3, "shuffled"))
    ]
    write_rows(tmp_path / "scores.csv", rows)
    assert read_rows(tmp_path / "scores.csv") == rows


@pytest.mark.parametrize("flags", [["--seeds"], ["--processes", "0"]])
def test_a_demo_of_nothing_is_refused_before_anything_is_written(flags, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), *flags]) == 1
    assert f"{flags[0].removeprefix('--')}: got" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def pixels(image_HW3, colour):
    """How many are of a colour, laid over whatever image."""
    fill = picture.OPACITY * 255 * np.array(to_rgb(colour))
    above = image_HW3 - fill
    grey = (above.max(-1) - above.min(-1) < 3) & (above.min(-1) > -3)
    return int((grey & (above.max(-1) <= 255 * (1 - picture.OPACITY) + 3)).sum())


def test_the_picture_shows_what_is_right_too_much_and_missed(tmp_path):
    outlined = {
        "dense": np.ones_like,
        "plain MoE": np.zeros_like,
        "FiLM": lambda mask_S: mask_S,
        "dMoE": lambda mask_S: mask_S,
    }
    dataset = open_dataset(PHANTOM)
    for method, outline in outlined.items():
        folder = tmp_path / method / "evaluation-test" / "masks"
        folder.mkdir(parents=True)
        for case in dataset.cases:
            if case.split == "test":
                mask_S = outline(dataset.load(case).mask_S).astype(np.uint8)
                Image.fromarray(mask_S).save(folder / f"{case.case_id}.png")
    summaries = dict.fromkeys(outlined, scored(0.5))
    runs = {method: tmp_path / method for method in outlined}
    write_picture(tmp_path / "a.png", PHANTOM, summaries, runs, Verdict("What this shows", ""))
    shown_HW3 = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(float)
    height, width = shown_HW3.shape[:2]
    # The legend is below, and the rules' names are left of six columns.
    columns = np.array_split(
        shown_HW3[: int(0.93 * height), int(0.13 * width) : int(0.99 * width)], 6, axis=1
    )
    colours = (picture.RIGHT, picture.TOO_MUCH, picture.MISSED)
    found = [tuple(pixels(column, colour) > 100 for colour in colours) for column in columns]
    assert found == [
        (False, False, False),  # the scan
        (True, False, False),
        (True, True, False),
        (False, False, True),
        (True, False, False),
        (True, False, False),
    ]


def test_the_page_holds_picture_scores_and_words_and_links_to_every_report(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"a picture")
    runs = {name: tmp_path / "seed0" / name for name in ("dense", "plain MoE")}
    table = [["", "A & B", "ES-Dice"], ["dense", "0.981", "0.567"]]
    write_page(
        tmp_path / "report.html",
        tmp_path / "picture.png",
        table,
        "What ES-Dice is.",
        Verdict("The title", "What it shows."),
        "What chance makes of it.",
        "What it does not show.",
        runs,
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("YSBwaWN0dXJl", "A &amp; B", "0.981", "0.567", "The title", "What it shows.",
                  "What chance makes of it.", "What it does not show."):  # fmt: skip
        assert words in page
    assert "The title" not in page[page.index("<body>") :].replace('alt="The title.', "")  # once
    # Terms are explained before the numbers, no dark screen makes dark paper, and no table is cut.
    assert page.index("What ES-Dice is.") < page.index("0.567")
    assert "@media screen and (prefers-color-scheme: dark)" in page
    printed = page[page.index("@media print") : page.index("</style>")]
    for rule in ("--ink: #000", "overflow: visible", "table, img { break-inside: avoid; }"):
        assert rule in printed
    assert 'href="seed0/plain MoE/evaluation-test/report.html"' in html.unescape(page)
    assert "http" not in page


@contextmanager
def in_this_process(processes):
    """Instead of `workers`."""

    def submit(act, *arguments):
        future = Future()
        future.set_result(act(*arguments))
        return future

    yield SimpleNamespace(submit=submit)


def test_the_demo_compares_four_models_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(
        command.DEMO, data=PHANTOM, framing=ImageFramingSettings(32, "whole", "shift")
    )
    monkeypatch.setattr(command, "DEMO", small)
    settings = command.DemoSettings(out=tmp_path, epochs=1, processes=1)
    summaries = command.demo(settings)
    printed = capsys.readouterr().out
    assert printed.startswith(f"report: {tmp_path / 'report.html'}")
    for words in (
        "ES-Dice", "worst", "shuffled", "What it does not show", "served exactly alike",
        f"picture: {tmp_path / 'picture.png'}", "no clear gain",
    ):  # fmt: skip
        assert words in " ".join(printed.split())
    methods = {name: tmp_path / "seed0" / name.replace(" ", "-") for name in command.METHODS}
    assert all((run / "evaluation-test" / "report.html").exists() for run in methods.values())
    assert (tmp_path / "report.html").exists()
    ran = {name: [c.name for c in s.conditions if c.scores] for name, s in summaries.items()}
    every = ["as given", "shuffled", "wrong", "unknown"]
    assert ran == {
        "dense": ["as given"], "plain MoE": ["as given"], "FiLM": every, "dMoE": every
    }  # fmt: skip
    rows = read_rows(tmp_path / "scores.csv")
    assert [(row.method, row.attributes) for row in rows] == [
        *((name, "as given") for name in command.METHODS), ("dMoE", "shuffled")
    ]  # fmt: skip
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/best-*/*")}
    assert len(trained) == len(methods)
    shutil.rmtree(methods["FiLM"])  # as if it had been stopped before this one
    monkeypatch.setattr(command, "workers", in_this_process)
    assert command.demo(settings) == summaries
    kept = {path for path in trained if "FiLM" not in path.parts}
    assert len(kept) == len(trained) - 1
    assert all(path.stat().st_mtime_ns == trained[path] for path in kept)
