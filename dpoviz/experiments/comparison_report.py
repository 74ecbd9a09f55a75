"""Report a finished comparison: tables, pictures, and sentences computed from the numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dpoviz.analysis.plots_comparison import figure_contrasts, figure_kl_by_task, figure_levels
from dpoviz.experiments.comparison import IDEAL, contrasts, finished_worlds, gather
from dpoviz.experiments.comparison_config import CONDITIONS, CONSTANT, MAIN_CONDITIONS, ORACLE, TURN, CompareConfig


def write_comparison(config: CompareConfig, out: Path) -> pd.DataFrame:
    """Gather the runs into tables, draw the pictures, and return `contrasts` of the worlds that are finished.

    Files written: tuning.csv and compare.csv (`gather`, the tuning phase and the main phase), contrasts.csv, and
    contrasts.png, levels.png and kl_by_task.png; contrasts_by_training.png has the conditions besides
    `MAIN_CONDITIONS`.

    Raises:
        ValueError: fewer than three worlds are finished.
    """
    table = gather(config, out)
    worlds = finished_worlds(config, table)
    if len(worlds) < 3:
        raise ValueError(f"{out}: {len(worlds)} worlds are finished, expected at least 3; run the missing jobs first")
    main = table[(table["phase"] == "main") & table["world"].isin(worlds)]
    tuning = table[(table["phase"] != "main") & (table["task"] == "all")]
    main.drop(columns="phase").to_csv(out / "compare.csv", index=False, float_format="%.5g")
    tuning.drop(columns="task").to_csv(out / "tuning.csv", index=False, float_format="%.5g")
    found = contrasts(main)
    found.to_csv(out / "contrasts.csv", index=False, float_format="%.5g")
    # the further conditions have figures of their own
    further = main["condition"].isin(set(CONDITIONS) - set(MAIN_CONDITIONS))
    tasks_differ = main[~further] if not further.all() else main
    shown = found["condition"].isin(tasks_differ["condition"])
    figures = {
        "contrasts": figure_contrasts(found[shown]),
        "levels": figure_levels(tasks_differ),
        "kl_by_task": figure_kl_by_task(tasks_differ, budget=main["budget"].median()),
    }
    if not shown.all():
        figures["contrasts_by_training"] = figure_contrasts(found[~shown])
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=130)
    return found


def contrasts_as_text(found: pd.DataFrame, condition: str) -> str:
    """Return `contrasts` of one condition as text: reward above the constant, and share of the oracle's gain."""
    rows = found[found["condition"] == condition]
    cells = pd.DataFrame(
        {
            "contender": rows["contender"],
            "KL": rows["budget"],
            "text": [
                f"{r.mean:+.4f} [{r.low:+.4f}, {r.high:+.4f}] {100 * r.share:4.0f} %{'*' if r.holm < 0.05 else ' '}"
                for r in rows.itertuples(index=False)
            ],
        }
    )
    wide = cells.pivot(index="contender", columns="KL", values="text").reindex(list(dict.fromkeys(rows["contender"])))
    return wide.rename(columns=lambda budget: f"KL {budget:g}").rename_axis(index=None, columns=None).to_string()


def reading_of_contrasts(found: pd.DataFrame) -> list[str]:
    """Return sentences: what the oracle gains, which contenders differ from the constant, and what was detectable."""
    lines = []
    for condition, rows in found.groupby("condition", sort=False):
        oracle, ideal = (rows[rows["contender"] == name].set_index("budget") for name in (ORACLE, IDEAL))
        shown = ", ".join(f"{mean:+.4f} at {budget:g} nats" for budget, mean in oracle["mean"].items())
        most = ", ".join(f"{mean:+.3f}" for mean in ideal["mean"])
        lines.append(f"{condition}: the best factor per task earns {shown} above the {CONSTANT}; any policy, {most}.")
    tested = found[found["holm"].notna()]
    compared = tested[tested["contender"] != TURN]
    for sign, word in ((1, "above"), (-1, "below")):
        some = compared[(compared["holm"] < 0.05) & (compared["mean"] * sign > 0)]
        parts = []
        for contender, own in some.groupby("contender", sort=False):
            where = own.groupby("condition", sort=False)["budget"].agg(lambda x: ", ".join(f"{kl:g}" for kl in x))
            parts.append(f"{contender} ({'; '.join(f'{name} at {kl}' for name, kl in where.items())} nats)")
        lines.append(
            f"Beyond noise {word} the constant (Holm's p below 5 %, {len(some)} of {len(tested)} contrasts): "
            f"{', '.join(parts) or 'none'}."
        )
    middle = tested["detectable"].median()
    lines.append(
        f"Half of the contrasts, uncorrected, would find a difference of {middle:.4f} in reward four times in five."
    )
    return lines
