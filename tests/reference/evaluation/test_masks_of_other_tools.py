"""Masks in files, a run's or another tool's: they score alike, and what is wrong is said."""

import csv
import dataclasses
import os

import numpy as np
import pytest
from harness.evaluations import FEW, SIZE, dice_of, read_json
from PIL import Image

from reference_models.data.cases import Sample
from reference_models.errors import DataError
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
    EvaluateRun,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.masks import read_mask
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.metrics.scores import METRICS
from reference_models.report.pictures import GAP


def test_predicted_masks_score_exactly_what_the_run_scores(phantom_run, tmp_path):
    run, recipe = phantom_run
    own = evaluate_run(EvaluateRun(run, scoring=FEW, out=tmp_path / "own"))
    folder = predict(PredictSettings(run, out=tmp_path / "predicted"))
    other = evaluate_predictions(
        EvaluatePredictions(folder / "masks", recipe.data, out=tmp_path / "other", scoring=FEW)
    )
    assert other.conditions[0].scores == own.conditions[0].scores
    assert (tmp_path / "own/cases.csv").read_bytes() == (tmp_path / "other/cases.csv").read_bytes()
    assert own.n_cases == 12
    assert own.conditions[0].load["site"]
    assert any(
        group.metrics["dice"].value > 0
        for region in own.conditions[0].scores["site"]
        for group in region.groups
    )
    for case_id in (f"phantom{i:05}" for i in range(12, 24)):
        with Image.open(folder / "masks" / f"{case_id}.png") as mask:
            assert (mask.size, mask.mode) == ((40, 40), "L")
        with Image.open(folder / "overlays" / f"{case_id}.png") as seen:
            # The truth on the left and the prediction on the right, each under its title.
            assert (seen.size, seen.mode) == ((40 + GAP + 40, 52), "RGB")


def test_all_predicts_every_case(phantom_run, tmp_path):
    run, _ = phantom_run
    folder = predict(PredictSettings(run, split="all", out=tmp_path / "all"))
    assert len([*(folder / "masks").iterdir()]) == 24


def test_masks_come_as_grey_palette_or_one_bit_png_or_as_npy(other_tool):
    dataset, folder, settings = other_tool
    masks = [dataset.load(case).mask_S for case in dataset.cases]
    palette = Image.fromarray(masks[0], mode="P")
    palette.putpalette([200, 10, 10, 10, 200, 10])  # colours are not labels
    palette.save(folder / "bar0.png")
    Image.fromarray(masks[1] > 0).save(folder / "bar1.png")
    for number, dtype in ((2, np.int64), (3, bool), (4, np.uint16)):
        (folder / f"bar{number}.png").unlink()
        np.save(folder / f"bar{number}.npy", masks[number].astype(dtype))
    (folder / "dataset.json").write_text(
        "{}", encoding="utf-8"
    )  # as nnU-Net leaves beside its masks
    (folder / "._bar0.png").write_bytes(b"\0")  # as macOS leaves beside its copies
    (folder / "overlays").mkdir()
    summary = evaluate_predictions(settings)
    assert dice_of(summary, "as given") == [1, 1, 1]
    assert [c.name for c in summary.conditions] == ["as given"]
    assert summary.source == str(folder)
    assert sorted(p.name for p in settings.out.iterdir()) == [
        "cases.csv", "report.html", "summary.json",
    ]  # fmt: skip


def test_empty_masks_are_scored_by_the_policy_and_counted(other_tool):
    _, folder, settings = other_tool
    for number in (0, 3, 6, 9):  # all of value "one"
        Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folder / f"bar{number}.png")
    summary = evaluate_predictions(settings)
    (region,) = summary.conditions[0].scores["width"]
    one = region.groups[0]
    assert (one.missed, one.n, one.n_defined["hd95"]) == (4, 4, 0)
    assert [one.metrics[metric].value for metric in METRICS] == [0, 0, None, 0]
    assert read_json(settings.out)["conditions"][0]["scores"]["width"][0]["overall"]["hd95"] == {
        "value": None, "low": None, "high": None,
    }  # fmt: skip
    with (settings.out / "cases.csv").open(newline="", encoding="utf-8") as file:
        assert [row["hd95_mm"] for row in csv.DictReader(file)][:2] == ["", "0.0"]


def test_everything_wrong_with_a_folder_of_masks_is_in_one_error_and_nothing_is_written(other_tool):
    dataset, folder, settings = other_tool
    good = dataset.load(dataset.cases[0]).mask_S
    (folder / "bar0.png").unlink()
    Image.fromarray(good).save(folder / "bar00.png")
    Image.fromarray(good[:, 1:]).save(folder / "bar1.png")
    Image.fromarray(good * 255).save(folder / "bar2.png")
    Image.fromarray(np.stack([good] * 3, -1)).save(folder / "bar3.png")
    (folder / "bar4.png").write_bytes((folder / "bar5.png").read_bytes()[:60])
    np.save(folder / "bar5.npy", good)
    (folder / "bar6.png").unlink()
    np.save(folder / "bar6.npy", good.astype(np.float32))
    (folder / "bar7.png").unlink()
    np.save(folder / "bar7.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "bar8.png").unlink()
    np.save(folder / "bar8.npy", good.astype(np.int16) - 1)
    (folder / "bar9.png").write_bytes(b"")
    Image.fromarray(good.astype(np.uint16)).save(folder / "bar10.png")
    (folder / "bar11.png").unlink()
    (folder / "bar11.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00{'a':(")
    with pytest.raises(DataError) as caught:
        evaluate_predictions(settings)
    text = str(caught.value)
    for words in (
        "1 of 12 cases have no mask (<case id>.png, .tif, .tiff, .bmp or .npy): bar0.",
        "1 masks are of no case of this split: bar00.png.",
        "bar1.png: got size (16, 15), expected the image's size, (16, 16)",
        "bar2.png: got label 255, expected labels and not grey levels. The labels are "
        "0 background, 1 bar.",
        "bar3.png: cannot be read (a PNG of mode RGB",
        "bar4.png: cannot be read",
        "bar5.npy and bar5.png: two masks of one case",
        "bar6.npy: cannot be read (got float32, expected integer labels",
        "bar7.npy: cannot be read",
        "bar8.npy: got label -1, expected labels",
        "bar9.png: cannot be read",
        "bar10.png: cannot be read (a PNG of mode I;16",
        "bar11.npy: cannot be read",
    ):
        assert words in text, words
    assert len(text.splitlines()) == 14
    assert not settings.out.exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["masks", "run"]


def test_a_folder_that_is_not_there_is_named(other_tool, tmp_path):
    _, _, settings = other_tool
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        evaluate_predictions(dataclasses.replace(settings, folder=tmp_path / "nowhere"))


def unknown(size):
    """A sample of this size whose mask nobody knows."""
    return Sample("mask", np.zeros((1, *size), np.float32), None, (), (1.0,) * len(size))


def test_no_damaged_byte_of_a_png_goes_unnoticed(tmp_path):
    mask = (np.random.default_rng(0).random((40, 30)) > 0.5).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "damaged.png").write_bytes(damaged)
        try:
            read = read_mask(tmp_path / "damaged.png", unknown(mask.shape), ("background", "bar"))
        except DataError:
            continue
        assert (read == mask).all(), place


def test_a_palette_whose_places_may_not_be_the_labels_is_refused(tmp_path):
    path, size, classes = tmp_path / "mask.png", (6, 4), ("background", "rim", "cup")
    mask = np.zeros(size, np.uint8)
    mask[1:3], mask[4] = 1, 2
    for greys in ((0, 1, 2), (0, 128, 255), (0, 0, 0)):
        image = Image.fromarray(mask, mode="P")
        image.putpalette(np.repeat(greys, 3).tolist())
        image.save(path)
        assert (read_mask(path, unknown(size), classes) == mask).all()
    empty = np.zeros(size, np.uint8)
    for labels in (mask, empty):
        # As Pillow and tools that make PNGs small do: 2, 1, 0 for 0, 1, 2.
        image = Image.fromarray(2 - labels, mode="P")
        image.putpalette(np.repeat([2, 1, 0], 3).tolist())
        image.save(path)
        with pytest.raises(DataError, match=r"mask\.png: .*greys are 2, 1, 0"):
            read_mask(path, unknown(size), classes)


def test_a_pickle_in_a_mask_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"trap\.npy"):
        read_mask(tmp_path / "trap.npy", unknown((1,)), ("background",))
    assert not (tmp_path / "sprung").exists()
