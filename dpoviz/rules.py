r"""Rules for beta: the one interface through which the training loop asks for beta of a batch.

`PromptRule` is beta as the derivation wants it, a function of the prompt alone. `BetaDPO`, `EpsilonDPO`, `MallowsPO`
and `LSC` are published rules that look at the answers, or at what the policy makes of them. Their beta is then no
function of x: the normaliser :math:`Z(x)`, which cancels between chosen and rejected because both have the same beta
(the derivation, §4.1), no longer does so across the pairs of a prompt, and no single reward function stands behind
the loss. `DualKL` looks at the KL divergence. `RandomBeta` and `LookupBeta` are controls.

The published rules multiply h by beta: they are defined in the standard form.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dpoviz.beta import Beta
from dpoviz.forms import Form
from dpoviz.validation import require, require_features, require_positive, rows_where, task_index

_REACH = 1000.0
"""A beta that is multiplied step after step stays within this factor of beta0, far from over- and underflow."""


@dataclass(frozen=True)
class Observation:
    """What a rule may look at in one step, before the policy's update; none of it carries a gradient.

    Attributes:
        h: (B,) log-ratio difference of each pair under the policy, in nats.
        x: (B, D) features of the prompts.
        task: the task of each row.
        ref_entropy: (B,) entropy of the reference at each prompt.
        answer_entropy: (B,) the reference's next-token entropy along each answer over log V, averaged over its tokens
            and then over the two answers, in [0, 1]; given where "answer_entropy" is in the rule's `needs`.
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


class RuleOutput(NamedTuple):
    """What a rule gives for a batch.

    Attributes:
        beta: (B,) positive; with a gradient where beta learns.
        weight: (B,) weight of each pair in the mean of the losses, 0 where a filter drops it; None: all alike.
    """

    beta: Tensor
    weight: Tensor | None = None


class Rule(nn.Module):
    """Called as ``rule(observation) -> RuleOutput``. What it remembers is in buffers, so that a checkpoint holds it.

    It remembers in training mode alone: in evaluation mode the same batch gets the same answer again.

    Attributes:
        form: the form that the rule is defined in; None where it is defined in both.
        needs: what the loop has to measure for it: "answer_entropy", "direction", "kl".
        settings: names of the attributes that `repr` shows.
    """

    form: ClassVar[Form | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[tuple[str, ...]] = ()
    epsilon: float  # of a rule that needs "direction"
    every: int  # of a rule that needs "kl"

    @property
    def trainable(self) -> bool:
        """Whether it has weights to train."""
        return any(p.requires_grad for p in self.parameters())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)

    def forward(self, observation: Observation) -> RuleOutput:
        raise NotImplementedError


class PromptRule(Rule):
    """A `Beta`, which is a function of the prompt alone, as a rule."""

    def __init__(self, beta: Beta) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, observation: Observation) -> RuleOutput:
        return RuleOutput(self.beta(observation.x, task=observation.task, ref_entropy=observation.ref_entropy))


class BetaDPO(Rule):
    r"""Beta-DPO: one beta a batch, larger where the policy tells the pairs apart more than it did before.

    .. math:: \beta = \max(\beta_0\,[1 + a\,(\bar h - M)],\ 10^{-3}), \qquad
        M \leftarrow m M + (1 - m)\,\mathrm{mean}(h)

    Wu et al. 2024 (arXiv:2407.08639). M starts at 0 and takes the batch in before it is used. With the filter a
    share `keep` of the pairs is drawn without replacement, by the weights :math:`\exp(-\frac12 ((h - M)/S)^2)`, S
    the moving average of the standard deviation of h; :math:`\bar h` is then the mean over the kept pairs.

    Its public code takes h, as here, without a beta in it. It reports rewards with beta0; those of `dpo_loss` have
    the beta used. As it sees h, its beta depends on the answers.

    Args:
        beta0: the beta of a batch like the ones before it.
        a: how strongly beta follows h; 0 is a constant beta.
        momentum: m.
        keep: share of the pairs that is kept, rounded down; 1 is without the filter.
        seed: the draws of the filter.

    Raises:
        ValueError: an argument outside its range; in use, an `h` that is not (B,) and finite, or a single pair with
            the filter on, which has no spread.
    """

    form = "standard"
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
        require("keep", keep, 0 < keep <= 1, "a share above 0, at most 1")
        self.beta0, self.a, self.momentum, self.keep, self.seed = beta0, a, momentum, keep, seed
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        filters = self.keep < 1
        if filters and len(h) < 2:
            raise ValueError("h: got 1 pair, expected at least 2, which have a spread; or set keep=1")
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
        """(B,) 1 for a pair that is kept."""
        # while no batch had a spread, as where the policy is the reference, all pairs are alike
        distance = (h - self.mean) / self.spread if self.spread > 0 else torch.zeros_like(h)
        bits = hashlib.blake2b(f"{self.seed}/{self.step.item()}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(bits, "little"))
        gumbel = -torch.empty(len(h), dtype=torch.float64).exponential_(generator=generator).log()
        # the largest of log-weight + Gumbel noise are a draw without replacement, however small the weights
        keys = gumbel.to(h.device, h.dtype) - distance.square() / 2
        kept = keys.topk(max(1, int(self.keep * len(h)))).indices
        return torch.zeros_like(h).index_fill_(0, kept, 1.0)


class EpsilonDPO(Rule):
    r"""Epsilon-DPO: a beta for each pair, by where perturbed logits would move it.

    .. math:: \beta_i = \frac{\beta_0}{1 + \varepsilon d_i}, \qquad \beta_0 \leftarrow \mathrm{mean}_i\,\beta_i

    Lee et al. 2025 (arXiv:2502.13177). d is 1 where the pair's log-ratio rises strictly from logits that are nearer to
    the reference to logits that are farther, -1 where it falls strictly, else 0: `dpoviz.perturbed` looks. The new
    beta0 holds from the next step on. The public code divides beta0 by :math:`1 + \varepsilon\,\mathrm{mean}(d)`
    instead, which differs by at most :math:`\varepsilon^2` in the first step.

    beta depends on the answers, which d is a property of.

    Args:
        beta0: where it starts; held within a factor of 1000 of it.
        epsilon: size of the perturbation and of a step of beta.

    Raises:
        ValueError: `beta0` is not a positive finite number or `epsilon` not between 0 and 1; in use, a `direction`
            that is missing, not (B,), or has other values than -1, 0 and 1.
    """

    form = "standard"
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
    r"""MallowsPO: a beta for each pair, smaller where the reference is less certain along its two answers.

    .. math:: \beta_i = \beta_0\,\varphi_i, \qquad \varphi = c\,(-\log H)^{\mathrm{sign}}

    Chen et al. 2024 (arXiv:2405.14953), with one factor on h, as its public code has it: H is the reference's
    next-token entropy over log V, averaged along each answer and then over the two. `sign=1` is as published: the
    sign of the derivation's entropy term in the *inverse* form. `sign=-1` is the control in which uncertain pairs get
    the larger beta. H is held within 0.001 and 0.999,
    where :math:`-\log H` would be infinite or 0.

    The paper estimates a property of the prompt by H, but H is taken along the data's answers: beta depends on them.

    Args:
        beta0: the beta at :math:`\varphi = 1`.
        c: such that the mean of :math:`\varphi` over the data is 1: see `with_mean`.
        sign: 1 or -1.

    Raises:
        ValueError: `beta0` or `c` is not a positive finite number, or another sign; in use, an `answer_entropy` that
            is missing, not (B,), or outside 0 to 1.
    """

    form = "standard"
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
        """The rule whose mean beta over the data is beta0.

        Args:
            beta0: the mean.
            answer_entropy: (N,) of all pairs, as `Observation.answer_entropy`.
            sign: 1 or -1.

        Raises:
            ValueError: `answer_entropy` is not (N,), or outside 0 to 1; another sign, or a beta0 that is not positive.
        """
        entropy = _rows("answer_entropy", answer_entropy, len(answer_entropy)).double()
        return cls(beta0, c=1 / cls(1.0, c=1.0, sign=sign)._phi(entropy).mean().item(), sign=sign)

    def forward(self, observation: Observation) -> RuleOutput:
        return RuleOutput(
            self.beta0 * self._phi(_rows("answer_entropy", observation.answer_entropy, len(observation.x)))
        )

    def _phi(self, entropy: Tensor) -> Tensor:
        slack = 1e-4  # a sum over a vocabulary in float32 may round past log V
        if entropy.min() < -slack or entropy.max() > 1 + slack:
            raise ValueError(
                f"answer_entropy: got {entropy.min():.4g} to {entropy.max():.4g}, expected 0 to 1; divide nats per "
                "token by the log of the vocabulary's size"
            )
        return self.c * (-entropy.clamp(0.001, 0.999).log()) ** self.sign


class LSC(Rule):
    r"""LSC-DPO: one beta, steered so that the mean margin :math:`\beta\bar h` stays at a target.

    .. math:: \beta \leftarrow \beta\,\exp(-\eta\,(\beta\,\mathrm{mean}(h) - z^*))

    LSC-DPO (arXiv:2610.07592). beta stays at beta0 until the mean of :math:`\sigma(-\beta h)` has first fallen to
    `start`; the new beta holds from the next step on. As it sees h, its beta depends on the answers.

    Args:
        beta0: where it starts; held within a factor of 1000 of it.
        eta: η, the gain.
        target: z*, the mean margin to hold.
        start: the mean of σ(-βh) at which it sets in; it is a half while the policy is the reference.

    Raises:
        ValueError: an argument outside its range; in use, an `h` that is not (B,) and finite.
    """

    form = "standard"
    settings = ("beta0", "eta", "target", "start")
    current: Tensor
    started: Tensor

    def __init__(self, beta0: float, *, eta: float = 0.1, target: float = 0.4, start: float = 0.4) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        require_positive("eta", eta)
        require_positive("target", target)
        require("start", start, 0 < start <= 1, "a number above 0, at most 1")
        self.beta0, self.eta, self.target, self.start = beta0, eta, target, start
        self.register_buffer("current", torch.tensor(float(beta0)))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, observation: Observation) -> RuleOutput:
        h = _rows("h", observation.h, len(observation.x))
        beta = self.current.to(h.dtype).expand(len(h)).clone()
        if self.training:
            self.started |= torch.sigmoid(-beta * h).mean() <= self.start
            if self.started:
                moved = self.current * torch.exp(-self.eta * (self.current * h.mean() - self.target))
                self.current.copy_(_hold(moved, self.beta0))
        return RuleOutput(beta)


class DualKL(Rule):
    r"""Dual control of the KL divergence: beta rises where the KL is over its budget and falls where it is under.

    .. math:: \beta \leftarrow \beta\,\Big(1 + \frac{n}{N}\,\mathrm{clip}(\frac{KL}{\varepsilon} - 1,\ -0.2,\ 0.2)\Big)

    The multiplier of the derivation's §1 and §2, found while training, by the controller of Ziegler et al. 2019
    (arXiv:1909.08593, §2.2), whose gain of 0.1 a step is N = 10 here. n is the number of steps between two
    measurements; the new beta holds from the next step on.

    Args:
        beta0: where it starts; held within a factor of 1000 of it.
        target: ε, the budget in nats, of each task or of all.
        tasks: a beta of its own for each of them; None has one for all, by the mean of the tasks' KL.
        every: n, steps between two measurements of the KL.
        horizon: N, in steps.

    Raises:
        ValueError: an argument outside its range, or n/N of 5 and more, at which beta would reach 0; in use, a task
            or a measured KL that is missing or not finite.
    """

    form = "standard"
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
        """(B,) where each row's beta is."""
        if self.tasks is None:
            return torch.zeros(batch, dtype=torch.int64, device=self.current.device)
        return task_index(task, batch, self.tasks).to(self.current.device)

    def _measured(self, kl: Mapping[str, float]) -> Tensor:
        """The KL that each beta answers for."""
        names = self.tasks or tuple(kl)
        missing = [name for name in names if not math.isfinite(kl.get(name, math.nan))]
        if missing or not names:
            raise ValueError(f"kl: got {dict(kl)}, expected a finite KL for {missing or 'at least one task'}")
        values = self.current.new_tensor([kl[name] for name in names])
        return values if self.tasks else values.mean(dim=0, keepdim=True)


class RandomBeta(Rule):
    r"""The control with no meaning: a log-normal beta, drawn once for each prompt and the same ever after.

    .. math:: \beta(x) = \mathrm{mean}\cdot e^{\mathrm{spread}\,z(x) - \mathrm{spread}^2/2}, \qquad
        z(x) \sim N(0, 1)

    z(x) comes from a hash of the prompt's features, so it is alike in every run and on every machine.

    Args:
        mean: the mean of beta over prompts.
        spread: the standard deviation of log beta over prompts.
        seed: another seed, another draw.

    Raises:
        ValueError: `mean` is not a positive finite number, `spread` not a finite one, at least 0, or `seed` not an
            integer, at least 0; in use, an `x` that is not floating (B, D) and finite.
    """

    settings = ("mean", "spread", "seed")

    def __init__(self, mean: float, *, spread: float, seed: int = 0) -> None:
        super().__init__()
        require_positive("mean", mean)
        require("spread", spread, 0 <= spread < math.inf, "a finite number, at least 0")
        require("seed", seed, isinstance(seed, int) and seed >= 0, "an integer, at least 0")
        self.mean, self.spread, self.seed = mean, spread, seed

    def forward(self, observation: Observation) -> RuleOutput:
        # 52 bits and a half: the quantile is never taken at 0 or 1
        uniform = [((bits >> 11) + 0.5) / 2**52 for bits in _hashes(observation.x, self.seed)]
        z = torch.tensor([NormalDist().inv_cdf(u) for u in uniform], dtype=torch.float64)
        beta = self.mean * torch.exp(self.spread * z - self.spread**2 / 2)
        return RuleOutput(beta.to(observation.x.device, torch.promote_types(observation.x.dtype, torch.float32)))


class LookupBeta(Rule):
    """A fixed table from prompts to beta, found by their features: another rule's beta, frozen or `shuffled`.

    Args:
        x: (N, D) features of the prompts; a prompt may be there several times.
        beta: (N,) positive; alike (to one part in 10⁴) where the prompt is.

    Raises:
        ValueError: `x` is not floating (N, D) and finite, or `beta` not (N,), positive and finite; one prompt with
            two betas; in use, a prompt that is not in the table.
    """

    settings = ("digest",)
    keys: Tensor
    values: Tensor

    def __init__(self, x: Tensor, beta: Tensor) -> None:
        super().__init__()
        table = {key: beta[row].item() for key, row in _first_rows(x, beta).items()}
        keys = sorted(table)
        self.register_buffer("keys", torch.tensor(keys))
        self.register_buffer("values", torch.tensor([table[key] for key in keys]))

    @property
    def digest(self) -> str:
        """What `repr` shows of the table: 16 hexadecimal digits of all of it."""
        whole = repr([self.keys.tolist(), self.values.tolist()]).encode()
        return hashlib.blake2b(whole, digest_size=8).hexdigest()

    @classmethod
    def shuffled(cls, x: Tensor, beta: Tensor, task: Sequence[str], *, within_task: bool, seed: int) -> LookupBeta:
        """The same betas over the same prompts, dealt out anew: their distribution stays, their meaning goes.

        Args:
            x: (N, D) as for the class.
            beta: (N,) as for the class.
            task: the task of each row.
            within_task: deal within each task, so that the distribution of beta by task stays too.
            seed: the deal.

        Raises:
            ValueError: as the class, or `task` does not have N entries.
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
    """One finite number a row, in float32 or better, without a gradient."""
    if values is None:
        raise ValueError(f"{name}: got None, expected shape ({batch},): this rule looks at it")
    if values.shape != (batch,) or batch == 0:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected ({batch},), one per row of x, B ≥ 1")
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: not finite in rows {rows_where(~torch.isfinite(values))}, expected finite numbers")
    return values


def _hold(beta: Tensor, beta0: float) -> Tensor:
    return beta.clamp(beta0 / _REACH, beta0 * _REACH)


def _hashes(x: Tensor, seed: int = 0) -> list[int]:
    """63 bits of each row's features, alike in every run; equal features have equal bits."""
    require_features(x)
    # -0.0 equals 0.0 but has other bytes; the sum has none of it
    rows = (x.detach().cpu().float() + 0.0).numpy()
    salt = seed.to_bytes(16, "little")
    bits = (hashlib.blake2b(row.tobytes(), digest_size=8, salt=salt).digest() for row in rows)
    return [int.from_bytes(eight, "little") >> 1 for eight in bits]


def _first_rows(x: Tensor, beta: Tensor) -> dict[int, int]:
    """Each prompt's hash, and the first row that it is in."""
    keys = _hashes(x)
    beta = _rows("beta", beta, len(x))
    if not (beta > 0).all():
        raise ValueError(f"beta: not positive in rows {rows_where(beta <= 0)}, expected > 0")
    first: dict[int, int] = {}
    for row, key in enumerate(keys):
        before = first.setdefault(key, row)
        # a network rounds the same prompt differently in different batches
        if not math.isclose(beta[row], beta[before], rel_tol=1e-4):
            raise ValueError(f"beta: rows {before} and {row} are one prompt with two betas, expected one beta a prompt")
    return first
