r"""Estimators of the reference's entropy at a prompt, :math:`H(\pi_{ref}(\cdot|x))`, with their standard errors.

All of them come from K answers sampled from the reference and one scoring pass over these. They depend on the
reference and the prompt alone, never on a data set's answers, so each may feed beta(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.logprobs import AnswerScores, evaluating, sample_answers, score_answers


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
    progress: bool = False,
) -> EntropyEstimates:
    """Entropy of the model's answer to each prompt.

    Args:
        model: the reference.
        prompts: N prompts as token ids.
        samples: K, answers a prompt, at least 2: one has no standard error.
        max_new_tokens: limit of a sampled answer.
        eos_id: token that ends an answer.
        pad_id: token that fills the rows.
        seed: the draws.
        batch_size: prompts at once.
        progress: show bars.

    Raises:
        ValueError: fewer than 2 samples, or as `sample_answers`.
    """
    if samples < 2:
        raise ValueError(f"samples: came {samples}, expected at least 2: one answer has no standard error")
    drawn = sample_answers(
        model,
        prompts,
        samples,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts: list[AnswerScores] = []
    with evaluating(model), tqdm(total=len(prompts), desc="entropy", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            some, answers = [prompts[i] for i in rows], [drawn.answers[i] for i in rows]
            parts.append(score_answers(model, some, answers, pad_id=pad_id, entropy=True))
            bar.update(len(rows))

    back = torch.tensor(order).argsort()

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).double().cpu()[back]

    entropy_sums, lengths = joined("entropy_sums"), joined("lengths")
    first = joined("first_entropies")
    return EntropyEstimates(
        per_token=_ratio(entropy_sums, lengths),
        sequence=_mean(entropy_sums),
        monte_carlo=_mean(-joined("logps")),
        first_token=Estimate(first, torch.zeros_like(first)),
        samples=samples,
        truncated=torch.tensor(drawn.truncated) / samples,
    )
