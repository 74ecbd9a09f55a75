"""The command line: `dpoviz demo`, `train`, `reference`, `report`, `compare`, `sample`, `bench`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dpoviz.bench import bench
from dpoviz.compare import BASELINE, CompareConfig, compare, job_table
from dpoviz.demo import Demo, DemoConfig, WorldConfig, quiet_libraries, run_demo, small_world
from dpoviz.entropy import summarize_estimators
from dpoviz.forecast import forecast
from dpoviz.losses import FORMS
from dpoviz.methods import METHODS
from dpoviz.models import load_lm
from dpoviz.onpolicy import require_writable, sample_pairs, write_pairs
from dpoviz.plots import plot_entropy_estimators
from dpoviz.processes import processes
from dpoviz.real import FIXED, Loaded, Prepared, RealConfig, RealRun, arms, load, run_real, score
from dpoviz.reference import default_cache_dir
from dpoviz.report import reading, reading_of_accuracy
from dpoviz.results import accuracy_as_text, as_text, claim, entropy_as_text, report, require_same_config, write
from dpoviz.results_compare import effects_as_text, reading_of_effects, write_comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `dpoviz`; returns the exit status."""
    arguments = _parser().parse_args(argv)
    quiet_libraries()
    state = processes()
    try:
        if state.num_processes > 1 and arguments.run not in (_train, _reference):
            raise ValueError(f"came {state.num_processes} processes; expected one: only train and reference share work")
        with nullcontext() if state.is_main_process else redirect_stdout(io.StringIO()):
            arguments.run(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"dpoviz: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndpoviz: stopped; the same command goes on from where it was", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpoviz", description=__import__("dpoviz").__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable, line: str, more: str, out: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=line, description=more)
        added.add_argument("--out", type=Path, default=Path(out), help="where to (default: %(default)s)")
        added.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
        added.set_defaults(run=run)
        return added

    demo = command(
        "demo",
        _demo,
        "train the small world in both forms and draw beta(x) by task, against the reference's entropy",
        "Train a tiny reference, DPO with a fixed beta and with beta(x) in both forms, and leave the numbers, the "
        "pictures, the models and a report in a folder. A run that was killed goes on where it stopped when the same "
        "command is given again.",
        "dpoviz-demo",
    )
    demo.add_argument("--fast", action="store_true", help="a tiny version, for a first look: its numbers say little")

    train = command(
        "train",
        _train,
        "the same on your model and your pairs",
        "Pass the reference over the pairs, train DPO with a fixed beta, then with beta(x) in both forms and with the "
        "fixed beta for as many steps, and leave the numbers, the pictures, the adapters and a report in a folder. A "
        "run that was killed goes on where it stopped when the same command is given again.",
        "dpoviz-run",
    )
    reference = command(
        "reference",
        _reference,
        "the reference's pass alone: its entropy by task and estimator",
        "Pass the reference over the pairs and leave the entropy of each prompt, by estimator, as a table and a "
        "picture. What it computes is kept, and `dpoviz train` with the same options need not do it again.",
        "dpoviz-reference",
    )
    for added in (train, reference):
        _model_and_data(added)
    _training(train)

    again = commands.add_parser("report", help="make the pictures and the report of a finished run again")
    again.add_argument("folder", type=Path, help="what --out was")
    again.set_defaults(run=_report)

    versus = commands.add_parser(
        "compare",
        help="every rule for beta against one constant, in the small world, where the true reward is known",
        description="Train the small world's policies with every rule, over seeds and levels of label noise, and "
        "compare reward at equal KL. Each run leaves a file; a comparison that was killed goes on when the same "
        "command is given again, and a cluster can run the rows of jobs.csv one by one.",
    )
    versus.add_argument("--out", type=Path, default=Path("dpoviz-compare"), help="where to (default: %(default)s)")
    versus.add_argument("--fast", action="store_true", help="a tiny version, for a first look: its numbers say nothing")
    versus.add_argument("--contenders", nargs="+", metavar="NAME", help="some of them; the constant always takes part")
    versus.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    versus.add_argument("--only", type=int, metavar="ROW", help="run this row of jobs.csv and no other")
    versus.set_defaults(run=_compare)

    sample = command(
        "sample",
        _sample,
        "sample preference pairs from a model, labelled by programs",
        "Sample answers to HumanEval's problems, to generated word problems and to chat openers, label them by running "
        "the problems' tests, by the number and by the dialogue's reward, and write pairs of a better and a worse "
        "answer. Programs run isolated by bubblewrap. A run that was killed goes on where it stopped when the same "
        "command is given again.",
        "pairs.jsonl",
    )
    sample.add_argument("--model", default="smollm2-135m", help=_MODEL)
    sample.add_argument("--tasks", nargs="+", default=["math", "code", "dialogue"], metavar="TASK")
    sample.add_argument("--prompts", type=int, default=50, help="prompts a task (default: %(default)s)")
    sample.add_argument("--samples", type=int, default=8, help="answers a prompt (default: %(default)s)")
    sample.add_argument("--max-new-tokens", type=int, default=128, help="limit of an answer (default: %(default)s)")
    sample.add_argument("--batch", type=int, default=8, help="prompts at once (default: %(default)s)")
    sample.add_argument(
        "--unsafe", action="store_true", help="run the model's programs even where bubblewrap cannot isolate them"
    )
    timing = command(
        "bench",
        _bench,
        "time a training step, the reference's pass and sampling, a peer and us side by side",
        "Time TRL's DPOTrainer (where it is installed), the plain concatenated step and ours on the same pairs of each "
        "task, in turn; the reference's pass against the bare forward; sampling with entropies against generate; and "
        "how time and memory grow with length, shared prompts, pairs and vocabulary.",
        "dpoviz-bench",
    )
    _model_and_data(timing, without="; without it, the small world of `dpoviz demo`, model and all")
    timing.add_argument("--batch-size", type=int, default=4, metavar="N", help="pairs in a step (default: %(default)s)")
    timing.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    timing.add_argument("--repeats", type=int, default=5, metavar="N", help="timed turns (default: %(default)s)")
    return parser


_MODEL = "a folder, a GGUF file, a hub name, or smollm2-135m (default: %(default)s)"


def _model_and_data(parser: argparse.ArgumentParser, *, without: str = "") -> None:
    default = RealConfig(data=("-",))
    parser.add_argument("--model", default=default.model, help=_MODEL)
    parser.add_argument(
        "--data", nargs="+", required=not without, metavar="SOURCE",
        help="files, folders, a hub name or a preset's name" + without,
    )  # fmt: skip
    parser.add_argument("--preset", help="the layout of a known public set, for a file of it")
    parser.add_argument("--task", help="the task of all pairs, where they name none")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="THEIRS=OURS",
        help="other people's columns, as question=prompt",
    )
    parser.add_argument(
        "--chat", nargs="+", default=[], metavar="TASK", help="tasks whose plain prompts become a user's message"
    )
    _numbers(
        parser,
        default,
        pairs_per_task="the most pairs a task, drawn by the seed (default: all)",
        max_length="limit of prompt and answer, in tokens",
        max_new_tokens="limit of a sampled answer, in tokens",
        entropy_samples="answers a prompt for the entropy",
        eval_batch_size="pairs at once where nothing is trained",
    )
    parser.add_argument("--held-out", type=float, default=default.held_out, help="share (default: %(default)s)")


def _training(parser: argparse.ArgumentParser) -> None:
    default = RealConfig(data=("-",))
    parser.add_argument(
        "--rule", choices=list(METHODS), default=default.rule, help="what gives beta (default: %(default)s)"
    )
    settings = ", ".join(f"{name}: {m.strength}, {m.default:g}" for name, m in METHODS.items() if m.strength)
    parser.add_argument("--strength", type=float, help=f"of the rule ({settings})")
    _numbers(
        parser,
        default,
        lora_rank="rank of the adapters; 0 trains all weights",
        stage1_steps="steps with the fixed beta (default: one pass over the pairs)",
        stage2_steps="steps with beta(x) (default: one pass over the pairs)",
        batch_size="pairs in a step",
    )
    parser.add_argument("--learning-rate", type=float, help="of the policy (default: 1e-4 with adapters, else 1e-6)")
    parser.add_argument(
        "--s0", type=float, default=default.s0, help="what multiplies h at the start (default: %(default)s)"
    )


def _numbers(parser: argparse.ArgumentParser, default: RealConfig, **options: str) -> None:
    for name, line in options.items():
        value = getattr(default, name)
        more = " (default: %(default)s)" if value is not None else ""
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help=line + more)


def _demo(given: argparse.Namespace) -> None:
    if given.seed < 0:
        raise ValueError(f"--seed: came {given.seed}, expected at least 0")
    config, out = DemoConfig.default(given.seed, fast=given.fast), given.out
    claim(out, {"command": "demo", **asdict(config)})
    demo = run_demo(config, out=out, cache_dir=default_cache_dir())
    write_demo(demo, config, out)
    summary = report(out)["summary"]
    print(f"\nbeta(x) on held-out prompts, seed {given.seed}\n{as_text(summary)}\n")
    for line in reading(summary):
        print(f"  {line}")
    left_out = ", ".join(f"{len(prompts)} of {task}" for task, prompts in demo.world.left_out.items())
    print(f"  Prompts left out, because all answers sampled there earn the same: {left_out} (left_out.json).")
    _say_where(out)


def write_demo(demo: Demo, config: DemoConfig, out: Path) -> None:
    """Leave a finished demo in a folder: tables, facts, models."""
    # prompts to which all sampled answers earn the same carry no preference: said, not silently dropped
    (out / "left_out.json").write_text(json.dumps(dict(demo.world.left_out), indent=1, ensure_ascii=False))
    for form in FORMS:
        demo.policies[form].save_pretrained(out / form / "policy")
        demo.world.tokenizer.save_pretrained(out / form / "policy")
        demo.betas[form].save_pretrained(out / form / "beta")
    facts = {name: {form: getattr(getattr(config, form), name) for form in FORMS} for name in _LINES}
    facts |= {"alpha": dict(demo.alpha), "reference rewards": dict(demo.world.rewards)}
    facts |= {"prompts without a pair": {task: len(prompts) for task, prompts in demo.world.left_out.items()}}
    write(out, facts=facts, beta=demo.table, history=demo.history)


_LINES = ("beta0", "beta_min", "beta_max")


def _config(given: argparse.Namespace) -> RealConfig:
    settings = {name: getattr(given, name) for name in RealConfig.__dataclass_fields__ if hasattr(given, name)}
    wrong = [pair for pair in given.columns if pair.count("=") != 1]
    if wrong:
        raise ValueError(f"--columns: came {wrong}, expected pairs such as question=prompt")
    settings["columns"] = dict(pair.split("=") for pair in given.columns)
    return RealConfig(**{**settings, "data": tuple(given.data), "chat": tuple(given.chat)})


def _loaded(config: RealConfig, out: Path, command: str) -> Loaded:
    settings = {"command": command, **asdict(config)}
    require_same_config(out, settings)
    loaded = load(config)
    processes().wait_for_everyone()  # all have seen that the folder is free
    if processes().is_main_process:
        claim(out, settings)
    tasks = Counter([*loaded.train["task"], *loaded.held_out["task"]])
    print(
        f"{config.model}: {loaded.model.num_parameters():,} parameters; {len(loaded.train)} pairs to train on, "
        f"{len(loaded.held_out)} held out ({', '.join(f'{n} of {task}' for task, n in sorted(tasks.items()))})"
    )
    return loaded


def _forecast(config: RealConfig, loaded: Loaded, *, runs: int) -> None:
    settings = config.training("standard", len(loaded.train))
    parts = forecast(
        loaded.model,
        loaded.train,
        loaded.held_out,
        samples=config.entropy_samples,
        max_new_tokens=config.max_new_tokens,
        steps=settings.stage1_steps + runs * settings.stage2_steps if runs else 0,
        batch_size=config.batch_size,
        evaluations=1 + 2 * runs if runs else 0,  # at the end of each stage, and each run's scores
        eos_id=loaded.tokenizer.eos_token_id,
        pad_id=loaded.tokenizer.pad_token_id,
    )
    parts = {name: seconds / processes().num_processes for name, seconds in parts.items() if seconds}
    said = ", ".join(f"{name} {_minutes(seconds)}" for name, seconds in parts.items())
    print(f"about {_minutes(sum(parts.values()))} if nothing is kept from an earlier run: {said}", flush=True)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _reference(given: argparse.Namespace) -> None:
    config = _config(given)
    loaded = _loaded(config, given.out, "reference")
    _forecast(config, loaded, runs=0)
    prepared = score(config, loaded, cache_dir=default_cache_dir())
    if not processes().is_main_process:
        return
    prepared.entropy.to_csv(given.out / "entropy.csv", index=False)
    plot_entropy_estimators(prepared.entropy).figure.savefig(given.out / "entropy.png", dpi=150)
    _say_entropy(prepared)
    print(f"\nthe picture: {given.out / 'entropy.png'}\nbeside it:   entropy.csv, config.json")


def _say_entropy(prepared: Prepared) -> None:
    of_data = prepared.entropy[~prepared.entropy["example"]]
    print("\nentropy of the reference, mean ± standard error over prompts; per_token, teacher_forced: nats per token")
    print(entropy_as_text(summarize_estimators(of_data)))


def _train(given: argparse.Namespace) -> None:
    config, out = _config(given), given.out
    loaded = _loaded(config, out, "train")
    _forecast(config, loaded, runs=len(METHODS[config.rule].forms) + 1)
    prepared = score(config, loaded, cache_dir=default_cache_dir())
    run = run_real(config, prepared, out=out)
    if not processes().is_main_process:
        return
    write_run(run, prepared, config, out)
    found = report(out)
    _say_entropy(prepared)
    if "summary" in found:
        print(f"\nbeta(x) on held-out prompts, seed {config.seed}\n{as_text(found['summary'])}")
    print(f"\nreward accuracy on held-out pairs, 95 % bootstrap intervals\n{accuracy_as_text(found['accuracy'])}\n")
    for line in (reading(found["summary"]) if "summary" in found else []) + reading_of_accuracy(found["accuracy"]):
        print(f"  {line}")
    _say_where(out)


def write_run(run: RealRun, prepared: Prepared, config: RealConfig, out: Path) -> None:
    """Leave a finished run's tables and facts in its folder."""
    settings = {arm.config.form: arm.config for arm in arms(config, prepared).values()}
    facts = {name: {form: getattr(own, name) for form, own in settings.items()} for name in _LINES}
    facts |= {"alpha": dict(run.alpha), "baseline": FIXED}
    write(
        out,
        facts=facts,
        beta=run.table,
        history=run.history,
        entropy=prepared.entropy,
        held_out=run.scores,
        answers=run.answers,
    )


def _report(given: argparse.Namespace) -> None:
    report(given.folder)
    _say_where(given.folder)


def _compare(given: argparse.Namespace) -> None:
    settings = {}
    if given.contenders:
        settings["contenders"] = tuple(dict.fromkeys([BASELINE, *given.contenders]))
    config = CompareConfig.fast(**settings) if given.fast else CompareConfig(**settings)
    if given.workers is not None and given.workers < 1:
        raise ValueError(f"--workers: came {given.workers}, expected at least 1")
    out = given.out
    claim(out, {"command": "compare", **asdict(config)})
    job_table(config).to_csv(out / "jobs.csv")
    compare(config, out, cache_dir=default_cache_dir(), only=given.only, workers=given.workers)
    if given.only is not None:
        print(f"row {given.only} is done; without --only, all rows are gathered")
        return
    found = write_comparison(config, out)
    print(f"\nreward above the constants' at the same KL, mean over noise and tasks, {config.seeds} seeds\n")
    print(f"{effects_as_text(found)}\n")
    for line in reading_of_effects(found):
        print(f"  {line}")
    beside = sorted(path.name + "/" * path.is_dir() for path in out.iterdir())
    print(f"\nin {out}: {', '.join(beside)}")


def _sample(given: argparse.Namespace) -> None:
    require_writable(given.out)
    model, tokenizer = load_lm(given.model)
    records, made = sample_pairs(
        model,
        tokenizer,
        tasks=given.tasks,
        prompts_per_task=given.prompts,
        samples=given.samples,
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch,
        seed=given.seed,
        keep=default_cache_dir(),
        unsafe=given.unsafe,
    )
    write_pairs(records, given.out)
    print(f"\n{made.to_string(index=False)}\n\n{len(records)} pairs: {given.out}")


def _bench(given: argparse.Namespace) -> None:
    if given.repeats < 1 or given.batch_size < 1:
        raise ValueError(f"--repeats, --batch-size: came {given.repeats}, {given.batch_size}, expected at least 1")
    if given.data is None:
        world = small_world(WorldConfig(seed=given.seed), cache_dir=default_cache_dir())
        model, tokenizer, pairs = world.reference, world.tokenizer, world.train
        limit = model.config.max_position_embeddings
    else:
        config = replace(_config(given), lora_rank=0)
        loaded, limit = load(config), given.max_length
        model, tokenizer, pairs = loaded.model, loaded.tokenizer, loaded.train
    model.to(getattr(torch, given.dtype))
    few = [task for task, n in Counter(pairs["task"]).items() if n < given.batch_size]
    if few:
        raise ValueError(f"--batch-size: came {given.batch_size}, but there are fewer pairs to train on of {few}")
    if given.data is not None:
        pairs = score(config, loaded, cache_dir=default_cache_dir()).train
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {"batch_size": given.batch_size, "repeats": given.repeats, "max_length": limit}
    for name, table in bench(model, tokenizer, pairs, **settings):
        table.to_csv(given.out / f"{name.replace(' ', '-')}.csv", index=False)
        print(f"\n{name}\n{table.round(3).to_string(index=False)}", flush=True)
    print(f"\nas tables: {given.out}")


def _say_where(out: Path) -> None:
    beside = sorted(path.name + "/" * path.is_dir() for path in out.iterdir() if path.name != "report.html")
    print(f"\nthe report: {out / 'report.html'}\nbeside it:  {', '.join(beside)}")
