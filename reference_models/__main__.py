"""The command line: `python -m reference_models convert|check|train|cross-validate|evaluate|...`.

A command is a function here, whose arguments become its flags, and a line in `main`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from .convert.command import ConvertSettings, convert
from .cross_validation import cross_validate
from .data import DataSettings
from .data.check import check
from .demo.command import DemoSettings, demo
from .errors import DataError, RunError
from .evaluation.evaluate import EvaluatePredictions, EvaluateRun
from .evaluation.prediction import PredictSettings, predict
from .export.command import ExportSettings, export
from .metrics.scores import Summary
from .recipes.presets import DESCRIPTIONS, PRESETS
from .report.words import findings
from .study.command import StudySettings, study
from .terminal import print_anything
from .training.loop import train

_Preset: Any = tyro.extras.subcommand_type_from_defaults(PRESETS, DESCRIPTIONS, prefix_names=False)
_Evaluated = (
    Annotated[EvaluateRun, tyro.conf.subcommand("run")]
    | Annotated[EvaluatePredictions, tyro.conf.subcommand("predictions")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0: all is well, 1: it is not, 2: asked wrongly, 130: stopped by Ctrl-C."""
    print_anything()
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m reference_models", args=arguments, config=CONFIG
        )
    except (DataError, RunError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        advice = (
            "A training goes on by --resume, a cross-validation, the demo and a study by the same "
            "command."
        )
        Console(stderr=True).print(f"Stopped. {advice}", style="red")
        return 130  # as shells have it


def _check(settings: Annotated[DataSettings, tyro.conf.arg(name="")]) -> int:
    """Reads a whole data set before anyone trains on it, and names what is wrong with it."""
    return check(settings)


def _convert(settings: Annotated[ConvertSettings, tyro.conf.arg(name="")]) -> int:
    """Lays images, masks and a csv out as a folder that `check` and `train` read."""
    for sentence in convert(settings):
        print(sentence)
    return 0


def _train(recipe: Annotated[_Preset, tyro.conf.arg(name="")], resume: bool = False) -> int:
    """Trains by a preset, changed by flags.

    Args:
        recipe: what to train, on what, how.
        resume: Go on with the run in --out, as if it had never stopped; give the same flags.
    """
    train(recipe, resume=resume)
    return 0


def _cross_validate(recipe: Annotated[_Preset, tyro.conf.arg(name="")]) -> int:
    """Trains all folds by a preset into --out, and reports on all held-out cases together.

    Killed, it goes on by the same command; folds that are trained already are left as they are.
    """
    return _tell(*cross_validate(recipe))


def _evaluate(settings: Annotated[_Evaluated, tyro.conf.arg(name="")]) -> int:
    """Scores a trained run, or masks by any other tool, and writes csv, json and a report."""
    return _tell(*settings.score())


def _tell(folder: Path, summary: Summary) -> int:
    for finding in findings(summary):
        print(finding)
    print(f"report: {folder / 'report.html'}")
    return 0


def _predict(settings: Annotated[PredictSettings, tyro.conf.arg(name="")]) -> int:
    """Writes a run's masks and overlays at the images' own size."""
    print(f"written: {predict(settings)}")
    return 0


def _export(settings: Annotated[ExportSettings, tyro.conf.arg(name="")]) -> int:
    """Writes a run as one file that a server runs, by ONNX Runtime or by PyTorch."""
    print(f"written: {export(settings)}")
    return 0


def _demo(settings: Annotated[DemoSettings, tyro.conf.arg(name="")]) -> int:
    """Dense, plain MoE, FiLM and dMoE on real MRI, in two minutes on a CPU."""
    demo(settings)
    return 0


def _example(out: Path = Path("example")) -> int:
    """Writes the MNI152 brain as a folder of NIfTI files, as the recipes for volumes read them.

    Args:
        out: Folder to write.
    """
    from .data.example import write_example  # nilearn takes seconds to import

    print(f"written: {write_example(out)}")
    return 0


def _study(settings: Annotated[StudySettings, tyro.conf.arg(name="")]) -> int:
    """Trains every method in every scene, over seeds, and writes tables and figures of it."""
    study(settings)
    return 0


# The commands by name, and how tyro makes flags of their arguments.
COMMANDS = {
    "check": _check,
    "convert": _convert,
    "train": _train,
    "cross-validate": _cross_validate,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "demo": _demo,
    "example": _example,
    "study": _study,
}
CONFIG = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)

if __name__ == "__main__":
    sys.exit(main())
