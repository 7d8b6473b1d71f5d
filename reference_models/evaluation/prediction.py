"""`predict`: writes the masks of a trained run, or of several together, with overlays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.console import Console

from ..errors import DataError, shown
from ..files import write_results
from ..report.pictures import Picture, overlay
from .conditions import AS_GIVEN, given_attributes, left_out_note
from .inference import predictions
from .masks import write_mask
from .trained_run import RunSettings, open_run


@dataclass(frozen=True)
class PredictSettings(RunSettings):
    """Predicts masks with a trained run, and writes them with pictures to look at.

    The folder masks/ has the label values of each case at the image's own size, as `<case id>.png`
    or `<case id>.nii.gz`. The folder overlays/ has a picture of each case, with the outline of the
    prediction on the image. Where the truth is known, it stands on the left (of volumes: above).
    """

    split: Literal["train", "validation", "test", "all"] = "test"
    """Split whose cases are predicted. all means every
    case of the data, also if another --root names the
    data. Cases of a folder need no true mask to be
    predicted."""
    out: Path | None = None
    """Folder to write to. The default is predictions-<split> in the run's folder."""


def predict(settings: PredictSettings) -> Path:
    """Writes `masks/` and `overlays/`, whole or not at all; returns the folder.

    On stderr it names the cases that are left out, and says where several networks predict.

    Raises:
        DataError, RunError: `open_run` raises it; `out` holds something else; there are several
            runs and no `out`; or cases would get no mask, because the run was trained without
            unknown attributes, and the settings do not allow that.
    """
    out = settings.folder_for(settings.out, f"predictions-{settings.split}")
    run = open_run(settings, settings.split)
    if run.left_out and not settings.leave_out_unknown:
        raise DataError(
            f"{len(run.left_out)} {settings.split} cases would get no mask, because the run was "
            "trained without cases whose attribute is not known: "
            f"{shown([case.case_id for case in run.left_out])}. Predict the others with "
            "--leave-out-unknown."
        )
    for remark in (left_out_note(run.left_out), run.about):
        if remark:
            Console(stderr=True, soft_wrap=True).print(remark, markup=False)

    def write(folder: Path) -> None:
        for name in ("masks", "overlays"):
            (folder / name).mkdir()
        for sample, masks in predictions(run, {AS_GIVEN: given_attributes(run.cases)}):
            mask_S = masks[AS_GIVEN]
            write_mask(folder / "masks", sample, mask_S)
            picture = Picture.of(
                sample.case_id, sample.image_CS, sample.mask_S, mask_S, sample.affine
            )
            overlay_HW3 = overlay(picture, run.dataset.classes)
            Image.fromarray(overlay_HW3).save(folder / "overlays" / f"{sample.case_id}.png")

    write_results(out, write, contents=("masks", "overlays"))
    return out
