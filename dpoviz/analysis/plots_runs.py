"""Draw several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dpoviz.analysis.style import GREY, INK, open_axes, plain_ticks, task_colors, task_label, use_known_letters
from dpoviz.analysis.text import number, short


def plot_runs(tables: Mapping[str, pd.DataFrame], *, beta0: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw beta by task and run: a point per prompt, with median and quartiles; the runs of a task stand together.

    Args:
        tables: by the name of the run, the table of `beta_table` of one form.
        beta0: the fixed beta of stage 1, drawn as a line if given.
        ax: where to draw; None: on a new figure.

    Raises:
        ValueError: no table, or an empty one.
    """
    empty = [name for name, table in tables.items() if table.empty]
    if not tables or empty:
        raise ValueError(f"tables: got no rows of {empty or 'any run'}, expected some of each")
    ax = open_axes(ax)
    colors = task_colors({task for table in tables.values() for task in table["task"]})
    places, labels = [], []
    for i, (task, color) in enumerate(colors.items()):
        for j, (name, table) in enumerate(tables.items()):
            beta = table[table["task"] == task]["beta"].to_numpy()
            place = i * (len(tables) + 0.7) + j
            places.append(place)
            labels.append(short(name, 24))
            if not len(beta):
                continue
            spread = 0.5 * ((0.5 + np.argsort(np.argsort(beta)) * 0.618033988749895) % 1 - 0.5)
            ax.scatter(place + spread, beta, s=12, color=color, alpha=0.45, linewidths=0)
            q1, median, q3 = np.quantile(beta, [0.25, 0.5, 0.75])
            ax.add_patch(Rectangle((place - 0.34, q1), 0.68, q3 - q1, fill=False, edgecolor=INK, zorder=2))
            ax.hlines(median, place - 0.34, place + 0.34, color=INK, linewidth=2.2, zorder=2)
        middle = i * (len(tables) + 0.7) + (len(tables) - 1) / 2
        title = ax.text(middle, 1.02, task_label(task), color=color, ha="center", transform=ax.get_xaxis_transform())
        use_known_letters([title])
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(places, labels, fontsize="small", **(turned if max(map(len, labels)) > 8 else {}))
    use_known_letters(ax.get_xticklabels())
    ax.set_xlim(-0.7, places[-1] + 0.7)
    ax.tick_params(axis="x", length=0)
    ax.set_yscale("log")
    ax.set_ylabel(r"$\beta(x)$")
    plain_ticks(ax.yaxis)
    if beta0 is not None:
        ax.axhline(beta0, color=GREY, linewidth=0.9, zorder=0.9)
        text = rf"$\beta_0$ = {number(beta0, 4, trim=True)}"
        where: dict[str, Any] = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        ax.annotate(text, (1, beta0), xytext=(3, 0), va="center", color=GREY, fontsize="small", **where)
    return ax


def figure_runs(tables: Mapping[str, pd.DataFrame], *, beta0: Mapping[str, float] | None = None) -> Figure:
    """Draw the runs beside each other, a panel per form (`plot_runs`).

    Args:
        tables: by the name of the run, the table of `beta_table`, of one form or of two.
        beta0: the fixed beta of stage 1, by form.
    """
    forms = sorted({form for table in tables.values() for form in table["form"]})
    figure = Figure(figsize=(9, 3.6 * len(forms)), layout="constrained")
    for form, ax in zip(forms, figure.subplots(len(forms), 1, squeeze=False)[:, 0], strict=True):
        of_form = {name: table[table["form"] == form] for name, table in tables.items()}
        plot_runs({name: table for name, table in of_form.items() if len(table)}, beta0=(beta0 or {}).get(form), ax=ax)
        ax.set_title(f"{form} form", loc="left", fontsize="medium", pad=20)
    return figure
