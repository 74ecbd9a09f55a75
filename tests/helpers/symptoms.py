"""Runs of the small world with a symptom planted in each, and one that is healthy, for the doctor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from dpoviz.experiments.pipeline import ScoredPairs, run
from dpoviz.experiments.small import World
from dpoviz.lm.reference import reference_pass
from dpoviz.training.config import TrainSettings
from dpoviz.training.stages import Variant

HEALTHY = TrainSettings(
    stage1_steps=12,
    stage2_steps=24,
    batch_size=16,
    log_every=1,
    probe_every=0,
    probe_prompts=6,
    max_new_tokens=32,
    checkpoint_every=1000,
    warmup_steps=4,
    policy_learning_rate=2e-4,
)
"""Settings of a run in which nothing is wrong: two passes over the pairs at most, and every term at its default."""


def flipped(pairs: Dataset, task: str) -> Dataset:
    """The pairs with chosen and rejected swapped in one task."""

    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {name: "_".join(other.get(part, part) for part in name.split("_")) for name in pairs.column_names}
    return Dataset.from_list(
        [{name: row[swapped[name]] for name in swapped} if row["task"] == task else row for row in pairs]
    )


def of_prompts(pairs: Dataset, prompts_per_task: int, rng: np.random.Generator) -> Dataset:
    """The pairs of some prompts of each task, drawn at random."""
    rows = pairs.select_columns(["task", "prompt"]).to_pandas()
    drawn = {
        prompt
        for _, own in rows.groupby("task")
        for prompt in rng.permutation(own["prompt"].unique())[:prompts_per_task]
    }
    return pairs.select(np.flatnonzero(rows["prompt"].isin(drawn)))


@dataclass(frozen=True)
class Plant:
    """How a symptom is planted: settings that differ from the healthy ones, and a change of the pairs."""

    finds: str
    settings: dict[str, Any] = field(default_factory=dict)
    train: Callable[[World, Dataset], Dataset] = lambda world, pairs: pairs
    held_out: Callable[[World, Dataset], Dataset] = lambda world, pairs: pairs


def _scored_again(world: World, pairs: Dataset, max_new_tokens: int = 32) -> Dataset:
    columns = ["prompt", "chosen", "rejected", "task", "group", "line"]
    return reference_pass(
        world.reference,
        world.tokenizer,
        pairs.select_columns(columns),
        max_length=world.reference.config.max_position_embeddings,
        entropy_samples=2,
        max_new_tokens=max_new_tokens,
        cache_dir=None,
        progress=False,
    )


def _cut(world: World, pairs: Dataset) -> Dataset:
    """The same pairs, with entropies of answers of four tokens at most."""
    return _scored_again(world, pairs, max_new_tokens=4)


def _near_copies(world: World, pairs: Dataset) -> Dataset:
    """Pairs whose answers differ in their end only, so that their margins measure little of where the policy goes."""
    copies = [row | {"rejected": row["chosen"] + "."} for row in pairs.select(range(64))]
    return _scored_again(world, Dataset.from_list(copies))


PLANTS = {
    "bound": Plant("beta at a bound", {"scale_min": 0.09, "scale_max": 0.11, "lambda_entropy": 0.0, "beta_learning_rate": 1e-2}),
    "constant": Plant("beta constant", {"lambda_smoothness": 1e3}),
    "entropy": Plant("beta follows the entropy", {"lambda_entropy": 10.0, "beta_learning_rate": 1e-2}),
    "swamped": Plant("one term swamps the others", {"lambda_entropy": 100.0, "beta_learning_rate": 1e-4}),
    "fall": Plant("both log-ratios fall", {"policy_learning_rate": 8e-4, "stage2_steps": 48}),
    "memory": Plant("training pairs memorised", {"policy_learning_rate": 1e-3, "stage2_steps": 48}, lambda w, p: p.select(range(32))),
    "kl": Plant("KL beyond the margins", {"policy_learning_rate": 1e-2}, _near_copies, _near_copies),
    "few": Plant("few prompts", {}, held_out=lambda w, p: of_prompts(p, 5, np.random.default_rng(0))),
    "cut": Plant("entropies cut", {}, held_out=_cut, train=_cut),
    "flipped in training": Plant("labels look flipped", {"policy_learning_rate": 6e-4, "stage2_steps": 48}, lambda w, p: flipped(p, "code")),
    "flipped in all": Plant("labels look flipped", {}, lambda w, p: flipped(p, "code"), lambda w, p: flipped(p, "code")),
}
