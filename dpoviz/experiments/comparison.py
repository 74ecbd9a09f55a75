"""Does beta(x) help? Every rule against one well-chosen constant, in the small world, where the true reward is known.

The experiment is a table of independent jobs. A *tuning* job tries one learning rate; a *main* job is one run at its
method's best rate; a *reference* job measures the reference itself. Each leaves one file, and what is there is not run
again; `gather` makes a table of the files.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.analysis.evaluate import MEASURES, calibration, evaluate_policy, reliability, summarize_evaluation
from dpoviz.analysis.statistics import Curve, effect, holm
from dpoviz.beta import ConstantBeta
from dpoviz.data import tasks
from dpoviz.data.records import split_by_group
from dpoviz.experiments.small import World, WorldConfig, own_progress_only, small_world
from dpoviz.losses import Form, scale
from dpoviz.rules import FromPrompt, Lookup, Random, Rule, Seen, Weighed
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import train
from dpoviz.training.methods import METHODS
from dpoviz.training.stages import log_ratio_differences


class Contender(NamedTuple):
    """A method as it takes part.

    Attributes:
        method: a name of `METHODS`; of a control, the one whose beta(x) it takes.
        form: the form of its loss.
        swept: what its points differ in: the scale s0 that multiplies h at the start, or the method's strength.
        strength: of the method; None is its default.
        calibrated: beta learns from pairs that the policy is not trained on.
        control: "" for none; else what is made of the trained beta(x) of `method`, which is then held fixed:
            "frozen" as it is, "shuffled" over all prompts, "shuffled within tasks", "random" (a draw of the same mean
            and spread).
    """

    method: str
    form: Form
    swept: Literal["scale", "strength"] = "scale"
    strength: float | None = None
    calibrated: bool = False
    control: str = ""

    @property
    def rates_of(self) -> str:
        """The contender whose learning rate it takes: a control that of its method."""
        return f"{self.method} {self.form}" if self.control else ""


CONTENDERS: dict[str, Contender] = {
    "constant": Contender("constant", "standard"),
    **{f"{name} {form}": Contender(name, form) for name in ("network", "task", "entropy")
       for form in ("inverse", "standard")},
    **{f"calibrated {form}": Contender("network", form, calibrated=True) for form in ("inverse", "standard")},
    "beta-dpo": Contender("beta-dpo", "standard"),
    "epsilon-dpo": Contender("epsilon-dpo", "standard"),
    "mallows": Contender("mallows", "standard"),
    "mallows reversed": Contender("mallows", "standard", strength=-1.0),
    "lsc": Contender("lsc-at-once", "standard", "strength"),
    "dual-kl": Contender("dual-kl", "standard", "strength"),
    "dual-kl-task": Contender("dual-kl-task", "standard", "strength"),
    **{f"{control}, {form}": Contender("network", form, control=control)
       for control in ("frozen", "shuffled", "shuffled within tasks", "random") for form in ("inverse", "standard")},
}  # fmt: skip
"""Who takes part, by name; the constant is what the others are compared with."""

STRENGTHS = {"lsc": (0.2, 0.4), "dual-kl": (0.2, 0.5), "dual-kl-task": (0.2, 0.5)}
"""What is swept of the methods whose strength is: LSC's published target and its half, and KL budgets (nats) that the
training here comes to."""

BASELINE = "constant"


@dataclass(frozen=True)
class CompareConfig:
    """The experiment.

    Attributes:
        world: the small world; each seed has its own.
        contenders: names of `CONTENDERS`; the constant always takes part.
        constants: scales of the constant, the frontier to beat.
        scales: scales s0 of the methods that are swept over it; the others start at the first of them.
        seeds: worlds and runs, numbered from 0.
        noise: shares of the training pairs whose label is turned round; a larger share turns the same and more.
        learning_rates: of the policy; each method uses its best, the constants run at all of them.
        tuning_seeds: worlds of their own, numbered from 1000, on which the best is found.
        tuning_noise: the share at which it is found, and at which the controls run; one of `noise`.
        stage1_steps: steps with a fixed beta, where beta learns; the rule's own steps otherwise.
        stage2_steps: steps with the rule.
        batch_size: pairs in a step.
        beta_learning_rate: of beta, where it learns.
        calibration: share of the training prompts that "calibrated" takes for beta.
        prompts: fresh prompts a task that a policy is measured on.
        samples: answers at each.
    """

    world: WorldConfig = field(default_factory=lambda: WorldConfig(
        demonstrations=30_000, hidden_size=64, layers=3, problems=300, pairs_per_prompt=8))  # fmt: skip
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    constants: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    scales: tuple[float, ...] = (0.2, 0.8)
    seeds: int = 8
    noise: tuple[float, ...] = (0.0, 0.15, 0.3)
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    tuning_seeds: int = 2
    tuning_noise: float = 0.15
    stage1_steps: int = 30
    stage2_steps: int = 50
    batch_size: int = 24
    beta_learning_rate: float = 1e-2
    calibration: float = 0.25
    prompts: int = 48
    samples: int = 4

    def __post_init__(self) -> None:
        unknown = sorted(set(self.contenders) - set(CONTENDERS))
        if unknown:
            raise ValueError(f"contenders: got {unknown}, expected some of {', '.join(CONTENDERS)}")
        if BASELINE not in self.contenders:
            raise ValueError(f"contenders: got {self.contenders}, expected {BASELINE!r} among them")
        if self.seeds < 3 or self.tuning_seeds < 1:
            raise ValueError(f"seeds, tuning_seeds: got {self.seeds}, {self.tuning_seeds}, expected at least 3 and 1")
        if any(not 0 <= share < 0.5 for share in self.noise):
            raise ValueError(f"noise: got {self.noise}, expected shares from 0 to below 0.5")
        if self.tuning_noise not in self.noise:
            raise ValueError(f"tuning_noise: got {self.tuning_noise}, expected one of {self.noise}")
        for name in ("constants", "scales", "noise", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: got {values}, expected different numbers, at least one")

    @classmethod
    def fast(cls, **settings) -> CompareConfig:
        """A tiny version, for tests and a first look: its numbers say nothing."""
        world = WorldConfig(demonstrations=9000, hidden_size=48, layers=2, problems=32, samples=6, entropy_samples=2,
                            max_new_tokens=24)  # fmt: skip
        tiny = {"world": world, "constants": (0.1, 0.4), "scales": (0.1,), "seeds": 3, "noise": (0.15,),
                "learning_rates": (1e-3,), "tuning_seeds": 1, "stage1_steps": 1, "stage2_steps": 2, "batch_size": 4,
                "prompts": 4, "samples": 2}  # fmt: skip
        return cls(**{**tiny, **settings})

    def values(self, contender: str) -> tuple[float, ...]:
        """What is swept of a contender."""
        if contender == BASELINE:
            return self.constants
        values = STRENGTHS[contender] if CONTENDERS[contender].swept == "strength" else self.scales
        return values[-1:] if len(self.scales) == 1 else values


class Job(NamedTuple):
    """One run.

    Attributes:
        phase: "reference", "tuning" or "main".
        contender: a name of `CONTENDERS`, or "reference".
        value: of what is swept.
        learning_rate: of a tuning run and of the constants, which run at all of them; 0 is the method's best.
        noise: share of labels turned round.
        seed: of the world and of the run.
    """

    phase: str
    contender: str
    value: float
    learning_rate: float
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        parts = (self.phase, self.contender, f"{self.value:g}", f"{self.learning_rate:g}", f"{self.noise:g}", self.seed)
        return "_".join(str(part).replace(" ", "-").replace(",", "") for part in parts)


def jobs(config: CompareConfig) -> list[Job]:
    """The table of jobs, each world's together; a number of `dpoviz compare --only` is a row of it."""
    rows = []
    for seed in range(1000, 1000 + config.tuning_seeds):
        rows.append(Job("reference", "reference", 0.0, 0.0, 0.0, seed))
        for name in config.contenders:
            if not CONTENDERS[name].rates_of:
                values = config.values(name)
                tried = values if name == BASELINE else values[-1:]
                rows += [
                    Job("tuning", name, v, rate, config.tuning_noise, seed)
                    for v in tried
                    for rate in config.learning_rates
                ]
    for seed in range(config.seeds):
        rows.append(Job("reference", "reference", 0.0, 0.0, 0.0, seed))
        for noise in config.noise:
            for name in sorted(config.contenders, key=lambda name: bool(CONTENDERS[name].control)):
                if CONTENDERS[name].control and noise != config.tuning_noise:
                    continue
                rates = config.learning_rates if name == BASELINE else (0.0,)
                rows += [Job("main", name, v, rate, noise, seed) for rate in rates for v in config.values(name)]
    return rows


def job_table(config: CompareConfig) -> pd.DataFrame:
    """`jobs` as a table, with their names."""
    rows = jobs(config)
    return pd.DataFrame(rows).assign(name=[job.name for job in rows])


# ------------------------------------------------------------------------------------------- one job


class _Ground(NamedTuple):
    """What all jobs of a seed share."""

    world: World
    problems: list[tasks.Problem]
    preference: np.ndarray  # of each held-out pair: P(chosen preferred)


@lru_cache(maxsize=2)
def _ground(config: CompareConfig, cache_dir: str, seed: int) -> _Ground:
    world = small_world(replace(config.world, seed=seed), cache_dir=cache_dir, progress=False)
    known = {*world.train["prompt"], *world.held_out["prompt"]}
    problems = []
    for task in tasks.TASKS:
        # so many that enough are fresh, whichever they are
        drawn = tasks.sample_problems(task, config.world.problems + config.prompts, 10_000 + seed)
        problems += [problem for problem in drawn if problem.prompt not in known][: config.prompts]
    held_out = world.held_out[:]
    for name, part in (("train on", world.train), ("measure on", world.held_out)):
        lacking = [task for task in tasks.TASKS if task not in set(part["task"])]
        if lacking:
            raise ValueError(f"world: seed {seed} has no pairs of {lacking} to {name}; give it more demonstrations")
    truth = [
        tasks.preference_probability(task, chosen, rejected)
        for task, chosen, rejected in zip(
            held_out["task"], held_out["reward_chosen"], held_out["reward_rejected"], strict=True
        )
    ]
    return _Ground(world, problems, np.array(truth))


@lru_cache(maxsize=2)
def _noisy(config: CompareConfig, cache_dir: str, seed: int, noise: float) -> Dataset:
    return turn_labels(_ground(config, cache_dir, seed).world.train, noise, seed)


def turn_labels(pairs: Dataset, share: float, seed: int) -> Dataset:
    """The pairs with chosen and rejected exchanged in a share of them; a larger share turns the same and more."""
    turned = np.random.default_rng([seed, 7]).random(len(pairs)) < share
    columns = pairs.to_dict()
    found = {}
    for name, values in columns.items():
        other = name.replace("chosen", "\0").replace("rejected", "chosen").replace("\0", "rejected")
        found[name] = [b if t else a for a, b, t in zip(values, columns[other], turned, strict=True)]
    return Dataset.from_dict(found, features=pairs.features)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last digits of a sum depend on the number of threads: every job has one, wherever it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run_job(config: CompareConfig, job: Job, out: Path, cache_dir: Path | str) -> dict:
    """Run a job on one thread and leave its file, or read what is there.

    Raises:
        ValueError: a main job whose tuning jobs have not all been run.
    """
    file = out / "runs" / f"{job.name}.json"
    if file.is_file():
        return json.loads(file.read_text())
    began = time.monotonic()
    ground = _ground(config, str(cache_dir), job.seed)
    if job.phase == "reference":
        found = _measured(config, ground, copy.deepcopy(ground.world.reference), job.seed)
        found["learning_rate"] = 0.0
    else:
        rate = job.learning_rate or best_rates(config, out)[CONTENDERS[job.contender].rates_of or job.contender]
        found = _trained(config, job, rate, ground, out, cache_dir)
        found["learning_rate"] = rate
    found = {**job._asdict(), **found, "seconds": time.monotonic() - began}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(found))
    scratch.replace(file)
    return found


def best_rates(config: CompareConfig, out: Path) -> dict[str, float]:
    """The learning rate of each contender, found on the worlds for tuning.

    Of the constants it is the rate whose curve is highest on average over KL budgets of 0.5 to 4 nats; of each
    method the rate at which the run of its last value lies highest above that curve.

    Raises:
        ValueError: a tuning job that has not been run.
    """
    rows = [job for job in jobs(config) if job.phase in ("tuning", "reference") and job.seed >= 1000]
    missing = [job.name for job in rows if not (out / "runs" / f"{job.name}.json").is_file()]
    if missing:
        raise ValueError(f"{out}: {len(missing)} tuning jobs have not been run, first {missing[0]}; run them first")
    found = pd.DataFrame([json.loads((out / "runs" / f"{job.name}.json").read_text()) for job in rows])
    starts = found[found["phase"] == "reference"].set_index("seed")["reward/all"]
    tuned = found[found["phase"] == "tuning"]

    def curve(rate: float, seed: int) -> Curve:
        rows = tuned.query("contender == @BASELINE and learning_rate == @rate and seed == @seed")
        return Curve(rows["kl/all"], rows["reward/all"], start=starts[seed])

    def worth(rate: float) -> float:
        return np.mean([[curve(rate, seed).best(b) for b in BUDGETS] for seed in starts.index])

    rates = {BASELINE: max(config.learning_rates, key=worth)}
    for name in config.contenders:
        if name != BASELINE and not CONTENDERS[name].rates_of:
            rows = tuned[tuned["contender"] == name]
            above = [r["reward/all"] - curve(rates[BASELINE], r["seed"]).at(r["kl/all"]) for _, r in rows.iterrows()]
            rates[name] = float(rows.assign(above=above).groupby("learning_rate")["above"].mean().idxmax())
    return rates


BUDGETS = (0.5, 1.0, 2.0, 4.0)
"""KL budgets, in nats an answer, at which the best reward is asked for."""

LAST = 10
"""Steps at the end of training whose betas are what is told of a rule that is no function of the prompt."""


def _settings(config: CompareConfig, job: Job, rate: float) -> TrainConfig:
    contender = CONTENDERS[job.contender]
    return TrainConfig.around(
        job.value if contender.swept == "scale" else config.scales[0],
        contender.form,
        stage1_steps=config.stage1_steps,
        stage2_steps=config.stage2_steps,
        batch_size=config.batch_size,
        policy_learning_rate=rate,
        beta_learning_rate=config.beta_learning_rate,
        warmup_steps=min(10, config.stage1_steps),
        log_every=10_000,
        probe_every=0,
        probe_prompts=16,
        max_new_tokens=config.world.max_new_tokens,
        checkpoint_every=10_000,
        seed=job.seed,
    )


def _trained(config: CompareConfig, job: Job, rate: float, ground: _Ground, out: Path, cache_dir: Path | str) -> dict:
    contender, world = CONTENDERS[job.contender], ground.world
    settings = _settings(config, job, rate)
    pairs, others = _noisy(config, str(cache_dir), job.seed, job.noise), None
    if contender.calibrated:
        pairs, others = split_by_group(pairs, config.calibration, job.seed)
    if contender.control:
        beta = _control(config, job, pairs, out, cache_dir)
    else:
        strength = job.value if contender.swept == "strength" else contender.strength
        vocabulary = world.reference.config.vocab_size
        beta = METHODS[contender.method].start(settings, pairs, vocabulary=vocabulary, strength=strength)
    rule = beta if isinstance(beta, Rule) else FromPrompt(beta)
    seen: deque[tuple[Seen, Weighed]] = deque(maxlen=LAST * (2 if contender.calibrated else 1))
    policy = copy.deepcopy(world.reference)
    common = {"pad_id": world.tokenizer.pad_token_id, "eos_id": world.tokenizer.eos_token_id, "progress": False}
    common |= {"reference": world.reference}
    # what learns, and what was learned, starts from a fixed beta; the others are themselves from the first step
    first = ConstantBeta(settings.beta0) if rule.learns or contender.control else rule
    train(policy, first, pairs, settings, stage=1, **common)
    hook = rule.register_forward_hook(lambda _, given, gave: seen.append((given[0], gave)))
    train(policy, rule, pairs, settings, stage=2, calibration=others, **common)
    hook.remove()
    found = _measured(config, ground, policy, job.seed)
    found |= _margins(config, ground, policy, rule, settings.form, list(seen))
    if contender.method == "network" and not contender.control:
        x, names = torch.tensor(pairs["ref_features"][:]), pairs["task"][:]
        with torch.no_grad():
            betas = rule.beta(x, task=names, ref_entropy=torch.tensor(pairs["ref_entropy"][:]))
        found["training_betas"] = betas.tolist()
    return found


def _control(config: CompareConfig, job: Job, pairs: Dataset, out: Path, cache_dir: Path | str) -> Rule:
    """The trained beta(x) of the network, frozen, dealt out anew, or drawn at random with its mean and spread."""
    contender = CONTENDERS[job.contender]
    source = job._replace(contender=f"{contender.method} {contender.form}")
    betas = torch.tensor(run_job(config, source, out, cache_dir)["training_betas"])
    x, names = torch.tensor(pairs["ref_features"][:]), pairs["task"][:]
    if contender.control == "frozen":
        return Lookup(x, betas)
    if contender.control == "random":
        return Random(betas.mean().item(), spread=betas.log().std().item(), seed=job.seed)
    return Lookup.shuffled(x, betas, names, within_task=contender.control == "shuffled within tasks", seed=job.seed)


def _measured(config: CompareConfig, ground: _Ground, policy: PreTrainedModel, seed: int) -> dict:
    """Reward, KL and entropy of a policy on fresh prompts: <measure>/<task>, and <measure>_se/<task>."""
    # the answers of a task are about as long: drawn by themselves, none waits for another task's
    parts = [
        evaluate_policy(
            policy,
            ground.world.reference,
            ground.world.tokenizer,
            [problem for problem in ground.problems if problem.task == task],
            samples=config.samples,
            max_new_tokens=config.world.max_new_tokens,
            seed=seed,
        )
        for task in tasks.TASKS
    ]
    table = pd.concat(parts, ignore_index=True)
    summary = summarize_evaluation(table).set_index("task")
    return {f"{name}/{task}": float(summary.loc[task, name])
            for measure in MEASURES for name in (measure, f"{measure}_se") for task in summary.index}  # fmt: skip


@torch.no_grad()
def _margins(
    config: CompareConfig, ground: _Ground, policy: PreTrainedModel, rule: Rule, form: Form,
    seen: Sequence[tuple[Seen, Weighed]],
) -> dict:  # fmt: skip
    """On held-out pairs, whose labels nobody turned: accuracy, h, s, s·h, calibration; and where beta went."""
    held_out, truth = ground.world.held_out, ground.preference
    h = log_ratio_differences(
        policy, held_out, pad_id=ground.world.tokenizer.pad_token_id, batch_size=64, progress=False
    )
    names = np.array(held_out["task"])
    betas = torch.cat([gave.beta.detach() for _, gave in seen]).double().numpy()
    of_task = np.array([name for given, _ in seen for name in given.task])
    entropy = torch.cat([given.ref_entropy for given, _ in seen]).double().numpy()
    own = isinstance(rule, FromPrompt)
    if own:  # a function of the prompt: its values at the held-out prompts
        rule.eval()
        x = torch.tensor(held_out["ref_features"][:])
        entropy = np.array(held_out["ref_entropy"])
        betas = rule.beta(x, task=held_out["task"], ref_entropy=torch.tensor(held_out["ref_entropy"][:]))
        betas, of_task = betas.double().numpy(), names
        at_pairs = betas
    else:
        logs = pd.Series(np.log(betas))
        means = logs.groupby(of_task).mean()
        # a task that the last batches happened to lack has the mean of the others
        at_pairs = np.exp([means.get(name, logs.mean()) for name in names])
    s = np.asarray(scale(torch.tensor(at_pairs), form))
    said = 1 / (1 + np.exp(-s * h))
    right = np.where(np.abs(h) <= 1e-4, 0.5, h > 0)
    # both ways round: labels are drawn by the truth, so that the chosen answer alone would have it above a half
    both_said, both_truth = np.concatenate([said, 1 - said]), np.concatenate([truth, 1 - truth])
    found = {"function_of_prompt": own, **calibration(both_said, both_truth)}
    for task in (*tasks.TASKS, "all"):
        rows = slice(None) if task == "all" else names == task
        found |= {f"accuracy/{task}": right[rows].mean(), f"h/{task}": h[rows].mean(), f"s/{task}": s[rows].mean(),
                  f"margin/{task}": (s * h)[rows].mean()}  # fmt: skip
        rows = slice(None) if task == "all" else of_task == task
        logs = pd.Series(np.log(betas)[rows])
        found |= {f"beta/{task}": math.exp(logs.mean()), f"beta_spread/{task}": logs.std(ddof=0)}
        varies = logs.std() > 1e-6 and np.std(entropy[rows]) > 0
        found[f"rho/{task}"] = spearmanr(logs, entropy[rows])[0] if varies else math.nan
    bins = reliability(both_said, both_truth)
    found["reliability"] = bins.to_dict("list")
    found["betas"] = {"task": of_task.tolist(), "ref_entropy": entropy.tolist(), "beta": betas.tolist()}
    return {key: float(value) if isinstance(value, np.floating) else value for key, value in found.items()}


# ------------------------------------------------------------------------------------------- all of them


def compare(
    config: CompareConfig,
    out: Path,
    *,
    cache_dir: Path | str,
    only: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Run the jobs that are not done, on all cores; a killed experiment goes on where it was.

    Args:
        config: the experiment.
        out: the folder; each job leaves a file under out/runs.
        cache_dir: where the small worlds are kept.
        only: the row of `jobs` to run, and no other.
        workers: processes; None takes one for each core.
        progress: show a bar.

    Raises:
        ValueError: `only` is no row, or a main job whose tuning jobs have not been run.
    """
    rows = jobs(config)
    if only is not None:
        if not 0 <= only < len(rows):
            raise ValueError(f"only: got {only}, expected a row from 0 to {len(rows) - 1}")
        run_job(config, rows[only], out, cache_dir)
        return
    left = [job for job in rows if not (out / "runs" / f"{job.name}.json").is_file()]
    with tqdm(total=len(rows), initial=len(rows) - len(left), desc="runs", unit="run", disable=not progress) as bar:
        for some in ([job for job in left if job.seed >= 1000], [job for job in left if job.seed < 1000]):
            _run_all(config, some, out, cache_dir, workers or len(os.sched_getaffinity(0)), bar.update)


def _run_all(
    config: CompareConfig, some: Sequence[Job], out: Path, cache_dir: Path | str, workers: int,
    done: Callable[[], object],
) -> None:  # fmt: skip
    if not some:
        return
    # spawned, not forked: PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=own_progress_only) as pool:
        seeds = sorted({job.seed for job in some})
        try:
            # a world is built once, by one process, before any of its jobs begins
            built = {seed: pool.submit(_build, config, str(cache_dir), seed) for seed in seeds}
            for future in built.values():
                future.result()
            # a worker keeps the worlds that it works in: near jobs share one
            for future in [pool.submit(run_job, config, job, out, cache_dir) for job in some]:
                future.result()
                done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@_one_thread()
def _build(config: CompareConfig, cache_dir: str, seed: int) -> None:
    small_world(replace(config.world, seed=seed), cache_dir=cache_dir, progress=False)


_LISTS = ("training_betas", "reliability", "betas")


def gather(config: CompareConfig, out: Path) -> pd.DataFrame:
    """The runs that are done, a row each: the job, learning_rate, seconds, and the numbers.

    Of each task and of "all": reward, kl, kl_k1, kl_k3, entropy, length with <name>_se (see `evaluate_policy`);
    accuracy, h, s, margin (held-out pairs); beta (geometric mean), beta_spread (standard deviation of log beta), rho
    (Spearman, beta against entropy); and brier and ece.
    """
    rows = []
    for job in jobs(config):
        file = out / "runs" / f"{job.name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            rows.append({key: value for key, value in found.items() if key not in _LISTS})
    return pd.DataFrame(rows)


def gather_betas(config: CompareConfig, out: Path, *, noise: float, seed: int) -> pd.DataFrame:
    """Beta of each rule in the run of its first value, controls left out: contender, form, task, ref_entropy, beta."""
    parts = []
    for name in config.contenders:
        value = config.values(name)[0]
        file = out / "runs" / f"{Job('main', name, value, 0.0, noise, seed).name}.json"
        if name != BASELINE and not CONTENDERS[name].control and file.is_file():
            betas = pd.DataFrame(json.loads(file.read_text())["betas"]).drop_duplicates()
            parts.append(betas.assign(contender=name, form=CONTENDERS[name].form))
    return pd.concat(parts, ignore_index=True)


def gather_reliability(config: CompareConfig, out: Path) -> pd.DataFrame:
    """Of all main runs, pooled over seeds: contender, value, learning_rate, noise, bin, n, predicted, truth."""
    parts = []
    for job in jobs(config):
        file = out / "runs" / f"{job.name}.json"
        if job.phase == "main" and file.is_file():
            found = json.loads(file.read_text())
            place = {name: found[name] for name in ("contender", "value", "learning_rate", "noise")}
            parts.append(pd.DataFrame(found["reliability"]).assign(**place))
    table = pd.concat(parts, ignore_index=True)
    keys = ["contender", "value", "learning_rate", "noise", "bin"]
    for name in ("predicted", "truth"):
        table[name] *= table["n"]
    sums = table.groupby(keys, sort=False)[["n", "predicted", "truth"]].sum()
    return sums.assign(predicted=sums["predicted"] / sums["n"], truth=sums["truth"] / sums["n"]).reset_index()


# ------------------------------------------------------------------------------------------- what it says


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Each contender against the constants of the same world at the same learning rate, seed by seed.

    Args:
        table: what `gather` returned.

    Returns:
        A row per contender, noise, seed and task ("all" among them):
        above: mean over its runs of their reward minus the constants' at the same KL;
        area: the mean difference of the two curves over the KL that both reach;
        mean_scale/reward, mean_scale/kl: mean over its runs of reward and KL minus those of a constant with the run's
        own mean scale (over all held-out pairs; between the constants that were run, on the log of the scale);
        best/<budget>, best_difference/<budget>: the highest reward at a KL of at most so many nats, and that minus
        the constants', which here have the runs at all learning rates.
    """
    main = table[table["phase"] == "main"]
    starts = table[(table["phase"] == "reference") & (table["seed"] < 1000)].set_index("seed")
    groups = {key: rows for key, rows in main.groupby(["contender", "noise", "seed"], sort=False)}
    found = []
    for (contender, noise, seed), rows in groups.items():
        rivals = groups[BASELINE, noise, seed].sort_values("s/all")
        alike = rivals[rivals["learning_rate"].isin(rows["learning_rate"])]
        for task in (*tasks.TASKS, "all"):

            def curve(some: pd.DataFrame, task: str = task, seed: int = seed) -> Curve:
                return Curve(some[f"kl/{task}"], some[f"reward/{task}"], start=starts.loc[seed, f"reward/{task}"])

            own, whole = curve(rows), curve(rivals)
            row = {"contender": contender, "noise": noise, "seed": seed, "task": task}
            if contender != BASELINE:
                constant = curve(alike)
                row["above"] = float(np.mean(own.reward[1:] - constant.at(own.kl[1:])))
                row["area"] = own.mean_difference(constant)
                for name in ("reward", "kl"):
                    same = np.interp(np.log(rows["s/all"]), np.log(alike["s/all"]), alike[f"{name}/{task}"])
                    row[f"mean_scale/{name}"] = float((rows[f"{name}/{task}"] - same).mean())
            for budget in BUDGETS:
                row[f"best/{budget:g}"] = own.best(budget)
                row[f"best_difference/{budget:g}"] = own.best(budget) - whole.best(budget)
            found.append(row)
    return pd.DataFrame(found)


def effects(found: pd.DataFrame, measure: str = "above") -> pd.DataFrame:
    """The mean of a difference over the seeds, by contender, noise and task.

    Args:
        found: what `differences` returned.
        measure: one of its differences.

    Returns:
        A row per contender but the constant, noise (NaN: the mean over all levels, seed by seed) and task: mean, low,
        high, p, detectable (see `effect`), and holm: p adjusted over the contenders within a noise and a task.
    """
    rivals = found[found["contender"] != BASELINE]
    pooled = rivals.groupby(["contender", "seed", "task"], as_index=False, sort=False)[measure].mean()
    whole = pd.concat([pooled.assign(noise=math.nan), rivals[["contender", "noise", "seed", "task", measure]]])
    keys = ["noise", "task", "contender"]
    rows = [{**dict(zip(keys, key, strict=True)), **effect(group[measure])._asdict()}
            for key, group in whole.groupby(keys, dropna=False, sort=False)]  # fmt: skip
    table = pd.DataFrame(rows)
    table["holm"] = table.groupby(["noise", "task"], dropna=False)["p"].transform(lambda p: holm(p.to_numpy()))
    return table


def against(found: pd.DataFrame, first: str, second: str, measure: str = "above") -> pd.DataFrame:
    """The mean of first minus second over the seeds, by task, pooled over noise; columns as `effects`."""
    wide = found.groupby(["contender", "seed", "task"], sort=False)[measure].mean()
    rows = []
    for task in dict.fromkeys(found["task"]):
        own, other = (wide.xs(name, level="contender").xs(task, level="task") for name in (first, second))
        rows.append({"first": first, "second": second, "task": task, **effect((own - other).to_numpy())._asdict()})
    return pd.DataFrame(rows)
