"""The training loop, on `accelerate`: a policy by DPO, and beta(x) with it.

Stage 1 trains the policy with a fixed beta; stage 2 goes on with beta(x) and all four terms of the objective
(the derivation, §5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpoviz.losses import Form, scale


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on besides its model and its data.

    Attributes:
        form: what multiplies h, "inverse" (1/beta, as the derivation prints) or "standard" (beta).
        beta0: the fixed beta of stage 1, where beta(x) starts.
        beta_min: lower end of the range.
        beta_max: upper end of the range.
        alpha: beta per nat of entropy; None calibrates it once, so that the mean of alpha·H is beta0.
        lambda_range: weight λ1 of the range term, per unit of beta.
        lambda_smoothness: weight λ2 of the gradient penalty, per squared unit of beta.
        lambda_consistency: weight of the variance of beta within a task, per squared unit of beta.
        lambda_entropy: weight λ3 of the entropy term, per squared unit of beta.
        stage1_steps: steps with the fixed beta.
        stage2_steps: steps with beta(x).
        batch_size: pairs in a step, over all processes: a multiple of their number.
        policy_learning_rate: AdamW on the policy.
        beta_learning_rate: AdamW on beta.
        policy_max_norm: the policy's gradient is clipped at this norm.
        beta_max_norm: the beta-network's gradient is clipped at this norm, by itself.
        warmup_steps: steps in which both learning rates rise from 0, in each stage.
        log_every: steps between rows of the history.
        probe_every: steps between measurements on held-out prompts (KL by sampling, reward accuracy); 0 measures at
            the end of a stage alone.
        probe_prompts: held-out prompts a task in such a measurement.
        max_new_tokens: limit of a sampled answer, in tokens.
        checkpoint_every: steps between checkpoints.
        seed: order of the data, dropout, sampling.
    """

    form: Form = "inverse"
    beta0: float = 10.0
    beta_min: float = 2.5
    beta_max: float = 40.0
    alpha: float | None = None
    lambda_range: float = 0.4
    lambda_smoothness: float = 0.0001
    lambda_consistency: float = 0.0
    lambda_entropy: float = 0.001
    stage1_steps: int = 60
    stage2_steps: int = 120
    batch_size: int = 32
    policy_learning_rate: float = 2e-4
    beta_learning_rate: float = 3e-3
    policy_max_norm: float = 1.0
    beta_max_norm: float = 1.0
    warmup_steps: int = 10
    log_every: int = 5
    probe_every: int = 30
    probe_prompts: int = 32
    max_new_tokens: int = 48
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        scale(self.beta0, self.form)
        for name in ("beta_min", "beta_max", "policy_learning_rate", "beta_learning_rate"):
            require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a positive number")
        if self.beta_min >= self.beta_max:
            raise ValueError(f"beta_min, beta_max: got {self.beta_min}, {self.beta_max}, expected beta_min < beta_max")
        inside = self.beta_min <= self.beta0 <= self.beta_max
        require("beta0", self.beta0, inside, f"a number from {self.beta_min} to {self.beta_max}")
        if self.alpha is not None:
            require("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number, or None to calibrate")
        for name in ("lambda_range", "lambda_smoothness", "lambda_consistency", "lambda_entropy"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "a number, at least 0")
        for name in ("policy_max_norm", "beta_max_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "a positive number")
        for name in ("batch_size", "log_every", "checkpoint_every", "max_new_tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("stage1_steps", "stage2_steps", "warmup_steps", "probe_every", "probe_prompts"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")

    @classmethod
    def around(cls, s0: float, form: Form, **settings) -> TrainConfig:
        """A configuration in which both forms start alike and are regularised alike.

        The scale that multiplies h starts at `s0` in either form. The range is beta0/4 to 4·beta0, and the
        weights are set relative to beta0 (λ1 ∝ 1/beta0, the others ∝ 1/beta0²), so that a given relative
        departure of beta costs the same in both.

        Args:
            s0: the scale at the start, 1/beta0 (inverse) or beta0 (standard).
            form: "inverse" or "standard".
            **settings: other fields; the four λ are then those for beta0 = 1 and are divided as above.
        """
        beta0 = scale(s0, form)  # its own inverse, or itself
        for name, default, power in (
            ("lambda_range", 4.0, 1),
            ("lambda_smoothness", 0.01, 2),
            ("lambda_consistency", 0.0, 2),
            ("lambda_entropy", 0.1, 2),
        ):
            settings[name] = settings.get(name, default) / beta0**power
        settings = {"beta_min": beta0 / 4, "beta_max": beta0 * 4, **settings}
        return cls(form=form, beta0=beta0, **settings)


def require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def calibrate_alpha(ref_entropy: Sequence[float], beta0: float) -> float:
    """alpha such that the mean of alpha·H over the prompts is beta0.

    Raises:
        ValueError: the mean entropy is not positive, so that no alpha does it.
    """
    mean = sum(ref_entropy) / len(ref_entropy)
    if not 0 < mean < math.inf:
        raise ValueError(f"ref_entropy: mean {mean} nats, expected a positive one; give alpha as a number")
    return beta0 / mean
