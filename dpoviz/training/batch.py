"""Batches of scored pairs, and their order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ANSWER_ENTROPY = ("ref_chosen_entropy", "ref_rejected_entropy")
"""Columns read only by rules that need the reference's entropy along the answers."""

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
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    task: list[str]
    ref_logps: Tensor
    ref_entropy: Tensor
    x: Tensor
    answer_entropy: Tensor | None


def read_batch(rows: Mapping[str, Any], device: torch.device | str) -> Batch:
    """Return rows of the data set, such as ``pairs[[3, 1, 4]]``, as a batch."""

    def tensor(values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    known = all(name in rows for name in ANSWER_ENTROPY)
    return Batch(
        prompts=rows["prompt_ids"],
        answers=[list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)],
        task=rows["task"],
        ref_logps=torch.stack([tensor(rows["ref_chosen_logps"]), tensor(rows["ref_rejected_logps"])], dim=1),
        ref_entropy=tensor(rows["ref_entropy"]),
        x=tensor(rows["ref_features"]),
        answer_entropy=answer_entropy(rows).to(device) if known else None,
    )


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
