"""Worker processes for the study's jobs, which end when the process that started them ends.

Workers of loky go on with their job if their parent is killed (tried with loky 3.7).
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
    """The worker processes that `workers` starts; it takes calls as an executor does."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def submit(self, act: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls a function in one of the processes; the first calls start the processes."""
        # The workers inherit that they ignore Ctrl-C, which this process handles.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._executor.submit(act, *arguments)
        finally:
            signal.signal(signal.SIGINT, answer)


@contextmanager
def workers(processes: int) -> Iterator[Pool]:
    """Opens a pool of worker processes, each of which computes in one thread.

    If the block ends by an exception, Ctrl-C included, the workers are stopped.

    Args:
        processes: the number of workers.

    Raises:
        RunError: a worker was ended from outside.
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
                "A process was ended from outside, perhaps because memory ran out. Finished work "
                "is saved: give the same command again, with fewer --processes if it has that flag."
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not inherited
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process with its parent; it would wait for ever if the parent were killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
