"""The training loop, on `accelerate`: a policy by DPO, and beta(x) with it.

Stage 1 trains the policy with a fixed beta; stage 2 goes on with beta(x) and all four terms of the objective
(the derivation, §5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from dpoviz.lm.packing import Tokens
from dpoviz.lm.scoring import score_both
from dpoviz.rules import Rule, Seen
from dpoviz.training.config import TrainConfig
from dpoviz.training.probes import Probe

ANSWER_ENTROPY = ("ref_chosen_entropy", "ref_rejected_entropy")
"""Columns that only a rule reads which looks at the reference's entropy along the answers."""


def answer_entropy(rows: Mapping[str, Sequence], vocabulary: int) -> Tensor:
    """(B,) the reference's next-token entropy over log V, averaged along each answer, then over the two.

    Args:
        rows: of what `reference_pass` returned.
        vocabulary: V.
    """
    means = [
        [total / len(ids) for total, ids in zip(rows[sums], rows[answers], strict=True)]
        for sums, answers in zip(ANSWER_ENTROPY, ("chosen_ids", "rejected_ids"), strict=True)
    ]
    return torch.tensor(means, dtype=torch.float32).mean(dim=0) / math.log(vocabulary)


class Observer:
    """What a rule may look at in a step; what it does not need is not computed."""

    def __init__(
        self,
        rule: Rule,
        pairs: Dataset,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        pad_id: int,
        eos_id: int,
    ) -> None:
        self.rule, self.policy, self.reference, self.pad_id = rule, policy, reference, pad_id
        self.vocabulary = policy.config.get_text_config().vocab_size
        self.probe = None
        if "kl" in rule.needs:
            self.probe = Probe(pairs, reference, config, accelerator, pad_id=pad_id, eos_id=eos_id)

    @torch.no_grad()
    def __call__(self, batch: dict, logps: Tensor, step: int) -> Seen:
        needs = self.rule.needs
        extras = {}
        if "answer_entropy" in needs:
            extras["answer_entropy"] = answer_entropy(batch["rows"], self.vocabulary).to(logps.device)
        if "direction" in needs:
            extras["direction"] = perturbed_directions(
                self.policy,
                self.reference,
                batch["prompt_ids"],
                batch["answer_ids"],
                epsilon=self.rule.epsilon,
                pad_id=self.pad_id,
            )
        if "kl" in needs and step % self.rule.every == 0:
            measured = self.probe.kl(self.policy, seed_shift=step)
            extras["kl"] = {name.removeprefix("kl/"): v for name, v in measured.items() if name.startswith("kl/")}
        ratios = logps.detach() - batch["ref_logps"]
        return Seen(
            h=ratios[:, 0] - ratios[:, 1],
            x=batch["x"],
            task=batch["task"],
            ref_entropy=batch["ref_entropy"],
            **extras,
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
