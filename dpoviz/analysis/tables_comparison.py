"""Tables that the figures of the comparison draw: gains over the reference, means over seeds, first values."""

from __future__ import annotations

import pandas as pd

from dpoviz.analysis.tables import EXPECTED_ORDER, POOLED

TASKS = (*EXPECTED_ORDER, POOLED)
"""The tasks of the small world, and their mean."""

TUNING_SEEDS = 1000
"""Seeds from here on belong to worlds for tuning, which no figure shows."""

PARTS = ("h", "s", "margin", "kl")
"""The parts of the margin s·h, and the KL, that `parts_by_seed` summarizes."""


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Return the main runs with columns gain/<task>: the reward minus that of the reference of the same world.

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
    """Return KL and gain of each contender, learning rate and value: means over seeds with their standard errors.

    Args:
        rows: what `gains` returned, of one level of noise.
        task: a task, or "all".

    Returns:
        A row per contender, learning rate and value, KL rising within a contender: contender, learning_rate, value,
        kl, gain, kl_se, gain_se. The standard error of a single seed is 0.
    """
    groups = rows.groupby(["contender", "learning_rate", "value"])[[f"kl/{task}", f"gain/{task}"]]
    points = groups.mean().join(groups.sem().fillna(0.0).add_suffix("_se"))
    points.columns = ["kl", "gain", "kl_se", "gain_se"]
    return points.reset_index().sort_values("kl", kind="stable", ignore_index=True)


def first_value(rows: pd.DataFrame, contender: str) -> pd.DataFrame:
    """Return the rows of a contender at the first of its values.

    The constant is taken at the value and the learning rate that most of the others have there, so that they can be
    compared.
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
    """Return the parts of the margin of each contender at its first value: means over seeds with standard errors.

    Args:
        rows: the main runs of one level of noise, with columns <part>/<task> for each of `PARTS`.

    Returns:
        A row per contender, part and task: contender, part, task, mean, se (0 for a single seed).
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
