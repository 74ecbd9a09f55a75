"""Re-tilt the policies of a finished run: load them, and sample and reward answers along a sweep of a."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.analysis.tables import in_order, read_table
from dpoviz.data import tasks
from dpoviz.data.tokens import end_id
from dpoviz.experiments.config import DemoConfig, RealConfig
from dpoviz.experiments.options import read_settings
from dpoviz.experiments.real import load
from dpoviz.experiments.retilt_config import RetiltConfig
from dpoviz.experiments.small import small_world
from dpoviz.lm.cache import read_json
from dpoviz.lm.models import require_peft
from dpoviz.lm.processes import processes
from dpoviz.lm.retilt import retilt_table, score_retilted

Reward = Callable[[str, str, str], float]
"""The reward of an answer: (prompt, answer, task) -> number."""

HALVES = ("choose", "evaluate")
"""The halves of the prompts: the first chooses an allocation, the second measures it."""


class Prompt(NamedTuple):
    """A held-out prompt.

    Attributes:
        task: its task.
        prompt: its text.
        group: the prompts that belong together have the same.
        half: one of `HALVES`.
        ids: its tokens.
    """

    task: str
    prompt: str
    group: str
    half: str
    ids: list[int]


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run has to be re-tilted.

    Attributes:
        folder: its folder.
        command: "demo" or "train".
        reference: the model it started from, without adapters.
        tokenizer: its tokenizer.
        held_out: its held-out pairs, tokenised.
        scores: its held_out.csv, a row per variant and held-out pair.
        adapters: whether its policies are adapters.
        max_new_tokens: its limit of a sampled answer.
        verifier: the reward that comes with its data, or None.
    """

    folder: Path
    command: str
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    held_out: Dataset
    scores: pd.DataFrame
    adapters: bool
    max_new_tokens: int
    verifier: Reward | None


def require_run(folder: Path, config: RetiltConfig) -> list[str]:
    """Return the variants to re-tilt of a finished run.

    Raises:
        ValueError: the folder holds no finished run of `demo` or `train`, or a variant is not one of its.
    """
    missing = [name for name in ("config.json", "run.json", "held_out.csv") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: holds no finished run, {', '.join(missing)} is missing; run it to its end first")
    command = read_json(folder / "config.json").get("command")
    if command not in ("demo", "train"):
        raise ValueError(f"{folder}: holds a run of dpoviz {command}, expected one of demo or train")
    there = [path.parent.name for path in sorted(folder.glob("*/policy"))]
    unknown = [name for name in config.variants if name not in there]
    if unknown or not there:
        raise ValueError(f"variants: got {unknown}, expected some of {there}, the policies in {folder}")
    return list(config.variants) or there


def named_reward(name: str) -> Reward:
    """Return the function that module:function names; the module may lie in the working directory.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: got {name!r}, expected module:function ({error})") from error
    if not callable(found):
        raise ValueError(f"reward: got {name!r}, which is a {type(found).__name__}, expected a function")
    return found


def checked(reward: Reward) -> Callable[[Prompt, str], float]:
    """Return the reward as a function of a `Prompt` and an answer that refuses what is not a finite number."""

    def number(prompt: Prompt, answer: str) -> float:
        value: Any = reward(prompt.prompt, answer, prompt.task)
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise ValueError(
                f"reward: got {value!r} for the answer {answer[:60]!r} to {prompt.prompt[:60]!r}, expected a finite "
                "number"
            )
        return float(value)

    return number


def open_run(
    folder: Path, *, cache_dir: Path | str | None, max_new_tokens: int | None = None, progress: bool = True
) -> FinishedRun:
    """Load the reference and the held-out pairs of a finished run; a small world that is not cached is made again."""
    file = folder / "config.json"
    command = read_json(file)["command"]
    scores = read_table(folder / "held_out.csv")
    if command == "demo":
        demo = read_settings(file, DemoConfig.default(), "demo")
        world = small_world(demo.world, cache_dir=cache_dir, progress=progress)
        limit = max_new_tokens or demo.world.max_new_tokens
        verifier = _verifier(demo)
        return FinishedRun(
            folder, command, world.reference, world.tokenizer, world.held_out, scores, False, limit, verifier
        )
    real = read_settings(file, RealConfig(), "train")
    if real.lora_rank:
        require_peft()
    loaded = load(real, training=False)
    limit = max_new_tokens or real.training.max_new_tokens
    model, tokenizer = loaded.model, loaded.tokenizer
    return FinishedRun(folder, command, model, tokenizer, loaded.held_out, scores, real.lora_rank > 0, limit, None)


def _verifier(config: DemoConfig) -> Reward:
    world = config.world
    problems = {p.prompt: p for task in tasks.TASKS for p in tasks.sample_problems(task, world.problems, world.seed)}
    return lambda prompt, answer, task: tasks.reward(problems[prompt], answer)


def prompts_in_halves(held_out: Dataset, *, most: int | None, seed: int) -> list[Prompt]:
    """Return the held-out prompts, at most `most` per task, of which each task's are halved; groups stay together.

    Raises:
        ValueError: a task has prompts of fewer than two groups.
    """
    rows = held_out.to_pandas().drop_duplicates(["task", "prompt"])
    rows["group"] = rows["group"].where(rows["group"].notna(), rows["prompt"]) if "group" in rows else rows["prompt"]
    found = []
    for task in in_order(rows["task"]):
        own = rows[rows["task"] == task]
        groups = list(own["group"].unique())
        random.Random(f"halves {seed} {task}").shuffle(groups)
        if most is not None:
            kept = own.groupby("group").size()[groups].cumsum()
            groups = [group for group in groups if kept[group] <= most]
        if len(groups) < 2:
            raise ValueError(
                f"prompts: got {len(groups)} held-out groups of prompts of {task!r}, expected at least 2, one to "
                "choose and one to measure; hold more pairs out"
            )
        first = set(groups[: (len(groups) + 1) // 2])
        for row in own[own["group"].isin(groups)].itertuples():
            half = HALVES[row.group not in first]
            found.append(Prompt(task, row.prompt, str(row.group), half, [int(i) for i in row.prompt_ids]))
    return found


def _loader(run: FinishedRun) -> Callable[[str], tuple[Any, Any]]:
    """Return a function from a variant to its policy and reference; a later call replaces an earlier one's adapter."""
    if not run.adapters:

        def whole(name: str) -> tuple[Any, Any]:
            path = run.folder / name / "policy"
            policy: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            return policy.to(processes().device).eval(), run.reference

        return whole
    from peft import PeftModel

    held: list[Any] = []

    def adapter(name: str) -> tuple[Any, Any]:
        path = str(run.folder / name / "policy")
        if held:
            held[0].load_adapter(path, adapter_name=name)
        else:
            held.append(PeftModel.from_pretrained(run.reference, path, adapter_name=name))
        held[0].set_adapter(name)
        return held[0].eval(), held[0]

    return adapter


def sweep(run: FinishedRun, variants: list[str], config: RetiltConfig, *, progress: bool = True) -> pd.DataFrame:
    """Sample answers of the variants' re-tilted policies at held-out prompts.

    Returns:
        A row per variant, factor, prompt and answer: variant, and the columns of `retilt_table`, group and half
        (one of `HALVES`). Without a reward, `reward` is a·E[h]/4 over the prompt's held-out pairs: the win rate
        against the reference, above a half, to leading order in a.

    Raises:
        ValueError: as `prompts_in_halves` and `sample_retilted`; the reward returns something other than a finite
            number; the run's own log-ratios cannot be reproduced.
    """
    prompts = prompts_in_halves(run.held_out, most=config.prompts, seed=config.seed)
    reward = named_reward(config.reward) if config.reward else run.verifier
    place = {(prompt.task, prompt.prompt): (prompt.group, prompt.half) for prompt in prompts}
    parts, load_variant = [], _loader(run)
    for name in variants:
        policy, reference = load_variant(name)
        _require_same_ratios(run, name, policy, reference)
        found = retilt_table(
            policy,
            reference,
            run.tokenizer,
            prompts,
            config.factors,
            samples=config.samples,
            max_new_tokens=run.max_new_tokens,
            seed=config.seed,
            batch_size=config.batch,
            reward=None if reward is None else checked(reward),
            prompt_ids=[prompt.ids for prompt in prompts],
            eos_id=end_id(run.held_out),
            progress=f"{name}, sweep of a" if progress else False,
        )
        where = [place[key] for key in zip(found["task"], found["prompt"], strict=True)]
        found["group"], found["half"] = [g for g, _ in where], [h for _, h in where]
        if reward is None:
            own = run.scores[run.scores["variant"] == name].groupby(["task", "prompt"])["h"].mean()
            found["reward"] = found["a"] * found.join(own.rename("mean"), on=["task", "prompt"])["mean"] / 4
        parts.append(found.assign(variant=name))
    return pd.concat(parts, ignore_index=True)


_CHECKED = 8
"""Held-out pairs whose h is computed again before a policy is used."""


def _require_same_ratios(run: FinishedRun, name: str, policy: Any, reference: Any) -> None:
    """Raise unless policy and reference give the h that the run has recorded: else they are not the run's."""
    pairs = run.held_out.select(range(min(_CHECKED, len(run.held_out))))
    recorded = run.scores[run.scores["variant"] == name].reset_index(drop=True).head(len(pairs))
    if recorded["prompt"].tolist() != pairs["prompt"][:]:
        raise ValueError(f"{run.folder}: its held-out prompts are not those of today's data; run it again")
    answers = [list(pair) for pair in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)]
    scores = score_retilted(
        policy, reference, pairs["prompt_ids"][:], answers, 1.0, pad_id=run.tokenizer.pad_token_id
    ).cpu()
    ratios = (scores[..., 1] - scores[..., 2]).numpy()
    h, expected = ratios[:, 0] - ratios[:, 1], recorded["h"].to_numpy()
    # a run in bfloat16 loses the third digit of sums over an answer; another model differs by nats
    if not np.allclose(h, expected, rtol=0.05, atol=0.1):
        worst = int(np.abs(h - expected).argmax())
        raise ValueError(
            f"{run.folder}: policy {name!r} gives h = {h[worst]:.3f} nats for a held-out pair, expected the run's "
            f"{expected[worst]:.3f}; the model or the world has changed since, run it again"
        )


def settings(config: RetiltConfig) -> dict[str, object]:
    """Return what retilt.json holds, which `--config` reads."""
    return {"command": "retilt", **asdict(config)}
