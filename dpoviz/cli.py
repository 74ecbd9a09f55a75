"""The command line: parse, call, print. Importing this module does not load torch."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tyro import MISSING
from tyro.conf import Positional, arg

from dpoviz.experiments.comparison_config import CompareConfig
from dpoviz.experiments.config import BenchConfig, DemoConfig, RealConfig, SampleConfig
from dpoviz.experiments.options import parse, read_settings
from dpoviz.experiments.retilt_config import RetiltConfig
from dpoviz.experiments.study_config import StudyConfig
from dpoviz.translation import in_language, key, say, translate

if TYPE_CHECKING:
    import pandas as pd

    from dpoviz.analysis.diagnose import Finding
    from dpoviz.experiments.pipeline import Results
    from dpoviz.experiments.real import Loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `dpoviz`; return the exit status."""
    # set before torch is imported: threads that spin while waiting slow down a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"dpoviz {version('dpoviz')}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"dpoviz: got the command {name!r}, expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(name, command, arguments)
    except (ValueError, OSError, ImportError, FloatingPointError, RecursionError) as error:
        print(f"dpoviz: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # after --help, or a usage error that the parser has printed
        return int(end.code or 0)
    except KeyboardInterrupt as stop:
        again = "; the same command resumes the run" if command.resumes else ""
        print(f"\ndpoviz: stopped{again}", file=sys.stderr)
        return stop.args[0] if stop.args else 130


def _stop(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


def _overview() -> str:
    lines = [f"  {name:<10} {command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpoviz COMMAND [OPTIONS]",
            "",
            "Direct Preference Optimization with an input-dependent β: derived, trained and drawn.",
            "",
            *lines,
            "",
            "dpoviz COMMAND --help shows the options of a command; dpoviz --version, the version.",
        ]
    )


def _run(name: str, command: Command, arguments: list[str]) -> int:
    options = _parse(name, command, arguments)
    from dpoviz.lm.processes import processes, quiet_libraries

    quiet_libraries()
    state = processes()
    if state.num_processes > 1 and name not in ("train", "reference"):
        raise ValueError(f"processes: got {state.num_processes}, expected one: only train and reference share work")
    with nullcontext() if state.is_main_process else redirect_stdout(StringIO()):
        command.run(options)
    return 0


def _parse(name: str, command: Command, arguments: list[str]) -> object:
    """Return the settings of the --config file, if any, overridden by the options."""
    prog = f"dpoviz {name}"
    settings: Any = command.settings("--fast" in arguments)
    if settings is None:
        return parse(command.options, arguments, prog=prog, description=command.line)
    file = _value(arguments, "--config")
    if file is not None:
        found = read_settings(Path(file), settings, name)
        if getattr(found, "fast", False) and not getattr(settings, "fast", False):
            settings = command.settings(True)
            found = read_settings(Path(file), settings, name)
        settings = _one_seed(found, settings)
    default = command.options(settings=settings)
    if "--fast" in arguments or getattr(settings, "fast", None) is True:
        default = replace(default, out=Path(f"{default.out}-fast"))
    found = parse(
        command.options,
        arguments,
        default=default,
        prog=prog,
        description=(type(settings).__doc__ or "").split("Attributes:")[0],
    )
    return replace(found, settings=_one_seed(found.settings, settings))


def _value(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of an option that must be known before the others are parsed; None if it is not given."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return None


def _one_seed(found: Any, default: Any) -> Any:
    """Use --seed of the demo for its world too, unless the world is given a seed of its own."""
    if not isinstance(found, DemoConfig):
        return found
    before, seed = default.training.seed, found.training.seed
    if seed != before == default.world.seed == found.world.seed:
        return replace(found, world=replace(found.world, seed=seed))
    return found


@dataclass(frozen=True)
class _Demo:
    settings: Annotated[DemoConfig, arg(name="")]
    out: Path = Path("dpoviz-demo")
    """folder to which the results are written; by default, with --fast, dpoviz-demo-fast."""
    config: Path | None = None
    """YAML or JSON file of settings, such as the config.json of a run; options override it."""
    lang: Literal["en", "zh"] = "en"
    """language of what is printed, of the report and of its figures: English or Chinese."""


@dataclass(frozen=True)
class _Train:
    settings: Annotated[RealConfig, arg(name="")]
    out: Path = Path("dpoviz-run")
    """folder to which the results are written."""
    config: Path | None = None
    """YAML or JSON file of settings, such as the config.json of a run; options override it."""
    lang: Literal["en", "zh"] = "en"
    """language of what is printed, of the report and of its figures: English or Chinese."""


@dataclass(frozen=True)
class _Reference(_Train):
    out: Path = Path("dpoviz-reference")
    """folder to which the results are written."""


@dataclass(frozen=True)
class _Report:
    folder: Positional[Path]
    """folder of a finished run, its --out; or the output folder of BetaDPOTrainer or another trainer."""
    lang: Literal["en", "zh"] = "en"
    """language of what is printed, of the report and of its figures: English or Chinese."""


@dataclass(frozen=True)
class _Retilt:
    settings: Annotated[RetiltConfig, arg(name="")]
    folder: Positional[Path] = MISSING
    """folder of a finished run of demo or train, its --out; the tables are written into it."""
    config: Path | None = None
    """YAML or JSON file of settings, such as an earlier retilt.json; options override it."""


@dataclass(frozen=True)
class _Compare:
    settings: Annotated[CompareConfig, arg(name="")]
    out: Path = Path("dpoviz-compare")
    """folder to which the results are written; by default, with --fast, dpoviz-compare-fast."""
    config: Path | None = None
    """YAML or JSON file of settings, such as the config.json of a comparison; options override it."""
    fast: bool = False
    """run a tiny version for a first look; its numbers mean nothing."""
    workers: int | None = None
    """number of processes; None: one per core."""
    only: str | None = None
    """run only this row of the table of jobs, such as 7, or these, such as 7-12."""


@dataclass(frozen=True)
class _Study:
    settings: Annotated[StudyConfig, arg(name="")]
    out: Path = Path("dpoviz-study")
    """folder to which the results are written."""
    config: Path | None = None
    """YAML or JSON file of settings, such as the config.json of a study; options override it."""
    workers: int | None = None
    """number of processes; None: one per core, and on a GPU one."""
    most: int | None = None
    """train at most so many policies now; the same command goes on later."""


@dataclass(frozen=True)
class _Sample:
    settings: Annotated[SampleConfig, arg(name="")]
    out: Path = Path("pairs.jsonl")
    """file to which the pairs are written."""
    config: Path | None = None
    """YAML or JSON file of settings; options override it."""


@dataclass(frozen=True)
class _Bench:
    settings: Annotated[BenchConfig, arg(name="")]
    out: Path = Path("dpoviz-bench")
    """folder to which the tables are written."""
    config: Path | None = None
    """YAML or JSON file of settings; options override it."""


@dataclass(frozen=True)
class _Notebooks:
    folder: Positional[Path] = Path("dpoviz-notebooks")
    """folder to which the notebooks are copied."""


def _demo(given: _Demo) -> None:
    from dpoviz.experiments.demo import run_demo
    from dpoviz.experiments.folder import locked_run
    from dpoviz.lm.reference import default_cache_dir
    from dpoviz.lm.workers import cores

    workers = 1 if given.settings.fast else cores()  # a worker starts in the time that the fast version trains
    with in_language(given.lang):
        with locked_run(given.out, "demo", given.settings):
            results = run_demo(given.settings, out=given.out, cache_dir=default_cache_dir(), workers=workers)
        _say_results(given.out, results, given.settings.training.seed)


def _train(given: _Train) -> None:
    from dpoviz.experiments.folder import locked_run
    from dpoviz.experiments.real import load, run_real, score
    from dpoviz.lm.processes import processes
    from dpoviz.lm.reference import default_cache_dir

    config = given.settings
    config.require_data()
    with in_language(given.lang):
        with locked_run(given.out, "train", config):
            loaded = load(config)
            _say_loaded(config, loaded)
            _say_memory(config, loaded)
            _say_time(config, loaded, variants=len(config.forms) + 1)
            scored = score(config, loaded, cache_dir=default_cache_dir())
            results = run_real(config, scored, out=given.out)
        if processes().is_main_process:
            _say_results(given.out, results, config.training.seed)


def _reference(given: _Reference) -> None:
    from dpoviz.experiments.folder import locked_run
    from dpoviz.experiments.real import load, score, write_entropy
    from dpoviz.lm.processes import processes
    from dpoviz.lm.reference import default_cache_dir

    given.settings.require_data()
    with in_language(given.lang):
        with locked_run(given.out, "reference", given.settings):
            loaded = load(given.settings, training=False)
            _say_loaded(given.settings, loaded)
            _say_time(given.settings, loaded, variants=0)
            scored = score(given.settings, loaded, cache_dir=default_cache_dir())
            if processes().is_main_process:
                write_entropy(given.out, scored)
        _say_entropy(scored.entropy)
        print(say("\nthe picture: {path}", path=given.out / "entropy.png"))
        print(say("beside it: {names}", names="entropy.csv, config.json"))


def _report(given: _Report) -> None:
    from dpoviz.experiments.folder import report
    from dpoviz.learn.trl_run import TrlRun, find_log

    folder = given.folder
    log = None if (folder / "run.json").is_file() else find_log(folder)  # without: of dpoviz, finished or not
    with in_language(given.lang):
        if log is None:
            found = report(folder)
        else:
            run = TrlRun(folder, log)
            found, folder = run.report(), run.tables_folder
        _say_findings(found.findings)
        _say_where(folder)


def _notebooks(given: _Notebooks) -> None:
    from dpoviz.learn.course import copy_course

    names = copy_course(given.folder)
    print(f"{sum(name.endswith('.ipynb') for name in names)} notebooks in {given.folder}; 中文 notebook 在 zh/")
    print(f"open them: jupyter lab {given.folder}\nbegin with: 01_from_constraint_to_loss.ipynb")


def _retilt(given: _Retilt) -> None:
    from dpoviz.analysis.text import allocation_as_text, slopes_as_text
    from dpoviz.experiments.folder import report
    from dpoviz.experiments.retilt import named_reward, open_run, require_run, settings, sweep
    from dpoviz.experiments.retilt_report import analyse, write_retilt
    from dpoviz.lm.cache import lock_folder
    from dpoviz.lm.reference import default_cache_dir

    config = given.settings
    variants = require_run(given.folder, config)
    if config.reward is not None:
        named_reward(config.reward)  # raises before anything is loaded
    with lock_folder(given.folder, "folder"):
        run = open_run(given.folder, cache_dir=default_cache_dir(), max_new_tokens=config.max_new_tokens)
        rows = sweep(run, variants, config)
        scored = config.reward is not None or run.verifier is not None
        found = analyse(rows, run.scores, config, scored=scored)
        write_retilt(given.folder, rows, found, settings(config))
        report(given.folder)
    print(f"\n{slopes_as_text(found.slopes)}\n\n{allocation_as_text(found.allocation)}\n")
    for line in found.sentences:
        print(f"  {line}")
    print(f"\nthe picture: {given.folder / 'retilt.png'}\nbeside it:   retilt.csv, retilt_*.csv, retilt.json")
    _say_where(given.folder)


def _compare(given: _Compare) -> None:
    from dpoviz.experiments.comparison_report import contrasts_as_text, reading_of_contrasts, write_comparison
    from dpoviz.experiments.comparison_runs import compare
    from dpoviz.experiments.folder import locked_run
    from dpoviz.lm.reference import default_cache_dir

    config = given.settings
    with locked_run(given.out, "compare", config, shared=True):
        compare(config, given.out, cache_dir=default_cache_dir(), only=given.only, workers=given.workers)
    if given.only is not None:
        print(f"rows {given.only} are done; run without --only to gather all rows")
        return
    found = write_comparison(config, given.out)
    for condition in config.conditions:
        print(f"\n{condition}: reward above the constant at the same KL [95 %], share of the oracle's gain")
        print(contrasts_as_text(found, condition))
    print()
    for line in reading_of_contrasts(found):
        print(f"  {line}")
    beside = sorted(path.name + "/" * path.is_dir() for path in given.out.iterdir())
    print(f"\nin {given.out}: {', '.join(beside)}")


def _study(given: _Study) -> None:
    from dpoviz.experiments.folder import locked_run
    from dpoviz.experiments.study_config import jobs
    from dpoviz.experiments.study_report import write_study
    from dpoviz.experiments.study_runs import study
    from dpoviz.lm.reference import default_cache_dir

    config = given.settings
    config.real().require_data()
    with locked_run(given.out, "study", config):
        done = sum((given.out / "runs" / f"{job.name}.json").is_file() for job in jobs(config))
        print(f"{len(jobs(config)) - done} of {len(jobs(config))} trainings to do", flush=True)
        left = study(config, given.out, cache_dir=default_cache_dir(), workers=given.workers, most=given.most)
    if left:
        print(f"{left} of {len(jobs(config))} trainings are left; the same command goes on")
        return
    print("\n".join(write_study(config, given.out)))
    print(f"\nthe picture: {given.out / 'study.png'}")
    print("beside it:   slopes.csv, gains.csv, betas.csv, accuracy.csv, study.txt")


def _sample(given: _Sample) -> None:
    from dpoviz.experiments.generate import require_writable, sample_pairs, write_pairs
    from dpoviz.lm.models import load_lm
    from dpoviz.lm.reference import default_cache_dir

    config = given.settings
    require_writable(given.out)
    model, tokenizer = load_lm(config.model)
    records, made = sample_pairs(
        model,
        tokenizer,
        tasks=config.tasks,
        prompts_per_task=config.prompts,
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch,
        seed=config.seed,
        keep=default_cache_dir(),
        unsafe=config.unsafe,
    )
    write_pairs(records, given.out)
    print(f"\n{made.to_string(index=False)}\n\n{len(records)} pairs: {given.out}")


def _bench(given: _Bench) -> None:
    from dpoviz.experiments.bench import run_bench
    from dpoviz.lm.reference import default_cache_dir

    for name, table in run_bench(given.settings, given.out, cache_dir=default_cache_dir()):
        print(f"\n{name}\n{table.round(3).to_string(index=False)}", flush=True)
    print(f"\nas tables: {given.out}")


def _say_loaded(config: RealConfig, loaded: Loaded) -> None:
    tasks = Counter([*loaded.train["task"], *loaded.held_out["task"]])
    counts = say(", ").join(say("{n} of {task}", n=n, task=task) for task, n in sorted(tasks.items()))
    print(
        say(
            "{model}: {size:,} parameters; {train} pairs to train on, {held_out} held out ({counts})",
            model=config.model, size=loaded.model.num_parameters(), train=len(loaded.train),
            held_out=len(loaded.held_out), counts=counts,
        )
    )  # fmt: skip


def _say_time(config: RealConfig, loaded: Loaded, *, variants: int) -> None:
    from dpoviz.experiments.time_estimate import estimate_seconds

    parts = estimate_seconds(config, loaded, variants=variants)
    shown = say(", ").join(f"{translate(name)} {_minutes(seconds)}" for name, seconds in parts.items())
    total = _minutes(sum(parts.values()))
    print(say("about {total} if nothing is cached from an earlier run: {shown}", total=total, shown=shown), flush=True)


def _say_memory(config: RealConfig, loaded: Loaded) -> None:
    from dpoviz.experiments.memory_estimate import require_memory

    needed = require_memory(config, loaded)
    print(say("about {size:.2g} GB of memory for a training step", size=needed.total / 1e9), flush=True)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return say("{n:.0f} s", n=seconds)
    return say("{n:.0f} min", n=seconds / 60) if seconds < 5400 else say("{n:.1f} h", n=seconds / 3600)


def _say_entropy(entropy: pd.DataFrame) -> None:
    from dpoviz.analysis.tables import summarize_estimators
    from dpoviz.analysis.text import entropy_as_text

    said = key(
        "entropy of the reference, mean ± standard error over prompts; per_token, teacher_forced: nats per token"
    )
    print(f"\n{say(said)}\n{entropy_as_text(summarize_estimators(entropy[~entropy['example']]))}")


def _say_results(out: Path, results: Results, seed: int) -> None:
    from dpoviz.analysis.text import accuracy_as_text, as_text
    from dpoviz.experiments.folder import report

    found = report(out)
    if results.entropy is not None:
        _say_entropy(results.entropy)
    if "summary" in found.tables:
        title = say("beta(x) on held-out prompts, seed {seed}", seed=seed)
        print(f"\n{title}\n{as_text(found.tables['summary'])}")
    if "accuracy" in found.tables:
        title = say("reward accuracy on held-out pairs, 95 % bootstrap intervals")
        print(f"\n{title}\n{accuracy_as_text(found.tables['accuracy'])}")
    print()
    for line in found.sentences:
        print(f"  {line}")
    _say_findings(found.findings)
    _say_where(out)


def _say_findings(findings: Sequence[Finding] | None) -> None:
    from dpoviz.analysis.text import findings_as_text

    if findings is not None:
        print(f"\n{say('what looks wrong')}\n{findings_as_text(findings)}")


def _say_where(out: Path) -> None:
    print(say("\nthe report, to open in a browser: {path}", path=out / "report.html"))


class Command(NamedTuple):
    """A command.

    Attributes:
        line: one line of help.
        options: the dataclass of its options.
        settings: maps --fast to the default settings; None for a command without settings.
        run: executes it.
        resumes: whether the same command resumes an interrupted run.
    """

    line: str
    options: type
    settings: Callable[[bool], object]
    run: Callable[..., None]
    resumes: bool = True


COMMANDS = {
    "demo": Command(
        "train the small world in both forms and draw β(x) by task, against the reference's entropy",
        _Demo,
        lambda fast: DemoConfig.default(fast=fast),
        _demo,
    ),
    "train": Command("the same with your model and your pairs", _Train, lambda _: RealConfig(), _train),
    "reference": Command(
        "run the reference alone: its entropy by task and estimator", _Reference, lambda _: RealConfig(), _reference
    ),
    "report": Command(
        "redraw the pictures and the report of a finished run", _Report, lambda _: None, _report, resumes=False
    ),
    "notebooks": Command(
        "copy the notebooks, in English and Chinese, into a folder",
        _Notebooks,
        lambda _: None,
        _notebooks,
        resumes=False,
    ),
    "retilt": Command(
        "change β of a finished run without training: reward against KL, reward per nat, the best allocation",
        _Retilt,
        lambda _: RetiltConfig(),
        _retilt,
        resumes=False,
    ),
    "compare": Command(
        "compare every rule for β with one constant, in the small world, where the true reward is known",
        _Compare,
        lambda fast: CompareConfig.fast() if fast else CompareConfig(),
        _compare,
    ),
    "study": Command(
        "train every arm with each fold of your pairs held out in turn: reward per nat, the bound, β against entropy",
        _Study,
        lambda _: StudyConfig(),
        _study,
    ),
    "sample": Command(
        "sample preference pairs from a model, labelled by programs", _Sample, lambda _: SampleConfig(), _sample
    ),
    "bench": Command(
        "time a training step, scoring by the reference, and sampling, each against a peer",
        _Bench,
        lambda _: BenchConfig(),
        _bench,
        resumes=False,
    ),
}
