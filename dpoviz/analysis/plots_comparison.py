"""Draw the figures of the comparison from the tables of `dpoviz compare`."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dpoviz.analysis.style import GREY, INK, TASK_COLORS, open_axes, require_columns

_BUDGET_COLORS = ("#9BBBE8", "#3C7FD6", "#0B2F6B")
_SPECIAL = ("oracle", "ideal")


def figure_contrasts(contrasts: pd.DataFrame) -> Figure:
    """Draw the reward of each contender above the constant at equal KL: a panel per condition.

    Points are means over worlds, bars 95 % paired t intervals, colours the KL budgets. A point is filled if Holm's
    adjusted p is below 5 %, and for the oracle, which is not tested.

    Args:
        contrasts: the table of `contrasts`: condition, budget, contender, mean, low, high, holm.
    """
    require_columns(contrasts, ["condition", "budget", "contender", "mean", "low", "high", "holm"], "contrasts")
    rows = contrasts[contrasts["contender"] != "ideal"]
    names = list(dict.fromkeys(rows["contender"]))
    names = [*(n for n in names if n in _SPECIAL), *(n for n in names if n not in _SPECIAL)]
    conditions, budgets = list(dict.fromkeys(rows["condition"])), sorted(set(rows["budget"]))
    figure = Figure(figsize=(12, 1.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    for condition, ax in zip(conditions, axes, strict=True):
        open_axes(ax)
        ax.axvline(0, color=INK, linewidth=0.9)
        for budget, color, shift in zip(budgets, _BUDGET_COLORS, (0.22, 0.0, -0.22), strict=False):
            own = rows[(rows["condition"] == condition) & (rows["budget"] == budget)].set_index("contender")
            for i, name in enumerate(names):
                if name not in own.index:
                    continue
                row, y = own.loc[name], shift - i
                ax.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.3)
                filled = name in _SPECIAL or row["holm"] < 0.05
                ax.plot(row["mean"], y, "o", color=color, markersize=5, markerfacecolor=color if filled else "white")
        ax.set_title(condition)
        ax.set_xlabel("reward above the constant\nat the same KL")
        ax.locator_params(axis="x", nbins=4)
        ax.set_yticks([-i for i in range(len(names))], names)
        ax.tick_params(axis="y", length=0)
        for i in range(len(names) - 1):
            ax.axhline(-i - 0.5, color=GREY, linewidth=0.2)
    for budget, color in zip(budgets, _BUDGET_COLORS, strict=False):
        axes[0].plot([], [], "o-", color=color, markersize=5, label=f"KL {budget:g} nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def figure_levels(table: pd.DataFrame) -> Figure:
    """Draw the reward gained over the reference against KL: one constant, the oracle per task, and any policy.

    Points are means over worlds with one standard error. The KL axis is scaled as √KL, in which a small step of the
    best policy is a straight line.

    Args:
        table: the main rows of `gather`: condition, world, contender, budget, task, gain.
    """
    require_columns(table, ["condition", "contender", "budget", "task", "gain"], "table")
    rows = table[table["task"] == "all"]
    conditions = list(dict.fromkeys(rows["condition"]))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    lines = {"ideal": ("any policy", GREY, "^"), "oracle": ("best factor per task", "#C4105C", "D"),
             "constant": ("one constant", INK, "o")}  # fmt: skip
    for condition, ax in zip(conditions, axes, strict=True):
        open_axes(ax)
        for name, (label, color, marker) in lines.items():
            gains = rows[(rows["condition"] == condition) & (rows["contender"] == name)].groupby("budget")["gain"]
            kl, means, errors = np.sqrt(list(gains.groups)), gains.mean().to_numpy(), gains.sem().to_numpy()
            ax.errorbar([0, *kl], [0, *means], yerr=[0, *errors], color=color, marker=marker, markersize=5,
                        linewidth=1.3, elinewidth=1, label=label)  # fmt: skip
        budgets = sorted(set(rows["budget"]))
        ax.set_xticks([0, *np.sqrt(budgets)], ["0", *(f"{budget:g}" for budget in budgets)])
        ax.set_xlabel("KL to the reference (nats)")
        ax.set_title(condition)
    axes[0].set_ylabel("reward over the reference's")
    axes[0].legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def figure_by_margin(contrasts: pd.DataFrame, margins: pd.Series, contenders: Sequence[str]) -> Figure:
    """Draw the reward of contenders above the constant by how far training has gone: a panel per budget.

    Points are means over worlds, bars 95 % paired t intervals; the conditions stand in the order of their margins.

    Args:
        contrasts: the table of `contrasts`: condition, budget, contender, mean, low, high.
        margins: the mean margin s·h at the end of training with the constant, nats, by condition.
        contenders: the contenders to draw, two at most.
    """
    require_columns(contrasts, ["condition", "budget", "contender", "mean", "low", "high"], "contrasts")
    rows = contrasts[contrasts["condition"].isin(margins.index)]
    order = margins.sort_values()
    budgets = sorted(set(rows["budget"]))
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, len(budgets), squeeze=False)[0]
    for budget, ax in zip(budgets, axes, strict=True):
        open_axes(ax)
        ax.axhline(0, color=INK, linewidth=0.9)
        for contender, color, shift in zip(contenders, ("#C4105C", "#3C7FD6"), (-0.08, 0.08), strict=False):
            own = rows[(rows["budget"] == budget) & (rows["contender"] == contender)].set_index("condition")
            own = own.loc[order.index]
            errors = own["mean"] - own["low"], own["high"] - own["mean"]
            ax.errorbar(np.arange(len(own)) + shift, own["mean"], yerr=errors, color=color, marker="o", markersize=5,
                        linewidth=1.2, label=contender)  # fmt: skip
        ax.set_xticks(range(len(order)), [f"{margin:.2f}\n{fill(name, 9)}" for name, margin in order.items()])
        ax.tick_params(axis="x", labelsize="small")
        ax.set_title(f"KL {budget:g} nats")
        ax.set_xlabel("mean margin s·h of the constant (nats)")
    axes[0].set_ylabel("reward above the constant")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def figure_kl_by_task(table: pd.DataFrame, *, budget: float) -> Figure:
    """Draw where the KL budget goes: the KL of each task, by contender, a panel per condition.

    Args:
        table: the main rows of `gather`: condition, contender, budget, task, kl.
        budget: the mean KL, nats.

    Raises:
        ValueError: no row has this budget.
    """
    require_columns(table, ["condition", "contender", "budget", "task", "kl"], "table")
    rows = table[(table["budget"] == budget) & (table["task"] != "all")]
    if rows.empty:
        raise ValueError(f"budget: got {budget}, expected one of {sorted(set(table['budget']))}")
    names = [name for name in dict.fromkeys(rows["contender"]) if name != "1/b shuffled"]
    conditions = list(dict.fromkeys(rows["condition"]))
    figure = Figure(figsize=(12, 1.5 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    for condition, ax in zip(conditions, axes, strict=True):
        open_axes(ax)
        means = rows[rows["condition"] == condition].groupby(["contender", "task"])["kl"].mean()
        for task, color in TASK_COLORS.items():
            known = [(i, means[name, task]) for i, name in enumerate(names) if (name, task) in means.index]
            ax.plot([kl for _, kl in known], [-i for i, _ in known], "o", color=color, markersize=5, label=task)
        ax.axvline(budget, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        ax.set_xlim(left=0)
        ax.set_title(condition)
        ax.set_xlabel("KL to the reference (nats)")
        ax.set_yticks([-i for i in range(len(names))], names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", linewidth=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure
