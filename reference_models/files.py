"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
        with target.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(target, path)
    finally:
        target.unlink(missing_ok=True)
