"""Windows and macOS, as far as a Linux machine can tell: what is imported, written and spawned."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "src" / "dmoe_layer", ROOT / "reference_models", ROOT / "benchmarks")
# What is imported where the Triton backend is chosen, which Windows does not have, and not before.
NEED_TRITON = {
    "dmoe_layer.fused",
    "dmoe_layer.fused_mlp",
    "dmoe_layer.fused_router",
    "dmoe_layer.launch",
    *(f"dmoe_layer.kernels.{name}" for name in ("common", "narrow", "routing", "sums", "wide")),
}
# No import finds what Python has on POSIX systems alone, nor Triton.
AS_ON_WINDOWS = """
import sys
absent = "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty", "triton"
sys.modules.update(dict.fromkeys(absent))
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


def test_all_but_the_kernels_is_imported_where_there_is_neither_posix_nor_triton():
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
    ]
    program = """
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, "needs", error.name)
"""
    assert len(names) > 100
    failed = as_on_windows(program, *names).splitlines()
    assert {*failed} == {f"{name} needs triton" for name in NEED_TRITON}


def test_all_tests_are_collected_where_there_is_neither_posix_nor_triton():
    program = """
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
    collected = as_on_windows(program).replace("\\", "/")
    names = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    names -= {"test_kernels.py", "test_compiled_kernels.py"}  # which Triton's lack skips
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
            # Of images, of gzip's bytes, and of handles.
            or (name == "open" and owner not in ("Image", "gzip", "os") and not modes & BINARY)
        ):
            yield call.lineno


BINARY = {"rb", "wb", "ab", "r+b"}


def test_every_text_file_is_read_and_written_as_utf_8():
    files = [path for folder in (*PACKAGES, ROOT / "tests") for path in folder.rglob("*.py")]
    assert len(files) > 150
    found = [f"{path}:{line}" for path in files for line in texts_without_encoding(path)]
    assert found == []
