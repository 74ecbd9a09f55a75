r"""Reward against KL: curves through runs, differences between them at equal KL, and what such differences are worth.

A run is a point (KL to the reference in nats, true reward). A curve joins the points of one method, from the reference
itself at (0, its reward). The straight line between two points is no guess: who answers with either policy, by the
toss of a coin at each prompt, has the mean of their rewards, and at most the mean of their KLs, because KL is convex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_1samp


class Curve:
    """Reward as a function of KL, through the runs of one method.

    Beyond the last point the curve stays level: what is reached with less KL can be had.

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
        """Reward at these KLs."""
        return np.interp(np.asarray(kl, dtype=float), self.kl, self.reward)

    def best(self, budget: float) -> float:
        """The highest reward at a KL of at most `budget`."""
        inside = self.reward[self.kl <= budget]
        return float(max(inside.max(), self.at(budget)))

    def mean_difference(self, other: Curve, *, points: int = 200) -> float:
        """The area between this curve and `other` over the width of the KL range that both reach: a mean reward.

        The range ends where the shorter curve ends and starts at this curve's first run, because before it both
        curves are lines from the reference.
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
        p: two-sided, of a mean of 0 (paired t test).
        detectable: the mean that a test at 5 % would find four times in five, given the spread between the seeds.
        n: seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    n: int


def effect(values: ArrayLike, *, resamples: int = 5000, seed: int = 0) -> Effect:
    """The mean of paired differences, one from each seed, with a bootstrap interval over the seeds.

    The interval is the bootstrap-t: each resample's mean is measured by its own standard error, which with few seeds
    keeps its promise better than quantiles of means (Efron and Tibshirani 1993, §12.5).

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
    drawn = values[np.random.default_rng(seed).integers(n, size=(resamples, n))]
    errors = drawn.std(axis=1, ddof=1) / n**0.5
    pivots = (drawn.mean(axis=1) - mean)[errors > 0] / errors[errors > 0]
    upper, lower = np.quantile(pivots, [0.975, 0.025])
    error = spread / n**0.5
    p = float(ttest_1samp(values, 0.0).pvalue)
    return Effect(mean, mean - upper * error, mean - lower * error, p, detectable_mean(spread, n), n)


def detectable_mean(spread: float, n: int, *, power: float = 0.8, level: float = 0.05) -> float:
    """The mean of n differences of this standard deviation that a two-sided t test at `level` finds, with its sign
    right, with `power`."""
    critical = t.ppf(1 - level / 2, n - 1)
    # the shift of the non-central t law whose mass above the critical value is the power
    shift = brentq(lambda shift: nct.sf(critical, n - 1, shift) - power, 0.0, 2 * critical + 5)
    return float(shift * spread / n**0.5)


def holm(p: Mapping[str, float] | Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values, in the order they came in: below 5 % may all be believed at once, at 5 %.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
    """
    p = np.asarray(list(p.values()) if isinstance(p, Mapping) else p, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted
