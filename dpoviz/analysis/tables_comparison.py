"""Compute the tables for the figures of the comparison: gains over the reference, and means over seeds."""

from __future__ import annotations

import pandas as pd

from dpoviz.analysis.tables import EXPECTED_ORDER, POOLED

TASKS = (*EXPECTED_ORDER, POOLED)
"""The tasks of the small world, and the name of their mean."""

TUNING_SEEDS = 1000
"""The first seed of the tuning worlds, which no figure shows."""

PARTS = ("h", "s", "margin", "kl")
"""The measures that `parts_by_seed` summarises: the margin s·h with its factors, and the KL."""


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Return the main runs with columns gain/<task>: the reward minus the reference's in the same world.

    Args:
        table: columns phase, contender, noise, seed, value and reward/<task> for each task and "all".

    Raises:
        ValueError: missing columns, or no rows.
    """
    needed = ["phase", "contender", "noise", "seed", "value", *(f"reward/{task}" for task in TASKS)]
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise ValueError(f"table: missing columns {missing}, expected {needed}")
    if table.empty:
        raise ValueError("table: got no rows, expected at least one")
    starts = table[(table["phase"] == "reference") & (table["seed"] < TUNING_SEEDS)].set_index("seed")
    main = table[table["phase"] == "main"].copy()
    for task in TASKS:
        main[f"gain/{task}"] = main[f"reward/{task}"] - main["seed"].map(starts[f"reward/{task}"])
    return main


def frontier_points(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return KL and gain by variant, learning rate and value: means over seeds with standard errors.

    Args:
        rows: the table of `gains`, for one level of noise.
        task: a task, or "all".

    Returns:
        A row per contender (variant), learning rate and value, sorted by KL: contender, learning_rate, value, kl, gain,
        kl_se, gain_se. The standard error of a single seed is 0.
    """
    groups = rows.groupby(["contender", "learning_rate", "value"])[[f"kl/{task}", f"gain/{task}"]]
    points = groups.mean().join(groups.sem().fillna(0.0).add_suffix("_se"))
    points.columns = ["kl", "gain", "kl_se", "gain_se"]
    return points.reset_index().sort_values("kl", kind="stable", ignore_index=True)


def first_value(rows: pd.DataFrame, contender: str) -> pd.DataFrame:
    """Return the rows of a variant at its first value.

    For the constant, this is the most common first value and learning rate of the other variants, for comparability.
    """
    of_contender = rows[rows["contender"] == contender]
    if contender != "constant":
        return of_contender[of_contender["value"] == of_contender["value"].min()]
    others = rows[rows["contender"] != "constant"]
    others = others[others["value"] == others.groupby("contender")["value"].transform("min")]
    for name in ("value", "learning_rate"):
        known = set(of_contender[name])
        common = [v for v in others[name].value_counts().index if v in known] or [of_contender[name].min()]
        of_contender = of_contender[of_contender[name] == common[0]]
    return of_contender


def parts_by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the measures of `PARTS` for each variant at its first value: means over seeds with standard errors.

    Args:
        rows: the main runs at one level of noise, with columns <part>/<task> for each of `PARTS`.

    Returns:
        A row per contender (variant), part and task: contender, part, task, mean, se (0 for a single seed).
    """
    found = []
    for contender in rows["contender"].unique():
        first = first_value(rows, contender)
        for part in PARTS:
            for task in EXPECTED_ORDER:
                seeds = first[f"{part}/{task}"]
                row = {"contender": contender, "part": part, "task": task, "mean": seeds.mean()}
                found.append(row | {"se": seeds.sem() if len(seeds) > 1 else 0.0})
    return pd.DataFrame(found)
