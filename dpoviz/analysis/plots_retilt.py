"""Draw the curves of a re-tilted run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpoviz.allocation import POOLED
from dpoviz.analysis.style import GREY, INK, legend_above, require_columns, task_colors, task_label
from dpoviz.analysis.text import number
from dpoviz.translation import label

_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def figure_retilt(curves: pd.DataFrame, allocation: pd.DataFrame, slopes: pd.DataFrame) -> Figure:
    """Draw reward against KL by task for each variant, and the allocations at equal KL.

    Left, a panel per variant: each dot is a factor a, with one standard error over prompts; the ring is a = 1, the
    trained policy, and the star where the allocation by slope puts the task. Right: mean reward over the evaluating
    prompts, above that of one a at the same KL, with 95 % intervals.

    Args:
        curves: variant, task, a, reward, reward_se, kl.
        allocation: variant, rule, task, a, reward, kl, gain, gain_low, gain_high.
        slopes: variant and unit; without a row in "reward", rewards are win rates to leading order.
    """
    require_columns(curves, ["variant", "task", "a", "reward", "reward_se", "kl"], "curves")
    variants = list(curves["variant"].unique())
    figure = Figure(figsize=(9.5, 3.4 * len(variants)), layout="constrained")
    panels = figure.subplots(len(variants), 2, squeeze=False, width_ratios=(1.7, 1))
    scored = "reward" in set(slopes["unit"])
    unit = label("reward − the reference's") if scored else label("win rate − ½, to leading order")
    for variant, (left, right) in zip(variants, panels, strict=True):
        own = allocation[allocation["variant"] == variant]
        _curves(left, curves[curves["variant"] == variant], own)
        left.set(xlabel=label("KL(π_a‖π_ref), nats per answer (root scale)"))
        left.set(ylabel=f"{label(str(variant))}:\n{unit}")
        most = 1.05 * float(curves.loc[curves["variant"] == variant, "kl"].max())
        left.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))  # about linear in a
        left.set_xlim(0, most)
        ticks = [tick for tick in _TICKS if most / 60 < tick < most]
        left.set_xticks([0, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        _gains(right, own)
    return figure


def _curves(ax: Axes, curves: pd.DataFrame, allocation: pd.DataFrame) -> None:
    stars = allocation[(allocation["rule"] == "by slope") & (allocation["task"] != POOLED)].set_index("task")
    for task, color in task_colors(curves["task"]).items():
        rows = curves[curves["task"] == task].sort_values("a")
        start = rows["reward"].iloc[0]
        style: dict[str, Any] = {"color": color, "markersize": 4, "linewidth": 1.4}
        ax.errorbar(rows["kl"], rows["reward"] - start, rows["reward_se"], fmt="o-", elinewidth=0.8, capsize=0,
                    label=task_label(task), **style)  # fmt: skip
        at_one = rows[rows["a"] == 1]
        ax.plot(at_one["kl"], at_one["reward"] - start, "o", markersize=10, mfc="none", mec=color)
        if task in stars.index:
            # on the line through all prompts, at the allocation's a
            ax.plot(_along(rows, stars["a"][task], "kl"), _along(rows, stars["a"][task], "reward") - start, "*",
                    markersize=13, color=color, markeredgecolor="white")  # fmt: skip
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.plot([], [], "o", markersize=9, mfc="none", mec=INK, label="a = 1")
    if len(stars):
        ax.plot([], [], "*", markersize=11, color=INK, label=label("by slope"))
    legend_above(ax, 5)


def _along(rows: pd.DataFrame, a: float, column: str) -> float:
    return float(np.interp(a, rows["a"], rows[column]))


def _gains(ax: Axes, allocation: pd.DataFrame) -> None:
    rows = allocation[(allocation["task"] == POOLED) & allocation["gain"].notna()]
    kl = allocation.loc[allocation["task"] == POOLED, "kl"].iloc[0]
    ax.axvline(0, color=GREY, linewidth=0.8)
    for place, row in enumerate(rows.itertuples()):
        ax.plot([row.gain_low, row.gain_high], [place, place], color=INK, linewidth=1.4)
        ax.plot(row.gain, place, "o", color=INK)
    ax.set_yticks(range(len(rows)), [label(rule) for rule in rows["rule"]])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label("above one a, at {kl} nats of mean KL", kl=number(kl)))
    ax.locator_params(axis="x", nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
