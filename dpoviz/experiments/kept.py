"""What a run keeps beside its tables, so that it can be explored later: its reference, its pairs, frozen quantities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.forms import Form
from dpoviz.lm.models import weights_fingerprint

MOST_FROZEN = 4096
"""The most training pairs whose frozen quantities are kept: enough to train a beta on, and a pass of seconds."""

SMALL = 64 * 2**20
"""The most bytes of weights with which the reference is saved in the folder of the run."""


def reference_record(model: PreTrainedModel, held_out: Dataset) -> dict[str, object]:
    """Return how to find the reference again: name, fingerprint, dtype, four_bit, and whether its prompts are chats."""
    chats = held_out["messages"][:] if "messages" in held_out.column_names else [None]
    return {
        "name": model.name_or_path,
        "fingerprint": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "four_bit": getattr(model, "is_loaded_in_4bit", False),
        "chat": all(chats),
    }


def save_if_small(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the reference in the folder of the run, unless its weights take more than `SMALL` bytes."""
    if sum(weight.nbytes for weight in model.parameters()) <= SMALL:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def frozen_rows(pairs: int, seed: int) -> list[int]:
    """Return the numbers of the training pairs whose frozen quantities are kept: all, or a sample by the seed."""
    if pairs <= MOST_FROZEN:
        return list(range(pairs))
    return sorted(np.random.default_rng([seed, 17]).choice(pairs, MOST_FROZEN, replace=False).tolist())


def frozen_table(pairs: Dataset, h: Mapping[Form, np.ndarray]) -> pd.DataFrame:
    """Return the quantities that training beta alone holds fixed: a row per pair.

    Args:
        pairs: N scored training pairs.
        h: (N,) of the policy after the last step, in nats, by form.

    Returns:
        task, prompt, ref_entropy, features (D numbers per row), and h/<form>.
    """
    rows = pairs.select_columns(["task", "prompt", "ref_entropy", "ref_features"]).to_pandas()
    rows = rows.rename(columns={"ref_features": "features"})
    return rows.assign(**{f"h/{form}": values for form, values in h.items()})
