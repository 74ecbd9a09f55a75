"""What β(x) gained in a run, and what any β could have: reward per nat in win rates, from held-out pairs alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from dpoviz.allocation import POOLED, gain_bound, reward_per_nat_of_pairs
from dpoviz.analysis.statistics import percentile_interval
from dpoviz.analysis.style import require_columns
from dpoviz.analysis.tables import in_order
from dpoviz.analysis.text import fixed, number
from dpoviz.translation import key, say

ONE, BY_SLOPE, SHUFFLED = "one a", key("by slope"), key("shuffled")
"""Allocations of a re-tilted run: one a for all tasks; a ∝ max(b, 0); the same in each wrong order of the tasks."""

BEST_ONE, BEST = key("best one a"), key("best by task")
"""Allocations that earn most on the curves of the choosing half, at no more KL than "one a"."""


class Gain(NamedTuple):
    """The section of a report.

    Attributes:
        slopes: a row per variant and task, and one per variant over all tasks: variant, and the columns of
            `reward_per_nat_of_pairs`.
        sentences: what any β by task could gain, and what this run's β(x) gained.
    """

    slopes: pd.DataFrame
    sentences: list[str]


def gain_of_run(scores: pd.DataFrame, table: pd.DataFrame | None, *, baseline: str | None) -> Gain | None:
    """Return the reward per nat of a run by task, and its gain beside the bound, in win rates.

    Without a baseline, no policy was trained with one constant. What β(x) gained is then given between two ends: the
    policy has fitted its logits s·h (h ∝ 1/s), or has hardly begun (h ∝ s).

    Args:
        scores: a row per variant and held-out pair: variant, task, group, prompt, h (nats).
        table: the table of `beta_table`, or None.
        baseline: the variant that was trained with one constant beta, or None.

    Returns:
        None if in some task h does not vary or there is a single prompt.
    """
    require_columns(scores, ["variant", "task", "group", "prompt", "h"], "scores")
    scores = scores.assign(unit=scores["group"].where(scores["group"].notna(), scores["prompt"]))
    # one group may hold prompts of several tasks, the same number in each is then another prompt
    scores["unit"] = scores["task"] + "\n" + scores["unit"].astype(str)
    groups = scores.groupby(["variant", "task"])
    if (groups["unit"].nunique() < 2).any() or not (groups["h"].agg(lambda h: (h**2).sum()) > 0).all():
        return None
    parts = {}
    for variant, rows in scores.groupby("variant", sort=False):
        found = reward_per_nat_of_pairs(rows["h"], task=rows["task"], prompt=rows["unit"])
        order = [*in_order(rows["task"]), POOLED]
        parts[variant] = found.set_index("task").loc[order].reset_index()
    slopes = pd.concat([part.assign(variant=name) for name, part in parts.items()], ignore_index=True)
    slopes = slopes[["variant", *slopes.columns.drop("variant")]]
    if baseline in parts:
        sentences = _beside_baseline(scores, parts[baseline], str(baseline))
    else:
        sentences = [line for name, part in parts.items() for line in _alone(scores, table, part, str(name))]
    return Gain(slopes, [*sentences, say(_MEANING)])


_MEANING = key(
    "These gains are in win rate against the reference, to leading order in KL: a policy with log-ratios h, re-tilted "
    "to a small mean KL ε, is preferred to it with probability ½ + ½·√ε·E[h]/√E[h²], so gains at equal KL are ratios "
    "of E[h]/√E[h²]. The bound is for one factor per task on a policy as it is: a β(x) that varies within tasks, or "
    "changes what is learned, may pass it. At a KL of tenths of a nat or more curves bend, and both may be far off: "
    "dpoviz retilt measures them. Intervals are 95 % bootstraps over groups of held-out pairs; they cover no "
    "other training."
)


def _beside_baseline(scores: pd.DataFrame, slopes: pd.DataFrame, baseline: str) -> list[str]:
    wide, bound = _by_variant(scores), gain_bound(slopes)
    gained = []
    for variant in wide.columns.drop(baseline):
        found = relative_gain(wide[variant], wide[baseline], _unit(scores))
        if found is None:
            who = say("the {baseline} β", baseline=say(baseline))
            return [say("To leading order in KL, {bound}.", bound=bound), _nothing(who)]
        gained.append(say("{gain} with the {variant} β(x)", gain=_percent(found), variant=say(variant)))
    return [
        say(
            "To leading order in KL, {bound}; this run gained {gained}.",
            bound=bound,
            gained=f" {say('and')} ".join(gained),
        )
    ]


def _alone(scores: pd.DataFrame, table: pd.DataFrame | None, slopes: pd.DataFrame, variant: str) -> list[str]:
    rows = scores[scores["variant"] == variant].reset_index(drop=True)
    form, bound = say(variant), gain_bound(slopes)
    alone = say("{form} form: to leading order in KL, {bound}.", form=form, bound=bound)
    own = None if table is None else table[table["form"] == variant].drop_duplicates(["task", "prompt"])
    if own is None or own.empty:
        return [alone]
    s = rows[["task", "prompt"]].merge(own[["task", "prompt", "scale"]], how="left", on=["task", "prompt"])["scale"]
    fitted, begun = (relative_gain(rows["h"], other, rows["unit"]) for other in (s * rows["h"], rows["h"] / s))
    if fitted is None or begun is None:
        return [alone, say("{form} form: {finding}", form=form, finding=_nothing(say("this policy")))]
    return [
        say(
            "{form} form: to leading order in KL, {bound}. This run trained none with one constant. Its β(x) gained "
            "{fitted} if the policy has fitted its logits, so that one constant would have left s·h as it is, and "
            "{begun} if h has only begun to grow, in proportion to s; the mean of |s·h| is {size} nats.",
            form=form,
            bound=bound,
            fitted=_percent(fitted),
            begun=_percent(begun),
            size=number(float((s * rows["h"]).abs().mean())),
        )
    ]


def _nothing(who: str) -> str:
    return say(
        "On the held-out pairs {who} does not gain significantly over the reference (E[h] ≤ 0 in more than 2.5 % of "
        "resamples), so that there is nothing of which β(x) could gain a percentage.",
        who=who,
    )


def _by_variant(scores: pd.DataFrame) -> pd.DataFrame:
    parts = {name: rows["h"].reset_index(drop=True) for name, rows in scores.groupby("variant", sort=False)}
    return pd.DataFrame(parts)


def _unit(scores: pd.DataFrame) -> pd.Series:
    first = scores["variant"].iloc[0]
    return scores.loc[scores["variant"] == first, "unit"].reset_index(drop=True)


def relative_gain(
    h: pd.Series, other: pd.Series, group: pd.Series, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float] | None:
    """Return what log-ratios h gain over others in win rate at equal small KL, with its 95 % interval; 0.1 is 10 %.

        (E[h]/√E[h²]) / (E[h']/√E[h'²]) − 1

    Args:
        h: (N,) h of each held-out pair, nats.
        other: (N,) h' of the same pairs.
        group: (N,) pairs of the same group are resampled together.
        resamples: number of bootstrap resamples, paired.
        seed: random seed.

    Returns:
        None if E[h'] is not above 0 in 97.5 % of the resamples.
    """
    number_of = group.astype("category").cat.codes.to_numpy()
    columns = np.stack([h, h**2, other, other**2])
    sums = np.stack([np.bincount(number_of, weights=column) for column in columns], axis=1)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples) @ sums

    def gain(total: np.ndarray) -> np.ndarray:
        return total[..., 0] / np.sqrt(total[..., 1]) / (total[..., 2] / np.sqrt(total[..., 3])) - 1

    if (drawn[:, 2] <= 0).mean() > 0.025 or sums[:, 2].sum() <= 0:
        return None
    low, high = percentile_interval(gain(drawn[drawn[:, 2] > 0]))
    return float(gain(sums.sum(0))), low, high


def _percent(found: tuple[float, float, float]) -> str:
    value, low, high = (f"{fixed(100 * x, 1, sign=True)} %" for x in found)
    return f"{value} [{low}, {high}]"


def reading_of_retilt(slopes: pd.DataFrame, allocation: pd.DataFrame) -> list[str]:
    """Return the results of re-tilting a run in sentences, three per variant.

    Args:
        slopes: retilt_slopes.csv: variant, unit, half, and the columns of `reward_per_nat`.
        allocation: retilt_allocation.csv, the output of `allocations_on`, by variant.
    """
    unit = key("reward") if "reward" in set(slopes["unit"]) else key("win rate")
    found = []
    for variant, own in allocation.groupby("variant", sort=False):
        table = slopes[(slopes["variant"] == variant) & (slopes["unit"] == unit) & (slopes["half"] == "all")]
        parts = [
            say(
                "{slope} [{low}, {high}] for {task}",
                slope=number(row.slope),
                low=number(row.low),
                high=number(row.high),
                task=row.task,
            )
            for row in table[table["task"] != POOLED].itertuples()
        ]
        found += [
            say(
                "{variant}, re-tilted: {unit} per nat, from {source}, is {slopes}. To leading order in KL, {bound}.",
                variant=say(str(variant)),
                unit=say(unit),
                source=say("scored answers of the reference") if unit == "reward" else say("held-out pairs"),
                slopes=say(", ").join(parts),
                bound=gain_bound(table),
            ),
            _allocations(str(variant), own, unit),
        ]
    return found


def _allocations(variant: str, allocation: pd.DataFrame, unit: str) -> str:
    pooled = allocation[allocation["task"] == POOLED].set_index("rule")
    one = pooled.loc[ONE]
    text = say(
        "{variant}, re-tilted: at {kl} nats of mean KL one a for all tasks, {a}, {earns} {earned} over the "
        "reference, measured on half of the prompts",
        variant=say(variant),
        kl=number(one["kl"]),
        a=number(one["a"]),
        earns=say("earns") if unit == "reward" else say("earns, to leading order,"),
        earned=_signed(one, "earned"),
    )
    if BY_SLOPE in pooled.index:
        text += say(
            ". Beside it, at the same KL, factors in proportion to the slopes of the other half ({factors}) earn "
            "{gain}",
            factors=_factors(allocation, BY_SLOPE),
            gain=_signed(pooled.loc[BY_SLOPE], "gain"),
        )
    else:
        text += say(". The slopes of the other half are not positive in any task: they advise to stay at the reference")
    if SHUFFLED in pooled.index:
        text += say("; in the wrong order, {gain}", gain=_signed(pooled.loc[SHUFFLED], "gain"))
    for rule in (BEST_ONE, BEST):
        if rule in pooled.index:
            a = number(allocation.loc[allocation["rule"] == rule, "a"].iloc[0])
            by_task = say("a by task ({factors})", factors=_factors(allocation, rule))
            text += say(
                ". The {shown} that was best on the curves of the other half at no more KL earns {gain} beside it, at "
                "{kl} nats",
                shown=say("one a, {a},", a=a) if rule == BEST_ONE else by_task,
                gain=_signed(pooled.loc[rule], "gain"),
                kl=number(pooled.loc[rule, "kl"]),
            )
    return say("{text}.", text=text)


def _factors(allocation: pd.DataFrame, rule: str) -> str:
    rows = allocation[(allocation["rule"] == rule) & (allocation["task"] != POOLED)]
    return say(", ").join(say("{a} for {task}", a=number(row.a), task=row.task) for row in rows.itertuples())


def _signed(row: pd.Series, name: str) -> str:
    value, low, high = (fixed(row[f"{name}{end}"], 4, sign=True) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"
