"""Work that several processes share, as `accelerate launch` or `torchrun` starts them; one alone does all of it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import NoReturn, TypeVar

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import gather_object, parse_flag_from_env

Task = TypeVar("Task")
Result = TypeVar("Result")


def processes() -> PartialState:
    """Accelerate's view of the processes; on the CPU, where ACCELERATE_USE_CPU says so, as `Accelerator` reads it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def map_over_processes(tasks: Sequence[Task], work: Callable[[Task], Result]) -> list[Result]:
    """``work(task)`` for each task, in their order: every n-th by a process, and all results on every process.

    Args:
        tasks: the same on every process.
        work: its results must be such as `pickle` takes; a process that has no task does not call it.
    """
    state = processes()
    own = range(state.process_index, len(tasks), state.num_processes)
    done = dict(gather_object([(number, work(tasks[number])) for number in own]))
    return [done[number] for number in range(len(tasks))]


def process_seed(seed: int) -> int:
    """A seed for this process's draws: `seed` itself on the first, others on the others.

    Far from the seeds that people take, and within the 32 bits that PyTorch's generator on the CPU reads.
    """
    return seed + (processes().process_index << 20)


def mixed_precision() -> str:
    """Return accelerate's mixed precision, "no" or "bf16" or another: what `Accelerator` has, or what it would read."""
    if is_initialized():
        return AcceleratorState().mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def autocast(device: torch.device) -> AbstractContextManager:
    """Enter accelerate's mixed precision, in which the reference is scored and sampled as the policy is."""
    if mixed_precision() != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def quiet_libraries() -> None:
    """Turn off the progress bars and the chatter of datasets, transformers and accelerate."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def hidden(progress: bool) -> bool:
    """Return whether a progress bar is hidden: not asked for, not of the main process, or watched by nobody."""
    return not (progress and watched() and processes().is_main_process)


def watched() -> bool:
    """Return whether anybody sees a progress bar: in a terminal and in a notebook; in a log file it is noise."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the program ends as by Ctrl-C, and its exit status is 143."""


def end_on_sigterm() -> None:
    """Have SIGTERM raise `Terminated`, so that scratch folders are removed and locks are freed; for the main thread."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
