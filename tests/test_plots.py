"""The figures, read back from their artists."""

from __future__ import annotations

import ast
import itertools
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from dpoviz.analysis import plots, style
from dpoviz.analysis.tables import EXPECTED_ORDER
from dpoviz.lm.entropy import EntropyEstimates
from dpoviz.translation import FONT_ADVICE

RANGE = {"beta0": 1.0, "beta_min": 0.25, "beta_max": 4.0}
TERMS = ("dpo", "range", "smoothness", "consistency", "entropy")


def table(form: str = "inverse", tasks=("dialogue", "math", "code"), n: int = 12, seeds=(0,)) -> pd.DataFrame:
    """Columns as `beta_table` makes them; tasks not in the order of the figures."""
    rng = np.random.default_rng(0)
    keys = [(seed, task, f"{task} {i}") for seed in seeds for task in tasks for i in range(n)]
    frame = pd.DataFrame(keys, columns=["seed", "task", "prompt"]).assign(form=form)
    beta, entropy = rng.uniform(0.4, 2.5, len(keys)), rng.uniform(0.1, 2, len(keys))
    return frame.assign(beta=beta, scale=1 / beta, ref_entropy=entropy, ref_entropy_se=0.01 + 0.1 * entropy)


def history(form: str = "inverse", tasks=("math", "code", "dialogue"), seed: int = 0) -> pd.DataFrame:
    """Three rows with a fixed beta and four with beta(x); KL in every other one."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(7):
        stage = 1 if i < 3 else 2
        row = {"form": form, "seed": seed, "stage": stage, "step": 10 * i, "loss": rng.uniform(0.5, 0.7)}
        row |= {"accuracy": rng.uniform(0.4, 0.8), "margin": rng.normal()}
        if i % 2 == 0:
            row |= {"kl": 0.1 * i, "kl_se": 0.02 + 0.01 * i, "held_out_accuracy": 0.5 + 0.03 * i}
        for task in tasks:
            row[f"beta/{task}"] = 1.0 if stage == 1 else rng.uniform(0.5, 2)
            row |= {f"grad/{term}/{task}": rng.normal() for term in TERMS if stage == 2}
        rows.append(row)
    return pd.DataFrame(rows)


def both(make, **kws) -> pd.DataFrame:
    return pd.concat([make("standard", **kws), make("inverse", **kws)], ignore_index=True)


def points(ax: Axes) -> list[PathCollection]:
    return [artist for artist in ax.collections if isinstance(artist, PathCollection)]


def color(artist: PathCollection) -> str:
    return to_hex(artist.get_facecolor()[0]).upper()


def lines(ax: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """By label, x and y of the lines of an Axes."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def draw(figure: Figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def shown_ticks(axis: Axis) -> dict[float, str]:
    """Place and text of each tick within the limits."""
    draw(axis.figure)
    low, high = sorted(axis.get_view_interval())
    places = axis.get_majorticklocs()
    ticks = zip(places, axis.get_major_formatter().format_ticks(places), strict=True)
    return {place: text for place, text in ticks if low <= place <= high}


def texts(figure: Figure) -> list[tuple[str, object]]:
    """Every text that shows, and the box of pixels that it covers."""
    renderer = draw(figure)
    beyond = set()  # matplotlib keeps the labels of ticks outside the limits, and does not draw them
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        beyond |= {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    return [(a, b) for (a, box), (b, other) in itertools.combinations(texts(figure), 2) if box.overlaps(other)]


def cut_off(figure: Figure) -> list[str]:
    width, height = figure.bbox.size
    inside = {t: b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for t, b in texts(figure)}
    return [text for text, fits in inside.items() if not fits]


REFUSED = [
    (lambda t: t.iloc[:0], "got no rows"),
    (lambda t: t.drop(columns="form"), r"missing columns \['form'\]"),
    (lambda t: pd.concat([t, t.assign(form="standard")]), r"got the forms \['inverse', 'standard'\], expected one"),
]


class TestTaskColors:
    def test_the_three_tasks_keep_their_colour_and_order(self):
        assert tuple(plots.TASK_COLORS) == EXPECTED_ORDER
        assert list(plots.task_colors(["dialogue", "math", "math"]).items()) == [
            ("math", plots.TASK_COLORS["math"]),
            ("dialogue", plots.TASK_COLORS["dialogue"]),
        ]

    def test_other_tasks_come_after_them_by_name(self):
        colors = plots.task_colors(["poetry", "code", "essay"])
        assert list(colors) == ["code", "essay", "poetry"]
        assert colors == plots.task_colors(["essay", "poetry", "code"])
        assert len(set(plots.task_colors([*"abcde", *EXPECTED_ORDER]).values())) == 8
        assert list(plots.task_colors("gfedcba")) == list("abcdefg")  # the cycle goes round

    def test_terms_have_colours_that_are_no_tasks(self):
        assert tuple(plots.TERM_COLORS) == TERMS
        tasks = plots.task_colors([*"abcde", *EXPECTED_ORDER])
        # CIE76 distance: 2.3 is just noticeable, and a thin line needs several times as much
        near = [distance(a, b, np.eye(3)) for a in tasks.values() for b in plots.TERM_COLORS.values()]
        assert min(near) > 10

    @pytest.mark.parametrize("vision", ["normal", "protanopia", "deuteranopia", "tritanopia"])
    def test_told_apart_by_every_vision(self, vision):
        # small points need many times the just noticeable 2.3
        pairs = itertools.combinations(plots.TASK_COLORS.values(), 2)
        assert min(distance(a, b, VISION[vision]) for a, b in pairs) > 40
        assert min(distance(a, "#FFFFFF", VISION[vision]) for a in plots.TASK_COLORS.values()) > 40
        terms = itertools.combinations(plots.TERM_COLORS.values(), 2)
        assert min(distance(a, b, VISION[vision]) for a, b in terms) > 25

    def test_the_measure_knows_red_from_green(self):
        red, green = "#D62728", "#2CA02C"  # matplotlib's, the classic pair that is not safe
        assert distance(red, green, VISION["normal"]) > 100
        assert distance(red, green, VISION["deuteranopia"]) < 40


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(color: str, vision: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of a colour as a kind of vision sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = to_xyz @ np.clip(vision @ linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str, vision: np.ndarray) -> float:
    return float(np.linalg.norm(lab(a, vision) - lab(b, vision)))


class TestTaskLabel:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("task", "shown"),
        [
            ("math", "math"),
            ("$x$", "$x$"),
            (r"$\no$", r"$\no$"),
            ("a$b", "a$b"),
            ("_x", "_x"),
            ("", "(no name)"),
            ("a\nb\tc", "a b c"),
            ("x" * 99, "x" * 23 + "…"),
        ],
    )
    def test_any_name_is_drawn_as_it_is(self, task, shown):
        by_task, by_entropy = plots.figure_beta_by_task(table(tasks=(task, "code"))).axes
        draw(by_task.figure)
        assert shown in [drawn(text.get_text()) for text in by_entropy.get_legend().get_texts()]
        assert f"{shown}\n(n=12)" in [drawn(text.get_text()) for text in by_task.get_xticklabels()]
        figure = plots.figure_beta_gradients(history(tasks=(task, "code")))
        draw(figure)
        assert shown in [drawn(ax.get_title(loc="left")) for ax in figure.axes]
        draw(plots.plot_beta_gradients(history(tasks=(task,)), task=task).figure)

    @pytest.mark.slow
    def test_chinese_names_are_drawn_without_a_warning_whatever_the_fonts(self):
        draw(plots.figure_beta_by_task(table(tasks=("数学", "code"))))
        draw(plots.figure_training(history(tasks=("数学", "code"))))
        draw(plots.figure_beta_gradients(history(tasks=("数学", "code"))))


def drawn(text: str) -> str:
    """What matplotlib draws of a text that holds no formula: it takes the backslash off an escaped dollar sign."""
    assert not is_math_text(text)
    return text.replace(r"\$", "$").strip()


class TestPlotBetaByTask:
    def test_every_prompt_is_a_point_in_its_place_and_colour(self):
        frame = table()
        ax = plots.plot_beta_by_task(frame)
        low, high = ax.get_ylim()
        for place, (task, group) in enumerate(zip(EXPECTED_ORDER, points(ax), strict=True)):
            x, y = np.asarray(group.get_offsets()).T
            assert sorted(y) == sorted(frame.loc[frame["task"] == task, "beta"])
            assert (abs(x - place) <= 0.25).all()
            assert (abs(np.diff(x[np.argsort(y)])) > 0.19).all()  # those that are near in beta
            assert color(group) == plots.TASK_COLORS[task]
            assert low < y.min() and y.max() < high

    @given(st.lists(st.floats(0.1, 10), min_size=2, max_size=60))
    @settings(max_examples=30)
    def test_no_point_hides_another_and_places_repeat(self, beta):
        values = np.array(beta)
        jitter = plots._jitter(values)
        assert (jitter == plots._jitter(values)).all()
        in_order = jitter[np.argsort(values, kind="stable")]
        # a golden step is 0.382 of the width; 0.19 is that of the width drawn here, less rounding
        assert (abs(np.diff(in_order)) > 0.19).all()

    def test_a_shared_axis_shows_the_points_of_all(self):
        frame, figure = table(), Figure()
        factors = (1, 10, 3)
        axes = figure.subplots(1, 3, sharey=True)
        for ax, factor in zip(axes, factors, strict=True):
            plots.plot_beta_by_task(frame.assign(beta=frame["beta"] * factor), ax=ax)
        low, high = axes[0].get_ylim()
        assert low < frame["beta"].min() and 10 * frame["beta"].max() < high

    def test_box_and_line_are_quartiles_and_median(self):
        frame = table()
        ax = plots.plot_beta_by_task(frame)
        medians = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
        for place, (task, box, median) in enumerate(zip(EXPECTED_ORDER, ax.patches, medians, strict=True)):
            q1, q2, q3 = statistics.quantiles(frame.loc[frame["task"] == task, "beta"], method="inclusive")
            # both are linear interpolations in float64
            assert (box.get_y(), box.get_y() + box.get_height()) == pytest.approx((q1, q3), rel=1e-12)
            assert median.get_segments()[0][:, 1].tolist() == pytest.approx([q2, q2], rel=1e-12)
            middles = box.get_x() + box.get_width() / 2, median.get_segments()[0][:, 0].mean()
            assert middles == pytest.approx((place, place), abs=1e-12)
            assert min(artist.get_zorder() for artist in (box, median)) > points(ax)[0].get_zorder()

    def test_groups_say_how_many_prompts(self):
        labels = plots.plot_beta_by_task(table()).get_xticklabels()
        assert [label.get_text() for label in labels] == ["math\n(n=12)", "code\n(n=12)", "dialogue\n(n=12)"]
        labels = plots.plot_beta_by_task(table(seeds=(0, 1, 2))).get_xticklabels()
        assert labels[0].get_text() == "math\n(n=12)\n3 seeds"

    @pytest.mark.slow
    @pytest.mark.parametrize("factor", [1e-5, 1, 3000])
    @pytest.mark.parametrize("spread", [0.001, 0.3, 0.8, 1.3, 1.6, 4])
    def test_log_axis_with_plain_decimals(self, factor, spread):
        frame = table()
        ax = plots.plot_beta_by_task(frame.assign(beta=factor * frame["beta"] ** spread))
        assert ax.get_yscale() == "log"
        for axis in (ax.yaxis, ax.child_axes[0].yaxis):
            ticks = shown_ticks(axis)
            assert 3 <= len(ticks) <= 14
            for place, text in ticks.items():
                assert re.fullmatch(r"\d+(\.\d+)?", text)
                # labels are rounded to four digits
                assert float(text) == pytest.approx(place, rel=5e-4)

    def test_inverse_form_has_the_scale_on_the_right(self):
        ax = plots.plot_beta_by_task(table("inverse"))
        (second,) = ax.child_axes
        draw(ax.figure)
        assert ax.get_ylabel() == r"$\beta(x)$"
        assert second.get_ylabel() == r"scale $s(x) = 1/\beta(x)$"
        for beta in (0.5, 1.0, 2.0):
            here, there = ax.transData.transform((0, beta)), second.transData.transform((0, 1 / beta))
            assert there[1] == pytest.approx(here[1], abs=0.01)  # pixels

    def test_standard_form_says_that_beta_is_the_scale(self):
        ax = plots.plot_beta_by_task(table("standard"))
        assert not ax.child_axes
        assert ax.get_ylabel() == r"$\beta(x)$ = scale $s(x)$"

    def test_beta0_and_the_range_are_lines_with_their_numbers(self):
        ax = plots.plot_beta_by_task(table(), **RANGE)
        drawn = lines(ax)
        assert {name: drawn[f"_{name}"][1] for name in RANGE} == {name: [v, v] for name, v in RANGE.items()}
        assert words(ax) == [r"$\beta_0$ = 1", r"$\beta_{\min}$ = 0.25", r"$\beta_{\max}$ = 4"]
        assert ax.get_ylim()[0] < 0.25 and ax.get_ylim()[1] > 4
        assert not words(plots.plot_beta_by_task(table()))

    def test_draws_where_told_and_passes_words_on(self):
        ax = Figure().add_subplot()
        assert plots.plot_beta_by_task(table(), ax=ax, marker="s", alpha=0.1) is ax
        assert {group.get_alpha() for group in points(ax)} == {0.1}
        assert ax.get_title() == ""

    @pytest.mark.parametrize(("change", "message"), REFUSED)
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"table: {message}"):
            plots.plot_beta_by_task(change(table()))


class TestPlotBetaVsEntropy:
    def test_every_prompt_is_a_point_with_its_error(self):
        frame = table()
        ax = plots.plot_beta_vs_entropy(frame)
        bars = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
        for task, group, bar in zip(EXPECTED_ORDER, points(ax), bars, strict=True):
            rows = frame[frame["task"] == task]
            assert group.get_offsets().tolist() == rows[["ref_entropy", "beta"]].to_numpy().tolist()
            assert color(group) == plots.TASK_COLORS[task]
            low, high = rows["ref_entropy"] - rows["ref_entropy_se"], rows["ref_entropy"] + rows["ref_entropy_se"]
            expected = np.stack([[low, rows["beta"]], [high, rows["beta"]]]).transpose(2, 0, 1)
            assert np.array_equal(np.array(bar.get_segments()), expected)

    def test_line_is_alpha_h_clipped_to_the_range(self):
        ax = plots.plot_beta_vs_entropy(table(), alpha=1.23456, beta_min=0.5, beta_max=1.5)
        x, y = lines(ax)[r"$\mathrm{clip}(\alpha H)$, $\alpha$ = 1.235"]
        assert y == pytest.approx([min(max(1.23456 * h, 0.5), 1.5) for h in x], rel=1e-12)
        assert {0.5, 1.5} < set(y)
        assert (x[0], x[-1]) == ax.get_xlim()

    def test_without_a_range_the_line_is_not_clipped(self):
        x, y = lines(plots.plot_beta_vs_entropy(table(), alpha=1.5))[r"$\alpha H$, $\alpha$ = 1.5"]
        assert y == pytest.approx([1.5 * h for h in x], rel=1e-12)

    def test_without_alpha_there_is_no_line(self):
        assert not lines(plots.plot_beta_vs_entropy(table()))

    def test_entropy_zero_is_no_place_for_the_line(self):
        frame = table().assign(ref_entropy=lambda t: t["ref_entropy"] - t["ref_entropy"].min())
        _, y = lines(plots.plot_beta_vs_entropy(frame, alpha=1.5))[r"$\alpha H$, $\alpha$ = 1.5"]
        assert min(y) > 0

    def test_legend_names_tasks_and_line(self):
        ax = plots.plot_beta_vs_entropy(table(), alpha=2.0)
        said = [text.get_text() for text in ax.get_legend().get_texts()]
        assert said == [*EXPECTED_ORDER, r"$\alpha H$, $\alpha$ = 2"]
        handles = dict(zip(said, ax.get_legend().legend_handles, strict=True))
        assert {task: color(handles[task]) for task in EXPECTED_ORDER} == plots.TASK_COLORS

    def test_axes_have_units_and_the_range(self):
        ax = plots.plot_beta_vs_entropy(table(), **RANGE)
        assert ax.get_xlabel() == "entropy of the reference $H$ (nats per token)"
        assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("linear", "log", r"$\beta(x)$")
        assert {name: lines(ax)[f"_{name}"][1][0] for name in RANGE} == RANGE
        assert len(words(ax)) == 3

    def test_draws_where_told_and_passes_words_on(self):
        ax = Figure().add_subplot()
        assert plots.plot_beta_vs_entropy(table(), ax=ax, s=3) is ax
        assert points(ax)[0].get_sizes().tolist() == [3]
        assert ax.get_title() == ""

    @pytest.mark.parametrize(
        ("change", "message"),
        [*REFUSED, (lambda t: t.drop(columns="ref_entropy_se"), r"missing columns \['ref_entropy_se'\]")],
    )
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"table: {message}"):
            plots.plot_beta_vs_entropy(change(table()))


class TestPlotTraining:
    @pytest.mark.parametrize(
        ("y", "label"),
        [
            ("loss", "total loss (nats)"),
            ("margin", r"reward margin $s\cdot h$ (nats)"),
            ("kl", "KL to the reference (nats)"),
        ],
    )
    def test_one_line_over_the_steps_that_have_it(self, y, label):
        rows = history()
        ax = plots.plot_training(rows.sample(frac=1, random_state=0), y=y)
        measured = rows.dropna(subset=y)
        assert lines(ax)[y] == (list(measured["step"]), list(measured[y]))
        assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("step", label, "")
        assert ax.get_legend() is None

    def test_kl_has_a_band_of_one_standard_error(self):
        rows = history().dropna(subset="kl")
        (band,) = [a for a in plots.plot_training(history(), y="kl").collections if isinstance(a, PolyCollection)]
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
        for sign in (-1, 1):
            edge = zip(rows["step"], rows["kl"] + sign * rows["kl_se"], strict=True)
            assert set(edge) <= corners

    def test_beta_is_a_line_a_task_on_a_log_axis(self):
        rows = history()
        ax = plots.plot_training(rows, y="beta")
        assert ax.get_yscale() == "log"
        drawn = {line.get_label(): line for line in ax.get_lines() if line.get_label() in EXPECTED_ORDER}
        assert tuple(drawn) == EXPECTED_ORDER
        for task, line in drawn.items():
            assert list(line.get_ydata()) == list(rows[f"beta/{task}"])
            assert line.get_color() == plots.TASK_COLORS[task]

    def test_accuracy_shows_held_out_pairs_where_measured(self):
        rows = history()
        drawn = lines(plots.plot_training(rows, y="accuracy"))
        measured = rows.dropna(subset="held_out_accuracy")
        assert drawn["training batch"] == (list(rows["step"]), list(rows["accuracy"]))
        assert drawn["held-out pairs"] == (list(measured["step"]), list(measured["held_out_accuracy"]))
        alone = lines(plots.plot_training(rows.drop(columns="held_out_accuracy"), y="accuracy"))
        assert alone["accuracy"] == drawn["training batch"]

    def test_stage_boundary_is_at_the_first_step_of_stage_2(self):
        ax = plots.plot_training(history(), y="loss")
        assert lines(ax)["_stage 2"][0] == [30, 30]
        assert words(ax) == [r"fixed $\beta_0$", r"$\beta(x)$ learns"]
        only = plots.plot_training(history().query("stage == 2"), y="loss")
        assert "_stage 2" not in lines(only) and not words(only)

    def test_a_line_a_seed_and_one_of_them_in_the_legend(self):
        first, second = history(), history(seed=1)
        ax = plots.plot_training(pd.concat([first, second]), y="beta")
        drawn = lines(ax)
        assert drawn["math"][1] == list(first["beta/math"])
        assert drawn["_math"][1] == list(second["beta/math"])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == list(EXPECTED_ORDER)

    def test_draws_where_told_and_passes_words_on(self):
        ax = Figure().add_subplot()
        assert plots.plot_training(history(), y="loss", ax=ax, linewidth=7) is ax
        assert ax.get_lines()[0].get_linewidth() == 7

    @pytest.mark.parametrize(("change", "message"), REFUSED)
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"history: {message}"):
            plots.plot_training(change(history()), y="loss")

    @pytest.mark.parametrize(
        ("y", "drop", "message"),
        [
            ("los", [], r"y: got 'los', expected one of \['loss', 'accuracy', 'margin', 'kl', 'beta'\]"),
            ("kl", ["kl_se"], r"history: missing columns \['kl_se'\]"),
            ("beta", [f"beta/{task}" for task in EXPECTED_ORDER], r"history: missing columns \['beta/<task>'\]"),
        ],
    )
    def test_refuses_what_is_not_there(self, y, drop, message):
        with pytest.raises(ValueError, match=message):
            plots.plot_training(history().drop(columns=drop), y=y)

    def test_refuses_what_was_never_measured(self):
        with pytest.raises(ValueError, match=r"history: no row has \['loss'\]"):
            plots.plot_training(history().assign(loss=np.nan), y="loss")


class TestPlotBetaGradients:
    def test_a_line_a_term_and_their_sum_in_stage_2(self):
        rows = history().query("stage == 2")
        ax = plots.plot_beta_gradients(history(), task="code")
        drawn = {line.get_label(): line for line in ax.get_lines()}
        for term in TERMS:
            assert list(drawn[term].get_xdata()) == [30, 40, 50, 60]
            assert list(drawn[term].get_ydata()) == list(rows[f"grad/{term}/code"])
            assert drawn[term].get_color() == plots.TERM_COLORS[term]
        total = [sum(row[f"grad/{term}/code"] for term in TERMS) for _, row in rows.iterrows()]
        # the order of five additions
        assert list(drawn["sum"].get_ydata()) == pytest.approx(total, rel=1e-12)
        assert drawn["sum"].is_dashed() and not drawn["dpo"].is_dashed()
        assert list(drawn["_zero"].get_ydata()) == [0, 0]

    def test_axis_says_whose_pull_and_which_way(self):
        ax = plots.plot_beta_gradients(history(), task="math")
        assert ax.get_ylabel() == "math: pull on $\\beta(x)$\n(positive lowers it)"
        assert (ax.get_xlabel(), ax.get_yscale(), ax.get_title()) == ("step", "linear", "")
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [*TERMS, "sum"]

    @pytest.mark.parametrize("empty", [True, False])
    def test_a_term_that_is_switched_off_has_no_line(self, empty):
        off = [f"grad/{term}/math" for term in ("consistency", "entropy")]
        rows = history().assign(**dict.fromkeys(off, np.nan)) if empty else history().drop(columns=off)
        ax = plots.plot_beta_gradients(rows, task="math")
        left = ["dpo", "range", "smoothness"]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [*left, "sum"]
        total = rows.query("stage == 2")[[f"grad/{term}/math" for term in left]].sum(axis=1)
        assert lines(ax)["sum"][1] == pytest.approx(list(total), rel=1e-12)

    def test_a_term_without_a_color_is_grey_and_part_of_the_sum(self):
        rows = history().assign(**{"grad/new/math": 3.0})
        drawn = {line.get_label(): line for line in plots.plot_beta_gradients(rows, task="math").get_lines()}
        total = rows.query("stage == 2")[[f"grad/{term}/math" for term in (*TERMS, "new")]].sum(axis=1)
        assert drawn["new"].get_color() not in plots.TERM_COLORS.values()
        assert list(drawn["sum"].get_ydata()) == pytest.approx(list(total), rel=1e-12)

    def test_a_task_that_no_batch_held_has_no_line(self):
        rows = history()
        rows.loc[:, [c for c in rows if c.startswith("grad/") and c.endswith("/math")]] = np.nan
        ax = plots.plot_beta_gradients(rows, task="math")
        assert list(lines(ax)) == ["_zero"] and ax.get_legend() is None
        assert len(plots.figure_beta_gradients(rows).axes) == 3

    def test_batch_without_the_task_leaves_no_sum(self):
        rows = history()
        rows.loc[rows["step"] == 40, [c for c in rows if c.endswith("/math") and c.startswith("grad")]] = np.nan
        drawn = lines(plots.plot_beta_gradients(rows, task="math"))
        assert drawn["sum"][0] == drawn["dpo"][0] == [30, 50, 60]

    def test_draws_where_told_and_passes_words_on(self):
        ax = Figure().add_subplot()
        assert plots.plot_beta_gradients(history(), task="math", ax=ax, linewidth=7) is ax
        assert {line.get_linewidth() for line in ax.get_lines() if line.get_label() != "_zero"} == {7}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *REFUSED,
            (lambda t: t.query("stage == 1"), "no rows with stage 2"),
            (lambda t: t.drop(columns="grad/dpo/math"), r"missing columns \['grad/dpo/math'\]"),
        ],
    )
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"history: {message}"):
            plots.plot_beta_gradients(change(history()), task="math")


@pytest.fixture(scope="module")
def main_figure() -> Figure:
    by_form = {name: {"inverse": value, "standard": value / 2} for name, value in RANGE.items()}
    return plots.figure_beta_by_task(both(table), alpha={"inverse": 1.1, "standard": 0.9}, **by_form)


class TestFigureBetaByTask:
    def test_a_row_a_form_with_every_point_on_both_sides(self, main_figure):
        left = [main_figure.axes[0], main_figure.axes[2]]
        right = [main_figure.axes[1], main_figure.axes[3]]
        assert [ax.get_title(loc="left").split()[0] for ax in left] == ["inverse", "standard"]
        for form, by_task, by_entropy in zip(("inverse", "standard"), left, right, strict=True):
            for ax in (by_task, by_entropy):
                drawn = np.concatenate([group.get_offsets() for group in points(ax)])
                assert sorted(drawn[:, 1]) == sorted(table(form)["beta"])
                (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
                assert ((drawn > (x0, y0)) & (drawn < (x1, y1))).all()

    def test_each_form_has_its_own_numbers(self, main_figure):
        inverse, standard = main_figure.axes[1], main_figure.axes[3]
        assert r"$\mathrm{clip}(\alpha H)$, $\alpha$ = 1.1" in lines(inverse)
        assert r"$\mathrm{clip}(\alpha H)$, $\alpha$ = 0.9" in lines(standard)
        assert (lines(inverse)["_beta0"][1][0], lines(standard)["_beta0"][1][0]) == (1.0, 0.5)
        for ax, scale in ((main_figure.axes[0], 1), (main_figure.axes[2], 2)):
            assert {name: lines(ax)[f"_{name}"][1][0] * scale for name in RANGE} == RANGE

    def test_two_panels_of_a_row_share_the_axis_of_beta(self, main_figure):
        axes = main_figure.axes
        assert axes[0].get_ylim() == axes[1].get_ylim() != axes[2].get_ylim()

    @pytest.mark.slow
    def test_no_text_covers_another_or_is_cut_off(self, main_figure):
        assert len(texts(main_figure)) > 40
        assert overlaps(main_figure) == []
        assert cut_off(main_figure) == []
        # the control: a figure half as wide cannot hold them
        narrow = plots.figure_beta_by_task(both(table))
        narrow.set_size_inches(4, 4)
        assert overlaps(narrow)

    def test_one_form_is_one_row_and_numbers_are_optional(self):
        figure = plots.figure_beta_by_task(table("standard"))
        assert len(figure.axes) == 2
        assert not any(words(ax) for ax in figure.axes)

    @pytest.mark.parametrize(("change", "message"), REFUSED[:2])
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"table: {message}"):
            plots.figure_beta_by_task(change(table()))


class TestFigureTraining:
    @pytest.mark.slow
    def test_a_column_a_form_and_a_row_a_quantity(self):
        figure = plots.figure_training(both(history))
        axes = np.array(figure.axes).reshape(5, 2)
        assert [ax.get_title(loc="left").split()[0] for ax in axes[0]] == ["inverse", "standard"]
        assert [ax.get_ylabel() for ax in axes[:, 0]] == list(plots.QUANTITIES.values())
        assert [ax.get_ylim() for ax in axes[:4, 0]] == [ax.get_ylim() for ax in axes[:4, 1]]
        assert [bool(words(ax)) for ax in axes[:, 0]] == [True, False, False, False, False]  # stages named once
        assert list(lines(axes[0, 1])["loss"][1]) == list(history("standard")["loss"])
        assert overlaps(figure) == []
        assert cut_off(figure) == []

    def test_what_was_not_measured_has_no_row(self):
        rows = history().drop(columns="margin").assign(kl=np.nan)
        labels = [ax.get_ylabel() for ax in plots.figure_training(rows).axes]
        assert labels == [plots.QUANTITIES[y] for y in ("loss", "accuracy", "beta")]

    def test_what_one_form_lacks_is_an_empty_panel(self):
        rows = pd.concat([history("inverse").drop(columns=["kl", "kl_se"]), history("standard")], ignore_index=True)
        axes = np.array(plots.figure_training(rows).axes).reshape(5, 2)
        assert [[ax.axison for ax in row] for row in axes] == [[True, True]] * 3 + [[False, True], [True, True]]

    def test_a_step_is_at_one_place_in_all_rows(self):
        rows = history()
        rows.loc[rows.index[:-2], "kl"] = np.nan  # measured at the end alone
        figure = plots.figure_training(rows)
        assert len({ax.get_xlim() for ax in figure.axes}) == 1
        low, high = figure.axes[0].get_xlim()
        assert low <= rows["step"].min() and high >= rows["step"].max()

    def test_shared_axes_hold_the_points_of_both_forms(self):
        rows = both(history)
        rows.loc[rows["form"] == "standard", "loss"] += 5
        axes = plots.figure_training(rows).axes
        assert axes[0].get_ylim() == axes[1].get_ylim()
        assert axes[0].get_ylim()[0] < 0.7 and axes[0].get_ylim()[1] > 5.5

    @pytest.mark.parametrize(("change", "message"), REFUSED[:2])
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"history: {message}"):
            plots.figure_training(change(history()))


class TestFigureBetaGradients:
    def test_the_legend_has_the_terms_of_all_forms(self):
        inverse = history("inverse").drop(columns=[f"grad/entropy/{task}" for task in EXPECTED_ORDER])
        standard = history("standard").drop(columns=[f"grad/range/{task}" for task in EXPECTED_ORDER])
        figure = plots.figure_beta_gradients(pd.concat([standard, inverse], ignore_index=True))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [*TERMS, "sum"]
        assert ["entropy" in lines(ax) for ax in figure.axes] == [False] * 3 + [True] * 3
        assert ["sum" in lines(ax) for ax in figure.axes] == [True] * 6

    @pytest.mark.slow
    def test_a_row_a_form_and_a_column_a_task(self):
        figure = plots.figure_beta_gradients(both(history))
        axes = np.array(figure.axes).reshape(2, 3)
        assert [part.get_suptitle().split()[0] for part in figure.subfigs] == ["inverse", "standard"]
        assert [ax.get_title(loc="left") for ax in axes[0]] == list(EXPECTED_ORDER)
        assert axes[0, 0].get_ylabel() == "pull on $\\beta(x)$\n(positive lowers it)"
        for form, line in zip(("inverse", "standard"), axes, strict=True):
            for task, ax in zip(EXPECTED_ORDER, line, strict=True):
                rows = history(form).query("stage == 2")
                assert lines(ax)["entropy"][1] == list(rows[f"grad/entropy/{task}"])
                assert ax.get_ylim() == line[0].get_ylim()
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [*TERMS, "sum"]
        assert overlaps(figure) == []
        assert cut_off(figure) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [*REFUSED[:2], (lambda t: t[["form", "stage"]], r"missing columns \['grad/dpo/<task>'\]")],
    )
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=f"history: {message}"):
            plots.figure_beta_gradients(change(history()))


def with_log_ratios(frame: pd.DataFrame, tasks=("math", "code", "dialogue")) -> pd.DataFrame:
    """The history with the columns of the log-ratios; those of the held-out pairs in every other row."""
    rng = np.random.default_rng(1)
    for answer, task in itertools.product(("chosen", "rejected"), tasks):
        name = f"logratio/{answer}/{task}"
        frame[name] = rng.normal(size=len(frame))
        frame[f"{name}/q25"], frame[f"{name}/q75"] = frame[name] - 0.5, frame[name] + 0.25
        frame[f"held_out_{name}"] = np.where(np.arange(len(frame)) % 2, np.nan, rng.normal(size=len(frame)))
    return frame


class TestLogRatios:
    def test_lines_bands_and_points_are_the_columns(self):
        frame = with_log_ratios(history())
        ax = plots.plot_log_ratios(frame, task="code")
        lines = {line.get_label(): line for line in ax.lines}
        for answer, color in style.ANSWER_COLORS.items():
            name = f"logratio/{answer}/code"
            line, dots = lines[f"{answer}, training batch"], lines[f"{answer}, held-out pairs"]
            assert line.get_ydata().tolist() == frame[name].tolist() and line.get_color() == color
            measured = frame.dropna(subset=f"held_out_{name}")
            assert dots.get_xdata().tolist() == measured["step"].tolist() and dots.get_linestyle() == "None"
            assert dots.get_ydata().tolist() == measured[f"held_out_{name}"].tolist()
        bands = [c.get_paths()[0].vertices[:, 1] for c in ax.collections if isinstance(c, PolyCollection)]
        for band, answer in zip(bands, style.ANSWER_COLORS, strict=True):
            assert {frame[f"logratio/{answer}/code/q25"].min(), frame[f"logratio/{answer}/code/q75"].max()} <= set(band)

    def test_a_step_without_a_pair_of_the_task_is_left_out(self):
        frame = with_log_ratios(history())
        frame.loc[2, [c for c in frame if c.startswith("logratio/chosen/math")]] = np.nan
        (line, *_) = [own for own in plots.plot_log_ratios(frame, task="math").lines if "chosen" in own.get_label()]
        assert line.get_xdata().tolist() == [0, 10, 30, 40, 50, 60]

    @pytest.mark.slow
    def test_a_panel_per_task_and_form_four_in_a_row(self):
        tasks = ("a", "b/q25", "c", "d", "e", "讲")
        both = pd.concat([with_log_ratios(history(form, tasks), tasks) for form in ("standard", "inverse")])
        assert set(plots.log_ratio_tasks(both)) == set(tasks)
        figure = plots.figure_log_ratios(both)
        shown = [ax for ax in figure.axes if ax.axison]
        assert len(shown) == 12 and len({round(ax.get_position().x0, 2) for ax in shown[:6]}) <= 4
        draw(figure)
        assert overlaps(figure) == [] and cut_off(figure) == []
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            f"{answer}, {where}" for answer in ("chosen", "rejected") for where in ("training batch", "held-out pairs")
        ]

    def test_refused(self):
        with pytest.raises(ValueError, match=r"missing columns \['logratio/chosen/<task>'\]"):
            plots.figure_log_ratios(history())


class TestBetaSteps:
    def test_medians_and_quartiles_of_the_prompts(self):
        rows = [
            {"form": form, "step": step, "task": task, "prompt": str(i), "beta": 1.0 + i + step / 10}
            for form in ("standard", "inverse") for step in (0, 5) for task in ("math", "讲") for i in range(5)
        ]  # fmt: skip
        figure = plots.figure_beta_steps(pd.DataFrame(rows), beta0={"inverse": 2.0})
        assert len(figure.axes) == 2
        (line, *_), (band, *_) = figure.axes[0].lines, figure.axes[0].collections
        assert line.get_ydata().tolist() == [3.0, 3.5] and line.get_label() == "math"
        assert set(band.get_paths()[0].vertices[:, 1]) == {2.0, 2.5, 4.0, 4.5}
        assert ["_beta0" in [own.get_label() for own in ax.lines] for ax in figure.axes] == [True, False]
        draw(figure)
        assert overlaps(figure) == [] and cut_off(figure) == []

    def test_refused(self):
        with pytest.raises(ValueError, match=r"betas: missing columns \['step'"):
            plots.figure_beta_steps(table())


class TestImports:
    def test_numbers_and_matplotlib_alone(self):
        tree = ast.parse(Path(plots.__file__).read_text(encoding="utf-8"))
        imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        others = {"__future__", "collections", "typing", "matplotlib", "numpy", "pandas"}
        own = {"dpoviz.analysis.style", "dpoviz.analysis.text", "dpoviz.translation"}
        assert {module if module in own else module.split(".")[0] for module in imported} <= others | own

    @pytest.mark.slow
    def test_drawing_never_loads_pyplot(self):
        code = (
            "import sys, io, pandas as pd\n"
            "from dpoviz.analysis import plots\n"
            "rows = dict(form='inverse', seed=0, task='math', prompt=list('abc'), beta=[1., 2., 3.],"
            " ref_entropy=[1., 2., 3.], ref_entropy_se=0.1)\n"
            "plots.figure_beta_by_task(pd.DataFrame(rows)).savefig(io.BytesIO())\n"
            "print(*[name in sys.modules for name in ('matplotlib.figure', 'matplotlib.pyplot', 'torch')])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True", "False", "False"]


def estimates(estimators=("sequence", "first_token", "per_token"), n: int = 12) -> pd.DataFrame:
    """A row per estimator and prompt, in no order of the figures."""
    rng = np.random.default_rng(0)
    level = {"sequence": 60, "monte_carlo": 60, "first_token": 3, "per_token": 1, "teacher_forced": 1.2}
    keys = [(e, task, f"{task} {i}") for e in estimators for task in ("dialogue", "math", "code") for i in range(n)]
    frame = pd.DataFrame(keys, columns=["estimator", "task", "prompt"])
    entropy = frame["estimator"].map(level) * rng.uniform(0.5, 2, len(keys))
    return frame.assign(entropy=entropy, se=0.1 * entropy)


def with_examples(prompts=("1+1=", "Tell me a joke."), marks=(True, True), **kws) -> pd.DataFrame:
    frame = estimates(**kws).assign(example=False).astype({"example": object})
    more = [
        {"estimator": e, "task": "example", "prompt": p, "entropy": 0.2 * (i + 1), "se": 0.1, "example": mark}
        for e in frame["estimator"].unique()
        for i, (p, mark) in enumerate(zip(prompts, marks, strict=True))
    ]
    return pd.concat([frame, pd.DataFrame(more)], ignore_index=True)


def made_font(path, name, letters):
    """A font file with these letters, each a square."""
    pen = TTGlyphPen(None)
    for move, place in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 800)), (pen.lineTo, (800, 800)), (pen.lineTo, (800, 0))):
        move(place)
    pen.closePath()
    square = pen.glyph()
    glyphs = [".notdef", *(f"g{i}" for i in range(len(letters)))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap({ord(letter): f"g{i}" for i, letter in enumerate(letters)})
    font.setupGlyf(dict.fromkeys(glyphs, square))
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": name, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


class TestPlotEntropyEstimators:
    @staticmethod
    def means(ax: Axes) -> list[tuple[str, float, float, float]]:
        """Task, place, mean and half the length of the bar of each error bar."""
        found = []
        for container in ax.containers:
            line, _, (bar,) = container.lines
            ((x, y),) = line.get_xydata()
            ((_, low), (_, high)) = bar.get_segments()[0]
            assert (low + high) / 2 == pytest.approx(y)
            found.append((container.get_label().removeprefix("_"), x, y, (high - low) / 2))
        return found

    def test_every_prompt_is_a_point_of_its_task_at_its_estimator(self):
        frame = estimates()
        ax = plots.plot_entropy_estimators(frame)
        groups = [artist for artist in points(ax) if artist.get_label() == "_prompts"]
        assert len(groups) == 9
        drawn = {}
        for artist in groups:
            x, y = artist.get_offsets().T
            place = round(x.mean())
            assert (abs(x - place) < 0.5).all()
            drawn[place, color(artist)] = sorted(y)
        for place, estimator in enumerate(["first_token", "per_token", "sequence"]):
            for task, task_color in plots.TASK_COLORS.items():
                rows = frame[(frame["estimator"] == estimator) & (frame["task"] == task)]
                assert drawn[place, task_color] == pytest.approx(sorted(rows["entropy"]))

    def test_means_and_their_standard_errors(self):
        frame = estimates()
        found = self.means(plots.plot_entropy_estimators(frame))
        assert len(found) == 9
        for task, x, mean, bar in found:
            estimator = ["first_token", "per_token", "sequence"][round(x)]
            values = list(frame.loc[(frame["estimator"] == estimator) & (frame["task"] == task), "entropy"])
            assert mean == pytest.approx(statistics.mean(values))
            assert bar == pytest.approx(statistics.stdev(values) / 12**0.5)

    def test_tasks_stand_in_their_order_within_each_estimator(self):
        found = sorted(self.means(plots.plot_entropy_estimators(estimates())), key=lambda row: row[1])
        assert [task for task, *_ in found] == [*EXPECTED_ORDER] * 3

    def test_units_stand_at_the_ticks_in_the_order_of_the_axis(self):
        every = tuple(plots.ESTIMATORS)
        ax = plots.plot_entropy_estimators(estimates(every[::-1]))
        assert [label.get_text() for label in ax.get_xticklabels()] == list(plots.ESTIMATORS.values())
        for name, label in plots.ESTIMATORS.items():
            unit = "nats per token" if name in ("per_token", "teacher_forced") else "nats"
            assert label.endswith(f"({unit})")

    def test_estimators_of_the_library(self):
        assert {"first_token", "per_token", "sequence", "monte_carlo"} <= set(EntropyEstimates._fields)
        assert set(plots.ESTIMATORS) - set(EntropyEstimates._fields) == {"teacher_forced"}

    def test_numbers_of_prompts_are_in_the_legend(self):
        frame = estimates()
        ax = plots.plot_entropy_estimators(frame[frame["prompt"] != "code 3"])
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels == ["math (n=12)", "code (n=11)", "dialogue (n=12)"]

    def test_logarithmic_where_it_can_be(self):
        ax = plots.plot_entropy_estimators(estimates())
        assert ax.get_yscale() == "log"
        assert not any("e" in text or "^" in text for text in shown_ticks(ax.yaxis).values())
        zero = estimates()
        zero.loc[5, "entropy"] = 0
        assert plots.plot_entropy_estimators(zero).get_yscale() == "linear"

    def test_one_prompt_of_a_task_has_no_bar(self):
        frame = estimates(n=1)
        assert {bar for *_, bar in self.means(plots.plot_entropy_estimators(frame))} == {0}

    def test_examples_are_named_and_belong_to_no_mean(self):
        plain, ax = (plots.plot_entropy_estimators(frame) for frame in (estimates(), with_examples()))
        assert [row[2:] for row in self.means(ax)] == [row[2:] for row in self.means(plain)]
        assert words(ax) == ["Tell me a joke.", "1+1="] * 3
        marks = [artist.get_offsets()[:, 1].tolist() for artist in points(ax) if artist.get_label() == "_examples"]
        assert marks == [[0.2, 0.4]] * 3
        # within the limits, and to the right of all points of their estimator
        assert ax.get_ylim()[0] < 0.2
        for text in ax.texts:
            assert text.xy[1] in (0.2, 0.4)
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels == ["math (n=12)", "code (n=12)", "dialogue (n=12)"]

    def test_an_example_may_bring_its_text(self):
        ax = plots.plot_entropy_estimators(with_examples(marks=("one and one", True)))
        assert set(words(ax)) == {"one and one", "Tell me a joke."}

    def test_dollar_signs_are_no_formulas(self):
        ax = plots.plot_entropy_estimators(with_examples(prompts=(r"$\no$", "x")))
        draw(ax.figure)  # as a formula it could not be read
        assert r"$\no$" in words(ax)

    @pytest.mark.parametrize("fonts", [[], None])
    def test_chinese_is_drawn_without_a_warning_whatever_the_fonts(self, monkeypatch, fonts):
        draw(plots.plot_entropy_estimators(with_examples()).figure)  # matplotlib remembers the fonts that it found
        if fonts is not None:
            monkeypatch.setattr(fontManager, "ttflist", fonts)
        ax = plots.plot_entropy_estimators(with_examples(prompts=("讲个笑话", "a joke")))
        draw(ax.figure)
        assert words(ax)[1] in ("讲个笑话", "□□□□")
        if fonts is not None:
            assert words(ax)[1] == "□□□□"

    def test_a_font_that_has_the_letters_is_used_whatever_its_name(self, monkeypatch, tmp_path):
        own = [font for font in fontManager.ttflist if font.name == "DejaVu Sans"]
        monkeypatch.setattr(fontManager, "ttflist", own)
        fontManager.addfont(made_font(tmp_path / "own.ttf", "A font of ours", "讲个笑"))
        ax = plots.plot_entropy_estimators(with_examples(prompts=("讲个笑话", "a joke")))
        joke, chinese = ax.texts[:2]
        draw(ax.figure)
        assert chinese.get_text() == "讲个笑□"  # one letter is in no font
        assert chinese.get_fontfamily() == ["sans-serif", "A font of ours"]
        assert joke.get_fontfamily() == ["sans-serif"]
        assert style.without_font(["讲个笑话", "a joke", "话"]) == "话"

    def test_the_letters_of_the_examples_are_drawn_where_a_font_is_installed(self):
        """Boxes are wrong where a font has the letters, in whichever of the faces of its file."""
        if style.without_font(["讲个笑话"]):
            pytest.skip(f"no font with Chinese letters; {FONT_ADVICE}")
        ax = plots.plot_entropy_estimators(with_examples(prompts=("讲个笑话", "a joke")))
        draw(ax.figure)
        assert "讲个笑话" in words(ax)

    def test_no_text_covers_another_and_none_is_cut_off(self):
        prompts = ("1+1=", "What is 1+1?", "Tell me a joke.", "abcd")
        ax = plots.plot_entropy_estimators(with_examples(prompts, (True,) * 4, estimators=tuple(plots.ESTIMATORS)))
        assert overlaps(ax.figure) == []
        assert cut_off(ax.figure) == []

    def test_examples_at_one_height_are_pushed_apart(self):
        frame = with_examples(("a", "b", "c"), (True,) * 3)
        frame.loc[frame["task"] == "example", "entropy"] = 2.0
        ax = plots.plot_entropy_estimators(frame)
        renderer = draw(ax.figure)
        boxes = [Text.get_window_extent(text, renderer) for text in ax.texts]  # without the lines to their points
        assert len(boxes) == 9
        assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))

    def test_draws_where_it_is_told_and_with_the_style_it_is_given(self):
        ax = Figure().add_subplot()
        assert plots.plot_entropy_estimators(estimates(), ax=ax, s=33) is ax
        assert {artist.get_sizes()[0] for artist in points(ax) if artist.get_label() == "_prompts"} == {33}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.iloc[:0], "got no rows"),
            (lambda t: t.drop(columns="task"), r"missing columns \['task'\]"),
            (
                lambda t: t.assign(estimator="guess"),
                r"got the estimators \['guess'\], expected some of \['first_token'",
            ),
            (lambda t: t.assign(example=True), "nothing but examples"),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            plots.plot_entropy_estimators(change(estimates()))
