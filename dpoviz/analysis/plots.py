"""Draw the figures of a run: each function takes a DataFrame and returns an Axes or a Figure.

Each `plot_*` function draws on the given Axes, or on those of a new `Figure`; each `figure_*` function combines several
of them. The tables come from `beta_table` and `train`; only quartiles, means and standard errors are computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from dpoviz.analysis.style import (
    ANSWER_COLORS,
    GREY,
    INK,
    TASK_COLORS,
    TERM_COLORS,
    legend_above,
    open_axes,
    plain_ticks,
    printable,
    require_columns,
    task_colors,
    task_label,
    use_known_letters,
)
from dpoviz.analysis.text import number
from dpoviz.translation import key, label

__all__ = [
    "ESTIMATORS",
    "QUANTITIES",
    "TASK_COLORS",
    "TERM_COLORS",
    "figure_beta_by_task",
    "figure_beta_gradients",
    "figure_beta_steps",
    "figure_log_ratios",
    "figure_training",
    "plot_beta_by_task",
    "plot_beta_gradients",
    "plot_beta_vs_entropy",
    "plot_entropy_estimators",
    "plot_log_ratios",
    "plot_training",
    "task_colors",
]

QUANTITIES = {
    "loss": key("total loss (nats)"),
    "accuracy": key("reward accuracy"),
    "margin": key(r"reward margin $s\cdot h$ (nats)"),
    "kl": key("KL to the reference (nats)"),
    "beta": key(r"$\beta(x)$, mean of a task"),
}
"""The quantities that `plot_training` draws, with the labels of their axes."""

ESTIMATORS = {
    "first_token": key("first token\n(nats)"),
    "per_token": key("per token\n(nats per token)"),
    "teacher_forced": key("teacher-forced\n(nats per token)"),
    "sequence": key("sequence\n(nats)"),
    "monte_carlo": key("Monte Carlo\n(nats)"),
}
"""The estimators of the reference's entropy in the order of the axis, with their labels and units."""

_FORMULAS = {
    "inverse": key(r"inverse form: loss $-\log\,\sigma(h/\beta(x))$"),
    "standard": key(r"standard form: loss $-\log\,\sigma(\beta(x)\cdot h)$"),
}


def plot_beta_by_task(
    table: pd.DataFrame,
    *,
    beta0: float | None = None,
    beta_min: float | None = None,
    beta_max: float | None = None,
    ax: Axes | None = None,
    **artist_kws,
) -> Axes:
    """Draw the distribution of beta within each task: a point per prompt, with median and quartiles.

    In the inverse form a second axis on the right shows the scale s(x) = 1/β(x) that multiplies h in the loss; in the
    standard form beta is that scale.

    Args:
        table: columns form, seed, task, prompt, beta; of one form.
        beta0: the fixed beta of stage 1, drawn as a line if given.
        beta_min: lower end of the range, drawn as a line if given.
        beta_max: upper end of the range, drawn as a line if given.
        ax: where to draw; None: on a new figure.
        **artist_kws: passed to `Axes.scatter`.

    Raises:
        ValueError: an empty table, missing columns, or several forms.
    """
    form = _one_form(table, ["form", "seed", "task", "prompt", "beta"])
    ax = open_axes(ax)
    colors = task_colors(table["task"])
    labels = []
    for place, (task, color) in enumerate(colors.items()):
        rows = table[table["task"] == task]
        beta = rows["beta"].to_numpy()
        style: dict[str, Any] = {"s": 16, "color": color, "alpha": 0.55, "linewidths": 0} | artist_kws
        style.setdefault("gid", points_name(form, task))
        ax.scatter(place + _jitter(beta), beta, **style)
        # not Axes.boxplot, which reads all rcParams, and so loads pyplot
        q1, median, q3 = np.quantile(beta, [0.25, 0.5, 0.75])
        ax.add_patch(Rectangle((place - 0.31, q1), 0.62, q3 - q1, fill=False, edgecolor=INK, zorder=2))
        ax.hlines(median, place - 0.31, place + 0.31, color=INK, linewidth=2.2, zorder=2)
        labels.append([task_label(task), *_count(rows)])
    if len(colors) <= 4:
        ax.set_xticks(range(len(colors)), ["\n".join(label) for label in labels])
    else:
        turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(range(len(colors)), [" ".join(label) for label in labels], **turned)
    use_known_letters(ax.get_xticklabels())
    ax.set_xlim(-0.5 - 0.22 * len(colors), len(colors) - 0.5)  # leaves room for the lines' labels on the left
    ax.tick_params(axis="x", length=0)
    _beta_axis(ax, table["beta"])
    _beta_lines(ax, inside=True, beta0=beta0, beta_min=beta_min, beta_max=beta_max)
    if form == "standard":
        ax.set_ylabel(label(r"$\beta(x)$ = scale $s(x)$"))
    else:
        second = ax.secondary_yaxis("right", functions=(_reciprocal, _reciprocal))
        second.set_ylabel(label(r"scale $s(x) = 1/\beta(x)$"))
        plain_ticks(second.yaxis)
    return ax


def plot_beta_vs_entropy(
    table: pd.DataFrame,
    *,
    alpha: float | None = None,
    beta0: float | None = None,
    beta_min: float | None = None,
    beta_max: float | None = None,
    ax: Axes | None = None,
    **artist_kws,
) -> Axes:
    """Draw beta against the entropy of the reference, a point per prompt, with the target line of the entropy term.

    Args:
        table: columns form, seed, task, prompt, beta, ref_entropy, ref_entropy_se; of one form. Horizontal bars
            show one standard error of the entropy to either side.
        alpha: beta per nat of entropy; if given, αH is drawn, clipped to the range.
        beta0: the fixed beta of stage 1, drawn as a line if given.
        beta_min: lower end of the range, drawn as a line if given.
        beta_max: upper end of the range, drawn as a line if given.
        ax: where to draw; None: on a new figure.
        **artist_kws: passed to `Axes.scatter`.

    Raises:
        ValueError: an empty table, missing columns, or several forms.
    """
    form = _one_form(table, ["form", "seed", "task", "prompt", "beta", "ref_entropy", "ref_entropy_se"])
    ax = open_axes(ax)
    for task, color in task_colors(table["task"]).items():
        rows = table[table["task"] == task]
        h, beta = rows["ref_entropy"], rows["beta"]
        ax.errorbar(h, beta, xerr=rows["ref_entropy_se"], fmt="none", ecolor=color, elinewidth=1, alpha=0.4)
        style: dict[str, Any] = {"s": 18, "color": color, "alpha": 0.75, "linewidths": 0, "label": task_label(task)}
        ax.scatter(h, beta, **({"gid": points_name(form, task)} | style | artist_kws))
    if alpha is not None:
        _entropy_line(ax, alpha, beta_min, beta_max)
    ax.set_xlabel(label(r"entropy of the reference $H$ (nats per token)"))
    _beta_axis(ax, table["beta"])
    _beta_lines(ax, inside=False, beta0=beta0, beta_min=beta_min, beta_max=beta_max)
    legend_above(ax, ncols=4)
    return ax


def points_name(form: str, task: str) -> str:
    """Return the gid of the points of a form and task, by which a page finds their places in a figure."""
    return f"{form}: {task}"


def plot_training(history: pd.DataFrame, *, y: str, ax: Axes | None = None, **artist_kws) -> Axes:
    """Draw one quantity over the steps of training.

    Args:
        history: the histories of `train`, of one form; stages and seeds concatenated. Each seed is a line. Rows
            in which the quantity was not measured are left out.
        y: a key of `QUANTITIES`. "accuracy" is that of the training batch, and of the held-out pairs where
            measured; "kl" has a band of one standard error to either side; "beta" has a line per task, on a log
            axis.
        ax: where to draw; None: on a new figure.
        **artist_kws: passed to `Axes.plot`.

    Raises:
        ValueError: an empty history, missing columns, several forms, an unknown y, or no measurement of y.
    """
    if y not in QUANTITIES:
        raise ValueError(f"y: got {y!r}, expected one of {list(QUANTITIES)}")
    betas = [column for column in history.columns if column.startswith("beta/")]
    needed = {"beta": betas or ["beta/<task>"], "kl": ["kl", "kl_se"]}.get(y, [y])
    _one_form(history, ["form", "seed", "stage", "step", *needed], name="history")
    if history[needed].isna().all(axis=None):
        raise ValueError(f"history: no row has {needed}, expected a measurement of {y!r}")
    ax = open_axes(ax)
    style = {"color": TERM_COLORS["dpo"], "linewidth": 1.4} | artist_kws
    if y == "beta":
        colors = task_colors(column.removeprefix("beta/") for column in betas)
        for task, color in colors.items():
            _lines(ax, history, f"beta/{task}", label=task_label(task), **style | {"color": color})
        _beta_axis(ax, pd.Series(history[betas].to_numpy().ravel()))
    elif y == "accuracy" and "held_out_accuracy" in history:
        _lines(ax, history, "accuracy", label=label("training batch"), **style | {"alpha": 0.35})
        _lines(
            ax, history, "held_out_accuracy", label=label("held-out pairs"), **style | {"marker": "o", "markersize": 4}
        )
    else:
        _lines(ax, history, y, label=y, **style)
    if y == "kl":
        for _, of_seed in history.dropna(subset="kl").groupby("seed"):
            low, high = of_seed["kl"] - of_seed["kl_se"], of_seed["kl"] + of_seed["kl_se"]
            ax.fill_between(of_seed["step"], low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.set_ylabel(label(QUANTITIES[y]))
    if len(ax.get_legend_handles_labels()[1]) > 1:
        use_known_letters(ax.legend(frameon=False).get_texts())
    _step_axis(ax)
    _stage_boundary(ax, history)
    return ax


def plot_beta_gradients(history: pd.DataFrame, *, task: str, ax: Axes | None = None, **artist_kws) -> Axes:
    """Draw what pulls on a task's beta in stage 2: each term's gradient, and their sum.

    The axis is linear, so that the terms visibly add up to the sum. A term that was switched off has a missing or empty
    column, and no line.

    Args:
        history: the history of `train`, of one form, with a column grad/<term>/<task> for "dpo" and each term that was
            switched on; a term without a color in `TERM_COLORS` is grey. A positive pull lowers beta under gradient
            descent.
        task: the task whose beta is shown.
        ax: where to draw; None: on a new figure.
        **artist_kws: passed to `Axes.plot`.

    Raises:
        ValueError: an empty history, missing columns, several forms, or no rows of stage 2.
    """
    _one_form(history, ["form", "seed", "stage", "step", f"grad/dpo/{task}"], name="history")
    rows = history[history["stage"] == 2]
    if rows.empty:
        raise ValueError("history: no rows with stage 2, expected some: beta is not trained in stage 1")
    terms = [name.split("/")[1] for name in rows if name.startswith("grad/")]
    terms = [term for term in dict.fromkeys(terms) if f"grad/{term}/{task}" in rows]
    terms = [term for term in TERM_COLORS if term in terms] + [term for term in terms if term not in TERM_COLORS]
    columns = {term: f"grad/{term}/{task}" for term in terms if rows[f"grad/{term}/{task}"].notna().any()}
    ax = open_axes(ax)
    ax.axhline(0, color=GREY, linewidth=0.8, label="_zero")
    for term, column in columns.items():
        _lines(
            ax, rows, column, label=label(term), **{"color": TERM_COLORS.get(term, GREY), "linewidth": 1.4} | artist_kws
        )
    total = rows.assign(sum=rows[list(columns.values())].sum(axis=1, skipna=False, min_count=1))
    style = {"color": "black", "linewidth": 1.4, "linestyle": (0, (4, 2))}
    _lines(ax, total, "sum", label=label("sum"), **style | artist_kws)
    ax.set_ylabel(label("{task}: pull on $\\beta(x)$\n(positive lowers it)", task=task_label(task)))
    use_known_letters([ax.yaxis.label])
    legend_above(ax, ncols=len(columns) + 1)
    _step_axis(ax)
    return ax


def plot_entropy_estimators(table: pd.DataFrame, *, ax: Axes | None = None, **artist_kws) -> Axes:
    """Draw the reference's entropy by each estimator: a point per prompt, and means with standard errors by task.

    The estimators have different units, given in their labels: compare tasks within one estimator only. The axis is
    logarithmic if all entropies are positive, linear otherwise.

    Args:
        table: columns estimator (keys of `ESTIMATORS`), task, prompt, entropy. An optional column example marks
            prompts that are shown separately, with their text, and left out of the means: True, or the text to show.
        ax: where to draw; None: on a new figure.
        **artist_kws: passed to `Axes.scatter`.

    Raises:
        ValueError: an empty table, missing columns, an unknown estimator, or nothing but examples.
    """
    require_columns(table, ["estimator", "task", "prompt", "entropy"], "table")
    unknown = sorted(set(table["estimator"]) - set(ESTIMATORS))
    if unknown:
        raise ValueError(f"table: got the estimators {unknown}, expected some of {list(ESTIMATORS)}")
    shown = table["example"] if "example" in table else pd.Series(False, index=table.index)
    named = shown.fillna(False).astype(bool)
    of_data = table[~named]
    if of_data.empty:
        raise ValueError("table: got nothing but examples, expected prompts of a task too")
    places = {name: i for i, name in enumerate(e for e in ESTIMATORS if e in set(table["estimator"]))}
    if ax is None:
        ax = Figure(figsize=(max(2.3 * len(places) + 0.8, 7), 4.4), layout="constrained").add_subplot()
    ax = open_axes(ax)
    if (table["entropy"] > 0).all():
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    colors = task_colors(of_data["task"])
    width = (0.48 if named.any() else 0.8) / len(colors)  # examples stand to the right of the tasks
    for i, (task, color) in enumerate(colors.items()):
        rows = of_data[of_data["task"] == task]
        style: dict[str, Any] = {"s": 12, "color": color, "alpha": 0.4, "linewidths": 0, "label": "_prompts"}
        style |= artist_kws
        for name, values in rows.groupby("estimator")["entropy"]:
            x = places[name] - (0.46 if named.any() else 0.4) + width * (i + 0.5)
            ax.scatter(x + _jitter(values.to_numpy(), 0.6 * width), values, **style)
            se = values.std() / len(values) ** 0.5 if len(values) > 1 else 0
            mean: dict[str, Any] = {"marker": "D", "markersize": 4.5, "markeredgecolor": "white", "capsize": 4}
            ax.errorbar(
                x, values.mean(), se, color=color, ecolor=INK, zorder=4, label=f"_{task}", elinewidth=1.6, **mean
            )
        ax.scatter([], [], color=color, s=24, linewidths=0, label=f"{task_label(task)} (n={rows['prompt'].nunique()})")
    ax.set_xticks(range(len(places)), [label(ESTIMATORS[name]) for name in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
    for place in range(1, len(places)):
        ax.axvline(place - 0.5, color=GREY, linewidth=0.5, alpha=0.4, label="_between")
    examples = table[named].groupby("estimator")
    for name, values in examples["entropy"]:
        ax.scatter(
            np.full(len(values), places[name] + 0.09), values, s=24, marker="_", color=INK, label="_examples", zorder=3
        )
    ax.set_ylim(ax.get_ylim())  # the texts are placed within these limits
    for name, group in examples:
        texts = [p if mark is True else mark for p, mark in zip(group["prompt"], shown[group.index], strict=True)]
        _texts_beside(ax, places[name] + 0.09, group["entropy"].to_numpy(), texts)
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("entropy of the reference")
    legend_above(ax, ncols=4)
    return ax


def figure_beta_by_task(
    table: pd.DataFrame,
    *,
    alpha: Mapping[str, float] | None = None,
    beta0: Mapping[str, float] | None = None,
    beta_min: Mapping[str, float] | None = None,
    beta_max: Mapping[str, float] | None = None,
) -> Figure:
    """Draw beta by task (left) and against entropy (right), a row per form; the right only if entropies are known.

    Args:
        table: the table of `beta_table`, for one form or concatenated for two; ref_entropy may be NaN.
        alpha: beta per nat of entropy, by form.
        beta0: the fixed beta of stage 1, by form.
        beta_min: lower end of the range, by form.
        beta_max: upper end of the range, by form.

    Raises:
        ValueError: an empty table or missing columns.
    """
    forms = _forms(table, "table")
    known = bool(table["ref_entropy"].notna().any())
    figure = Figure(figsize=(9 if known else 5, 3.9 * len(forms)), layout="constrained")
    constrained: Any = figure.get_layout_engine()
    constrained.set(hspace=0.06, wspace=0.04)
    panels = figure.subplots(len(forms), 1 + known, squeeze=False, width_ratios=(1, 1.1)[: 1 + known])
    for form, (left, *right) in zip(forms, panels, strict=True):
        rows = table[table["form"] == form]
        given = {"beta0": beta0, "beta_min": beta_min, "beta_max": beta_max}
        lines = {name: by_form.get(form) for name, by_form in given.items() if by_form is not None}
        plot_beta_by_task(rows, ax=left, **lines)
        for ax in right:
            plot_beta_vs_entropy(rows, ax=ax, alpha=None if alpha is None else alpha.get(form), **lines)
        left.set_title(label(_FORMULAS[form]), loc="left", fontsize="large", pad=12)
    return figure


def figure_training(history: pd.DataFrame) -> Figure:
    """Draw the course of training: a column per form, a row per measured quantity.

    Args:
        history: the history of `train`, for one form or concatenated for two.

    Raises:
        ValueError: an empty history or missing columns.
    """
    forms = _forms(history, "history")
    rows = _measured(history)
    figure = Figure(figsize=(9, 2.1 * len(rows) + 0.5), layout="constrained")
    tops: dict[str, Axes] = {}  # the panels of a column share their steps, even if few of them were measured
    for i, y in enumerate(rows):
        first = None
        for j, form in enumerate(forms):
            # shared, to compare the forms, except for beta, whose scales differ
            place = i * len(forms) + j + 1
            ax = figure.add_subplot(len(rows), len(forms), place, sharey=first, sharex=tops.get(form))
            tops.setdefault(form, ax)
            of_form = history[history["form"] == form]
            if y in _measured(of_form):
                plot_training(of_form, y=y, ax=ax)
            else:
                ax.set_axis_off()
            first = None if y == "beta" else ax
            if i == 0:
                ax.set_title(label(_FORMULAS[form]), loc="left", fontsize="large", pad=20)
            if i < len(rows) - 1:
                ax.set_xlabel("")
                ax.tick_params(labelbottom=False)
            if i > 0:
                for text in list(ax.texts):  # the stages are labelled once, at the top
                    text.remove()
            if j > 0:
                ax.set_ylabel("")
    figure.align_ylabels()
    return figure


def _measured(history: pd.DataFrame) -> list[str]:
    """Return the keys of `QUANTITIES` that have a value in some row."""
    measured = {column.split("/")[0] for column in history.columns[history.notna().any()]}
    return [y for y in QUANTITIES if y in measured]


def figure_beta_gradients(history: pd.DataFrame) -> Figure:
    """Draw the pulls on beta (`plot_beta_gradients`): a row per form, a column per task.

    Args:
        history: the history of `train`, for one form or concatenated for two.

    Raises:
        ValueError: an empty history, or missing columns.
    """
    forms = _forms(history, "history")
    tasks = task_colors(c.removeprefix("grad/dpo/") for c in history.columns if c.startswith("grad/dpo/"))
    if not tasks:
        raise ValueError("history: missing columns ['grad/dpo/<task>']")
    figure = Figure(figsize=(9, 3.1 * len(forms) + 0.3), layout="constrained")
    lines: dict[str, Artist] = {}  # by label: a form may have a term that the other lacks
    for form, part in zip(forms, figure.subfigures(len(forms), squeeze=False).flat, strict=True):
        part.suptitle(label(_FORMULAS[form]), x=0.01, ha="left")
        panels = part.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for (task, color), ax in zip(tasks.items(), panels, strict=True):
            plot_beta_gradients(history[history["form"] == form], task=task, ax=ax)
            use_known_letters([ax.set_title(task_label(task), loc="left", color=color, fontsize="medium")])
            ax.label_outer()
            handles, labels = ax.get_legend_handles_labels()
            lines |= dict(zip(labels, handles, strict=True))
            if ax.get_legend() is not None:
                ax.get_legend().remove()
        panels[0].set_ylabel(label("pull on $\\beta(x)$\n(positive lowers it)"))
    names = [name for name in map(label, (*TERM_COLORS, "sum")) if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def figure_beta_steps(betas: pd.DataFrame, *, beta0: Mapping[str, float] | None = None) -> Figure:
    """Draw beta over the steps, a panel per form: the median over the prompts of each task, and its quartiles.

    Args:
        betas: columns form, step, task, prompt, beta: beta at each held-out prompt at each logged step.
        beta0: the fixed beta of stage 1, by form, drawn as a line if given.

    Raises:
        ValueError: an empty table or missing columns.
    """
    require_columns(betas, ["form", "step", "task", "prompt", "beta"], "betas")
    forms = _forms(betas, "betas")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for form, ax in zip(forms, figure.subplots(1, len(forms), squeeze=False)[0], strict=True):
        ax = open_axes(ax)
        rows = betas[betas["form"] == form]
        for task, color in task_colors(betas["task"]).items():
            steps = rows[rows["task"] == task].groupby("step")["beta"].quantile([0.25, 0.5, 0.75]).unstack()
            ax.fill_between(steps.index, steps[0.25], steps[0.75], color=color, alpha=0.18, linewidth=0)
            ax.plot(steps.index, steps[0.5], color=color, linewidth=1.6, label=task_label(task))
        _beta_axis(ax, rows["beta"])
        if beta0 is not None and form in beta0:
            ax.axhline(beta0[form], color=GREY, linewidth=0.9, zorder=0.9, label="_beta0")
        ax.set_title(label(_FORMULAS[form]), loc="left", fontsize="medium", pad=24)
        legend_above(ax, ncols=4)
        _step_axis(ax)
    return figure


def figure_log_ratios(history: pd.DataFrame) -> Figure:
    """Draw the log-ratios of chosen and rejected answers over the steps: a row per form, a panel per task.

    Lines are means over the pairs of the training batch before its update, with their quartiles as bands if it has
    them; points are means over the held-out pairs after it.

    Args:
        history: the history of `train`, of one form or of two, with the columns logratio/<answer>/<task>.

    Raises:
        ValueError: an empty history, or missing columns.
    """
    forms = _forms(history, "history")
    tasks = task_colors(log_ratio_tasks(history))
    if not tasks:
        raise ValueError("history: missing columns ['logratio/chosen/<task>']")
    across = min(len(tasks), 4)
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(9, 2.5 * down * len(forms) + 0.3), layout="constrained")
    for form, part in zip(forms, figure.subfigures(len(forms), squeeze=False).flat, strict=True):
        part.suptitle(label("{form} form", form=label(form)), x=0.01, ha="left", fontsize="medium")
        panels = part.subplots(down, across, squeeze=False, sharey=True, sharex=True)
        rows = history[history["form"] == form]
        for ax in panels.flat[len(tasks) :]:
            ax.set_axis_off()
        for (task, color), ax in zip(tasks.items(), panels.flat, strict=False):
            plot_log_ratios(rows, task=task, ax=ax)
            use_known_letters([ax.set_title(task_label(task), loc="left", color=color, fontsize="medium")])
            ax.label_outer()
        handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def plot_log_ratios(history: pd.DataFrame, *, task: str, ax: Axes | None = None) -> Axes:
    """Draw the log-ratios of the chosen and of the rejected answers of a task over the steps.

    Args:
        history: the history of `train`, of one form, with the columns logratio/<answer>/<task>.
        task: the task.
        ax: where to draw; None: on a new figure.

    Raises:
        ValueError: an empty history, missing columns, or several forms.
    """
    _one_form(history, ["form", "seed", "step", *(f"logratio/{answer}/{task}" for answer in ANSWER_COLORS)], "history")
    ax = open_axes(ax)
    ax.axhline(0, color=GREY, linewidth=0.8, label="_zero")
    for answer, color in ANSWER_COLORS.items():
        name, held_out = f"logratio/{answer}/{task}", f"held_out_logratio/{answer}/{task}"
        _lines(
            ax, history, name, label=label("{answer}, training batch", answer=label(answer)), color=color, linewidth=1.3
        )
        if f"{name}/q25" in history:  # a trainer's log has means alone
            band = history.dropna(subset=[name, f"{name}/q25"])
            ends = band[f"{name}/q25"], band[f"{name}/q75"]
            ax.fill_between(band["step"], *ends, color=color, alpha=0.15, linewidth=0)
        if held_out in history:
            style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": "none", "markeredgecolor": "white"}
            _lines(
                ax,
                history,
                held_out,
                label=label("{answer}, held-out pairs", answer=label(answer)),
                color=color,
                **style,
            )
    ax.set_ylabel(label("log π/π_ref (nats)"))
    _step_axis(ax)
    return ax


def log_ratio_tasks(history: pd.DataFrame) -> list[str]:
    """Return the tasks whose log-ratios a history has."""
    start = "logratio/chosen/"
    names = [column.removeprefix(start) for column in history.columns if column.startswith(start)]
    quartiles = {f"{name}{suffix}" for name in names for suffix in ("/q25", "/q75")}
    return [name for name in names if name not in quartiles]


def _forms(table: pd.DataFrame, name: str) -> list[str]:
    require_columns(table, ["form"], name)
    return sorted(table["form"].unique())  # inverse before standard


def _one_form(table: pd.DataFrame, columns: list[str], name: str = "table") -> str:
    """Return the form of a table; raise unless it has one form, these columns, and at least one row."""
    require_columns(table, columns, name)
    forms = _forms(table, name)
    if len(forms) > 1:
        raise ValueError(f"{name}: got the forms {forms}, expected one: draw each on Axes of its own")
    return forms[0]


def _count(rows: pd.DataFrame) -> list[str]:
    """Return labels with the number of prompts of a group and, if there are several, of seeds."""
    seeds = rows["seed"].nunique()
    return [f"(n={rows['prompt'].nunique()})"] + ([f"{seeds} seeds"] if seeds > 1 else [])


def _jitter(values: np.ndarray, width: float = 0.5) -> np.ndarray:
    """Return offsets that separate neighbouring values: by rank, in steps of the golden ratio."""
    rank = np.argsort(np.argsort(values, kind="stable"))
    return width * ((0.5 + rank * 0.618033988749895) % 1 - 0.5)


def _reciprocal(values: ArrayLike) -> np.ndarray:
    # matplotlib also passes 0, for the corners of hidden spines
    numbers = np.asarray(values, dtype=float)
    return np.divide(1, numbers, out=np.full(numbers.shape, np.inf), where=numbers != 0)


def _beta_axis(ax: Axes, beta: pd.Series) -> None:
    """Make a log axis for beta, with plain decimals and room around its values and those of Axes that share it."""
    others = [other for other in ax.get_shared_y_axes().get_siblings(ax) if other is not ax and other.has_data()]
    low, high = _padded(beta.min(), beta.max())
    if others:
        below, above = others[0].get_ylim()
        low, high = min(low, below), max(high, above)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_ylabel(r"$\beta(x)$")
    plain_ticks(ax.yaxis)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = max((high / low) ** 0.08, 1.1)
    return low / pad, high * pad


def _beta_lines(ax: Axes, *, inside: bool, **given: float | None) -> None:
    """Draw lines at beta0 and the ends of the range, if given, and extend the axis to show them.

    The labels are inside the Axes on the left, or outside on the right.
    """
    symbols = {"beta0": r"$\beta_0$", "beta_min": r"$\beta_{\min}$", "beta_max": r"$\beta_{\max}$"}
    low, high = ax.get_ylim()
    for name, value in given.items():
        if value is None:
            continue
        dashes = "-" if name == "beta0" else (0, (5, 3))
        ax.axhline(value, color=GREY, linewidth=0.9, linestyle=dashes, zorder=0.9, label=f"_{name}")
        ax.annotate(
            f"{symbols[name]} = {number(value, 4, trim=True)}",
            (0 if inside else 1, value),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, 2 if inside else 0),
            textcoords="offset points",
            va="bottom" if inside else "center",
            color=GREY,
            fontsize="small",
        )
        below, above = _padded(value, value)
        low, high = min(low, below), max(high, above)
    ax.set_ylim(low, high)


def _entropy_line(ax: Axes, alpha: float, beta_min: float | None, beta_max: float | None) -> None:
    low, high = ax.get_xlim()
    h = np.linspace(max(low, high / 1000), high, 400)  # a log axis has no alpha·0
    ax.set_xlim(low, high)
    wanted = alpha * h
    name = r"$\alpha H$"
    if beta_min is not None or beta_max is not None:
        wanted = np.clip(wanted, beta_min, beta_max)
        name = r"$\mathrm{clip}(\alpha H)$"
    ax.plot(h, wanted, color="black", linewidth=1.4, label=rf"{name}, $\alpha$ = {number(alpha, 4, trim=True)}")


def _lines(ax: Axes, rows: pd.DataFrame, column: str, *, label: str, **style) -> None:
    """Draw a line per seed, with one entry in the legend."""
    for i, (_, of_seed) in enumerate(rows.dropna(subset=column).groupby("seed")):
        of_seed = of_seed.sort_values("step")
        ax.plot(of_seed["step"], of_seed[column], label=label if i == 0 else f"_{label}", **style)


def _texts_beside(ax: Axes, x: float, values: np.ndarray, texts: list[str]) -> None:
    """Write texts to the right of points in a column, moved apart so that they do not overlap."""
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = to_axes.transform(np.column_stack([np.full(len(values), x), values]))[:, 1]
    height, gap = 1.0, 0.045  # in heights of the Axes; the gap is a line of small print
    for i in reversed(np.argsort(heights, kind="stable")):
        height = min(heights[i], height - gap)
        font, text = printable(texts[i])
        ax.annotate(
            text,
            (x, values[i]),
            xytext=(x + 0.05, height),
            textcoords=ax.get_xaxis_transform(),
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": GREY},
            va="center",
            fontsize="x-small",
            color=INK,
            parse_math=False,
            **font,
        )


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel(label("step"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _stage_boundary(ax: Axes, history: pd.DataFrame) -> None:
    if history["stage"].nunique() < 2:
        return
    start = history.loc[history["stage"] == 2, "step"].min()
    ax.axvline(start, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="_stage 2")
    for text, side, shift in ((label(r"fixed $\beta_0$"), "right", -4), (label(r"$\beta(x)$ learns"), "left", 4)):
        ax.annotate(
            text,
            (start, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(shift, 3),
            textcoords="offset points",
            ha=side,
            color=GREY,
            fontsize="small",
        )
