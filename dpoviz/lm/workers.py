"""Run independent tasks in parallel processes of one thread each, none of which outlives its parent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context
from typing import TypeVar

import torch
from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: the last digits of a sum depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def started(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
) -> Iterator[list[Callable[[], Result]]]:
    """Start ``work(task)`` for each task in worker processes, each on one thread, and yield a function per task.

    The function waits for the task's result and returns it. With one thread each, results do not depend on the number
    of cores. The workers end with the context, and with their parent, even if it is killed. Ctrl-C reaches the parent
    alone, which ends them.

    Args:
        work: a function that `pickle` can handle, as it must its tasks and results.
        tasks: the arguments of the calls.
        workers: the largest number of processes.

    Raises:
        ChildProcessError: from the function, if a worker process was killed.
    """
    if not tasks:
        yield []
        return
    others = set(active_children())
    # spawned, not forked: PyTorch's threads do not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), _begin, (os.getpid(),))
    try:
        with _interrupts_blocked():  # a new process inherits that
            futures = [pool.submit(work, task) for task in tasks]
        yield [partial(_result, future) for future in futures]
    except BaseException:
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_side_by_side(work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """Yield ``work(task)`` for each task, in order; arguments and errors are those of `started`."""
    with started(work, tasks, workers=workers) as results:
        for result in results:
            yield result()


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps because memory ran out; the same command resumes the run, "
            "and fewer workers need less memory"
        ) from error


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int) -> None:
    """Prepare a worker: one thread, quiet libraries, and an end with its parent."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from dpoviz.lm.processes import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    tqdm.set_lock(threading.RLock())  # its own is shared by processes: one that is killed would leak it


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
