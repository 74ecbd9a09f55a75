"""The folder of a run: its settings, its tables, and the report made from them."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from dpoviz.analysis.diagnose import Finding, diagnose
from dpoviz.analysis.gain import gain_of_run, reading_of_retilt
from dpoviz.analysis.plots import (
    figure_beta_by_task,
    figure_beta_gradients,
    figure_beta_steps,
    figure_log_ratios,
    figure_training,
    log_ratio_tasks,
    plot_entropy_estimators,
)
from dpoviz.analysis.plots_retilt import figure_retilt
from dpoviz.analysis.report import reading, reading_of_accuracy, reading_of_log_ratios, tiny_note, write_report
from dpoviz.analysis.style import without_font
from dpoviz.analysis.tables import COLUMNS, read_table, summarize, summarize_accuracy, summarize_estimators, write_table
from dpoviz.lm.cache import lock_folder, read_json
from dpoviz.lm.processes import processes
from dpoviz.translation import FONT_ADVICE, say

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TABLES = ("beta", "history", "entropy", "held_out", "answers", "pulls")
"""The tables a folder may hold, each as <name>.csv."""

_PACKAGES = ("dpoviz", "torch", "transformers", "datasets", "accelerate", "numpy")


def require_same_config(out: Path, settings: Mapping[str, object]) -> None:
    """Raise if a folder holds a run with other settings.

    Raises:
        ValueError: it does; the message names the settings that differ.
    """
    file = out / "config.json"
    if not file.exists():
        return
    there, here = _flat(read_json(file)), _flat(json.loads(json.dumps(settings)))
    other = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
    if other:
        shown = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in other[:5])
        more = f"; and {len(other) - 5} more" if len(other) > 5 else ""
        raise ValueError(
            f"out: {out} holds a run with other settings: {shown}{more}; give another folder, or delete that one"
        )


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def write_config(out: Path, settings: Mapping[str, object]) -> None:
    """Write the settings to config.json, which ``--config`` reads to repeat the run.

    Raises:
        ValueError: as `require_same_config`.
        OSError: the folder cannot be written.
    """
    require_same_config(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


@contextmanager
def locked_run(out: Path, command: str, config: DataclassInstance, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder for a run, and write the run's settings to its config.json.

    Args:
        out: the folder.
        command: the command of dpoviz that runs.
        config: the settings, a dataclass.
        shared: allow several processes to use the folder, such as the jobs of a comparison.

    Raises:
        ValueError: the folder holds a run with other settings, or is locked by another process.
        OSError: it cannot be written.
    """
    settings = {"command": command, **asdict(config)}
    require_same_config(out, settings)
    main, fresh = processes().is_main_process, not (out / "config.json").exists()
    processes().wait_for_everyone()  # until all have checked the folder
    with lock_folder(out) if main and not shared else nullcontext():
        try:
            if main:
                write_config(out, settings)
            yield
        except (ValueError, OSError, ImportError):
            if main and fresh:
                _leave_nothing(out)
            raise


_OWN = {"config.json", ".lock", ".lock-owner"}


def _leave_nothing(out: Path) -> None:
    """Free a folder in which a run was refused before it made anything: other settings may follow."""
    if out.is_dir() and {path.name for path in out.iterdir()} <= _OWN:
        shutil.rmtree(out)


def environment() -> dict[str, object]:
    """Return what a run depends on besides its settings: command line, versions, commit, machine, threads."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "command line": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "git commit": _commit(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout from which dpoviz is imported; None if there is none."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_tables(out: Path, *, metadata: Mapping[str, object], **tables: pd.DataFrame) -> None:
    """Write the tables, named as in `TABLES`, and run.json into the folder.

    Args:
        out: the folder.
        metadata: "beta0", "beta_min", "beta_max" and "alpha", by form, which the figures draw as lines; "baseline", the
            variant that the others are compared with, or None; and whatever else the report should show.
        **tables: the tables; empty ones are not written.
    """
    for name, table in tables.items():
        if name not in TABLES:
            raise ValueError(f"tables: got {name!r}, expected one of {TABLES}")
        if not table.empty:
            write_table(table, out / f"{name}.csv")
    (out / "run.json").write_text(json.dumps(metadata, indent=1, ensure_ascii=False), encoding="utf-8")


class Report(NamedTuple):
    """The contents of a report.

    Attributes:
        tables: "summary" (`summarize`), "accuracy" (`summarize_accuracy`), "slopes" (`gain_of_run`) and "entropy"
            (`summarize_estimators`), as far as the run has them.
        sentences: the results in sentences.
        findings: what looks wrong in the run; None if it has no scores of held-out pairs.
    """

    tables: dict[str, pd.DataFrame]
    sentences: list[str]
    findings: list[Finding] | None


def report(out: Path) -> Report:
    """Draw the pictures and write report.html from the files in the folder.

    Raises:
        ValueError: the folder holds no finished run.
    """
    missing = [name for name in ("history.csv", "run.json", "config.json") if not (out / name).is_file()]
    if missing:
        raise ValueError(f"{out}: holds no finished run, {', '.join(missing)} is missing; run it to its end first")
    files = {name: out / f"{name}.csv" for name in TABLES}
    tables = {name: read_table(path) for name, path in files.items() if path.is_file()}
    metadata, config = read_json(out / "run.json"), read_json(out / "config.json")
    kept = "beta" in tables and (out / "beta_steps.parquet").is_file()
    betas = betas_of_steps(out, tables["beta"]) if kept else None
    findings = _findings(tables, config, metadata)
    return write_page(out, tables, metadata=metadata, config=config, betas=betas, findings=findings)


def write_page(
    out: Path,
    tables: Mapping[str, pd.DataFrame],
    *,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    betas: pd.DataFrame | None,
    findings: list[Finding] | None,
    notes: Sequence[str] = (),
) -> Report:
    """Draw the pictures of a run's tables and write report.html into a folder.

    Args:
        out: the folder.
        tables: some of `TABLES`, history among them.
        metadata: as in run.json.
        config: as in config.json.
        betas: beta at each held-out prompt and logged step (`betas_of_steps`); None if it was not kept.
        findings: what looks wrong in the run; None if it was not looked for.
        notes: sentences for the top of the page.
    """
    figures: dict[str, Any] = {}
    found, sentences = {}, []
    baseline = metadata.get("baseline")
    if "beta" in tables:
        lines = {name: metadata[name] for name in ("alpha", "beta0", "beta_min", "beta_max")}
        figures["beta_by_task"] = figure_beta_by_task(tables["beta"], **lines)
        figures["beta_by_task"].savefig(out / "beta_by_task.png", dpi=150)
        found["summary"] = summarize(tables["beta"])
        sentences += reading(found["summary"])
    if "held_out" in tables and baseline is not None:
        found["accuracy"] = summarize_accuracy(tables["held_out"], baseline=baseline)
        sentences += reading_of_accuracy(found["accuracy"])
    if "held_out" in tables:
        gain = gain_of_run(tables["held_out"], tables.get("beta"), baseline=baseline)
        if gain is not None:
            found["slopes"] = gain.slopes
            sentences += gain.sentences
    if (out / "retilt_allocation.csv").is_file():
        parts = {name: read_table(out / f"retilt_{name}.csv") for name in ("curves", "allocation", "slopes")}
        figures["retilt"] = figure_retilt(**parts)
        sentences += reading_of_retilt(parts["slopes"], parts["allocation"])
    if "entropy" in tables:
        figures["entropy_estimators"] = plot_entropy_estimators(tables["entropy"]).figure
        figures["entropy_estimators"].savefig(out / "entropy.png", dpi=150)
        found["entropy"] = summarize_estimators(tables["entropy"][~tables["entropy"]["example"]])
    # the baseline is for the accuracy table only; drawn, it would overlay the run of the same form
    shown = tables["history"][tables["history"]["variant"] != baseline]
    if len(shown):
        figures["training"] = figure_training(shown)
        if any(column.startswith("grad/") for column in shown):
            figures["beta_gradients"] = figure_beta_gradients(shown)
        if log_ratio_tasks(shown):
            figures["log_ratios"] = figure_log_ratios(shown)
    if betas is not None:
        figures["beta_steps"] = figure_beta_steps(betas, beta0=metadata["beta0"])
    write_report(
        out / "report.html",
        table=tables.get("beta"),
        history=tables["history"],
        summary=found.get("summary"),
        config={**config} | {name: value for name, value in metadata.items() if name not in ("baseline", "training")},
        figures=figures,
        reading=sentences,
        findings=findings,
        accuracy=found.get("accuracy"),
        entropy=found.get("entropy"),
        slopes=found.get("slopes"),
        answers=_with_beta(tables.get("answers"), tables.get("beta")),
        log_ratios=reading_of_log_ratios(shown, log_ratio_tasks(shown)),
        notes=[
            *([] if config.get("fast") else tiny_note(tables.get("beta"), tables["history"])),
            *notes,
            *_font_note(tables),
        ],
    )
    return Report(found, sentences, findings)


def _findings(
    tables: Mapping[str, pd.DataFrame], config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[Finding] | None:
    """Return what looks wrong in the run of a folder; None if it holds no scores of held-out pairs."""
    if "held_out" not in tables:
        return None
    return diagnose(
        table=tables.get("beta", pd.DataFrame(columns=list(COLUMNS))),
        history=tables["history"],
        scores=tables["held_out"],
        config=config,
        metadata=metadata,
        entropies=tables.get("entropy"),
    )


def betas_of_steps(out: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return beta_steps.parquet with the prompts of beta.csv: form, step, task, prompt, ref_entropy, beta."""
    kept = pd.read_parquet(out / "beta_steps.parquet").rename(columns={"prompt": "row"})
    known = table[["form", "task", "prompt", "ref_entropy"]].assign(row=table.groupby("form").cumcount())
    found = kept.merge(known, on=["form", "row"]).sort_values(["form", "step", "row"], kind="stable", ignore_index=True)
    return found[["form", "step", "task", "prompt", "ref_entropy", "beta"]].astype({"beta": float})


def _font_note(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return a sentence on the characters that the figures cannot draw; none if they can draw all."""
    texts = {task for table in tables.values() if "task" in table for task in table["task"]}
    if "entropy" in tables:
        texts |= set(tables["entropy"][tables["entropy"]["example"]]["prompt"])
    lost = without_font(texts)
    if not lost:
        return []
    return [
        say(
            "No installed font has {lost}: the figures show boxes there. To draw them, {advice}; then redraw.",
            lost=lost,
            advice=FONT_ADVICE,
        )
    ]


def _with_beta(answers: pd.DataFrame | None, table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Add beta to the answers of each variant that has one, NaN elsewhere."""
    if answers is None:
        return None
    if table is None:
        return answers.assign(beta=float("nan"))
    beta = table[["form", "task", "prompt", "beta"]].rename(columns={"form": "variant"})
    return answers.merge(beta, how="left", on=["variant", "task", "prompt"])
