"""What the pictures of the comparison show, read back from the axes."""

import math

import numpy as np
import pandas as pd
import pytest
from dpoviz.analysis.tables_comparison import first_value, frontier_points, gains, parts_by_seed
from matplotlib.colors import to_hex

from dpoviz.analysis.plots_comparison import (
    figure_betas,
    figure_effects,
    figure_frontier,
    figure_parts,
    figure_reliability,
    plot_frontier,
)
from dpoviz.data.tasks import TASKS

ALL = (*TASKS, "all")


def table():
    """Two worlds; constants at two rates and two values, one rule at two values."""
    rows = []
    for seed, start in ((0, 0.5), (1, 0.3)):
        rows.append({"phase": "reference", "contender": "reference", "noise": 0.0, "seed": seed, "value": 0.0,
                     "learning_rate": 0.0, **{f"reward/{t}": start for t in ALL}})  # fmt: skip
        runs = [("constant", v, rate) for rate in (1e-4, 2e-4) for v in (0.2, 0.8)]
        runs += [("network inverse", v, 2e-4) for v in (0.2, 0.8)]
        for name, value, rate in runs:
            kl = (1 + seed) / value * (rate / 1e-4)
            numbers = {}
            for t in ALL:
                numbers |= {f"kl/{t}": kl, f"reward/{t}": start + 0.1 * kl, f"h/{t}": kl, f"s/{t}": value,
                            f"margin/{t}": kl * value}  # fmt: skip
            rows.append({"phase": "main", "contender": name, "noise": 0.15, "seed": seed, "value": value,
                         "learning_rate": rate, **numbers})  # fmt: skip
    return pd.DataFrame(rows)


def test_gains_are_over_the_reference_of_the_same_world():
    found = gains(table())
    assert len(found) == 12
    assert found["gain/math"].to_numpy() == pytest.approx(0.1 * found["kl/math"].to_numpy())


def test_points_are_means_over_seeds():
    points = frontier_points(gains(table()), "code").set_index(["contender", "learning_rate", "value"])
    assert len(points) == 6
    # of two seeds, KL 1/0.8 and 2/0.8; one standard error of two numbers is half their distance
    row = points.loc[("constant", 1e-4, 0.8)]
    assert row.tolist() == pytest.approx([1.875, 0.1875, 0.625, 0.0625])
    alone = frontier_points(gains(table()).query("seed == 0"), "code")
    assert (alone["kl_se"] == 0).all()


def test_parts_are_means_over_seeds():
    parts = parts_by_seed(table().query("phase == 'main'")).set_index(["contender", "part", "task"])
    assert len(parts) == 2 * 4 * 3
    # at value 0.2 and rate 2e-4: KL 10 and 20
    assert parts.loc[("constant", "kl", "math")].tolist() == pytest.approx([15, 5])
    assert parts.loc[("network inverse", "s", "code")].tolist() == pytest.approx([0.2, 0])


def test_gains_refuses_other_tables():
    with pytest.raises(ValueError, match=r"table: missing columns \['phase'\]"):
        gains(table().drop(columns="phase"))


class TestFrontier:
    def test_points(self):
        ax = plot_frontier(gains(table()), ["network inverse"], "code")
        lines = {line.get_label(): line for line in ax.get_lines()}
        low = lines["constant, rate 0.0001"]
        # of two seeds, KL 1/0.8 and 2/0.8, then 1/0.2 and 2/0.2, after the reference itself
        assert low.get_xdata().tolist() == pytest.approx([0, 1.875, 7.5])
        assert low.get_ydata().tolist() == pytest.approx([0, 0.1875, 0.75])
        assert lines["constant, rate 0.0002"].get_xdata()[1:].tolist() == pytest.approx([3.75, 15])
        rule = ax.containers[0]
        assert rule.get_label() == "network inverse"
        assert rule.lines[0].get_xdata().tolist() == pytest.approx([3.75, 15])
        # one standard error of two seeds is half their distance
        (kl_bars, gain_bars) = (bars.get_segments() for bars in rule.lines[2])
        assert np.ptp(kl_bars[0][:, 0]) == pytest.approx(2 * 1.25)
        assert np.ptp(gain_bars[0][:, 1]) == pytest.approx(2 * 0.125)

    def test_titles_labels_and_noise(self):
        figure = figure_frontier(table(), noise=0.15)
        assert [ax.get_title() for ax in figure.axes] == [*TASKS, "mean of the tasks"]
        assert all(ax.get_xlabel() == "KL to the reference (nats)" for ax in figure.axes)
        with pytest.raises(ValueError, match=r"noise: got 0\.4"):
            figure_frontier(table(), noise=0.4)


class TestFirstValue:
    def test_of_a_rule_and_of_the_constant(self):
        rows = table()[table()["phase"] == "main"]
        assert first_value(rows, "network inverse")["value"].unique().tolist() == [0.2]
        constant = first_value(rows, "constant")
        # where the rule has its first value, and at the rule's rate
        assert constant[["value", "learning_rate"]].drop_duplicates().to_numpy().tolist() == [[0.2, 2e-4]]

    def test_parts(self):
        figure = figure_parts(table(), noise=0.15)
        labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert labels == ["constant", "network inverse"]
        s = figure.axes[1].containers
        assert [c.lines[0].get_xdata()[0] for c in s] == pytest.approx([0.2] * 6)
        assert figure.axes[0].containers[0].lines[0].get_xdata()[0] == pytest.approx(15)


def test_effects_are_filled_where_they_are_beyond_noise():
    rows = [
        {"contender": name, "noise": math.nan, "task": task, "mean": mean, "low": mean - 0.01, "high": mean + 0.02,
         "detectable": 0.03, "holm": p}
        for name, mean, p in (("network inverse", 0.1, 0.01), ("mallows", -0.02, 0.6)) for task in ALL
    ]  # fmt: skip
    figure = figure_effects(pd.DataFrame(rows))
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["network inverse", "mallows"]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx([0.1, -0.02])
    assert to_hex(dots[0].get_markerfacecolor()) != "#ffffff" and to_hex(dots[1].get_markerfacecolor()) == "#ffffff"
    intervals = [
        line.get_xdata() for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) == 2
    ]
    assert any(np.allclose(x, [0.09, 0.12]) for x in intervals)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.06, 0.06])
    with pytest.raises(ValueError, match="effects: got no rows"):
        figure_effects(pd.DataFrame(rows), noise=0.3)


def test_betas_have_a_panel_for_each_contender():
    rows = [{"contender": name, "form": "standard", "task": task, "ref_entropy": h, "beta": 0.1 + h}
            for name in ("network standard", "mallows") for task in TASKS for h in (0.2, 0.5)]  # fmt: skip
    figure = figure_betas(pd.DataFrame(rows))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["network standard", "mallows"]
    points = np.concatenate([c.get_offsets() for c in shown[0].collections])
    assert sorted(map(tuple, points.round(6))) == sorted([(0.2, 0.3), (0.5, 0.6)] * 3)


def test_reliability():
    bins = pd.DataFrame({"contender": "mallows", "value": 0.2, "learning_rate": 1e-4, "noise": 0.15, "bin": [3, 6],
                         "n": [10, 40], "predicted": [0.35, 0.65], "truth": [0.3, 0.7]})  # fmt: skip
    figure = figure_reliability(bins, ["mallows"], noise=0.15)
    dots = figure.axes[0].collections[0]
    assert dots.get_offsets().tolist() == [[0.35, 0.3], [0.65, 0.7]]
    assert dots.get_sizes()[1] > dots.get_sizes()[0]
