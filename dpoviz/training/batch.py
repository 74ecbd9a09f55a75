"""A batch out of rows of the data set."""

from __future__ import annotations

import torch
from torch import Tensor

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


def batch_columns(rows: dict[str, list], device: torch.device) -> dict[str, object]:
    """A batch out of rows of the data set: token ids as lists, numbers as (B,) tensors, x (B, D)."""

    def tensor(name: str) -> Tensor:
        return torch.tensor(rows[name], dtype=torch.float32, device=device)

    return {
        "rows": rows,
        "prompt_ids": rows["prompt_ids"],
        "answer_ids": [list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)],
        "task": rows["task"],
        "ref_logps": torch.stack([tensor("ref_chosen_logps"), tensor("ref_rejected_logps")], dim=1),
        "ref_entropy": tensor("ref_entropy"),
        "x": tensor("ref_features"),
    }
