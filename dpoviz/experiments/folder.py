"""What a run leaves in its folder, and the report made out of it: a report can always be made again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from dpoviz.analysis.plots import figure_beta_by_task, figure_beta_gradients, figure_training, plot_entropy_estimators
from dpoviz.analysis.report import reading, reading_of_accuracy, write_report
from dpoviz.analysis.tables import summarize, summarize_accuracy, summarize_estimators

TABLES = ("beta", "history", "entropy", "held_out", "answers")
"""The tables a folder may hold, each as <name>.csv."""


def require_same_config(out: Path, settings: Mapping[str, object]) -> None:
    """Refuse a folder that holds a run with other settings.

    Raises:
        ValueError: it does.
    """
    settings = json.loads(json.dumps(settings))
    file = out / "config.json"
    if file.exists():
        found = json.loads(file.read_text())
        if {key: found.get(key) for key in settings} != settings:
            raise ValueError(f"--out: {out} holds a run with other settings; give another folder, or delete that one")


def claim(out: Path, settings: Mapping[str, object]) -> None:
    """Write the settings into the folder, or refuse as `require_same_config`."""
    require_same_config(out, settings)
    file = out / "config.json"
    out.mkdir(parents=True, exist_ok=True)
    packages = {name: version(name) for name in ("dpoviz", "torch", "transformers", "datasets", "accelerate")}
    file.write_text(json.dumps({**settings, "python": platform.python_version(), "packages": packages}, indent=2))


def write(out: Path, *, facts: Mapping[str, object], **tables: pd.DataFrame) -> None:
    """Leave tables, by a name of `TABLES`, and facts in the folder.

    Args:
        out: the folder.
        facts: by form under "beta0", "beta_min", "beta_max" and "alpha", what the figures draw as lines; under
            "baseline" the arm that the others are compared with, if any; and whatever else the report is to show.
        **tables: the tables; an empty one is not written.
    """
    for name, table in tables.items():
        if name not in TABLES:
            raise ValueError(f"tables: got {name!r}, expected one of {TABLES}")
        if not table.empty:
            table.to_csv(out / f"{name}.csv", index=False)
    (out / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def report(out: Path) -> dict[str, pd.DataFrame]:
    """Draw the pictures and write report.html, out of the files in the folder.

    Returns:
        What the report's tables show: "summary" (`summarize`), "accuracy" (`summarize_accuracy`) and "entropy"
        (`summarize_estimators`), those that there are.

    Raises:
        ValueError: the folder holds no finished run.
    """
    needed = ("history.csv", "facts.json", "config.json")
    missing = [name for name in needed if not (out / name).is_file()]
    if missing:
        raise ValueError(f"{out}: holds no finished run, {', '.join(missing)} is missing; run it to its end first")
    files = {name: out / f"{name}.csv" for name in TABLES}
    # an answer may be empty, or the word "None"
    text = {"answers": {"keep_default_na": False}}
    tables = {name: pd.read_csv(path, **text.get(name, {})) for name, path in files.items() if path.is_file()}
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    figures, found, sentences = {}, {}, []
    history = tables["history"]
    # the fixed beta is there for its numbers; drawn, it would run through the pictures of its form
    shown = history[history["arm"] != facts.get("baseline")] if "arm" in history else history
    if "beta" in tables:
        lines = {name: facts[name] for name in ("alpha", "beta0", "beta_min", "beta_max")}
        figures["beta_by_task"] = figure_beta_by_task(tables["beta"], **lines)
        figures["beta_by_task"].savefig(out / "beta_by_task.png", dpi=150)
        found["summary"] = summarize(tables["beta"])
        sentences += reading(found["summary"])
    if "held_out" in tables:
        scores = tables["held_out"]
        scores["group"] = scores["group"].astype(object).where(scores["group"].notna(), None)
        found["accuracy"] = summarize_accuracy(scores, baseline=facts["baseline"])
        sentences += reading_of_accuracy(found["accuracy"])
    if "entropy" in tables:
        figures["entropy_estimators"] = plot_entropy_estimators(tables["entropy"]).figure
        figures["entropy_estimators"].savefig(out / "entropy.png", dpi=150)
        of_data = tables["entropy"][~tables["entropy"]["example"]]
        found["entropy"] = summarize_estimators(of_data)
    if len(shown):
        figures["training"] = figure_training(shown)
        if any(column.startswith("grad/") for column in shown):
            figures["beta_gradients"] = figure_beta_gradients(shown)
    answers = tables.get("answers")
    if answers is not None and "beta" in tables:
        beta = tables["beta"][["form", "task", "prompt", "beta"]].rename(columns={"form": "arm"})
        answers = answers.merge(beta, how="left", on=["arm", "task", "prompt"])
    elif answers is not None:
        answers = answers.assign(beta=float("nan"))
    config = json.loads((out / "config.json").read_text())
    write_report(
        out / "report.html",
        table=tables.get("beta"),
        history=history,
        summary=found.get("summary"),
        config=config | {name: value for name, value in facts.items() if name != "baseline"},
        figures=figures,
        reading=sentences,
        accuracy=found.get("accuracy"),
        entropy=found.get("entropy"),
        answers=answers,
    )
    return found
