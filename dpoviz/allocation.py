"""Reward per nat: how far each task should go, how much any beta(x) could gain, and the beta to train with.

A trained policy defines h(x, y) = log π(y|x)/π_ref(y|x). Consider the policies π_a ∝ π_ref·exp(a(x)·h). The one with
the highest reward at a given mean KL has a(x) = b_a(x)/λ. Here b_a(x) = Cov(r, h|x)/Var(h|x) is the slope of the reward
on h, the reward per nat, and λ is one price of KL for all prompts. This is exact if the slope is taken under π_a
itself; with the slope under the reference it holds to first order in a (`dpoviz.tabular.tilt_moments`). This module
estimates the slopes from scored answers or from preference pairs, for any model.

The answers decide which slope is estimated. Answers sampled from the reference give b for a small step away from it.
Answers sampled from the policy give b at a = 1; if all of these equal λ, nothing can be gained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dpoviz.forms import Form, scale
from dpoviz.translation import say

POOLED = "all"
"""The name, in the column `task`, of the row that pools all tasks."""

_LEVEL = 0.95


def reward_per_nat(
    h: Sequence[float] | np.ndarray,
    reward: Sequence[float] | np.ndarray,
    *,
    prompt: Sequence[object],
    task: Sequence[object],
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate the slope of the reward on h for each task, from scored answers.

        b = E_x[Cov(r, h|x)] / E_x[Var(h|x)]

    Covariance and variance are computed within each prompt (with m − 1 for m answers, so unbiased) and averaged over
    prompts with equal weights. Differences between prompts, such as their difficulty, therefore do not matter: adding
    a constant per prompt to h or to the reward changes nothing.

    Args:
        h: (N,) log π(y|x) − log π_ref(y|x) of each answer, nats.
        reward: (N,) reward of each answer, from a verifier, a judge or a reward model; one unit for all tasks.
        prompt: (N,) the prompt of each answer; at least two answers per prompt.
        task: (N,) the task of each answer's prompt.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.

    Returns:
        One row per task, in order of appearance, and one row with the task "all" that pools the prompts. Columns: task,
        slope (units of the reward per nat), se, low, high, variance (E_x[Var(h|x)], nats²), prompts, answers. The
        interval is the 95 % percentile bootstrap over prompts. It covers the choice of prompts and of their answers,
        for this one policy, but not variation between training runs. It is too short below about 10 prompts; with one
        prompt it is nan.

    Raises:
        ValueError: the columns differ in length or contain non-finite numbers; a prompt is in two tasks or has only one
            answer; h does not vary in a task; a task is called "all".
    """
    h, reward = _numbers("h", h), _numbers("reward", reward)
    frame = _frame({"h": h, "reward": reward, "prompt": prompt, "task": task})
    tasks_of = frame.groupby("prompt", sort=False)["task"].nunique()
    if (tasks_of > 1).any():
        raise ValueError(
            f"task: got {_some(tasks_of[tasks_of > 1].index)} in several tasks, expected one task per prompt"
        )
    groups = frame.groupby("prompt", sort=False)
    counts = groups.size()
    if (counts < 2).any():
        raise ValueError(
            f"prompt: got 1 answer for {_some(counts[counts < 2].index)} ({int((counts < 2).sum())} prompts), expected "
            "at least 2 per prompt; leave such prompts out or score more answers"
        )
    centred = frame[["h", "reward"]] - groups[["h", "reward"]].transform("mean")
    products = pd.DataFrame({"top": centred["h"] * centred["reward"], "bottom": centred["h"] ** 2})
    sums = products.groupby(frame["prompt"], sort=False).sum().div(counts - 1, axis=0)
    sums["task"], sums["answers"] = groups["task"].first(), counts
    return _slopes("h", sums, resamples, seed)


def reward_per_nat_of_pairs(
    h: Sequence[float] | np.ndarray,
    *,
    task: Sequence[object],
    prompt: Sequence[object] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate the slope for each task from held-out preference pairs alone, in win rate per nat.

        b = ½·E[h] / E[h²],    h of chosen against rejected

    If both answers y and y' of a pair are independent samples from the same distribution, this is Cov(u, h|x)/Var(h|x)
    for the utility u(x, y) = P(y is preferred to y'), because E[h] = 4·E_x[Cov(u, h|x)] and E[h²] = 2·E_x[Var(h|x)]. If
    pairs are chosen in another way, it is the slope on that distribution of pairs. The policy must not have been
    trained on these pairs: on its training pairs the slope measures memorisation.

    Args:
        h: (N,) h of each pair, chosen against rejected, nats (`dpoviz.losses.log_ratio_difference`).
        task: (N,) the task of each pair.
        prompt: (N,) the prompt of each pair, or any label of pairs that belong together; None treats the pairs as
            independent.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.

    Returns:
        As `reward_per_nat`, with slope in win rate per nat, variance ½·E[h²], prompts (the number of pairs if `prompt`
        is None), and two answers per pair. Prompts are weighted by their number of pairs. The interval covers the
        choice of prompts, not variation between training runs.

    Raises:
        ValueError: as `reward_per_nat`.
    """
    h = _numbers("h", h)
    frame = _frame({"h": h, "prompt": range(len(h)) if prompt is None else prompt, "task": task})
    tasks_of = frame.groupby("prompt", sort=False)["task"].nunique()
    if (tasks_of > 1).any():
        raise ValueError(
            f"task: got {_some(tasks_of[tasks_of > 1].index)} in several tasks, expected one task per prompt"
        )
    frame = frame.assign(top=frame["h"] / 4, bottom=frame["h"] ** 2 / 2, answers=2)
    groups = frame.groupby("prompt", sort=False)
    sums = groups[["top", "bottom", "answers"]].sum()
    sums["task"] = groups["task"].first()
    return _slopes("h", sums, resamples, seed, per="answers")


def _numbers(name: str, values: Any) -> np.ndarray:
    """Return a list, array, column or tensor as (N,) float64; all numbers must be finite, and N at least 1."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {type(values).__name__} without numbers, expected (N,) numbers") from None
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"{name}: got shape {numbers.shape}, expected (N,), at least one")
    if not np.isfinite(numbers).all():
        rows = np.flatnonzero(~np.isfinite(numbers))
        raise ValueError(f"{name}: got numbers that are not finite in rows {rows[:10].tolist()}, expected finite ones")
    return numbers


def _frame(columns: Mapping[str, Any]) -> pd.DataFrame:
    columns = {name: values.tolist() if hasattr(values, "tolist") else list(values) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{', '.join(lengths)}: got {list(lengths.values())} rows, expected the same number of each")
    frame = pd.DataFrame(columns)
    for name in ("prompt", "task"):
        if frame[name].isna().any():
            rows = np.flatnonzero(frame[name].isna())
            raise ValueError(f"{name}: got missing values in rows {rows[:10].tolist()}, expected a {name} for each")
    if (frame["task"] == POOLED).any():
        raise ValueError(f"task: got {POOLED!r}, which names the pooled row; expected another name")
    return frame


def _some(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in list(names)[:3])


def _slopes(name: str, sums: pd.DataFrame, resamples: int, seed: int, *, per: str | None = None) -> pd.DataFrame:
    """Return ratios of sums over prompts, by task and pooled, with a bootstrap over prompts; `sums` has one row per
    prompt.
    """
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 100:
        raise ValueError(f"resamples: got {resamples!r}, expected an integer of at least 100")
    parts = {task: part for task, part in sums.groupby("task", sort=False)}
    # tasks are strata: the number of prompts of each is not random
    drawn = {}
    for number, (task, part) in enumerate(parts.items()):
        if not part["bottom"].sum() > 0:
            raise ValueError(
                f"{name}: got no variation in task {task!r}, expected answers on which the policies differ"
            )
        rng = np.random.default_rng([seed, number])
        weights = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size=resamples)
        drawn[task] = weights @ part[["top", "bottom"]].to_numpy()
    drawn[POOLED] = sum(drawn.values())
    rows = []
    for task, part in [*parts.items(), (POOLED, sums)]:
        top, bottom = part["top"].sum(), part["bottom"].sum()
        row = {"task": task, "slope": top / bottom, "se": math.nan, "low": math.nan, "high": math.nan}
        counts = [len(own) for own in parts.values()] if task == POOLED else [len(part)]
        if min(counts) > 1:
            with np.errstate(divide="ignore", invalid="ignore"):
                slopes = drawn[task][:, 0] / drawn[task][:, 1]
            slopes = slopes[np.isfinite(slopes)]  # a resample in which h does not vary has no slope
            row["se"] = slopes.std(ddof=1)
            row["low"], row["high"] = np.quantile(slopes, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        row["variance"] = bottom / (part[per].sum() / 2 if per else len(part))
        rows.append({**row, "prompts": len(part), "answers": int(part["answers"].sum())})
    return pd.DataFrame(rows)


class GainBound(NamedTuple):
    """The bound on the extra reward of any beta(task) over one beta for all tasks, at equal small KL; 0.1 means 10 %.

    Attributes:
        bound: the estimate, corrected for the spread that noise adds to the slopes.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        plain: the formula without the correction; too large on average, because of the noise.
    """

    bound: float
    low: float
    high: float
    plain: float

    def __str__(self) -> str:
        low, high = f"{100 * self.low:.1f} %", f"{100 * self.high:.1f} %" if self.high < 10 else say("no limit")
        if self.bound >= 10:
            return say(
                "one constant gains next to nothing here, so beta(x) by task has no bound (95 % from {low})", low=low
            )
        return say(
            "no beta(x) by task could gain more than {bound:.1f} % over one constant "
            "(95 % interval {low} to {high})",
            bound=100 * self.bound, low=low, high=high,
        )  # fmt: skip


def gain_bound(
    table: pd.DataFrame, *, weight: Mapping[object, float] | None = None, resamples: int = 4000, seed: int = 0
) -> GainBound:
    """Bound what any beta(task) could gain over the best constant beta at equal KL, to leading order in KL.

        √(E[v·b₊²]·E[v]) / E[v·b] − 1

    Here b is the slope, b₊ = max(b, 0) and v = Var(h). E is the mean over tasks, weighted by their prompts. If no b is
    below 0, this is √(1 + CV²(b)) − 1, where CV is the standard deviation of b over its mean, weighted by v. The bound
    follows from the Cauchy-Schwarz inequality, and a = b₊/λ attains it (`allocate`). A negative slope counts as 0:
    because beta is positive, the best choice is to stay at the reference. If E[v·b] ≤ 0, one constant gains nothing,
    and the bound is inf.

    The bound holds for re-tilting this policy, and so for any beta(x) whose h differs from this policy's by one factor
    per task. At a KL of a nat or more an allocation may exceed it slightly, because higher orders in KL are left out. A
    beta that varies within tasks could gain more.

    The interval keeps the pattern of the slopes (their deviations from the mean) and varies its size. It contains the
    bounds for those sizes at which a spread as large as the observed one, and one as small, each have a probability of
    at least 2.5 %, given normal errors `se`. It starts at 0 if the slopes do not differ significantly, and is 0 to inf
    if one constant gains nothing. In simulated worlds with 15 and 60 prompts per task it covered 93 to 99 %, but 86 to
    88 % if a slope was below 0.

    Args:
        table: from `reward_per_nat` or `reward_per_nat_of_pairs`, or any table with their columns; the row "all" is
            ignored.
        weight: for each task, the fraction of prompts on which the policy will be used; None uses the column `prompts`.
        resamples: number of simulations for the interval.
        seed: random seed of the simulations.

    Raises:
        ValueError: columns, tasks or standard errors are missing, or the weights do not fit the tasks.
    """
    rows = _rows(table, ("slope", "se", "variance", "prompts"))
    if not (rows["se"] >= 0).all():
        wrong = rows.loc[~(rows["se"] >= 0), "task"]
        raise ValueError(f"table: got no standard error for {_some(wrong)}, expected one; it takes 2 prompts per task")
    v = rows["variance"].to_numpy(float) * _weights(rows, weight)
    b, se = rows["slope"].to_numpy(float), rows["se"].to_numpy(float)
    plain = _bound(b, v)
    mean = (v @ b) / v.sum()
    if len(b) == 1:
        return GainBound(plain, plain, plain, plain)
    if mean <= 0:  # a gain relative to 0 or less is not defined, for any size of the pattern
        return GainBound(plain, 0.0, math.inf, plain)
    noise = np.random.default_rng(seed).standard_normal((resamples, len(b))) * se
    # the pattern b̄ + c·(b − b̄): c = 1 is the observed one, at c = 0 all tasks are equal
    sizes = np.concatenate([np.linspace(0, 1, 41), np.geomspace(1, 8, 31)[1:]])
    seen = _cosine(b, v)
    spread = np.stack([_cosine(mean + c * (b - mean) + noise, v) for c in sizes])  # (sizes, resamples)
    as_far, as_near = (spread <= seen).mean(1), (spread >= seen).mean(1)
    tail = (1 - _LEVEL) / 2
    bounds = np.array([_bound(mean + c * (b - mean), v) for c in sizes])
    inside = (as_far >= tail) & (as_near >= tail)
    middle = bounds[np.argmax(as_far >= 0.5)] if (as_far >= 0.5).any() else bounds[-1]
    low = bounds[np.argmax(as_far >= tail)] if (as_far >= tail).any() else bounds[-1]
    high = bounds[len(sizes) - 1 - np.argmax(inside[::-1])] if inside.any() else middle
    high = math.inf if inside[-1] else max(high, middle)
    return GainBound(float(middle), float(low), float(high), plain)


def _cosine(b: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return E[v·b]/√(E[v]·E[v·b₊²]), the best constant's fraction of the optimum: (..., tasks) → (...), at least 0."""
    best = np.sqrt(v.sum() * (v * np.maximum(b, 0) ** 2).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        # if no task gains anything, one constant loses nothing either
        return np.where(best > 0, (v * b).sum(-1).clip(min=0) / best, 1.0)


def _bound(b: np.ndarray, v: np.ndarray) -> float:
    cosine = float(_cosine(b, v))
    return max(1 / cosine - 1, 0.0) if cosine > 0 else math.inf


def _rows(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    missing = [name for name in ("task", *columns) if name not in getattr(table, "columns", ())]
    if missing:
        raise ValueError(f"table: got no column {', '.join(missing)}, expected a table of reward_per_nat")
    rows = table[table["task"] != POOLED]
    if len(rows) == 0 or rows["task"].duplicated().any():
        raise ValueError(f"table: got tasks {table['task'].tolist()}, expected at least one, each once")
    slopes, variances = rows["slope"].to_numpy(float), rows["variance"].to_numpy(float)
    if not np.isfinite(slopes).all() or not (np.isfinite(variances) & (variances > 0)).all():
        raise ValueError(
            "table: got slopes or variances that are not finite, expected finite slopes, variances above 0"
        )
    return rows


def _weights(rows: pd.DataFrame, weight: Mapping[object, float] | None) -> np.ndarray:
    if weight is None:
        shares = rows["prompts"].to_numpy(float)
    else:
        if set(weight) != set(rows["task"]):
            raise ValueError(f"weight: got tasks {sorted(map(str, weight))}, expected {sorted(map(str, rows['task']))}")
        shares = rows["task"].map(weight).to_numpy(float)
    if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.sum() > 0:
        raise ValueError(f"weight: got {shares.tolist()}, expected numbers of at least 0 and not all of them 0")
    return shares / shares.sum()


def allocate(
    table: pd.DataFrame,
    *,
    kl: float | None = None,
    price: float | None = None,
    beta: float | None = None,
    form: Form | None = None,
    shrink: bool = False,
    weight: Mapping[object, float] | None = None,
) -> pd.DataFrame:
    """Return how far each task should go from the reference, and the beta to train with.

        a = b₊/λ,    λ = √(E[v·b₊²]/(2ε))

    The price λ is given directly, or follows from ε, a budget of mean KL. To first order the KL of a task is then
    a²·v/2. At a KL of tenths of a nat or more, measure the actual KL and scale all a by one number.

    A converged run fits s·h to the same logits whatever s is. To go a times as far as a run with scale s, train with
    s/a: that is beta/a in the standard form and beta·a in the inverse form. Early in training, while margins s·h are
    well below 1, h grows with s instead, and this advice is the wrong way round. `dpoviz.lm.retilt` needs neither
    retraining nor convergence.

    Args:
        table: from `reward_per_nat` or `reward_per_nat_of_pairs`; for factors per prompt, computed with task = prompt.
        kl: ε, the budget of mean KL, nats. Give either `kl` or `price`.
        price: λ, units of the reward per nat.
        beta: the beta with which the policy was trained, for the column `beta`.
        form: the form of that training, "inverse" or "standard"; required with `beta`.
        shrink: first shrink noisy slopes towards the pooled slope (empirical Bayes): the deviation of each is
            multiplied by τ²/(τ² + se²), where τ² is the variance of the slopes beyond their noise. This costs little if
            tasks differ and avoids a loss if they do not.
        weight: as in `gain_bound`.

    Returns:
        One row per task: task, slope (as used), a, kl (first order, nats), and beta if it was requested. a = 0 means to
        stay at the reference: beta is then inf (standard) or 0 (inverse).

    Raises:
        ValueError: as `gain_bound`; `kl` and `price` are both given or both missing, or not positive; `beta` or `form`
            is given without the other; no task has a positive slope on which to spend a budget.
    """
    if (kl is None) == (price is None):
        raise ValueError(f"kl, price: got {kl!r} and {price!r}, expected one of the two")
    name, value = ("kl", kl) if price is None else ("price", price)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a positive finite number")
    if (beta is None) != (form is None):
        raise ValueError(f"beta, form: got {beta!r} and {form!r}, expected both or neither")
    rows = _rows(table, ("slope", "variance", "prompts", *(("se",) if shrink else ())))
    shares, v = _weights(rows, weight), rows["variance"].to_numpy(float)
    slope = rows["slope"].to_numpy(float)
    if shrink:
        slope = _shrunk(slope, rows["se"].to_numpy(float), shares * v)
    gains = np.maximum(slope, 0)
    if price is None:
        if not gains.any():
            raise ValueError(f"table: got slopes {slope.tolist()}, expected one above 0, to spend the budget on")
        price = math.sqrt(shares @ (v * gains**2) / (2 * kl))
    a = gains / price
    found = pd.DataFrame({"task": rows["task"].to_numpy(), "slope": slope, "a": a, "kl": a**2 * v / 2})
    if form is not None:
        start = scale(beta, form)
        with np.errstate(divide="ignore"):
            found["beta"] = start / a if form == "standard" else a / start
    return found


def _shrunk(slope: np.ndarray, se: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the slopes, shrunk towards their v-weighted mean by the noise in each (DerSimonian and Laird 1986)."""
    if not (se >= 0).all():
        raise ValueError("table: got no standard errors, expected them for shrink=True; it takes 2 prompts per task")
    if len(slope) == 1 or not (se > 0).all():
        return slope
    precision = se**-2.0
    centre = precision @ slope / precision.sum()
    excess = precision @ (slope - centre) ** 2 - (len(slope) - 1)
    between = max(excess / (precision.sum() - (precision**2).sum() / precision.sum()), 0.0)
    return (v @ slope) / v.sum() + (slope - (v @ slope) / v.sum()) * between / (between + se**2)
