"""The pool of the comparison: one reference, and prompts with many sampled, scored answers, in the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.data import tasks
from dpoviz.experiments.config import WorldConfig
from dpoviz.experiments.small import config_digest, pretrain
from dpoviz.lm.cache import open_entry, require_writable, write_entry
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import score_answers
from dpoviz.lm.trial import evaluating


class Pool(NamedTuple):
    """The reference, and P prompts with M answers each that it gave.

    Attributes:
        reference: the tiny language model.
        tokenizer: its tokenizer.
        problems: P problems, task by task.
        prompt_ids: P prompts as token ids.
        answers: M answers per prompt as token ids, with the end token if it was sampled.
        texts: (P, M) the answers as text.
        rewards: (P, M) true rewards.
        logps: (P, M) log π_ref of the answers, nats.
        entropies: (P, M) next-token entropies summed along the answers, nats.
        features: (P, D) mean of the last hidden states over the prompt.
    """

    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: list[tasks.Problem]
    prompt_ids: list[list[int]]
    answers: list[list[list[int]]]
    texts: list[list[str]]
    rewards: np.ndarray
    logps: np.ndarray
    entropies: np.ndarray
    features: np.ndarray


@lru_cache(maxsize=1)
def pool(config: WorldConfig, cache_dir: str) -> Pool:
    """Return the pool, from the cache or made; of several processes, one makes it."""
    folder = Path(cache_dir) / f"compare-pool-{config_digest(config, __name__)}"
    require_writable(folder.parent, "cache")
    with FileLock(folder.with_suffix(".lock")):
        found = open_entry(folder, _read)
        if found is None:
            write_entry(folder, partial(_write, _sample(config)))
            found = _read(folder)
    return found


def _sample(world: WorldConfig) -> Pool:
    reference, tokenizer = pretrain(world, progress=False)
    problems = [p for task in tasks.TASKS for p in tasks.sample_problems(task, world.problems, world.seed)]
    ends: dict[str, Any] = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    prompt_ids = tokenizer([p.prompt for p in problems])["input_ids"]
    answers = sample_answers(
        reference, prompt_ids, world.samples, seed=world.seed, max_new_tokens=world.max_new_tokens, progress=False,
        **ends,
    ).answers  # fmt: skip
    texts = [tokenizer.batch_decode(own, skip_special_tokens=True) for own in answers]
    rewards = np.array([[tasks.reward(p, t) for t in own] for p, own in zip(problems, texts, strict=True)])
    scores = score(reference, prompt_ids, answers, tokenizer.pad_token_id)
    return Pool(reference, tokenizer, problems, prompt_ids, answers, texts, rewards, *scores)


_ARRAYS, _LISTS = ("rewards", "logps", "entropies", "features"), ("prompt_ids", "answers", "texts")


def _write(made: Pool, folder: Path) -> None:
    made.reference.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    lists = {"problems": [vars(p) for p in made.problems], **{name: getattr(made, name) for name in _LISTS}}
    (folder / "pool.json").write_text(json.dumps(lists))
    np.savez(folder / "pool.npz", **{name: getattr(made, name) for name in _ARRAYS})


def _read(folder: Path) -> Pool:
    reference = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    lists = json.loads((folder / "pool.json").read_text())
    problems = [tasks.Problem(**own) for own in lists["problems"]]
    with np.load(folder / "pool.npz") as arrays:
        return Pool(reference, tokenizer, problems, *(lists[n] for n in _LISTS), *(arrays[n] for n in _ARRAYS))


@torch.no_grad()
def score(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[list[int]]], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (P, M) log-probabilities, (P, M) entropy sums and (P, D) features; equal answers are scored once."""
    distinct = [list(dict.fromkeys(map(tuple, own))) for own in answers]
    order = np.argsort([len(own) for own in distinct], kind="stable")  # neighbours need little padding
    parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    with evaluating(model):
        for start in range(0, len(order), 8):
            rows = order[start : start + 8].tolist()
            k = max(len(distinct[row]) for row in rows)
            some = [
                [list(y) for y in distinct[row]] + [list(distinct[row][0])] * (k - len(distinct[row])) for row in rows
            ]
            found = score_answers(
                model, [prompts[row] for row in rows], some, pad_id=pad_id, entropy=True, features=True
            )
            assert found.entropy_sums is not None and found.features is not None
            for i, row in enumerate(rows):
                place = {y: j for j, y in enumerate(distinct[row])}
                at = [place[tuple(y)] for y in answers[row]]
                logps, sums = (values[i].double().numpy()[at] for values in (found.logps, found.entropy_sums))
                parts[row] = logps, sums, found.features[i].numpy()
    logps, sums, features = (np.stack([parts[row][j] for row in range(len(answers))]) for j in range(3))
    return logps, sums, features
