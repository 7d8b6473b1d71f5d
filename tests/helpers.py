"""What several test files share: sizes, attributes that fit them, and a thread of one's own."""

import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

B, T, D, E, A = 4, 3, 6, 4, 3  # batch, tokens, width, experts, attribute values
GOOD = torch.tensor([0, 2, 1, 2])

needs_links = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows makes no links without a privilege"
)


def in_a_thread(work):
    """Runs ``work`` where no scope was ever opened, and hands back its result or its error."""
    outcome = []

    def target():
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def leave_group():
    """A rank's end: waits for the others, and lets its process group go.

    Gloo's thread frees what is left of the barrier under the GIL, and PyTorch 2.13 waits for that
    thread with the GIL held as the group goes: without the pause a rank has waited for ever.
    """
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()
