"""The settings of training, and the rules for beta by name. Importing this module does not load torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoviz.forms import FORMS, Form, scale

if TYPE_CHECKING:
    from dpoviz.regularizers import Regularization


class RuleInfo(NamedTuple):
    """A rule for beta that a run can select by name.

    Attributes:
        forms: the forms in which it is defined.
        setting: the name of its hyperparameter besides beta0; "" if it has none.
        default: the published value of the hyperparameter, or ours where none is published.
        column: the column of numbers that the user's pairs must have for it; "" if none.
    """

    forms: tuple[Form, ...] = FORMS
    setting: str = ""
    default: float = 0.0
    column: str = ""


RULES: dict[str, RuleInfo] = {
    "constant": RuleInfo(),
    "network": RuleInfo(),
    "task": RuleInfo(),
    "entropy": RuleInfo(),
    "beta-dpo": RuleInfo(("standard",), "a", 0.6),
    "epsilon-dpo": RuleInfo(("standard",), "epsilon", 0.01),
    "mallows": RuleInfo(("standard",), "sign", 1.0),
    "ada-dpo": RuleInfo(("standard",), "rho", 0.2),
    "madpo": RuleInfo(("standard",), "tau", math.log(999), column="reward_margin"),
    "lsc": RuleInfo(("standard",), "target margin", 0.4),
    "lsc-at-once": RuleInfo(("standard",), "target margin", 0.4),
    "dual-kl": RuleInfo(("standard",), "KL in nats", 1.0),
    "dual-kl-task": RuleInfo(("standard",), "KL in nats", 1.0),
}
"""The rules that `training.methods` can build, by name."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of training that are common to both forms.

    alpha and the weights are in units of beta0, the beta at which s = `initial_scale`, so that a given relative change
    of beta costs the same in both forms.

    Attributes:
        initial_scale: the scale s that multiplies h at the start; beta0 is 1/s (inverse) or s (standard).
        scale_min: lower end of the range of s(x); None: initial_scale / 4.
        scale_max: upper end of the range of s(x); None: 4 · initial_scale.
        alpha: beta per nat of entropy, over beta0; None: 1 / mean H, so that the mean of alpha·H is beta0.
        lambda_range: weight λ1 of the range term, for beta0 = 1.
        lambda_smoothness: weight λ2 of the gradient penalty, for beta0 = 1.
        lambda_consistency: weight of the variance of beta within a task, for beta0 = 1.
        lambda_entropy: weight λ3 of the entropy term, for beta0 = 1; 0 leaves it out.
        stage1_steps: steps with the fixed beta; None: one pass over the pairs.
        stage2_steps: steps with beta(x); None: one pass over the pairs.
        batch_size: pairs per step, over all processes: a multiple of their number; None: 8, or all pairs if they are
            fewer.
        eval_batch_size: pairs, or prompts with all their samples, per batch where nothing is trained.
        policy_learning_rate: learning rate of AdamW on the policy; None: 1e-4 with adapters, 1e-6 for all weights.
        beta_learning_rate: learning rate of AdamW on beta.
        policy_max_norm: norm at which the policy's gradient is clipped.
        beta_max_norm: norm at which beta's gradient is clipped, separately from the policy's.
        warmup_steps: steps in which both learning rates rise from 0, in each stage; None: a tenth of stage 1.
        dropout: keep the model's dropout on during training; the reference is always scored without it.
        gradient_accumulation: parts in which a batch passes through the policy, to save memory; the update is that of
            the whole batch, and a step takes a forward pass more.
        gradient_checkpointing: keep only the input of each layer for the backward pass, which saves memory and takes a
            forward pass more.
        compile: compile the policy's layers, and on a GPU the step that samples for the entropy, which takes minutes
            and makes the steps of a small model faster on a GPU.
        rescore_reference: score each batch with the reference again, together with the policy, so that both round alike
            and h is exactly 0 at the start; None: only where the precision is below float32.
        log_every: steps between rows of the history; None: about a hundred rows.
        probe_every: steps between measurements on held-out prompts (KL by sampling, reward accuracy); 0: only at the
            end of a stage.
        probe_prompts: held-out prompts per task at which KL is sampled.
        max_new_tokens: limit of a sampled answer, in tokens.
        checkpoint_every: steps between checkpoints; None: about ten per stage.
        seed: random seed of all that is sampled, shuffled and initialised.
    """

    initial_scale: float = 0.1
    scale_min: float | None = None
    scale_max: float | None = None
    alpha: float | None = None
    lambda_range: float = 4.0
    lambda_smoothness: float = 0.01
    lambda_consistency: float = 0.0
    lambda_entropy: float = 0.1
    stage1_steps: int | None = 60
    stage2_steps: int | None = 120
    batch_size: int | None = 32
    eval_batch_size: int = 32
    policy_learning_rate: float | None = 2e-4
    beta_learning_rate: float = 3e-3
    policy_max_norm: float = 1.0
    beta_max_norm: float = 1.0
    warmup_steps: int | None = 10
    dropout: bool = False
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    rescore_reference: bool | None = None
    log_every: int | None = 5
    probe_every: int = 30
    probe_prompts: int = 32
    max_new_tokens: int = 48
    checkpoint_every: int | None = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("initial_scale", "scale_min", "scale_max", "alpha", "policy_learning_rate"):
            if name == "initial_scale" or getattr(self, name) is not None:
                self._require(name, 0 < getattr(self, name) < math.inf, "a positive finite number")
        self._require("initial_scale", 1e-6 <= self.initial_scale <= 1e6, "a number from 1e-6 to 1e6")
        for name in ("beta_learning_rate", "policy_max_norm", "beta_max_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive finite number")
        low, high = self.scale_range
        if not low <= self.initial_scale <= high or low >= high:
            raise ValueError(
                f"scale_min, scale_max: got {low}, {high}, expected scale_min <= initial_scale = {self.initial_scale} "
                "<= scale_max, and scale_min < scale_max"
            )
        for name in ("lambda_range", "lambda_smoothness", "lambda_consistency", "lambda_entropy"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number, at least 0")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, whole and least <= value <= _MOST, f"a whole number from {least} to {_MOST}")
        self._require("seed", 0 <= self.seed < 2**31, "a whole number from 0 to below 2**31")
        if self.gradient_accumulation > 1 and self.dropout:
            raise ValueError(
                f"gradient_accumulation: got {self.gradient_accumulation} with dropout, expected 1: each part passes "
                "through the policy twice, and dropout would differ; leave one of the two out"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def scale_range(self) -> tuple[float, float]:
        """The lower and the upper end of the range of s(x)."""
        low = self.initial_scale / 4 if self.scale_min is None else self.scale_min
        high = self.initial_scale * 4 if self.scale_max is None else self.scale_max
        return low, high

    def resolved(self, pairs: int, *, adapters: bool) -> TrainSettings:
        """Return the settings with those that depend on the data or the model filled in where they are None.

        Args:
            pairs: number of training pairs.
            adapters: whether adapters are trained rather than all weights.
        """
        batch_size = min(8, pairs) if self.batch_size is None else self.batch_size
        one_pass = max(1, pairs // batch_size)
        stage1 = one_pass if self.stage1_steps is None else self.stage1_steps
        stage2 = one_pass if self.stage2_steps is None else self.stage2_steps
        open_: dict[str, Any] = {
            "batch_size": batch_size,
            "stage1_steps": stage1,
            "stage2_steps": stage2,
            "policy_learning_rate": 1e-4 if adapters else 1e-6,
            "warmup_steps": max(1, stage1 // 10),
            "log_every": max(1, (stage1 + stage2) // 100),
            "checkpoint_every": max(5, stage2 // 10),
        }
        return replace(self, **{name: value for name, value in open_.items() if getattr(self, name) is None})

    def in_form(self, form: Form) -> TrainConfig:
        """Return the configuration of a run in one form; call `resolved` first if settings are None."""
        return TrainConfig(form=form, **{field.name: getattr(self, field.name) for field in fields(TrainSettings)})


_OPEN = ("batch_size", "stage1_steps", "stage2_steps", "warmup_steps", "log_every", "checkpoint_every")
_LEAST = {name: 1 for name in ("batch_size", "eval_batch_size", "log_every", "checkpoint_every", "max_new_tokens")}
_LEAST |= {"gradient_accumulation": 1}
_LEAST |= {name: 0 for name in ("stage1_steps", "stage2_steps", "warmup_steps", "probe_every", "probe_prompts")}
_MOST = 10**8  # more than a day at a millisecond per step


@dataclass(frozen=True)
class TrainConfig(TrainSettings):
    """Everything that a run depends on besides its model and its data.

    Attributes:
        form: "inverse" (h is multiplied by 1/beta, as in the derivation) or "standard" (by beta).
    """

    form: Form = "inverse"
    if TYPE_CHECKING:  # numbers here: __post_init__ refuses None
        stage1_steps: int = 0
        stage2_steps: int = 0
        batch_size: int = 0
        policy_learning_rate: float = 0.0
        warmup_steps: int = 0
        log_every: int = 0
        checkpoint_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        scale(self.initial_scale, self.form)
        left = [name for name in (*_OPEN, "policy_learning_rate") if getattr(self, name) is None]
        if left:
            raise ValueError(f"{', '.join(left)}: got None, expected a number; TrainSettings.resolved fills it in")

    @classmethod
    def around(cls, initial_scale: float, form: Form, **settings) -> TrainConfig:
        """Return the configuration that starts at `initial_scale`; `settings` are its other fields."""
        return cls(form=form, initial_scale=initial_scale, **settings)

    @property
    def beta0(self) -> float:
        """The fixed beta of stage 1, from which beta(x) starts."""
        return scale(self.initial_scale, self.form)

    @property
    def beta_min(self) -> float:
        """The lower end of the range of beta."""
        return min(scale(s, self.form) for s in self.scale_range)

    @property
    def beta_max(self) -> float:
        """The upper end of the range of beta."""
        return max(scale(s, self.form) for s in self.scale_range)

    def alpha_for(self, ref_entropy: Sequence[float]) -> float:
        """Return α, beta per nat of entropy.

        Args:
            ref_entropy: (N,) entropies of the training prompts; used where `alpha` is None.
        """
        return alpha_for_mean(ref_entropy, self.beta0) if self.alpha is None else self.alpha * self.beta0

    def regularization(self, alpha: float | None) -> Regularization:
        """Return the regularization with the weights divided by beta0 (λ1) or by its square (the others).

        Args:
            alpha: beta per nat of entropy; None where the entropy term is off.
        """
        from dpoviz.regularizers import Regularization

        return Regularization(
            beta_min=self.beta_min,
            beta_max=self.beta_max,
            alpha=alpha,
            range=self.lambda_range / self.beta0,
            smoothness=self.lambda_smoothness / self.beta0**2,
            consistency=self.lambda_consistency / self.beta0**2,
            entropy=self.lambda_entropy / self.beta0**2,
        )


def alpha_for_mean(ref_entropy: Sequence[float], beta0: float) -> float:
    """Return the α at which the mean of α·H over the prompts is beta0.

    Raises:
        ValueError: the mean entropy is not positive and finite.
    """
    mean = sum(ref_entropy) / len(ref_entropy)
    if not 0 < mean < math.inf:
        raise ValueError(f"ref_entropy: got a mean of {mean} nats, expected a positive one; give alpha as a number")
    return beta0 / mean
