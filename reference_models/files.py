"""Files and folders that are written whole or not at all."""

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
    """Calls `write` with a name beside `path`, then renames it to `path`.

    A reader finds the old file, the new one or none, never half of one; so does whoever comes
    after a power cut, since the content reaches the disk before the name does.
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
    """Calls `write` with an empty folder beside `path`, then puts that in `path`'s place.

    Args:
        path: the folder; it may be there already if it is empty, or holds `contents` and nothing
            else, which are then replaced. Of a link, what it points to is written.
        write: fills a folder. If it raises, `path` stays as it was.
        contents: the names that `write` makes, all of them. Where some are missing, what is there
            is not an earlier result but somebody's own.

    Returns:
        What `write` returned.

    Raises:
        DataError: `path` is no folder, holds something else or is the working directory, before
            `write` is called.
        OSError: it cannot be written.
    """
    refuse_others(path, contents)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new, old = staging / "new", staging / "old"
    try:
        new.mkdir()
        result = write(new)
        for written in new.rglob("*"):
            # mkdtemp's folders and safetensors' files are the owner's alone
            written.chmod(0o755 if written.is_dir() else 0o644)
            _reach_disk(written)
        refuse_others(path, contents)  # something may have come meanwhile
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


def refuse_others(path: Path, contents: Collection[str]) -> None:
    """Whether `write_folder` would take this folder, for whoever wants to know before a long work.

    Raises:
        DataError: as of `write_folder`.
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
        shown = sorted(held - {*contents}) or sorted(held)
        raise DataError(
            f"{given}: holds {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}, which "
            f"would be lost; choose another folder, or one with nothing but an earlier result "
            f"({', '.join(contents)})."
        )


def write_results(path: Path, write: Callable[[Path], Result], contents: Collection[str]) -> Result:
    """As `write_folder`, for a folder that the user named: all errors are sentences.

    Raises:
        DataError: as of `write_folder`, or the folder cannot be written.
    """
    try:
        return write_folder(path, write, contents)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}); make room or choose another."
        ) from error


def _reach_disk(path: Path) -> None:
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
