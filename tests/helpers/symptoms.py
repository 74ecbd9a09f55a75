"""Runs of the small world with a symptom planted in each, and one that is healthy, for the doctor.

`python -m helpers.symptoms 0:8` (in tests/) trains each with eight seeds and prints hits and false alarms.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from dpoviz.analysis.diagnose import diagnose
from dpoviz.experiments.config import WorldConfig
from dpoviz.experiments.pipeline import ScoredPairs, run
from dpoviz.experiments.small import World, small_world
from dpoviz.forms import FORMS
from dpoviz.lm.reference import default_cache_dir, reference_pass
from dpoviz.training.config import TrainSettings
from dpoviz.training.stages import Variant

WORLD = WorldConfig(
    demonstrations=24_000, hidden_size=64, layers=2, problems=240, samples=6, entropy_samples=4, max_new_tokens=32
)
"""The world of the measurements: prompts enough to draw others for each seed."""

SMALL_WORLD = replace(WORLD, demonstrations=8_000, hidden_size=48, problems=48)
"""A world for tests, made in seconds; few of its answers to math and code are right."""

HEALTHY = TrainSettings(
    stage1_steps=12,
    stage2_steps=24,
    batch_size=16,
    warmup_steps=4,
    log_every=1,
    probe_every=0,
    probe_prompts=6,
    max_new_tokens=32,
    checkpoint_every=1000,
)
"""Settings of a run in which nothing is wrong: less than one pass over the pairs, and every term at its default."""


@dataclass(frozen=True)
class Plant:
    """How a symptom is planted: the settings that differ from the healthy ones, and changes of the pairs.

    Attributes:
        finds: the name of the finding; None in a healthy run.
        settings: fields of `TrainSettings`.
        train: changes the training pairs.
        held_out: changes the held-out pairs.
    """

    finds: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    train: Callable[[World, Dataset], Dataset] = lambda world, pairs: pairs
    held_out: Callable[[World, Dataset], Dataset] = lambda world, pairs: pairs


def _few_pairs(_world: World, pairs: Dataset) -> Dataset:
    return pairs.select(range(32))


def _few_prompts(_world: World, pairs: Dataset) -> Dataset:
    return of_prompts(pairs, 5, np.random.default_rng(0))


def _flipped(_world: World, pairs: Dataset) -> Dataset:
    """Swap chosen and rejected in one task, with all columns that belong to them."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {name: "_".join(other.get(part, part) for part in name.split("_")) for name in pairs.column_names}
    return Dataset.from_list(
        [{name: row[swapped[name]] for name in swapped} if row["task"] == "code" else row for row in pairs]
    )


def _scored_again(world: World, pairs: Dataset, max_new_tokens: int = 32) -> Dataset:
    return reference_pass(
        world.reference,
        world.tokenizer,
        pairs.select_columns(["prompt", "chosen", "rejected", "task", "group", "line"]),
        max_length=world.reference.config.max_position_embeddings,
        entropy_samples=2,
        max_new_tokens=max_new_tokens,
        progress=False,
    )


def _cut(world: World, pairs: Dataset) -> Dataset:
    """The same pairs, with entropies along answers of four tokens at most."""
    return _scored_again(world, pairs, max_new_tokens=4)


def _near_copies(world: World, pairs: Dataset) -> Dataset:
    """Pairs whose answers differ in their last sign only."""
    copies = [row | {"rejected": row["chosen"] + "."} for row in pairs.select(range(0, len(pairs), len(pairs) // 64))]
    return _scored_again(world, Dataset.from_list(copies))


PLANTS = {
    "healthy": Plant(None),
    "bound": Plant(
        "beta at a bound",
        # slowly, and long enough to rest there
        {"scale_max": 0.105, "lambda_entropy": 0.0, "beta_learning_rate": 1e-3, "stage2_steps": 48},
    ),
    "constant": Plant("beta constant", {"lambda_smoothness": 1e3}),
    "entropy": Plant("beta follows the entropy", {"lambda_entropy": 30.0, "beta_learning_rate": 2e-2}),
    "swamped": Plant("one term swamps the others", {"lambda_entropy": 100.0, "beta_learning_rate": 1e-4}),
    "fall": Plant("both log-ratios fall", {"policy_learning_rate": 1e-2}, _near_copies, _near_copies),
    "memory": Plant("training pairs memorised", {"policy_learning_rate": 1e-3, "stage2_steps": 48}, _few_pairs),
    # the policy moves, and the held-out pairs differ in what it was not trained on
    "kl": Plant(
        "KL beyond the margins",
        {"policy_learning_rate": 8e-4, "stage2_steps": 48, "probe_prompts": 20},
        held_out=_near_copies,
    ),
    "few": Plant("few prompts", held_out=_few_prompts),
    "cut": Plant("entropies cut", train=_cut, held_out=_cut),
    "flipped in training": Plant(
        "labels look flipped",
        {},
        _flipped,
    ),
    "flipped in all": Plant("labels look flipped", {}, _flipped, _flipped),
}
"""What is planted, by name."""


def of_prompts(pairs: Dataset, prompts_per_task: int, rng: np.random.Generator) -> Dataset:
    """The pairs of some prompts of each task, drawn at random."""
    rows = pairs.select_columns(["task", "prompt"]).to_pandas()
    drawn = {
        prompt
        for _, own in rows.groupby("task")
        for prompt in rng.permutation(own["prompt"].unique())[:prompts_per_task]
    }
    return pairs.select(np.flatnonzero(rows["prompt"].isin(drawn)))


def trained_run(world: World, name: str, seed: int) -> dict[str, Any]:
    """Train with other prompts for each seed, in the forms by turns; return the arguments of `diagnose`."""
    plant, rng = PLANTS[name], np.random.default_rng(seed)
    train = of_prompts(world.train, 150 if name == "healthy" else 70, rng)
    held_out = of_prompts(world.held_out, 40 if "flipped" in name else 20, rng)
    train, held_out = plant.train(world, train.shuffle(seed=seed)), plant.held_out(world, held_out)
    settings, form = replace(HEALTHY, seed=seed, **plant.settings), FORMS[seed % 2]
    scored = ScoredPairs(world.reference, world.tokenizer, train, held_out)
    with tempfile.TemporaryDirectory() as out:
        variants = {form: Variant.of("network", settings.in_form(form))}
        done = run(scored, variants, out=Path(out), answers=0, progress=False)
        metadata = json.loads((Path(out) / "run.json").read_text())
    return {
        "table": done.table,
        "history": done.history,
        "scores": done.scores,
        "config": {"training": asdict(settings)},
        "metadata": metadata,
    }


def main(seeds: range) -> None:
    """Print, for each plant, how many seeds were found, and what else was found."""
    world = small_world(WORLD, cache_dir=default_cache_dir(), progress=False)
    for name, plant in PLANTS.items():
        hits, others = 0, Counter()
        for seed in seeds:
            names = {f.name for f in diagnose(**trained_run(world, name, seed)) if f.severity != "not checked"}
            hits += plant.finds in names
            others.update(names - {plant.finds})
        print(f"{name}: found in {hits} of {len(seeds)}; also found: {dict(others)}", flush=True)


if __name__ == "__main__":
    first, last = map(int, sys.argv[1].split(":"))
    main(range(first, last))
