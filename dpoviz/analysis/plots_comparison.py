r"""Pictures of the comparison: the tables of `dpoviz.compare` in, a figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter

from dpoviz.analysis.plots import TASK_COLORS, _axes, _legend_above, _plain_ticks, _require

GROUPS: Mapping[str, Sequence[str]] = {
    "beta(x), inverse form": ("network inverse", "calibrated inverse", "task inverse", "entropy inverse"),
    "beta(x), standard form": ("network standard", "calibrated standard", "task standard", "entropy standard"),
    "published rules": ("beta-dpo", "epsilon-dpo", "mallows", "mallows reversed", "lsc", "dual-kl", "dual-kl-task"),
}
"""The contenders of a row of `figure_frontier`, and its title."""

CONTROLS: Sequence[str] = tuple(
    f"{name}, {form}" for form in ("inverse", "standard") for name in ("frozen", "shuffled within tasks", "shuffled",
                                                                       "random")
)  # fmt: skip

_COLORS = ("#0A52C8", "#C4105C", "#B5880F", "#2E8B57", "#9A53C5", "#17808F", "#7A1A0C")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_KL_TICKS = (0, 0.1, 0.5, 1, 2, 4, 8, 16)
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_INK, _GREY = "#222222", "#5A5A5A"
_TASKS = (*TASK_COLORS, "all")


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """The main runs with reward minus that of their world's reference: a column gain/<task> for each task and "all"."""
    _require(table, ["phase", "contender", "noise", "seed", "value", *(f"reward/{t}" for t in _TASKS)], "table")
    starts = table[(table["phase"] == "reference") & (table["seed"] < 1000)].set_index("seed")
    main = table[table["phase"] == "main"].copy()
    for task in _TASKS:
        main[f"gain/{task}"] = main[f"reward/{task}"] - main["seed"].map(starts[f"reward/{task}"])
    return main


def figure_frontier(table: pd.DataFrame, *, noise: float) -> Figure:
    """Reward gained over the reference against KL, a column per task, a row per group of contenders.

    The KL is on the scale of its root. The constants are the lines, one for each learning rate, with the band of one
    standard error over seeds; a contender's points are the values of what is swept of it, with one standard error both
    ways.

    Args:
        table: what `compare.gather` returned.
        noise: the level of label noise that is shown.

    Raises:
        ValueError: no main run at that noise.
    """
    rows = gains(table)
    rows = rows[rows["noise"] == noise]
    if rows.empty:
        raise ValueError(f"noise: got {noise}, expected one of {sorted(table['noise'].unique())}")
    groups = {title: [n for n in names if n in set(rows["contender"])] for title, names in GROUPS.items()}
    groups = {title: names for title, names in groups.items() if names}
    figure = Figure(figsize=(12.5, 0.9 + 3.1 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(_TASKS), squeeze=False, sharex="col", sharey="col")
    last = len(groups) - 1
    for i, (title, names) in enumerate(groups.items()):
        for j, task in enumerate(_TASKS):
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
    """One panel of `figure_frontier`.

    Args:
        rows: what `gains` returned, of one level of noise.
        names: contenders.
        task: a task, or "all".
        ax: where to draw; a new figure if None.
    """
    ax = _axes(ax)
    ax.axhline(0, color=_GREY, linewidth=0.7, linestyle=(0, (1, 2)), label="_reference")

    def points(some: pd.DataFrame) -> pd.DataFrame:
        own = some.groupby("value")[[f"kl/{task}", f"gain/{task}"]]
        found = own.mean().join(own.sem().fillna(0.0).add_suffix("_se"))
        found.columns = ["kl", "gain", "kl_se", "gain_se"]
        return found.sort_values("kl")

    constants = rows[rows["contender"] == "constant"]
    rates = sorted(constants["learning_rate"].unique())
    for rate, dashes in zip(rates, _DASHES, strict=False):
        line = np.vstack([[0, 0, 0, 0], points(constants[constants["learning_rate"] == rate]).to_numpy()])
        label = "constant" if len(rates) == 1 else f"constant, rate {rate:g}"
        ax.plot(line[:, 0], line[:, 1], color=_INK, linewidth=1.3, linestyle=dashes, marker=".", label=label)
        ax.fill_between(
            line[:, 0], line[:, 1] - line[:, 3], line[:, 1] + line[:, 3], color=_INK, alpha=0.1, linewidth=0
        )
    for i, name in enumerate(names):
        own = points(rows[rows["contender"] == name])
        ax.errorbar(
            own["kl"], own["gain"], xerr=own["kl_se"], yerr=own["gain_se"], color=_COLORS[i], marker=_MARKERS[i],
            markersize=5, markeredgecolor="white", markeredgewidth=0.6, linestyle="", elinewidth=0.9, label=name,
        )  # fmt: skip
    # near the reference, what can be gained grows with the root of the KL
    ax.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(FixedLocator(_KL_TICKS))
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.set_xlabel("KL to the reference (nats)")
    ax.set_ylabel("reward over the reference's")
    return ax


def figure_effects(effects: pd.DataFrame, *, noise: float | None = None) -> Figure:
    """How far each contender lies above the constants at equal KL, by task: means and 95 % intervals over seeds.

    Filled where Holm's adjusted p is below 5 %. A grey bar is the difference that could have been detected.

    Args:
        effects: what `compare.effects` returned.
        noise: the level that is shown; None: the mean over all of them.

    Raises:
        ValueError: missing columns, or no rows at that noise.
    """
    _require(effects, ["contender", "noise", "task", "mean", "low", "high", "detectable", "holm"], "effects")
    rows = effects[effects["noise"].isna() if noise is None else effects["noise"] == noise]
    _require(rows, ["mean"], "effects")
    known = [*(n for names in GROUPS.values() for n in names), *CONTROLS]
    names = [n for n in known if n in set(rows["contender"])] + sorted(set(rows["contender"]) - set(known))
    place = {name: -i for i, name in enumerate(names)}
    figure = Figure(figsize=(12, 1.3 + 0.27 * len(names)), layout="constrained")
    for task, ax in zip(_TASKS, figure.subplots(1, len(_TASKS), sharey=True), strict=True):
        _axes(ax)
        ax.axvline(0, color=_INK, linewidth=0.9)
        color = TASK_COLORS.get(task, _INK)
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
                ax.axhline(place[name] + 0.5, color=_GREY, linewidth=0.5)
    return figure


def _group(name: str) -> str:
    return next((title for title, names in GROUPS.items() if name in names), "controls")


def figure_parts(table: pd.DataFrame, *, noise: float) -> Figure:
    """What the margin is made of, by task: h, the scale s, s·h and the KL, each contender at its first value.

    Args:
        table: what `compare.gather` returned.
        noise: the level of label noise that is shown.
    """
    rows = table[(table["phase"] == "main") & (table["noise"] == noise)]
    _require(rows, ["contender", "value", *(f"{n}/{t}" for n in ("h", "s", "margin", "kl") for t in _TASKS)], "table")
    known = ["constant", *(n for names in GROUPS.values() for n in names), *CONTROLS]
    names = [n for n in known if n in set(rows["contender"])]
    figure = Figure(figsize=(12, 1.3 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    titles = {"h": r"$h$ on held-out pairs (nats)", "s": r"scale $s$", "margin": r"margin $s\cdot h$ (nats)",
              "kl": "KL to the reference (nats)"}  # fmt: skip
    for (name, title), ax in zip(titles.items(), axes, strict=True):
        _axes(ax)
        for i, contender in enumerate(names):
            own = first_value(rows, contender)
            for task, color in TASK_COLORS.items():
                of_seeds = own[f"{name}/{task}"]
                ax.errorbar(of_seeds.mean(), -i, xerr=of_seeds.sem() if len(of_seeds) > 1 else 0, color=color,
                            marker="o", markersize=4.5, elinewidth=1, label=task if i == 0 else f"_{task}")  # fmt: skip
        ax.set_xlabel(title)
        ax.set_yticks([-i for i in range(len(names))], names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", linewidth=0.3)
        if name == "s":
            ax.set_xscale("log")
            _plain_ticks(ax.xaxis)
    _legend_above(axes[0], ncols=3)
    return figure


def first_value(rows: pd.DataFrame, contender: str) -> pd.DataFrame:
    """The rows of a contender at the first of its values; of the constant, at the value and the learning rate that most
    of the others have there, so that they can be compared."""
    own = rows[rows["contender"] == contender]
    if contender != "constant":
        return own[own["value"] == own["value"].min()]
    others = rows[rows["contender"] != "constant"]
    others = others[others["value"] == others.groupby("contender")["value"].transform("min")]
    for name in ("value", "learning_rate"):
        known = [v for v in others[name].value_counts().index if v in set(own[name])] or [own[name].min()]
        own = own[own[name] == known[0]]
    return own


def figure_betas(betas: pd.DataFrame) -> Figure:
    """Beta of each contender against the entropy of the reference, a panel each.

    Args:
        betas: what `compare.gather_betas` returned.
    """
    _require(betas, ["contender", "form", "task", "ref_entropy", "beta"], "betas")
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
        _axes(ax)
        own = betas[betas["contender"] == name]
        for task, color in TASK_COLORS.items():
            of_task = own[own["task"] == task]
            ax.scatter(of_task["ref_entropy"], of_task["beta"], s=9, color=color, alpha=0.5, linewidths=0, label=task)
        ax.set_yscale("log")
        low, high = own["beta"].min(), own["beta"].max()
        ax.set_ylim(min(low / 1.2, high / 2), max(high * 1.2, low * 2))
        _plain_ticks(ax.yaxis)
        ax.set_title(name, fontsize="medium")
        ax.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(r"entropy of the reference $H$ (nats per token)")
    figure.supylabel(r"$\beta$")
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    return figure


def figure_reliability(bins: pd.DataFrame, names: Sequence[str], *, noise: float) -> Figure:
    """Probabilities said, σ(s·h), against the true preference probabilities, on held-out pairs: a panel per contender.

    A pair is there both ways round, so that which answer the label calls chosen does not matter.

    Args:
        bins: what `compare.gather_reliability` returned.
        names: contenders, each at its first value.
        noise: the level of label noise that is shown.
    """
    _require(bins, ["contender", "value", "noise", "bin", "n", "predicted", "truth"], "bins")
    figure = Figure(figsize=(2.5 * len(names) + 0.6, 3.1), layout="constrained")
    for name, ax in zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True):
        _axes(ax)
        own = first_value(bins[bins["noise"] == noise], name).sort_values("predicted")
        ax.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)))
        ax.plot(own["predicted"], own["truth"], color=_INK, linewidth=1)
        ax.scatter(own["predicted"], own["truth"], s=120 * own["n"] / own["n"].max() + 6, color=_INK, linewidths=0)
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel(r"said, $\sigma(s\cdot h)$")
        ax.set_xlim(0, 1), ax.set_ylim(0, 1)
    figure.axes[0].set_ylabel("true probability")
    return figure
