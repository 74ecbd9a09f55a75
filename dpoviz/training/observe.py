"""Compute what a rule observes in a step, and only what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoviz.lm.packing import Tokens
from dpoviz.lm.scoring import score_both
from dpoviz.rules import Observation, Rule
from dpoviz.training.batch import Batch
from dpoviz.training.probes import Models


@torch.no_grad()
def observe(
    rule: Rule, batch: Batch, logps: Tensor, models: Models, step: int, kl: Callable[[int], Mapping[str, float]]
) -> Observation:
    """Return a rule's observation of a batch, before the policy's update.

    Args:
        rule: its `needs` decide what is computed.
        batch: B pairs.
        logps: (B, 2) the policy's log-probabilities of chosen and rejected.
        models: policy and reference.
        step: number of the step within the stage.
        kl: maps the step to the result of `sampled_kl`; called every `rule.every` steps if the rule needs it.
    """
    ratios = logps.detach() - batch.ref_logps
    extras: dict[str, Any] = {}
    if "answer_entropy" in rule.needs:
        assert batch.answer_entropy is not None  # the loop refuses pairs that lack it
        extras["answer_entropy"] = batch.answer_entropy / math.log(models.policy.config.get_text_config().vocab_size)
    if "reward_margin" in rule.needs:
        extras["reward_margin"] = batch.reward_margin
    if "direction" in rule.needs:
        assert models.reference is not None  # the loop refuses to go without
        extras["direction"] = perturbed_directions(
            models.policy,
            models.reference,
            batch.prompts,
            batch.answers,
            epsilon=rule.epsilon,
            pad_id=models.pad_id,
        )
    if "kl" in rule.needs and step % rule.every == 0:
        extras["kl"] = {name.removeprefix("kl/"): v for name, v in kl(step).items() if name.startswith("kl/")}
    return Observation(
        h=ratios[:, 0] - ratios[:, 1], x=batch.x, task=batch.task, ref_entropy=batch.ref_entropy, **extras
    )


def perturbed_directions(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Tokens,
    answers: list[list[list[int]]],
    *,
    epsilon: float,
    pad_id: int,
) -> Tensor:
    """Return 1 or -1 where a pair's log-ratio rises or falls as the policy's logits move away from the reference's.

    With z the next-token logits along the answers, and

        L(δ) = log π_δ(y_w|x) − log π_δ(y_l|x)        π_δ = softmax((1 + δ)·z_policy − δ·z_ref)

    a pair gets 1 where L(−ε) < L(0) < L(ε), -1 where L(−ε) > L(0) > L(ε), and 0 otherwise (ε-DPO: Lee et al. 2025,
    arXiv:2502.13177). Both models run in evaluation mode.

    Args:
        policy: a causal language model, as for `score_both`.
        reference: the model it started from.
        prompts: B prompts as token ids.
        answers: for each prompt, the chosen and the rejected answer as token ids.
        epsilon: ε, the distance by which the logits are moved.
        pad_id: id of the padding token.

    Returns:
        (B,) integers -1, 0 or 1, on the policy's device.

    Raises:
        ValueError: `epsilon` is not between 0 and 1, there are not two answers per prompt, or as `score_both`.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: got {epsilon!r}, expected a number between 0 and 1")
    wrong = next((len(own) for own in answers if len(own) != 2), None)
    if wrong is not None:
        raise ValueError(f"answers: got {wrong} to a prompt, expected chosen and rejected")

    def changes(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> Tensor:
        """Return (n, 2) the change of each log-probability as the logits move towards the reference's, and away."""
        away = logits - ref_logits

        def logps(delta: float) -> Tensor:
            return (logits + delta * away).log_softmax(dim=-1).gather(-1, targets[:, None])

        return torch.cat([logps(-epsilon), logps(epsilon)], dim=1) - logps(0.0)

    # changes are summed, not log-probabilities: where the two models agree, the sum is exactly 0 in any order
    sums = score_both(policy, reference, prompts, answers, changes, pad_id=pad_id)  # (B, 2, 2)
    below, above = (sums[:, 0] - sums[:, 1]).unbind(dim=1)  # L(-ε) - L(0) and L(ε) - L(0), (B,)
    return ((below < 0) & (above > 0)).long() - ((below > 0) & (above < 0)).long()
