"""Draw the figures of the comparison from the tables of `dpoviz compare`; see `tables_comparison` for statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter

from dpoviz.analysis.style import GREY, INK, TASK_COLORS, legend_above, open_axes, plain_ticks, require_columns
from dpoviz.analysis.tables_comparison import PARTS, TASKS, first_value, frontier_points, gains, parts_by_seed

GROUPS: Mapping[str, Sequence[str]] = {
    "beta(x), inverse form": ("network inverse", "calibrated inverse", "task inverse", "entropy inverse"),
    "beta(x), standard form": ("network standard", "calibrated standard", "task standard", "entropy standard"),
    "published rules": ("beta-dpo", "epsilon-dpo", "mallows", "mallows reversed", "lsc", "dual-kl", "dual-kl-task"),
}
"""The rows of `figure_frontier`: their titles and their variants."""

CONTROLS: Sequence[str] = tuple(
    f"{name}, {form}"
    for form in ("inverse", "standard")
    for name in ("frozen", "shuffled within tasks", "shuffled", "random")
)
"""The control variants: their beta has no meaning, or is frozen."""

_COLORS = ("#0A52C8", "#C4105C", "#B5880F", "#2E8B57", "#9A53C5", "#17808F", "#7A1A0C")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_KL_TICKS = (0, 0.1, 0.5, 1, 2, 4, 8, 16)
_PART_LABELS = {
    "h": r"$h$ on held-out pairs (nats)",
    "s": r"scale $s$",
    "margin": r"margin $s\cdot h$ (nats)",
    "kl": "KL to the reference (nats)",
}
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def figure_frontier(table: pd.DataFrame, *, noise: float) -> Figure:
    """Draw the reward gained over the reference against KL: a column per task, a row per group of variants.

    The KL axis is scaled as √KL. The constants are lines, one per learning rate, with a band of one standard error over
    seeds. A variant has a point per value of its swept setting, with one standard error over seeds in both directions.

    Args:
        table: the table of `gather`.
        noise: the level of label noise to show.

    Raises:
        ValueError: there is no main run at that noise.
    """
    rows = gains(table)
    rows = rows[rows["noise"] == noise]
    if rows.empty:
        raise ValueError(f"noise: got {noise}, expected one of {sorted(table['noise'].unique())}")
    groups = {title: [n for n in names if n in set(rows["contender"])] for title, names in GROUPS.items()}
    groups = {title: names for title, names in groups.items() if names}
    figure = Figure(figsize=(12.5, 0.9 + 3.1 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(TASKS), squeeze=False, sharex="col", sharey="col")
    last = len(groups) - 1
    for i, (title, names) in enumerate(groups.items()):
        for j, task in enumerate(TASKS):
            ax = plot_frontier(rows, names, task, ax=axes[i, j])
            if j > 0:
                ax.set_ylabel("")
            if i == 0:
                ax.set_title("mean of the tasks" if task == "all" else task)
            if i < last:
                ax.set_xlabel("")
        legend = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False, "fontsize": "small"}
        axes[i, -1].legend(title=title, **legend)
    return figure


def plot_frontier(rows: pd.DataFrame, names: Sequence[str], task: str, *, ax: Axes | None = None) -> Axes:
    """Draw one panel of `figure_frontier`.

    Args:
        rows: the table of `gains`, for one level of noise.
        names: the variants to draw.
        task: a task, or "all".
        ax: where to draw; None: on a new figure.
    """
    points = frontier_points(rows, task)
    ax = open_axes(ax)
    ax.axhline(0, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)), label="_reference")
    constants = points[points["contender"] == "constant"].groupby("learning_rate")
    for (rate, line), dashes in zip(constants, _DASHES, strict=False):
        start = pd.DataFrame({"kl": [0.0], "gain": [0.0], "gain_se": [0.0]})  # the reference itself
        line = pd.concat([start, line], ignore_index=True)
        label = "constant" if len(constants) == 1 else f"constant, rate {rate:g}"
        ax.plot(line["kl"], line["gain"], color=INK, linewidth=1.3, linestyle=dashes, marker=".", label=label)
        low, high = line["gain"] - line["gain_se"], line["gain"] + line["gain_se"]
        ax.fill_between(line["kl"], low, high, color=INK, alpha=0.1, linewidth=0)
    for name, color, marker in zip(names, _COLORS, _MARKERS, strict=False):
        of_name = points[points["contender"] == name]
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        style |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        errors: dict[str, Any] = {"xerr": of_name["kl_se"], "yerr": of_name["gain_se"], "elinewidth": 0.9}
        ax.errorbar(of_name["kl"], of_name["gain"], linestyle="", label=name, **errors, **style)
    # near the reference, the largest possible gain grows with √KL
    ax.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(FixedLocator(_KL_TICKS))
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.set_xlabel("KL to the reference (nats)")
    ax.set_ylabel("reward over the reference's")
    return ax


def figure_effects(effects: pd.DataFrame, *, noise: float | None = None) -> Figure:
    """Draw the reward of each variant above the constants at equal KL, by task: means and 95 % intervals over seeds.

    A dot is filled if Holm's adjusted p is below 5 %. Grey bars span the differences that were too small to detect.

    Args:
        effects: the table of `effects`.
        noise: the level of label noise to show; None: the mean over all levels.

    Raises:
        ValueError: there are missing columns, or no rows at that noise.
    """
    require_columns(effects, ["contender", "noise", "task", "mean", "low", "high", "detectable", "holm"], "effects")
    rows = effects[effects["noise"].isna() if noise is None else effects["noise"] == noise]
    require_columns(rows, ["mean"], "effects")
    known = [*(n for names in GROUPS.values() for n in names), *CONTROLS]
    names = [n for n in known if n in set(rows["contender"])] + sorted(set(rows["contender"]) - set(known))
    place = {name: -i for i, name in enumerate(names)}
    figure = Figure(figsize=(12, 1.3 + 0.27 * len(names)), layout="constrained")
    for task, ax in zip(TASKS, figure.subplots(1, len(TASKS), sharey=True), strict=True):
        open_axes(ax)
        ax.axvline(0, color=INK, linewidth=0.9)
        color = TASK_COLORS.get(task, INK)
        for row in rows[rows["task"] == task].itertuples():
            y = place[row.contender]
            ax.barh(y, 2 * row.detectable, left=-row.detectable, height=0.7, color="#E6E6E6", zorder=0.5)
            ax.plot([row.low, row.high], [y, y], color=color, linewidth=1.4)
            ax.plot(row.mean, y, "o", color=color, markersize=5, markerfacecolor=color if row.holm < 0.05 else "white")
        ax.set_title("mean of the tasks" if task == "all" else task)
        ax.set_xlabel("reward above the constants'\nat the same KL")
        ax.locator_params(axis="x", nbins=4)
        ax.set_yticks(list(place.values()), list(place))
        ax.tick_params(axis="y", length=0)
        for previous, name in pairwise(names):
            if _group(previous) != _group(name):
                ax.axhline(place[name] + 0.5, color=GREY, linewidth=0.5)
    return figure


def _group(name: str) -> str:
    return next((title for title, names in GROUPS.items() if name in names), "controls")


def figure_parts(table: pd.DataFrame, *, noise: float) -> Figure:
    """Draw h, the scale s, the margin s·h and the KL of each variant at its first value, by task.

    Args:
        table: the table of `gather`.
        noise: the level of label noise to show.
    """
    rows = table[(table["phase"] == "main") & (table["noise"] == noise)]
    require_columns(rows, ["contender", "value", *(f"{n}/{t}" for n in PARTS for t in TASKS)], "table")
    parts = parts_by_seed(rows).set_index(["part", "contender", "task"])
    known = ["constant", *(n for names in GROUPS.values() for n in names), *CONTROLS]
    names = [n for n in known if n in set(rows["contender"])]
    figure = Figure(figsize=(12, 1.3 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(PARTS), sharey=True)
    for part, ax in zip(PARTS, axes, strict=True):
        open_axes(ax)
        for i, name in enumerate(names):
            for task, color in TASK_COLORS.items():
                point = parts.loc[(part, name, task)]
                style = {"color": color, "marker": "o", "markersize": 4.5, "elinewidth": 1}
                ax.errorbar(point["mean"], -i, xerr=point["se"], label=task if i == 0 else f"_{task}", **style)
        ax.set_xlabel(_PART_LABELS[part])
        ax.set_yticks([-i for i in range(len(names))], names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", linewidth=0.3)
        if part == "s":
            ax.set_xscale("log")
            plain_ticks(ax.xaxis)
    legend_above(axes[0], ncols=3)
    return figure


def figure_betas(betas: pd.DataFrame) -> Figure:
    """Draw beta against the entropy of the reference, a panel per variant.

    Args:
        betas: the table of `gather_betas`.
    """
    require_columns(betas, ["contender", "form", "task", "ref_entropy", "beta"], "betas")
    known = [n for names in GROUPS.values() for n in names]
    names = [n for n in known if n in set(betas["contender"])]
    columns = 4
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(12, 0.5 + 2.4 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for ax in axes:
        ax.set_visible(False)
    for name, ax in zip(names, axes, strict=False):
        ax.set_visible(True)
        open_axes(ax)
        of_name = betas[betas["contender"] == name]
        for task, color in TASK_COLORS.items():
            of_task = of_name[of_name["task"] == task]
            ax.scatter(of_task["ref_entropy"], of_task["beta"], s=9, color=color, alpha=0.5, linewidths=0, label=task)
        ax.set_yscale("log")
        low, high = of_name["beta"].min(), of_name["beta"].max()
        ax.set_ylim(min(low / 1.2, high / 2), max(high * 1.2, low * 2))
        plain_ticks(ax.yaxis)
        ax.set_title(name, fontsize="medium")
        ax.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(r"entropy of the reference $H$ (nats per token)")
    figure.supylabel(r"$\beta$")
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    return figure


def figure_reliability(bins: pd.DataFrame, names: Sequence[str], *, noise: float) -> Figure:
    """Draw predicted against true preference probabilities on held-out pairs, a panel per variant.

    The prediction is σ(s·h). Each pair counts in both orders, so that it does not matter which answer is labelled
    chosen.

    Args:
        bins: the table of `gather_reliability`.
        names: the variants to draw, each at its first value.
        noise: the level of label noise to show.
    """
    require_columns(bins, ["contender", "value", "noise", "bin", "n", "predicted", "truth"], "bins")
    figure = Figure(figsize=(2.5 * len(names) + 0.6, 3.1), layout="constrained")
    for name, ax in zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True):
        open_axes(ax)
        of_name = first_value(bins[bins["noise"] == noise], name).sort_values("predicted")
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
        ax.plot(of_name["predicted"], of_name["truth"], color=INK, linewidth=1)
        ax.scatter(
            of_name["predicted"],
            of_name["truth"],
            s=120 * of_name["n"] / of_name["n"].max() + 6,
            color=INK,
            linewidths=0,
        )
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel(r"predicted, $\sigma(s\cdot h)$")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
    figure.axes[0].set_ylabel("true probability")
    return figure
