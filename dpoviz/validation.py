"""Checks that several modules share, with one wording: "<argument>: got X, expected Y"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_TRUSTED: ContextVar[bool] = ContextVar("values are trusted", default=False)


@contextmanager
def trusted_values() -> Iterator[None]:
    """Check shapes and types of tensors but not their values, for which the CPU would wait for a GPU.

    For a caller that has checked the values itself.
    """
    token = _TRUSTED.set(True)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def refused(wrong: Tensor) -> bool:
    """Return whether any value of a boolean tensor is True; False without a look inside `trusted_values`."""
    return not _TRUSTED.get() and bool(wrong.any())


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a ValueError that gives the argument, its value and the expected value, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def require_positive(name: str, value: object) -> None:
    """Refuse anything but a positive finite int or float of Python's own types, which a config file can hold."""
    holds = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    require(name, value, holds, "a positive finite number")


def rows_where(wrong: Tensor) -> list[int]:
    """Return the indices of the rows of a boolean tensor that contain a True."""
    return wrong.reshape(len(wrong), -1).any(dim=1).nonzero().flatten().tolist()


def require_rows(name: str, values: Tensor, batch: int | None = None) -> None:
    """Refuse anything but one finite floating number per row.

    Args:
        name: the argument's name, for the message.
        values: must be (B,), B at least 1.
        batch: the expected B; None accepts any.

    Raises:
        ValueError: `values` is not a floating tensor of shape (B,), has no rows or another B, or has non-finite rows
            (the message lists them).
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = f"a {values.dtype} tensor" if isinstance(values, Tensor) else repr(values)
        raise ValueError(f"{name}: got {got}, expected a floating tensor of shape (B,)")
    if values.ndim != 1 or len(values) == 0 or (batch is not None and len(values) != batch):
        expected = "(B,) with B at least 1" if batch is None else f"({batch},)"
        # a linear layer returns (B, 1), which would silently broadcast to (B, B) when combined with (B,)
        hint = "; drop the last axis with .squeeze(-1)" if values.ndim == 2 and values.shape[1] == 1 else ""
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected {expected}{hint}")
    if refused(~torch.isfinite(values)):
        raise ValueError(f"{name}: not finite in rows {rows_where(~torch.isfinite(values))}, expected finite numbers")


def require_positive_rows(name: str, values: Tensor) -> None:
    """Refuse anything but one positive finite floating number per row."""
    require_rows(name, values)
    if refused(~(values > 0)):
        raise ValueError(f"{name}: not positive in rows {rows_where(values <= 0)}, expected > 0")


def require_features(x: Tensor, width: int | None = None) -> None:
    """Refuse anything but finite floating features (B, D) with B at least 1; `width` is the expected D."""
    if x.ndim != 2 or len(x) == 0 or not x.is_floating_point() or (width is not None and x.shape[1] != width):
        expected = "(B, D)" if width is None else f"(B, {width})"
        raise ValueError(f"x: got a {x.dtype} tensor of shape {tuple(x.shape)}, expected floating {expected}, B ≥ 1")
    if refused(~torch.isfinite(x)):
        raise ValueError(f"x: not finite in rows {rows_where(~torch.isfinite(x))}, expected finite features")


def task_index(task: Tensor | Sequence[str] | None, batch: int, names: Sequence[str] | None = None) -> Tensor:
    """Return the task of each row as an index: (B,) int64.

    Args:
        task: (B,) integers, or B names.
        batch: B.
        names: the known tasks, in the order of their indices; None numbers the tasks of the batch from 0.

    Raises:
        ValueError: `task` is not one name or integer per row, or contains an unknown task.
    """
    if isinstance(task, Tensor):
        if task.is_floating_point() or task.shape != (batch,):
            raise ValueError(
                f"task: got {task.dtype} of shape {tuple(task.shape)}, expected integers of shape ({batch},)"
            )
        if names is None:
            return torch.unique(task, return_inverse=True)[1]
        if task.min() < 0 or task.max() >= len(names):
            raise ValueError(f"task: got {task.unique().tolist()}, expected 0 to {len(names) - 1}")
        return task.to(torch.int64)
    # a str is a sequence of letters too: one name of B letters would pass as B tasks
    if task is None or isinstance(task, str) or len(task) != batch or not all(isinstance(name, str) for name in task):
        got = repr(task) if task is None or isinstance(task, str) else f"{len(task)} entries"
        known = "" if names is None else f" of {list(names)}"
        raise ValueError(f"task: got {got}, expected {batch} names{known}, one per row, or an integer tensor")
    number = {name: i for i, name in enumerate(dict.fromkeys(task) if names is None else names)}
    unknown = sorted(set(task) - set(number))
    if unknown:
        raise ValueError(f"task: got {unknown}, expected some of {list(number)}")
    return torch.tensor([number[name] for name in task])
