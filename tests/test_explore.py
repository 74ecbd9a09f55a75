"""What a slider moves: the numbers in the artists, the bytes of the picture, what is drawn for it."""

from __future__ import annotations

import base64
import io
import math
import threading

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
import scipy
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dpoviz.learn import sliders as explore
from dpoviz.learn.sliders import Explorer

PNG = b"\x89PNG\r\n\x1a\n"


def fit(lambda_smoothness: float, lambda_entropy: float, alpha: float) -> pd.DataFrame:
    """Stands for a training run: beta is a stated function of the three knobs."""
    entropy = np.linspace(0.5, 3.0, 12)
    beta_star = np.linspace(0.1, 1.0, 12)
    share = lambda_entropy / (1 + lambda_entropy)
    beta = (1 - share) * beta_star + share * alpha * entropy + lambda_smoothness
    return pd.DataFrame(
        {"task": ["math", "code", "dialogue"] * 4, "ref_entropy": entropy, "beta": beta, "beta_star": beta_star}
    )


EXPLORERS = {
    "frontier": explore.frontier,
    "two_forms": explore.two_forms,
    "price_and_entropy": lambda: explore.price_and_entropy(prompts=8),
    "term_curves": explore.term_curves,
    "retrain": lambda: explore.retrain(fit),
    "which_beta": lambda: explore.which_beta(prompts=4, answers=4),
    "one empty label": lambda: toy(),
}


def sliders(explorer: Explorer) -> list:
    return [control for control in explorer.controls.values() if hasattr(control, "max")]


def elsewhere(slider, share: float) -> float:
    """The value at a share of the slider's way."""
    value = slider.min + share * (slider.max - slider.min)
    return slider.base**value if isinstance(slider, widgets.FloatLogSlider) else value


def line(ax, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [artist for artist in ax.lines if artist.get_label() == label]
    return tuple(np.asarray(axis, dtype=float) for axis in found.get_data())


def pixels(explorer: Explorer) -> np.ndarray:
    """The picture as shown, (height, width, 4) in 0 … 255."""
    return np.asarray(Image.open(io.BytesIO(explorer.png)))


def toy(update=None) -> Explorer:
    figure = Figure(figsize=(2, 2), layout="constrained")
    ax = figure.subplots()
    (curve,) = ax.plot([0, 1], [0, 0])
    ax.set(ylim=(-1, 11), ylabel="height")

    def draw(height: float) -> None:
        if update is not None:
            update(height)
        curve.set_ydata([0, height])

    return Explorer(figure, draw, {"height": widgets.FloatSlider(1.0, min=0, max=10)})


@pytest.mark.parametrize("name", EXPLORERS)
class TestEveryExplorer:
    def test_is_a_picture_without_a_notebook(self, name):
        explorer = EXPLORERS[name]()
        assert explorer.png.startswith(PNG)
        assert explorer.trouble == ""

    @pytest.mark.slow
    def test_every_control_moves_it_to_both_ends_and_back(self, name):
        explorer = EXPLORERS[name]()
        at_start = explorer.png
        for slider in sliders(explorer):
            value = slider.value
            for share in (0.0, 1.0):
                slider.value = elsewhere(slider, share)
                assert explorer.trouble == ""
                assert explorer.png != at_start or slider.value == value, slider.description
            slider.value = value
            assert explorer.png == at_start, slider.description  # nothing is remembered

    @pytest.mark.slow
    def test_a_move_draws_no_axis_again_and_leaves_the_whole_picture(self, name, monkeypatch):
        explorer = EXPLORERS[name]()
        drawn = []
        draw_axis = Axis.draw

        def draw(axis, *args, **kwargs):
            drawn.append(axis)
            return draw_axis(axis, *args, **kwargs)

        monkeypatch.setattr(Axis, "draw", draw)
        for slider in sliders(explorer):
            for share in (0.1, 0.8):
                slider.value = elsewhere(slider, share)
                assert drawn == []
                # matplotlib's own drawing of everything, from nothing
                explorer.figure.canvas.draw()
                assert len(drawn) == 2 * len(explorer.figure.axes)
                drawn.clear()
                np.testing.assert_array_equal(pixels(explorer), np.asarray(explorer.figure.canvas.buffer_rgba()))


class TestExplorer:
    def test_bundle_has_the_widget_and_the_picture(self):
        explorer = toy()
        explorer.controls["height"].value = 5.0
        bundle = explorer._repr_mimebundle_()
        assert base64.b64decode(bundle["image/png"]) == explorer.png
        view = bundle["application/vnd.jupyter.widget-view+json"]
        assert view["model_id"] == explorer.widget.model_id

    def test_layout_stands_still(self):
        explorer = toy()
        before = explorer.figure.axes[0].get_position().bounds
        explorer.figure.axes[0].set_ylabel("a label\nof several\nlines")
        explorer.controls["height"].value = 5.0
        assert explorer.figure.axes[0].get_position().bounds == before

    def test_what_was_changed_from_outside_is_drawn_again(self):
        explorer = toy()
        explorer.figure.text(0.4, 0.8, "new")
        for change in (
            lambda ax: None,
            lambda ax: ax.set_ylim(-1, 30),
            lambda ax: ax.set_ylabel("y"),
            lambda ax: ax.yaxis.label.set_color("red"),
            lambda ax: ax.set_ylabel(""),
            lambda ax: ax.set_yticks([0, 5]),
            lambda ax: ax.set_facecolor("yellow"),
            lambda ax: ax.set_xscale("symlog"),
        ):
            change(explorer.figure.axes[0])
            explorer.controls["height"].value += 1
            explorer.figure.canvas.draw()
            np.testing.assert_array_equal(pixels(explorer), np.asarray(explorer.figure.canvas.buffer_rgba()))

    def test_traceback_is_shown_under_the_picture_and_goes_again(self):
        def stumble(height: float) -> None:
            if height > 5:
                raise RuntimeError("too <high>")

        explorer = toy(stumble)
        picture = explorer.png
        explorer.controls["height"].value = 7.0
        assert "RuntimeError: too &lt;high&gt;" in explorer.trouble
        assert "Traceback" in explorer.trouble
        assert explorer.png == picture
        explorer.controls["height"].value = 2.0
        assert explorer.trouble == ""
        assert explorer.png != picture

    def test_a_mistake_in_the_first_drawing_is_raised(self):
        def stumble(height: float) -> None:
            raise RuntimeError("at once")

        with pytest.raises(RuntimeError, match="at once"):
            toy(stumble)

    def test_sliders_in_threads_while_another_figure_is_drawn(self):
        first, second = toy(), toy()
        wanted = {}
        for height in (2.0, 4.0, 6.0, 8.0):
            first.controls["height"].value = height
            wanted[height] = first.png
        wrong = []

        def move(explorer: Explorer) -> None:
            for height in (2.0, 4.0, 6.0, 8.0) * 3:
                explorer.controls["height"].value = height
                if explorer.png != wanted[height]:
                    wrong.append(height)

        def draw() -> None:
            for _ in range(12):
                figure = Figure(figsize=(2, 2), layout="constrained")
                figure.subplots().plot([0, 1], [1, 0], label=r"$\beta$")
                FigureCanvasAgg(figure).draw()

        threads = [threading.Thread(target=move, args=(e,)) for e in (first, second)] + [threading.Thread(target=draw)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_slow_drawing_does_not_overwrite_a_later_one(self):
        started, go_on = threading.Event(), threading.Event()

        def linger(height: float) -> None:
            if height == 4.0:
                started.set()
                go_on.wait(10)

        explorer = toy(linger)
        slider = explorer.controls["height"]
        slow, later = (threading.Thread(target=setattr, args=(slider, "value", v)) for v in (4.0, 6.0))
        slow.start()
        assert started.wait(10)
        later.start()
        later.join(0.3)  # without the lock it draws now, and the slow one draws the old value over it
        go_on.set()
        slow.join()
        later.join()
        (curve,) = explorer.figure.axes[0].lines
        assert curve.get_ydata()[1] == slider.value == 6.0
        alone = toy()
        alone.controls["height"].value = 6.0
        assert explorer.png == alone.png


class TestFrontier:
    def test_policy_meets_the_budget_and_the_tangent_has_slope_beta(self):
        explorer = explore.frontier()
        left, middle, _ = explorer.figure.axes
        explorer.controls["epsilon"].value = 0.6
        kl = float(left.lines[2].get_xdata()[0])
        assert kl == pytest.approx(0.6, abs=1e-9)
        (x0, x1), (y0, y1) = line(left, "slope β*")
        beta = line(middle, "β*")[0][0]
        assert (y1 - y0) / (x1 - x0) == pytest.approx(beta, rel=1e-9)
        # the slope of the frontier itself, between two points that straddle the budget
        kls, values = (np.asarray(v) for v in left.lines[0].get_data())
        at = np.searchsorted(-kls, -0.6)
        chord = (values[at] - values[at - 1]) / (kls[at] - kls[at - 1])
        assert chord == pytest.approx(beta, rel=0.05)  # neighbours on the grid differ by 8 % in beta
        assert kls[at] < 0.6 < kls[at - 1]

    def test_bars_are_the_policy(self):
        explorer = explore.frontier()
        _, middle, right = explorer.figure.axes
        beta = line(middle, "β*")[0][0]
        ref = np.array([bar.get_height() for bar in right.containers[0]])
        rewards = np.array([float(label.get_text().replace("−", "-")) for label in right.texts])
        weights = ref * np.exp(rewards / beta)
        drawn = [bar.get_height() for bar in right.containers[1]]
        np.testing.assert_allclose(drawn, weights / weights.sum(), rtol=1e-9)

    def test_a_budget_beyond_the_greedy_policy_is_free(self):
        explorer = explore.frontier()
        explorer.controls["sharpness"].value = 0.0
        explorer.controls["epsilon"].value = 2.2  # the greedy policy of a uniform reference needs log 6 = 1.79
        kl = float(explorer.figure.axes[0].lines[2].get_xdata()[0])
        assert kl == pytest.approx(math.log(6), abs=1e-9)
        assert "β* = 0\n" in explorer.figure.axes[0].texts[0].get_text()
        np.testing.assert_allclose([bar.get_height() for bar in explorer.figure.axes[2].containers[1]][-1], 1.0)


class TestTwoForms:
    @pytest.mark.parametrize("beta", [0.2, 5.0])
    def test_curves(self, beta):
        explorer = explore.two_forms()
        explorer.controls["beta"].value = beta
        left, middle, right = explorer.figure.axes
        for form, s in (("inverse", 1 / beta), ("standard", beta)):
            h, loss = line(left, form)
            np.testing.assert_allclose(loss, np.log1p(np.exp(-s * h)), rtol=1e-9)
            h, push = line(middle, form)
            np.testing.assert_allclose(push, s / (1 + np.exp(s * h)), rtol=1e-9)
            p, optimum = line(right, form)
            np.testing.assert_allclose(1 / (1 + np.exp(-s * optimum)), p, rtol=1e-9)  # σ(s·h*) = p


class TestPriceAndEntropy:
    @pytest.mark.parametrize("sharpness", [0.5, 8.0])
    def test_dots_spend_the_budget_and_titles_are_their_rank_correlations(self, sharpness):
        explorer = explore.price_and_entropy()
        explorer.controls["sharpness"].value = sharpness
        entropies, spreads = explorer.figure.axes
        (entropy, price), (approximation, again) = (ax.lines[0].get_data() for ax in (entropies, spreads))
        logps, rewards = (values.numpy() for values in explore.price_world(sharpness))
        np.testing.assert_array_equal(price, again)
        np.testing.assert_allclose(entropy, scipy.stats.entropy(np.exp(logps), axis=1), rtol=1e-9)
        square, mean = ((np.exp(logps) * rewards**power).sum(1) for power in (2, 1))
        np.testing.assert_allclose(approximation, np.sqrt((square - mean**2) / 0.01), rtol=1e-9)
        tilted = scipy.special.log_softmax(logps + rewards / np.asarray(price)[:, None], axis=1)
        np.testing.assert_allclose(scipy.special.rel_entr(np.exp(tilted), np.exp(logps)).sum(1), 0.005, atol=1e-9)
        for ax, x, name in ((entropies, entropy, "H"), (spreads, approximation, "sd(r)/√(2ε)")):
            rank = scipy.stats.spearmanr(x, price).statistic
            assert ax.get_title() == f"rank correlation with {name}: {rank:.2f} (n = 100)"
            assert (x < ax.get_xlim()[1]).all() and (price < ax.get_ylim()[1]).all()


class TestTermCurves:
    @pytest.mark.parametrize("form", ["inverse", "standard"])
    def test_slopes_are_those_of_the_terms(self, form):
        explorer = explore.term_curves()
        explorer.controls["form"].value = form
        left, right = explorer.figure.axes
        for name in ("dpo", "entropy", "sum"):
            (beta, term), (_, slope) = line(left, name), line(right, name)
            inside = (beta > 0.1) & (beta < 1.9)  # the range term has corners at 0.05 and 2
            numeric = np.gradient(term, beta)
            # neighbours on the grid differ by 2 %: second-order differences are good to 1e-3 of the largest slope
            size = np.abs(slope[inside]).max()
            np.testing.assert_allclose(numeric[inside], slope[inside], atol=2e-3 * size)

    def test_rests_at_alpha_h_where_the_entropy_term_rules(self):
        explorer = explore.term_curves(ref_entropy=2.0)
        explorer.controls["p"].value = 0.5  # h = 2 and a coin for a label: the DPO term pulls s down
        explorer.controls["lambda_entropy"].value = 2.0
        explorer.controls["alpha"].value = 0.3
        explorer.controls["form"].value = "standard"
        strong = explorer.figure.axes[0].lines[-1].get_xdata()[0]
        explorer.controls["lambda_entropy"].value = 0.0
        without = explorer.figure.axes[0].lines[-1].get_xdata()[0]
        assert abs(strong - 0.6) < 0.2
        assert without < 0.1

    @pytest.mark.slow
    @pytest.mark.parametrize(("form", "expected"), [("inverse", 2 / math.log(3)), ("standard", math.log(3) / 2)])
    def test_rests_where_the_labels_say_without_the_entropy_term(self, form, expected):
        explorer = explore.term_curves(h=2.0)
        explorer.controls["form"].value = form
        explorer.controls["lambda_entropy"].value = 0.0  # s·h = logit(0.75) = log 3
        at = explorer.figure.axes[0].lines[-1].get_xdata()[0]
        assert at == pytest.approx(expected, rel=0.02)  # one step of the grid

    @pytest.mark.parametrize(("form", "end"), [("inverse", "0"), ("standard", "∞")])
    def test_says_that_nothing_stops_a_sure_pair(self, form, end):
        explorer = explore.term_curves()
        explorer.controls["form"].value = form
        (says,) = explorer.figure.axes[1].texts
        explorer.controls["lambda_range"].value = 0.0
        explorer.controls["lambda_entropy"].value = 0.0
        explorer.controls["p"].value = 0.9
        assert "rest at β = " in says.get_text()  # control: a label that may be wrong gives a rest
        explorer.controls["p"].value = 1.0
        assert f"no rest: runs off to {end}" in says.get_text()


class TestRetrain:
    def test_points_are_the_table(self):
        asked = []

        def spy(**knobs: float) -> pd.DataFrame:
            asked.append(knobs)
            return fit(**knobs)

        explorer = explore.retrain(spy)
        explorer.controls["lambda_entropy"].value = 1.0
        explorer.controls["alpha"].value = 0.3
        assert asked[-1] == {"lambda_smoothness": 0.0, "lambda_entropy": 1.0, "alpha": 0.3}
        table = fit(**asked[-1])
        left, right = explorer.figure.axes
        for task, rows in table.groupby("task"):
            np.testing.assert_array_equal(line(left, task), rows[["ref_entropy", "beta"]].to_numpy().T)
            np.testing.assert_array_equal(line(right, task), rows[["beta_star", "beta"]].to_numpy().T)
        x, y = line(left, "αH")
        np.testing.assert_allclose(y, 0.3 * x)
