"""``gpu.sh`` keeps to its limits of time, and says what it found whatever went wrong.

A stub stands in for the interpreter, and one for ``timeout``, which writes down what it was given.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.arguments import chosen_names
from benchmarks.kernels import __main__ as kernels
from benchmarks.layer import command as layer
from benchmarks.layer.shapes import parse_shapes

volumes = pytest.importorskip("benchmarks.volumes.command")
ROOT = Path(__file__).parents[2]
TIMEOUT = """#!{python}
import os, sys
_, _, grace, seconds, *command = sys.argv
with open(os.environ["STUB_LOG"], "a") as log:
    print("box", int(grace) + int(seconds), file=log)
os.execvp(command[0], command)
"""
# What each command prints last, leaves in its folder, and answers.
PYTHON = """#!{python}
import os, sys, time
from pathlib import Path
words = " ".join(sys.argv[1:])
kept = os.environ["PYTHONPATH"].split(":")[-1], os.environ.get("PYTHONUNBUFFERED", "buffered")
with open(os.environ["STUB_LOG"], "a") as log:
    print("run", *kept, words.splitlines()[0], file=log)
if "find_spec" in words:
    sys.exit(int(os.environ.get("STUB_NO_MONAI", 0)))
if "--out" in sys.argv:
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    for name in ("a.csv", "b.csv", "a.png"):
        (out / name).write_text("x")
if "--shapes" in words:
    for shape in ("2d", "stage-0"):
        print("### " + shape)
        print("| triton | 1.0 ms |")
        print("### Goals at " + shape)
        print("| shape | what |")
        print("| " + shape + " | times faster | met |")
print("said by", words[:60])
if "STUB_HANGING" in os.environ and os.environ["STUB_HANGING"] in words:
    sys.stdout.flush()
    time.sleep(3)
failing = os.environ.get("STUB_FAILING")
sys.exit(1 if failing and failing in words else 0)
"""

pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or os.name == "nt", reason="a script of POSIX's"
)


class Run:
    """A call of the script with stubs in place of all that it runs."""

    def __init__(self, folder, call, meanwhile=lambda script: None, **environment):
        for name, text in (("timeout", TIMEOUT), ("python", PYTHON)):
            stub = folder / name
            stub.write_text(text.format(python=sys.executable), encoding="utf-8")
            stub.chmod(0o755)
        log, self.out, temporary = folder / "log", folder / "out", folder / "temporary"
        temporary.mkdir()
        log.touch()
        script = subprocess.Popen(
            ["bash", ROOT / "benchmarks" / "gpu.sh", *call],
            env={
                **os.environ,
                "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": str(folder / "python"),
                "OUT": str(self.out),
                "TMPDIR": str(temporary),
                "STUB_LOG": str(log),
                "PYTHONPATH": "packages",
                "PYTHONUNBUFFERED": "",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        meanwhile(script)
        self.printed, self.errors = script.communicate()
        self.status = script.returncode
        lines = log.read_text(encoding="utf-8").splitlines()
        self.boxes = [int(line.split()[1]) for line in lines if line.startswith("box")]
        self.commands = [line for line in lines if line.startswith("run")]

    def order(self, *words):
        """Where the first command with each word stands."""
        return [next(i for i, c in enumerate(self.commands) if word in c) for word in words]


@pytest.mark.parametrize(("call", "most"), [("first", 420), ("second", 200)])
def test_a_call_fits_its_minutes_and_leaves_one_file(tmp_path, call, most):
    run = Run(tmp_path, [call])
    assert run.status == 0, run.printed + run.errors
    assert len(run.boxes) >= 5
    assert sum(run.boxes) <= most
    # Compiled, then right, then timed.
    first, *others = run.order("kernels prewarm", "-m pytest tests/layer/fused", "-m benchmarks --")
    assert [first, *others] == sorted([first, *others])
    assert all(c.startswith("run packages 1 ") for c in run.commands)  # found, and unbuffered
    assert [path.name for path in run.out.iterdir()] == [f"{call}.tar.gz"]
    with tarfile.open(run.out / f"{call}.tar.gz") as tar:
        names = {name.removeprefix("./") for name in tar.getnames()}
    assert {"goals/a.csv", "goals.txt", "correctness.txt", "prewarm.txt"} <= names
    assert ("a.csv" if call == "first" else "volumes/a.csv") in names  # the sweep's, the volumes'
    last = run.printed.split("== goals\n")[-1].splitlines()
    assert last == [
        "| shape | what |",
        *(f"| {s} | times faster | met |" for s in ("2d", "stage-0")),
    ]


@pytest.mark.parametrize("call", ["first", "second"])
def test_where_a_test_fails_nothing_is_timed(tmp_path, call):
    run = Run(tmp_path, [call], STUB_FAILING="pytest")
    assert run.status == 1
    assert "== correctness: exit status 1" in run.printed
    assert not [c for c in run.commands if "-m benchmarks --" in c or "sweep" in c]
    with tarfile.open(run.out / f"{call}.tar.gz") as tar:
        assert "./correctness.txt" in tar.getnames()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize(("box", "hanging"), [("correctness", "-m pytest"), ("goals", "--shapes")])
def test_a_call_that_is_killed_leaves_what_was_printed_until_then(tmp_path, box, hanging, name):
    sleep = tmp_path / "sleep"
    sleep.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(0.1)\n", encoding="utf-8")
    sleep.chmod(0o755)
    found = tmp_path / "out" / "first.tar.gz"
    sent = getattr(signal, name)  # Windows, where this is skipped, has no SIGKILL

    def saved():
        with tarfile.open(found) as tar:
            said = f"./{box}.txt"
            return said in tar.getnames() and b"said by" in tar.extractfile(said).read()

    def kill(script):
        for _ in range(300):
            time.sleep(0.1)
            if found.exists() and saved():
                break
        os.kill(script.pid, sent)

    run = Run(tmp_path, ["first"], kill, STUB_HANGING=hanging)
    assert run.status == -sent
    assert saved()
    # Goals are not kept back until their box ends.
    assert ("| stage-0 | times faster | met |" in run.printed) == (box == "goals")


def test_goals_that_were_reached_are_said_last_though_their_run_was_cut_short(tmp_path):
    run = Run(tmp_path, ["first"], STUB_FAILING="--shapes goals")
    assert run.status == 1
    assert run.order("sweep stage-0", "sweep 2d")
    assert re.search(r"== goals\n.*\| 2d \| times faster \| met \|", run.printed, re.DOTALL)


def test_without_monai_the_volumes_are_left_out_and_the_call_says_so(tmp_path):
    run = Run(tmp_path, ["second"], STUB_NO_MONAI="1")
    assert run.status == 0
    assert "volumes: left out, since MONAI is not installed" in run.printed
    assert not [c for c in run.commands if "benchmarks.volumes" in c]


@pytest.mark.parametrize("words", [[], ["third"]])
def test_another_word_runs_nothing(tmp_path, words):
    run = Run(tmp_path, words)
    assert (run.status, run.commands) == (2, [])
    assert "expected first or second" in run.errors


@pytest.mark.parametrize("call", ["first", "second"])
def test_what_a_call_runs_is_there_by_its_name(tmp_path, call):
    parsers = {"benchmarks": layer, "benchmarks.kernels": kernels, "benchmarks.volumes": volumes}
    known = {
        "shapes": lambda text: parse_shapes(text, "cuda"),
        "providers": lambda text: chosen_names("providers", text, layer.PROVIDERS),
        "networks": lambda text: chosen_names("networks", text, volumes.NETWORKS),
        "patches": volumes.parse_patches,
    }
    modules = set()
    for command in Run(tmp_path, [call]).commands:
        flag, module, *words = command.split()[3:] if "-m" in command else ("", "")
        if flag == "-m" and module in parsers:
            modules.add(module)
            for name, value in vars(parsers[module]._parser().parse_args(words)).items():
                if name in known and value is not None:
                    known[name](value)
        elif module == "pytest":
            assert all((ROOT / word).exists() for word in words if "/" in word)
    assert modules == set(parsers) - ({"benchmarks.volumes"} if call == "first" else set())
