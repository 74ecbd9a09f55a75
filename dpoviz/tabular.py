r"""The exact world: finitely many prompts and answers, policies and rewards as tables.

Each quantity of the derivation has a closed form here, and each sentence about beta can be computed. Rows are
prompts x (X of them), columns are answers y (Y of them). Policies are tables of log-probabilities, each row
normalised; :math:`\pi_{ref}` gives every answer a probability above 0. Tensors are float64 on the CPU, and
refused otherwise: a float32 table hides in its rounding what is to be checked here. Expectations over prompts
are weighted by `prompt_probs` (X,), the derivation's input distribution d; None weighs all prompts alike.

beta is one positive number for all prompts, or (X,), one for each. (X, 1) is refused: it would broadcast.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize
from torch import Tensor

from dpoviz.forms import Form, scale
from dpoviz.validation import rows_where

# rounding of a float64 log_softmax is 1e-15; rows normalised in float32 miss by 1e-7
_NORMALISED = 1e-9


def _require_table(name: str, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Refuse anything but a float64 table without nan, of the shape expected; None takes any (X, Y)."""
    if not isinstance(values, Tensor) or values.dtype != torch.float64:
        got = f"a {values.dtype} tensor" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name}: got {got}, expected a torch.float64 tensor")
    if (shape is None and (values.ndim != 2 or 0 in values.shape)) or (shape is not None and values.shape != shape):
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected {shape or '(X, Y), neither of them 0'}")
    if torch.isnan(values).any():
        raise ValueError(f"{name}: nan in rows {rows_where(torch.isnan(values))}, expected numbers")


def _require_finite(name: str, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
    _require_table(name, values, shape)
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: not finite in rows {rows_where(~torch.isfinite(values))}, expected finite numbers")


def _require_logps(name: str, logps: Tensor, shape: tuple[int, ...] | None = None, *, support: bool = True) -> None:
    """Refuse rows that are not normalised; with `support`, those with a probability of 0 too."""
    (_require_finite if support else _require_table)(name, logps, shape)
    mass = logps.detach().logsumexp(1)
    wrong = ~(mass.abs() <= _NORMALISED)
    if wrong.any():
        raise ValueError(
            f"{name}: not normalised in rows {rows_where(wrong)}, expected log-probabilities; "
            "torch.log_softmax(logits, 1) makes them"
        )


def _require_rewards(ref_logps: Tensor, rewards: Tensor) -> None:
    _require_logps("ref_logps", ref_logps)
    _require_finite("rewards", rewards, tuple(ref_logps.shape))


def _per_prompt(name: str, value: float | Tensor, prompts: int, *, also: tuple[float, ...] = ()) -> Tensor:
    """A positive finite number, or (X,) of them, as (X,); the values `also` are taken as well."""
    if isinstance(value, Tensor):
        _require_table(name, value, (prompts,))
        values = value
    elif isinstance(value, Real) and not isinstance(value, bool):
        values = torch.full((prompts,), float(value), dtype=torch.float64)
    else:
        raise ValueError(f"{name}: got {value!r}, expected a number or a float64 tensor of shape ({prompts},)")
    good = (values > 0) & torch.isfinite(values)
    for limit in also:
        good = good | (values == limit)
    if not good.all():
        allowed = "".join(f" or {limit}" for limit in also)
        raise ValueError(
            f"{name}: got {values[~good].tolist()} in rows {rows_where(~good)}, "
            f"expected positive finite numbers{allowed}"
        )
    return values


def _prompt_weights(prompt_probs: Tensor | None, prompts: int) -> Tensor:
    if prompt_probs is None:
        return torch.full((prompts,), 1 / prompts, dtype=torch.float64)
    _require_finite("prompt_probs", prompt_probs, (prompts,))
    if (prompt_probs < 0).any() or abs(float(prompt_probs.sum()) - 1) > _NORMALISED:
        raise ValueError(f"prompt_probs: got {prompt_probs.tolist()}, expected probabilities that sum to 1")
    return prompt_probs


# -- the constrained problem and its solution (the derivation, §1-3) ------------------------------------------


def _tilt(rewards: Tensor, beta: Tensor) -> Tensor:
    """(r − max r)/beta (X, Y): 0 at a prompt's best answers for any beta, 0 and inf included."""
    best = rewards.amax(1, keepdim=True)
    # where beta is 0 the quotient is -inf, and 0/0 at the best answers
    return torch.where(rewards == best, 0.0, (rewards - best) / beta[:, None])


def _log_mean_exp(ref_logps: Tensor, tilt: Tensor) -> Tensor:
    r""":math:`\log\sum_y \pi_{ref}(y)\exp(tilt(y))` (X,), for a tilt of at most 0."""
    # for a large beta the sum is nearly 1, and beta times the rounding of its log would be large
    near = torch.log1p((ref_logps.exp() * torch.expm1(tilt)).sum(1))
    return torch.where(tilt.amin(1) > -1, near, torch.logsumexp(ref_logps + tilt, 1))


def optimal_policy(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    r"""The policy with the best reward at the price beta per nat of KL (the derivation, §3.1).

    .. math:: \pi^*(y|x) = \pi_{ref}(y|x) \exp(r(x, y)/\beta(x)) / Z(x)

    The only minimiser of `kl_regularized_objective` while beta > 0. The limits are taken as well: inf gives
    the reference, 0 gives the reference restricted to the answers of the highest reward (exact ties
    together), which are the policies that `solve_beta` means by those multipliers.

    Args:
        ref_logps: (X, Y) :math:`\log\pi_{ref}(y|x)`, nats.
        rewards: (X, Y).
        beta: a number or (X,), from 0 to inf, both included; in units of the reward per nat.

    Returns:
        (X, Y) :math:`\log\pi^*(y|x)`, nats; -inf where the probability is 0.

    Raises:
        ValueError: tables that are not float64, finite and of one shape; rows of `ref_logps` that are not
            normalised; a negative beta or one of another shape.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps), also=(0.0, math.inf))
    return torch.log_softmax(ref_logps + _tilt(rewards, beta), 1)


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    r"""What normalises the optimal policy (the derivation, §3.1).

    .. math:: \log Z(x) = \log \sum_y \pi_{ref}(y|x) \exp(r(x, y)/\beta(x))

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        beta: a positive number or (X,).

    Returns:
        (X,) nats.

    Raises:
        ValueError: as `optimal_policy`; a beta of 0 or inf.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps))
    return rewards.amax(1) / beta + _log_mean_exp(ref_logps, _tilt(rewards, beta))


def kl(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""How far a policy is from the reference, prompt by prompt (the derivation, §1).

    .. math:: D_{KL}(\pi(\cdot|x) \| \pi_{ref}(\cdot|x)) = \sum_y \pi(y|x) \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    Args:
        policy_logps: (X, Y), nats; -inf is a probability of 0, and adds nothing.
        ref_logps: (X, Y), nats.

    Returns:
        (X,) nats, differentiable.

    Raises:
        ValueError: tables that are not float64 and of one shape, or rows that are not normalised.
    """
    _require_logps("ref_logps", ref_logps)
    _require_logps("policy_logps", policy_logps, tuple(ref_logps.shape), support=False)
    # masked before the product: 0 times -inf is nan, in the value and in the gradient
    logratios = (policy_logps - ref_logps).masked_fill(policy_logps == -math.inf, 0.0)
    return (policy_logps.exp() * logratios).sum(1)


def kl_regularized_objective(
    policy_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    beta: float | Tensor,
    *,
    prompt_probs: Tensor | None = None,
) -> Tensor:
    r"""The cost that the optimal policy minimises: minus the Lagrangian of §2, but for the constant beta·ε.

    .. math:: E_{x \sim d}\bigl[-E_{y \sim \pi}[r(x, y)] + \beta(x) D_{KL}(\pi \| \pi_{ref})\bigr]

    The derivation prints it in §3.2 under the name of the DPO loss, which it is not: it needs the reward, and
    answers of the policy; the DPO loss needs neither.

    Args:
        policy_logps: (X, Y), nats; -inf is a probability of 0.
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        beta: a positive number or (X,).
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        A scalar in units of the reward, differentiable. Its least value is :math:`-E_x[\beta\log Z]`.

    Raises:
        ValueError: as `optimal_policy` and `kl`; a beta of 0 or inf; `prompt_probs` that are no distribution.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps))
    cost = beta * kl(policy_logps, ref_logps) - (policy_logps.exp() * rewards).sum(1)  # (X,)
    return (_prompt_weights(prompt_probs, len(ref_logps)) * cost).sum()


def dual(
    ref_logps: Tensor,
    rewards: Tensor,
    beta: float | Tensor,
    epsilon: float | Tensor,
    *,
    prompt_probs: Tensor | None = None,
) -> Tensor:
    r"""An upper bound on the reward within the KL budget, one for each multiplier (the derivation, §2).

    .. math:: g(\beta) = \max_\pi L(\pi, \beta) = E_x\bigl[\beta \log Z(x) + \beta\epsilon\bigr]

    Convex in beta, with the slope :math:`\epsilon - E_x[D_{KL}(\pi^*_\beta\|\pi_{ref})]`. With (X,) multipliers
    and budgets it is the dual of the problem with one constraint for each prompt.

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        beta: a number or (X,), finite and at least 0.
        epsilon: the budget, nats: a number or (X,), finite and at least 0.
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        A scalar in units of the reward.

    Raises:
        ValueError: as `optimal_policy`; an infinite beta; a negative or infinite budget; `prompt_probs` that
            are no distribution.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps), also=(0.0,))
    epsilon = _per_prompt("epsilon", epsilon, len(ref_logps), also=(0.0,))
    # beta·log Z, whose limit at 0 is the highest reward
    value = rewards.amax(1) + beta * (_log_mean_exp(ref_logps, _tilt(rewards, beta)) + epsilon)
    return (_prompt_weights(prompt_probs, len(ref_logps)) * value).sum()


def _kl_of_tilt(ref_logps: Tensor, gaps: Tensor, inverse_beta: float) -> Tensor:
    r"""KL of :math:`\pi_{ref}\exp(gaps/\beta)/Z` to the reference (X,), to relative precision when tiny.

    With v the tilt, centred so that :math:`E_{ref}[v] = 0`, it is :math:`E_\pi[v] - \log E_{ref}[e^v]`. Both
    parts are of the order v², and the linear parts, which would drown them in rounding, are left out.
    """
    tilt = inverse_beta * gaps
    probs = ref_logps.exp()
    v = tilt - (probs * tilt).sum(1, keepdim=True)
    series = v.square() / 2 * (1 + v / 3 * (1 + v / 4 * (1 + v / 5 * (1 + v / 6))))
    exp_less_linear = torch.where(v.abs() < 1e-2, series, torch.expm1(v) - v)  # e^v − 1 − v
    excess = (probs * exp_less_linear).sum(1)  # E_ref[e^v] − 1
    near = (probs * v * torch.expm1(v)).sum(1) / (1 + excess) - torch.log1p(excess)
    logps = ref_logps + tilt
    far = (torch.softmax(logps, 1) * tilt).sum(1) - torch.logsumexp(logps, 1)
    return torch.where(tilt.amin(1) > -1, near, far)


def _solve_inverse_beta(kl_at: Callable[[float], float], epsilon: float) -> float:
    """The 1/beta at which `kl_at`, which rises from 0 to above epsilon > 0, is epsilon."""
    high = 1.0
    while kl_at(high) < epsilon:
        high *= 10
    low = high / 10
    while kl_at(low) > epsilon:
        high, low = low, low / 10
    tight = {"xtol": sys.float_info.min, "rtol": 4 * sys.float_info.epsilon}
    return brentq(lambda t: kl_at(t) - epsilon, low, high, **tight)


def _multiplier(ref_logps: Tensor, rewards: Tensor, epsilon: float, prompt_probs: Tensor) -> float:
    gaps = rewards - rewards.amax(1, keepdim=True)
    greedy_kl = -torch.logsumexp(ref_logps.masked_fill(gaps < 0, -math.inf), 1)  # (X,)
    greedy_kl = greedy_kl.masked_fill((gaps == 0).all(1), 0.0)  # a rounding above 0 would have a price
    if epsilon >= float((prompt_probs * greedy_kl).sum()):
        return 0.0
    if epsilon == 0:
        return math.inf

    def mean_kl(inverse_beta: float) -> float:
        return float((prompt_probs * _kl_of_tilt(ref_logps, gaps, inverse_beta)).sum())

    return 1 / _solve_inverse_beta(mean_kl, epsilon)


def solve_beta(
    ref_logps: Tensor,
    rewards: Tensor,
    epsilon: float | Tensor,
    *,
    per_prompt: bool = False,
    prompt_probs: Tensor | None = None,
) -> float | Tensor:
    r"""The multiplier of a KL budget: the price of KL at which the best policy spends it (the derivation, §1-2).

    One budget for all, :math:`E_x[D_{KL}] \le \epsilon`, has one multiplier. One budget for each prompt,
    :math:`D_{KL}(\pi(\cdot|x)\|\pi_{ref}(\cdot|x)) \le \epsilon(x)`, has a multiplier for each prompt:
    :math:`L = E_x[E_\pi[r] - \beta(x)(D_{KL} - \epsilon(x))]` is §2 prompt by prompt, and this
    :math:`\beta(x)` is the derivation's input-dependent beta. Prompts do not mix in it, so that `prompt_probs`
    plays no part.

    For :math:`0 < \epsilon <` the KL of the greedy policy (the reference restricted to the best answers) the
    multiplier is positive and unique, because :math:`D_{KL}(\pi^*_\beta)` falls strictly from that KL to 0 as
    beta grows; it is where `dual` is least. A larger budget is not spent, and its multiplier is 0, as
    is that of any budget where all answers earn alike. For :math:`\epsilon = 0` no finite multiplier exists (the
    constraint has no interior, and Slater's condition fails): inf.

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y); which answers are best is decided by exact equality.
        epsilon: the budget in nats, finite and at least 0: a number; with `per_prompt` a number or (X,).
        per_prompt: one constraint for each prompt instead of one for their mean.
        prompt_probs: (X,) for the mean, or None for the uniform distribution.

    Returns:
        A float; with `per_prompt` (X,). From 0 to inf, in units of the reward per nat. The optimal policy has
        the KL :math:`\epsilon` to 1e-10 nats.

    Raises:
        ValueError: as `optimal_policy`; a negative or infinite budget; (X,) budgets without `per_prompt`,
            `prompt_probs` with it.
    """
    _require_rewards(ref_logps, rewards)
    prompts = len(ref_logps)
    # the solver takes sums over pi_ref to be exactly 1
    ref_logps = torch.log_softmax(ref_logps.detach(), 1)
    rewards = rewards.detach()
    if not per_prompt:
        if isinstance(epsilon, Tensor):
            raise ValueError("epsilon: got a tensor, expected one number; per_prompt=True takes a budget for each")
        budget = float(_per_prompt("epsilon", epsilon, 1, also=(0.0,)))
        return _multiplier(ref_logps, rewards, budget, _prompt_weights(prompt_probs, prompts))
    if prompt_probs is not None:
        raise ValueError("prompt_probs: got with per_prompt=True, expected None; each prompt has its own budget")
    budgets = _per_prompt("epsilon", epsilon, prompts, also=(0.0,)).tolist()
    alone = torch.ones(1, dtype=torch.float64)
    betas = [_multiplier(ref_logps[i : i + 1], rewards[i : i + 1], budgets[i], alone) for i in range(prompts)]
    return torch.tensor(betas, dtype=torch.float64)


# -- preferences and the loss (the derivation, §4-5) ----------------------------------------------------------


def implicit_reward(policy_logps: Tensor, ref_logps: Tensor, beta: float | Tensor) -> Tensor:
    r"""The reward that a policy is optimal for, up to a constant per prompt (the derivation, §3.1 solved for r).

    .. math:: \beta(x) \log\frac{\pi(y|x)}{\pi_{ref}(y|x)} = r(x, y) - \beta(x) \log Z(x)

    Of two answers to one prompt the last term cancels, because beta and Z depend on x alone:
    :math:`r_w - r_l = \beta h` (Rafailov et al. 2023, arXiv:2305.18290, eq. 5). §4.1 of the derivation prints
    it without beta and without the reference, and there it does not hold.

    Args:
        policy_logps: (X, Y), nats, finite.
        ref_logps: (X, Y), nats.
        beta: a positive number or (X,): the price of KL, in both forms of the loss.

    Returns:
        (X, Y) in units of the reward.

    Raises:
        ValueError: tables that are not float64, finite, normalised and of one shape; a beta that is not
            positive and finite, or of another shape.
    """
    _require_logps("ref_logps", ref_logps)
    _require_logps("policy_logps", policy_logps, tuple(ref_logps.shape))
    beta = _per_prompt("beta", beta, len(ref_logps))
    return beta[:, None] * (policy_logps - ref_logps)


def bradley_terry(rewards: Tensor) -> Tensor:
    r"""Preferences that follow a reward: the logit of the probability that y beats y'.

    .. math:: P(y \succ y'|x) = \sigma(r(x, y) - r(x, y'))

    For labels of another reliability multiply the rewards: a factor above 1 makes them surer.

    Args:
        rewards: (X, Y).

    Returns:
        (X, Y, Y) logits, [x, y, y'], antisymmetric. Adding f(x) to the reward changes nothing.

    Raises:
        ValueError: `rewards` is not a finite float64 (X, Y).
    """
    _require_finite("rewards", rewards)
    return rewards[:, :, None] - rewards[:, None, :]


def _require_preferences(ref_logps: Tensor, preference_logits: Tensor) -> None:
    _require_logps("ref_logps", ref_logps)
    prompts, answers = ref_logps.shape
    if answers < 2:
        raise ValueError("ref_logps: got 1 answer per prompt, expected at least 2, to compare")
    _require_finite("preference_logits", preference_logits, (prompts, answers, answers))
    # y beats y' as often as y' is beaten by y, up to the rounding of differences
    wrong = (preference_logits + preference_logits.mT).abs() > 1e-9 * (1 + preference_logits.abs())
    if wrong.any():
        raise ValueError(
            f"preference_logits: not antisymmetric in rows {rows_where(wrong)}, "
            "expected logit P(y beats y') = -logit P(y' beats y)"
        )


def _pair_logps(ref_logps: Tensor, preference_logits: Tensor) -> Tensor:
    r"""Log-probability (X, Y, Y) that a labelled pair of a prompt is (chosen, rejected); -inf on the diagonal.

    Both answers are drawn from :math:`\pi_{ref}`, a pair of equal ones is drawn again, and the label decides:
    :math:`2\,w(y, y')\,P(y \succ y')`, w being the probability of the pair in this order.
    """
    same = torch.eye(ref_logps.shape[1], dtype=torch.bool)
    both = (ref_logps[:, :, None] + ref_logps[:, None, :]).masked_fill(same, -math.inf)
    return both - both.logsumexp((1, 2), keepdim=True) + F.logsigmoid(preference_logits) + math.log(2)


class _World(NamedTuple):
    """What the loss and its gradients are made of, checked.

    Attributes:
        probs: (X, Y, Y) of prompt, chosen and rejected together; sums to 1.
        h: (X, Y, Y).
        beta: (X,).
        scale: (X,) what multiplies h.
    """

    probs: Tensor
    h: Tensor
    beta: Tensor
    scale: Tensor


def _world(
    policy_logps: Tensor,
    ref_logps: Tensor,
    preference_logits: Tensor,
    beta: float | Tensor,
    form: Form,
    prompt_probs: Tensor | None,
) -> _World:
    _require_preferences(ref_logps, preference_logits)
    _require_logps("policy_logps", policy_logps, tuple(ref_logps.shape))
    prompts = len(ref_logps)
    beta = _per_prompt("beta", beta, prompts)
    s = scale(beta, form)
    ref_logps = ref_logps.detach()
    weights = _prompt_weights(prompt_probs, prompts)
    probs = weights[:, None, None] * _pair_logps(ref_logps, preference_logits).exp()
    logratios = policy_logps - ref_logps
    return _World(probs, logratios[:, :, None] - logratios[:, None, :], beta, s)


def population_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    preference_logits: Tensor,
    beta: float | Tensor,
    form: Form,
    *,
    prompt_probs: Tensor | None = None,
) -> Tensor:
    r"""The DPO loss of infinitely many pairs (the derivation, §4.2 and §5).

    .. math:: L = E_{x \sim d}\, E_{y, y' \sim \pi_{ref},\, y \ne y'}
        \bigl[-p \log\sigma(s h) - (1 - p) \log\sigma(-s h)\bigr], \qquad p = P(y \succ y'|x)

    with :math:`h = \log\frac{\pi(y)}{\pi_{ref}(y)} - \log\frac{\pi(y')}{\pi_{ref}(y')}` and s = 1/beta(x) in
    the "inverse" form, which the derivation prints, or s = beta(x) in the "standard" one (Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7). The two answers are drawn independently from the reference on condition that they
    differ: equal ones have nothing to compare, and would add log 2 whatever the policy.

    The loss has one minimiser among policies, as every pair occurs. Where the preferences are Bradley-Terry,
    that one has :math:`s h = \mathrm{logit}\,p` for every pair at once; for other preferences (y beats y'
    beats y'' beats y, say) no policy has. beta is not determined by it: the least value is the same for every
    beta.

    Args:
        policy_logps: (X, Y), nats, finite.
        ref_logps: (X, Y), nats; carries no gradient.
        preference_logits: (X, Y, Y), [x, y, y'] the logit of the probability that y beats y'; antisymmetric,
            finite.
        beta: a positive number or (X,); a tensor receives the gradient.
        form: "inverse" or "standard"; there is no default.
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        A scalar in nats, differentiable.

    Raises:
        ValueError: tables that are not float64, finite and of these shapes; rows of log-probabilities that
            are not normalised; fewer than two answers; preferences that are not antisymmetric; a beta that is
            not positive and finite, or of another shape; an unknown form; `prompt_probs` that are no
            distribution.
    """
    world = _world(policy_logps, ref_logps, preference_logits, beta, form, prompt_probs)
    return -(world.probs * F.logsigmoid(world.scale[:, None, None] * world.h)).sum()


def population_gradient_on_policy(
    policy_logps: Tensor,
    ref_logps: Tensor,
    preference_logits: Tensor,
    beta: float | Tensor,
    form: Form,
    *,
    prompt_probs: Tensor | None = None,
) -> Tensor:
    r"""The gradient of `population_loss` on the logits of the policy, in closed form.

    .. math:: \frac{\partial L}{\partial \theta(x, y)}
        = -E\bigl[s\,\sigma(\hat r_l - \hat r_w)\,(1[y = y_w] - 1[y = y_l])\bigr],
        \qquad \hat r = s\log\frac{\pi}{\pi_{ref}}

    for :math:`\pi = \mathrm{softmax}(\theta)`: the weight of Rafailov et al. 2023 (arXiv:2305.18290, §4), large
    where the pair is ranked wrongly.

    Args:
        policy_logps: as `population_loss`.
        ref_logps: as `population_loss`.
        preference_logits: as `population_loss`.
        beta: as `population_loss`.
        form: as `population_loss`.
        prompt_probs: as `population_loss`.

    Returns:
        (X, Y), detached; each row sums to 0.

    Raises:
        ValueError: as `population_loss`.
    """
    with torch.no_grad():
        world = _world(policy_logps, ref_logps, preference_logits, beta, form, prompt_probs)
        scale = world.scale[:, None, None]
        push = world.probs * scale * torch.sigmoid(-scale * world.h)  # (X, chosen, rejected)
        return push.sum(1) - push.sum(2)


def population_gradient_on_beta(
    policy_logps: Tensor,
    ref_logps: Tensor,
    preference_logits: Tensor,
    beta: float | Tensor,
    form: Form,
    *,
    prompt_probs: Tensor | None = None,
) -> Tensor:
    r"""The gradient of `population_loss` on beta(x), in closed form.

    .. math:: \frac{\partial L}{\partial \beta(x)} = -d(x)\,s'(\beta)\,E[\sigma(-s h)\,h \mid x]
        = d(x)\,s'(\beta)\,E[(\sigma(s h) - p)\,h \mid x], \qquad s' = 1 \text{ or } -1/\beta^2

    with h of (chosen, rejected) in the first and of (y, y') in the second. A pair ranked rightly (h > 0) pulls
    s up, one ranked wrongly pulls it down.

    Args:
        policy_logps: as `population_loss`.
        ref_logps: as `population_loss`.
        preference_logits: as `population_loss`.
        beta: as `population_loss`.
        form: as `population_loss`.
        prompt_probs: as `population_loss`.

    Returns:
        (X,), detached. Where beta is one number, the derivative in it is their sum.

    Raises:
        ValueError: as `population_loss`.
    """
    with torch.no_grad():
        world = _world(policy_logps, ref_logps, preference_logits, beta, form, prompt_probs)
        on_scale = -(world.probs * torch.sigmoid(-world.scale[:, None, None] * world.h) * world.h).sum((1, 2))
        return -on_scale / world.beta.square() if form == "inverse" else on_scale


class Pairs(NamedTuple):
    """Labelled pairs as `sample_pairs` draws them, indices into the tables.

    Attributes:
        prompt: (B,) int64.
        chosen: (B,) int64, the answer preferred.
        rejected: (B,) int64, another answer to the same prompt.
    """

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


def sample_pairs(
    ref_logps: Tensor,
    preference_logits: Tensor,
    count: int,
    *,
    generator: torch.Generator,
    prompt_probs: Tensor | None = None,
) -> Pairs:
    r"""Draw the pairs over which `population_loss` is the expectation, with hard labels.

    A prompt from `prompt_probs`, two different answers from :math:`\pi_{ref}(\cdot|x)`, and a label by the
    preference.

    Args:
        ref_logps: (X, Y), nats.
        preference_logits: (X, Y, Y) logits, antisymmetric, as in `population_loss`.
        count: how many pairs, at least 1.
        generator: makes the draw repeatable.
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        `count` pairs, independent of each other.

    Raises:
        ValueError: as `population_loss`; a `count` that is no positive integer.
    """
    _require_preferences(ref_logps, preference_logits)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: got {count!r}, expected a positive integer")
    weights = _prompt_weights(prompt_probs, len(ref_logps))
    probs = weights[:, None, None] * _pair_logps(ref_logps, preference_logits).exp()
    drawn = torch.multinomial(probs.flatten(), count, replacement=True, generator=generator)
    return Pairs(*torch.unravel_index(drawn, probs.shape))


# -- re-tilting: which beta(x) is right, and how much could any beta(x) gain ----------------------------------


def _tilt_factors(name: str, value: float | Tensor, prompts: int) -> Tensor:
    """A finite number, or (X,) of them, of any sign, as (X,)."""
    if isinstance(value, Tensor):
        _require_finite(name, value, (prompts,))
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number or a float64 tensor of shape ({prompts},)")
    return torch.full((prompts,), float(value), dtype=torch.float64)


def tilted_policy(ref_logps: Tensor, h: Tensor, a: float | Tensor) -> Tensor:
    """Return the policy that goes a(x) times as far from the reference as h says.

        π_a(y|x) = π_ref(y|x)·exp(a(x)·h(x, y)) / Z_a(x)

    With h = log π/π_ref of a trained policy, a = 1 is that policy and a = 0 the reference. With h = ẑ, the logits
    that a policy fits to its labels, it is the policy of a converged run in the standard form with beta = 1/a:
    s·h = ẑ whatever s is. With h = r it is `optimal_policy` at beta = 1/a.

    Args:
        ref_logps: (X, Y) log π_ref(y|x), nats.
        h: (X, Y) the direction, nats; a constant per prompt changes nothing.
        a: a finite number or (X,), of any sign; no positive beta gives a negative one.

    Returns:
        (X, Y) log π_a(y|x), nats.

    Raises:
        ValueError: tables that are not float64, finite and of one shape; rows of `ref_logps` that are not
            normalised; an `a` that is not finite or has another shape.
    """
    _require_logps("ref_logps", ref_logps)
    _require_finite("h", h, tuple(ref_logps.shape))
    return torch.log_softmax(ref_logps + _tilt_factors("a", a, len(ref_logps))[:, None] * h, 1)


class TiltMoments(NamedTuple):
    """Moments of a tilted policy, one number per prompt.

    Attributes:
        reward: (X,) E[r].
        kl: (X,) KL(π_a‖π_ref), nats.
        covariance: (X,) Cov(r, h), units of the reward times nats.
        variance: (X,) Var(h), nats².
    """

    reward: Tensor
    kl: Tensor
    covariance: Tensor
    variance: Tensor

    @property
    def slope(self) -> Tensor:
        """(X,) b = Cov(r, h)/Var(h), units of the reward per nat; nan where h does not vary."""
        return self.covariance / self.variance


def tilt_moments(ref_logps: Tensor, h: Tensor, rewards: Tensor, a: float | Tensor) -> TiltMoments:
    """Return the reward and KL of a tilted policy, and how both change with a.

        ∂E[r]/∂a = Cov_a(r, h),    ∂KL(π_a‖π_ref)/∂a = a·Var_a(h)

    Both are exact, per prompt, for any h and any a. So one more nat of KL earns b_a(x)/a(x) with the slope
    b_a = Cov_a/Var_a, and where the mean reward is best for its mean KL that quotient is one price λ for all
    prompts: a(x) = b_a(x)/λ. This is exact with the moments taken under the best policy itself, and a condition
    that the best policy meets, not one that only it meets. With moments under the reference it holds to first order
    in a: b_a = b_0 + a·(κ(r, h, h) − b_0·κ(h, h, h))/Var(h) + O(a²), κ the third joint cumulants.

    Args:
        ref_logps: (X, Y), nats.
        h: (X, Y), nats.
        rewards: (X, Y).
        a: a finite number or (X,).

    Raises:
        ValueError: as `tilted_policy`; `rewards` of another kind.
    """
    _require_rewards(ref_logps, rewards)
    policy = tilted_policy(ref_logps, h, a)
    a = _tilt_factors("a", a, len(ref_logps))
    tilt = a[:, None] * h
    return _moments(ref_logps, policy.exp(), h, rewards, tilt)


def _moments(ref_logps: Tensor, probs: Tensor, h: Tensor, rewards: Tensor, tilt: Tensor) -> TiltMoments:
    reward = (probs * rewards).sum(1)
    centred = h - (probs * h).sum(1, keepdim=True)
    covariance = (probs * centred * (rewards - reward[:, None])).sum(1)
    variance = (probs * centred.square()).sum(1)
    distance = _kl_of_tilt(ref_logps, tilt - tilt.amax(1, keepdim=True), 1.0)
    return TiltMoments(reward, distance, covariance, variance)


def first_order_beta(ref_logps: Tensor, logits: Tensor, rewards: Tensor, price: float) -> Tensor:
    """Return the beta(x) that is right for fitted logits, to first order in the distance from the reference.

        β*(x) = λ·Var_ref(ẑ|x) / Cov_ref(r, ẑ|x) = λ·σ_ẑ / (ρ·σ_r)

    It is the price over the slope of the reward on ẑ, in the standard form (the inverse form's is its inverse). The
    distance that goes with it is KL* ≈ ρ²σ_r²/(2λ²). With ẑ = r it is λ, exactly.

    Args:
        ref_logps: (X, Y), nats.
        logits: (X, Y) ẑ = s·h of a policy that has fitted its labels.
        rewards: (X, Y).
        price: λ, units of the reward per nat; positive.

    Returns:
        (X,) units of the logits per nat: positive, or inf where ẑ does not rise with the reward, so that the best
        place is the reference.

    Raises:
        ValueError: as `tilt_moments`; a price that is not a positive finite number.
    """
    prices = _per_prompt("price", price, len(ref_logps))
    slope = tilt_moments(ref_logps, logits, rewards, 0.0).slope
    return torch.where(slope > 0, prices / slope.clamp(min=torch.finfo(torch.float64).tiny), math.inf)


class Tilt(NamedTuple):
    """An allocation of KL to prompts, and what it earns.

    Attributes:
        a: (X,) the factors.
        reward: mean reward over prompts.
        kl: mean KL over prompts, nats.
    """

    a: Tensor
    reward: float
    kl: float


class _Tilts:
    """Mean reward and KL as functions of a (X,), and their gradients; the tables are checked once."""

    def __init__(self, ref_logps: Tensor, h: Tensor, rewards: Tensor, prompt_probs: Tensor | None) -> None:
        _require_rewards(ref_logps, rewards)
        _require_finite("h", h, tuple(ref_logps.shape))
        self.weights = _prompt_weights(prompt_probs, len(ref_logps))
        # sums over pi_ref are taken to be exactly 1
        self.tables = torch.log_softmax(ref_logps.detach(), 1), h.detach(), rewards.detach()

    def moments(self, a: Tensor) -> TiltMoments:
        ref_logps, h, rewards = self.tables
        tilt = a[:, None] * h
        return _moments(ref_logps, torch.softmax(ref_logps + tilt, 1), h, rewards, tilt)

    def at(self, a: Tensor) -> Tilt:
        found = self.moments(a)
        return Tilt(a, float(self.weights @ found.reward), float(self.weights @ found.kl))

    def reach(self, direction: Tensor, budget: float) -> Tilt:
        """The multiple of the direction whose mean KL is the budget."""
        ref_logps, h, _ = self.tables
        if not (isinstance(budget, Real) and not isinstance(budget, bool) and 0 < budget < math.inf):
            raise ValueError(f"budget: got {budget!r}, expected a positive finite number of nats")
        tilt = direction[:, None] * h
        gaps = tilt - tilt.amax(1, keepdim=True)
        farthest = -torch.logsumexp(ref_logps.masked_fill(gaps < 0, -math.inf), 1)  # (X,) as the multiple grows
        most = float(self.weights @ farthest)
        if budget >= most:
            raise ValueError(f"budget: got {budget} nats, expected less than {most:.6g}, which no multiple exceeds")
        kl_at = lambda multiple: float(self.weights @ _kl_of_tilt(ref_logps, gaps, multiple))  # noqa: E731
        return self.at(_solve_inverse_beta(kl_at, budget) * direction)


def tilt_to_budget(
    ref_logps: Tensor,
    h: Tensor,
    rewards: Tensor,
    direction: float | Tensor,
    budget: float,
    *,
    prompt_probs: Tensor | None = None,
) -> Tilt:
    """Scale an allocation until its mean KL is the budget, so that allocations can be compared at equal KL.

    The allocation of one beta for all prompts is the direction 1; that of a rule s(x), for a converged policy, is
    1/s(x); that of reward per nat is b(x).

    Args:
        ref_logps: (X, Y), nats.
        h: (X, Y), nats.
        rewards: (X, Y).
        direction: a finite number or (X,), at least 0 and not all 0.
        budget: mean KL, nats; positive, and below what the direction can reach.
        prompt_probs: (X,), or None for the uniform distribution.

    Raises:
        ValueError: as `tilt_moments`; a direction with a negative number or without a positive one; a budget out of
            reach.
    """
    tilts = _Tilts(ref_logps, h, rewards, prompt_probs)
    direction = _tilt_factors("direction", direction, len(ref_logps))
    if (direction < 0).any() or not (direction > 0).any():
        raise ValueError(f"direction: got {direction.tolist()}, expected numbers of at least 0 and not all of them 0")
    return tilts.reach(direction, budget)


def best_tilt(
    ref_logps: Tensor,
    h: Tensor,
    rewards: Tensor,
    budget: float,
    *,
    groups: Tensor | None = None,
    prompt_probs: Tensor | None = None,
) -> Tilt:
    """Return the best allocation of a KL budget by direct optimisation: the oracle of any beta(x).

    It maximises E_x[E_{π_a}[r]] subject to E_x[KL(π_a‖π_ref)] ≤ budget over a ≥ 0 (beta is positive), by sequential
    quadratic programming (scipy's SLSQP) with exact gradients. It knows the true reward and no formula for a. Where
    the reward is not concave in a, it is the best of the optima that two starts lead to.

    Args:
        ref_logps: (X, Y), nats.
        h: (X, Y), nats.
        rewards: (X, Y).
        budget: mean KL, nats; positive, and below what one factor for all can reach.
        groups: (X,) int64, 0 to G − 1: prompts of one number share a factor. None: each prompt has its own.
        prompt_probs: (X,), or None for the uniform distribution.

    Raises:
        ValueError: as `tilt_to_budget`; groups that are not (X,) int64 from 0 without gaps; an optimiser that fails.
    """
    tilts = _Tilts(ref_logps, h, rewards, prompt_probs)
    prompts = len(ref_logps)
    groups = torch.arange(prompts) if groups is None else groups
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64 or groups.shape != (prompts,):
        raise ValueError(f"groups: got {groups!r}, expected an int64 tensor of shape ({prompts},)")
    count = int(groups.max()) + 1
    if not torch.equal(groups.unique(), torch.arange(count)):
        raise ValueError(f"groups: got the numbers {groups.unique().tolist()}, expected 0 to G - 1 without gaps")

    one = tilts.reach(torch.ones(prompts, dtype=torch.float64), budget)
    unit = float(one.a[0])  # variables of the size 1, whatever the budget

    def by_group(values: Tensor) -> np.ndarray:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, groups, tilts.weights * values).numpy()

    near = tilts.moments(torch.zeros(prompts, dtype=torch.float64))
    sizes = by_group(near.variance)
    scale = float(by_group(near.covariance.abs()).sum()) or 1.0  # what a first step could gain

    def factors(x: np.ndarray) -> Tensor:
        return unit * torch.from_numpy(x)[groups]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        found = tilts.moments(factors(x))
        return -float(tilts.weights @ found.reward) / (scale * unit), -by_group(found.covariance) / scale

    def spent(x: np.ndarray) -> float:
        return 1 - float(tilts.weights @ tilts.moments(factors(x)).kl) / budget

    def spent_gradient(x: np.ndarray) -> np.ndarray:
        a = factors(x)
        return -by_group(a * tilts.moments(a).variance) * unit / budget

    slopes = np.divide(by_group(near.covariance), sizes, out=np.zeros(count), where=sizes > 0).clip(min=0)
    starts = [np.ones(count)] + ([slopes / slopes.mean()] if slopes.any() else [])
    found = []
    for start in starts:
        result = minimize(
            loss,
            start,
            jac=True,
            bounds=[(0, None)] * count,
            constraints={"type": "ineq", "fun": spent, "jac": spent_gradient},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        if spent(result.x) > -1e-6:
            found.append(tilts.at(factors(result.x.clip(min=0))))
    if not found:
        raise ValueError(f"budget: got {budget} nats, expected one at which the optimiser converges: {result.message}")
    return max([one, *found], key=lambda tilt: tilt.reward)


# -- worlds with tasks: labels, what is fitted to them, and the way there -------------------------------------


class Task(NamedTuple):
    """A kind of prompts in the exact world.

    Attributes:
        reliability: κ, the labels follow σ(κ·Δr).
        pairs: labelled pairs per prompt.
        spread: τ, standard deviation of the reward over the answers.
        sharpness: standard deviation of the reference's logits; the entropy falls with it, from log Y at 0.
        flips: the probability that a label is flipped, from 0 to below 0.5.
    """

    reliability: float = 2.0
    pairs: int = 16
    spread: float = 1.0
    sharpness: float = 1.0
    flips: float = 0.0


class TaskWorld(NamedTuple):
    """Prompts of several tasks, with labelled pairs.

    Attributes:
        ref_logps: (X, Y), nats.
        rewards: (X, Y), true, in one unit for all tasks.
        preference_logits: (X, Y, Y), flips included.
        wins: (X, Y, Y) how often y was preferred to y' at x.
        task: (X,) int64, the number of the prompt's task.
    """

    ref_logps: Tensor
    rewards: Tensor
    preference_logits: Tensor
    wins: Tensor
    task: Tensor


def sample_tasks(kinds: Sequence[Task], *, prompts: int, answers: int, generator: torch.Generator) -> TaskWorld:
    """Sample a world: normal reference logits and rewards, and labelled pairs by the reliability of each task.

    Args:
        kinds: the tasks.
        prompts: per task.
        answers: Y, at least 2.
        generator: makes the draw repeatable.

    Raises:
        ValueError: no task, a task whose numbers are out of range, fewer than 1 prompt or 2 answers.
    """
    if len(kinds) == 0 or prompts < 1 or answers < 2:
        raise ValueError(
            f"kinds, prompts, answers: got {len(kinds)}, {prompts}, {answers}, expected at least 1, 1 and 2"
        )
    for kind in kinds:
        if not (kind.reliability > 0 and kind.spread > 0 and kind.sharpness >= 0 and 0 <= kind.flips < 0.5):
            raise ValueError(
                f"kinds: got {kind}, expected reliability and spread above 0, sharpness at least 0, flips in [0, 0.5)"
            )
    shape = (len(kinds), prompts, answers)
    normal = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    column = lambda name: torch.tensor([float(getattr(kind, name)) for kind in kinds], dtype=torch.float64)  # noqa: E731
    ref_logps = torch.log_softmax(column("sharpness")[:, None, None] * normal[0], 2).flatten(0, 1)
    rewards = (column("spread")[:, None, None] * normal[1]).flatten(0, 1)
    task = torch.arange(len(kinds)).repeat_interleave(prompts)
    clean = bradley_terry(column("reliability")[task, None] * rewards)
    flips = column("flips")[task, None, None]
    # logit of (1 − f)·σ(z) + f·σ(−z), as log-odds: exact for large z
    kept, turned = torch.log1p(-flips), torch.log(flips)
    logits = torch.logaddexp(kept + clean, turned.expand_as(clean)) - torch.logaddexp(
        kept.expand_as(clean), turned + clean
    )
    counts = torch.tensor([kind.pairs for kind in kinds])[task]
    return TaskWorld(ref_logps, rewards, logits, sample_wins(ref_logps, logits, counts, generator=generator), task)


def sample_wins(
    ref_logps: Tensor, preference_logits: Tensor, pairs: int | Tensor, *, generator: torch.Generator
) -> Tensor:
    """Sample labelled pairs at every prompt, counted by who won.

    Two different answers from π_ref(·|x) and a label by the preference, as in `sample_pairs`, but with a fixed number
    of pairs per prompt.

    Args:
        ref_logps: (X, Y), nats.
        preference_logits: (X, Y, Y) logits, antisymmetric.
        pairs: how many per prompt, at least 1: an int, or (X,) int64.
        generator: makes the draw repeatable.

    Returns:
        (X, Y, Y) float64 counts, [x, y, y'] how often y was preferred to y'.

    Raises:
        ValueError: as `population_loss`; `pairs` that are not positive integers.
    """
    _require_preferences(ref_logps, preference_logits)
    counts = torch.as_tensor(pairs)
    if counts.dtype != torch.int64 or counts.shape not in ((), (len(ref_logps),)) or (counts < 1).any():
        raise ValueError(f"pairs: got {pairs!r}, expected a positive int, or an int64 tensor of shape (X,) of them")
    counts = counts.expand(len(ref_logps))
    probs = _pair_logps(ref_logps, preference_logits).exp().flatten(1)
    wins = torch.zeros_like(probs)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        drawn = torch.multinomial(probs[rows], count, replacement=True, generator=generator)
        wins[rows] = wins[rows].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return wins.view(preference_logits.shape)


def _require_wins(wins: Tensor) -> None:
    _require_table("wins", wins, tuple(wins.shape) if isinstance(wins, Tensor) else None)
    if wins.ndim != 3 or wins.shape[1] != wins.shape[2] or not torch.isfinite(wins).all() or (wins < 0).any():
        raise ValueError(f"wins: got shape {tuple(wins.shape)}, expected (X, Y, Y) finite counts of at least 0")


def fit_logits(wins: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Fit Bradley-Terry logits to labelled pairs, per prompt: where DPO with a free policy converges, as ẑ = s·h.

        ẑ(x) = argmin_z −Σ wins(x, y, y')·log σ(z_y − z_y') + ½·ridge·‖z‖²

    The loss of DPO is this without the ridge and depends on s·h alone; so ẑ does not depend on s, and h = ẑ/s. The
    ridge, small, decides where the pairs do not: answers that always won would have infinite logits, and answers that
    no chain of comparisons joins have no difference (0 here). Newton's method with limited steps; the objective is
    convex.

    Args:
        wins: (X, Y, Y) counts, as `sample_wins` returns; weights may be fractions.
        ridge: positive, in units of pairs.

    Returns:
        (X, Y) logits; each row sums to 0.

    Raises:
        ValueError: counts of another kind; a ridge that is not positive.
    """
    _require_wins(wins)
    if not (isinstance(ridge, Real) and 0 < ridge < math.inf):
        raise ValueError(f"ridge: got {ridge!r}, expected a positive finite number")
    total = wins + wins.mT
    logits = torch.zeros(wins.shape[:2], dtype=torch.float64)
    identity = ridge * torch.eye(wins.shape[1], dtype=torch.float64)
    for _ in range(200):
        p = torch.sigmoid(logits[:, :, None] - logits[:, None, :])
        gradient = (total * p - wins).sum(2) + ridge * logits
        if gradient.abs().max() < 1e-10 * max(1.0, float(total.max())):
            break
        weight = total * p * (1 - p)
        step = torch.linalg.solve(torch.diag_embed(weight.sum(2)) - weight + identity, gradient)
        size = step.abs().amax(1, keepdim=True)
        logits = logits - step * (1.0 / size).clamp(max=1.0)  # a full step overshoots where p is near 0 or 1
    return logits - logits.mean(1, keepdim=True)


def descend(
    ref_logps: Tensor,
    wins: Tensor,
    scale: float | Tensor,
    budget: float,
    *,
    prompt_probs: Tensor | None = None,
    max_steps: int = 100_000,
) -> Tensor:
    """Train a tabular policy from the reference by gradient descent on the DPO loss, until it has spent the budget.

    The loss is −Σ_x d(x)·Σ wins·log σ(s(x)·(θ_y − θ_y')) over logits θ. Steps are small (no margin s·h moves by more
    than 0.1), so that the path is that of gradient flow, and the last one is shortened to end at the budget.

    Args:
        ref_logps: (X, Y), nats; where training starts.
        wins: (X, Y, Y) counts.
        scale: s, what multiplies h in the loss: a positive number or (X,).
        budget: mean KL to the reference at which to stop, nats.
        prompt_probs: (X,), or None for the uniform distribution.
        max_steps: after so many the budget is taken to be out of reach.

    Returns:
        (X, Y) log π(y|x), nats.

    Raises:
        ValueError: as `fit_logits` and `tilt_to_budget`; a budget that is not reached.
    """
    _require_logps("ref_logps", ref_logps)
    _require_wins(wins)
    prompts = len(ref_logps)
    s = _per_prompt("scale", scale, prompts)[:, None, None]
    weights = _prompt_weights(prompt_probs, prompts)
    pull = weights[:, None, None] * s * wins
    # the loss bends at most so much; a step beyond its inverse would oscillate
    bend = float((weights[:, None] * s[:, :, 0].square() * (wins + wins.mT).sum(2)).max()) / 2
    moved = torch.zeros_like(ref_logps)  # θ − log π_ref

    def short_of_budget(part: float, moved: Tensor, step: Tensor) -> float:
        tilt = moved + part * step
        return float(weights @ _kl_of_tilt(ref_logps, tilt - tilt.amax(1, keepdim=True), 1.0)) - budget

    for _ in range(max_steps):
        push = pull * torch.sigmoid(-s * (moved[:, :, None] - moved[:, None, :]))
        downhill = push.sum(2) - push.sum(1)
        step = min(1 / bend, 0.05 / float((s[:, :, 0] * downhill).abs().max())) * downhill
        if short_of_budget(1.0, moved, step) >= 0:
            part = brentq(short_of_budget, 0.0, 1.0, args=(moved, step), rtol=1e-9)
            return torch.log_softmax(ref_logps + moved + part * step, 1)
        moved = moved + step
    reached = short_of_budget(0.0, moved, moved) + budget
    raise ValueError(f"budget: got {budget} nats, expected less than {reached:.6g}, the most in {max_steps} steps")
