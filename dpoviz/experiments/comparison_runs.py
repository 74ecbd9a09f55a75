"""Run the jobs of the comparison: each trains and measures one policy; several run in parallel."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.analysis.evaluate import MEASURES, calibration, evaluate_policy, reliability, summarize_evaluation
from dpoviz.beta import Beta, ConstantBeta
from dpoviz.data import tasks
from dpoviz.data.records import split_by_group
from dpoviz.experiments.comparison import best_rates, job_table
from dpoviz.experiments.comparison_config import CONTENDERS, CompareConfig, Job, jobs
from dpoviz.experiments.small import World, small_world
from dpoviz.forms import Form, scale
from dpoviz.lm.processes import hidden
from dpoviz.lm.workers import cores, one_thread, run_side_by_side
from dpoviz.rules import LookupBeta, Observation, PromptRule, RandomBeta, Rule, RuleOutput
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import train
from dpoviz.training.methods import build
from dpoviz.training.probes import correctly_ranked, log_ratios


class _Ground(NamedTuple):
    """The data that all jobs of one seed share."""

    world: World
    problems: list[tasks.Problem]
    preference: np.ndarray  # (N,) probability that the chosen answer is preferred, for each held-out pair


@lru_cache(maxsize=2)
def _ground(config: CompareConfig, cache_dir: str, seed: int) -> _Ground:
    world = small_world(replace(config.world, seed=seed), cache_dir=cache_dir, progress=False)
    known = {*world.train["prompt"], *world.held_out["prompt"]}
    problems = []
    for task in tasks.TASKS:
        # enough that `config.prompts` of them are fresh, whichever they are
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
    return flip_labels(_ground(config, cache_dir, seed).world.train, noise, seed)


def flip_labels(pairs: Dataset, share: float, seed: int) -> Dataset:
    """Return the pairs with chosen and rejected exchanged in a fraction of them; the flipped sets are nested."""
    turned = np.random.default_rng([seed, 7]).random(len(pairs)) < share
    columns = pairs.to_dict()
    found = {}
    for name, values in columns.items():
        other = name.replace("chosen", "\0").replace("rejected", "chosen").replace("\0", "rejected")
        found[name] = [b if t else a for a, b, t in zip(values, columns[other], turned, strict=True)]
    return Dataset.from_dict(found, features=pairs.features)


@one_thread()
def run_job(config: CompareConfig, job: Job, out: Path, cache_dir: Path | str) -> dict:
    """Run a job on one thread and write its file; if the file exists, read it instead.

    Raises:
        ValueError: a main job whose tuning jobs are not finished.
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


LAST = 10
"""For rules that are not functions of the prompt, beta is summarised over this many final steps."""


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
    beta: Beta | Rule
    if contender.control:
        beta = _control(config, job, pairs, out, cache_dir)
    else:
        strength = job.value if contender.swept == "strength" else contender.strength
        vocabulary = world.reference.config.vocab_size
        beta = build(contender.method, settings, pairs, vocabulary=vocabulary, strength=strength)
    rule = beta if isinstance(beta, Rule) else PromptRule(beta)
    seen: deque[tuple[Observation, RuleOutput]] = deque(maxlen=LAST * (2 if contender.calibrated else 1))
    policy = copy.deepcopy(world.reference)
    common = {"pad_id": world.tokenizer.pad_token_id, "eos_id": world.tokenizer.eos_token_id, "progress": False}
    common |= {"reference": world.reference}
    # trainable betas, and controls made of them, start from a fixed beta; the other rules act from the first step
    first = ConstantBeta(settings.beta0) if rule.trainable or contender.control else rule
    train(policy, first, pairs, settings, stage=1, **common)
    hook = rule.register_forward_hook(lambda _, given, gave: seen.append((given[0], gave)))
    train(policy, rule, pairs, settings, stage=2, beta_pairs=others, **common)
    hook.remove()
    found = _measured(config, ground, policy, job.seed)
    found |= _margins(config, ground, policy, rule, settings.form, list(seen))
    if contender.method == "network" and not contender.control:
        assert isinstance(rule, PromptRule)
        x, names = torch.tensor(pairs["ref_features"][:]), pairs["task"][:]
        with torch.no_grad():
            betas = rule.beta(x, task=names, ref_entropy=torch.tensor(pairs["ref_entropy"][:]))
        found["training_betas"] = betas.tolist()
    return found


def _control(config: CompareConfig, job: Job, pairs: Dataset, out: Path, cache_dir: Path | str) -> Rule:
    """Return the trained beta(x) of the network, frozen, shuffled, or sampled with the same mean and spread."""
    contender = CONTENDERS[job.contender]
    source = job._replace(contender=f"{contender.method} {contender.form}")
    betas = torch.tensor(run_job(config, source, out, cache_dir)["training_betas"])
    x, names = torch.tensor(pairs["ref_features"][:]), pairs["task"][:]
    if contender.control == "frozen":
        return LookupBeta(x, betas)
    if contender.control == "random":
        return RandomBeta(betas.mean().item(), spread=betas.log().std().item(), seed=job.seed)
    return LookupBeta.shuffled(x, betas, names, within_task=contender.control == "shuffled within tasks", seed=job.seed)


def _measured(config: CompareConfig, ground: _Ground, policy: PreTrainedModel, seed: int) -> dict:
    """Return the measures of a policy on fresh prompts: <measure>/<task> and <measure>_se/<task>."""
    # answers of one task have similar lengths: sampled task by task, none waits for a longer one
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
    seen: Sequence[tuple[Observation, RuleOutput]],
) -> dict:  # fmt: skip
    """Return accuracy, h, s, s·h, calibration and beta on held-out pairs, whose labels are not flipped."""
    held_out, truth = ground.world.held_out, ground.preference
    chosen, rejected = log_ratios(
        policy, held_out, pad_id=ground.world.tokenizer.pad_token_id, batch_size=64, progress=False
    ).T
    h = chosen - rejected
    names = np.array(held_out["task"])
    betas = torch.cat([gave.beta.detach() for _, gave in seen]).double().numpy()
    of_task = np.array([name for given, _ in seen for name in given.task])
    entropy = torch.cat([given.ref_entropy for given, _ in seen]).double().numpy()
    own = isinstance(rule, PromptRule)
    if isinstance(rule, PromptRule):  # a function of the prompt: take its values at the held-out prompts
        rule.eval()
        x = torch.tensor(held_out["ref_features"][:])
        entropy = np.array(held_out["ref_entropy"])
        betas = rule.beta(x, task=held_out["task"], ref_entropy=torch.tensor(held_out["ref_entropy"][:]))
        betas, of_task = betas.double().numpy(), names
        at_pairs = betas
    else:
        logs = pd.Series(np.log(betas))
        means = logs.groupby(of_task).mean()
        # a task that is missing from the last batches gets the mean over all tasks
        at_pairs = np.exp([means.get(name, logs.mean()) for name in names])
    s = np.asarray(scale(torch.tensor(at_pairs), form))
    said = 1 / (1 + np.exp(-s * h))
    right = correctly_ranked(h)
    # both orders: labels are sampled from the truth, so for the chosen answer alone it lies above one half on average
    both_said, both_truth = np.concatenate([said, 1 - said]), np.concatenate([truth, 1 - truth])
    found: dict[str, Any] = {"function_of_prompt": own, **calibration(both_said, both_truth)}
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


def compare(
    config: CompareConfig,
    out: Path,
    *,
    cache_dir: Path | str,
    only: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Run the unfinished jobs on all cores; an interrupted experiment resumes.

    Args:
        config: the experiment.
        out: the folder: jobs.csv (`job_table`), and a file under runs for each job.
        cache_dir: folder in which the small worlds are cached.
        only: run only this row of `jobs`.
        workers: number of processes; None: one per core.
        progress: show a bar.

    Raises:
        ValueError: `workers` is not positive, `only` is not a row, or a main job's tuning jobs are not finished.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, expected at least 1")
    rows = jobs(config)
    out.mkdir(parents=True, exist_ok=True)
    job_table(config).to_csv(out / "jobs.csv")
    if only is not None:
        if not 0 <= only < len(rows):
            raise ValueError(f"only: got {only}, expected a row from 0 to {len(rows) - 1}")
        run_job(config, rows[only], out, cache_dir)
        return
    left = [job for job in rows if not (out / "runs" / f"{job.name}.json").is_file()]
    with tqdm(total=len(rows), initial=len(rows) - len(left), desc="runs", unit="run", disable=hidden(progress)) as bar:
        for some in ([job for job in left if job.seed >= 1000], [job for job in left if job.seed < 1000]):
            _run_all(config, some, out, cache_dir, workers or cores(), bar.update)


def _run_all(
    config: CompareConfig,
    some: Sequence[Job],
    out: Path,
    cache_dir: Path | str,
    workers: int,
    done: Callable[[], object],
) -> None:
    # each world is built once, by one process, before any of its jobs starts
    seeds = sorted({job.seed for job in some})
    for _ in run_side_by_side(partial(_build, config, str(cache_dir)), seeds, workers=workers):
        pass
    # each worker caches its latest worlds; neighbouring jobs share one
    for _ in run_side_by_side(partial(run_job, config, out=out, cache_dir=cache_dir), some, workers=workers):
        done()


@one_thread()
def _build(config: CompareConfig, cache_dir: str, seed: int) -> None:
    small_world(replace(config.world, seed=seed), cache_dir=cache_dir, progress=False)
