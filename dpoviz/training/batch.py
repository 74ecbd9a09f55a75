"""Batches of scored pairs, and their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dpoviz.lm.packing import PrefixBatch

ANSWER_ENTROPY = ("ref_chosen_entropy", "ref_rejected_entropy")
"""Columns read only by rules that need the reference's entropy along the answers."""

REWARD_MARGIN = "reward_margin"
"""Column read only by rules that need a reward model's margin of each pair."""

COLUMNS = (
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "task",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_entropy",
    "ref_features",
)
"""Columns that training reads, as `reference_pass` returns them."""

NUMBERS = COLUMNS[4:]
"""Those that hold numbers."""


class Batch(NamedTuple):
    """B scored pairs.

    Attributes:
        prompts: B prompts as token ids.
        answers: for each prompt, the chosen and the rejected answer as token ids.
        task: the task of each prompt.
        ref_logps: (B, 2) log π_ref of chosen and rejected, in nats.
        ref_entropy: (B,) entropy of the reference at the prompt, in nats per token.
        x: (B, D) features of the prompts.
        answer_entropy: (B,) the reference's next-token entropy in nats per token, averaged along each answer and then
            over the two; None where the pairs lack it.
        reward_margin: (B,) a reward model's margin of each pair; None where the pairs lack it.
        laid_out: prompts and answers of each part as rows of tokens, if they were laid out ahead.
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    task: list[str]
    ref_logps: Tensor
    ref_entropy: Tensor
    x: Tensor
    answer_entropy: Tensor | None
    reward_margin: Tensor | None
    laid_out: tuple[PrefixBatch, ...] | None = None

    def parts(self, count: int) -> Iterator[Part]:
        """Yield the batch in `count` parts of consecutive pairs, as equal as they can be."""
        rows_of = part_rows(len(self.prompts), count)
        for rows, laid_out in zip(rows_of, self.laid_out or [None] * len(rows_of), strict=True):
            yield Part(self.prompts[rows], self.answers[rows], laid_out)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; a GPU copies pinned memory while it computes."""

        def there(value: object) -> Any:
            return value.to(device, non_blocking=value.is_pinned()) if isinstance(value, Tensor) else value

        laid_out = None if self.laid_out is None else tuple(part.to(device) for part in self.laid_out)
        return Batch(*map(there, self))._replace(laid_out=laid_out)

    def pinned(self) -> Batch:
        """Return the batch in pinned memory."""
        values: Any = (value.pin_memory() if isinstance(value, Tensor) else value for value in self)
        laid_out = None if self.laid_out is None else tuple(part.pinned() for part in self.laid_out)
        return Batch(*values)._replace(laid_out=laid_out)


class Part(NamedTuple):
    """Pairs that pass through the policy together: prompts, answers, and their rows of tokens if laid out ahead."""

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    laid_out: PrefixBatch | None


def part_rows(pairs: int, count: int) -> list[slice]:
    """Return the rows of each of `count` parts of a batch; empty parts are left out."""
    ends = [pairs * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if b > a]


def read_batch(rows: Mapping[str, Any]) -> Batch:
    """Return rows of the data set, such as ``pairs[[3, 1, 4]]``, as a batch on the CPU."""

    def tensor(values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    known = all(name in rows for name in ANSWER_ENTROPY)
    return Batch(
        prompts=rows["prompt_ids"],
        answers=[list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)],
        task=rows["task"],
        ref_logps=torch.stack([tensor(rows["ref_chosen_logps"]), tensor(rows["ref_rejected_logps"])], dim=1),
        ref_entropy=tensor(rows["ref_entropy"]),
        x=tensor(rows["ref_features"]),
        answer_entropy=answer_entropy(rows) if known else None,
        reward_margin=tensor(rows[REWARD_MARGIN]) if REWARD_MARGIN in rows else None,
    )


def require_finite(name: str, data: Dataset, column: str) -> None:
    """Raise for a column whose numbers are not all finite.

    Raises:
        ValueError: names up to ten rows; `name` is that of the data.
    """
    values = np.asarray(data.with_format("numpy")[column][:])
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{name}: {column} is {data.features[column]}, expected a number in each row")
    values = values.reshape(len(data), -1)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
    if bad:
        raise ValueError(f"{name}: {column} is not finite in rows {bad[:10]}, expected finite numbers")


def answer_entropy(rows: Mapping[str, Sequence]) -> Tensor:
    """Return (B,) the reference's entropy along the answers of each pair, in nats per token.

    Args:
        rows: rows of the pairs that `reference_pass` returned.
    """
    means = [
        [total / len(ids) for total, ids in zip(rows[sums], rows[answers], strict=True)]
        for sums, answers in zip(ANSWER_ENTROPY, ("chosen_ids", "rejected_ids"), strict=True)
    ]
    return torch.tensor(means, dtype=torch.float32).mean(dim=0)


def shuffled_rows(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Return the row numbers of each step: successive permutations of the data, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)] or [torch.empty(0)])
    return order[: steps * batch_size].long().view(steps, batch_size).tolist()
