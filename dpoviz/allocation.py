"""Reward per nat: how far each task should go, how much any beta(x) could gain, and the beta to train with.

A trained policy defines h(x, y) = log π(y|x)/π_ref(y|x). Of the policies π_a ∝ π_ref·exp(a(x)·h) the best for a mean
KL has the slope b_a(x) = Cov(r, h|x)/Var(h|x), the reward per nat of h, proportional to a(x): a(x) = b_a(x)/λ, with
one price λ of KL for all prompts. That is exact with the slope under π_a itself, and holds to first order in a with
the slope under the reference (`dpoviz.tabular.tilt_moments`). Here the slopes are estimated from scored answers or
from preference pairs, of any model.

The answers decide which slope it is: drawn from the reference, b of a small step away from it; drawn from the policy,
b at a = 1, where all b equal to λ means that nothing is to be gained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dpoviz.forms import Form, scale

POOLED = "all"
"""The task of the row that pools all tasks."""

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
    """Estimate the slope of the reward on h by task, from scored answers.

        b = E_x[Cov(r, h|x)] / E_x[Var(h|x)]

    Covariance and variance are taken within each prompt (with m − 1, so unbiased), and averaged over prompts, which
    weigh alike. What differs between prompts, such as how hard they are, plays no part, and constants per prompt in h
    or reward change nothing.

    Args:
        h: (N,) log π(y|x) − log π_ref(y|x) of each answer, nats.
        reward: (N,) its reward: a verifier's, a judge's, a reward model's; one unit for all tasks.
        prompt: (N,) which prompt it answers; at least two answers per prompt.
        task: (N,) the task of its prompt.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row per task in the order of appearance, and one of task "all" that pools the prompts: slope (units of the
        reward per nat), se, low, high, variance (E_x[Var(h|x)], nats²), prompts, answers. The interval is the 95 %
        percentile bootstrap over prompts: it covers which prompts were drawn and which answers to them, for this one
        policy. It does not cover another training, and is too short below about 10 prompts; with one prompt it is nan.

    Raises:
        ValueError: columns that differ in length or hold numbers that are not finite; a prompt in two tasks or with
            one answer; a task in which h does not vary; a task of the name "all".
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
    """Estimate the slope by task from held-out preference pairs alone, in win-rate units.

        b = ½·E[h] / E[h²],    h of chosen against rejected

    It is Cov(u, h|x)/Var(h|x) for the utility u(x, y) = P(y is preferred to y'), where both answers of a pair, y and
    y', are independent draws from one distribution: each of E[h] = 4·E_x[Cov(u, h|x)] and E[h²] = 2·E_x[Var(h|x)].
    With pairs chosen in another way it is the slope on that distribution of pairs. The policy must not have trained
    on the pairs: on those that it has, the slope says how well it knows them by heart.

    Args:
        h: (N,) of each pair, chosen against rejected, nats (`dpoviz.losses.log_ratio_difference`).
        task: (N,) its task.
        prompt: (N,) its prompt, or anything whose pairs belong together; None takes the pairs to be independent.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        As `reward_per_nat`; slope in win rate per nat, variance ½·E[h²], prompts (of pairs where `prompt` is None),
        answers two per pair. Prompts weigh by their pairs. The interval covers which prompts were drawn, not another
        training.

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
    """(N,) float64 of a list, an array, a column or a tensor; all finite, N ≥ 1."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {type(values).__name__} that are no numbers, expected (N,) numbers") from None
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
        raise ValueError(f"{', '.join(lengths)}: got {list(lengths.values())} rows, expected as many of each")
    frame = pd.DataFrame(columns)
    for name in ("prompt", "task"):
        if frame[name].isna().any():
            rows = np.flatnonzero(frame[name].isna())
            raise ValueError(f"{name}: got nothing in rows {rows[:10].tolist()}, expected a {name} for each")
    if (frame["task"] == POOLED).any():
        raise ValueError(f"task: got {POOLED!r}, which names the pooled row; expected another name")
    return frame


def _some(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in list(names)[:3])


def _slopes(name: str, sums: pd.DataFrame, resamples: int, seed: int, *, per: str | None = None) -> pd.DataFrame:
    """Ratios of sums over prompts, by task and pooled, with a bootstrap over the prompts (one of `sums` per row)."""
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 100:
        raise ValueError(f"resamples: got {resamples!r}, expected an integer of at least 100")
    parts = {task: part for task, part in sums.groupby("task", sort=False)}
    # tasks are strata: how many prompts each has is not random
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
            slopes = slopes[np.isfinite(slopes)]  # a resample of prompts on which h does not vary has none
            row["se"] = slopes.std(ddof=1)
            row["low"], row["high"] = np.quantile(slopes, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        row["variance"] = bottom / (part[per].sum() / 2 if per else len(part))
        rows.append({**row, "prompts": len(part), "answers": int(part["answers"].sum())})
    return pd.DataFrame(rows)


class GainBound(NamedTuple):
    """How much more reward any beta(task) could earn than one beta for all, at equal small KL; 0.1 is 10 %.

    Attributes:
        bound: the estimate, with what the noise of the slopes adds to their spread taken off.
        low: lower end of the 95 % interval.
        high: upper end.
        plain: the formula at the slopes as they stand; too large on average, by the noise.
    """

    bound: float
    low: float
    high: float
    plain: float

    def __str__(self) -> str:
        low, high = f"{100 * self.low:.1f} %", f"{100 * self.high:.1f} %" if self.high < 10 else "no limit"
        if self.bound >= 10:
            return f"one constant gains next to nothing here, so beta(x) by task has no bound (95 % from {low})"
        return (
            f"no beta(x) by task could gain more than {100 * self.bound:.1f} % over one constant "
            f"(95 % interval {low} to {high})"
        )


def gain_bound(
    table: pd.DataFrame, *, weight: Mapping[object, float] | None = None, resamples: int = 4000, seed: int = 0
) -> GainBound:
    """Bound what any beta(task) gains over the best constant at equal KL, to leading order in KL.

        √(E[v·b₊²]·E[v]) / E[v·b] − 1 = √(1 + CV²(b)) − 1 where all b ≥ 0

    with b the slope, v = Var(h), b₊ = max(b, 0), CV the standard deviation of b over its mean, both weighted by v,
    and E over tasks, each with the weight of its prompts. It is the Cauchy-Schwarz inequality, and what a = b₊/λ
    reaches (`allocate`). A negative slope counts as 0 because beta is positive: nothing is better than to stay. Where
    E[v·b] ≤ 0 one constant gains nothing, and the bound is inf.

    It bounds re-tilting of this policy, so any beta(x) of which h differs from it by a factor per task only; at KL of
    a nat or more an allocation may pass it by a little, because the next order in KL is left out. A beta that differs
    within tasks could gain more.

    The interval holds the pattern of the slopes fixed and moves its size: it contains the sizes under which a spread
    as large, or as small, as the one seen is not unusual (2.5 % at each end), given normal errors `se`. Where the
    slopes do not differ significantly it begins at 0; where one constant gains nothing it is 0 to inf. In simulated
    worlds of 15 and 60 prompts per task it covered 93 to 99 %, but 86 to 88 % with a slope below 0.

    Args:
        table: of `reward_per_nat` or `reward_per_nat_of_pairs`, or one with its columns; the row "all" is ignored.
        weight: by task, the share of prompts that the policy will meet; None takes the column `prompts`.
        resamples: of the interval.
        seed: of the interval.

    Raises:
        ValueError: missing columns, no task, standard errors that are not there, weights that do not fit.
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
    if mean <= 0:  # nothing to be relative to, whatever the size of the pattern
        return GainBound(plain, 0.0, math.inf, plain)
    noise = np.random.default_rng(seed).standard_normal((resamples, len(b))) * se
    # the pattern b̄ + c·(b − b̄): c = 1 is what was seen, c = 0 is that all tasks are alike
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
    """E[v·b]/√(E[v]·E[v·b₊²]), what the best constant earns of the optimum; (..., tasks) → (...), at least 0."""
    best = np.sqrt(v.sum() * (v * np.maximum(b, 0) ** 2).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        # where no task gains anything, nothing is lost by one constant either
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
    """Return how far each task should go: a = b₊/λ, and the beta to train with.

    The price λ is given, or follows from a budget of mean KL ε: λ = √(E[v·b₊²]/(2ε)). To first order the KL of a task
    is then a²·v/2. At KL of tenths of a nat and more, measure the KL that comes of it and scale all a by one number.

    A run that has converged fits s·h whatever s is; so to go a times as far as a run with the scale s, train with
    s/a: beta/a in the standard form, beta·a in the inverse one. Early in training, with margins s·h well below a nat,
    h grows with s instead, and this is the wrong way round; `dpoviz.lm.retilt` needs no retraining and no such
    condition.

    Args:
        table: of `reward_per_nat` or `reward_per_nat_of_pairs`; for factors per prompt, one made with task = prompt.
        kl: budget of mean KL, nats.
        price: λ, units of the reward per nat. Give one of the two.
        beta: that the policy was trained with, for the column `beta`.
        form: of that training, "inverse" or "standard"; goes with `beta`.
        shrink: draw noisy slopes towards the pooled one first (empirical Bayes: by se² over se² and the spread of the
            slopes beyond their noise). Costs little where tasks differ and saves a loss where they do not.
        weight: as `gain_bound`.

    Returns:
        A row per task: task, slope (as used), a, kl (first order, nats), and beta where it was asked for: with a = 0,
        which is to stay at the reference, inf (standard) or 0 (inverse).

    Raises:
        ValueError: neither or both of kl and price, or not positive; beta without form or the other way round; no
            task with a positive slope for a budget to go to; as `gain_bound`.
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
            raise ValueError(f"table: got slopes {slope.tolist()}, expected one above 0 for the budget to go to")
        price = math.sqrt(shares @ (v * gains**2) / (2 * kl))
    a = gains / price
    found = pd.DataFrame({"task": rows["task"].to_numpy(), "slope": slope, "a": a, "kl": a**2 * v / 2})
    if form is not None:
        start = scale(beta, form)
        with np.errstate(divide="ignore"):
            found["beta"] = start / a if form == "standard" else a / start
    return found


def _shrunk(slope: np.ndarray, se: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Slopes drawn towards their v-weighted mean, by their share of noise (DerSimonian and Laird 1986)."""
    if not (se >= 0).all():
        raise ValueError("table: got no standard errors, expected them for shrink=True; it takes 2 prompts per task")
    if len(slope) == 1 or not (se > 0).all():
        return slope
    precision = se**-2.0
    centre = precision @ slope / precision.sum()
    excess = precision @ (slope - centre) ** 2 - (len(slope) - 1)
    between = max(excess / (precision.sum() - (precision**2).sum() / precision.sum()), 0.0)
    return (v @ slope) / v.sum() + (slope - (v @ slope) / v.sum()) * between / (between + se**2)
