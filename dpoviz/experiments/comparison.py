"""Compare every rule for beta with one constant, at equal KL, in many small worlds: jobs, tables and contrasts.

The experiment is a table of independent jobs, each a training. Each writes one file and is not run again while that
file exists; `gather` collects the files into a table, and `contrasts` tests them.

The primary endpoint, fixed before the run, is the share of the oracle's gain: how much a contender earns above the
constant at the same mean KL (0.1, 0.3 and 1 nats), over what the best factor per task earns above it. Worlds are
the unit; intervals are paired t intervals over worlds; all contrasts share one Holm correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dpoviz.analysis.statistics import effect, holm
from dpoviz.experiments.comparison_config import (
    CONSTANT,
    ORACLE,
    RETILTED,
    TRAINED,
    TRUE_SLOPES,
    TURN,
    CompareConfig,
    Job,
    jobs,
)
from dpoviz.lm.cache import read_result

IDEAL = "ideal"
"""The policy that tilts the reference by the true reward: no policy earns more at this KL."""


def job_table(config: CompareConfig) -> pd.DataFrame:
    """Return `jobs` as a table, with their names."""
    rows = jobs(config)
    return pd.DataFrame(rows).assign(name=[job.name for job in rows])


def best_settings(config: CompareConfig, out: Path, contender: str) -> tuple[float, float]:
    """Return the learning rate and the scale of a contender, found on the tuning worlds.

    Best is the highest reward at equal KL, averaged over the tuning worlds and the budgets. A contender that is not
    tuned for itself has those of the constant.

    Raises:
        ValueError: a tuning job that is needed has not been run.
    """
    name = contender if contender in config.tuned else CONSTANT
    runs = _read(out, [job for job in jobs(config) if job.phase == "tuning" and job.contender == name])
    rows = pd.DataFrame({"at": (r["learning_rate"], r["scale"]), "worth": _worth(r)} for r in runs)
    return rows.groupby("at")["worth"].mean().idxmax()


def _worth(run: dict) -> float:
    return float(np.mean([found["reward"]["all"] for found in run["results"]["own"].values()]))


def _read(out: Path, rows: list[Job]) -> list[dict]:
    files = [out / "runs" / f"{job.name}.json" for job in rows]
    missing = [file.stem for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{out}: {len(missing)} {rows[0].phase} jobs have not been run, first {missing[0]}; run them first"
        )
    return [read_result(file) for file in files]


def gather(config: CompareConfig, out: Path) -> pd.DataFrame:
    """Return the finished runs of all phases as one table.

    Returns:
        A row per phase, condition, world, contender (trained, re-tilted and `IDEAL`), learning_rate, scale, budget and
        task ("all": the mean over tasks), with reward, gain (reward minus the reference's), kl (nats), a (factor by
        which the policy is re-tilted), margin (mean s·h of the last batch of training, nats) and cpu_seconds.
    """
    found = []
    done = [job for job in jobs(config) if (out / "runs" / f"{job.name}.json").is_file()]
    for run in _read(out, done):
        place = {name: run[name] for name in ("phase", "condition", "world", "learning_rate", "scale")}
        for name, budgets in run["results"].items():
            own = {"contender": run["contender"], "margin": run["margin"], "cpu_seconds": run["cpu_seconds"]}
            if name != "own":
                own = {"contender": name}
            for budget, values in budgets.items():
                for task, reward in values["reward"].items():
                    rest = {"reward": reward, "gain": reward - run["reference"][task]}
                    rest |= {measure: values[measure][task] for measure in ("kl", "a")}
                    found.append({**place, **own, "budget": float(budget), "task": task, **rest})
    columns = ["phase", "condition", "world", "contender", "learning_rate", "scale", "budget", "task", "reward", "gain"]
    return pd.DataFrame(found, columns=[*columns, "kl", "a", "margin", "cpu_seconds"])


def finished_worlds(config: CompareConfig, table: pd.DataFrame) -> list[int]:
    """Return the measured worlds in which every job is finished."""
    wanted = {(job.world, job.contender, job.condition) for job in jobs(config) if job.phase == "main"}
    main = table[table["phase"] == "main"]
    missing = wanted - set(main[["world", "contender", "condition"]].itertuples(index=False, name=None))
    return sorted({world for world, *_ in wanted} - {world for world, *_ in missing})


def by_condition(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return how far training with the constant went and what it earned, by condition, in means over worlds.

    Args:
        table: the table of `gather`, of worlds that are finished.
        conditions: names of `CONDITIONS`.

    Returns:
        A row per condition: scale, s at the start; margin, the mean s·h of the last batch of training, nats; and at
        each budget, such as 0.1, "gain 0.1", the constant's over the reference, and "oracle 0.1", what the best factor
        per task adds.
    """
    main = table[(table["phase"] == "main") & (table["task"] == "all")]
    rows = {}
    for condition in conditions:
        own = main[main["condition"] == condition]
        constant = own[own["contender"] == CONSTANT]
        means = own.groupby(["contender", "budget"])["gain"].mean()
        rows[condition] = {"scale": constant["scale"].iloc[0], "margin": constant["margin"].mean()}
        for budget, gain in means[CONSTANT].items():
            rows[condition][f"gain {budget:g}"] = gain
            rows[condition][f"oracle {budget:g}"] = means[ORACLE, budget] - gain
    return pd.DataFrame.from_dict(rows, orient="index")


def pooled_shares(table: pd.DataFrame, contenders: Sequence[str]) -> pd.DataFrame:
    """Return the share of the oracle's gain over several conditions: mean gain over mean gain, the world as the unit.

    Args:
        table: the table of `gather`, of worlds that are finished, with the conditions to average over.
        contenders: names of contenders in the table.

    Returns:
        A row per contender and budget: share, low, high (95 % paired t interval over worlds, in which the oracle's mean
        gain is taken as known).
    """
    main = table[(table["phase"] == "main") & (table["task"] == "all")]
    means = main.groupby(["budget", "world", "contender"])["reward"].mean().unstack()
    above = means.sub(means[CONSTANT], axis=0)
    rows = []
    for budget, own in above.groupby(level="budget"):
        for contender in contenders:
            found = effect(own[contender].to_numpy())
            shares = {part: getattr(found, name) / own[ORACLE].mean()
                      for part, name in (("share", "mean"), ("low", "low"), ("high", "high"))}  # fmt: skip
            rows.append({"contender": contender, "budget": budget, **shares})
    return pd.DataFrame(rows)


def contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """Compare every contender with one constant at equal KL, world by world.

    Args:
        table: the table of `gather`, of worlds that are finished.

    Returns:
        A row per condition, budget and contender but the constant, and one for `TURN`: mean difference in reward, low,
        high (95 % paired t interval over worlds), p, n (worlds); share of the oracle's gain with share_low and
        share_high, in which the oracle's mean gain is taken as known; detectable, the difference that a test at 5 %
        finds with a power of 80 %, and detectable_share, the same over the training gain of the constant, if it gains.
        holm is p adjusted over all rows but those of the oracle, the ideal and `TRUE_SLOPES`, which read the rewards by
        which all are measured.
    """
    main = table[(table["phase"] == "main") & (table["task"] == "all")]
    wide = main.pivot(index=["condition", "budget", "world"], columns="contender", values="reward")
    gains = main[main["contender"] == CONSTANT].groupby(["condition", "budget"])["gain"].mean()
    rows = []
    for condition, budget in main[["condition", "budget"]].drop_duplicates().itertuples(index=False):
        own = wide.loc[condition, budget]
        names = [name for name in (*RETILTED, *TRAINED, IDEAL) if name in own and name != CONSTANT]
        above = own[names].sub(own[CONSTANT], axis=0).dropna(axis=1, how="all")
        if {"1/b in training", "b in training"} <= set(above):
            above[TURN] = above["1/b in training"] - above["b in training"]
        most = above[ORACLE].mean()
        for contender, values in above.items():
            found = effect(values.dropna().to_numpy())
            shares = {name: getattr(found, part) / most for name, part in
                      (("share", "mean"), ("share_low", "low"), ("share_high", "high"))}  # fmt: skip
            gain = gains[condition, budget]
            shares["detectable_share"] = found.detectable / gain if gain > 0 else np.nan
            rows.append({"condition": condition, "budget": budget, "contender": contender, **found._asdict(), **shares})
    result = pd.DataFrame(rows)
    tested = ~result["contender"].isin([ORACLE, IDEAL, TRUE_SLOPES])
    result["holm"] = np.nan
    result.loc[tested, "holm"] = holm(result.loc[tested, "p"].to_numpy())
    return result
