"""What a rule may observe in a step; what it does not need is not computed."""

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
    """Return what a rule looks at before the policy's update.

    Args:
        rule: its `needs` say what is computed.
        batch: B pairs.
        logps: (B, 2) the policy's log-probabilities of chosen and rejected.
        models: policy and reference.
        step: of the stage.
        kl: step → what `sampled_kl` returns; asked every `rule.every` steps by a rule that needs it.
    """
    ratios = logps.detach() - batch.ref_logps
    extras: dict[str, Any] = {}
    if "answer_entropy" in rule.needs:
        assert batch.answer_entropy is not None  # the loop refuses pairs that lack it
        extras["answer_entropy"] = batch.answer_entropy / math.log(models.policy.config.get_text_config().vocab_size)
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
    r"""Whether a pair's log-ratio rises or falls as the policy's logits move away from the reference's.

    With z the next-token logits along the answers and

    .. math:: L(\delta) = \log\pi_\delta(y_w|x) - \log\pi_\delta(y_l|x), \qquad
        \pi_\delta = \mathrm{softmax}((1 + \delta)\,z_{policy} - \delta\,z_{ref})

    a pair gets 1 where :math:`L(-\varepsilon) < L(0) < L(\varepsilon)`, -1 where it is the other way round, else 0
    (epsilon-DPO: Lee et al. 2025, arXiv:2502.13177). Both models are taken in evaluation mode.

    Args:
        policy: as for `score_both`, like the next three.
        reference: the model it started from.
        prompts: B prompts as token ids.
        answers: for each prompt its chosen and its rejected answer as token ids.
        epsilon: ε, how far the logits are moved.
        pad_id: token that fills the rows.

    Returns:
        (B,) integers -1, 0 or 1, on the policy's device.

    Raises:
        ValueError: `epsilon` is not between 0 and 1, answers are not two a prompt, or as `score_both`.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: got {epsilon!r}, expected a number between 0 and 1")
    wrong = next((len(own) for own in answers if len(own) != 2), None)
    if wrong is not None:
        raise ValueError(f"answers: got {wrong} to a prompt, expected chosen and rejected")

    def changes(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> Tensor:
        """(n, 2) what moving the logits towards the reference's, and away from them, adds to each log-probability."""
        away = logits - ref_logits

        def logps(delta: float) -> Tensor:
            return (logits + delta * away).log_softmax(dim=-1).gather(-1, targets[:, None])

        return torch.cat([logps(-epsilon), logps(epsilon)], dim=1) - logps(0.0)

    # differences are summed: where the two models agree they are exact zeros, in whatever order they are added
    sums = score_both(policy, reference, prompts, answers, changes, pad_id=pad_id)  # (B, 2, 2)
    below, above = (sums[:, 0] - sums[:, 1]).unbind(dim=1)  # L(-ε) - L(0) and L(ε) - L(0), (B,)
    return ((below < 0) & (above > 0)).long() - ((below > 0) & (above < 0)).long()
