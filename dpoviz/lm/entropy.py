r"""Estimators of the reference's entropy at a prompt, :math:`H(\pi_{ref}(\cdot|x))`, with their standard errors.

All of them come from K answers sampled from the reference, and are read where these are drawn. They depend on the
reference and the prompt alone, never on a data set's answers, so each may feed beta(x). A fifth, `teacher_forced`,
does depend on these answers; it is for pictures, and comes with `reference_pass`: ref_chosen_entropy over the
number of tokens in chosen_ids.
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
    """An estimate at each of N prompts, float64.

    Attributes:
        value: (N,).
        se: (N,) standard error.
    """

    value: Tensor
    se: Tensor


class EntropyEstimates(NamedTuple):
    r"""Four readings of the entropy at each prompt, from K sampled answers.

    Attributes:
        per_token: nats per token: the exact next-token entropies along the answers, summed over all K, over
            their tokens, end token included. A ratio; its standard error is the delta method's over answers.
        sequence: nats: mean over answers of the exact next-token entropies summed along each. Unbiased for
            :math:`H(\pi_{ref}(\cdot|x))` while answers end by themselves; less than it where they are cut.
        monte_carlo: nats: mean over answers of :math:`-\log\pi_{ref}(y|x)`; the same mean as `sequence`.
        first_token: nats: the exact entropy of the first token; its standard error is 0.
        samples: K.
        truncated: (N,) share of the answers that hit the length limit.
    """

    per_token: Estimate
    sequence: Estimate
    monte_carlo: Estimate
    first_token: Estimate
    samples: int
    truncated: Tensor


def _mean(values: Tensor) -> Estimate:
    """Mean over answers of (N, K) numbers."""
    return Estimate(values.mean(dim=1), values.std(dim=1) / values.shape[1] ** 0.5)


def _ratio(numerator: Tensor, denominator: Tensor) -> Estimate:
    """Sum over sum of (N, K) numbers, with the delta method's standard error."""
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
    keep: Path | str | None = None,
    progress: bool = False,
) -> EntropyEstimates:
    """Entropy of the model's answer to each prompt.

    What is sampled for a batch is decided by the seed and the batch's prompts alone: not by the batches before it, the
    number of processes, or what is kept from other runs. The processes of `accelerate launch` share the batches, and
    all of them return all estimates.

    Args:
        model: the reference.
        prompts: N prompts as token ids.
        samples: K, answers a prompt, at least 2: one has no standard error.
        max_new_tokens: limit of a sampled answer.
        eos_id: token that ends an answer.
        pad_id: token that fills the rows.
        seed: the draws.
        batch_size: prompts at once; `batch_size` × K answers are drawn side by side.
        keep: a folder where each batch is kept, by a fingerprint of model, settings and code. A run that was
            killed goes on from there and ends with the numbers of one that was not. None keeps nothing.
        progress: show a bar.

    Raises:
        ValueError: fewer than 2 samples, or as `sample_answers`.
    """
    if samples < 2:
        raise ValueError(f"samples: got {samples}, expected at least 2: one answer has no standard error")
    settings = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    journal = Journal(None)
    if keep is not None:
        name = fingerprint(model, {**settings, "samples": samples, "batch_size": batch_size}, __name__)
        journal = Journal(Path(keep) / f"entropy-{name}")
    shown = progress and processes().is_main_process
    with (
        sampling(model, prompts, samples, **settings, scores=True) as sampler,
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
"""What is kept of a batch of B prompts: three (B, K), then two (B,)."""


def _numbers(
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    seed: int,
    eos_id: int,
    batch_size: int,
    journal: Journal,
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """Return the numbers of all prompts, in their order: read where they are kept, sampled elsewhere."""
    names = _names(prompts)
    batches = by_length([len(prompt) for prompt in prompts], batch_size)

    def numbers(rows: Sequence[int]) -> dict[str, np.ndarray]:
        # named and seeded by its prompts: it is the same batch in any run that has it, and in no other
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
    """Return a name for each prompt; one that stands several times is sampled as often, and has as many names."""
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
