"""A run of volumes as a file: window by window, the same masks as PyTorch's, by numpy alone too."""

import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from harness.exported_runs import write_untrained
from harness.volumes import stored_as

from reference_models.data import DataSettings
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.export.command import ExportSettings, export
from reference_models.models.inference import infer
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.checkpoints import load_model

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parents[3] / "docs" / "recipes" / "export.md"
# One is larger than a window along every axis, one smaller along every axis.
VOLUMES = {"large": ((70, 40, 36), "T3"), "small": ((20, 24, 16), "T1")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of a network whose experts see the body alone, and its file."""
    folder = tmp_path_factory.mktemp("volumes")
    root, random = folder / "data", np.random.default_rng(0)
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for case, (size, _) in VOLUMES.items():
        voxels = random.normal(100, 50, (2, *size)).astype(np.float32)
        voxels[0, :4] = voxels[1] = 0
        for name, part in (("imagesTr/{}_0000", voxels[0]), ("labelsTr/{}", voxels[1])):
            stored, affine = stored_as("LPS", (1.0, 1.0, 1.0), part[None])
            path = root / f"{name.format(case)}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(stored[0], affine), path)
    rows = [f"{case},{stage}" for case, (_, stage) in VOLUMES.items()]
    (root / "attributes.csv").write_text("\n".join(["case,stage", *rows]), encoding="utf-8")
    layout = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}}
    (root / "dataset.json").write_text(json.dumps(layout), encoding="utf-8")
    recipe = Recipe(
        DataSettings("folder", root=root),
        ResUNet3DSettings(features=2, stages=(3,), unknown="average"),
        VolumeFramingSettings((1.0, 1.0, 1.0), (64, 32, 32), body=True),
        batch_size=3,
    )
    run, file = write_untrained(folder / "run", recipe), folder / "volumes.onnx"
    export(ExportSettings(run, file))
    return run, file


def test_volumes_are_answered_in_windows_by_the_file_with_the_same_masks(
    exported, tmp_path, capsys
):
    run, file = exported
    predict(PredictSettings(run, split="all", out=tmp_path / "own"))
    predict(PredictSettings(run, split="all", onnx=file, out=tmp_path / "file"))
    differing = voxels = 0
    for case, (size, _) in VOLUMES.items():
        own, found = (
            np.asarray(nibabel.load(tmp_path / out / "masks" / f"{case}.nii.gz").dataobj)
            for out in ("own", "file")
        )
        assert own.shape == size
        assert len(np.unique(own)) == 3
        differing, voxels = differing + int((own != found).sum()), voxels + own.size
    assert differing <= voxels // 1000
    told = capsys.readouterr().err
    assert f"from volumes.onnx: {differing} of {voxels:,} voxels differ" in told


def test_the_pages_windows_give_the_recipes_logits(exported):
    run, file = exported
    recipe, _, model = load_model(run)
    image = torch.randn(1, 1, 70, 40, 36)
    body = torch.rand(1, 70, 40, 36) > 0.3
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    of_page = {"np": np, "json": json}
    exec(compile(blocks[1], "export.md", "exec"), of_page)
    channels = torch.cat([image[0], body.float()]).numpy()
    session = onnxruntime.InferenceSession(file)
    for value in (0, 1, -1):
        told = torch.tensor([[value]])
        with torch.inference_mode():
            true = infer(
                model,
                [image, body],
                told,
                windows=recipe.framing.windows(2),
                device=torch.device("cpu"),
            )[0]
        found = of_page["sliding_window_logits"](session, channels, told[0].numpy())
        torch.testing.assert_close(torch.from_numpy(found), true, rtol=1e-3, atol=1e-3)
