"""What re-tilting a run shows: curves, slopes, the bound, and allocations measured on prompts that chose none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dpoviz.allocation import POOLED, reward_per_nat, reward_per_nat_of_pairs
from dpoviz.analysis.gain import BEST, BEST_ONE, BY_SLOPE, ONE, SHUFFLED, reading_of_retilt
from dpoviz.analysis.plots_retilt import figure_retilt
from dpoviz.analysis.statistics import percentile_interval
from dpoviz.analysis.tables import in_order, write_table
from dpoviz.experiments.retilt import HALVES
from dpoviz.experiments.retilt_config import RetiltConfig
from dpoviz.lm.retilt import Line, reach, reward_kl_curves

RESAMPLES = 500


class Retilted(NamedTuple):
    """The tables of a re-tilted run.

    Attributes:
        curves: a row per variant, task and a: reward and KL with standard errors (`reward_kl_curves`).
        slopes: a row per variant, unit ("reward" or "win rate"), half ("choose" or "all") and task (`reward_per_nat`).
        allocation: a row per variant, rule and task, and one over all tasks: a, reward and kl on the evaluating half,
            gain over one a at equal KL with its interval.
        sentences: the results in sentences.
    """

    curves: pd.DataFrame
    slopes: pd.DataFrame
    allocation: pd.DataFrame
    sentences: list[str]


def analyse(rows: pd.DataFrame, scores: pd.DataFrame, config: RetiltConfig, *, scored: bool) -> Retilted:
    """Return the tables and sentences of a sweep.

    Args:
        rows: output of `dpoviz.experiments.retilt.sweep`.
        scores: the run's held_out.csv.
        config: the settings.
        scored: whether the answers have a reward; else rewards are win rates to leading order.
    """
    curves: list[pd.DataFrame] = []
    slopes: list[pd.DataFrame] = []
    allocations: list[pd.DataFrame] = []
    for variant, own in rows.groupby("variant", sort=False):
        table = _slopes(own, scores[scores["variant"] == variant], config.seed, scored=scored)
        chosen = table[(table["unit"] == ("reward" if scored else "win rate")) & (table["half"] == HALVES[0])]
        first, second = (own[own["half"] == half] for half in HALVES)
        allocation = allocations_on(second, chosen, first, kl=config.kl, seed=config.seed)
        for found, part in ((curves, reward_kl_curves(own)), (slopes, table), (allocations, allocation)):
            found.append(part.assign(variant=variant)[["variant", *part.columns]])
    by_curve, by_slope, by_rule = (pd.concat(parts, ignore_index=True) for parts in (curves, slopes, allocations))
    return Retilted(by_curve, by_slope, by_rule, reading_of_retilt(by_slope, by_rule))


def _slopes(rows: pd.DataFrame, scores: pd.DataFrame, seed: int, *, scored: bool) -> pd.DataFrame:
    """Return the slopes of one variant: in reward at a = 0, and in win rates of its held-out pairs."""
    found = []
    if scored:
        start = rows[rows["a"] == 0]
        for half, own in ((HALVES[0], start[start["half"] == HALVES[0]]), ("all", start)):
            table = reward_per_nat(own["h"], own["reward"], prompt=own["prompt"], task=own["task"], seed=seed)
            found.append(table.assign(unit="reward", half=half))
    halves = rows.drop_duplicates(["task", "prompt"])[["task", "prompt", "half", "group"]]
    pairs = scores.drop(columns="group").merge(halves, on=["task", "prompt"])
    for half, own in ((HALVES[0], pairs[pairs["half"] == HALVES[0]]), ("all", pairs)):
        table = reward_per_nat_of_pairs(own["h"], task=own["task"], prompt=own["group"], seed=seed)
        found.append(table.assign(unit="win rate", half=half))
    columns = ["unit", "half", *found[0].columns.drop(["unit", "half"])]
    return pd.concat(found, ignore_index=True)[columns]


class _Half(NamedTuple):
    """The evaluating half of one task: (prompts, factors) means over answers, and the group of each prompt."""

    reward: np.ndarray
    kl: np.ndarray
    group: np.ndarray


def allocations_on(
    rows: pd.DataFrame,
    slopes: pd.DataFrame,
    choosing: pd.DataFrame,
    *,
    kl: float | None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Compare allocations over tasks at equal KL on prompts that did not choose them.

    Every allocation is scaled until its mean KL on these prompts is the same; a task that would go beyond the end of
    the sweep stays there. "by slope" has a ∝ max(b, 0) for the given slopes, "one a" the same a for all tasks, and
    "shuffled" is the mean over the orders in which each task has another task's slope. Slopes at the reference lead
    astray where a curve bends. "best one a" and "best by task" therefore have the factors of the sweep that earn most
    on the curves of the choosing prompts, at a mean KL there of at most the budget; these are not scaled.

    Args:
        rows: the answers of one variant to the evaluating prompts: a, task, prompt, group, reward, kl.
        slopes: table of `reward_per_nat` from other prompts.
        choosing: the answers to those prompts, as `rows`.
        kl: mean KL at which to compare, nats; None: that at a = 1.
        seed: seed of the resamples.
        resamples: bootstrap resamples of the evaluating groups of prompts.

    Returns:
        A row per rule and task, and one over all tasks: rule, task, slope, a, reward, kl, gain (reward above that of
        "one a"), gain_low, gain_high, earned (reward of "one a" above that of a = 0) and earned_low, earned_high; nan
        where a column does not apply. Means over all tasks weigh every prompt equally. The intervals are 95 %
        bootstraps over these prompts, with the allocation held fixed; nan if a task has a single group. There is no row
        "by slope" if no slope is positive, and none "shuffled" if there is one task.

    Raises:
        ValueError: the budget lies beyond the end of the sweep.
    """
    order = in_order(rows["task"])
    factors = np.sort(rows["a"].unique())
    halves = {task: _half(rows[rows["task"] == task], factors) for task in order}
    weights = [float(len(half.group)) for half in halves.values()]
    full = _lines(halves, factors, [np.ones(len(half.group)) for half in halves.values()])
    budget = (
        float(np.average([np.interp(1.0, factors, line.kl) for line in full], weights=weights)) if kl is None else kl
    )
    slope = dict(zip(slopes["task"], slopes["slope"], strict=True))
    directions = _directions([slope[task] for task in order])

    others = {task: _half(choosing[choosing["task"] == task], factors) for task in order}
    fixed = _best(_lines(others, factors, [np.ones(len(half.group)) for half in others.values()]), weights, budget)

    def measure(lines: list[Line]) -> dict[str, list[tuple[float, float, float]]]:
        scaled = {
            rule: [reach(lines, one, budget, weights=weights, cap=True) for one in some]
            for rule, some in directions.items()
        }
        return scaled | {rule: [(1.0, *_mean_at(lines, a, weights))] for rule, a in fixed.items()}

    def at_start(lines: list[Line]) -> float:
        return float(np.average([line.reward[0] for line in lines], weights=weights))

    found = measure(full)
    rng = np.random.default_rng(seed)
    gains: dict[str, list[float]] = {rule: [] for rule in found}
    earned = []
    several = min(len(np.unique(half.group)) for half in halves.values()) > 1
    for _ in range(resamples if several else 0):
        lines = _lines(halves, factors, [_drawn(half.group, rng) for half in halves.values()])
        try:
            again = measure(lines)
        except ValueError:  # these prompts do not reach the budget
            continue
        base = again[ONE][0][1]
        earned.append(base - at_start(lines))
        for rule, some in again.items():
            gains[rule].append(float(np.mean([reward for _, reward, _ in some])) - base)
    base = found[ONE][0][1]
    table = []
    for rule, some in found.items():
        multiple, (reward, spent) = some[0][0], np.mean(some, axis=0)[1:]
        low, high = percentile_interval(np.array(gains[rule]))
        row = {"rule": rule, "task": POOLED, "slope": np.nan, "a": np.nan, "reward": reward, "kl": spent}
        row |= {"gain": reward - base, "gain_low": low, "gain_high": high} if rule != ONE else {}
        if rule == ONE:
            low, high = percentile_interval(np.array(earned))
            row |= {"a": multiple, "earned": base - at_start(full), "earned_low": low, "earned_high": high}
        if rule != SHUFFLED:
            for task, line, own in zip(order, full, fixed.get(rule, directions.get(rule, [()])[0]), strict=True):
                a = min(multiple * own, factors[-1])
                at = {name: float(np.interp(a, line.a, getattr(line, name))) for name in ("reward", "kl")}
                table.append({"rule": rule, "task": task, "slope": slope[task], "a": a, **at})
        table.append(row)
    columns = ["rule", "task", "slope", "a", "reward", "kl"]
    columns += [f"{name}{end}" for name in ("gain", "earned") for end in ("", "_low", "_high")]
    return pd.DataFrame(table).reindex(columns=columns)


def _half(rows: pd.DataFrame, factors: np.ndarray) -> _Half:
    means = rows.groupby(["prompt", "a"], sort=False)[["reward", "kl"]].mean().unstack("a")
    group = rows.drop_duplicates("prompt").set_index("prompt")["group"][means.index]
    return _Half(means["reward"][factors].to_numpy(), means["kl"][factors].to_numpy(), group.to_numpy())


def _drawn(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how often each prompt occurs in a resample of the groups."""
    names, place = np.unique(group, return_inverse=True)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[place]


def _lines(halves: Mapping[str, _Half], factors: np.ndarray, weights: Sequence[np.ndarray]) -> list[Line]:
    found = []
    for half, weight in zip(halves.values(), weights, strict=True):
        share = weight / weight.sum()
        found.append(Line(factors, share @ half.reward, share @ half.kl))
    return found


def _mean_at(lines: Sequence[Line], a: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return mean reward and KL at a factor per task."""
    values = [
        [np.interp(own, line.a, column) for column in (line.reward, line.kl)]
        for own, line in zip(a, lines, strict=True)
    ]
    reward, kl = np.average(values, axis=0, weights=weights)
    return float(reward), float(kl)


def _best(lines: Sequence[Line], weights: Sequence[float], budget: float) -> dict[str, tuple[float, ...]]:
    """Return the factors of the sweep that earn most at a mean KL of at most the budget, for all tasks and by task."""
    a = lines[0].a
    reward, kl = (np.stack([getattr(line, name) for line in lines]) for name in ("reward", "kl"))
    within = np.average(kl, axis=0, weights=weights) <= budget * (1 + 1e-9)
    one = a[np.argmax(np.where(within, np.average(reward, axis=0, weights=weights), -np.inf))]
    found = {BEST_ONE: (float(one),) * len(lines)}
    if len(lines) == 1:
        return found
    # at every price of KL each task chooses for itself: the best for what they spend together
    prices = np.append(0.0, np.geomspace(1e-4, 1e4, 400) * max(np.ptp(reward), 1e-9))
    for price in prices:
        at = np.argmax(reward - price * kl, axis=1)
        if np.average(kl[np.arange(len(lines)), at], weights=weights) <= budget:
            break
    return {**found, BEST: tuple(float(factor) for factor in a[at])}


def _directions(slopes: Iterable[float]) -> dict[str, list[tuple[float, ...]]]:
    """Return the directions of each rule, a number per task."""
    positive = tuple(max(b, 0.0) for b in slopes)
    found = {ONE: [(1.0,) * len(positive)]}
    if not any(positive):
        return found
    found[BY_SLOPE] = [positive]
    # up to 8! orders would be drawn otherwise
    places = itertools.islice(itertools.permutations(range(len(positive))), 5040)
    moved = [tuple(positive[i] for i in order) for order in places if all(i != j for i, j in enumerate(order))]
    if moved:
        found[SHUFFLED] = moved
    return found


def write_retilt(folder: Path, rows: pd.DataFrame, found: Retilted, settings: Mapping[str, object]) -> None:
    """Write the tables, the picture and the settings into the run's folder."""
    columns = ["variant", "a", "task", "group", "prompt", "half"]
    write_table(rows[[*columns, *rows.columns.drop(columns)]], folder / "retilt.csv")
    for name in ("curves", "slopes", "allocation"):
        write_table(getattr(found, name), folder / f"retilt_{name}.csv")
    figure_retilt(found.curves, found.allocation, found.slopes).savefig(folder / "retilt.png", dpi=150)
    (folder / "retilt.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
