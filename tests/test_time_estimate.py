"""The time estimate: proportion by hand from the times of the kinds of work, and a real run of the measuring."""

import pytest
import torch
from datasets import Dataset

from dpoviz.experiments import time_estimate as module
from dpoviz.experiments.time_estimate import time_parts


def pairs(*lengths):
    """Pairs of these prompt and answer lengths."""
    return Dataset.from_list(
        [
            {"prompt_ids": [5 + i] * p, "chosen_ids": [6] * c, "rejected_ids": [7] * r}
            for i, (p, c, r) in enumerate(lengths)
        ]
    )


SETTINGS = {
    "samples": 3,
    "max_new_tokens": 20,
    "steps": 40,
    "batch_size": 8,
    "evaluations": 5,
    "eos_id": 2,
    "pad_id": 0,
}


def test_proportion_by_hand(make_model, monkeypatch):
    """With a clock that says: forward 1 s, training step 3 s, one token each 2 s, nine tokens each 10 s."""
    times = iter([1.0, 3.0, 2.0, 10.0])
    monkeypatch.setattr(module, "_seconds", lambda call: next(times))
    train, held_out = pairs((2, 3, 5), (4, 8, 8), (6, 9, 15)), pairs((1, 2, 2))
    found = time_parts(make_model(), train, held_out, **SETTINGS, scored_again=7)
    tokens = 20 + 30  # the two pairs from the median on
    forward, step = 1 / tokens, 3 / tokens
    prompt, token = 2 / 2, (10 / 2 - 2 / 2) / (8 * 3)
    assert found["reference"] == pytest.approx(forward * (10 + 20 + 30 + 5))
    assert found["entropy"] == pytest.approx(4 * (prompt + token * 3 * 20))
    assert found["training"] == pytest.approx(step * 20 * 8 * 40 + forward * (5 * 5 + 20 * 7))


def test_measures_a_real_model(make_model):
    model = make_model(dtype=torch.float32)
    found = time_parts(model, pairs((2, 3, 5), (4, 8, 8), (6, 9, 15)), pairs((1, 2, 2)), **SETTINGS)
    assert set(found) == {"reference", "entropy", "training"}
    assert all(0 < seconds < 600 for seconds in found.values())
    assert all(p.grad is None for p in model.parameters())
    longer = time_parts(model, pairs((2, 3, 5), (4, 8, 8)), pairs((1, 2, 2)), **{**SETTINGS, "steps": 40_000})
    assert longer["training"] > 100 * found["training"]
