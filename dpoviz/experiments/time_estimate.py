"""Estimate the time of a run on a real model by timing one batch of each kind of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from dpoviz.data.tokens import end_id, token_counts
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.kept import MOST_FROZEN
from dpoviz.experiments.real import Loaded
from dpoviz.lm.processes import in_its_precision, processes
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import score_answers
from dpoviz.translation import key

_FEW, _MORE = 1, 9  # lengths of the answers that are sampled to time sampling, in tokens


@in_its_precision
def estimate_seconds(config: RealConfig, loaded: Loaded, *, variants: int) -> dict[str, float]:
    """Return the estimated seconds of each part of a run (`time_parts`), shared by all its processes.

    Args:
        config: the settings.
        loaded: the result of `experiments.real.load`.
        variants: number of runs of stage 2; 0 estimates the scoring by the reference alone.
    """
    settings = config.settings(len(loaded.train))
    stage1, stage2, batch_size = settings.stage1_steps, settings.stage2_steps, settings.batch_size
    assert stage1 is not None and stage2 is not None and batch_size is not None  # filled in
    parts = time_parts(
        loaded.model,
        loaded.train,
        loaded.held_out,
        samples=config.entropy_samples,
        max_new_tokens=settings.max_new_tokens,
        steps=stage1 + variants * stage2 if variants else 0,
        batch_size=batch_size,
        evaluations=1 + variants if variants else 0,  # at the end of each stage
        scored_again=min(len(loaded.train), MOST_FROZEN) * len(config.forms) if variants else 0,
        eos_id=end_id(loaded.train),
        pad_id=loaded.tokenizer.pad_token_id,
    )
    return {name: seconds / processes().num_processes for name, seconds in parts.items() if seconds}


def time_parts(
    model: PreTrainedModel,
    pairs: Dataset,
    held_out: Dataset,
    *,
    samples: int,
    max_new_tokens: int,
    steps: int,
    batch_size: int,
    evaluations: int,
    scored_again: int = 0,
    eos_id: int,
    pad_id: int,
) -> dict[str, float]:
    """Return the estimated seconds of each part, if nothing is cached from an earlier run.

    Three kinds of work are timed with two pairs of median length: a forward pass, a training step, and sampling
    answers of one and of nine tokens; the difference gives the time per token, the remainder the time per prompt. These
    times are scaled up to the tokens to score, the tokens to sample if every answer reaches its limit, and the steps
    with pairs of mean length.

    Args:
        model: the reference.
        pairs: tokenised pairs to train on.
        held_out: tokenised pairs that are held out.
        samples: answers per prompt for the entropy.
        max_new_tokens: limit of a sampled answer.
        steps: training steps, over all runs.
        batch_size: pairs per step.
        evaluations: number of times that the held-out pairs are scored.
        scored_again: training pairs whose h is kept after the last step, over all runs.
        eos_id: id of the token that ends an answer.
        pad_id: id of the padding token.

    Returns:
        Seconds for "reference", "entropy" and "training".
    """
    length, held = (token_counts(part).sum(axis=1).tolist() for part in (pairs, held_out))  # each prompt once
    middle = sorted(range(len(length)), key=length.__getitem__)[len(length) // 2 :][:2]
    rows, tokens = pairs.select(middle)[:], sum(length[i] for i in middle)
    answers = [list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]

    def score() -> torch.Tensor:
        return score_answers(model, rows["prompt_ids"], answers, pad_id=pad_id).logps.sum()

    def step() -> None:
        score().backward()
        model.zero_grad(set_to_none=True)

    def draw(tokens: int) -> None:
        ends: dict[str, Any] = {"eos_id": eos_id, "pad_id": pad_id, "seed": 0}
        sample_answers(model, rows["prompt_ids"], samples, max_new_tokens=tokens, **ends)

    with torch.no_grad():
        forward = _seconds(score) / tokens
    training = _seconds(step) / tokens
    few, more = (_seconds(partial(draw, n)) / len(middle) for n in (_FEW, _MORE))
    token = max(0.0, more - few) / ((_MORE - _FEW) * samples)
    prompts = len({tuple(p) for part in (pairs, held_out) for p in part["prompt_ids"]})
    mean = sum(length) / len(length)
    return {
        "reference": forward * (sum(length) + sum(held)),
        "entropy": prompts * (few + token * samples * max_new_tokens),
        key("training"): training * mean * batch_size * steps
        + forward * (sum(held) * evaluations + mean * scored_again),
    }


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(2):  # the first call warms up
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds
