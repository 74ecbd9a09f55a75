"""Estimate the reference's entropy at a prompt, H(π_ref(·|x)), with standard errors.

All estimators use K answers sampled from the reference, with the entropies recorded while sampling. They depend only
on the reference and the prompt, not on the answers in a data set, so each may be an input of β(x). A fifth,
`teacher_forced`, does depend on those answers and serves for plots only; it follows from the columns of
`reference_pass`: ref_chosen_entropy divided by the number of tokens in chosen_ids.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.lm.cache import Journal, fingerprint
from dpoviz.lm.packing import by_length
from dpoviz.lm.processes import hidden, map_over_processes, processes
from dpoviz.lm.sampling import Sampler, sampling


class Estimate(NamedTuple):
    """Estimates at N prompts, float64.

    Attributes:
        value: (N,).
        se: (N,) standard error.
    """

    value: Tensor
    se: Tensor


class EntropyEstimates(NamedTuple):
    """Four estimates of the entropy at each prompt, from K sampled answers.

    Attributes:
        per_token: nats per token. Sum over all K answers of the exact next-token entropies, divided by their number of
            tokens, end tokens included. The standard error of this ratio is the delta method's, over answers.
        sequence: nats. Mean over answers of the summed exact next-token entropies. Unbiased for H(π_ref(·|x)) if no
            answer is truncated; too small otherwise.
        monte_carlo: nats. Mean over answers of −log π_ref(y|x); same expectation as `sequence`.
        first_token: nats. Exact entropy of the first token; standard error 0.
        samples: K.
        truncated: (N,) fraction of answers that hit the length limit.
    """

    per_token: Estimate
    sequence: Estimate
    monte_carlo: Estimate
    first_token: Estimate
    samples: int
    truncated: Tensor


def _mean(values: Tensor) -> Estimate:
    """Return the mean over answers of (N, K) values."""
    return Estimate(values.mean(dim=1), values.std(dim=1) / values.shape[1] ** 0.5)


def _ratio(numerator: Tensor, denominator: Tensor) -> Estimate:
    """Return the ratio of the sums over answers of (N, K) values, with the delta method's standard error."""
    value = numerator.sum(dim=1) / denominator.sum(dim=1)
    residual = numerator - value[:, None] * denominator  # (N, K), mean 0
    k = numerator.shape[1]
    spread = (residual.square().sum(dim=1) / (k - 1)).sqrt()
    return Estimate(value, spread / (k**0.5 * denominator.mean(dim=1)))


@torch.no_grad()
def estimate_entropy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    batch_size: int = 64,
    static_cache: bool = False,
    keep: Path | str | None = None,
    progress: bool = False,
) -> EntropyEstimates:
    """Estimate the entropy of the model's answer distribution at each prompt.

    The samples of a batch depend only on the seed and the prompts in it, not on earlier batches, the number of
    processes, or cached results. The processes of `accelerate launch` share the batches; each returns all estimates.

    Args:
        model: the reference.
        prompts: N prompts as token ids.
        samples: K, answers per prompt, at least 2 for a standard error.
        max_new_tokens: limit of an answer, in tokens.
        eos_id: token that ends an answer.
        pad_id: padding token.
        seed: random seed.
        batch_size: prompts per batch; `batch_size` × K answers are sampled in parallel.
        static_cache: as in `dpoviz.lm.sampling.sampling`.
        keep: folder that stores each batch, by a fingerprint of model, settings and code. A killed run resumes and
            gives the same numbers as an uninterrupted one. None stores nothing.
        progress: show a progress bar.

    Raises:
        ValueError: fewer than 2 samples, or as in `sample_answers`.
    """
    if samples < 2:
        raise ValueError(f"samples: got {samples}, expected at least 2: one answer has no standard error")
    settings = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    journal = Journal(None)
    if keep is not None:
        facts = {**settings, "samples": samples, "batch_size": batch_size, "static_cache": static_cache}
        name = fingerprint(model, facts, __name__)
        journal = Journal(Path(keep) / f"entropy-{name}")
    shown = progress and processes().is_main_process
    with (
        sampling(model, prompts, samples, **settings, scores=True, static_cache=static_cache) as sampler,
        tqdm(total=len(prompts), desc="entropy of the reference", unit="prompt", disable=hidden(shown)) as bar,
    ):
        numbers = _numbers(prompts, sampler, seed, eos_id, batch_size, journal, bar)
    entropy_sums, logps, lengths, first, cut = (torch.from_numpy(numbers[name]) for name in _NUMBERS)
    return EntropyEstimates(
        per_token=_ratio(entropy_sums, lengths),
        sequence=_mean(entropy_sums),
        monte_carlo=_mean(-logps),
        first_token=Estimate(first, torch.zeros_like(first)),
        samples=samples,
        truncated=cut / samples,
    )


_NUMBERS = ("entropy_sums", "logps", "lengths", "first_entropies", "truncated")
"""Arrays stored per batch of B prompts: three of shape (B, K), then two of shape (B,)."""


def _numbers(
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    seed: int,
    eos_id: int,
    batch_size: int,
    journal: Journal,
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """Return the arrays of all prompts in order: from the journal where stored, sampled otherwise."""
    names = _names(prompts)
    batches = by_length([len(prompt) for prompt in prompts], batch_size)

    def numbers(rows: Sequence[int]) -> dict[str, np.ndarray]:
        # named and seeded by its prompts, so that every run with this batch gives the same samples
        name = _digest([names[row] for row in rows], size=16)
        batch = journal.get(name)
        if batch is None:
            sampler.generator.manual_seed(int(_digest([seed, name], size=8), 16))
            batch = _draw([prompts[row] for row in rows], sampler, eos_id)
            journal.add(name, batch)
        bar.update(len(rows))
        return batch

    parts = map_over_processes(batches, numbers)
    back = np.argsort([row for rows in batches for row in rows])
    return {key: np.concatenate([part[key] for part in parts])[back] for key in _NUMBERS}


def _names(prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return a distinct name for each prompt; a repeated prompt is sampled again under another name."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        name = _digest(list(prompt), size=16)
        names.append(f"{name}.{seen[name]}")
        seen[name] += 1
    return names


def _digest(content: object, size: int) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=size).hexdigest()


def _draw(prompts: Sequence[Sequence[int]], sampler: Sampler, eos_id: int) -> dict[str, np.ndarray]:
    answers, scores = sampler.draw(prompts)
    batch = {name: getattr(scores, name).double().cpu().numpy() for name in _NUMBERS[:-1]}
    cut = [sum(answer[-1] != eos_id for answer in own) for own in answers]
    return {**batch, "truncated": np.array(cut)}
