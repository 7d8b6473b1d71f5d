"""Keeps framed cases on disk, so that later epochs, workers and runs decode nothing.

A case is one file of safetensors, which is mapped and not read: a patch of a volume costs what it
holds. Its name is a hash of what it was made from, so that a file that changes is framed anew.

MONAI's PersistentDataset was tried and is not used: it names a case by what its transforms are
given, so that a file that changes under its name gives the old frame; it reads frames whole; and a
frame that is cut off ends the run, where here it is made anew.

For a made file of FairSeg's kind, 512 x 664 pixels framed to 224², one core of a small machine took
3.0 ms to decode, 2.0 ms to frame, 0.6 ms to load the frame, and 1.8 ms to augment it as the paper
does: what then limits is the augmentation, and that goes up with the workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError
from ..files import write_whole
from .cases import Case, Dataset
from .framing import Framing

VERSION = 5  # of what is stored; raised when loading or framing gives other pixels than before


def default_cache() -> Path:
    """Names the folder where the user's programs keep caches: a data set's may be read-only."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmoe-frames"


class FrameCache:
    """Keeps the frames of cases that are read from files.

    Args:
        folder: made where missing, readable by its owner only, since it holds patients' images.
        dataset: whose cases they are.
        framing: of the frames.

    Raises:
        DataError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, dataset: Dataset, framing: Framing) -> None:
        self._folder = folder
        self._made_by = [
            VERSION,
            dataset.name,
            dataset.made_with,
            type(framing).__name__,
            vars(framing),
        ]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cache folder {folder}: {error.strerror or error}; choose another (`cache`)"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DataError(
                f"cache folder {folder}: cannot be written to; choose another (`cache`)"
            )

    def frame(self, case: Case, make: Callable[[Case], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Gives what is kept of `case`, by name: stored before and mapped, or made now and stored.

        Raises:
            DataError: a file of the case is missing, or the frame cannot be stored.
        """
        path = self._path(case)
        try:
            with safe_open(path, "pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError):
            # Damaged on disk: as if it had never been stored. Windows deletes none that is mapped.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.unlink()
        frame = make(case)
        try:
            write_whole(path, lambda target: save_file(frame, target))
        except (OSError, SafetensorError) as error:
            if path.exists():
                return frame  # another process was first, and Windows replaces no file in use
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"cache folder {self._folder}: {reason}; make room or choose another (`cache`)"
            ) from error
        return frame

    def _path(self, case: Case) -> Path:
        """Names a case's file by all that its frame is made from.

        Raises:
            DataError: a file of the case is missing.
        """
        files = []
        for name in case.files:
            try:
                status = os.stat(name)
            except OSError as error:
                raise DataError(f"{name}: {error.strerror} (case {case.case_id})") from error
            # The time of the last change of any kind (ctime) shows a file that was put in another's
            # place with its times kept, as unpacking and copying may do. (Windows has the time of
            # making there.)
            times = [status.st_mtime_ns, status.st_ctime_ns]
            files.append([os.path.realpath(name), status.st_size, *times])
        key = json.dumps([*self._made_by, case.case_id, files])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
