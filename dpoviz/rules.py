"""Rules for beta: the one interface through which the training loop asks for beta of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from dpoviz.beta import Beta
from dpoviz.losses import Form


@dataclass(frozen=True)
class Seen:
    """What a rule may look at in one step, before the policy's update; none of it carries a gradient.

    Attributes:
        h: (B,) log-ratio difference of each pair under the policy, in nats.
        x: (B, D) features of the prompts.
        task: the task of each row.
        ref_entropy: (B,) entropy of the reference at each prompt.
        answer_entropy: (B,) the reference's next-token entropy along both answers over log V, in [0, 1]; given
            where "answer_entropy" is in the rule's `needs`.
        direction: (B,) -1, 0 or 1, what `perturbed_directions` returns; where "direction" is in `needs`.
        kl: KL(policy ‖ reference) by task in nats, sampled, in the steps in which it was measured; where "kl" is
            in `needs`.
    """

    h: Tensor
    x: Tensor
    task: Sequence[str]
    ref_entropy: Tensor
    answer_entropy: Tensor | None = None
    direction: Tensor | None = None
    kl: Mapping[str, float] | None = None


class Weighed(NamedTuple):
    """What a rule gives for a batch.

    Attributes:
        beta: (B,) positive; with a gradient where beta learns.
        weight: (B,) weight of each pair in the mean of the losses, 0 where a filter drops it; None: all alike.
    """

    beta: Tensor
    weight: Tensor | None = None


class Rule(nn.Module):
    """Called as ``rule(seen) -> Weighed``. What it remembers is in buffers, so that a checkpoint holds it.

    Attributes:
        form: the form that the rule is defined in; None where it is defined in both.
        needs: what the loop has to measure for it: "answer_entropy", "direction", "kl".
    """

    form: ClassVar[Form | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def learns(self) -> bool:
        """Whether it has weights to train."""
        return any(p.requires_grad for p in self.parameters())

    def forward(self, seen: Seen) -> Weighed:
        raise NotImplementedError


class FromPrompt(Rule):
    """A `Beta`, which is a function of the prompt alone, as a rule."""

    def __init__(self, beta: Beta) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, seen: Seen) -> Weighed:
        return Weighed(self.beta(seen.x, task=seen.task, ref_entropy=seen.ref_entropy))
