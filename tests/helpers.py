"""What several test files share: sizes, attributes that fit them, and threads of one's own."""

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

B, T, D, E, A = 4, 3, 6, 4, 3  # batch, tokens, width, experts, attribute values
GOOD = torch.tensor([0, 2, 1, 2])

needs_links = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows makes no links without a privilege"
)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="Inductor needs a C++ compiler"
)

# Seconds after which what waits for ever is told of, instead of waiting on. Nothing that ends takes
# so long, whatever else the machine does: it bounds a hang, and never decides a test.
HANG = 1800


def masks_in_full_graphs():
    """What a user of PyTorch 2.8 sets by hand, fullgraph=True sets by itself from 2.10 on."""
    by_hand = {"capture_dynamic_output_shape_ops": True} if torch.__version__ < "2.10" else {}
    return torch._dynamo.config.patch(by_hand)


def run_threads(*works, meeting=None):
    """Runs all at once, in new threads; hands back their results, or raises the first error.

    The error of one breaks ``meeting``, a barrier: the others shall not wait there for it.
    """
    results, errors = [None] * len(works), []

    def target(i, work):
        try:
            results[i] = work()
        except BaseException as error:
            errors.append(error)
            if meeting is not None:
                meeting.abort()

    # One that hangs shall not keep the interpreter from ending.
    threads = [threading.Thread(target=target, args=item, daemon=True) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return results


def in_a_thread(work):
    """Runs ``work`` where no scope was ever opened, and hands back its result or its error."""
    return run_threads(work)[0]


def rewrite(file, text):
    """Writes a file anew, at another time by the file system's clock, which goes by ticks."""
    path = Path(file)
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        path.write_text(text, encoding="utf-8")


def leave_group():
    """A rank's end: waits for the others, and ends the process; what it found is written by then.

    The process group is not destroyed. Gloo's thread frees what is left of the barrier under the
    GIL, and PyTorch 2.13 waits for that thread with the GIL held as the group goes: now and then a
    rank would wait for ever.
    """
    dist.barrier()
    os._exit(0)
