r"""Pictures: a DataFrame in, an Axes out.

Every `plot_*` draws on the Axes it is given, or on one of a new `Figure`, and returns it; the `figure_*` put
several of them together. Nothing is computed here but the summary that is shown. The tables are those of
`table.beta_table` and of `train.train`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

TASK_COLORS = {"math": "#0A52C8", "code": "#B5880F", "dialogue": "#C4105C"}
"""The colour of a task, everywhere; the order is that of axes and legends."""

_FURTHER_COLORS = ("#2E8B57", "#8C564B", "#17808F", "#6F7F00", "#6B6B6B")

TERM_COLORS = {"dpo": "#1D2F5F", "range": "#5B9A8B", "smoothness": "#9A53C5", "entropy": "#7A1A0C"}
"""The colour of a term of the objective, in the order of legends."""

QUANTITIES = {
    "loss": "total loss (nats)",
    "accuracy": "reward accuracy",
    "margin": r"reward margin $s\cdot h$ (nats)",
    "kl": "KL to the reference (nats)",
    "beta": r"$\beta(x)$, mean of a task",
}
"""What `plot_training` draws, and the label of its axis."""

ESTIMATORS = {
    "first_token": "first token\n(nats)",
    "per_token": "per token\n(nats per token)",
    "teacher_forced": "teacher-forced\n(nats per token)",
    "sequence": "sequence\n(nats)",
    "monte_carlo": "Monte Carlo\n(nats)",
}
"""The estimators of the reference's entropy in the order of an axis, and their labels there, with units."""

_FORMULAS = {
    "inverse": r"inverse form: loss $-\log\,\sigma(h/\beta(x))$",
    "standard": r"standard form: loss $-\log\,\sigma(\beta(x)\cdot h)$",
}
_GREY, _INK = "#5A5A5A", "#222222"
_PULL_LABEL = "pull on $\\beta(x)$\n(positive lowers it)"
_ENTROPY_LABEL = r"entropy of the reference $H$ (nats per token)"


def task_colors(tasks: Iterable[str]) -> dict[str, str]:
    """The colour of each task, in the order of axes and legends.

    Args:
        tasks: names, repeated or not.

    Returns:
        The tasks of `TASK_COLORS` with their colours, then the others by name with colours from a fixed
        cycle of five.
    """
    tasks = set(tasks)
    others = sorted(tasks - set(TASK_COLORS))
    known = {task: color for task, color in TASK_COLORS.items() if task in tasks}
    return known | {task: _FURTHER_COLORS[i % len(_FURTHER_COLORS)] for i, task in enumerate(others)}


def plot_beta_by_task(
    table: pd.DataFrame,
    *,
    beta0: float | None = None,
    beta_min: float | None = None,
    beta_max: float | None = None,
    ax: Axes | None = None,
    **artist_kws,
) -> Axes:
    r"""The distribution of beta within each task: every prompt a point, median and quartiles over them.

    In the inverse form a second axis on the right shows the scale :math:`s(x) = 1/\beta(x)` that multiplies h
    in the loss; in the standard form beta is that scale.

    Args:
        table: columns form, seed, task, prompt, beta; one form.
        beta0: the fixed beta of stage 1; a line where given.
        beta_min: the lower end of the range; a line where given.
        beta_max: the upper end; a line where given.
        ax: where to draw; a new figure if None.
        **artist_kws: for `Axes.scatter`.

    Raises:
        ValueError: an empty table, missing columns, or several forms.
    """
    form = _one_form(table, ["form", "seed", "task", "prompt", "beta"])
    ax = _axes(ax)
    colors = task_colors(table["task"])
    labels = []
    for place, (task, color) in enumerate(colors.items()):
        rows = table[table["task"] == task]
        beta = rows["beta"].to_numpy()
        style = {"s": 16, "color": color, "alpha": 0.55, "linewidths": 0} | artist_kws
        ax.scatter(place + _jitter(beta), beta, **style)
        # not Axes.boxplot, which reads all rcParams, and so loads pyplot
        q1, median, q3 = np.quantile(beta, [0.25, 0.5, 0.75])
        ax.add_patch(Rectangle((place - 0.31, q1), 0.62, q3 - q1, fill=False, edgecolor=_INK, zorder=2))
        ax.hlines(median, place - 0.31, place + 0.31, color=_INK, linewidth=2.2, zorder=2)
        labels.append([task, *_count(rows)])
    if len(colors) <= 4:
        ax.set_xticks(range(len(colors)), ["\n".join(label) for label in labels])
    else:
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(range(len(colors)), [" ".join(label) for label in labels], **turned)
    ax.set_xlim(-0.5 - 0.22 * len(colors), len(colors) - 0.5)  # room for the lines' labels on the left
    ax.tick_params(axis="x", length=0)
    _beta_axis(ax, table["beta"])
    _beta_lines(ax, inside=True, beta0=beta0, beta_min=beta_min, beta_max=beta_max)
    if form == "standard":
        ax.set_ylabel(r"$\beta(x)$ = scale $s(x)$")
    else:
        second = ax.secondary_yaxis("right", functions=(_reciprocal, _reciprocal))
        second.set_ylabel(r"scale $s(x) = 1/\beta(x)$")
        _plain_ticks(second.yaxis)
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
    r"""Beta of each prompt against the entropy of the reference there, with the line that the entropy term wants.

    Args:
        table: columns form, seed, task, prompt, beta, ref_entropy, ref_entropy_se; one form. The horizontal
            bars are one standard error of the entropy to either side.
        alpha: beta per nat of entropy; where given, :math:`\alpha H` is drawn, clipped to the range.
        beta0: the fixed beta of stage 1; a line where given.
        beta_min: the lower end of the range; a line where given.
        beta_max: the upper end; a line where given.
        ax: where to draw; a new figure if None.
        **artist_kws: for `Axes.scatter`.

    Raises:
        ValueError: an empty table, missing columns, or several forms.
    """
    _one_form(table, ["form", "seed", "task", "prompt", "beta", "ref_entropy", "ref_entropy_se"])
    ax = _axes(ax)
    for task, color in task_colors(table["task"]).items():
        rows = table[table["task"] == task]
        h, beta = rows["ref_entropy"], rows["beta"]
        ax.errorbar(h, beta, xerr=rows["ref_entropy_se"], fmt="none", ecolor=color, elinewidth=1, alpha=0.4)
        style = {"s": 18, "color": color, "alpha": 0.75, "linewidths": 0, "label": task} | artist_kws
        ax.scatter(h, beta, **style)
    if alpha is not None:
        _entropy_line(ax, alpha, beta_min, beta_max)
    ax.set_xlabel(_ENTROPY_LABEL)
    _beta_axis(ax, table["beta"])
    _beta_lines(ax, inside=False, beta0=beta0, beta_min=beta_min, beta_max=beta_max)
    _legend_above(ax, ncols=4)
    return ax


def plot_training(history: pd.DataFrame, *, y: str, ax: Axes | None = None, **artist_kws) -> Axes:
    r"""One quantity over the steps of training.

    Args:
        history: what `train.train` returned, for one form; stages and seeds concatenated. A line for each
            seed. Rows in which the quantity was not measured are passed over.
        y: a key of `QUANTITIES`. "accuracy" is that of the training batch, with the held-out pairs' beside it
            where it was measured; "kl" has a band of one standard error to either side; "beta" is a line for
            each task, on a log axis.
        ax: where to draw; a new figure if None.
        **artist_kws: for `Axes.plot`.

    Raises:
        ValueError: an empty history, missing columns, several forms, another y, or nothing measured.
    """
    if y not in QUANTITIES:
        raise ValueError(f"y: got {y!r}, expected one of {list(QUANTITIES)}")
    betas = [column for column in history.columns if column.startswith("beta/")]
    needed = {"beta": betas or ["beta/<task>"], "kl": ["kl", "kl_se"]}.get(y, [y])
    _one_form(history, ["form", "seed", "stage", "step", *needed], name="history")
    if history[needed].isna().all(axis=None):
        raise ValueError(f"history: no row has {needed}, expected a measurement of {y!r}")
    ax = _axes(ax)
    style = {"color": TERM_COLORS["dpo"], "linewidth": 1.4} | artist_kws
    if y == "beta":
        colors = task_colors(column.removeprefix("beta/") for column in betas)
        for task, color in colors.items():
            _lines(ax, history, f"beta/{task}", label=task, **style | {"color": color})
        _beta_axis(ax, pd.Series(history[betas].to_numpy().ravel()))
    elif y == "accuracy" and "held_out_accuracy" in history:
        _lines(ax, history, "accuracy", label="training batch", **style | {"alpha": 0.35})
        _lines(ax, history, "held_out_accuracy", label="held-out pairs", **style | {"marker": "o", "markersize": 4})
    else:
        _lines(ax, history, y, label=y, **style)
    if y == "kl":
        for _, of_seed in history.dropna(subset="kl").groupby("seed"):
            low, high = of_seed["kl"] - of_seed["kl_se"], of_seed["kl"] + of_seed["kl_se"]
            ax.fill_between(of_seed["step"], low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.set_ylabel(QUANTITIES[y])
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(frameon=False)
    _step_axis(ax)
    _stage_boundary(ax, history)
    return ax


def plot_beta_gradients(history: pd.DataFrame, *, task: str, ax: Axes | None = None, **artist_kws) -> Axes:
    r"""What pulls on a task's beta in stage 2: each term's gradient, and their sum.

    The axis is linear, so that the eye can add the terms up to the sum.

    Args:
        history: what `train.train` returned, for one form; columns grad/<term>/<task>, where a positive pull
            lowers beta under gradient descent.
        task: whose beta.
        ax: where to draw; a new figure if None.
        **artist_kws: for `Axes.plot`.

    Raises:
        ValueError: an empty history, missing columns, several forms, or no rows of stage 2.
    """
    columns = {term: f"grad/{term}/{task}" for term in TERM_COLORS}
    _one_form(history, ["form", "seed", "stage", "step", *columns.values()], name="history")
    rows = history[history["stage"] == 2]
    if rows.empty:
        raise ValueError("history: no rows with stage 2, expected some: beta does not learn in stage 1")
    ax = _axes(ax)
    ax.axhline(0, color=_GREY, linewidth=0.8, label="_zero")
    for term, column in columns.items():
        _lines(ax, rows, column, label=term, **{"color": TERM_COLORS[term], "linewidth": 1.4} | artist_kws)
    total = rows.assign(sum=rows[list(columns.values())].sum(axis=1, skipna=False))
    style = {"color": "black", "linewidth": 1.4, "linestyle": (0, (4, 2))}
    _lines(ax, total, "sum", label="sum", **style | artist_kws)
    ax.set_ylabel(_PULL_LABEL.replace("pull", f"{task}: pull"))
    _legend_above(ax, ncols=5)
    _step_axis(ax)
    return ax


def plot_entropy_estimators(table: pd.DataFrame, *, ax: Axes | None = None, **artist_kws) -> Axes:
    r"""The reference's entropy by each estimator: every prompt a point, each task's mean with its standard error.

    The estimators have different units, which their labels state: tasks are to be compared within one of them.
    The axis is logarithmic where all entropies are positive, linear elsewhere.

    Args:
        table: columns estimator (keys of `ESTIMATORS`), task, prompt, entropy. A column example, if there is
            one, marks prompts that are shown by themselves, with their text, and belong to no task's mean: true,
            or the text to show.
        ax: where to draw; a new figure if None.
        **artist_kws: for `Axes.scatter`.

    Raises:
        ValueError: an empty table, missing columns, an estimator that is not known, or nothing but examples.
    """
    _require(table, ["estimator", "task", "prompt", "entropy"], "table")
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
        ax = Figure(figsize=(2.3 * len(places) + 0.8, 4.4), layout="constrained").add_subplot()
    ax = _axes(ax)
    if (table["entropy"] > 0).all():
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis)
    colors = task_colors(of_data["task"])
    width = (0.48 if named.any() else 0.8) / len(colors)  # examples stand to the right of the tasks
    for i, (task, color) in enumerate(colors.items()):
        rows = of_data[of_data["task"] == task]
        style = {"s": 12, "color": color, "alpha": 0.4, "linewidths": 0, "label": "_prompts"} | artist_kws
        for name, values in rows.groupby("estimator")["entropy"]:
            x = places[name] - (0.46 if named.any() else 0.4) + width * (i + 0.5)
            ax.scatter(x + _jitter(values.to_numpy(), 0.6 * width), values, **style)
            se = values.std() / len(values) ** 0.5 if len(values) > 1 else 0
            mean = {"marker": "D", "markersize": 4.5, "markeredgecolor": "white", "capsize": 4, "elinewidth": 1.6}
            ax.errorbar(x, values.mean(), se, color=color, ecolor=_INK, zorder=4, label=f"_{task}", **mean)
        ax.scatter([], [], color=color, s=24, linewidths=0, label=f"{task} (n={rows['prompt'].nunique()})")
    ax.set_xticks(range(len(places)), [ESTIMATORS[name] for name in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
    for place in range(1, len(places)):
        ax.axvline(place - 0.5, color=_GREY, linewidth=0.5, alpha=0.4, label="_between")
    examples = table[named].groupby("estimator")
    for name, values in examples["entropy"]:
        x = np.full(len(values), places[name] + 0.09)
        ax.scatter(x, values, s=24, marker="_", color=_INK, label="_examples", zorder=3)
    ax.set_ylim(ax.get_ylim())  # the texts find their places within these limits
    for name, group in examples:
        texts = [p if mark is True else mark for p, mark in zip(group["prompt"], shown[group.index], strict=True)]
        _texts_beside(ax, places[name] + 0.09, group["entropy"].to_numpy(), texts)
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("entropy of the reference")
    _legend_above(ax, ncols=4)
    return ax


def figure_beta_by_task(
    table: pd.DataFrame,
    *,
    alpha: Mapping[str, float] | None = None,
    beta0: Mapping[str, float] | None = None,
    beta_min: Mapping[str, float] | None = None,
    beta_max: Mapping[str, float] | None = None,
) -> Figure:
    """Both forms, a row each: beta by task on the left, beta against entropy on the right.

    Args:
        table: what `beta_table` returned, for one form or concatenated for two.
        alpha: beta per nat of entropy, by form.
        beta0: the fixed beta of stage 1, by form.
        beta_min: the lower end of the range, by form.
        beta_max: the upper end of the range, by form.

    Raises:
        ValueError: an empty table or missing columns.
    """
    forms = _forms(table, "table")
    figure = Figure(figsize=(9, 3.9 * len(forms)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    panels = figure.subplots(len(forms), 2, squeeze=False, width_ratios=(1, 1.1))
    for form, (left, right) in zip(forms, panels, strict=True):
        rows = table[table["form"] == form]
        given = {"beta0": beta0, "beta_min": beta_min, "beta_max": beta_max}
        lines = {name: by_form.get(form) for name, by_form in given.items() if by_form is not None}
        plot_beta_by_task(rows, ax=left, **lines)
        plot_beta_vs_entropy(rows, ax=right, alpha=None if alpha is None else alpha.get(form), **lines)
        left.set_title(_FORMULAS[form], loc="left", fontsize="large", pad=12)
    return figure


def figure_training(history: pd.DataFrame) -> Figure:
    """How training went: a column a form, a row a quantity, as far as they were measured.

    Args:
        history: what `train.train` returned, for one form or concatenated for two.

    Raises:
        ValueError: an empty history or missing columns.
    """
    forms = _forms(history, "history")
    measured = [column.split("/")[0] for column in history.columns[history.notna().any()]]
    rows = [y for y in QUANTITIES if y in measured]
    figure = Figure(figsize=(9, 2.1 * len(rows) + 0.5), layout="constrained")
    tops: dict[str, Axes] = {}  # the steps of a column are one axis, however few of them were measured
    for i, y in enumerate(rows):
        first = None
        for j, form in enumerate(forms):
            # the forms are to be compared; only their betas live on different scales
            place = i * len(forms) + j + 1
            ax = figure.add_subplot(len(rows), len(forms), place, sharey=first, sharex=tops.get(form))
            tops.setdefault(form, ax)
            plot_training(history[history["form"] == form], y=y, ax=ax)
            first = None if y == "beta" else ax
            if i == 0:
                ax.set_title(_FORMULAS[form], loc="left", fontsize="large", pad=20)
            if i < len(rows) - 1:
                ax.set_xlabel("")
                ax.tick_params(labelbottom=False)
            if i > 0:
                for text in list(ax.texts):  # the stages are named once, at the top
                    text.remove()
            if j > 0:
                ax.set_ylabel("")
    figure.align_ylabels()
    return figure


def figure_beta_gradients(history: pd.DataFrame) -> Figure:
    """What moves beta: a row a form, a column a task.

    Args:
        history: what `train.train` returned, for one form or concatenated for two.

    Raises:
        ValueError: an empty history, or missing columns.
    """
    forms = _forms(history, "history")
    tasks = task_colors(c.removeprefix("grad/dpo/") for c in history.columns if c.startswith("grad/dpo/"))
    if not tasks:
        raise ValueError("history: missing columns ['grad/dpo/<task>']")
    figure = Figure(figsize=(9, 3.1 * len(forms) + 0.3), layout="constrained")
    for form, part in zip(forms, figure.subfigures(len(forms), squeeze=False).flat, strict=True):
        part.suptitle(_FORMULAS[form], x=0.01, ha="left")
        line = part.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for (task, color), ax in zip(tasks.items(), line, strict=True):
            plot_beta_gradients(history[history["form"] == form], task=task, ax=ax)
            ax.set_title(task, loc="left", color=color, fontsize="medium")
            ax.label_outer()
            handles = ax.get_legend_handles_labels()
            ax.get_legend().remove()
        line[0].set_ylabel(_PULL_LABEL)
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _require(table: pd.DataFrame, columns: list[str], name: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{name}: missing columns {missing}, expected {columns}")
    if table.empty:
        raise ValueError(f"{name}: got no rows, expected at least one")


def _forms(table: pd.DataFrame, name: str) -> list[str]:
    _require(table, ["form"], name)
    return sorted(table["form"].unique())  # inverse before standard


def _one_form(table: pd.DataFrame, columns: list[str], name: str = "table") -> str:
    """The form of a table that has one, with these columns and at least one row."""
    _require(table, columns, name)
    forms = _forms(table, name)
    if len(forms) > 1:
        raise ValueError(f"{name}: got the forms {forms}, expected one: draw each on Axes of its own")
    return forms[0]


def _axes(ax: Axes | None) -> Axes:
    ax = Figure(figsize=(6, 4), layout="constrained").add_subplot() if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _count(rows: pd.DataFrame) -> list[str]:
    """How many prompts a group has, and how many seeds if several."""
    seeds = rows["seed"].nunique()
    return [f"(n={rows['prompt'].nunique()})"] + ([f"{seeds} seeds"] if seeds > 1 else [])


def _jitter(values: np.ndarray, width: float = 0.5) -> np.ndarray:
    """Offsets that keep neighbours apart: in the order of the values, steps of the golden ratio."""
    rank = np.argsort(np.argsort(values, kind="stable"))
    return width * ((0.5 + rank * 0.618033988749895) % 1 - 0.5)


def _reciprocal(values: np.ndarray) -> np.ndarray:
    # matplotlib asks for 0 too, for the corners of spines that are not shown
    values = np.asarray(values, dtype=float)
    return np.divide(1, values, out=np.full(values.shape, np.inf), where=values != 0)


def _plain(value: float) -> str:
    """Up to four digits, never an exponent."""
    return np.format_float_positional(value, precision=4, unique=False, fractional=False, trim="-")


class _PlainLogLocator(LogLocator):
    """At least three round numbers, whatever is shown: 1, 2, 5 of each decade, or more where it is little."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        low, high = sorted((vmin, vmax))
        if high < 5 * low:
            return MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(vmin, vmax)
        self.set_params(subs=(1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5))
        return super().tick_values(vmin, vmax)


def _plain_ticks(axis: Axis) -> None:
    axis.set_major_locator(_PlainLogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_locator(NullLocator())


def _beta_axis(ax: Axes, beta: pd.Series) -> None:
    """A log axis for beta, with plain decimals and room around the values, and around those it is shared with."""
    others = [other for other in ax.get_shared_y_axes().get_siblings(ax) if other is not ax and other.has_data()]
    low, high = _padded(beta.min(), beta.max())
    if others:
        below, above = others[0].get_ylim()
        low, high = min(low, below), max(high, above)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_ylabel(r"$\beta(x)$")
    _plain_ticks(ax.yaxis)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = max((high / low) ** 0.08, 1.1)
    return low / pad, high * pad


def _beta_lines(ax: Axes, *, inside: bool, **given: float | None) -> None:
    """Lines at beta0 and the ends of the range, where given; the axis makes room.

    They are labelled inside the axes on the left, or outside on the right.
    """
    symbols = {"beta0": r"$\beta_0$", "beta_min": r"$\beta_{\min}$", "beta_max": r"$\beta_{\max}$"}
    low, high = ax.get_ylim()
    for name, value in given.items():
        if value is None:
            continue
        dashes = "-" if name == "beta0" else (0, (5, 3))
        ax.axhline(value, color=_GREY, linewidth=0.9, linestyle=dashes, zorder=0.9, label=f"_{name}")
        ax.annotate(
            f"{symbols[name]} = {_plain(value)}",
            (0 if inside else 1, value),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, 2 if inside else 0),
            textcoords="offset points",
            va="bottom" if inside else "center",
            color=_GREY,
            fontsize="small",
        )
        below, above = _padded(value, value)
        low, high = min(low, below), max(high, above)
    ax.set_ylim(low, high)


def _entropy_line(ax: Axes, alpha: float, beta_min: float | None, beta_max: float | None) -> None:
    low, high = ax.get_xlim()
    h = np.linspace(max(low, high / 1000), high, 400)  # alpha·0 is not on a log axis
    ax.set_xlim(low, high)
    wanted = alpha * h
    name = r"$\alpha H$"
    if beta_min is not None or beta_max is not None:
        wanted = np.clip(wanted, beta_min, beta_max)
        name = r"$\mathrm{clip}(\alpha H)$"
    ax.plot(h, wanted, color="black", linewidth=1.4, label=rf"{name}, $\alpha$ = {_plain(alpha)}")


def _lines(ax: Axes, rows: pd.DataFrame, column: str, *, label: str, **style) -> None:
    """A line for each seed, one of them in the legend."""
    for i, (_, of_seed) in enumerate(rows.dropna(subset=column).groupby("seed")):
        of_seed = of_seed.sort_values("step")
        ax.plot(of_seed["step"], of_seed[column], label=label if i == 0 else f"_{label}", **style)


def _legend_above(ax: Axes, ncols: int) -> None:
    """A legend in rows above the axes, where it hides nothing."""
    tight = {"handlelength": 1.5, "handletextpad": 0.4, "columnspacing": 1.0, "borderaxespad": 0.3}
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, frameon=False, fontsize="small", **tight)


def _texts_beside(ax: Axes, x: float, values: np.ndarray, texts: list[str]) -> None:
    """Texts on the right of points that stand above one another, pushed apart."""
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = to_axes.transform(np.column_stack([np.full(len(values), x), values]))[:, 1]
    height, gap = 1.0, 0.045  # of the axes; a line of small print
    for i in reversed(np.argsort(heights, kind="stable")):
        height = min(heights[i], height - gap)
        font, text = _printable(texts[i])
        ax.annotate(
            text,
            (x, values[i]),
            xytext=(x + 0.05, height),
            textcoords=ax.get_xaxis_transform(),
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": _GREY},
            va="center",
            fontsize="x-small",
            color=_INK,
            parse_math=False,
            **font,
        )


_CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip


def _printable(text: str) -> tuple[dict[str, list[str]], str]:
    """Font and text; characters that no font at hand has become boxes (matplotlib would warn, and draw such)."""
    known = get_font(findfont(FontProperties()))
    if all(known.get_char_index(ord(letter)) for letter in text):
        return {}, text
    there = {font.name for font in fontManager.ttflist}
    for name in _CHINESE_FONTS:
        if name in there:
            return {"fontfamily": ["sans-serif", name]}, text
    return {}, "".join(letter if known.get_char_index(ord(letter)) else "□" for letter in text)


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _stage_boundary(ax: Axes, history: pd.DataFrame) -> None:
    if history["stage"].nunique() < 2:
        return
    start = history.loc[history["stage"] == 2, "step"].min()
    ax.axvline(start, color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="_stage 2")
    for text, side, shift in ((r"fixed $\beta_0$", "right", -4), (r"$\beta(x)$ learns", "left", 4)):
        ax.annotate(
            text,
            (start, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(shift, 3),
            textcoords="offset points",
            ha=side,
            color=_GREY,
            fontsize="small",
        )
