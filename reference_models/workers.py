"""Processes that the study's jobs run in: they end with the one that asked, however that ends.

Not those of loky: they go on with their job where their parent is killed (tried with loky 3.7).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from .errors import RunError


class Pool:
    """Processes that take calls, as an executor; those of `workers`."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def submit(self, act: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls a function in one of the processes, which the first calls start."""
        # They are born deaf to Ctrl-C, which is this process's to answer.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._executor.submit(act, *arguments)
        finally:
            signal.signal(signal.SIGINT, answer)


@contextmanager
def workers(processes: int) -> Iterator[Pool]:
    """A pool of so many processes, of one thread each.

    Where the block ends by an exception, Ctrl-C among them, what they were at is broken off.

    Raises:
        RunError: one of them was ended from outside.
    """
    others = {*multiprocessing.active_children()}
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    try:
        yield Pool(executor)
    except BaseException as error:
        for worker in {*multiprocessing.active_children()} - others:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                "A process was ended from outside, for lack of memory perhaps. What is done is "
                "kept: give the same command again, with fewer --processes if it has them."
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows hands on no deafness
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
