"""A command whose output nobody reads any more ends as other programs do."""

import os
import subprocess
import sys

import pytest

from reference_models.terminal import ends_with_its_reader

PROGRAM = """
from reference_models.terminal import ends_with_its_reader
with ends_with_its_reader():
    print("x" * {letters})
"""


@pytest.mark.skipif(os.name != "posix", reason="pipes break otherwise on Windows")
@pytest.mark.parametrize("letters", [1, 10**6], ids=["in the buffer", "written at once"])
def test_a_command_ends_without_a_traceback_when_its_reader_has_gone(letters):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(letters=letters)], stdout=writer,
        stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(capsys):
    with pytest.raises(BrokenPipeError, match="a worker"), ends_with_its_reader():
        raise BrokenPipeError("a worker")
