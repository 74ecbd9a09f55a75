"""The bootstrap that every interval comes from; and reward against KL, with tests of differences at equal KL.

A run is a point (KL to the reference in nats, true reward). A curve joins the points of one method, from the reference
itself at (0, its reward). The straight line between two points can be reached: a policy that follows one of two
policies with probability w at each prompt has the weighted mean of their rewards, and at most the weighted mean of
their KLs, because KL is convex.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_1samp

_BLOCK = 100
"""Resamples computed at once: bounds the memory, does not change the numbers."""


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, *, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a statistic of `resamples` samples of n rows, drawn with replacement.

    Which uncertainty the result covers depends on the rows: prompts, groups of pairs, or seeds of one training setup.

    Args:
        statistic: takes row numbers (R, n), a resample per row, and returns an array (R, ...).
        n: the number of rows that are resampled.
        resamples: the number of resamples.
        rng: continues from its present state.

    Returns:
        (resamples, ...).
    """
    sizes = [min(_BLOCK, resamples - done) for done in range(0, resamples, _BLOCK)]
    return np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and the 97.5 % quantile of a bootstrap, leaving NaN out (both NaN if all are).

    A resample can lack a statistic: one prompt repeated n times has no rank correlation. The other resamples still show
    how far it scatters. This is why `scipy.stats.bootstrap` is not used: one such resample makes its interval NaN.
    """
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def order_share(groups: Sequence[np.ndarray]) -> float:
    """Return the fraction of resamples in which the groups keep their order, ties not counted.

    Args:
        groups: the bootstrapped statistic (R,) of each group, in the order of the estimates, lowest first.
    """
    return float((np.diff(groups, axis=0) > 0).all(axis=0).mean())


class Curve:
    """Reward as a function of KL, through the runs of one method.

    Beyond the last point the curve stays level: a reward that takes less KL is available at more.

    Args:
        kl: (N,) of the runs, in nats, N ≥ 1; a sampled KL below 0 counts as 0.
        reward: (N,) of the runs.
        start: reward of the reference, the point at KL 0.

    Raises:
        ValueError: other shapes, or numbers that are not finite.
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
        """Return the reward at these KLs."""
        return np.interp(np.asarray(kl, dtype=float), self.kl, self.reward)

    def best(self, budget: float) -> float:
        """Return the highest reward at a KL of at most `budget`."""
        inside = self.reward[self.kl <= budget]
        return float(max(inside.max(), self.at(budget)))

    def mean_difference(self, other: Curve, *, points: int = 200) -> float:
        """Return the mean difference in reward to `other` over the KL range that both reach.

        It is the area between the curves over the width of the range. The range ends where the shorter curve ends and
        starts at this curve's first run, because before it both curves are lines from the reference.
        """
        end = min(self.kl[-1], other.kl[-1])
        start = min(self.kl[1], end)
        if start == end:
            return float(self.at(end) - other.at(end))
        grid = np.linspace(start, end, points)
        return float(np.trapezoid(self.at(grid) - other.at(grid), grid) / (end - start))


class Effect(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: the mean.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided p-value for a mean of 0 (paired t test).
        detectable: the mean that a test at 5 % finds with a power of 80 %, given the spread between the seeds.
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

    The interval is the bootstrap-t: each resample's mean is divided by its own standard error. With few seeds its
    coverage is nearer to 95 % than that of quantiles of means (Efron and Tibshirani 1993, §12.5).

    Args:
        values: (N,) differences, N ≥ 3.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: fewer than three values, or one that is not finite.
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
    """Return the mean and the standard deviation (R, 2) of each row of (R, n)."""
    return np.stack([samples.mean(axis=1), samples.std(axis=1, ddof=1)], axis=1)


def detectable_mean(spread: float, n: int, *, power: float = 0.8, level: float = 0.05) -> float:
    """Return the mean that a two-sided t test at `level` finds, with the right sign, with probability `power`.

    Args:
        spread: standard deviation of the differences.
        n: their number.
        power: the probability of finding it.
        level: of the test.
    """
    critical = t.ppf(1 - level / 2, n - 1)
    # the shift of the non-central t distribution whose mass above the critical value is the power
    shift = brentq(lambda shift: nct.sf(critical, n - 1, shift) - power, 0.0, 2 * critical + 5)
    return float(shift * spread / n**0.5)


def holm(p: Mapping[str, float] | Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p-values in the order given: rejecting all below 5 % keeps the familywise error at 5 %.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
    """
    values = np.asarray(list(p.values()) if isinstance(p, Mapping) else p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order]))
    return adjusted
