"""A home for nnU-Net with a tiny data set, planned and preprocessed, and its commands."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
NAME = "Dataset001_Tiny"
AFFINE = nib.affines.from_matvec([[0, -1.0, 0], [1.0, 0, 0], [0, 0, 1.5]], [3, -40, 9])
SITE = {f"p{i:02}": "AB"[i % 2] for i in range(12)}  # the last two are to be predicted
# In short trainings, and as users derive their own. STOP ends one after an epoch, as a crash might.
TRAINERS = """
import os
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from reference_models.nnunet import trainer

class Short:
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = self.save_every = 1
    def on_epoch_end(self):
        super().on_epoch_end()
        if "STOP" in os.environ:
            os._exit(9)

class ShortDMoE(Short, trainer.nnUNetTrainerDMoE): pass
class ShortTwoColumns(Short, trainer.nnUNetTrainerDMoE): columns = ("scanner", "site")
class ShortPlainMoE(Short, trainer.nnUNetTrainerPlainMoE): pass
class ShortDense(Short, trainer.nnUNetTrainerDense): pass
"""
# timm, which nnU-Net imports for networks that are not used here, asks for a torchvision that fits
# torch. Where there is none, classes of these names stand in.
TIMM = """
import torch
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (torch.nn.Module,), {})
"""


class NnunetHome:
    """The folders, and what nnU-Net is told of them by the environment."""

    def __init__(self, root):
        self.root = root
        self.raw, self.preprocessed, self.results = (root / n for n in ("raw", "pre", "results"))
        self.dataset = self.raw / NAME
        self.csv = self.dataset / "attributes.csv"
        trainers = root / "trainers"
        trainers.mkdir(parents=True)
        (trainers / "short.py").write_text(TRAINERS, encoding="utf-8")
        page = (ROOT / "docs" / "recipes" / "nnunet.md").read_text(encoding="utf-8")
        (of_page,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        (trainers / "of_page.py").write_text(of_page, encoding="utf-8")
        ours = ROOT / "reference_models" / "nnunet" / "trainers"
        self.environment = {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": os.pathsep.join((str(ours), str(trainers))),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._write_data()

    def _write_data(self):
        rng = np.random.default_rng(0)
        for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (self.dataset / name).mkdir(parents=True)
        for i, case in enumerate(SITE):
            image = rng.normal(0, 1, (20, 18, 16)).astype(np.float32)
            label = np.zeros(image.shape, np.uint8)
            label[4:13, 5:14, 3:11] = 1
            label[7:10, 8:11, 5:9] = 2
            folder = "Tr" if i < 10 else "Ts"
            for array, path in (
                (image + 2 * label, f"images{folder}/{case}_0000.nii.gz"),
                (label, f"labels{folder}/{case}.nii.gz"),
            ):
                nib.save(nib.Nifti1Image(array, AFFINE), self.dataset / path)
        self.write_csv()
        content = {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": 10,
            "file_ending": ".nii.gz",
        }
        (self.dataset / "dataset.json").write_text(json.dumps(content), encoding="utf-8")

    def write_csv(self, path=None, **changed):
        """What the csv says, but for the sites of some cases."""
        site = {**SITE, **changed}
        rows = [f"{case},{site[case]},{'xyz'[i % 3]}" for i, case in enumerate(site)]
        path = path or self.csv
        path.write_text("\n".join(["case,site,scanner", *rows]) + "\n", encoding="utf-8")
        return path

    def run(self, program, *arguments, fails=False, **variables):
        """Runs one of nnU-Net's commands, or a module of this project; returns what it prints."""
        scripts = Path(sys.executable).parent
        command = (
            [sys.executable, "-m", program]
            if program.startswith("reference_models")
            else [scripts / program]
        )
        done = subprocess.run(
            [*command, *map(str, arguments)],
            # nnU-Net's commands are run anywhere.
            cwd=ROOT if program.startswith("reference_models") else self.root,
            env={**os.environ, **self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def shrink(self, plans):
        """Narrows the planned network, so that a CPU trains it in seconds."""
        path = self.preprocessed / NAME / f"{plans}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        network = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [4 * 2**i for i in range(network["n_stages"])]
        path.write_text(json.dumps(content), encoding="utf-8")

    def trainer(self, name="ShortDMoE", plans="nnUNetPlans"):
        """A trainer as nnUNetv2_train makes it."""
        from nnunetv2.run.run_training import get_trainer_from_args

        return get_trainer_from_args("1", "3d_fullres", 0, name, plans, device=torch.device("cpu"))

    def trained(self, name="ShortDMoE"):
        return self.results / NAME / f"{name}__nnUNetPlans__3d_fullres"


def stand_in_for_timm(folder):
    """Writes a package timm for the path, and returns whether that was needed."""
    try:
        importlib.import_module("timm.models.eva")
        return False
    except Exception:  # of whatever kind: torchvision's library may not fit torch's
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        for module in ("__init__", "layers", "models/__init__", "models/eva"):
            path = folder / "timm" / f"{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(TIMM, encoding="utf-8")
        return True
