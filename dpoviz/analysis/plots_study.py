"""Draw the results of a study."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpoviz.allocation import POOLED
from dpoviz.analysis.style import GREY, INK, legend_above, plain_ticks, require_columns, task_colors, task_label


def figure_study(slopes: pd.DataFrame, gains: pd.DataFrame, betas: pd.DataFrame, *, scale: float) -> Figure:
    """Draw reward per nat by task over the epochs, each arm's gain beside the bound, and beta by task against entropy.

    Beta is drawn over the one from which it started, 1/s (inverse) or s (standard).

    Args:
        slopes: arm, scale, epochs, task, slope, low, high.
        gains: arm, scale, epochs, bound, gain, gain_low, gain_high.
        betas: arm, epochs, task, beta, beta_low, beta_high, ref_entropy; empty if no beta(x) was trained.
        scale: the scale of the constant that the others are compared with.
    """
    require_columns(slopes, ["arm", "scale", "epochs", "task", "slope", "low", "high"], "slopes")
    require_columns(gains, ["arm", "scale", "epochs", "bound", "gain", "gain_low", "gain_high"], "gains")
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    own = slopes[(slopes["arm"] == "constant") & (slopes["scale"] == scale) & (slopes["task"] != POOLED)]
    for i, (task, color) in enumerate(task_colors(own["task"]).items()):
        rows = own[own["task"] == task]
        x = rows["epochs"] * 1.03**i  # side by side
        left.errorbar(x, rows["slope"], _errors(rows, "slope", "low", "high"), fmt="o-", color=color, markersize=4,
                      label=task_label(task))  # fmt: skip
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set_xscale("log", base=2)
    left.set_xticks(sorted(own["epochs"].unique()), [str(n) for n in sorted(own["epochs"].unique())])
    left.set(xlabel="epochs", ylabel=f"win rate per nat (s = {scale:g}; 95 % over pairs)")
    legend_above(left, 3)
    _gains(middle, gains, scale)
    _betas(right, betas, scale)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _gains(ax: Axes, gains: pd.DataFrame, scale: float) -> None:
    last = gains[gains["epochs"] == gains["epochs"].max()]
    one = (last["arm"] == "constant") & (last["scale"] == scale)
    rows = last[~one & last["gain"].notna()]
    names = [f"{r.arm}, {r.scale:g}" if r.arm == "constant" else r.arm for r in rows.itertuples(index=False)]
    y = np.arange(len(rows))[::-1]
    errors = _errors(rows, "gain", "gain_low", "gain_high")
    ax.errorbar(100 * rows["gain"], y, xerr=100 * errors, fmt="o", color=INK, markersize=4)
    ax.axvline(0, color=GREY, linewidth=0.8)
    bound = 100 * float(last.loc[one, "bound"].iloc[0])
    if np.isfinite(bound):
        ax.axvline(bound, color=GREY, linestyle="--", label="bound of any β by task")
        legend_above(ax, 1)
    ax.set_yticks(y, names)
    ax.set(xlabel=f"gain over the constant after {last['epochs'].iloc[0]} epochs, % (95 % over pairs)")


def _betas(ax: Axes, betas: pd.DataFrame, scale: float) -> None:
    ax.set(xlabel="entropy of the reference, nats per token", ylabel="β/β₀ (median; 95 % over trainings)")
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.axhline(1, color=GREY, linewidth=0.8)
    if betas.empty:
        return
    rows = betas[(betas["epochs"] == betas["epochs"].max()) & (betas["task"] != POOLED)]
    colors = task_colors(rows["task"])
    for marker, (arm, own) in zip("osv^DP", rows.groupby("arm", sort=False), strict=False):
        start = 1 / scale if arm.startswith("inverse") else scale
        own = own.sort_values("ref_entropy")
        own = own.assign(**{name: own[name] / start for name in ("beta", "beta_low", "beta_high")})
        ax.plot(own["ref_entropy"], own["beta"], color=GREY, linewidth=0.8)
        ax.plot([], [], marker, color=INK, label=arm, linestyle="none")
        for r in own.itertuples(index=False):
            error = _errors(own[own["task"] == r.task], "beta", "beta_low", "beta_high")
            ax.errorbar(r.ref_entropy, r.beta, error, fmt=marker, color=colors[r.task], markersize=5)
    ax.set_yscale("log")
    plain_ticks(ax.yaxis)
    legend_above(ax, 2)


def _errors(rows: pd.DataFrame, value: str, low: str, high: str) -> np.ndarray:
    """Return (2, N) distances to the ends of the intervals; 0 where there is none."""
    ends = np.stack([rows[value] - rows[low], rows[high] - rows[value]]).astype(float)
    return np.nan_to_num(np.maximum(ends, 0), posinf=0.0)
