"""Rules for beta: the one interface through which the training loop asks for beta of a batch."""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    h: Tensor
    x: Tensor
    task: Sequence[str]
    ref_entropy: Tensor


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
    """

    form: ClassVar[Form | None] = None

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
