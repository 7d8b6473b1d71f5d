"""`python -m reference_models.nnunet`: nnUNetv2_predict for models that receive attributes."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from ..errors import DataError

EXT_TRAINER = "nnUNet_extTrainer"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the prediction, and returns 0 if it succeeded and 1 if it failed."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_models.nnunet",
        description="Does the same as nnUNetv2_predict, with the same flags, and gives the routers "
        "the attributes of each case. -tr is nnUNetTrainerDMoE unless you name another trainer.",
        add_help=False,
        allow_abbrev=False,
    )
    about = "csv with a row for each case (default: attributes.csv beside the folder of images)"
    parser.add_argument("--attributes", type=Path, metavar="CSV", help=about)
    ours, theirs = parser.parse_known_args(arguments)
    if {"-h", "--help"} & {*theirs}:
        parser.print_help()
    if importlib.util.find_spec("nnunetv2") is None:
        print("nnU-Net is not installed here; run pip install '.[nnunet]'", file=sys.stderr)
        return 1
    folders = (os.environ.get(EXT_TRAINER), str(Path(__file__).parent / "trainers"))
    os.environ[EXT_TRAINER] = os.pathsep.join(filter(None, folders))
    from nnunetv2.inference import predict_from_raw_data as nnunet

    from .predictor import DMoEPredictor

    predictor = functools.partial(DMoEPredictor, csv=ours.attributes)
    command = ["nnUNetv2_predict", "-tr", "nnUNetTrainerDMoE", *theirs]
    try:
        with (
            mock.patch.object(nnunet, "nnUNetPredictor", predictor),
            mock.patch.object(sys, "argv", command),
        ):
            nnunet.predict_entry_point()
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
