"""Report a finished study: tables, sentences computed from them, and a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dpoviz.allocation import POOLED, gain_bound, reward_per_nat_of_pairs
from dpoviz.analysis.gain import relative_gain
from dpoviz.analysis.plots_study import figure_study
from dpoviz.analysis.statistics import holm, mcnemar, t_interval
from dpoviz.analysis.tables import in_order, read_table, write_table
from dpoviz.experiments.study_config import BASELINE, StudyConfig, jobs
from dpoviz.lm.cache import read_result

TABLES = ("slopes", "gains", "betas", "accuracy")
"""The tables of a study, each as <name>.csv."""

_RIGHT = 1e-4
"""h in nats above which a pair counts as ranked correctly: the rounding of float32."""


def gather(config: StudyConfig, out: Path) -> pd.DataFrame:
    """Return a row per job, measurement and held-out pair: arm, scale, fold, seed, epochs, row, h, beta, and the pair's
    task, unit, prompt and ref_entropy; beta is NaN where it is fixed.
    """
    parts = []
    for job in jobs(config):
        found = read_result(out / "runs" / f"{job.name}.json")
        for epochs, h in found["h"].items():
            columns = {"row": found["rows"], "h": h, "beta": found["beta"].get(epochs, math.nan)}
            parts.append(pd.DataFrame(columns).assign(**job._asdict(), epochs=int(epochs)))
    return pd.concat(parts).join(read_table(out / "pairs.csv"), on="row").reset_index(drop=True)


def slopes_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return reward per nat by task, in win rate, of each arm after each number of epochs (`reward_per_nat_of_pairs`).

    All folds and seeds together. Interval and se are a bootstrap over units of pairs, whose trainings stay together:
    they cover the choice of pairs; `spread`, the standard deviation of the slope between trainings, covers those.
    """
    parts = []
    for key, own in rows.groupby(["arm", "scale", "epochs"], sort=False):
        table = reward_per_nat_of_pairs(own["h"], task=own["task"], prompt=own["unit"])
        of_training = own.assign(top=own["h"] / 2, bottom=own["h"] ** 2)
        groups = [of_training, of_training.assign(task=POOLED)]
        sums = pd.concat(groups).groupby(["task", "fold", "seed"])[["top", "bottom"]].sum()
        spread = (sums["top"] / sums["bottom"]).groupby("task").std()
        table["spread"] = table["task"].map(spread)
        order = [*in_order(own["task"]), POOLED]
        table = table.set_index("task").loc[order].reset_index()
        parts.append(table.assign(**dict(zip(("arm", "scale", "epochs"), key, strict=True))))
    found = pd.concat(parts, ignore_index=True)
    return found[["arm", "scale", "epochs", *found.columns.drop(["arm", "scale", "epochs"])]]


def gains_of(rows: pd.DataFrame, slopes: pd.DataFrame, scale: float) -> pd.DataFrame:
    """Return what any beta by task could gain over each arm (`gain_bound`), and its gain over the middle constant.

    Returns:
        A row per arm, scale and epochs: bound, low, high; and gain, gain_low, gain_high (`relative_gain`, in win rate
        at equal small KL, on the same pairs of the same trainings), NaN where the constant itself gains nothing.
    """
    found = []
    keys = ["arm", "scale", "epochs"]
    groups = {key: own for key, own in rows.sort_values(["seed", "row"], kind="stable").groupby(keys, sort=False)}
    tables = {key: own for key, own in slopes.groupby(keys, sort=False)}
    for key, own in groups.items():
        middle = groups[BASELINE, scale, key[2]]
        bound, *more = gain_bound(tables[key])[:3]
        gain = relative_gain(*(part.reset_index(drop=True) for part in (own["h"], middle["h"], own["unit"])))
        names = (*keys, "bound", "low", "high", "gain", "gain_low", "gain_high")
        found.append(dict(zip(names, (*key, bound, *more, *(gain or [math.nan] * 3)), strict=True)))
    return pd.DataFrame(found)


def betas_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return beta(x) of each network arm by task, with trainings as the unit.

    Returns:
        A row per arm, epochs and task: trainings; beta, beta_low, beta_high (mean over trainings of the median over a
        training's held-out prompts, and its 95 % t interval over trainings); ref_entropy (mean over prompts, nats per
        token); and rho, rho_low, rho_high, likewise, of Spearman's correlation of beta with the entropy at the prompts
        of a training. In the row "all", rho is over the prompts of all tasks. Trainings share most of their pairs, so
        that the intervals are rather too short.
    """
    prompts = rows.dropna(subset="beta").drop_duplicates(["arm", "epochs", "fold", "seed", "task", "prompt"])
    found = []
    for (arm, epochs), of_arm in prompts.groupby(["arm", "epochs"], sort=False):
        for task in [*in_order(of_arm["task"]), POOLED]:
            own = of_arm if task == POOLED else of_arm[of_arm["task"] == task]
            trainings = own.groupby(["fold", "seed"])
            median = trainings["beta"].median()
            known = [group for _, group in trainings if group[["beta", "ref_entropy"]].nunique().min() > 1]
            rho = [spearmanr(group["beta"], group["ref_entropy"])[0] for group in known]
            row = {"arm": arm, "epochs": epochs, "task": task, "trainings": len(median)}
            row |= dict(zip(("beta", "beta_low", "beta_high"), t_interval(median), strict=True))
            row["ref_entropy"] = own.drop_duplicates(["task", "prompt"])["ref_entropy"].mean()
            values = np.clip(t_interval(rho), -1, 1) if rho else [math.nan] * 3
            found.append(row | dict(zip(("rho", "rho_low", "rho_high"), values, strict=True)))
    columns = ["arm", "epochs", "task", "trainings", "beta", "beta_low", "beta_high", "ref_entropy"]
    return pd.DataFrame(found, columns=[*columns, "rho", "rho_low", "rho_high"])


def accuracy_of(rows: pd.DataFrame, scale: float) -> pd.DataFrame:
    """Compare each arm's held-out accuracy with the middle constant's, seed by seed, each pair held out once.

    Returns:
        A row per arm, scale, epochs and seed: pairs, accuracy, constant (its accuracy); gained, lost, p (`mcnemar`);
        and holm, p adjusted over all rows. The test takes the pairs as independent, but pairs of one problem are not.
    """
    keys = ["arm", "scale", "epochs", "seed"]
    rows = rows.sort_values("row", kind="stable").assign(right=rows["h"] > _RIGHT)
    groups = {key: own for key, own in rows.groupby(keys, sort=False)}
    found = []
    for key, own in groups.items():
        middle = groups[BASELINE, scale, *key[2:]]
        if own is not middle:
            row = {"pairs": len(own), "accuracy": own["right"].mean(), "constant": middle["right"].mean()}
            found.append(dict(zip(keys, key, strict=True)) | row | mcnemar(own["right"], middle["right"])._asdict())
    table = pd.DataFrame(found, columns=[*keys, "pairs", "accuracy", "constant", "gained", "lost", "p"])
    return table.assign(holm=holm(table["p"]) if len(table) else np.empty(0))


def write_study(config: StudyConfig, out: Path) -> list[str]:
    """Write the tables of `TABLES`, study.txt and study.png of a finished study; return the sentences of study.txt."""
    rows = gather(config, out)
    slopes = slopes_of(rows)
    gains, betas = gains_of(rows, slopes, config.scale), betas_of(rows)
    accuracy = accuracy_of(rows, config.scale)
    for name, table in zip(TABLES, (slopes, gains, betas, accuracy), strict=True):
        write_table(table, out / f"{name}.csv")
    figure_study(slopes, gains, betas, scale=config.scale).savefig(out / "study.png", dpi=150)
    lines = sentences(config, slopes, gains, betas, accuracy)
    (out / "study.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return lines


def sentences(
    config: StudyConfig, slopes: pd.DataFrame, gains: pd.DataFrame, betas: pd.DataFrame, accuracy: pd.DataFrame
) -> list[str]:
    """Return the results in sentences: reward per nat, the bound and the gains, beta against entropy, accuracy."""
    lines = [f"{config.folds} folds × {config.seeds} seeds, scale {config.scale:g} where no other is named."]
    for epochs in config.epochs:
        at = f"(arm == @BASELINE) & (scale == @config.scale) & (epochs == {epochs})"
        own, bound = slopes.query(at), gains.query(at).iloc[0]
        shown = ", ".join(f"{r.task} {_interval(r.slope, r.low, r.high)}" for r in own.itertuples(index=False))
        high = f"{100 * bound.high:.1f}" if math.isfinite(bound.high) else "no limit"
        text = f"at most {100 * bound.bound:.1f} % [{100 * bound.low:.1f}, {high}]"
        text = text if math.isfinite(bound.bound) else "without bound: the constant gains nothing"
        lines.append(f"After {epochs} epochs of the constant, win rate per nat: {shown}; β by task could gain {text}.")
    last = config.epochs[-1]
    middle = (gains["arm"] == BASELINE) & (gains["scale"] == config.scale)
    for r in gains[(gains["epochs"] == last) & ~middle].itertuples(index=False):
        gain = "not known, for the constant does not gain significantly"
        if not math.isnan(r.gain):
            gain = f"{_interval(100 * r.gain, 100 * r.gain_low, 100 * r.gain_high, 1)} %"
        who = f"{r.arm} {r.scale:g}" if r.arm == BASELINE else r.arm
        lines.append(f"{who}, gain over the constant after {last} epochs: {gain}.")
    for r in betas[(betas["epochs"] == last) & (betas["task"] == POOLED)].itertuples(index=False):
        own = betas[(betas["epochs"] == last) & (betas["arm"] == r.arm) & (betas["task"] != POOLED)]
        shown = ", ".join(f"{o.task} {_interval(o.beta, o.beta_low, o.beta_high)}" for o in own.itertuples(index=False))
        rho = _interval(r.rho, r.rho_low, r.rho_high, 2)
        lines.append(f"{r.arm}, β over {r.trainings} trainings: {shown}; ρ with the entropy {rho}.")
    other = accuracy[accuracy["holm"] < 0.05]
    named = ", ".join(f"{r.arm} {r.scale:g} ({r.epochs} epochs, seed {r.seed}: {r.gained} against {r.lost} pairs)"
                      for r in other.itertuples(index=False))  # fmt: skip
    lines.append(f"Accuracy that differs from the constant's (Holm's p below 5 %): {named or 'none'}.")
    return lines


def _interval(value: float, low: float, high: float, decimals: int | None = None) -> str:
    def show(number: float) -> str:
        return f"{number:.3g}" if decimals is None else f"{number:.{decimals}f}"

    return f"{show(value)} [{show(low)}, {show(high)}]"
