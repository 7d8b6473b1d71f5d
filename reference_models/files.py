"""Writes files and folders whole or not at all, so that nobody finds half of one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from .errors import DataError

Result = TypeVar("Result")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes the file `path`: a reader finds the old file, the new one or none, never half of one.

    `write` is called with a temporary name beside `path`, which is then renamed to `path`. The
    content reaches the disk before the rename does, so that a power cut leaves no half file either.

    Raises:
        OSError: it cannot be written; whatever `write` raises. `path` then stays as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a"), lambda target: target.write_bytes(b"all of it"))
        ...     Path(folder, "a").read_bytes()
        b'all of it'
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    target = Path(name)
    try:
        write(target)
        target.chmod(0o644)  # mkstemp's files are the owner's alone
        _reach_disk(target)
        os.replace(target, path)
    finally:
        target.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], Result], contents: Collection[str]) -> Result:
    """Writes the folder `path`: `write` fills a new one beside it, which then takes its place.

    Args:
        path: the folder. It may exist if `require_replaceable` lets it pass; where it is a link,
            the folder that it points to is replaced.
        write: fills the empty folder that it is called with. If it raises, `path` stays as it was.
        contents: the names of all files and folders that `write` makes in it.

    Returns:
        What `write` returned.

    Raises:
        DataError: as of `require_replaceable`, before `write` is called.
        OSError: it cannot be written.
    """
    require_replaceable(path, contents)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new, old = staging / "new", staging / "old"
    try:
        new.mkdir()
        result = write(new)
        for written in new.rglob("*"):
            if written.is_symlink():  # to a file of the user's, which stays as it is
                continue
            # mkdtemp's folders and safetensors' files are the owner's alone
            written.chmod(0o755 if written.is_dir() else 0o644)
            _reach_disk(written)
        require_replaceable(path, contents)  # something may have come meanwhile
        if path.is_dir():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        # Nothing stands there after Ctrl-C between the two, or on Windows where a scanner of
        # viruses looks into a new file. An old result that cannot go back stays where it is.
        if old.is_dir() and not path.exists():
            os.rename(old, path)
        if not old.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    _reach_disk(path.parent)
    return result


def require_replaceable(path: Path, contents: Collection[str]) -> None:
    """Lets a folder pass that a result may replace: a new, an empty, or an earlier result's one.

    An earlier result holds `contents`, all of them and nothing else. A folder that holds only some
    of these names is somebody's own. Whoever works long before writing asks this first.

    Raises:
        DataError: `path` is a file, the working directory, or holds something else.
    """
    given, path = path, path.resolve()
    if path.exists() and not path.is_dir():
        raise DataError(f"{given}: is a file, expected a folder to write to; choose another.")
    if path == Path.cwd():
        raise DataError(
            f"{given}: is the folder you are in, which would be replaced; choose another."
        )
    held = {item.name for item in path.iterdir()} if path.is_dir() else set()
    if held and held != {*contents}:
        lost = sorted(held - {*contents}) or sorted(held)
        raise DataError(
            f"{given}: holds {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}, which "
            f"would be lost; choose another folder, or one with nothing but an earlier result "
            f"({', '.join(contents)})."
        )


def write_results(path: Path, write: Callable[[Path], Result], contents: Collection[str]) -> Result:
    """Does what `write_folder` does, for a folder that the user named on the command line.

    Raises:
        DataError: as of `require_replaceable`, or the folder cannot be written: a full disk, say,
            is told of in a sentence and not by a traceback.
    """
    try:
        return write_folder(path, write, contents)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}); make room or choose another."
        ) from error


def _reach_disk(path: Path) -> None:
    """Returns when what was written to a file, or the names in a folder, would survive a power cut.

    On Windows, names may take longer.
    """
    # Windows opens no folder, and flushes only what is open to be written.
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    elif sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
