"""Run independent tasks in parallel processes of one thread each, none of which outlives its parent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_side_by_side(work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """Yield ``work(task)`` for each task, in order; several processes run them, each on one thread.

    The last digits of a sum depend on the number of threads: with one thread each, results do not depend on the number
    of cores. A worker process ends when its parent ends, even if the parent is killed.

    Args:
        work: a function that `pickle` can handle, as it must its tasks and results.
        tasks: the arguments of the calls.
        workers: the largest number of processes.

    Raises:
        ChildProcessError: a process was killed.
    """
    if not tasks:
        return
    # spawned, not forked: PyTorch's threads do not survive a fork
    context, few = get_context("spawn"), min(workers, len(tasks))
    pool = ProcessPoolExecutor(few, context, initializer=_begin, initargs=(os.getpid(),))
    try:
        for future in [pool.submit(work, task) for task in tasks]:
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps because memory ran out; the same command resumes the run, "
            "and fewer workers need less memory"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(parent: int) -> None:
    """Prepare a worker: one thread, quiet libraries, and an end with its parent."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    from dpoviz.lm.processes import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
