"""The settings of re-tilting a finished run. Importing this module does not load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RetiltConfig:
    """Change β of a finished run without training again: curves of reward against KL, reward per nat, best allocation.

    Answers are sampled from log π_ref + a·(log π − log π_ref) for several a, at held-out prompts: a = 0 is the
    reference, a = 1 the run's policy, and a = 2 corresponds to half the β in the standard form. One half of the prompts
    chooses how far each task should go, by its slope at the reference and by its curve; the other half measures what
    that earns. Writes retilt.csv (the
    answers), retilt_curves.csv, retilt_slopes.csv, retilt_allocation.csv, retilt.json (these settings) and retilt.png
    into the run's folder, and makes its report again.

    Attributes:
        a: factors of the sweep, at least 0; 0 and 1 are added if they are missing.
        reward: the reward of an answer, as module:function, called as function(prompt, answer, task) and returning a
            number; None: the small world's verifier for a run of dpoviz demo. For a run of dpoviz train, None means
            that there is no reward; win rates to leading order in a, from the held-out pairs, take its place.
        variants: variants of the run to re-tilt; none: all.
        prompts: the largest number of held-out prompts per task; None: all.
        samples: answers per prompt and factor.
        max_new_tokens: limit of an answer, in tokens; None: the run's.
        kl: mean KL at which allocations are compared, nats; None: that of the policy itself, a = 1.
        batch: prompts per batch.
        seed: random seed of the halves, the answers and the resamples.
    """

    a: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
    reward: str | None = None
    variants: tuple[str, ...] = ()
    prompts: int | None = None
    samples: int = 8
    max_new_tokens: int | None = None
    kl: float | None = None
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(math.isfinite(a) and a >= 0 for a in self.a) or len(set(self.a)) != len(self.a):
            raise ValueError(f"a: got {list(self.a)}, expected different finite numbers of at least 0")
        if self.reward is not None and not all(part.strip() for part in self.reward.partition(":")):
            raise ValueError(f"reward: got {self.reward!r}, expected module:function")
        least = {"samples": 2, "batch": 1, "seed": 0}
        least |= {name: n for name, n in (("prompts", 2), ("max_new_tokens", 1)) if getattr(self, name) is not None}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value < 2**31:
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least {smallest}")
        if self.kl is not None and not 0 < self.kl < math.inf:
            raise ValueError(f"kl: got {self.kl!r}, expected a positive finite number of nats")

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors in ascending order, with the reference and the policy."""
        return tuple(sorted({0.0, 1.0, *map(float, self.a)}))
