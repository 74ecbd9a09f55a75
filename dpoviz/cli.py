"""The command line: `dpoviz demo`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from dpoviz.demo import FORMS, Demo, DemoConfig, own_progress_only, run_demo
from dpoviz.plots import figure_beta_by_task, figure_beta_gradients, figure_training
from dpoviz.reference import default_cache_dir
from dpoviz.report import reading, write_report
from dpoviz.table import summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `dpoviz`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dpoviz", description=__import__("dpoviz").__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train the small world in both forms and draw beta(x) by task, against the reference's entropy",
        description="Train a tiny reference, DPO with a fixed beta and with beta(x) in both forms, and leave the "
        "numbers, the pictures, the models and a report in a folder. A run that was killed goes on where it "
        "stopped when the same command is given again.",
    )
    demo.add_argument("--out", type=Path, default=Path("dpoviz-demo"), help="the folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    demo.add_argument("--fast", action="store_true", help="a tiny version, for a first look: its numbers say little")
    arguments = parser.parse_args(argv)
    own_progress_only()
    try:
        _demo(arguments.out, arguments.seed, arguments.fast)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"dpoviz: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndpoviz: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _demo(out: Path, seed: int, fast: bool) -> None:
    if seed < 0:
        raise ValueError(f"--seed: came {seed}, expected at least 0")
    config = DemoConfig.default(seed, fast=fast)
    _claim(out, {"command": "demo", **asdict(config)})
    demo = run_demo(config, out=out, cache_dir=default_cache_dir())
    summary = write_demo(demo, config, out)
    print(f"\nbeta(x) on held-out prompts, seed {seed}\n{format_summary(summary)}\n")
    for line in reading(summary):
        print(f"  {line}")
    left_out = ", ".join(f"{len(prompts)} of {task}" for task, prompts in demo.world.left_out.items())
    print(f"  Prompts left out, because all answers sampled there earn the same: {left_out} (left_out.json).")
    print(f"\nthe report: {out / 'report.html'}\nbeside it:  {', '.join(_written(out))}")


def _claim(out: Path, settings: dict) -> None:
    """Write the settings into the folder, or refuse a folder that holds a run with others."""
    settings = json.loads(json.dumps(settings))
    file = out / "config.json"
    if file.exists():
        found = json.loads(file.read_text())
        if {key: found.get(key) for key in settings} != settings:
            raise ValueError(f"--out: {out} holds a run with other settings; give another folder, or delete that one")
    out.mkdir(parents=True, exist_ok=True)
    packages = {name: version(name) for name in ("dpoviz", "torch", "transformers", "datasets", "accelerate")}
    file.write_text(json.dumps({**settings, "python": platform.python_version(), "packages": packages}, indent=2))


def write_demo(demo: Demo, config: DemoConfig, out: Path) -> pd.DataFrame:
    """Leave a finished demo in a folder: tables, pictures, models, report.

    Returns:
        The summary of the table, a row per form and task.
    """
    demo.table.to_csv(out / "beta.csv", index=False)
    demo.history.to_csv(out / "history.csv", index=False)
    # prompts to which all sampled answers earn the same carry no preference: said, not silently dropped
    (out / "left_out.json").write_text(json.dumps(dict(demo.world.left_out), indent=1, ensure_ascii=False))
    for form in FORMS:
        demo.policies[form].save_pretrained(out / form / "policy")
        demo.world.tokenizer.save_pretrained(out / form / "policy")
        demo.betas[form].save_pretrained(out / form / "beta")
    summary = summarize(demo.table)
    given = {form: getattr(config, form) for form in FORMS}
    figures = {
        "beta_by_task": figure_beta_by_task(
            demo.table,
            alpha=demo.alpha,
            **{
                name: {form: getattr(settings, name) for form, settings in given.items()}
                for name in ("beta0", "beta_min", "beta_max")
            },
        ),
        "training": figure_training(demo.history),
        "beta_gradients": figure_beta_gradients(demo.history),
    }
    figures["beta_by_task"].savefig(out / "beta_by_task.png", dpi=150)
    write_report(
        out / "report.html",
        table=demo.table,
        history=demo.history,
        summary=summary,
        config=json.loads((out / "config.json").read_text())
        | {"alpha": dict(demo.alpha), "reference rewards": dict(demo.world.rewards)}
        | {"prompts without a pair": {task: len(prompts) for task, prompts in demo.world.left_out.items()}},
        figures=figures,
        reading=reading(summary),
    )
    return summary


def format_summary(summary: pd.DataFrame) -> str:
    """The summary as text, for a terminal."""
    rows = pd.DataFrame(
        {
            "form": summary["form"],
            "task": summary["task"],
            "prompts": summary["n"],
            "beta (median)": summary["beta_median"].map("{:.3g}".format),
            "quartiles": [f"{a:.3g} to {b:.3g}" for a, b in zip(summary["beta_q1"], summary["beta_q3"], strict=True)],
            "s (median)": summary["scale_median"].map("{:.3g}".format),
            "H, nats/token": summary["ref_entropy_mean"].map("{:.3f}".format),
            "rho(beta, H)": [
                f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"
                for rho, low, high in zip(summary["rho"], summary["rho_low"], summary["rho_high"], strict=True)
            ],
        }
    )
    return rows.to_string(index=False)


def _written(out: Path) -> list[str]:
    names = ["beta.csv", "history.csv", "left_out.json", "config.json", "beta_by_task.png"]
    return names + [f"{form}/{what}/" for form in FORMS for what in ("policy", "beta")]
