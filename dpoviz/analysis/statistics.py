"""Bootstrap intervals, curves of reward against KL, and tests of differences at equal KL.

A run is a point (KL to the reference in nats, true reward). A curve joins the points of one method, starting at the
reference itself, (0, its reward). Every point on the line between two runs is attainable: a policy that answers each
prompt with one of two policies, the first with probability w, has the weighted mean of their rewards and, because KL is
convex, at most the weighted mean of their KLs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import binomtest, nct, t, ttest_1samp

_BLOCK = 100
"""Number of resamples computed at once: limits memory, does not change the result."""


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, *, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a statistic of each of `resamples` samples of n rows, taken with replacement.

    The rows decide which uncertainty the result covers: that of prompts, of groups of pairs, or of training seeds.

    Args:
        statistic: maps row numbers (R, n), one resample per row, to an array (R, ...).
        n: the number of rows to resample.
        resamples: the number of resamples.
        rng: generator of the resamples; its state advances.

    Returns:
        An array (resamples, ...).
    """
    sizes = [min(_BLOCK, resamples - done) for done in range(0, resamples, _BLOCK)]
    return np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of a bootstrap, ignoring NaN; NaN if all values are NaN.

    The statistic of a resample can be undefined: one prompt repeated n times has no rank correlation. A single such
    resample makes the interval of `scipy.stats.bootstrap` NaN, so it is not used here.
    """
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def order_share(groups: Sequence[np.ndarray]) -> float:
    """Return the fraction of resamples in which the groups keep their order; a tie counts as a change.

    Args:
        groups: the bootstrapped statistics (R,) of each group, ordered by the groups' estimates, lowest first.
    """
    return float((np.diff(groups, axis=0) > 0).all(axis=0).mean())


class Curve:
    """Reward as a piecewise linear function of KL, through the runs of one method.

    Beyond the last point the curve is constant: a reward reached at some KL is also available at a larger KL.

    Args:
        kl: (N,) KL of the runs, in nats, N ≥ 1; a sampled KL below 0 counts as 0.
        reward: (N,) reward of the runs.
        start: reward of the reference, at KL 0.

    Raises:
        ValueError: wrong shapes, or numbers that are not finite.
    """

    def __init__(self, kl: ArrayLike, reward: ArrayLike, *, start: float) -> None:
        kl, reward = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
        if kl.ndim != 1 or kl.shape != reward.shape or len(kl) == 0:
            raise ValueError(f"kl, reward: got shapes {kl.shape}, {reward.shape}, expected (N,) twice, N ≥ 1")
        if not (np.isfinite(kl).all() and np.isfinite(reward).all() and np.isfinite(start)):
            raise ValueError("kl, reward, start: expected finite numbers")
        order = np.argsort(kl, kind="stable")
        self.kl = np.concatenate([[0.0], np.maximum(kl[order], 0)])
        self.reward = np.concatenate([[start], reward[order]])

    def at(self, kl: ArrayLike) -> np.ndarray:
        """Return the interpolated reward at each KL."""
        return np.interp(np.asarray(kl, dtype=float), self.kl, self.reward)

    def best(self, budget: float) -> float:
        """Return the highest reward at a KL of at most `budget`."""
        inside = self.reward[self.kl <= budget]
        return float(max(inside.max(), self.at(budget)))

    def mean_difference(self, other: Curve, *, points: int = 200) -> float:
        """Return the mean of this curve minus `other` over the KL range that both reach.

        The mean is the area between the curves divided by the width of the range. The range starts at this curve's
        first run, because before it the curve is only the line from the reference, and ends where the shorter curve
        ends.
        """
        end = min(self.kl[-1], other.kl[-1])
        start = min(self.kl[1], end)
        if start == end:
            return float(self.at(end) - other.at(end))
        grid = np.linspace(start, end, points)
        return float(np.trapezoid(self.at(grid) - other.at(grid), grid) / (end - start))


class Effect(NamedTuple):
    """The mean of a difference over seeds, with its uncertainty.

    Attributes:
        mean: the mean.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        p: two-sided p-value for a mean of 0 (paired t test).
        detectable: the mean that a test at 5 % detects with a power of 80 %, given the spread between seeds.
        n: number of seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    n: int


def effect(values: ArrayLike, *, resamples: int = 5000, seed: int = 0) -> Effect:
    """Return the mean of paired differences, one per seed, with a 95 % bootstrap interval over the seeds.

    The interval is a bootstrap-t interval: the error of each resample's mean is divided by its own standard error. With
    few seeds, its coverage is closer to 95 % than that of percentile intervals (Efron and Tibshirani 1993, §12.5).

    Args:
        values: (N,) differences, one per seed, N ≥ 3.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: there are fewer than three values, or one is not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 3 or not np.isfinite(values).all():
        raise ValueError(f"values: got {values.tolist()}, expected at least 3 finite numbers, one per seed")
    n, mean = len(values), float(values.mean())
    spread = float(values.std(ddof=1))
    if spread == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, n)
    rng = np.random.default_rng(seed)
    means, spreads = bootstrap(lambda rows: _mean_and_spread(values[rows]), n, resamples=resamples, rng=rng).T
    pivots = (means - mean)[spreads > 0] / (spreads[spreads > 0] / n**0.5)
    upper, lower = np.quantile(pivots, [0.975, 0.025])
    error = spread / n**0.5
    p = float(ttest_1samp(values, 0.0).pvalue)
    return Effect(mean, mean - upper * error, mean - lower * error, p, detectable_mean(spread, n), n)


def _mean_and_spread(samples: np.ndarray) -> np.ndarray:
    """Return (R, 2) the mean and the standard deviation of each row of (R, n)."""
    return np.stack([samples.mean(axis=1), samples.std(axis=1, ddof=1)], axis=1)


def detectable_mean(spread: float, n: int, *, power: float = 0.8, level: float = 0.05) -> float:
    """Return the mean that a two-sided t test detects, with the right sign, with probability `power`.

    Args:
        spread: standard deviation of the differences.
        n: number of differences.
        power: probability of detection.
        level: significance level of the test.
    """
    critical = t.ppf(1 - level / 2, n - 1)
    # the shift of the non-central t distribution whose mass above the critical value is the power
    shift = brentq(lambda shift: nct.sf(critical, n - 1, shift) - power, 0.0, 2 * critical + 5)
    return float(shift * spread / n**0.5)


def holm(p: Mapping[str, float] | Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p-values, in the given order: rejecting all below 5 % keeps the familywise error at 5 %.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
    """
    values = np.asarray(list(p.values()) if isinstance(p, Mapping) else p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order]))
    return adjusted


class Paired(NamedTuple):
    """Two methods on the same items, right or wrong on each.

    Attributes:
        gained: items on which the first alone is right.
        lost: items on which the second alone is right.
        p: two-sided p-value of McNemar's exact test; it takes the items as independent.
    """

    gained: int
    lost: int
    p: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare two methods by McNemar's exact test: given that one alone is right, each is so with probability ½.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12.

    Args:
        first: (N,) whether the first is right.
        second: (N,) whether the second is right, on the same items.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"first, second: got shapes {first.shape}, {second.shape}, expected (N,) twice")
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(gained, lost, p)


def t_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Return the mean of (N,) values and the ends of its 95 % t interval; NaN at the ends for N = 1."""
    values = np.asarray(values, dtype=float)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return mean, float("nan"), float("nan")
    error = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
    return mean, mean - error, mean + error
