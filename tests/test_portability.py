"""Windows and macOS, as far as a Linux machine can tell: what is imported, written and spawned."""

import ast
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reference_models import files
from reference_models.__main__ import main
from reference_models.data.cache import FrameCache
from reference_models.data.cases import Case
from reference_models.data.framing import ImageFraming
from reference_models.errors import DataError
from reference_models.study.cost import step_milliseconds
from reference_models.study.jobs import Job
from reference_models.study.scenes import Design, Sizes
from reference_models.study.trial import run
from reference_models.training import loop as training

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "src" / "dmoe_layer", ROOT / "reference_models", ROOT / "benchmarks")
# What is imported where the Triton backend is chosen, which Windows does not have, and not before.
NEED_TRITON = {
    *(
        f"dmoe_layer.fused.{name}"
        for name in ("call", "experts", "launch", "narrow", "router", "wide")
    ),
    *(
        f"dmoe_layer.fused.kernels.{name}"
        for name in (
            "activations",
            "approximations",
            "common",
            "dropout",
            "narrow",
            "noise",
            "routing",
            "sums",
            "wide",
        )
    ),
}
NEED_NNUNET = {
    f"reference_models.nnunet.{name}"
    for name in ("predictor", "trainer", "trainers.nnUNetTrainerDMoE")
}
# No import finds what Python has on POSIX systems alone, nor Triton, nor nnU-Net. Only psutil,
# which transformers imports where it is there, is imported before: it has other code for Windows.
AS_ON_WINDOWS = """
import contextlib, sys
with contextlib.suppress(ImportError):
    import psutil
absent = "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"
sys.modules.update(dict.fromkeys((*absent, "triton", "nnunetv2")))
"""


def as_on_windows(program, *arguments):
    """Runs it, and returns what it prints."""
    # Windows tells the user's name by a variable, elsewhere getpass would look into pwd.
    environment = {**os.environ, "USERNAME": "somebody", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS + program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported_and_collected():
    """What failed to be imported, and what pytest then collects: both take long, and share it."""
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
    ]
    assert len(names) > 100
    program = """
import importlib
import pytest
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, "needs", error.name.split(".")[0])
print("collected:")
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
    failed, _, collected = as_on_windows(program, *names).partition("collected:\n")
    return failed.splitlines(), collected.replace("\\", "/")


def test_all_but_kernels_and_nnunet_is_imported_without_posix_triton_and_nnunet(
    imported_and_collected,
):
    assert {*imported_and_collected[0]} == {
        *(f"{name} needs triton" for name in NEED_TRITON),
        *(f"{name} needs nnunetv2" for name in NEED_NNUNET),
    }


def test_all_tests_are_collected_where_there_is_neither_posix_nor_triton(imported_and_collected):
    collected = imported_and_collected[1]
    tests = ROOT / "tests"
    names = {path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    skipped = ("layer/fused/test_kernels", "layer/fused/test_compiled_kernels")  # without Triton
    names = {name for name in names if not name.startswith(skipped)}
    assert [name for name in sorted(names) if f"tests/{name}: " not in collected] == []


def texts_without_encoding(path):
    """Lines of the calls that read or write text as the system happens to encode it."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or any(k.arg == "encoding" for k in call.keywords):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = getattr(getattr(call.func, "value", None), "id", "")
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = {value.value for value in given if isinstance(value, ast.Constant)}
        if (
            name in ("read_text", "write_text")
            or any(keyword.arg == "text" for keyword in call.keywords)
            # Of images, of bytes that are packed, and of handles.
            or (
                name == "open"
                and owner not in ("Image", "gzip", "os", "tarfile")
                and not modes & BINARY
            )
        ):
            yield call.lineno


BINARY = {"rb", "wb", "ab", "r+b"}


def test_every_text_file_is_read_and_written_as_utf_8():
    folders = (*PACKAGES, ROOT / "tests", ROOT / ".ci")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) > 150
    found = [f"{path}:{line}" for path in files for line in texts_without_encoding(path)]
    assert found == []


def in_use(path):
    """Whether this process has the file, or one in the folder, open or mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    held = [line.split(maxsplit=5)[-1] for line in maps]
    held += [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
    real = os.path.realpath(path)
    return any(name == real or name.startswith(f"{real}/") for name in held)


@pytest.fixture
def windows_files(monkeypatch):
    """Refuses what Windows refuses to do with files, and gives a list of it."""
    fcntl = pytest.importorskip("fcntl", reason="is on Windows")
    if not Path("/proc/self/maps").exists():
        pytest.skip("asks Linux which files are open")
    refused = []

    def refuse(where, why):
        refused.append(f"{where}: {why}")
        raise PermissionError(errno.EACCES, why, str(where))

    def put(name):
        act = getattr(os, name)

        def guarded(source, *targets, **options):
            if in_use(source):
                refuse(source, f"{name} of what is open")
            for target in targets:
                if os.path.isdir(target) or (name == "rename" and os.path.exists(target)):
                    refuse(target, f"{name} over what is there")
                if in_use(target):
                    refuse(target, f"{name} over what is open")
            return act(source, *targets, **options)

        monkeypatch.setattr(os, name, guarded)

    for name in ("rename", "replace", "unlink", "rmdir"):
        put(name)
    open_, fsync = os.open, os.fsync

    def opened(path, flags, *mode, **options):
        if os.path.isdir(path) and not flags & os.O_TMPFILE:  # of files without a name
            refuse(path, "open of a folder")
        return open_(path, flags, *mode, **options)

    def synced(handle):
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
            refuse(handle, "fsync of what is open to be read")
        fsync(handle)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as rmtree does there
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    return refused


PHANTOM = ["--data", "phantom", "--phantom.cases", "20", "--phantom.test-cases-per-group", "1"]
PHANTOM += ["--phantom.image-size", "32"]


def test_commands_do_with_files_what_windows_lets_them(tmp_path, windows_files, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    folder = str(tmp_path / "run")
    train = ["train", "small", *PHANTOM, "--size", "32", "--batch-size", "4", "--out", folder]
    train += ["--checkpoint-every", "1", "--epochs", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(training, "validate", stopped)
        assert main(train) == 130
    assert main([*train, "--resume"]) == 0
    for _ in range(2):
        assert main(["evaluate", "run", "--run", folder, "--resamples", "100"]) == 0
        assert main(["predict", "--run", folder]) == 0
    assert windows_files == []


def test_the_study_does_with_files_what_windows_lets_it(tmp_path, windows_files):
    design = Design(Sizes(12, 2, 2, 2, 32), shares=(0.5, 0.5))
    job = Job("rule", "upcycled", 3, 1003, 0.01)
    run(job, design, tmp_path)
    step_milliseconds({"dmoe": design.recipe(job, tmp_path)})
    assert windows_files == []


def test_a_frame_that_another_process_stored_and_reads_is_no_error(tmp_path, windows_files):
    dataset, mapped = SimpleNamespace(name="made", made_with=()), []
    cache, case = FrameCache(tmp_path, dataset, ImageFraming(8)), Case("a", "a", ())

    def made(case):
        return {"image": torch.ones(3)}

    def slowly(case):
        mapped.append(cache.frame(case, made))
        mapped.append(cache.frame(case, made))
        return made(case)

    assert torch.equal(cache.frame(case, slowly)["image"], mapped[1]["image"])
    assert len(windows_files) == 1
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("fault", [PermissionError, KeyboardInterrupt])
def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, fault):
    def write(folder):
        (folder / "a").write_text(folder.parent.name, encoding="utf-8")

    files.write_folder(tmp_path / "out", write, ("a",))
    before, rename, back = (tmp_path / "out" / "a").read_text(encoding="utf-8"), os.rename, [True]

    def refused(source, target):
        if Path(source).name == "new" or (Path(source).name == "old" and not back[0]):
            raise fault(errno.EACCES, "a scanner of viruses looks into it", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(fault):
        files.write_folder(tmp_path / "out", write, ("a",))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text(encoding="utf-8") == before
    back[0] = False  # nor does the old one go back: nothing is lost
    with pytest.raises(fault, match="old"):
        files.write_folder(tmp_path / "out", write, ("a",))
    (kept,) = tmp_path.glob(".out.*/old/a")
    assert kept.read_text(encoding="utf-8") == before


def test_what_came_into_a_folder_meanwhile_is_not_lost(tmp_path, monkeypatch):
    def write(folder):
        (folder / "a").write_text("new", encoding="utf-8")

    def write_slowly(folder):
        write(folder)
        (tmp_path / "out" / "mine").touch()

    files.write_folder(tmp_path / "out", write, ("a",))
    with pytest.raises(DataError, match="mine"):
        files.write_folder(tmp_path / "out", write_slowly, ("a",))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "mine", "out"]
    (tmp_path / "out" / "mine").unlink()

    rename = os.rename

    def late(source, target):
        rename(source, target)
        if Path(target).name == "old":  # before the new one is in its place
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").touch()

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(OSError, match="new"):
        files.write_folder(tmp_path / "out", write, ("a",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert len([*tmp_path.glob(".out.*/old/a")]) == 1
