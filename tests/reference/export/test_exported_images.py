"""A run of images as a file: the recipe's own masks by ONNX Runtime, and none of another run's."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness.evaluations import FEW
from harness.exported_runs import masks_in, small_recipe, write_untrained

from dmoe_layer import routing
from reference_models.__main__ import main
from reference_models.errors import DataError, RunError
from reference_models.evaluation.evaluate import EvaluateRun, evaluate_run
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.export import command
from reference_models.export.command import ExportSettings, export
from reference_models.export.onnx_network import OnnxNetwork
from reference_models.training.checkpoints import load_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parents[3] / "docs" / "recipes" / "export.md"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, its file, and what the command said."""
    folder = tmp_path_factory.mktemp("exported")
    run, file = write_untrained(folder / "run", small_recipe()), folder / "site.onnx"
    return run, file, export(ExportSettings(run, file))


@pytest.fixture(scope="module")
def as_program(exported, tmp_path_factory):
    """The run's program of PyTorch, and what the command said."""
    file = tmp_path_factory.mktemp("program") / "site.pt2"
    return file, export(ExportSettings(exported[0], file))


def test_the_command_says_how_far_file_and_network_are_apart(exported):
    _, file, said = exported
    assert str(file) in said
    (difference,) = re.findall(r"by at most (\S+) of the largest", said)
    assert float(difference) < 1e-5
    assert {path.name for path in file.parent.iterdir()} == {"run", "site.onnx"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # Of one value alone, which is a quarter of all logits.
        (
            lambda run, image, told: run(image, told) * (1 + (told == 2).any()),
            r"attributes \[2\], \d+ of 768 logits differ .*more than 0\.001.*at most 50\.0%",
        ),
        (
            lambda run, image, told: run(image, told.clamp(0, 2)),
            r"accepts the attributes \[-1, 0\]",
        ),
    ],
)
def test_a_program_of_other_answers_is_not_written(
    exported, as_program, tmp_path, monkeypatch, change, words
):
    right = torch.export.load
    monkeypatch.setattr(command, "_MOST_OFF", 0.5)
    # To export it anew takes seconds.
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: right(as_program[0]))

    def load(target):
        return SimpleNamespace(module=lambda: partial(change, right(target).module()))

    monkeypatch.setattr(torch.export, "load", load)
    with pytest.raises(RunError, match=words):
        export(ExportSettings(exported[0], tmp_path / "site.pt2"))
    assert not [*tmp_path.iterdir()]


def test_prediction_by_the_file_writes_the_same_masks_and_says_so(exported, tmp_path, capsys):
    run, file, _ = exported
    own = predict(PredictSettings(run, out=tmp_path / "own"))
    flags = ["--run", str(run), "--onnx", str(file), "--out", str(tmp_path / "by-file")]
    assert main(["predict", *flags]) == 0
    found, true = masks_in(tmp_path / "by-file" / "masks"), masks_in(own / "masks")
    assert found.keys() == true.keys()
    assert len({mask.tobytes() for mask in true.values()}) > 3
    differing = sum(int((found[name] != true[name]).sum()) for name in true)
    voxels = sum(mask.size for mask in true.values())
    assert differing <= voxels // 1000
    told = capsys.readouterr().err
    assert f"{differing} of {voxels:,} voxels differ from PyTorch's" in told


def test_voxels_that_differ_are_counted(exported, tmp_path, capsys, monkeypatch):
    run, file, _ = exported
    forward = OnnxNetwork.forward

    def with_a_wrong_corner(self, image):
        logits = forward(self, image)
        logits[:, :, 0, 0] = -logits[:, :, 0, 0]
        return logits

    monkeypatch.setattr(OnnxNetwork, "forward", with_a_wrong_corner)
    predict(PredictSettings(run, onnx=file, out=tmp_path / "out"))
    (differing,) = re.findall(r"(\d+) of [\d,]+ voxels differ", capsys.readouterr().err)
    assert int(differing) > 0


def test_an_evaluation_by_the_file_has_the_same_scores_and_loads(exported, tmp_path):
    run, file, _ = exported
    own = evaluate_run(EvaluateRun(run, out=tmp_path / "own", scoring=FEW))
    found = evaluate_run(EvaluateRun(run, onnx=file, out=tmp_path / "file", scoring=FEW))
    for by_file, by_torch in zip(found.conditions[:3], own.conditions[:3], strict=True):
        assert by_file.scores == by_torch.scores
        assert by_file.load == by_torch.load
        assert by_torch.load["site"]
    assert "onnxruntime computed the masks from site.onnx: 0 of" in found.conditions[0].note
    # The file refuses what PyTorch's network, for an evaluation, takes the average for.
    assert own.conditions[3].scores
    assert not found.conditions[3].scores
    assert "not run: The exported file refuses" in found.conditions[3].note


def test_the_file_itself_refuses_what_the_network_does(exported):
    session = onnxruntime.InferenceSession(exported[1])
    image = np.zeros((2, 1, 16, 16), np.float32)
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            session.run(None, {"image": image, "attribute": np.array(wrong)})


def test_files_of_anything_else_are_refused(exported, tmp_path):
    run, file, _ = exported
    out = tmp_path / "out"

    def refused(error, run, onnx, *quotes, **settings):
        with pytest.raises(error) as caught:
            predict(PredictSettings(run, onnx=onnx, out=out, **settings))
        for quote in quotes:
            assert quote in str(caught.value), str(caught.value)
        assert not out.exists()

    other = write_untrained(tmp_path / "other", small_recipe(), seed=2)
    refused(
        RunError, other, file, "site.onnx: this file holds other weights", str(other), "--which"
    )
    learned = write_untrained(tmp_path / "learned", small_recipe(unknown="learned"))
    refused(RunError, learned, file, "another run or network", '"unknown": "learned"')
    dense = write_untrained(tmp_path / "dense", small_recipe(block="mlp"))
    refused(RunError, dense, file, str(dense), "no experts that receive attributes")
    refused(RunError, run, tmp_path / "no.onnx", "no.onnx: there is no such file", "export --run")
    refused(DataError, run, file, "device: got meta", device="meta")
    (tmp_path / "text.onnx").write_text("no network", encoding="utf-8")
    refused(RunError, run, tmp_path / "text.onnx", "cannot read this file as a network")
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "silent.onnx")
    refused(
        RunError, run, tmp_path / "silent.onnx", "does not say which run it is of", "export --run"
    )


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_the_pages_ten_lines_give_the_mask_where_torch_cannot_be_imported(exported, tmp_path):
    run, file, _ = exported
    (tmp_path / "site.onnx").write_bytes(file.read_bytes())
    image = torch.randn(1, 1, 16, 16)
    np.save(tmp_path / "image.npy", image.numpy())
    lines = blocks()[0]
    assert len([line for line in lines.splitlines() if line]) == 10
    code = f"import sys\nsys.modules['torch'] = None\n{lines}\nnp.save('mask.npy', mask)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    model = load_model(run)[2]
    with torch.no_grad(), routing(torch.tensor([1])):
        true = model(image)[0].argmax(0).numpy()
    assert np.array_equal(np.load(tmp_path / "mask.npy"), true)
    assert true.any()


def test_a_program_of_pytorch_has_the_same_texts_and_answers(exported, as_program, monkeypatch):
    run, file, _ = exported
    program, said = as_program
    assert float(re.findall(r"by at most (\S+) of the largest", said)[0]) < 1e-5
    monkeypatch.chdir(program.parent)
    of_page = {}
    exec(compile(blocks()[-1], "export.md", "exec"), of_page)
    with torch.no_grad(), routing(torch.tensor([1])):
        true = load_model(run)[2](torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(of_page["logits"], true)
    with pytest.raises(RuntimeError, match="out of range"):
        of_page["program"](torch.zeros(1, 1, 16, 16), torch.tensor([3]))
    of_onnx = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert of_page["texts"] == {key: of_onnx[key] for key in of_page["texts"]}
    attributes = json.loads(of_onnx["dmoe_layer.attributes"])
    assert attributes[0]["values"] == ["site 1", "site 2", "site 3"]
