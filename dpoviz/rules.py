"""Rules for beta: the interface through which the training loop asks for the beta of each pair in a batch.

`PromptRule` is beta as the derivation wants it, a function of the prompt alone. `BetaDPO`, `EpsilonDPO`, `MallowsPO`,
`AdaDPO` and `LSC` are published rules that use the answers, or what the policy computes from them, so their beta is not
a function of x. The normaliser Z(x) cancels between chosen and rejected because both have the same beta (the
derivation, §4.1). With these rules the pairs of one prompt have different betas, so that Z(x) is not the same for all
of them, and no single reward function corresponds to the loss. `MADPO` and `TaskSmoothing` have one beta, and weights
or smoothed labels. `DualKL` uses the measured KL divergence. `RandomBeta` and `LookupBeta` are controls.

The published rules multiply h by beta: they are defined in the standard form.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import ClassVar, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpoviz.beta import Beta, Saved
from dpoviz.forms import Form
from dpoviz.validation import require, require_features, require_positive, rows_where, task_index

_REACH = 1000.0
"""A beta that is multiplied at every step stays within this factor of beta0, far from overflow and underflow."""


@dataclass(frozen=True)
class Observation:
    """The inputs of a rule in one step, measured before the policy's update; none carries a gradient.

    Attributes:
        h: (B,) log-ratio difference of each pair under the policy, in nats.
        x: (B, D) features of the prompts.
        task: the task of each row.
        ref_entropy: (B,) entropy of the reference at each prompt.
        answer_entropy: (B,) next-token entropy of the reference over log V, averaged over the tokens of each answer and
            then over the two answers, in [0, 1]; given if "answer_entropy" is in the rule's `needs`.
        direction: (B,) -1, 0 or 1, as `perturbed_directions` returns; given if "direction" is in `needs`.
        reward_margin: (B,) a reward model's reward of the chosen answer minus that of the rejected one, in the units of
            Bradley–Terry logits; given if "reward_margin" is in `needs`.
        kl: sampled KL(π‖π_ref) of each task, in nats, in the steps in which it was measured; given if "kl" is in
            `needs`.
    """

    h: Tensor
    x: Tensor
    task: Sequence[str]
    ref_entropy: Tensor
    answer_entropy: Tensor | None = None
    direction: Tensor | None = None
    reward_margin: Tensor | None = None
    kl: Mapping[str, float] | None = None


class RuleOutput(NamedTuple):
    """The betas and weights that a rule returns for a batch.

    Attributes:
        beta: (B,) positive; carries a gradient if the rule is trainable.
        weight: (B,) weight of each pair in the mean of the losses, 0 for a pair that a filter drops. None weighs all
            pairs equally.
        smoothing: (B,) probability ε that the label is wrong, from 0 to below ½: the loss of a pair becomes
            −(1 − ε)·log σ(s·h) − ε·log σ(−s·h). None is 0.
        normalised: divide the weighted sum of the losses by the sum of the weights, as for a filter; False divides it
            by the number of pairs.
    """

    beta: Tensor
    weight: Tensor | None = None
    smoothing: Tensor | None = None
    normalised: bool = True

    @property
    def divisor(self) -> Tensor | int:
        """What the weighted sum of the losses is divided by."""
        return len(self.beta) if self.weight is None or not self.normalised else self.weight.sum()


class Rule(Saved):
    """A rule for beta, called as `rule(observation)`; returns a `RuleOutput`.

    Its state is in buffers, so that a checkpoint contains it. The state changes only in training mode: in evaluation
    mode the same batch always gives the same output.

    Attributes:
        form: the form in which the rule is defined; None if it is defined in both.
        needs: what it reads besides: "answer_entropy", "direction", "reward_margin", "kl".
        settings: names of the attributes that `repr` shows.
        paper: the arXiv number of the paper that it is from.
    """

    form: ClassVar[Form | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "2305.18290"  # of DPO itself
    epsilon: float  # of a rule that needs "direction"
    every: int  # of a rule that needs "kl"

    @property
    def trainable(self) -> bool:
        """True if the rule has trainable parameters."""
        return any(p.requires_grad for p in self.parameters())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)

    def forward(self, observation: Observation) -> RuleOutput:
        raise NotImplementedError


class PromptRule(Rule):
    """A `Beta`, a function of the prompt alone, as a rule."""

    def __init__(self, beta: Beta) -> None:
        super().__init__()
        self.beta, self.reads = beta, beta.reads

    def forward(self, observation: Observation) -> RuleOutput:
        return RuleOutput(self.beta(observation.x, task=observation.task, ref_entropy=observation.ref_entropy))


class BetaDPO(Rule):
    """Beta-DPO: one beta per batch, larger when the batch's mean margin exceeds its moving average.

        β = max(β₀·[1 + a·(h̄ − M)], 10⁻³),    M ← m·M + (1 − m)·mean(h)

    Wu et al. 2024 (arXiv:2407.08639). M starts at 0 and is updated with the batch before it is used. With the filter, a
    fraction `keep` of the pairs is sampled without replacement, with weights exp(−½·((h − M)/S)²), where S is the
    moving average of the standard deviation of h. h̄ is then the mean over the kept pairs.

    As in the authors' code, h is not multiplied by beta. That code reports rewards with β₀; those of `dpo_loss` use the
    actual beta. Beta depends on the answers, through h.

    Args:
        beta0: β₀, beta of a batch whose mean margin equals the moving average.
        a: how strongly beta follows h; 0 makes beta constant.
        momentum: m, from 0 to below 1.
        keep: fraction of the pairs to keep, rounded down, but at least one pair; 1 turns the filter off.
        seed: random seed of the filter.

    Raises:
        ValueError: an argument is outside its range. In use: `h` is not (B,) and finite, or the filter is on and the
            batch is a single pair, which has no spread.
    """

    form = "standard"
    paper = "2407.08639"
    reads = frozenset()
    settings = ("beta0", "a", "momentum", "keep", "seed")
    mean: Tensor
    spread: Tensor
    step: Tensor

    def __init__(
        self, beta0: float, *, a: float = 0.6, momentum: float = 0.9, keep: float = 0.8, seed: int = 0
    ) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require("a", a, 0 <= a < math.inf, "a number, at least 0")
        require("momentum", momentum, 0 <= momentum < 1, "a number from 0 to below 1")
        require("keep", keep, 0 < keep <= 1, "a fraction above 0, at most 1")
        self.beta0, self.a, self.momentum, self.keep, self.seed = beta0, a, momentum, keep, seed
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        filters = self.keep < 1
        if filters and len(h) < 2:
            raise ValueError("h: got 1 pair, expected at least 2, for a spread; or set keep=1")
        if self.training:
            self.mean.lerp_(h.mean().to(self.mean.dtype), 1 - self.momentum)
            if filters:
                self.spread.lerp_(h.std().to(self.spread.dtype), 1 - self.momentum)
            self.step += 1
        weight = self._kept(h) if filters else None
        mean = h.mean() if weight is None else h[weight > 0].mean()
        beta = (self.beta0 * (1 + self.a * (mean - self.mean))).clamp(min=1e-3)
        return RuleOutput(beta.expand(len(h)).clone(), weight)

    def _kept(self, h: Tensor) -> Tensor:
        """Return (B,) with 1 for each pair to keep and 0 for the others."""
        # the spread is 0 while the policy equals the reference: all pairs then have the same weight
        distance = (h - self.mean) / self.spread if self.spread > 0 else torch.zeros_like(h)
        bits = hashlib.blake2b(f"{self.seed}/{self.step.item()}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(bits, "little"))
        gumbel = -torch.empty(len(h), dtype=torch.float64).exponential_(generator=generator).log()
        # the largest values of log-weight + Gumbel noise are a sample without replacement, however small the weights
        keys = gumbel.to(h.device, h.dtype) - distance.square() / 2
        kept = keys.topk(max(1, int(self.keep * len(h)))).indices
        return torch.zeros_like(h).index_fill_(0, kept, 1.0)


class EpsilonDPO(Rule):
    """Epsilon-DPO: a beta per pair, by the direction in which perturbed logits move the pair's log-ratio.

        β_i = β₀/(1 + ε·d_i),    β₀ ← mean_i β_i

    Lee et al. 2025 (arXiv:2502.13177). d is 1 if the pair's log-ratio log π(y_w|x) − log π(y_l|x) rises strictly as the
    policy's logits move away from the reference's, -1 if it falls strictly, and 0 otherwise
    (`dpoviz.training.observe.perturbed_directions`). The new β₀ is used from the next step on. The authors' code
    divides β₀ by 1 + ε·mean(d) instead; the relative difference per step is of order ε².

    Beta depends on the answers, because d does.

    Args:
        beta0: initial β₀; its later values stay within a factor of 1000 of this one.
        epsilon: ε, the size of the perturbation and of the step of beta.

    Raises:
        ValueError: `beta0` is not a positive finite number, or `epsilon` is not between 0 and 1. In use: `direction` is
            missing, not (B,), or has values other than -1, 0 and 1.
    """

    form = "standard"
    paper = "2502.13177"
    reads = frozenset()
    needs = frozenset({"direction"})
    settings = ("beta0", "epsilon")
    current: Tensor

    def __init__(self, beta0: float, *, epsilon: float = 0.01) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require("epsilon", epsilon, 0 < epsilon < 1, "a number between 0 and 1")
        self.beta0, self.epsilon = beta0, epsilon
        self.register_buffer("current", torch.tensor(float(beta0)))

    def forward(self, observation: Observation) -> RuleOutput:
        direction = _rows("direction", observation.direction, len(observation.x))
        if not torch.isin(direction, direction.new_tensor([-1, 0, 1])).all():
            raise ValueError(f"direction: got {direction.unique().tolist()}, expected -1, 0 or 1")
        beta = self.current / (1 + self.epsilon * direction)
        if self.training:
            self.current.copy_(_hold(beta.mean(), self.beta0))
        return RuleOutput(beta)


class MallowsPO(Rule):
    """MallowsPO: a beta per pair, smaller where the reference is less certain along the two answers.

        β_i = β₀·φ_i,    φ = c·(−log H)^sign

    Chen et al. 2024 (arXiv:2405.14953), with one factor on h, as in the authors' code. H is the reference's next-token
    entropy over log V, averaged over the tokens of each answer and then over the two answers. `sign=1` is the published
    rule, which agrees in sign with the derivation's entropy term in the *inverse* form. `sign=-1` is a control:
    uncertain pairs get the larger beta. H is clipped to [0.001, 0.999], because −log H is infinite at 0 and 0 at 1.

    In the paper H estimates a property of the prompt, but it is computed on the answers of the data, so beta depends on
    them.

    Args:
        beta0: β₀, beta at φ = 1.
        c: the constant that makes the mean of φ over the data 1; `with_mean` computes it.
        sign: 1 or -1.

    Raises:
        ValueError: `beta0` or `c` is not a positive finite number, or `sign` is neither 1 nor -1. In use:
            `answer_entropy` is missing, not (B,), or outside 0 to 1.
    """

    form = "standard"
    paper = "2405.14953"
    reads = frozenset()
    needs = frozenset({"answer_entropy"})
    settings = ("beta0", "c", "sign")

    def __init__(self, beta0: float, *, c: float, sign: float = 1) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require_positive("c", c)
        require("sign", sign, sign in (1, -1), "1, or -1 for the control")
        self.beta0, self.c, self.sign = beta0, c, sign

    @classmethod
    def with_mean(cls, beta0: float, answer_entropy: Tensor, *, sign: int = 1) -> MallowsPO:
        """Return the rule whose mean beta over the data is `beta0`.

        Args:
            beta0: the mean of beta.
            answer_entropy: (N,) `Observation.answer_entropy` of all pairs.
            sign: 1 or -1.

        Raises:
            ValueError: `answer_entropy` is not (N,) or is outside 0 to 1, `sign` is neither 1 nor -1, or `beta0` is not
                a positive finite number.
        """
        entropy = _rows("answer_entropy", answer_entropy, len(answer_entropy)).double()
        return cls(beta0, c=1 / cls(1.0, c=1.0, sign=sign)._phi(entropy).mean().item(), sign=sign)

    def forward(self, observation: Observation) -> RuleOutput:
        return RuleOutput(
            self.beta0 * self._phi(_rows("answer_entropy", observation.answer_entropy, len(observation.x)))
        )

    def _phi(self, entropy: Tensor) -> Tensor:
        slack = 1e-4  # in float32 the entropy, a sum over the vocabulary, may exceed log V by rounding
        if entropy.min() < -slack or entropy.max() > 1 + slack:
            raise ValueError(
                f"answer_entropy: got {entropy.min():.4g} to {entropy.max():.4g}, expected 0 to 1; divide nats per "
                "token by the log of the vocabulary's size"
            )
        return self.c * (-entropy.clamp(0.001, 0.999).log()) ** self.sign


class LSC(Rule):
    """LSC-DPO: one beta for all pairs, controlled so that the mean margin β·mean(h) stays at a target.

        β ← β·exp(−η·(β·mean(h) − z*))    where mean σ(−β·h) < start

    LSC-DPO (arXiv:2610.07592), as in the authors' code: beta is updated with a batch before it is used on that batch,
    and the condition is checked at every batch. Until margins have grown, beta stays at `beta0`. Beta depends on the
    answers, through h.

    Args:
        beta0: initial beta; later values stay within a factor of 1000 of it.
        eta: η, the gain of the controller.
        target: z*, the mean margin to hold.
        start: beta is updated only while the mean of σ(−β·h) is below it; this mean is ½ while the policy equals the
            reference.

    Raises:
        ValueError: an argument is outside its range. In use: `h` is not (B,) and finite.
    """

    form = "standard"
    paper = "2610.07592"
    reads = frozenset()
    settings = ("beta0", "eta", "target", "start")
    current: Tensor

    def __init__(self, beta0: float, *, eta: float = 0.1, target: float = 0.4, start: float = 0.45) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require_positive("eta", eta)
        require_positive("target", target)
        require("start", start, 0 < start <= 1, "a number above 0, at most 1")
        self.beta0, self.eta, self.target, self.start = beta0, eta, target, start
        self.register_buffer("current", torch.tensor(float(beta0)))

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        if self.training and torch.sigmoid(-self.current * h).mean() < self.start:
            moved = self.current * torch.exp(-self.eta * (self.current * h.mean() - self.target))
            self.current.copy_(_hold(moved, self.beta0))
        return RuleOutput(self.current.to(h.dtype).expand(len(h)).clone())


class AdaDPO(Rule):
    """Ada-DPO: a scale τ per pair, larger where the policy clearly prefers one of the two answers.

        ℓ = min_τ τ·(−log σ(β₀·h/τ)) + (ρ − log 2)·τ,    τ_min ≤ τ ≤ τ_max

    Hong et al. 2024 (arXiv:2406.02764), with the defaults of the authors' code. The minimum is at τ = |β₀·h|/u, clipped
    to its range, where u > 0 solves u·σ(−u) − log(2σ(u)) + ρ = 0; the authors iterate Newton's method five times. So
    beta is β₀/τ and the pair weighs τ: within the range of τ, the gradient of a pair no longer falls as h grows. Beta
    depends on the answers, through h.

    Args:
        beta0: β₀, beta at τ = 1.
        rho: ρ, above 0 and below log 2; a larger one gives larger τ.
        tau_min: the lower end of τ.
        tau_max: the upper end of τ.

    Raises:
        ValueError: an argument is outside its range. In use: `h` is not (B,) and finite.
    """

    form = "standard"
    paper = "2406.02764"
    reads = frozenset()
    settings = ("beta0", "rho", "tau_min", "tau_max")

    def __init__(self, beta0: float, *, rho: float = 0.2, tau_min: float = 0.1, tau_max: float = 5.0) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require("rho", rho, 0 < rho < math.log(2), "a number above 0, below log 2")
        require_positive("tau_min", tau_min)
        require("tau_max", tau_max, tau_min <= tau_max < math.inf, "a finite number, at least tau_min")
        self.beta0, self.rho, self.tau_min, self.tau_max = beta0, rho, tau_min, tau_max
        self._root = _decreasing_root(lambda u: u / (1 + math.exp(u)) + math.log1p(math.exp(-u)) - math.log(2) + rho)

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        tau = (self.beta0 * h.abs() / self._root).clamp(self.tau_min, self.tau_max)
        return RuleOutput(self.beta0 / tau, weight=tau, normalised=False)


def _decreasing_root(function: Callable[[float], float]) -> float:
    """Return the root of a decreasing function, between 0 and 100."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


class MADPO(Rule):
    """Margin-adaptive DPO: weights by the margin m that a reward model gives to a pair; one beta.

        ℓ = w(m)·(−log σ(β₀·h)),    w(m) = σ(c·m)/σ(m) where m > −τ, else 1
        c = c_min + (c_max − c_min) / (1 + (c_max − 1)/(1 − c_min)·exp(λ·(|m| − τ)))

    Rho 2025 (arXiv:2510.05342), with the settings of the authors' experiment. c is above 1 for |m| below τ, 1 at τ and
    below 1 beyond. With labels as often in each order as the reward model says, and |m| below τ, the loss is least at
    β₀·h = c·m, where that of DPO is least at m.

    Args:
        beta0: beta.
        c_min: the least c, above 0 and below 1.
        c_max: the largest c, above 1.
        rate: λ, per unit of margin.
        tau: τ, in units of margin.

    Raises:
        ValueError: an argument is outside its range. In use: `reward_margin` is not (B,) and finite.
    """

    form = "standard"
    paper = "2510.05342"
    reads = frozenset()
    needs = frozenset({"reward_margin"})
    settings = ("beta0", "c_min", "c_max", "rate", "tau")

    def __init__(
        self, beta0: float, *, c_min: float = 0.5, c_max: float = 2.0, rate: float = 1.0, tau: float = math.log(999)
    ) -> None:
        super().__init__()
        for name, value in (("beta0", beta0), ("rate", rate), ("tau", tau)):
            require_positive(name, value)
        require("c_min", c_min, 0 < c_min < 1, "a number above 0, below 1")
        require("c_max", c_max, 1 < c_max < math.inf, "a finite number above 1")
        self.beta0, self.c_min, self.c_max, self.rate, self.tau = beta0, c_min, c_max, rate, tau

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        m = _rows("reward_margin", observation.reward_margin, len(observation.x))
        odds = (self.c_max - 1) / (1 - self.c_min) * torch.exp(self.rate * (m.abs() - self.tau))
        c = self.c_min + (self.c_max - self.c_min) / (1 + odds)
        weight = torch.where(m > -self.tau, torch.sigmoid(c * m) / torch.sigmoid(m), 1.0)
        return RuleOutput(torch.full_like(h, self.beta0), weight=weight, normalised=False)


class TaskSmoothing(Rule):
    """Label smoothing with a known rate of wrong labels per task: conservative DPO with one ε per task, one beta.

        ℓ = −(1 − ε)·log σ(β₀·h) − ε·log σ(−β₀·h)

    E. Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", eq. 3, has one ε for all pairs.

    Args:
        beta0: beta.
        rates: ε of each task, from 0 to below ½.

    Raises:
        ValueError: `beta0` is not a positive finite number, or a rate is out of range. In use: a task has no rate.
    """

    form = "standard"
    reads = frozenset({"task"})
    settings = ("beta0", "rates")

    def __init__(self, beta0: float, rates: Mapping[str, float]) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require("rates", dict(rates), all(0 <= rate < 0.5 for rate in rates.values()), "numbers from 0 to below 0.5")
        self.beta0, self.rates = beta0, dict(rates)

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        index = task_index(observation.task, len(h), tuple(self.rates))
        rates = torch.tensor(list(self.rates.values()), dtype=h.dtype, device=h.device)[index.to(h.device)]
        return RuleOutput(torch.full_like(h, self.beta0), smoothing=rates)


class DualKL(Rule):
    """Dual control of the KL divergence: beta rises while the KL is above its budget and falls while it is below.

        β ← β·(1 + (n/N)·clip(KL/ε − 1, −0.2, 0.2))

    The controller of Ziegler et al. 2019 (arXiv:1909.08593, §2.2), whose gain of 0.1 per step is N = 10 here. n is the
    number of steps between two measurements of the KL. Each new beta is used from the next step on. In DPO the KL
    answers beta slowly, and early in training a larger beta does not lower it: in a short training the KL may stay far
    from its budget.

    Args:
        beta0: initial beta; later values stay within a factor of 1000 of it.
        target: ε, the KL budget in nats, of each task or of the mean over tasks.
        tasks: the tasks, each with its own beta; None for one beta, controlled by the mean of the tasks' KL.
        every: n, in steps.
        horizon: N, in steps.

    Raises:
        ValueError: an argument is outside its range, or n/N is 5 or more, at which beta could reach 0. In use: a task
            or a measured KL is missing, or a KL is not finite.
    """

    form = "standard"
    paper = "1909.08593"
    needs = frozenset({"kl"})
    settings = ("beta0", "target", "tasks", "every", "horizon")
    current: Tensor

    def __init__(
        self,
        beta0: float,
        *,
        target: float,
        tasks: Sequence[str] | None = None,
        every: int = 10,
        horizon: float = 10,
    ) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require_positive("target", target)
        require_positive("horizon", horizon)
        require("every", every, isinstance(every, int) and 1 <= every < 5 * horizon, "1 or more, below 5·horizon")
        names = tasks is None or (not isinstance(tasks, str) and len(set(tasks)) == len(tasks) > 0)
        require("tasks", tasks, names, "different names, at least one; or None for one beta for all")
        self.beta0, self.target, self.every, self.horizon = beta0, target, every, horizon
        self.tasks = None if tasks is None else tuple(tasks)
        self.reads = frozenset() if tasks is None else frozenset({"task"})
        self.register_buffer("current", torch.full((1 if tasks is None else len(tasks),), float(beta0)))

    def forward(self, observation: Observation) -> RuleOutput:
        _rows("h", observation.h, len(observation.x))
        beta = self.current[self._index(observation.task, len(observation.x))].to(
            torch.promote_types(observation.h.dtype, torch.float32)
        )
        if self.training and observation.kl is not None:
            error = (self._measured(observation.kl) / self.target - 1).clamp(-0.2, 0.2)
            self.current.copy_(_hold(self.current * (1 + error * self.every / self.horizon), self.beta0))
        return RuleOutput(beta)

    def _index(self, task: Sequence[str], batch: int) -> Tensor:
        """Return (B,) the position of each row's beta in `current`."""
        if self.tasks is None:
            return torch.zeros(batch, dtype=torch.int64, device=self.current.device)
        return task_index(task, batch, self.tasks).to(self.current.device)

    def _measured(self, kl: Mapping[str, float]) -> Tensor:
        """Return the KL that controls each beta."""
        names = self.tasks or tuple(kl)
        missing = [name for name in names if not math.isfinite(kl.get(name, math.nan))]
        if missing or not names:
            raise ValueError(f"kl: got {dict(kl)}, expected a finite KL for {missing or 'at least one task'}")
        values = self.current.new_tensor([kl[name] for name in names])
        return values if self.tasks else values.mean(dim=0, keepdim=True)


class RandomBeta(Rule):
    """Control: a log-normal beta sampled once per prompt, independent of its content.

        β(x) = mean·exp(spread·z(x) − spread²/2),    z(x) ~ N(0, 1)

    z(x) is computed from a hash of the prompt's features, so it is the same in every run and on every machine.

    Args:
        mean: the mean of beta over prompts.
        spread: the standard deviation of log β over prompts.
        seed: random seed; each seed gives independent betas.

    Raises:
        ValueError: `mean` is not a positive finite number, `spread` is not finite and at least 0, or `seed` is not an
            integer of at least 0. In use: `x` is not floating (B, D) and finite.
    """

    settings = ("mean", "spread", "seed")
    reads = frozenset({"x"})

    def __init__(self, mean: float, *, spread: float, seed: int = 0) -> None:
        super().__init__()
        require_positive("mean", mean)
        require("spread", spread, 0 <= spread < math.inf, "a finite number, at least 0")
        require("seed", seed, isinstance(seed, int) and seed >= 0, "an integer, at least 0")
        self.mean, self.spread, self.seed = mean, spread, seed

    def forward(self, observation: Observation) -> RuleOutput:
        # 52 bits plus one half: the quantile function is never called at 0 or 1
        uniform = [((bits >> 11) + 0.5) / 2**52 for bits in _hashes(observation.x, self.seed)]
        z = torch.tensor([NormalDist().inv_cdf(u) for u in uniform], dtype=torch.float64)
        beta = self.mean * torch.exp(self.spread * z - self.spread**2 / 2)
        return RuleOutput(beta.to(observation.x.device, torch.promote_types(observation.x.dtype, torch.float32)))


class LookupBeta(Rule):
    """A fixed table of beta by prompt, looked up by the prompt's features: another rule's beta, frozen or `shuffled`.

    Args:
        x: (N, D) features of the prompts; a prompt may occur several times.
        beta: (N,) positive; equal (to one part in 10⁴) in all rows of the same prompt.

    Raises:
        ValueError: `x` is not floating (N, D) and finite, `beta` is not (N,), positive and finite, or one prompt has
            two betas. In use: a prompt is not in the table.
    """

    settings = ("digest",)
    reads = frozenset({"x"})
    keys: Tensor
    values: Tensor

    def __init__(self, x: Tensor, beta: Tensor) -> None:
        super().__init__()
        table = {key: beta[row].item() for key, row in _first_rows(x, beta).items()}
        keys = sorted(table)
        self.register_buffer("keys", torch.tensor(keys))
        self.register_buffer("values", torch.tensor([table[key] for key in keys]))

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs) -> LookupBeta:
        # config.json has no arguments: the table is in the buffers
        saved = load_file(Path(kwargs["model_id"]) / "model.safetensors")
        own = cls(torch.arange(float(len(saved["keys"])))[:, None], saved["values"])
        own.load_state_dict(saved, strict=strict)
        return own.eval()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the table's content; `repr` shows them."""
        whole = repr([self.keys.tolist(), self.values.tolist()]).encode()
        return hashlib.blake2b(whole, digest_size=8).hexdigest()

    @classmethod
    def shuffled(cls, x: Tensor, beta: Tensor, task: Sequence[str], *, within_task: bool, seed: int) -> LookupBeta:
        """Return a control: the same betas on the same prompts, permuted at random.

        The distribution of beta stays the same; its relation to the prompts is lost.

        Args:
            x: (N, D) features of the prompts, as in the class.
            beta: (N,) as in the class.
            task: the task of each row.
            within_task: permute within each task, so that the distribution of beta in each task stays the same too.
            seed: random seed of the permutation.

        Raises:
            ValueError: as in the class, or `task` does not have N entries.
        """
        require("task", f"{len(task)} entries", len(task) == len(x), f"{len(x)}, one per row of x")
        rows = list(_first_rows(x, beta).values())
        generator = torch.Generator().manual_seed(seed)
        groups = [[row for row in rows if task[row] == name] for name in sorted(set(task))] if within_task else [rows]
        dealt = [group[i] for group in groups for i in torch.randperm(len(group), generator=generator).tolist()]
        return cls(x[[row for group in groups for row in group]], beta[dealt])

    def forward(self, observation: Observation) -> RuleOutput:
        keys = torch.tensor(_hashes(observation.x), device=self.keys.device)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        unknown = (self.keys[place] != keys).nonzero().flatten().tolist()
        if unknown:
            raise ValueError(f"x: rows {unknown} are not in the table of {len(self.keys)} prompts, expected known ones")
        beta = self.values[place]
        return RuleOutput(beta.to(observation.x.device, torch.promote_types(observation.x.dtype, torch.float32)))


def _rows(name: str, values: Tensor | None, batch: int) -> Tensor:
    """Return `values` as (B,) finite numbers in at least float32, detached."""
    if values is None:
        raise ValueError(f"{name}: got None, expected shape ({batch},): this rule needs it")
    if values.shape != (batch,) or batch == 0:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected ({batch},), one per row of x, B ≥ 1")
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: not finite in rows {rows_where(~torch.isfinite(values))}, expected finite numbers")
    return values


def _hold(beta: Tensor, beta0: float) -> Tensor:
    return beta.clamp(beta0 / _REACH, beta0 * _REACH)


def _hashes(x: Tensor, seed: int = 0) -> list[int]:
    """Return 63 hash bits of each row of features: the same in every run, and equal for equal features."""
    require_features(x)
    # -0.0 equals 0.0 but has other bytes; adding 0.0 turns it into 0.0
    rows = (x.detach().cpu().float() + 0.0).numpy()
    salt = seed.to_bytes(16, "little")
    bits = (hashlib.blake2b(row.tobytes(), digest_size=8, salt=salt).digest() for row in rows)
    return [int.from_bytes(eight, "little") >> 1 for eight in bits]


def _first_rows(x: Tensor, beta: Tensor) -> dict[int, int]:
    """Return the first row of each prompt, by the prompt's hash."""
    keys = _hashes(x)
    beta = _rows("beta", beta, len(x))
    if not (beta > 0).all():
        raise ValueError(f"beta: not positive in rows {rows_where(beta <= 0)}, expected > 0")
    first: dict[int, int] = {}
    for row, key in enumerate(keys):
        before = first.setdefault(key, row)
        # a network's beta of the same prompt differs by rounding between batches
        if not math.isclose(beta[row], beta[before], rel_tol=1e-4):
            raise ValueError(f"beta: rows {before} and {row} are one prompt with two betas, expected one per prompt")
    return first
