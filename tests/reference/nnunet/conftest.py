"""nnU-Net, planned and preprocessed once for all tests of it."""

import os

import pytest
from harness.nnunet_home import NnunetHome, stand_in_for_timm

PLANNERS = {"nnUNetPlans": "ExperimentPlanner", "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM"}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The home, in whose environment this process and all that it starts are."""
    pytest.importorskip("nnunetv2")
    home = NnunetHome(tmp_path_factory.mktemp("nnunet"))
    with pytest.MonkeyPatch.context() as patch:
        if stand_in_for_timm(home.root / "path"):
            patch.syspath_prepend(home.root / "path")
            paths = (str(home.root / "path"), os.environ.get("PYTHONPATH"))
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        for name, value in home.environment.items():
            patch.setenv(name, value)
        plan = {"nnUNet_n_proc_DA": "1"}  # it takes these for threads
        home.run("nnUNetv2_extract_fingerprint", "-d", 1, "-np", 1)
        for plans, planner in PLANNERS.items():
            home.run("nnUNetv2_plan_experiment", "-d", 1, "-pl", planner, **plan)
            home.shrink(plans)
        home.run("nnUNetv2_preprocess", "-d", 1, "-c", "3d_fullres", "-np", 1)
        yield home
