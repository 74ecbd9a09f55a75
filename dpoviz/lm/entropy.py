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
from dpoviz.lm.processes import map_over_processes, process_seed, processes
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

    The processes of `accelerate launch` share the batches, and all of them return all estimates. Each draws by a seed
    of its own, so that the numbers are those of one process as with another seed.

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
            killed goes on from there, with as many processes, and ends with the numbers of one that was not. Prompts
            that another run asked for are not drawn again: their numbers are that run's, and the others' draws begin
            anew at the seed. None keeps nothing.
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
    settings["seed"] = process_seed(seed)
    shown = progress and processes().is_main_process
    with (
        sampling(model, prompts, samples, **settings, scores=True) as sampler,
        tqdm(total=len(prompts), desc="entropy of the reference", unit="prompt", disable=not shown) as bar,
    ):
        numbers = _numbers(prompts, sampler, eos_id, batch_size, journal, bar)
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
    eos_id: int,
    batch_size: int,
    journal: Journal,
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """The numbers of all prompts, in their order: read where they are kept, drawn elsewhere."""
    names = _names(prompts)
    several = processes().num_processes
    # each process draws batches of its own, one after the other: with others, they would be drawn otherwise
    run = hashlib.blake2b("".join(names + [str(several)] * (several > 1)).encode(), digest_size=8).hexdigest()
    batches = journal.read()
    others = {prompt for name, batch in batches.items() if not name.startswith(run) for prompt in batch["prompts"]}
    known = {prompt: (batch, i) for batch in batches.values() for i, prompt in enumerate(batch["prompts"])}
    left = [row for row, name in enumerate(names) if name not in others]
    bar.update(len(names) - len(left))
    # the same batches whether the run was killed or not: only what other runs had done is left out
    parts = by_length([len(prompts[row]) for row in left], batch_size)

    def draw(number: int) -> dict[str, np.ndarray] | None:
        rows, name, batch = [left[place] for place in parts[number]], f"{run}-{number:06d}", None
        if not all(names[row] in known for row in rows):
            batch = _draw([prompts[row] for row in rows], sampler, eos_id)
            batch["prompts"] = np.array([names[row] for row in rows])
            batch["state"] = sampler.generator.get_state().numpy()
            journal.add(name, batch)
        elif name in batches:
            sampler.generator.set_state(torch.from_numpy(batches[name]["state"]))
        bar.update(len(rows))
        return batch

    for batch in map_over_processes(range(len(parts)), draw):
        if batch is not None:
            known |= {prompt: (batch, i) for i, prompt in enumerate(batch["prompts"])}
    found = [known[name] for name in names]
    return {key: np.stack([batch[key][i] for batch, i in found]) for key in _NUMBERS}


def _names(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A name for each prompt; one that stands several times is drawn as often, and has as many names."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        name = hashlib.blake2b(json.dumps(list(prompt)).encode(), digest_size=16).hexdigest()
        names.append(f"{name}.{seen[name]}")
        seen[name] += 1
    return names


def _draw(prompts: Sequence[Sequence[int]], sampler: Sampler, eos_id: int) -> dict[str, np.ndarray]:
    answers, scores = sampler.draw(prompts)
    batch = {name: getattr(scores, name).double().cpu().numpy() for name in _NUMBERS[:-1]}
    cut = [sum(answer[-1] != eos_id for answer in own) for own in answers]
    return {**batch, "truncated": np.array(cut)}
