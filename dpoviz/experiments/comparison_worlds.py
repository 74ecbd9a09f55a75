"""The worlds of the comparison: draws of prompts and labelled pairs from the pool."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from dpoviz.data import tasks
from dpoviz.experiments.comparison_config import CompareConfig, Condition
from dpoviz.experiments.comparison_pool import Pool


class World(NamedTuple):
    """A draw from the pool: prompts by their numbers, and labelled pairs.

    Attributes:
        train: the training pairs, with the columns that training reads.
        scored: prompts whose first answers have rewards to estimate slopes from.
        held_out: pairs of further prompts, labelled as the training pairs, to estimate slopes from.
        evaluation: prompts on which policies are measured.
    """

    train: Dataset
    scored: list[int]
    held_out: Dataset
    evaluation: list[int]


SCORED_ANSWERS = 4
"""Scored answers per prompt, and held-out pairs per prompt, from which slopes are estimated."""


def draw_world(config: CompareConfig, own: Pool, condition: Condition, number: int) -> World:
    """Draw a world; those of one number have the same prompts in all conditions, and the same pairs and labels before
    flips where the number of pairs is the same."""
    train: list[dict] = []
    held_out: list[dict] = []
    scored: list[int] = []
    evaluation: list[int] = []
    for i, task in enumerate(tasks.TASKS):
        first = i * config.reference.problems
        cut = first + config.tuning_problems
        part = range(first, cut) if number >= 1000 else range(cut, first + config.reference.problems)
        rng = np.random.default_rng([number, i])
        order = (rng.permutation(len(part)) + part[0]).tolist()
        n, m = config.prompts, config.slope_prompts
        train += _pairs(own, order[:n], condition.pairs[i], condition.flips[i], f"{number} {task} train")
        scored += order[n : n + m]
        held_out += _pairs(own, order[n : n + m], SCORED_ANSWERS, condition.flips[i], f"{number} {task} held out")
        evaluation += order[n + m : n + m + config.evaluation_prompts]
    for name, records in (("training", train), ("held-out", held_out)):
        lacking = set(tasks.TASKS) - {own.problems[record["prompt"]].task for record in records}
        if lacking:
            raise ValueError(
                f"reference: world {number} has no {name} pairs of {', '.join(sorted(lacking))}: all answers to a "
                "prompt have the same reward; give it more demonstrations, samples or prompts"
            )
    return World(_dataset(own, train), scored, _dataset(own, held_out), evaluation)


def _pairs(own: Pool, prompts: Sequence[int], count: int, flips: float, seed: str) -> list[dict]:
    """Return labelled pairs as the numbers of the prompt and of the two answers, with flipped labels among them."""
    records = []
    for prompt in prompts:
        rng, flip = random.Random(f"{seed} {prompt}"), random.Random(f"flips {seed} {prompt}")
        place = {text: j for j, text in reversed(list(enumerate(own.texts[prompt])))}
        for pair in tasks.label_pairs(own.problems[prompt], own.texts[prompt], count, rng):
            chosen, rejected = place[pair["chosen"]], place[pair["rejected"]]
            if flip.random() < flips:
                chosen, rejected = rejected, chosen
            records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


def _dataset(own: Pool, records: Sequence[dict]) -> Dataset:
    """Return pairs with the columns that training reads."""
    lengths = [[len(answer) for answer in answers] for answers in own.answers]
    rows = []
    for record in records:
        p = record["prompt"]
        row = {
            "task": own.problems[p].task,
            "prompt": str(p),
            "prompt_ids": own.prompt_ids[p],
            "ref_entropy": own.entropies[p].sum() / sum(lengths[p]),
            "ref_features": own.features[p],
        }
        for name in ("chosen", "rejected"):
            j = record[name]
            row |= {f"{name}_ids": own.answers[p][j], f"ref_{name}_logps": own.logps[p, j],
                    f"ref_{name}_entropy": own.entropies[p, j]}  # fmt: skip
        rows.append(row)
    return Dataset.from_list(rows)
