"""Sliders for the notebooks: each function returns a picture that follows its controls.

The picture is a persistent object-oriented figure: moving a slider changes the data of its artists, which are redrawn
over the unchanged axes, and the PNG is sent to an image widget. Without a kernel, the picture at the defaults remains.
Explorers also work outside a notebook: set `controls[...].value`, read `png`.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib import image as mpl_image
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from dpoviz import tabular
from dpoviz.analysis.plots import TERM_COLORS, task_colors
from dpoviz.forms import FORMS, Form, scale
from dpoviz.translation import key, label, say

FORM_COLORS = {"inverse": "#B4460F", "standard": "#0B6E75"}
"""The colour of each form, where both are in one picture."""

_WIDE = {"layout": {"width": "520px"}, "style": {"description_width": "190px"}}
_GREY = "#6B6B6B"
_INK = "#1D2F5F"
# matplotlib's figures share a math parser and a font cache, and callbacks of several explorers can run in several
# threads
_DRAWING = threading.RLock()


class Explorer:
    """Controls, and the picture that follows them.

    A notebook displays it as live widgets if a kernel runs, and as the last picture (image/png) otherwise.

    Args:
        figure: its layout is computed at the first drawing and then frozen, so that the picture does not shift while
            a slider moves. Ticks and axis labels, most of the cost, are redrawn only if they changed.
        update: called with the value of every control by name; changes only the figure's artists.
        controls: ipywidgets, by the names of the arguments of `update`.

    Attributes:
        figure: the figure.
        controls: the controls; setting the value of one redraws the picture.
        widget: the widget displayed in a notebook.
    """

    def __init__(
        self, figure: Figure, update: Callable[..., None], controls: Mapping[str, widgets.ValueWidget]
    ) -> None:
        self.figure = figure
        self.controls = dict(controls)
        self._update = update
        self._canvas = FigureCanvasAgg(figure)
        # at its own size: stretched to the width of the page, it would be blurred
        width, _ = self._canvas.get_width_height()
        self._image = widgets.Image(format="png", layout={"width": f"{width}px", "max_width": "100%"})
        self._trouble = widgets.HTML()
        self._ground: object = None
        self._draw()
        for control in self.controls.values():
            control.observe(self._redraw, names="value")
        self.widget = widgets.VBox([*self.controls.values(), self._image, self._trouble])

    @property
    def png(self) -> bytes:
        """The current picture."""
        return bytes(self._image.value)

    @property
    def trouble(self) -> str:
        """The traceback shown under the picture, as HTML; empty if the last drawing succeeded."""
        return self._trouble.value

    def _draw(self) -> None:
        with _DRAWING:
            # read inside the lock, so that of two callbacks in two threads the later drawing has the later values
            self._update(**{name: control.value for name, control in self.controls.items()})
            ground, content = self._layers()
            if self._ground is None or any(artist.stale for artist in ground):
                self._canvas.draw()  # computes the layout, and leaves nothing stale
                self.figure.set_layout_engine("none")
                shown = [artist for artist in content if artist.get_visible()]
                for artist in shown:
                    artist.set_visible(False)
                self._canvas.draw()
                self._ground = self._canvas.copy_from_bbox(self.figure.bbox)
                for artist in shown:
                    artist.set_visible(True)
            self._canvas.restore_region(self._ground)
            for artist in content:
                artist.draw(self._canvas.get_renderer())
            out = io.BytesIO()
            # compressed fast: twice the size does not matter
            mpl_image.imsave(out, self._canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
            self._image.value = out.getvalue()

    def _layers(self) -> tuple[list[Artist], list[Artist]]:
        """Return the artists of the background, and those redrawn over it at each change, lowest first."""
        axes = self.figure.axes
        standing: list[Artist] = [self.figure.patch, *(part for ax in axes for part in (ax.patch, ax.xaxis, ax.yaxis))]
        # an empty label is never drawn, so it is always stale
        labels: list[Artist] = [label for ax in axes for label in (ax.xaxis.label, ax.yaxis.label) if label.get_text()]
        content: list[Artist] = []
        for parent in [*axes, self.figure]:
            moving = [artist for artist in parent.get_children() if artist not in [*standing, *axes]]
            content += sorted(moving, key=lambda artist: artist.get_zorder())
        return standing + labels, content

    def _redraw(self, _change: object) -> None:
        try:
            self._draw()
        except Exception:  # a callback cannot report an error elsewhere
            self._trouble.value = f"<pre>{html.escape(traceback.format_exc())}</pre>"
        else:
            self._trouble.value = ""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        bundle = dict(self.widget._repr_mimebundle_())
        return bundle | {"image/png": base64.b64encode(self.png).decode("ascii")}


def _slider(label: str, value: float, low: float, high: float, step: float, **options: object) -> widgets.FloatSlider:
    return widgets.FloatSlider(value, min=low, max=high, step=step, description=label, **(_WIDE | options))


def _log_slider(label: str, value: float, low: float, high: float, **options: object) -> widgets.FloatLogSlider:
    """Return a slider over 10^low … 10^high, in steps of a tenth of a decade."""
    return widgets.FloatLogSlider(value, min=low, max=high, step=0.1, description=label, **(_WIDE | options))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.6 * count, 3.4), dpi=90, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.locator_params(nbins=4)  # tick labels are most of the cost of a redraw
    return figure, axes


def _plain_log(ax: Axes, ticks: list[float]) -> None:
    """Make the horizontal axis logarithmic, with plain decimals at a few ticks."""
    ax.set_xscale("log")
    ax.set_xticks(ticks)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# -- notebook 01 ---------------------------------------------------------------------------------------------

_REF_LOGITS = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)
_REWARDS = torch.tensor([0.2, -0.4, 0.6, 1.0, 0.1, 1.4], dtype=torch.float64)
_BETAS = torch.logspace(-2, 2, 121, dtype=torch.float64)


def frontier_world(sharpness: float = 1.0, reward: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the world of one prompt with six answers that `frontier` draws.

    Args:
        sharpness: factor of the reference's logits: 0 makes it uniform, above 1 more peaked.
        reward: reward of the fourth answer.

    Returns:
        ref_logps (1, 6) and rewards (1, 6), float64.
    """
    rewards = _REWARDS.clone()
    rewards[3] = reward
    return torch.log_softmax(sharpness * _REF_LOGITS, 0)[None], rewards[None]


def _along(ref_logps: Tensor, rewards: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL and expected reward (B,) of the optimal policy of one prompt at each beta (B,)."""
    ref = ref_logps.expand(len(beta), -1)
    policy = tabular.optimal_policy(ref, rewards.expand(len(beta), -1), beta)
    return tabular.kl(policy, ref), (policy.exp() * rewards).sum(1)


def frontier() -> Explorer:
    """Show what a KL budget ε buys: the frontier, the multiplier, and the policy (the derivation, §1-3).

    Left: the expected reward of π*_β against its KL, and the tangent at the budget, whose slope is β*. Middle: KL of
    π*_β over β, which equals ε at β*. Right: the reference and π*.
    """
    figure, (left, middle, right) = _panels(3)
    (curve,) = left.plot([], [], color=_INK)
    (tangent,) = left.plot([], [], color=FORM_COLORS["inverse"], linewidth=1.2, label=label("slope β*"))
    (point,) = left.plot([], [], "o", color=FORM_COLORS["inverse"])
    left.set(xlim=(0, 2.5), ylim=(-0.5, 2.2), xlabel="KL(π‖π_ref) (nats)", ylabel=label("expected reward"))
    (kl_curve,) = middle.plot([], [], color=_INK)
    budget = middle.axhline(0, color=_GREY, linewidth=1, linestyle="--", label=label("budget ε"))
    price = middle.axvline(1, color=FORM_COLORS["inverse"], linewidth=1.2, label="β*")
    _plain_log(middle, [0.01, 0.1, 1, 10, 100])
    middle.set(xlim=(0.01, 100), ylim=(0, 2.5), xlabel="β", ylabel=label("KL of π*_β (nats)"))
    places = np.arange(len(_REWARDS))
    ref_bars = right.bar(places - 0.2, 0 * places, 0.4, color="#B9BEC9", label="π_ref")
    policy_bars = right.bar(places + 0.2, 0 * places, 0.4, color=_INK, label="π*")
    right.set(ylim=(0, 1), ylabel=label("probability"), xlabel=label("answer, and its reward"))
    right.set_xticks(places, [""] * len(places))
    # not tick labels, because these texts change
    under: dict[str, Any] = {"transform": right.get_xaxis_transform(), "ha": "center", "va": "top"}
    names = [right.text(float(place), -0.03, "", **under) for place in places]
    right.xaxis.labelpad = 14
    for ax in (left, middle, right):
        ax.legend(frameon=False, loc="upper right")
    says = left.text(0.03, 0.98, "", transform=left.transAxes, va="top")

    def update(epsilon: float, sharpness: float, reward: float) -> None:
        ref_logps, rewards = frontier_world(sharpness, reward)
        beta = float(tabular.solve_beta(ref_logps, rewards, epsilon))
        kls, values = _along(ref_logps, rewards, _BETAS)
        policy = tabular.optimal_policy(ref_logps, rewards, beta)
        at_kl = float(tabular.kl(policy, ref_logps))
        at_value = float((policy.exp() * rewards).sum())
        curve.set_data(kls, values)
        kl_curve.set_data(_BETAS, kls)
        around = np.array([max(at_kl - 0.4, 0), at_kl + 0.4])
        tangent.set_data(around, at_value + beta * (around - at_kl))
        point.set_data([at_kl], [at_value])
        budget.set_ydata([epsilon, epsilon])
        price.set_xdata([max(beta, 0.01)] * 2)
        for bars, logps in ((ref_bars, ref_logps), (policy_bars, policy)):
            for bar, p in zip(bars, logps[0].exp().tolist(), strict=True):
                bar.set_height(p)
        for name, r in zip(names, rewards[0].tolist(), strict=True):
            name.set_text(f"{r:.1f}")
        says.set_text(f"β* = {beta:.3g}\nKL = {at_kl:.3f}\nE[r] = {at_value:.3f}")

    controls = {
        "epsilon": _slider(say("budget ε (nats)"), 0.4, 0.02, 2.4, 0.02),
        "sharpness": _slider(say("sharpness of π_ref"), 1.0, 0.0, 2.0, 0.05),
        "reward": _slider(say("reward of the 4th answer"), 1.0, -1.0, 2.0, 0.1),
    }
    return Explorer(figure, update, controls)


# -- notebook 02 ---------------------------------------------------------------------------------------------


def two_forms() -> Explorer:
    """Show the loss, its slope and its optimum at one β, in both forms.

    Left: −log σ(s·h) over h. Middle: the push on h, s·σ(−s·h). Right: the optimum of an unrestricted policy,
    h* = logit(p)/s, over the probability p that the first answer is preferred.
    """
    figure, (left, middle, right) = _panels(3)
    h, p = np.linspace(-6, 6, 241), np.linspace(0.02, 0.98, 193)
    lines: dict[Form, list[Line2D]] = {}
    for form in FORMS:
        color = FORM_COLORS[form]
        style = "-" if form == "standard" else "--"  # at beta = 1 the two coincide
        lines[form] = [
            ax.plot(x, 0 * x, style, color=color, label=label(form))[0]
            for ax, x in ((left, h), (middle, h), (right, p))
        ]
    left.set(ylim=(0, 6), xlabel="h (nats)", ylabel=label("loss −log σ(s·h)"))
    middle.set(ylim=(0, 4), xlabel="h (nats)", ylabel=label("push on h: s·σ(−s·h)"))
    right.set(ylim=(-8, 8), xlabel=label("p, probability of the preference"), ylabel="h* = logit(p)/s (nats)")
    left.legend(frameon=False, loc="upper right")
    says = middle.text(0.97, 0.97, "", transform=middle.transAxes, va="top", ha="right")

    def update(beta: float) -> None:
        for form, (loss, push, optimum) in lines.items():
            s = scale(beta, form)
            loss.set_ydata(np.logaddexp(0, -s * h))
            push.set_ydata(s * np.exp(-np.logaddexp(0, s * h)))
            optimum.set_ydata(np.log(p / (1 - p)) / s)
        says.set_text(
            label("β = {beta:.3g}\nstandard: s = {beta:.3g}\ninverse: s = {inverse:.3g}", beta=beta, inverse=1 / beta)
        )

    return Explorer(figure, update, {"beta": _log_slider("β", 0.5, -1, 1)})


def price_world(sharpness: float, *, prompts: int = 100) -> tuple[Tensor, Tensor]:
    """Return prompts of 12 answers whose references differ in sharpness and whose rewards differ in spread.

    The logits of the reference are sharpness·u·N(0, 1) and the rewards sd·N(0, 1), with u uniform in (0, 1) and sd
    uniform in (0.2, 2.2), one of each per prompt. The draws are the same for every sharpness.

    Args:
        sharpness: factor of the reference's logits.
        prompts: number of prompts X.

    Returns:
        ref_logps (X, 12) in nats and rewards (X, 12), float64.
    """
    draw = torch.Generator().manual_seed(0)
    own, logits = torch.rand(prompts, 1, generator=draw), torch.randn(prompts, 12, generator=draw)
    spread, rewards = torch.rand(prompts, 1, generator=draw), torch.randn(prompts, 12, generator=draw)
    return torch.log_softmax((sharpness * own * logits).double(), 1), ((2 * spread + 0.2) * rewards).double()


def prices(ref_logps: Tensor, rewards: Tensor, *, epsilon: float = 0.005) -> pd.DataFrame:
    """Return the price of KL of every prompt, what approximates it, and the entropy of the reference.

    Args:
        ref_logps: (X, Y), nats.
        rewards: (X, Y).
        epsilon: KL budget of every prompt, nats.

    Returns:
        A row per prompt; columns price (β, reward per nat), approximation (sd(r)/√(2ε)) and H (nats).
    """
    mean = (ref_logps.exp() * rewards).sum(1, keepdim=True)
    spread = (ref_logps.exp() * (rewards - mean) ** 2).sum(1).sqrt()
    columns = {
        "price": tabular.solve_beta(ref_logps, rewards, epsilon, per_prompt=True),
        "approximation": spread / math.sqrt(2 * epsilon),
        "H": -(ref_logps.exp() * ref_logps).sum(1),
    }
    return pd.DataFrame(columns)


def price_and_entropy(*, prompts: int = 100) -> Explorer:
    """Show how the price of KL per prompt goes with the entropy of the reference, and with sd(r)/√(2ε).

    A dot per prompt of `price_world`, all with the same KL budget. Left: its price of KL over its entropy. Right: over
    the approximation for small KL, with the diagonal. The titles give Spearman's rank correlations.

    Args:
        prompts: number of prompts; the time of a move grows with it.
    """
    figure, axes = _panels(2)
    figure.set_size_inches(8.2, 3.4)
    panels = {"H": axes[0], "approximation": axes[1]}
    names = {"H": "H", "approximation": "sd(r)/√(2ε)"}
    dots = {
        column: ax.plot([], [], "o", color=_INK, markersize=3.5, alpha=0.6, markeredgewidth=0)[0]
        for column, ax in panels.items()
    }
    for ax in axes:
        ax.set_title("", fontsize="small", y=1)  # without y, a drawing without the title would move it
    axes[1].plot([0, 38], [0, 38], color=_GREY, linewidth=1, linestyle="--")
    axes[0].set(xlim=(0, 2.6), ylim=(0, 38), xlabel=label("entropy of the reference H (nats)"))
    axes[1].set(xlim=(0, 38), ylim=(0, 38), xlabel=label("sd(r)/√(2ε) (reward per nat)"))
    axes[0].set_ylabel(label("price of KL β* (reward per nat)"))

    def update(sharpness: float) -> None:
        world = prices(*price_world(sharpness, prompts=prompts))
        ranks = world.corr(method="spearman")["price"]
        for column, ax in panels.items():
            dots[column].set_data(world[column], world["price"])
            values = {"what": names[column], "rank": ranks[column], "n": prompts}
            ax.title.set_text(label("rank correlation with {what}: {rank:.2f} (n = {n})", **values))

    return Explorer(figure, update, {"sharpness": _slider(say("sharpness of the references"), 1.5, 0.5, 8.0, 0.5)})


# -- notebook 03 ---------------------------------------------------------------------------------------------

_BETA_MIN, _BETA_MAX = 0.05, 2.0
_GRID = torch.logspace(math.log10(0.02), math.log10(5), 241, dtype=torch.float64)


def term_curves(*, h: float = 2.0, ref_entropy: float = 2.0) -> Explorer:
    """Show the terms of the objective at one prompt over β, their slopes, and the β at the minimum of their sum.

    The pair has a fixed h; its label is correct with probability p, so the DPO term is
    −p·log σ(s·h) − (1 − p)·log σ(−s·h). The range of β is 0.05 to 2.

    Args:
        h: h of the pair, in nats.
        ref_entropy: entropy of the reference at the prompt, in nats per token.
    """
    figure, (left, right) = _panels(2)
    colors = {name: TERM_COLORS[name] for name in ("dpo", "range", "entropy")} | {key("sum"): "black"}
    lines = {
        name: [ax.plot(_GRID, 0 * _GRID, color=color, label=label(name))[0] for ax in (left, right)]
        for name, color in colors.items()
    }
    rest = [ax.axvline(1, color=_GREY, linewidth=1, linestyle="--") for ax in (left, right)]
    for ax in (left, right):
        _plain_log(ax, [0.02, 0.05, 0.1, 0.3, 1, 2, 5])
        ax.set(xlim=(0.02, 5), xlabel="β")
    left.set(ylim=(0, 2.5), ylabel=label("term (nats)"))
    right.set(ylim=(-3, 3), ylabel=label("slope in β (positive lowers β)"))
    right.axhline(0, color=_GREY, linewidth=0.8)
    left.legend(frameon=False, loc="upper left")
    readable = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9}
    says = right.text(0.97, 0.03, "", transform=right.transAxes, ha="right", bbox=readable)

    def update(form: Form, p: float, lambda_range: float, lambda_entropy: float, alpha: float) -> None:
        beta = _GRID.clone().requires_grad_()
        s = scale(beta, form)
        terms = {
            "dpo": p * torch.nn.functional.softplus(-s * h) + (1 - p) * torch.nn.functional.softplus(s * h),
            "range": lambda_range * (torch.relu(beta - _BETA_MAX) + torch.relu(_BETA_MIN - beta)),
            "entropy": lambda_entropy * (beta - alpha * ref_entropy).square(),
        }
        terms["sum"] = terms["dpo"] + terms["range"] + terms["entropy"]
        for name, term in terms.items():
            (slope,) = torch.autograd.grad(term.sum(), beta, retain_graph=True)
            lines[name][0].set_ydata(term.detach())
            lines[name][1].set_ydata(slope)
        at = float(_GRID[terms["sum"].argmin()])
        for line in rest:
            line.set_xdata([at, at])
        ends = {float(_GRID[0]): label("no rest: runs off to 0"), float(_GRID[-1]): label("no rest: runs off to ∞")}
        rests = ends.get(at, label("rest at β = {at:.2f}", at=at))  # least at an end of the grid: it falls on beyond it
        says.set_text(f"{rests}\nαH = {alpha * ref_entropy:.2f}")

    controls = {
        "form": widgets.ToggleButtons(options=[(say(form), form) for form in FORMS], description=say("form")),
        "p": _slider(say("reliability p of the label"), 0.75, 0.5, 1.0, 0.01),
        "lambda_range": _slider(say("λ1 (range)"), 1.0, 0.0, 2.0, 0.1),
        "lambda_entropy": _slider(say("λ3 (entropy)"), 0.1, 0.0, 2.0, 0.05),
        "alpha": _slider("α", 0.15, 0.02, 1.0, 0.01),
    }
    return Explorer(figure, update, controls)


def retrain(fit: Callable[..., pd.DataFrame]) -> Explorer:
    """Show the β of a network that is trained again at each change of two weights or α.

    Left: β against the entropy of the reference, with the line αH. Right: β against the planted β*, with the diagonal.

    Args:
        fit: called with lambda_smoothness, lambda_entropy and alpha by keyword; returns a table with columns task,
            ref_entropy, beta, beta_star, whose rows are always the same prompts in the same order.
    """
    figure, (left, right) = _panels(2)
    defaults = {"lambda_smoothness": 0.0, "lambda_entropy": 0.0, "alpha": 0.15}
    table = fit(**defaults)
    dots = {}
    for task, color in task_colors(table["task"]).items():
        style: dict[str, Any] = {
            "marker": "o",
            "linestyle": "",
            "markersize": 3.5,
            "alpha": 0.6,
            "color": color,
            "label": task,
        }
        dots[task] = [ax.plot([], [], **style)[0] for ax in (left, right)]
    (line,) = left.plot([], [], color=_GREY, linewidth=1, label="αH")
    right.plot([0.03, 3], [0.03, 3], color=_GREY, linewidth=1, linestyle="--")
    _plain_log(right, [0.03, 0.1, 0.3, 1, 3])
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set(ylim=(0.03, 3), ylabel=label("β learnt"))
        ax.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
        ax.yaxis.set_minor_locator(NullLocator())
    entropy = table["ref_entropy"].to_numpy()
    left.set(xlim=(0, 1.05 * entropy.max()), xlabel=label("entropy of the reference H (nats per token)"))
    right.set(xlim=(0.03, 3), xlabel=label("β* planted"))
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)

    def update(lambda_smoothness: float, lambda_entropy: float, alpha: float) -> None:
        table = fit(lambda_smoothness=lambda_smoothness, lambda_entropy=lambda_entropy, alpha=alpha)
        for task, rows in table.groupby("task"):
            dots[task][0].set_data(rows["ref_entropy"], rows["beta"])
            dots[task][1].set_data(rows["beta_star"], rows["beta"])
        x = np.linspace(0.01, 1.05 * entropy.max(), 50)
        line.set_data(x, alpha * x)

    late = {"continuous_update": False}  # each change is a training run: wait until the slider is released
    controls = {
        "lambda_smoothness": _slider(say("λ2 (gradient penalty)"), defaults["lambda_smoothness"], 0, 1, 0.02, **late),
        "lambda_entropy": widgets.SelectionSlider(
            options=(0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),  # a log slider has no 0
            value=defaults["lambda_entropy"],
            description=say("λ3 (entropy)"),
            **(_WIDE | late),
        ),
        "alpha": _slider("α", defaults["alpha"], 0.05, 0.5, 0.01, **late),
    }
    return Explorer(figure, update, controls)


# -- notebook 08 ---------------------------------------------------------------------------------------------

RULES_OF_BETA = (key("1/b, reward per nat"), key("reliability"), key("entropy H"), "1/H", key("equal KL"))
"""The rules for s that `which_beta` draws; the standard form, s = β."""

_FACTORS = torch.linspace(0, 1, 31, dtype=torch.float64).square() * 6
_TASKS = ("math", "dialogue")


def rule_factors(rule: str, world: tabular.TaskWorld, logits: Tensor, kinds: Sequence[tabular.Task]) -> Tensor:
    """Return the factors a ∝ 1/s (T,) that a rule for s gives to the tasks of a converged policy.

    Args:
        rule: one of `RULES_OF_BETA`: s in proportion to λ/b, to the reliability of the labels, to the entropy of the
            reference or its inverse, or such that every task spends the same KL.
        world: the world.
        logits: (X, Y) the logits fitted to its labels.
        kinds: its T tasks.
    """
    if rule not in RULES_OF_BETA:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES_OF_BETA)}")
    if rule == "reliability":
        return 1 / torch.tensor([kind.reliability for kind in kinds], dtype=torch.float64)
    by_task = [world.task == t for t in range(len(kinds))]
    if rule in ("entropy H", "1/H"):
        entropy = -(world.ref_logps.exp() * world.ref_logps).sum(1)
        means = torch.stack([entropy[rows].mean() for rows in by_task])
        return 1 / means if rule == "entropy H" else means
    found = tabular.tilt_moments(world.ref_logps, logits, world.rewards, 0.0)
    moments = (found.variance, found.covariance)
    variance, covariance = (torch.stack([values[rows].mean() for rows in by_task]) for values in moments)
    return variance.rsqrt() if rule == "equal KL" else covariance.clamp(min=0) / variance


def which_beta(*, budget: float = 0.3, prompts: int = 16, answers: int = 8) -> Explorer:
    """Show what a rule for β earns on the reward-KL plane, beside one β and the best β by task.

    Two tasks in the exact world, with labels sampled from the true reward and logits fitted to them. Left: mean reward
    above the reference's over mean KL, for one factor, the rule's factors and the best ones. Right: reward per nat b of
    each task over their mean, and the factors a of the rule and of the best at the budget, over that of one β.

    Args:
        budget: mean KL at which the gains are compared, nats.
        prompts: prompts per task.
        answers: answers per prompt.
    """
    figure, (left, right) = _panels(2)
    figure.set_size_inches(8.2, 3.4)
    colors = {
        key("one β"): _GREY,
        key("the rule"): FORM_COLORS["standard"],
        key("best by task"): FORM_COLORS["inverse"],
    }
    styles = {"one β": "-", "the rule": "-", "best by task": "--"}
    curves = {
        name: left.plot([], [], styles[name], color=color, label=label(name))[0] for name, color in colors.items()
    }
    left.axvline(budget, color=_GREY, linewidth=0.8, linestyle=":")
    left.set(xlim=(0, 1), ylim=(0, 1.5))
    left.set(xlabel=label("mean KL(π_a‖π_ref) (nats)"), ylabel=label("reward above the reference's"))
    left.legend(frameon=False, loc="lower right")
    says = left.text(0.03, 0.98, "", transform=left.transAxes, va="top", fontsize="small")
    groups = ("b", label("a, the rule"), label("a, best"))
    colors_of = task_colors(_TASKS)
    places = [3 * g + t for g in range(len(groups)) for t in range(len(_TASKS))]
    bars = right.bar(places, 0.0, 0.8, color=[colors_of[task] for task in _TASKS] * len(groups))
    labels = [right.text(place, 0.0, "", ha="center", va="bottom", fontsize="small") for place in places]
    right.axhline(1, color=_GREY, linewidth=0.8, linestyle=":")
    right.set_xticks([3 * g + 0.5 for g in range(len(groups))], list(groups))
    right.set(ylim=(0, 3), ylabel=label("b over its mean, a over that of one β"))
    right.legend(bars[: len(_TASKS)], _TASKS, frameon=False, loc="upper right", ncols=2)
    one = torch.ones(len(_TASKS), dtype=torch.float64)

    def update(rule: str, **given: float) -> None:
        kinds = [
            tabular.Task(given[f"reliability_{t}"], int(given[f"pairs_{t}"]), given[f"spread_{t}"], given[f"sharp_{t}"])
            for t in range(len(_TASKS))
        ]
        draw = torch.Generator().manual_seed(0)
        world = tabular.sample_tasks(kinds, prompts=prompts, answers=answers, generator=draw)
        logits = tabular.fit_logits(world.wins, ridge=0.01)
        gain, spent, slope = _along_factors(world, logits, len(kinds))
        directions = {"one β": one, "the rule": rule_factors(rule, world, logits, kinds)}
        lines = {name: _mixture(gain, spent, own) for name, own in directions.items()}
        lines["best by task"] = _best_mixture(gain, spent)
        earned = {}
        for name, (kl, reward, _) in lines.items():
            curves[name].set_data(kl, reward)
            earned[name] = float(np.interp(budget, kl, reward))
        same = np.interp(budget, lines["one β"][0], lines["one β"][2][:, 0])
        factors = [
            [np.interp(budget, lines[name][0], column) / same for column in lines[name][2].T]
            for name in ("the rule", "best by task")
        ]
        heights = np.concatenate([slope / slope.mean(), *factors])
        for bar, tag, height in zip(bars, labels, heights, strict=True):
            shown = min(max(float(height), 0.0), 3.0)
            bar.set_height(shown)
            tag.set(text=f"{height:.2f}", y=min(shown, 2.8))
        base = earned["one β"]
        over = {name: 100 * (value / base - 1) if base > 0 else math.nan for name, value in earned.items()}
        says.set_text(
            label(
                "at {budget:g} nats, over one β:\nthe rule {rule:+.1f} %\nbest by task {best:+.1f} %",
                budget=budget,
                rule=over["the rule"],
                best=over["best by task"],
            )
        )

    controls: dict[str, widgets.ValueWidget] = {
        "rule": widgets.Dropdown(
            options=[(say(rule), rule) for rule in RULES_OF_BETA],
            value="reliability",
            description=say("s in proportion to"),
            **_WIDE,
        )
    }
    starts = {"reliability": (4.0, 1.0), "pairs": (16, 16), "spread": (1.0, 1.0), "sharp": (2.0, 0.5)}
    names = {
        "reliability": say("reliability κ"),
        "pairs": say("pairs per prompt"),
        "spread": say("spread of r"),
        "sharp": say("sharpness"),
    }
    ends = {"reliability": (-0.3, 1), "pairs": (0.3, 2.4), "spread": (-0.7, 0.3), "sharp": (-0.7, 0.6)}
    for name, (t, task) in itertools.product(starts, enumerate(_TASKS)):
        text = say("{quantity}, {task}", quantity=names[name], task=task)
        controls[f"{name}_{t}"] = _log_slider(text, starts[name][t], *ends[name])
    return Explorer(figure, update, controls)


def _along_factors(world: tabular.TaskWorld, logits: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return reward above the reference's and KL (T, F) along `_FACTORS`, and the slopes (T,).

    The factors are in units of 1/√E[Var ẑ]: at a = 1 in these units one β spends about half a nat.
    """
    start = tabular.tilt_moments(world.ref_logps, logits, world.rewards, 0.0)
    mean = lambda values: torch.stack([values[world.task == t].mean() for t in range(count)])  # noqa: E731
    variance, slope = mean(start.variance), mean(start.covariance) / mean(start.variance)
    # all factors at once, as further prompts
    grid = (_FACTORS * variance.mean().rsqrt()).repeat_interleave(len(world.task))
    ref_logps, h, rewards = (t.repeat(len(_FACTORS), 1) for t in (world.ref_logps, logits, world.rewards))
    found = tabular.tilt_moments(ref_logps, h, rewards, grid)
    parts = [values.view(len(_FACTORS), -1).T for values in (found.reward, found.kl)]
    gain, spent = (torch.stack([part[world.task == t].mean(0) for t in range(count)]).numpy() for part in parts)
    return gain - gain[:, :1], spent, slope.numpy()


def _mixture(gain: np.ndarray, spent: np.ndarray, direction: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean KL (F,), mean reward (F,) and factors (F, T) along a direction (T,)."""
    factors = _FACTORS.numpy()[:, None] * direction.numpy() / float(direction.max())
    kl, reward = (
        np.mean([np.interp(own, _FACTORS, row) for own, row in zip(factors.T, table, strict=True)], axis=0)
        for table in (spent, gain)
    )
    return kl, reward, factors


def _best_mixture(gain: np.ndarray, spent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same of the best factors by task, at each price of KL from high to low."""
    fine = np.linspace(0, _FACTORS[-1].item(), 601)
    gains, kls = (np.stack([np.interp(fine, _FACTORS, row) for row in table]) for table in (gain, spent))
    prices = np.geomspace(30, 1e-3, 160)[:, None, None]
    at = (gains - prices * kls).argmax(2)  # (prices, T)
    rows = np.arange(len(gains))
    return kls[rows, at].mean(1), gains[rows, at].mean(1), fine[at]
