"""A folder of results that is written whole or not at all, and again in place of an older one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from .data.cases import DataError

Result = TypeVar("Result")


def write_folder(path: Path, write: Callable[[Path], Result], contents: Collection[str]) -> Result:
    """Calls `write` with an empty folder beside `path`, then puts that in `path`'s place.

    Args:
        path: the folder; it may be there already if it holds nothing but `contents`, which are
            then replaced.
        write: fills a folder. If it raises, `path` stays as it was.
        contents: the names that `write` makes, all of them or some.

    Returns:
        What `write` returned.

    Raises:
        DataError: `path` is no folder, or holds something else; before `write` is called.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is a file, expected a folder to write to; choose another.")
    if path.is_dir() and (other := sorted({item.name for item in path.iterdir()} - {*contents})):
        raise DataError(
            f"{path}: holds {', '.join(other[:5])}{', ...' if len(other) > 5 else ''}, which would "
            f"be lost; choose another folder, or one with nothing but {', '.join(contents)}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        new = staging / "new"
        new.mkdir()
        result = write(new)
        for written in new.rglob("*"):
            _reach_disk(written)
        if path.is_dir():
            os.rename(path, staging / "old")
        os.rename(new, path)
        _reach_disk(path.parent)
        return result
    finally:
        shutil.rmtree(staging)


def _reach_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
