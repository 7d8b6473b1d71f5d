"""Stores framed cases on disk, so that later epochs, workers and runs need not decode images.

Each case is one safetensors file, which is mapped into memory, so that a patch reads only its own
part of the file. The file's name is a hash of everything that it was made from, so that a case
whose files change is framed again.

MONAI's PersistentDataset was tried and is not used: it names a case by the arguments of its
transforms, so that a file that changes under the same name gives the old frame; it reads whole
frames; and a frame that is cut off ends the run, where here the frame is made again.

For a synthetic file like FairSeg's, 512 x 664 pixels framed to 224², one core of a small machine
took 3.0 ms to decode, 2.0 ms to frame, 0.6 ms to load the frame, and 1.8 ms to augment it as the
paper does. Augmentation is then the slowest step, and more workers speed it up.
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

VERSION = 5  # of the stored frames; raise it when loading or framing gives other pixels


def default_cache() -> Path:
    """Names a folder among the user's caches, since a data set's own folder may be read-only."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmoe-frames"


class FrameCache:
    """Stores the frames of cases that are read from files.

    Args:
        folder: the folder of the cache. It is made if it is missing, and only its owner can read
            it, since it holds patients' images.
        dataset: the data set of the cases.
        framing: makes the frames.

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
                f"cache folder {folder}: it cannot be made ({error.strerror or error}); choose "
                "another one by --cache"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DataError(
                f"cache folder {folder}: it cannot be written to; choose another one by --cache"
            )

    def frame(self, case: Case, make: Callable[[Case], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Gives the tensors of a case's frame by name, from the cache or from `make`.

        Args:
            case: the case.
            make: makes the frame; what it returns is stored.

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
            # The stored frame is damaged and is made again. Windows does not delete mapped files.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.unlink()
        frame = make(case)
        try:
            write_whole(path, lambda target: save_file(frame, target))
        except (OSError, SafetensorError) as error:
            if path.exists():
                return frame  # another process stored it first, and Windows replaces no file in use
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"cache folder {self._folder}: a frame cannot be stored ({reason}); make room, or "
                "choose another folder by --cache"
            ) from error
        return frame

    def _path(self, case: Case) -> Path:
        """Names a case's file by everything that its frame is made from.

        Raises:
            DataError: a file of the case is missing.
        """
        files = []
        for name in case.files:
            try:
                status = os.stat(name)
            except OSError as error:
                raise DataError(
                    f"{name}: this file of case {case.case_id} cannot be read ({error.strerror})"
                ) from error
            # The time of the last change of any kind (ctime) also shows that a file was replaced by
            # one with the same modification time, as unpacking and copying may do. (On Windows it
            # is the time of creation.)
            times = [status.st_mtime_ns, status.st_ctime_ns]
            files.append([os.path.realpath(name), status.st_size, *times])
        key = json.dumps([*self._made_by, case.case_id, files])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
