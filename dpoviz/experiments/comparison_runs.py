"""Run the jobs of the comparison: each trains one policy and measures it, exactly, on the pool's answers.

A policy is not sampled from. The pool holds answers that the reference gave, with their true rewards. A policy scores
those of the evaluation prompts once, and h = log π/π_ref. On these answers, as if the reference gave each with equal
probability, the policy re-tilted by a factor a is π_a ∝ exp(a·h): its reward and KL are sums, for every a. One factor
per policy puts all policies at exactly the same mean KL.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.allocation import POOLED, reward_per_nat, reward_per_nat_of_pairs
from dpoviz.beta import Beta, ConstantBeta, TaskBeta
from dpoviz.data import tasks
from dpoviz.experiments.comparison import IDEAL, best_settings, job_table
from dpoviz.experiments.comparison_config import (
    BUDGETS,
    CHOSEN,
    CONDITIONS,
    CONSTANT,
    ORACLE,
    PHASES,
    TRAINED,
    TRUE_SLOPES,
    CompareConfig,
    Job,
    jobs,
)
from dpoviz.experiments.comparison_pool import Pool, pool, score
from dpoviz.experiments.comparison_worlds import SCORED_ANSWERS, World, draw_world
from dpoviz.lm.cache import read_result, write_result
from dpoviz.lm.processes import hidden
from dpoviz.lm.workers import cores, one_thread, run_side_by_side
from dpoviz.rules import PromptRule, Rule, TaskSmoothing
from dpoviz.tabular import best_tilt, tilt_to_budget
from dpoviz.training.batch import REWARD_MARGIN
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import train
from dpoviz.training.methods import build


@one_thread()
def run_job(config: CompareConfig, job: Job, out: Path, cache_dir: Path | str) -> dict:
    """Run a job on one thread and write its file; if the file exists, read it instead.

    Raises:
        ValueError: a job of an earlier phase, whose result this one needs, is not finished.
    """
    file = out / "runs" / f"{job.name}.json"
    if file.is_file():
        return read_result(file)
    rate, start = job.learning_rate, job.scale
    if job.phase == "main" and not rate:
        rate, start = best_settings(config, out, job.contender)
        start = CONDITIONS[job.condition].scale or start
    before = None
    if TRAINED[job.contender].rule in AFTER_CONSTANT:
        first = job._replace(contender=CONSTANT, learning_rate=rate, scale=start)
        before = run_job(config, first, out, cache_dir)
    began, cpu = time.monotonic(), time.process_time()
    own = pool(config.reference, str(cache_dir))
    world = _world(config, str(cache_dir), job.condition, job.world)
    policy, margin = _trained(config, job, rate, start, own, world, before)
    found: dict[str, Any] = {**job._asdict(), "learning_rate": rate, "scale": start, "margin": margin}
    found |= _measured(own, world, policy, retilt=job == Job("main", CONSTANT, job.condition, job.world))
    if job.contender == CONSTANT and job.learning_rate:  # for those that train after it
        found["pair_slopes"] = _slopes_of_pairs(own, world, policy)
        found["pair_margins"] = _of_pairs(own, world.train, policy).tolist()
    found |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
    write_result(file, found)
    return found


@lru_cache(maxsize=3)
def _world(config: CompareConfig, cache_dir: str, condition: str, number: int) -> World:
    return draw_world(config, pool(config.reference, cache_dir), CONDITIONS[condition], number)


@lru_cache(maxsize=1)
def _policy(reference: PreTrainedModel) -> PreTrainedModel:
    """Return a model to be trained again and again: the trial of the roads is remembered per model."""
    return copy.deepcopy(reference)


def _trained(
    config: CompareConfig, job: Job, rate: float, start: float, own: Pool, world: World, before: dict | None
) -> tuple[PreTrainedModel, float]:
    """Return the trained policy, and the mean margin s·h of the last batch of training.

    `before` is the result of training with one constant at the same rate and scale, for a rule of `AFTER_CONSTANT`.
    """
    contender, pairs = TRAINED[job.contender], world.train
    epochs = CONDITIONS[job.condition].epochs or config.epochs
    steps = max(2, round(epochs * len(pairs) / config.batch_size))
    settings = TrainConfig.around(
        start,
        contender.form,
        stage1_steps=steps // 2,
        stage2_steps=steps - steps // 2,
        batch_size=config.batch_size,
        policy_learning_rate=rate,
        beta_learning_rate=config.beta_learning_rate,
        warmup_steps=min(5, steps // 4),
        log_every=10**6,
        probe_every=0,
        checkpoint_every=10**6,
        seed=job.world,
    )
    if contender.rule == "madpo":
        assert before is not None
        margins = before["scale"] * np.array(before["pair_margins"])  # the implicit rewards of that policy
        pairs = pairs.add_column(REWARD_MARGIN, margins.tolist())
    beta = _rule(contender.rule, settings, job, own, pairs, before)
    rule = beta if isinstance(beta, Rule) else PromptRule(beta)
    policy = _policy(own.reference)
    policy.load_state_dict(own.reference.state_dict())
    ends = {"pad_id": own.tokenizer.pad_token_id, "eos_id": own.tokenizer.eos_token_id}
    common: dict[str, Any] = {**ends, "reference": own.reference, "progress": False}
    # a trainable beta starts from a fixed one; the other rules act from the first step
    train(policy, ConstantBeta(settings.beta0) if rule.trainable else rule, pairs, settings, stage=1, **common)
    result = train(policy, rule, pairs, settings, stage=2, **common)
    return policy, float(result.history["margin"].iloc[-1])


OWN_RULES = ("smoothing", "slope", "slope, inverted")
"""Rules that are not in `RULES`: label smoothing with the true flip rates; one beta per task, s ∝ 1/b or s ∝ b, with b
from held-out pairs."""

AFTER_CONSTANT = ("slope", "slope, inverted", "madpo")
"""Rules that need a policy trained with one constant: its slopes, or its implicit rewards as MADPO's reward model."""


def _rule(name: str, settings: TrainConfig, job: Job, own: Pool, pairs: Dataset, before: dict | None) -> Beta | Rule:
    if name == "smoothing":
        return TaskSmoothing(settings.beta0, dict(zip(tasks.TASKS, CONDITIONS[job.condition].flips, strict=True)))
    if name in OWN_RULES:
        assert before is not None
        power = -1 if name == "slope" else 1
        s = {task: b**power for task, b in factors(before["pair_slopes"]).items()}
        middle = float(np.exp(np.mean(np.log(list(s.values())))))
        return TaskBeta.fixed({task: settings.beta0 * own / middle for task, own in s.items()})
    return build(name, settings, pairs, vocabulary=own.reference.config.vocab_size)


LEAST = 0.1
"""A task goes at least this fraction as far as the one that goes farthest: a slope may be 0 or below, a beta not."""


def factors(slopes: dict[str, float]) -> dict[str, float]:
    """Return the factor a of each task, up to a common one: its slope, and at least `LEAST` of the largest."""
    most = max(slopes.values())
    return {task: max(b, LEAST * most) if most > 0 else 1.0 for task, b in slopes.items()}


def _measured(own: Pool, world: World, policy: PreTrainedModel, *, retilt: bool) -> dict[str, Any]:
    """Return reward, KL and factor at each budget: of the policy, and if asked of what re-tilts it by task."""
    h = _log_ratios(own, policy, world.evaluation)
    tables = AnswerTables(own, world.evaluation, h)
    found: dict[str, Any] = {"reference": tables.means(torch.zeros(len(h)))["reward"]}
    one = dict.fromkeys(tasks.TASKS, 1.0)
    found["results"] = {"own": tables.at_budgets(one)}
    if retilt:
        scored = _log_ratios(own, policy, world.scored)
        slopes = {
            "1/b, scored answers": _slopes_of_answers(own, world.scored, scored[:, :SCORED_ANSWERS]),
            "1/b, held-out pairs": _slopes_of_pairs(own, world, policy),
            TRUE_SLOPES: _slopes_of_answers(own, world.evaluation, h),
        }
        named = {name: factors(some) for name, some in slopes.items()}
        by_answers = named["1/b, scored answers"]
        values = list(by_answers.values())
        order = sorted(by_answers, key=by_answers.__getitem__)
        named["1/b reversed"] = dict(zip(order, sorted(values, reverse=True), strict=True))
        found["results"] |= {name: tables.at_budgets(own) for name, own in named.items()}
        # each in the two orders in which no task keeps its own factor
        shifted = [dict(zip(by_answers, values[k:] + values[:k], strict=True)) for k in (1, 2)]
        both = [tables.at_budgets(own) for own in shifted]
        found["results"]["1/b shuffled"] = {b: _mean([own[b] for own in both]) for b in both[0]}
        found["results"][ORACLE] = tables.oracle()
        chosen = AnswerTables(own, world.scored, scored).oracle()
        found["results"][CHOSEN] = {
            name: tables.at_budgets(factors({task: best["a"][task] for task in tasks.TASKS}))[name]
            for name, best in chosen.items()
        }
        found["results"][IDEAL] = AnswerTables(own, world.evaluation, own.rewards[world.evaluation]).at_budgets(one)
        found["slopes"] = slopes
    return found


def _mean(some: Sequence[dict]) -> dict:
    return {
        name: {task: float(np.mean([own[name][task] for own in some])) for task in some[0][name]} for name in some[0]
    }


def _slopes_of_answers(own: Pool, some: Sequence[int], h: np.ndarray) -> dict[str, float]:
    """Return reward per nat by task from the first answers to some prompts, given their (prompts, answers) h."""
    count = h.shape[1]
    prompts = [p for p in some for _ in range(count)]
    names, rewards = [own.problems[p].task for p in prompts], own.rewards[some][:, :count].ravel()
    return _by_task(reward_per_nat(h.ravel(), rewards, prompt=prompts, task=names, resamples=100))


def _slopes_of_pairs(own: Pool, world: World, policy: PreTrainedModel) -> dict[str, float]:
    """Return reward per nat by task, in win rate, from the held-out pairs."""
    held, h = world.held_out, _of_pairs(own, world.held_out, policy)
    return _by_task(reward_per_nat_of_pairs(h, task=held["task"][:], prompt=held["prompt"][:], resamples=100))


def _by_task(table: pd.DataFrame) -> dict[str, float]:
    return {row.task: row.slope for row in table.itertuples() if row.task != POOLED}


def _of_pairs(own: Pool, pairs: Dataset, policy: PreTrainedModel) -> np.ndarray:
    """Return (N,) h of chosen against rejected, nats."""
    rows = pairs[:]
    answers = [list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
    logps, *_ = score(policy, rows["prompt_ids"], answers, own.tokenizer.pad_token_id)
    return (logps[:, 0] - np.array(rows["ref_chosen_logps"])) - (logps[:, 1] - np.array(rows["ref_rejected_logps"]))


def _log_ratios(own: Pool, policy: PreTrainedModel, prompts: Sequence[int]) -> np.ndarray:
    """Return (prompts, M) h = log π/π_ref of the pool's answers, nats."""
    some = [own.prompt_ids[p] for p in prompts], [own.answers[p] for p in prompts]
    logps, *_ = score(policy, *some, own.tokenizer.pad_token_id)
    return logps - own.logps[list(prompts)]


class AnswerTables:
    """The empirical world of some prompts: each of the M answers has the same probability under the reference."""

    def __init__(self, own: Pool, prompts: Sequence[int], h: np.ndarray) -> None:
        self.h = torch.from_numpy(np.asarray(h, dtype=float))
        self.rewards = torch.from_numpy(own.rewards[list(prompts)].astype(float))
        self.ref_logps = torch.full_like(self.h, 1.0).log_softmax(1)
        names = [own.problems[p].task for p in prompts]
        self.task = torch.tensor([tasks.TASKS.index(name) for name in names])

    def at_budgets(self, direction: dict[str, float]) -> dict[str, dict]:
        """Return, by budget, reward, KL and factor by task and over all where the mean KL is the budget."""
        a = torch.tensor([direction[task] for task in tasks.TASKS], dtype=torch.float64)[self.task]
        tables = self.ref_logps, self.h, self.rewards
        return {f"{budget:g}": self.means(tilt_to_budget(*tables, a, budget).a) for budget in BUDGETS}

    def oracle(self) -> dict[str, dict]:
        tables = self.ref_logps, self.h, self.rewards
        return {f"{budget:g}": self.means(best_tilt(*tables, budget, groups=self.task).a) for budget in BUDGETS}

    def means(self, a: Tensor) -> dict[str, dict[str, float]]:
        """Return reward, KL and a, by task and over all, of the policy re-tilted by a factor per prompt."""
        a = a.double()
        logps = (self.ref_logps + a[:, None] * self.h).log_softmax(1)
        values = {
            "reward": (logps.exp() * self.rewards).sum(1),
            "kl": (logps.exp() * (logps - self.ref_logps)).sum(1),
            "a": a,
        }
        found = {}
        for name, of_prompts in values.items():
            found[name] = {task: float(of_prompts[self.task == i].mean()) for i, task in enumerate(tasks.TASKS)}
            found[name]["all"] = float(np.mean(list(found[name].values())))
        return found


@one_thread()
def halve_scale(config: CompareConfig, world: int, rate: float, scale: float, cache_dir: Path | str) -> dict:
    """Train with one constant, and again with half its scale; compare the first policy re-tilted by 2 with the second.

    At the optimum of the loss, h = logit(p)/s: half the scale doubles h.

    Args:
        config: the experiment; its epochs, and the labels of "uniform noise".
        world: number of the world.
        rate: learning rate of the policy.
        scale: s of the first policy.
        cache_dir: folder in which the pool is cached.

    Returns:
        world, epochs and margin (mean s·h of the first policy's last batch, nats); on the answers to the evaluation
        prompts, h centred by prompt: correlation of the two, and ratio, the factor a that is best in least squares; kl
        (nats) and gain (reward over the reference's) of the first policy ("once"), of it re-tilted by 2 ("retilted")
        and of the second ("retrained"), at whatever KL each has; and gain of the first and the second at a mean KL of
        0.3 nats.
    """
    own = pool(config.reference, str(cache_dir))
    job = Job("main", CONSTANT, "uniform noise", world)
    drawn = _world(config, str(cache_dir), job.condition, world)
    prompts = drawn.evaluation
    h, margins = [], []
    for start in (scale, scale / 2):
        policy, margin = _trained(config, job, rate, start, own, drawn, None)
        h.append(_log_ratios(own, policy, prompts))
        margins.append(margin)
    first, second = (each - each.mean(axis=1, keepdims=True) for each in h)
    found: dict[str, Any] = {"world": world, "epochs": config.epochs, "margin": margins[0]}
    found["correlation"] = float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))
    found["ratio"] = float((first * second).sum() / (first**2).sum())
    once, retrained = (AnswerTables(own, prompts, each) for each in h)
    none = once.means(torch.zeros(len(prompts)))["reward"]["all"]
    for name, tables, a in (("once", once, 1.0), ("retilted", once, 2.0), ("retrained", retrained, 1.0)):
        means = tables.means(torch.full((len(prompts),), a))
        found |= {f"kl_{name}": means["kl"]["all"], f"gain_{name}": means["reward"]["all"] - none}
    for name, tables in (("once", once), ("retrained", retrained)):
        found[f"gain_{name}_at_0.3"] = tables.at_budgets(dict.fromkeys(tasks.TASKS, 1.0))["0.3"]["reward"]["all"] - none
    return found


@one_thread()
def gain_by_answers(
    config: CompareConfig, condition: str, world: int, rate: float, scale: float, cache_dir: Path | str,
    counts: Sequence[int] = (2, 4, 8, 16, 32),
) -> list[dict]:  # fmt: skip
    """Train with one constant, and measure what factors a ∝ b earn by the number of scored answers b is estimated from.

    Args:
        config: the experiment.
        condition: a name of `CONDITIONS`.
        world: number of the world.
        rate: learning rate of the policy.
        scale: s at the start.
        cache_dir: folder in which the pool is cached.
        counts: scored answers of each of the `slope_prompts` prompts per task.

    Returns:
        A row per count: condition, world, answers (per task), gain (reward above the constant at a mean KL of 0.1 nats)
        and gain_all (the same with b from all answers to the evaluation prompts).
    """
    own = pool(config.reference, str(cache_dir))
    drawn = _world(config, str(cache_dir), condition, world)
    policy, _ = _trained(config, Job("main", CONSTANT, condition, world), rate, scale, own, drawn, None)
    h, scored = (_log_ratios(own, policy, some) for some in (drawn.evaluation, drawn.scored))
    tables = AnswerTables(own, drawn.evaluation, h)

    def earned(direction: dict[str, float]) -> float:
        return tables.at_budgets(direction)["0.1"]["reward"]["all"]

    constant = earned(dict.fromkeys(tasks.TASKS, 1.0))
    most = earned(factors(_slopes_of_answers(own, drawn.evaluation, h))) - constant
    place = {"condition": condition, "world": world}
    return [
        {**place, "answers": count * config.slope_prompts, "gain_all": most,
         "gain": earned(factors(_slopes_of_answers(own, drawn.scored, scored[:, :count]))) - constant}
        for count in counts
    ]  # fmt: skip


def compare(
    config: CompareConfig,
    out: Path,
    *,
    cache_dir: Path | str,
    only: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Run the unfinished jobs, phase by phase; an interrupted experiment resumes.

    Args:
        config: the experiment.
        out: the folder: jobs.csv (`job_table`), and a file under runs for each job.
        cache_dir: folder in which the pool is cached.
        only: run only these rows of `jobs`: "7", or "7-12" with both ends.
        workers: number of processes; None: one per core.
        progress: show a bar.

    Raises:
        ValueError: `workers` is not positive, `only` names no rows, or a job needs others that are not finished.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, expected at least 1")
    rows = jobs(config)
    some = rows if only is None else [rows[i] for i in chosen_rows(only, len(rows))]
    out.mkdir(parents=True, exist_ok=True)
    job_table(config).to_csv(out / "jobs.csv")
    left = [job for job in some if not (out / "runs" / f"{job.name}.json").is_file()]
    with tqdm(total=len(some), initial=len(some) - len(left), desc="runs", unit="run", disable=hidden(progress)) as bar:
        for phase in PHASES:
            _run_all(
                config, [job for job in left if job.phase == phase], out, cache_dir, workers or cores(), bar.update
            )


def chosen_rows(only: str, rows: int) -> range:
    """Return the row numbers that "7" or "7-12" stands for.

    Raises:
        ValueError: it is neither, or a row does not exist.
    """
    first, _, last = only.partition("-")
    if first.isdecimal() and (last.isdecimal() or last == only[len(first) :]):
        found = range(int(first), int(last or first) + 1)
        if found and found[-1] < rows:
            return found
    raise ValueError(f"only: got {only!r}, expected a row from 0 to {rows - 1}, or two such as 0-{rows - 1}")


def _run_all(
    config: CompareConfig, some: Sequence[Job], out: Path, cache_dir: Path | str, workers: int,
    done: Callable[[], object],
) -> None:  # fmt: skip
    work = partial(run_job, config, out=out, cache_dir=cache_dir)
    if workers == 1 or len(some) == 1:
        for job in some:
            work(job)
            done()
        return
    # a world's contenders stand together, and the constant's job comes first
    for _ in run_side_by_side(work, some, workers=workers):
        done()
