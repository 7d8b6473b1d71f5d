"""The command line: `python -m reference_models convert|check|train|cross-validate|evaluate|...`.

Each command is a function in this file, whose arguments become its flags, and is in `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
from .terminal import ends_with_its_reader, print_anything
from .training.loop import train

_Preset: Any = tyro.extras.subcommand_type_from_defaults(PRESETS, DESCRIPTIONS, prefix_names=False)
_Evaluated = (
    Annotated[EvaluateRun, tyro.conf.subcommand("run")]
    | Annotated[EvaluatePredictions, tyro.conf.subcommand("predictions")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Returns:
        0 if the command succeeded, 1 if it failed, 2 if the flags were wrong, 130 after Ctrl-C.
    """
    print_anything()
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="python -m reference_models",
            description="Choose a command. Add --help behind its name to see its flags.",
            args=arguments,
            config=CONFIG,
        )
    except (DataError, RunError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        advice = (
            "To go on, give the same command again; add --resume to train. That holds for train, "
            "cross-validate, demo and study; other commands start over."
        )
        Console(stderr=True).print(f"Stopped. {advice}", style="red")
        return 130  # as shells have it


def _check(settings: Annotated[DataSettings, tyro.conf.arg(name="")]) -> int:
    """Reads every file of a data set and names every file that is missing, damaged or odd.

    Use it before you train. It prints the number of cases of each group and split, warnings, and
    errors, and it writes nothing.

    Example: python -m reference_models check --data folder --root my_folder
    """
    return check(settings)


def _convert(settings: Annotated[ConvertSettings, tyro.conf.arg(name="")]) -> int:
    """Makes a folder of nnU-Net's layout from your images, masks and csv.

    The commands `check` and `train` read that folder. Your own files stay as they are.

    Example: python -m reference_models convert --images scans --masks outlines --attributes
    patients.csv --to my_folder
    """
    for sentence in convert(settings):
        print(sentence)
    return 0


def _train(recipe: Annotated[_Preset, tyro.conf.arg(name="")], resume: bool = False) -> int:
    """Trains a network by a preset, whose settings you can change by flags.

    It writes a folder, called a run, with the weights, the settings, the splits and the history.
    Score the run by `evaluate run`.

    Example: python -m reference_models train small3d --root my_folder --out run

    Args:
        recipe: The preset to start from.
        resume: Go on with the run in --out, as if it had never
            stopped. Give the same flags as before.
    """
    train(recipe, resume=resume)
    return 0


def _cross_validate(recipe: Annotated[_Preset, tyro.conf.arg(name="")]) -> int:
    """Trains every fold of a data set, and scores each case by the fold that held it out.

    It writes a run for each fold into --out, and a report over all cases. If it was stopped, the
    same command goes on; folds that are trained already stay as they are.

    Example: python -m reference_models cross-validate small3d --root my_folder --out folds

    Args:
        recipe: The preset to start from.
    """
    return _print_findings(*cross_validate(recipe))


def _evaluate(settings: Annotated[_Evaluated, tyro.conf.arg(name="")]) -> int:
    """Scores a trained run, or masks that another tool wrote, for each group.

    It writes the scores as csv and json, and a report as a page for the browser.

    Example: python -m reference_models evaluate run --run run

    Args:
        settings: What is scored: a trained run, or a folder of masks.
    """
    return _print_findings(*settings.score())


def _print_findings(folder: Path, summary: Summary) -> int:
    for finding in findings(summary):
        print(finding)
    print(f"report: {folder / 'report.html'}")
    return 0


def _predict(settings: Annotated[PredictSettings, tyro.conf.arg(name="")]) -> int:
    """Predicts masks with a trained run, at each image's own size.

    It writes the masks, and pictures that show each mask on its image.

    Example: python -m reference_models predict --run run
    """
    print(f"written: {predict(settings)}")
    return 0


def _export(settings: Annotated[ExportSettings, tyro.conf.arg(name="")]) -> int:
    """Writes the network of a trained run as one file, for ONNX Runtime or for torch.export.

    A server can run the file without this repository. The file takes an image and an attribute.

    Example: python -m reference_models export --run run --to network.onnx
    """
    print(f"written: {export(settings)}")
    return 0


def _demo(settings: Annotated[DemoSettings, tyro.conf.arg(name="")]) -> int:
    """Trains and compares four small networks on real MRI, in about two minutes on a CPU.

    The networks are a dense one, a plain mixture of experts, FiLM and dMoE. It writes a page.
    """
    demo(settings)
    return 0


def _example(out: Path = Path("example")) -> int:
    """Writes an example folder of NIfTI volumes of the MNI152 brain, to practise on.

    The presets for volumes, such as small3d, can train on it. Nothing is downloaded.

    Args:
        out: Folder to write. It must be new, empty, or hold
            an earlier example.
    """
    from .data.example import write_example  # nilearn takes seconds to import

    print(f"written: {write_example(out)}")
    return 0


def _study(settings: Annotated[StudySettings, tyro.conf.arg(name="")]) -> int:
    """Repeats the study: trains every method in every scene with several seeds.

    It writes tables, figures and a page that compare the methods.
    """
    study(settings)
    return 0


# The commands by name, and how tyro makes flags of their arguments.
COMMANDS: dict[str, Callable[..., Any]] = {
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
    with ends_with_its_reader():
        sys.exit(main())
