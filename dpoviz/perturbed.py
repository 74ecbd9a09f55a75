"""Epsilon-DPO's look at a pair under perturbed logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoviz.logprobs import Tokens, score_both


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
        raise ValueError(f"epsilon: came {epsilon!r}, expected a number between 0 and 1")
    wrong = next((len(own) for own in answers if len(own) != 2), None)
    if wrong is not None:
        raise ValueError(f"answers: came {wrong} to a prompt, expected chosen and rejected")

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
