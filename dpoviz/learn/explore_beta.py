"""β retrained alone, live, on what a run kept: what each regulariser does to this run's data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dpoviz.analysis.plots import plot_beta_by_task, plot_beta_vs_entropy
from dpoviz.analysis.tables import beta_table
from dpoviz.beta import BetaNetwork
from dpoviz.forms import FORMS, Form
from dpoviz.learn.run import Frozen, Run
from dpoviz.learn.sliders import Explorer
from dpoviz.losses import Logps, total_loss
from dpoviz.training.config import TrainConfig
from dpoviz.training.state import adamw
from dpoviz.translation import label, say

STEPS = 60
"""Steps of the live training, each on all of its pairs."""

MOST_PAIRS = 256
MOST_NUMBERS = 256 * 256
"""The most pairs of the live training, and the most pairs times features, with at least 64 pairs: with more, a change
of a slider takes over a second."""

LEARNING_RATE = 0.04
"""Learning rate of the live training, higher than a run's: it has few steps, and no noise of batches."""


def retrain_beta(frozen: Frozen, config: TrainConfig, *, steps: int = STEPS) -> np.ndarray:
    """Train a β-network from its start on frozen quantities, with the policy's h held fixed.

    Every step is on all pairs: L_total of `total_loss`, minimised by Adam. Computed in float64.

    Args:
        frozen: N pairs, from `Run.frozen`.
        config: form, β₀, range, α, weights and seed.
        steps: number of steps.

    Returns:
        (N,) β at the prompt of each pair, in evaluation mode.

    Raises:
        ValueError: fewer than 2 pairs.
    """
    x = torch.from_numpy(frozen.features).double()
    h, ref_entropy = (torch.tensor(values, dtype=torch.float64) for values in (frozen.h, frozen.ref_entropy))
    task = torch.from_numpy(np.unique(frozen.task, return_inverse=True)[1])
    weights = config.regularization(config.alpha_for(frozen.ref_entropy.tolist()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = BetaNetwork(x.shape[1], beta0=config.beta0).double()
    optimizer = adamw(network, LEARNING_RATE)
    zero = torch.zeros_like(h)
    for _ in range(steps):
        network.fit_running_statistics(x)  # the gradient penalty reads them
        objective = total_loss(
            Logps(h, zero, zero, zero),  # the loss reads only the difference h
            network(x),
            form=config.form,
            regularization=weights,
            ref_entropy=ref_entropy,
            beta_fn=network,
            x=x,
            task=task,
        )
        optimizer.zero_grad()
        objective.total.backward()
        optimizer.step()
    network.fit_running_statistics(x)
    with torch.no_grad():
        return network.eval()(x).numpy()


def explore_beta(run: Run) -> Explorer:
    """Return sliders for the regularisers, and the β(x) that they give on a run's data.

    Each change trains the β-network alone, from its start, on quantities that the run kept of its training pairs: the
    features and entropies of the reference, and h of the policy after the last step. They are held fixed, which the
    picture says. So it shows what a term does to this data, not what a whole training would have done. The settings
    of the run are where the sliders start.

    Args:
        run: what `load_run` returned.

    Raises:
        ValueError: the run is of an older version, which kept no frozen quantities, or it has no β(x).
    """
    if run.table.empty:
        raise ValueError(f"run: {run.folder} has no β(x), expected a run whose rule makes β a function of the prompt")
    frozen = {form: _some(run.frozen(form)) for form in FORMS if form in set(run.table["form"])}
    pairs = {form: len(run.frozen(form).h) for form in frozen}
    first = next(iter(frozen))
    settings = frozen[first].config
    figure = Figure(figsize=(9.8, 4.3), dpi=90)
    # the same margins for every picture: they have to hold the labels of any of them
    places = {"left": 0.08, "right": 0.9, "bottom": 0.16, "top": 0.8, "wspace": 0.42}
    left, right = figure.subplots(1, 2, gridspec_kw=places)

    def update(form: Form, alpha: float, width: float | None, **weights: Any) -> None:
        kept = frozen[form]
        ends: dict[str, Any] = {} if width is None else _ends(kept.config, width)
        config = replace(kept.config, alpha=alpha, **ends, **weights)
        table = _table(kept, config)
        low, high = config.beta0 / _FAR, config.beta0 * _FAR
        beyond = int((~table["beta"].between(low, high)).sum())
        table["beta"] = table["beta"].clip(low, high)
        lines = {name: getattr(config, name) for name in ("beta0", "beta_min", "beta_max")}
        for ax in (left, right):
            ax.clear()
        plot_beta_by_task(table, ax=left, **lines)
        target = alpha * config.beta0 if config.lambda_entropy > 0 else None
        plot_beta_vs_entropy(table, ax=right, alpha=target, **lines)
        said = _caption(form, len(kept.h), pairs[form], beyond)
        figure.suptitle(said, fontsize="small", x=0.01, ha="left")

    assert settings.alpha is not None  # `Run.frozen` fills it in
    late: dict[str, Any] = {"continuous_update": False, **_WIDE}  # each change is a training
    controls: dict[str, Any] = {
        "form": widgets.ToggleButtons(
            options=[(say(form), form) for form in frozen], value=first, description=say("form"), style=_WIDE["style"]
        ),
        "lambda_range": _weight(say("λ1 (range)"), settings.lambda_range),
        "lambda_smoothness": _weight(say("λ2 (gradient penalty)"), settings.lambda_smoothness),
        "lambda_consistency": _weight(say("λ2 (variance within a task)"), settings.lambda_consistency),
        "lambda_entropy": _weight(say("λ3 (entropy)"), settings.lambda_entropy),
        "alpha": widgets.FloatLogSlider(
            settings.alpha,
            min=math.log10(settings.alpha / 8),
            max=math.log10(settings.alpha * 8),
            step=0.05,
            description=say("α (β₀ per nat)"),
            readout_format=".3g",
            **late,
        ),
        "width": widgets.SelectionSlider(
            options=[
                (say("as in the run"), None),
                *((say("s₀/{w:g} to {w:g}·s₀", w=w), w) for w in (1.5, 2, 4, 8, 16, 64)),
            ],
            index=0,  # None alone would mean that nothing is selected
            description=say("range of s"),
            **late,
        ),
    }
    return Explorer(figure, update, controls)


_FAR = 1000.0
_WIDE: dict[str, Any] = {"layout": {"width": "520px"}, "style": {"description_width": "190px"}}
_WEIGHTS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def _weight(label: str, value: float) -> widgets.SelectionSlider:
    """Return a slider over weights for β₀ = 1, with 0, which a log slider has not, and with the run's own."""
    options = [(f"{weight:g}", weight) for weight in sorted({*_WEIGHTS, value})]
    return widgets.SelectionSlider(options=options, value=value, description=label, continuous_update=False, **_WIDE)


def _caption(form: Form, count: int, of: int, beyond: int) -> str:
    """Return what is held fixed and what is trained, for the top of the picture."""
    said = label(
        "Held fixed: the reference's features and H, and h of the {form} form after the last step, at {count} of {of} "
        "training pairs.\nTrained: the β-network alone, {steps} steps from β₀, on all of these pairs at once.",
        form=label(form), count=count, of=of, steps=STEPS,
    )  # fmt: skip
    edge = label(" {n} prompts lie beyond β₀/{far:g} to {far:g}·β₀: drawn at the edge.", n=beyond, far=_FAR)
    return said + edge if beyond else said


def _ends(config: TrainConfig, width: float) -> dict[str, float]:
    return {"scale_min": config.initial_scale / width, "scale_max": config.initial_scale * width}


def _some(frozen: Frozen) -> Frozen:
    """Return all pairs, or a sample of them by the run's seed."""
    count, width = frozen.features.shape
    most = min(MOST_PAIRS, max(64, MOST_NUMBERS // width))
    if count <= most:
        return frozen
    rows = np.sort(np.random.default_rng(frozen.config.seed).choice(count, most, replace=False))
    return frozen._replace(**{name: values[rows] for name, values in frozen._asdict().items() if name != "config"})


def _table(frozen: Frozen, config: TrainConfig) -> pd.DataFrame:
    """Return β after the live training, a row per prompt."""
    columns = {"task": frozen.task, "prompt": frozen.prompt, "ref_entropy": frozen.ref_entropy}
    rows = pd.DataFrame(columns).assign(beta=retrain_beta(frozen, config)).drop_duplicates("prompt")
    unknown = [0.0] * len(rows)  # the standard errors are not kept: no bars
    return beta_table(form=config.form, seed=config.seed, ref_entropy_se=unknown, **rows.to_dict("list"))
