"""Compare every rule for beta with one well-chosen constant, in the small world, where the true reward is known.

The experiment is a table of independent jobs. A *tuning* job tries one learning rate; a *main* job runs a variant at
its best rate; a *reference* job measures the reference itself. Each job writes one file and is not run again while
that file exists; `gather` collects the files into a table.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from dpoviz.analysis.statistics import Curve, effect, holm
from dpoviz.data import tasks
from dpoviz.experiments.comparison_config import BASELINE, CONTENDERS, CompareConfig, Job, jobs


def job_table(config: CompareConfig) -> pd.DataFrame:
    """Return `jobs` as a table, with their names."""
    rows = jobs(config)
    return pd.DataFrame(rows).assign(name=[job.name for job in rows])


def best_rates(config: CompareConfig, out: Path) -> dict[str, float]:
    """Return the best learning rate of each variant, found on the tuning worlds.

    For the constants it is the rate whose curve is highest on average over the KL budgets of `BUDGETS`; for every other
    variant, the rate at which the run of its last value lies highest above that curve.

    Raises:
        ValueError: a tuning job that has not been run.
    """
    rows = [job for job in jobs(config) if job.phase in ("tuning", "reference") and job.seed >= 1000]
    missing = [job.name for job in rows if not (out / "runs" / f"{job.name}.json").is_file()]
    if missing:
        raise ValueError(f"{out}: {len(missing)} tuning jobs have not been run, first {missing[0]}; run them first")
    found = pd.DataFrame([json.loads((out / "runs" / f"{job.name}.json").read_text()) for job in rows])
    starts = found[found["phase"] == "reference"].set_index("seed")["reward/all"]
    tuned = found[found["phase"] == "tuning"]

    def curve(rate: float, seed: int) -> Curve:
        rows = tuned.query("contender == @BASELINE and learning_rate == @rate and seed == @seed")
        return Curve(rows["kl/all"], rows["reward/all"], start=starts[seed])

    def worth(rate: float) -> float:
        return float(np.mean([[curve(rate, seed).best(b) for b in BUDGETS] for seed in starts.index]))

    rates = {BASELINE: max(config.learning_rates, key=worth)}
    for name in config.contenders:
        if name != BASELINE and not CONTENDERS[name].rates_of:
            rows = tuned[tuned["contender"] == name]
            above = [r["reward/all"] - curve(rates[BASELINE], r["seed"]).at(r["kl/all"]) for _, r in rows.iterrows()]
            rates[name] = float(rows.assign(above=above).groupby("learning_rate")["above"].mean().idxmax())
    return rates


BUDGETS = (0.5, 1.0, 2.0, 4.0)
"""KL budgets, in nats per answer, at which the best rewards are compared."""


_LISTS = ("training_betas", "reliability", "betas")


def gather(config: CompareConfig, out: Path) -> pd.DataFrame:
    """Return the finished runs, a row each: the job, learning_rate, seconds, and the measurements.

    Measured by task and over "all", as <name>/<task>: reward, kl, kl_k1, kl_k3, entropy, length with <name>_se (see
    `evaluate_policy`); accuracy, h, s, margin (on held-out pairs); beta (geometric mean), beta_spread (standard
    deviation of log beta), rho (Spearman's, between beta and entropy). Measured once: brier and ece.
    """
    rows = []
    for job in jobs(config):
        file = out / "runs" / f"{job.name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            rows.append({key: value for key, value in found.items() if key not in _LISTS})
    return pd.DataFrame(rows)


def gather_betas(config: CompareConfig, out: Path, *, noise: float, seed: int) -> pd.DataFrame:
    """Return beta of each rule at its first value, without controls: contender, form, task, ref_entropy, beta."""
    parts = []
    for name in config.contenders:
        value = config.values(name)[0]
        file = out / "runs" / f"{Job('main', name, value, 0.0, noise, seed).name}.json"
        if name != BASELINE and not CONTENDERS[name].control and file.is_file():
            betas = pd.DataFrame(json.loads(file.read_text())["betas"]).drop_duplicates()
            parts.append(betas.assign(contender=name, form=CONTENDERS[name].form))
    return pd.concat(parts, ignore_index=True)


def gather_reliability(config: CompareConfig, out: Path) -> pd.DataFrame:
    """Return reliability by bin, pooled over the seeds of the main runs.

    Columns: contender, value, learning_rate, noise, bin, n, predicted, truth.
    """
    parts = []
    for job in jobs(config):
        file = out / "runs" / f"{job.name}.json"
        if job.phase == "main" and file.is_file():
            found = json.loads(file.read_text())
            place = {name: found[name] for name in ("contender", "value", "learning_rate", "noise")}
            parts.append(pd.DataFrame(found["reliability"]).assign(**place))
    table = pd.concat(parts, ignore_index=True)
    keys = ["contender", "value", "learning_rate", "noise", "bin"]
    for name in ("predicted", "truth"):
        table[name] *= table["n"]
    sums = table.groupby(keys, sort=False)[["n", "predicted", "truth"]].sum()
    return sums.assign(predicted=sums["predicted"] / sums["n"], truth=sums["truth"] / sums["n"]).reset_index()


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Compare each variant with the constants of the same world at the same learning rate, seed by seed.

    Args:
        table: the table of `gather`.

    Returns:
        A row per contender (variant), noise, seed and task ("all" among them), with columns

        above: the reward minus that of the constants at the same KL, mean over the variant's runs;
        area: the mean difference of the two curves over the KL range that both reach;
        mean_scale/reward, mean_scale/kl: reward and KL minus those of a constant with the run's mean scale over all
        held-out pairs (interpolated between the constants on the log of the scale), mean over the variant's runs;
        best/<budget>, best_difference/<budget>: the highest reward at a KL of at most <budget> nats, and its difference
        from that of the constants, here at all their learning rates.
    """
    main = table[table["phase"] == "main"]
    starts = table[(table["phase"] == "reference") & (table["seed"] < 1000)].set_index("seed")
    groups = {key: rows for key, rows in main.groupby(["contender", "noise", "seed"], sort=False)}
    found = []
    for (contender, noise, seed), rows in groups.items():
        rivals = groups[BASELINE, noise, seed].sort_values("s/all")
        alike = rivals[rivals["learning_rate"].isin(rows["learning_rate"])]
        for task in (*tasks.TASKS, "all"):

            def curve(some: pd.DataFrame, task: str = task, seed: int = seed) -> Curve:
                return Curve(some[f"kl/{task}"], some[f"reward/{task}"], start=starts.loc[seed, f"reward/{task}"])

            own, whole = curve(rows), curve(rivals)
            row = {"contender": contender, "noise": noise, "seed": seed, "task": task}
            if contender != BASELINE:
                constant = curve(alike)
                row["above"] = float(np.mean(own.reward[1:] - constant.at(own.kl[1:])))
                row["area"] = own.mean_difference(constant)
                for name in ("reward", "kl"):
                    same = np.interp(np.log(rows["s/all"]), np.log(alike["s/all"]), alike[f"{name}/{task}"])
                    row[f"mean_scale/{name}"] = float((rows[f"{name}/{task}"] - same).mean())
            for budget in BUDGETS:
                row[f"best/{budget:g}"] = own.best(budget)
                row[f"best_difference/{budget:g}"] = own.best(budget) - whole.best(budget)
            found.append(row)
    return pd.DataFrame(found)


def effects(found: pd.DataFrame, measure: str = "above") -> pd.DataFrame:
    """Return the mean of a difference over the seeds, by variant, noise and task.

    Args:
        found: the table of `differences`.
        measure: one of the columns of differences in `found`.

    Returns:
        A row per contender (every variant but the constant), noise (NaN: the mean over all levels, seed by seed) and
        task: mean, low, high, p, detectable (see `effect`), and holm, the p adjusted over the variants of one noise and
        task.
    """
    rivals = found[found["contender"] != BASELINE]
    pooled = rivals.groupby(["contender", "seed", "task"], as_index=False, sort=False)[measure].mean()
    whole = pd.concat([pooled.assign(noise=math.nan), rivals[["contender", "noise", "seed", "task", measure]]])
    keys = ["noise", "task", "contender"]
    rows = [{**dict(zip(keys, key, strict=True)), **effect(group[measure])._asdict()}
            for key, group in whole.groupby(keys, dropna=False, sort=False)]  # fmt: skip
    table = pd.DataFrame(rows)
    table["holm"] = table.groupby(["noise", "task"], dropna=False)["p"].transform(lambda p: holm(p.to_numpy()))
    return table


def against(found: pd.DataFrame, first: str, second: str, measure: str = "above") -> pd.DataFrame:
    """Return the mean of first minus second over the seeds, by task, pooled over noise; columns as `effects`."""
    wide = found.groupby(["contender", "seed", "task"], sort=False)[measure].mean()
    rows = []
    for task in dict.fromkeys(found["task"]):
        own, other = (wide.xs(name, level="contender").xs(task, level="task") for name in (first, second))
        rows.append({"first": first, "second": second, "task": task, **effect((own - other).to_numpy())._asdict()})
    return pd.DataFrame(rows)
