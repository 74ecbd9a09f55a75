"""What the pictures of the comparison show, read back from the axes."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from dpoviz.analysis.plots_comparison import figure_by_margin, figure_contrasts, figure_kl_by_task, figure_levels

CONDITIONS, BUDGETS = ("flips by task", "uniform noise"), (0.1, 0.3, 1.0)


def contrasts():
    rows = []
    for i, condition in enumerate(CONDITIONS):
        for budget in BUDGETS:
            means = {"oracle": 0.02, "lsc": -0.01 * (i + 1) * budget, "ideal": 0.2, "ada-dpo": 0.004}
            for name, mean in means.items():
                ends = {"mean": mean, "low": mean - 0.003, "high": mean + 0.003}
                p = {"lsc": 0.01, "ada-dpo": 0.3}.get(name, np.nan)
                rows.append({"condition": condition, "budget": budget, "contender": name, **ends, "holm": p})
    table = pd.DataFrame(rows)
    return table[~((table["contender"] == "ada-dpo") & (table["condition"] == "uniform noise"))]


def runs():
    rows = []
    for condition in CONDITIONS:
        for name, factor in (("constant", 1.0), ("oracle", 1.5), ("ideal", 4.0)):
            for world, shift in ((0, -0.01), (1, 0.01)):
                for budget in BUDGETS:
                    for task, share in (("math", 1.5), ("code", 0.5), ("dialogue", 1.0), ("all", 1.0)):
                        place = {"condition": condition, "contender": name, "world": world, "budget": budget}
                        gain = factor * 0.1 * budget + shift
                        rows.append({**place, "task": task, "gain": gain, "kl": share * budget})
    return pd.DataFrame(rows)


def dots(ax):
    """Every marker: x, y, and whether it is filled."""
    return [(line.get_xdata()[0], line.get_ydata()[0], to_hex(line.get_markerfacecolor()) != "#ffffff")
            for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]  # fmt: skip


def test_contrasts():
    figure = figure_contrasts(contrasts())
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "oracle",
        "lsc",
        "ada-dpo",
    ]
    assert (first.get_title(), second.get_title()) == CONDITIONS
    found = dots(second)
    assert len(dots(first)) == 9 and len(found) == 6  # the missing contender leaves a gap
    lsc = sorted(x for x, y, _ in found if round(y) == -1)
    assert lsc == pytest.approx([-0.02, -0.006, -0.002])
    assert all(filled == (round(y) != -2) for _, y, filled in dots(first))
    bars = [line.get_xdata() for line in second.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"]
    assert any(np.allclose(bar, [0.017, 0.023]) for bar in bars)


def test_levels():
    figure = figure_levels(runs())
    ax = figure.axes[0]
    heights = {container.get_label(): container.lines[0].get_ydata() for container in ax.containers}
    assert heights["one constant"] == pytest.approx([0, 0.01, 0.03, 0.1])
    assert heights["any policy"] == pytest.approx([0, 0.04, 0.12, 0.4])
    assert ax.containers[0].lines[0].get_xdata() == pytest.approx([0, *np.sqrt(BUDGETS)])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.1", "0.3", "1"]


def test_by_margin():
    """In the order of the margins, with the bars of the table; other contenders are left out."""
    table, margins = contrasts(), pd.Series({CONDITIONS[1]: 0.2, CONDITIONS[0]: 1.5})
    for ax, budget in zip(figure_by_margin(table, margins, ["lsc"]).axes, BUDGETS, strict=True):
        (drawn,) = ax.containers
        assert drawn.lines[0].get_ydata() == pytest.approx([-0.02 * budget, -0.01 * budget])
        (bars,) = drawn.lines[2]
        assert bars.get_segments()[1][:, 1] == pytest.approx([-0.01 * budget - 0.003, -0.01 * budget + 0.003])
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0.20\nuniform\nnoise", "1.50\nflips by\ntask"]


def test_kl_by_task():
    figure = figure_kl_by_task(runs(), budget=0.3)
    shown = {line.get_label(): line.get_xdata() for line in figure.axes[1].lines}
    assert shown["math"] == pytest.approx([0.45] * 3) and shown["code"] == pytest.approx([0.15] * 3)
    with pytest.raises(ValueError, match=r"budget: got 0\.2, expected one of"):
        figure_kl_by_task(runs(), budget=0.2)


@pytest.mark.parametrize("draw", [figure_contrasts, figure_levels])
def test_missing_columns(draw):
    with pytest.raises(ValueError, match="missing columns"):
        draw(pd.DataFrame({"condition": ["a"]}))
