"""The exact world: finitely many prompts and answers, with policies and rewards as tables.

Every quantity of the derivation has a closed form here, so every statement about β can be checked by computing it.
Rows are prompts x (X of them), columns are answers y (Y of them). Policies are tables of log-probabilities with
normalised rows, in nats; π_ref gives every answer a probability above 0. Tensors must be float64 on the CPU: float32
rounding would hide what is to be checked. Expectations over prompts are weighted by `prompt_probs` (X,), the
derivation's input distribution d; None is the uniform distribution.

`beta` is one positive number for all prompts, or (X,) with one per prompt. (X, 1) is refused, because it would
broadcast.
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

# a float64 log_softmax is normalised to about 1e-15; rows normalised in float32 are off by about 1e-7
_NORMALISED = 1e-9


def _require_table(name: str, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Refuse anything but a float64 table without nan, of the expected shape; None accepts any (X, Y)."""
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
    """Refuse rows that are not normalised; with `support`, also rows that contain a probability of 0."""
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
    """Return a positive finite number, or (X,) of them, as (X,); the values in `also` are accepted too."""
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
    """Return (r − max r)/β as (X, Y): 0 at a prompt's best answers for every beta, including 0 and inf."""
    best = rewards.amax(1, keepdim=True)
    # for beta = 0 the quotient is -inf, and it would be 0/0 at the best answers
    return torch.where(rewards == best, 0.0, (rewards - best) / beta[:, None])


def _log_mean_exp(ref_logps: Tensor, tilt: Tensor) -> Tensor:
    """Return log Σ_y π_ref(y)·exp(tilt(y)) as (X,), for a tilt of at most 0."""
    # for a large beta the sum is nearly 1; multiplied by beta, the rounding error of its log would be large
    near = torch.log1p((ref_logps.exp() * torch.expm1(tilt)).sum(1))
    return torch.where(tilt.amin(1) > -1, near, torch.logsumexp(ref_logps + tilt, 1))


def optimal_policy(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Return the policy that maximises E[r] − β·KL at each prompt (the derivation, §3.1).

        π*(y|x) = π_ref(y|x)·exp(r(x, y)/β(x)) / Z(x)

    For β > 0 it is the only minimiser of `kl_regularized_objective`. Both limits are accepted: inf gives the reference,
    and 0 gives the reference restricted to the answers with the highest reward (all of them, if exactly tied). These
    are the policies that `solve_beta` means when it returns inf or 0.

    Args:
        ref_logps: (X, Y) log π_ref(y|x), nats.
        rewards: (X, Y).
        beta: a number or (X,), from 0 to inf, both included; in units of the reward per nat.

    Returns:
        (X, Y) log π*(y|x), nats; -inf for a probability of 0.

    Raises:
        ValueError: the tables are not float64, finite and of the same shape; rows of `ref_logps` are not normalised;
            beta is negative or of another shape.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps), also=(0.0, math.inf))
    return torch.log_softmax(ref_logps + _tilt(rewards, beta), 1)


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Return the logarithm of the optimal policy's normaliser (the derivation, §3.1).

        log Z(x) = log Σ_y π_ref(y|x)·exp(r(x, y)/β(x))

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        beta: a positive number or (X,).

    Returns:
        (X,) nats.

    Raises:
        ValueError: as `optimal_policy`, or beta is 0 or inf.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps))
    return rewards.amax(1) / beta + _log_mean_exp(ref_logps, _tilt(rewards, beta))


def kl(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return the KL divergence of a policy from the reference, per prompt (the derivation, §1).

        KL(π(·|x)‖π_ref(·|x)) = Σ_y π(y|x)·log π(y|x)/π_ref(y|x)

    Args:
        policy_logps: (X, Y), nats; -inf is a probability of 0 and adds nothing.
        ref_logps: (X, Y), nats.

    Returns:
        (X,) nats, differentiable.

    Raises:
        ValueError: the tables are not float64 and of the same shape, or rows are not normalised.
    """
    _require_logps("ref_logps", ref_logps)
    _require_logps("policy_logps", policy_logps, tuple(ref_logps.shape), support=False)
    # masked before the product, because 0·(−inf) is nan, in the value and in the gradient
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
    """Return the cost that the optimal policy minimises: minus the Lagrangian of §2, without the constant β·ε.

        E_{x~d}[−E_{y~π}[r(x, y)] + β(x)·KL(π(·|x)‖π_ref(·|x))]

    The derivation calls it the DPO loss in §3.2. It is not: it needs the reward and answers sampled from the policy,
    and the DPO loss needs neither.

    Args:
        policy_logps: (X, Y), nats; -inf is a probability of 0.
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        beta: a positive number or (X,).
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        A scalar in units of the reward, differentiable. Its minimum over policies is −E_x[β·log Z].

    Raises:
        ValueError: as `optimal_policy` and `kl`; beta is 0 or inf; `prompt_probs` is not a distribution.
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
    """Return the dual function, an upper bound on the reward within the KL budget (the derivation, §2).

        g(β) = max_π L(π, β) = E_x[β·log Z(x) + β·ε]

    It is a bound for every multiplier beta, and convex in beta, with slope ε − E_x[KL(π*_β‖π_ref)].
    With (X,) multipliers and budgets it is the dual of the problem with one constraint per prompt.

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        beta: a number or (X,), finite and at least 0.
        epsilon: ε, the budget in nats: a number or (X,), finite and at least 0.
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        A scalar in units of the reward.

    Raises:
        ValueError: as `optimal_policy`; beta is infinite; the budget is negative or infinite; `prompt_probs` is not
            a distribution.
    """
    _require_rewards(ref_logps, rewards)
    beta = _per_prompt("beta", beta, len(ref_logps), also=(0.0,))
    epsilon = _per_prompt("epsilon", epsilon, len(ref_logps), also=(0.0,))
    # max r + β·log E_ref[e^tilt] is β·log Z, with its limit max r at β = 0
    value = rewards.amax(1) + beta * (_log_mean_exp(ref_logps, _tilt(rewards, beta)) + epsilon)
    return (_prompt_weights(prompt_probs, len(ref_logps)) * value).sum()


def _kl_of_tilt(ref_logps: Tensor, gaps: Tensor, inverse_beta: float) -> Tensor:
    """Return the KL of π_ref·exp(gaps/β)/Z from the reference as (X,), accurate in relative terms even when tiny.

    Let v be the tilt gaps/β, centred so that E_ref[v] = 0. Then KL = E_π[v] − log E_ref[e^v]. Both terms are of order
    v². Their linear parts are omitted, because rounding of those would swamp the result.
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
    """Return the 1/β at which `kl_at` equals epsilon > 0; `kl_at` must increase from 0 to above epsilon."""
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
    greedy_kl = greedy_kl.masked_fill((gaps == 0).all(1), 0.0)  # rounding above 0 would give a multiplier
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
    """Return the multiplier of a KL budget: the price at which the optimal policy spends it (the derivation, §1-2).

        E_x[KL(π*_β‖π_ref)] = ε,    or KL(π*_β(·|x)‖π_ref(·|x)) = ε(x) per prompt

    One budget for the mean over prompts, E_x[KL] ≤ ε, has one multiplier. One budget per prompt, KL(x) ≤ ε(x), has one
    multiplier per prompt: L = E_x[E_π[r] − β(x)·(KL(x) − ε(x))] is §2 applied to each prompt. This is one way to
    read the derivation's input-dependent beta. Prompts do not interact in it, so `prompt_probs` plays no part.

    The KL of π*_β falls strictly, from the KL of the greedy policy (the reference restricted to the best answers) to 0,
    as beta grows. For ε above 0 and below the greedy policy's KL the multiplier is therefore positive and unique; it
    minimises `dual`. A larger budget is not used up: its multiplier is 0. So is the multiplier of any budget if all
    answers have the same reward. For ε = 0 there is otherwise no finite multiplier (the constraint has no interior, so
    Slater's condition fails), and the result is inf.

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y); best answers are found by exact equality.
        epsilon: ε, the budget in nats, finite and at least 0: a number; with `per_prompt` a number or (X,).
        per_prompt: one constraint per prompt, instead of one for the mean over prompts.
        prompt_probs: (X,) for the mean, or None for the uniform distribution.

    Returns:
        A float, or (X,) with `per_prompt`; from 0 to inf, in units of the reward per nat. For a positive finite result
        the KL of the optimal policy is ε, to 1e-10 nats.

    Raises:
        ValueError: as `optimal_policy`; the budget is negative or infinite; budgets (X,) come without `per_prompt`, or
            `prompt_probs` comes with it.
    """
    _require_rewards(ref_logps, rewards)
    prompts = len(ref_logps)
    # the solver assumes that π_ref sums to exactly 1
    ref_logps = torch.log_softmax(ref_logps.detach(), 1)
    rewards = rewards.detach()
    if not per_prompt:
        if isinstance(epsilon, Tensor):
            raise ValueError("epsilon: got a tensor, expected one number; per_prompt=True accepts a budget per prompt")
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
    """Return the reward for which a policy is optimal, up to a constant per prompt (the derivation, §3.1 solved for r).

        β(x)·log π(y|x)/π_ref(y|x) = r(x, y) − β(x)·log Z(x)

    In the difference between two answers to the same prompt the last term cancels, because β and Z depend on x alone:
    r_w − r_l = β·h (Rafailov et al. 2023, arXiv:2305.18290, eq. 5). §4.1 of the derivation prints this equation without
    beta and without the reference; in that form it does not hold.

    Args:
        policy_logps: (X, Y), nats, finite.
        ref_logps: (X, Y), nats.
        beta: a positive number or (X,): the price of KL, whichever form the loss has.

    Returns:
        (X, Y) in units of the reward.

    Raises:
        ValueError: the tables are not float64, finite, normalised and of the same shape; beta is not positive and
            finite, or is of another shape.
    """
    _require_logps("ref_logps", ref_logps)
    _require_logps("policy_logps", policy_logps, tuple(ref_logps.shape))
    beta = _per_prompt("beta", beta, len(ref_logps))
    return beta[:, None] * (policy_logps - ref_logps)


def bradley_terry(rewards: Tensor) -> Tensor:
    """Return the logits of Bradley-Terry preferences for a reward.

        P(y ≻ y'|x) = σ(r(x, y) − r(x, y'))

    To model labels of another reliability, multiply the rewards: a factor above 1 makes the labels more certain.

    Args:
        rewards: (X, Y).

    Returns:
        (X, Y, Y) logit of P(y ≻ y'|x) at [x, y, y'], antisymmetric; unchanged if f(x) is added to the reward.

    Raises:
        ValueError: `rewards` is not a finite float64 (X, Y).
    """
    _require_finite("rewards", rewards)
    return rewards[:, :, None] - rewards[:, None, :]


def _require_preferences(ref_logps: Tensor, preference_logits: Tensor) -> None:
    _require_logps("ref_logps", ref_logps)
    prompts, answers = ref_logps.shape
    if answers < 2:
        raise ValueError("ref_logps: got 1 answer per prompt, expected at least 2")
    _require_finite("preference_logits", preference_logits, (prompts, answers, answers))
    # P(y ≻ y') = 1 − P(y' ≻ y), up to the rounding of differences
    wrong = (preference_logits + preference_logits.mT).abs() > 1e-9 * (1 + preference_logits.abs())
    if wrong.any():
        raise ValueError(
            f"preference_logits: not antisymmetric in rows {rows_where(wrong)}, "
            "expected logit P(y beats y') = -logit P(y' beats y)"
        )


def _pair_logps(ref_logps: Tensor, preference_logits: Tensor) -> Tensor:
    """Return the log-probability (X, Y, Y) that a labelled pair at x is (chosen, rejected); -inf on the diagonal.

    Both answers are sampled from π_ref until they differ, and the label decides which is chosen. The probability is
    2·w(y, y')·P(y ≻ y'), where w is the probability of sampling the pair in this order.
    """
    same = torch.eye(ref_logps.shape[1], dtype=torch.bool)
    both = (ref_logps[:, :, None] + ref_logps[:, None, :]).masked_fill(same, -math.inf)
    return both - both.logsumexp((1, 2), keepdim=True) + F.logsigmoid(preference_logits) + math.log(2)


class _World(NamedTuple):
    """The checked tables from which the loss and its gradients are computed.

    Attributes:
        probs: (X, Y, Y) joint probability of prompt, chosen and rejected; sums to 1.
        h: (X, Y, Y), nats.
        beta: (X,).
        scale: (X,) s, the factor on h.
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
    """Return the DPO loss in the limit of infinitely many pairs (the derivation, §4.2 and §5).

        L = E_{x~d} E_{y,y'~π_ref, y≠y'}[−p·log σ(s·h) − (1 − p)·log σ(−s·h)],    p = P(y ≻ y'|x)

    Here h = log π(y|x)/π_ref(y|x) − log π(y'|x)/π_ref(y'|x). The "inverse" form, which the derivation prints, has
    s = 1/β(x). The "standard" form has s = β(x) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). The two answers are
    sampled independently from the reference, conditional on being different: a pair of equal answers compares nothing
    and would add log 2 for every policy.

    Because every pair occurs, exactly one policy minimises the loss. If the preferences are Bradley-Terry, that policy
    has s·h = logit p for every pair. Other preferences, such as cyclic ones, cannot be fitted exactly by any policy.
    The loss does not determine beta: its minimum over policies is the same for every beta.

    Args:
        policy_logps: (X, Y), nats, finite.
        ref_logps: (X, Y), nats; receives no gradient.
        preference_logits: (X, Y, Y) logit of P(y ≻ y'|x) at [x, y, y'], antisymmetric and finite.
        beta: a positive number or (X,); a tensor receives the gradient.
        form: "inverse" or "standard"; there is no default.
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        A scalar in nats, differentiable.

    Raises:
        ValueError: the tables are not float64, finite and of these shapes; rows of log-probabilities are not
            normalised; there are fewer than two answers; the preferences are not antisymmetric; beta is not positive
            and finite, or is of another shape; the form is unknown; `prompt_probs` is not a distribution.
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
    """Return the gradient of `population_loss` with respect to the policy's logits, in closed form.

        ∂L/∂θ(x, y) = −d(x)·E[s·σ(r̂_l − r̂_w)·(1[y = y_w] − 1[y = y_l]) | x],    r̂ = s·log π/π_ref

    The policy is π = softmax(θ). The weight σ(r̂_l − r̂_w) is that of Rafailov et al. 2023 (arXiv:2305.18290, §4),
    large for pairs that are ranked incorrectly. Arguments and errors are those of `population_loss`.

    Returns:
        (X, Y), detached; each row sums to 0.
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
    """Return the gradient of `population_loss` with respect to β(x), in closed form.

        ∂L/∂β(x) = −d(x)·s'(β)·E[σ(−s·h)·h | x] = d(x)·s'(β)·E[(σ(s·h) − p)·h | x]

    s' = 1 in the standard form and −1/β² in the inverse form. In the first expression h is that of (chosen, rejected),
    in the second that of (y, y'). A pair that is ranked correctly (h > 0) pulls s up; one that is ranked incorrectly
    pulls it down. Arguments and errors are those of `population_loss`.

    Returns:
        (X,), detached. If beta is one number, the derivative with respect to it is the sum.
    """
    with torch.no_grad():
        world = _world(policy_logps, ref_logps, preference_logits, beta, form, prompt_probs)
        on_scale = -(world.probs * torch.sigmoid(-world.scale[:, None, None] * world.h) * world.h).sum((1, 2))
        return -on_scale / world.beta.square() if form == "inverse" else on_scale


class Pairs(NamedTuple):
    """Labelled pairs from `sample_pairs`, as indices into the tables.

    Attributes:
        prompt: (B,) int64.
        chosen: (B,) int64, the preferred answer.
        rejected: (B,) int64, the other answer to the same prompt.
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
    """Sample labelled pairs from the distribution over which `population_loss` is the expectation.

    Each pair is a prompt from `prompt_probs`, two different answers from π_ref(·|x), and a label sampled from the
    preference.

    Args:
        ref_logps: (X, Y), nats.
        preference_logits: (X, Y, Y) logits, antisymmetric, as in `population_loss`.
        count: number of pairs, at least 1.
        generator: the random generator.
        prompt_probs: (X,), or None for the uniform distribution.

    Returns:
        `count` independent pairs.

    Raises:
        ValueError: as `population_loss`, or `count` is not a positive integer.
    """
    _require_preferences(ref_logps, preference_logits)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: got {count!r}, expected a positive integer")
    weights = _prompt_weights(prompt_probs, len(ref_logps))
    probs = weights[:, None, None] * _pair_logps(ref_logps, preference_logits).exp()
    drawn = torch.multinomial(probs.flatten(), count, replacement=True, generator=generator)
    return Pairs(*torch.unravel_index(drawn, probs.shape))


# -- re-tilting: the best beta(x), and how much any beta(x) could gain ----------------------------------------


def _tilt_factors(name: str, value: float | Tensor, prompts: int) -> Tensor:
    """Return a finite number of any sign, or (X,) of them, as (X,)."""
    if isinstance(value, Tensor):
        _require_finite(name, value, (prompts,))
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number or a float64 tensor of shape ({prompts},)")
    return torch.full((prompts,), float(value), dtype=torch.float64)


def tilted_policy(ref_logps: Tensor, h: Tensor, a: float | Tensor) -> Tensor:
    """Return the policy that goes a(x) times as far from the reference, in the direction of h.

        π_a(y|x) = π_ref(y|x)·exp(a(x)·h(x, y)) / Z_a(x)

    If h = log π/π_ref of a trained policy, a = 1 is that policy and a = 0 is the reference. If h = ẑ, the logits that a
    policy fits to its labels, it is the policy of a converged run in the standard form with β = 1/a, since s·h = ẑ for
    every s. If h = r, it is `optimal_policy` at β = 1/a.

    Args:
        ref_logps: (X, Y) log π_ref(y|x), nats.
        h: (X, Y) the direction, nats; adding a constant per prompt changes nothing.
        a: a finite number or (X,), of any sign; a negative one does not correspond to any positive beta.

    Returns:
        (X, Y) log π_a(y|x), nats.

    Raises:
        ValueError: the tables are not float64, finite and of the same shape; rows of `ref_logps` are not normalised;
            `a` is not finite or has another shape.
    """
    _require_logps("ref_logps", ref_logps)
    _require_finite("h", h, tuple(ref_logps.shape))
    return torch.log_softmax(ref_logps + _tilt_factors("a", a, len(ref_logps))[:, None] * h, 1)


class TiltMoments(NamedTuple):
    """Moments of a tilted policy, per prompt.

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
    """Return the reward and the KL of a tilted policy, and the moments that give their derivatives in a.

        ∂E[r]/∂a = Cov_a(r, h),    ∂KL(π_a‖π_ref)/∂a = a·Var_a(h)

    Both are exact, per prompt, for any h and any a. One more nat of KL therefore earns b_a(x)/a(x), where
    b_a = Cov_a/Var_a is the slope. At the allocation with the highest mean reward for its mean KL, this quotient is the
    same price λ for all prompts: a(x) = b_a(x)/λ. The condition is exact if the moments are taken under the best policy
    itself. It is necessary but not sufficient. With moments under the reference it holds to first order in a, because
    b_a = b_0 + a·(κ(r, h, h) − b_0·κ(h, h, h))/Var(h) + O(a²), where κ are the third joint cumulants.

    Args:
        ref_logps: (X, Y), nats.
        h: (X, Y), nats.
        rewards: (X, Y).
        a: a finite number or (X,).

    Raises:
        ValueError: as `tilted_policy`, or `rewards` is not a finite float64 (X, Y).
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
    """Return the best beta(x) for fitted logits, to first order in the distance from the reference.

        β*(x) = λ·Var_ref(ẑ|x) / Cov_ref(r, ẑ|x) = λ·σ_ẑ / (ρ·σ_r)

    β* is the price divided by the slope of the reward on ẑ. It is the beta of the standard form; that of the inverse
    form is 1/β*. The corresponding KL is KL* ≈ ρ²·σ_r²/(2λ²). If ẑ = r, β* is exactly λ.

    Args:
        ref_logps: (X, Y), nats.
        logits: (X, Y) ẑ = s·h of a policy that has fitted its labels.
        rewards: (X, Y).
        price: λ, units of the reward per nat; positive.

    Returns:
        (X,) units of the logits per nat: positive, or inf where ẑ does not increase with the reward, so that the best
        policy is the reference.

    Raises:
        ValueError: as `tilt_moments`, or the price is not a positive finite number.
    """
    prices = _per_prompt("price", price, len(ref_logps))
    slope = tilt_moments(ref_logps, logits, rewards, 0.0).slope
    return torch.where(slope > 0, prices / slope.clamp(min=torch.finfo(torch.float64).tiny), math.inf)


class Tilt(NamedTuple):
    """An allocation of KL to prompts, with its reward and KL.

    Attributes:
        a: (X,) the factors.
        reward: mean reward over prompts.
        kl: mean KL over prompts, nats.
    """

    a: Tensor
    reward: float
    kl: float


class _Tilts:
    """Mean reward and KL as functions of a (X,), and their gradients, on tables that are checked once."""

    def __init__(self, ref_logps: Tensor, h: Tensor, rewards: Tensor, prompt_probs: Tensor | None) -> None:
        _require_rewards(ref_logps, rewards)
        _require_finite("h", h, tuple(ref_logps.shape))
        self.weights = _prompt_weights(prompt_probs, len(ref_logps))
        # the solver assumes that π_ref sums to exactly 1
        self.tables = torch.log_softmax(ref_logps.detach(), 1), h.detach(), rewards.detach()

    def moments(self, a: Tensor) -> TiltMoments:
        ref_logps, h, rewards = self.tables
        tilt = a[:, None] * h
        return _moments(ref_logps, torch.softmax(ref_logps + tilt, 1), h, rewards, tilt)

    def at(self, a: Tensor) -> Tilt:
        found = self.moments(a)
        return Tilt(a, float(self.weights @ found.reward), float(self.weights @ found.kl))

    def reach(self, direction: Tensor, budget: float) -> Tilt:
        """Return the multiple of `direction` whose mean KL is the budget."""
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

    One beta for all prompts is the direction 1. A rule s(x), for a converged policy, is the direction 1/s(x). Reward
    per nat is the direction b(x).

    Args:
        ref_logps: (X, Y), nats.
        h: (X, Y), nats.
        rewards: (X, Y).
        direction: a finite number or (X,), at least 0 and not all 0.
        budget: mean KL, nats; positive, and below what the direction can reach.
        prompt_probs: (X,), or None for the uniform distribution.

    Raises:
        ValueError: as `tilt_moments`; the direction has a negative number or no positive one; the budget is out of
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
    """Return the best allocation of a KL budget, found by direct optimisation: the oracle for any beta(x).

        maximise E_x[E_{π_a}[r]] subject to E_x[KL(π_a‖π_ref)] ≤ budget, over a ≥ 0

    The constraint a ≥ 0 stands for a positive beta. The optimiser is sequential quadratic programming (scipy's
    SLSQP) with exact gradients. It knows the true reward and uses no formula for a. If the reward is not concave in a,
    the result is the best of the local optima found from two starts.

    Args:
        ref_logps: (X, Y), nats.
        h: (X, Y), nats.
        rewards: (X, Y).
        budget: mean KL, nats; positive, and below what one factor for all prompts can reach.
        groups: (X,) int64, from 0 to G − 1: prompts of the same group share a factor. None gives each prompt its own.
        prompt_probs: (X,), or None for the uniform distribution.

    Raises:
        ValueError: as `tilt_to_budget`; `groups` is not (X,) int64 from 0 without gaps; the optimiser fails.
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
    unit = float(one.a[0])  # scales the variables to about 1 for any budget

    def by_group(values: Tensor) -> np.ndarray:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, groups, tilts.weights * values).numpy()

    near = tilts.moments(torch.zeros(prompts, dtype=torch.float64))
    sizes = by_group(near.variance)
    scale = float(by_group(near.covariance.abs()).sum()) or 1.0  # the gain of a first step

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


# -- worlds with tasks: labels, the logits fitted to them, and the path of training ---------------------------


class Task(NamedTuple):
    """A kind of prompts in the exact world.

    Attributes:
        reliability: κ; labels follow σ(κ·Δr).
        pairs: labelled pairs per prompt.
        spread: τ, standard deviation of the reward over the answers.
        sharpness: standard deviation of the reference's logits. At 0 the entropy is log Y; it falls as this grows.
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
        rewards: (X, Y), the true rewards, in one unit for all tasks.
        preference_logits: (X, Y, Y), flips included.
        wins: (X, Y, Y) number of times y was preferred to y' at x.
        task: (X,) int64, the position of the prompt's task in `kinds`.
    """

    ref_logps: Tensor
    rewards: Tensor
    preference_logits: Tensor
    wins: Tensor
    task: Tensor


def sample_tasks(kinds: Sequence[Task], *, prompts: int, answers: int, generator: torch.Generator) -> TaskWorld:
    """Sample a world: normal reference logits and rewards, and labelled pairs with the reliability of each task.

    Args:
        kinds: the tasks.
        prompts: number of prompts per task.
        answers: Y, at least 2.
        generator: the random generator.

    Raises:
        ValueError: no task, no prompt or fewer than 2 answers, or a setting of a task is out of range.
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
    """Sample labelled pairs at every prompt, and count the wins of each answer over each other one.

    A pair is two different answers from π_ref(·|x) and a label sampled from the preference, as in `sample_pairs`, but
    the number of pairs per prompt is fixed.

    Args:
        ref_logps: (X, Y), nats.
        preference_logits: (X, Y, Y) logits, antisymmetric.
        pairs: number of pairs per prompt, at least 1: an int, or (X,) int64.
        generator: the random generator.

    Returns:
        (X, Y, Y) float64 counts: at [x, y, y'] the number of times y was preferred to y'.

    Raises:
        ValueError: as `population_loss`, or `pairs` are not positive integers.
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
    """Fit Bradley-Terry logits to labelled pairs, per prompt: the ẑ = s·h to which DPO with a free policy converges.

        ẑ(x) = argmin_z −Σ wins(x, y, y')·log σ(z_y − z_y') + ½·ridge·‖z‖²

    Without the ridge this is the DPO loss, which depends only on s·h; so ẑ does not depend on s, and h = ẑ/s. The small
    ridge decides what the pairs leave open: answers that always won would have infinite logits, and answers that no
    chain of comparisons connects would have no defined difference (it becomes 0). The objective is convex; the solver
    is Newton's method with limited steps.

    Args:
        wins: (X, Y, Y) counts, as `sample_wins` returns; fractional weights are allowed.
        ridge: positive, in units of pairs.

    Returns:
        (X, Y) logits; each row sums to 0.

    Raises:
        ValueError: `wins` are not (X, Y, Y) finite counts of at least 0, or the ridge is not a positive finite number.
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
        logits = logits - step * (1.0 / size).clamp(max=1.0)  # a full step overshoots if p is near 0 or 1
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
    """Train a tabular policy by gradient descent on the DPO loss, from the reference until it has spent the KL budget.

        L(θ) = −Σ_x d(x)·Σ wins(x, y, y')·log σ(s(x)·(u_y − u_y')),    u = θ − log π_ref

    The policy is softmax(θ). Steps are small (no margin s·h changes by more than 0.1), so the path approximates
    gradient flow; the last step is shortened to end at the budget.

    Args:
        ref_logps: (X, Y), nats; the start of training.
        wins: (X, Y, Y) counts.
        scale: s, the factor on h in the loss: a positive number or (X,).
        budget: mean KL from the reference at which to stop, nats.
        prompt_probs: (X,), or None for the uniform distribution.
        max_steps: after this many steps the budget is considered out of reach.

    Returns:
        (X, Y) log π(y|x), nats.

    Raises:
        ValueError: as `fit_logits` and `tilt_to_budget`, or the budget is not reached.
    """
    _require_logps("ref_logps", ref_logps)
    _require_wins(wins)
    prompts = len(ref_logps)
    s = _per_prompt("scale", scale, prompts)[:, None, None]
    weights = _prompt_weights(prompt_probs, prompts)
    pull = weights[:, None, None] * s * wins
    # an upper bound on the loss's curvature; a step longer than its inverse could oscillate
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
