"""Writes files and folders completely or not at all, so that a crash leaves no half of one."""

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
    """Writes the file `path`; a reader finds the old file, the new file or none, never half of one.

    `write` receives a temporary name beside `path`, and the file is then renamed to `path`. The
    content is on the disk before the rename, so that a power cut leaves no half file either.

    Raises:
        OSError: the file cannot be written. `path` then stays as it was, also after any exception
            that `write` raises.

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
        target.chmod(0o644)  # mkstemp lets only the owner read its files
        _reach_disk(target)
        os.replace(target, path)
    finally:
        target.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], Result], contents: Collection[str]) -> Result:
    """Writes the folder `path`: `write` fills a new folder beside it, which then replaces `path`.

    Args:
        path: the folder. It may exist if `require_replaceable` allows it. If it is a link, the
            folder that it points to is replaced.
        write: fills the empty folder that it receives. If it raises, `path` stays as it was.
        contents: the names of all files and folders that `write` makes in the folder.

    Returns:
        What `write` returned.

    Raises:
        DataError: `require_replaceable` refuses the folder; `write` has not been called.
        OSError: the folder cannot be written.
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
            if written.is_symlink():  # it points to a user's file, which must not change
                continue
            # mkdtemp and safetensors let only the owner read what they make
            written.chmod(0o755 if written.is_dir() else 0o644)
            _reach_disk(written)
        require_replaceable(path, contents)  # files may have appeared meanwhile
        if path.is_dir():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        # `path` is missing after Ctrl-C between the two renames, or on Windows if a virus scanner
        # has opened a new file. An old result that cannot be renamed back is not deleted.
        if old.is_dir() and not path.exists():
            os.rename(old, path)
        if not old.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    _reach_disk(path.parent)
    return result


def require_replaceable(path: Path, contents: Collection[str]) -> None:
    """Raises unless a result may replace the folder: it must be new, empty or an earlier result.

    An earlier result holds exactly the names in `contents`. A folder that holds only some of them
    may hold a user's own files. Call this first if the work before writing takes long.

    Raises:
        DataError: `path` is a file, the working directory, or holds other files.
    """
    given, path = path, path.resolve()
    if path.exists() and not path.is_dir():
        raise DataError(
            f"{given}: this is a file, expected a folder to write to; choose another folder."
        )
    if path == Path.cwd():
        raise DataError(
            f"{given}: this is the folder you are in, which would be replaced; choose another "
            "folder."
        )
    held = {item.name for item in path.iterdir()} if path.is_dir() else set()
    if held and held != {*contents}:
        lost = sorted(held - {*contents}) or sorted(held)
        raise DataError(
            f"{given}: this folder holds {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}, "
            f"which would be lost; choose another folder, or one that holds only an earlier result "
            f"({', '.join(contents)})."
        )


def write_results(path: Path, write: Callable[[Path], Result], contents: Collection[str]) -> Result:
    """Does what `write_folder` does, for a folder that the user named on the command line.

    Raises:
        DataError: `require_replaceable` refuses the folder, or it cannot be written, for example
            because the disk is full.
    """
    try:
        return write_folder(path, write, contents)
    except OSError as error:
        raise DataError(
            f"{path}: this folder cannot be written ({error}); make room or choose another folder."
        ) from error


def _reach_disk(path: Path) -> None:
    """Returns when a file's content, or the names in a folder, would survive a power cut.

    On Windows, names may take longer.
    """
    # Windows does not open folders, and flushes only files that are open for writing.
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    elif sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
