"""Distribute work over the processes of `accelerate launch` or `torchrun`; a single process does all of it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import FrameType
from typing import Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import gather_object, parse_flag_from_env

Task = TypeVar("Task")
Result = TypeVar("Result")


def processes() -> PartialState:
    """Return accelerate's state of the processes, on the CPU if ACCELERATE_USE_CPU is set, as in `Accelerator`."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def map_over_processes(tasks: Sequence[Task], work: Callable[[Task], Result]) -> list[Result]:
    """Run `work` on every task, shared round-robin by the processes; each returns all results, in task order.

    Args:
        tasks: the same on every process.
        work: function with picklable results; a process without tasks does not call it.
    """
    state = processes()
    own = range(state.process_index, len(tasks), state.num_processes)
    done = dict(gather_object([(number, work(tasks[number])) for number in own]))
    return [done[number] for number in range(len(tasks))]


def map_ahead(work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Yield the result of each task in order; another thread works on the next one meanwhile.

    An error of a task is raised where its result is due.
    """
    with ThreadPoolExecutor(max_workers=1) as worker:
        following: Future[Result] | None = None
        for task in tasks:
            due, following = following, worker.submit(work, task)
            if due is not None:
                yield due.result()
        if following is not None:
            yield following.result()


def process_seed(seed: int) -> int:
    """Return a seed for this process: `seed` on the main process, a different one on each other.

    Seeds are offset by 2**20 per process: unlikely to collide with a seed a user picks, and still within the 32 bits
    that PyTorch's CPU generator uses.
    """
    return seed + (processes().process_index << 20)


_chosen = "auto"
"""What the matrix products of policy and reference are computed in; auto: as `accelerate launch` was told."""


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Compute the matrix products of models in a precision; trained weights, sums and losses stay float32.

    Args:
        precision: "float32", "bfloat16", or "auto", which changes nothing.

    Raises:
        ValueError: `accelerate launch` was told another one.
    """
    global _chosen
    before, launched = _chosen, _launched()
    if precision == "float32" and launched != "no":
        raise ValueError(f"precision: got float32 under --mixed_precision {launched}, expected one of the two alone")
    _chosen = precision if precision != "auto" else before
    try:
        yield
    finally:
        _chosen = before


class _HasPrecision(Protocol):
    @property
    def precision(self) -> str: ...


Config = TypeVar("Config", bound=_HasPrecision)
Rest = ParamSpec("Rest")


def in_its_precision(
    work: Callable[Concatenate[Config, Rest], Result],
) -> Callable[Concatenate[Config, Rest], Result]:
    """Let a function compute in the precision of its first argument, the settings."""

    @wraps(work)
    def inside(config: Config, *args: Rest.args, **more: Rest.kwargs) -> Result:
        with computing_in(config.precision):
            return work(config, *args, **more)

    return inside


def mixed_precision() -> str:
    """Return the precision, "no" or "bf16", of `computing_in` or else accelerate's, also before an `Accelerator`."""
    return _launched() if _chosen == "auto" else "bf16" if _chosen == "bfloat16" else "no"


def _launched() -> str:
    if is_initialized():
        return AcceleratorState().mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def autocast(device: torch.device) -> AbstractContextManager:
    """Enter accelerate's mixed precision, so that the reference is scored and sampled as the policy is trained."""
    if mixed_precision() != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def quiet_libraries() -> None:
    """Turn off the progress bars and informational messages of datasets, transformers and accelerate."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the progress bars with which transformers loads a model."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def hidden(progress: bool) -> bool:
    """Return whether to hide a progress bar: not requested, not the main process, or no one to see it."""
    return not (progress and watched() and processes().is_main_process)


def watched() -> bool:
    """Return whether standard error is a terminal or a notebook; in a log file a progress bar is noise."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM: the program ends as on Ctrl-C, with exit status 143."""


def end_on_sigterm() -> None:
    """Make SIGTERM raise `Terminated`, so that temporary folders and locks are released; call in the main thread."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
