"""Report a finished comparison: tables, pictures, and sentences computed from the numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dpoviz.analysis.plots_comparison import (
    GROUPS,
    figure_betas,
    figure_effects,
    figure_frontier,
    figure_parts,
    figure_reliability,
)
from dpoviz.experiments.comparison import (
    BUDGETS,
    differences,
    effects,
    gather,
    gather_betas,
    gather_reliability,
)
from dpoviz.experiments.comparison_config import CompareConfig

TABLES = ("compare", "betas", "reliability")
"""The tables of a comparison, each as <name>.csv; everything else is computed from them."""


def write_comparison(config: CompareConfig, out: Path) -> pd.DataFrame:
    """Gather the runs into tables, draw the pictures, and return `effects`; empty if only the constants were run.

    Files written: compare.csv (`gather`), betas.csv (`gather_betas` of seed 0 at the middle noise), reliability.csv,
    differences.csv, effects.csv and a picture of each kind, at the middle noise if it shows a single level.
    """
    middle = sorted(config.noise)[len(config.noise) // 2]
    tables = {
        "compare": gather(config, out),
        "betas": gather_betas(config, out, noise=middle, seed=0),
        "reliability": gather_reliability(config, out),
    }
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.5g")
    found = differences(tables["compare"])
    found.to_csv(out / "differences.csv", index=False, float_format="%.5g")
    names = [name for name in ("constant", *(n for own in GROUPS.values() for n in own)) if name in config.contenders]
    figures = {
        "frontier": figure_frontier(tables["compare"], noise=middle),
        "parts": figure_parts(tables["compare"], noise=middle),
        "reliability": figure_reliability(tables["reliability"], names[:6], noise=middle),
    }
    if len(tables["betas"]):
        figures["betas"] = figure_betas(tables["betas"])
    if found["contender"].nunique() > 1:
        measured = effects(found)
        measured.to_csv(out / "effects.csv", index=False, float_format="%.5g")
        figures["effects"] = figure_effects(measured)
    else:
        measured = pd.DataFrame()
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=130)
    return measured


def effects_as_text(measured: pd.DataFrame) -> str:
    """Return `effects` of the mean over tasks and over noise as text, the largest first."""
    if measured.empty:
        return "nothing to compare the constants with"
    rows = measured[measured["noise"].isna() & (measured["task"] == "all")].sort_values("mean", ascending=False)
    return pd.DataFrame(
        {
            "contender": rows["contender"],
            "difference, 95 %": [f"{r.mean:+.4f} [{r.low:+.4f}, {r.high:+.4f}]" for r in rows.itertuples(index=False)],
            "p": rows["p"].map("{:.3f}".format),
            "p (Holm)": rows["holm"].map("{:.3f}".format),
            "detectable": rows["detectable"].map("{:.4f}".format),
        }
    ).to_string(index=False)


def best_as_text(found: pd.DataFrame, *, task: str = "all") -> str:
    """Return the best reward within each KL budget of `differences` as text: mean over noise, ± standard error."""
    own = found[found["task"] == task].groupby(["contender", "seed"], sort=False).mean(numeric_only=True)
    groups = own.groupby("contender", sort=False)
    table = pd.DataFrame(
        {
            f"KL ≤ {budget:g}": [
                f"{mean:.3f} ± {error:.3f}"
                for mean, error in zip(
                    groups[f"best/{budget:g}"].mean(), groups[f"best/{budget:g}"].sem().fillna(0), strict=True
                )
            ]
            for budget in BUDGETS
        },
        index=list(groups.groups),
    )
    return table.to_string()


def reading_of_effects(measured: pd.DataFrame) -> list[str]:
    """Return sentences on which variants differ from the constants, and which differences were detectable."""
    if measured.empty:
        return []
    rows = measured[measured["noise"].isna() & (measured["task"] == "all")]
    lines = []
    for sign, word in ((1, "above"), (-1, "below")):
        some = rows[(rows["holm"] < 0.05) & (rows["mean"] * sign > 0)].sort_values("mean", ascending=sign < 0)
        if len(some):
            named = ", ".join(f"{r.contender} ({r.mean:+.4f})" for r in some.itertuples(index=False))
            lines.append(f"Beyond noise {word} the constants (Holm's p below 5 %): {named}.")
        else:
            lines.append(f"Beyond noise {word} the constants (Holm's p below 5 %): none.")
    middle = rows["detectable"].median()
    lines.append(f"Half of the contenders were tested finely enough to find a difference of {middle:.4f}.")
    return lines
