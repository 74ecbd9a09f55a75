"""The main job on the small world: from nothing to beta(x) by task, against the entropy of the reference."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import pandas as pd
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dpoviz.beta import Beta
from dpoviz.data import tasks
from dpoviz.data.records import load_pairs, split_by_group
from dpoviz.lm import models
from dpoviz.lm.cache import code_digest
from dpoviz.lm.reference import reference_pass
from dpoviz.lm.sampling import sample_answers
from dpoviz.losses import FORMS, Form
from dpoviz.training.config import TrainConfig, alpha_for_mean
from dpoviz.training.stages import arm, held_out_table, run_variants


def quiet_libraries() -> None:
    """Turn off the progress bars of datasets and transformers: ours name what takes time."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class WorldConfig:
    """The small world: its reference model and its preference pairs.

    Attributes:
        demonstrations: answers that the reference learns from, over all tasks.
        hidden_size: width of the reference.
        layers: depth of the reference.
        problems: prompts a task that answers are sampled for.
        samples: answers sampled for each prompt, out of which pairs are made.
        pairs_per_prompt: the most pairs made of one prompt's answers.
        held_out: share of the prompts that is held out.
        entropy_samples: answers a prompt for the entropy of the reference.
        max_new_tokens: limit of a sampled answer, in tokens.
        seed: everything that is drawn.
    """

    demonstrations: int = 45_000
    hidden_size: int = 128
    layers: int = 4
    problems: int = 320
    samples: int = 8
    pairs_per_prompt: int = 4
    held_out: float = 0.25
    entropy_samples: int = 8
    max_new_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True)
class World:
    """What `small_world` returns.

    Attributes:
        reference: the tiny language model, in evaluation mode.
        tokenizer: its tokenizer.
        train: pairs to train on, with the reference's columns.
        held_out: pairs of other prompts, likewise.
        rewards: by task, the mean true reward of the reference's own samples.
        left_out: by task, the prompts for which no pair could be made: all sampled answers earn the same.
    """

    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    held_out: Dataset
    rewards: Mapping[str, float]
    left_out: Mapping[str, list[str]]


def small_world(config: WorldConfig, *, cache_dir: Path | str | None = None, progress: bool = True) -> World:
    """Train the reference, sample and label pairs from it, and pass the reference over them.

    Args:
        config: the settings.
        cache_dir: a folder in which all of it is kept for the next time, by a fingerprint of the settings and
            of the code that they drive; None keeps nothing.
        progress: show bars.
    """
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            return small_world(config, cache_dir=scratch, progress=progress)
    folder = Path(cache_dir) / f"small-world-{_fingerprint(config)}"
    if not folder.exists():
        _build(config, folder, progress)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference", trust_remote_code=False)
    facts = json.loads((folder / "facts.json").read_text())
    pairs = load_pairs(folder / "pairs.jsonl", tasks=tasks.TASKS)
    train_pairs, held_out = (
        reference_pass(
            reference,
            tokenizer,
            part,
            max_length=reference.config.max_position_embeddings,
            entropy_samples=config.entropy_samples,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            cache_dir=cache_dir,
            progress=progress,
        )
        for part in split_by_group(pairs, config.held_out, config.seed)
    )
    return World(reference, tokenizer, train_pairs, held_out, facts["rewards"], facts["left_out"])


def _fingerprint(config: object) -> str:
    """A name for what the settings give: they, the code that they drive, and PyTorch decide it."""
    parts = [json.dumps(asdict(config)), torch.__version__, code_digest(__name__)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _build(config: WorldConfig, folder: Path, progress: bool) -> None:
    """Make the reference and its labelled pairs, and move them to `folder` when they are complete."""
    demonstrations = tasks.corpus(config.demonstrations, config.seed)
    tokenizer = models.tiny_tokenizer([prompt + answer for prompt, answer in demonstrations[:6000]])
    reference = models.tiny_lm(tokenizer, hidden_size=config.hidden_size, layers=config.layers, seed=config.seed)
    models.fit_lm(reference, tokenizer, demonstrations, seed=config.seed, progress=progress)
    records, facts = _sample_pairs(reference, tokenizer, config, progress)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        reference.save_pretrained(new / "reference")
        tokenizer.save_pretrained(new / "reference")
        (new / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (new / "facts.json").write_text(json.dumps(facts))
        new.rename(folder)


def _sample_pairs(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: WorldConfig, progress: bool
) -> tuple[list[dict], dict[str, dict]]:
    """Answers sampled from the reference, in labelled pairs; and what the samples earn, by task."""
    problems = [p for task in tasks.TASKS for p in tasks.sample_problems(task, config.problems, config.seed)]
    sampled = sample_answers(
        reference,
        tokenizer([problem.prompt for problem in problems])["input_ids"],
        config.samples,
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
        progress=progress,
    )
    rng = random.Random(f"labels {config.seed}")
    records, left_out, rewards = [], {task: [] for task in tasks.TASKS}, {task: [] for task in tasks.TASKS}
    for problem, answers in zip(problems, sampled.answers, strict=True):
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        rewards[problem.task] += [tasks.reward(problem, text) for text in texts]
        pairs = tasks.label_pairs(problem, texts, config.pairs_per_prompt, rng)
        records += pairs
        if not pairs:
            left_out[problem.task].append(problem.prompt)
    means = {task: sum(values) / len(values) for task, values in rewards.items()}
    return records, {"rewards": means, "left_out": left_out}


@dataclass(frozen=True)
class DemoConfig:
    """The demo: the world and the two runs of stage 2.

    Attributes:
        world: the small world.
        inverse: settings of the run in the inverse form.
        standard: settings of the run in the standard form.
    """

    world: WorldConfig
    inverse: TrainConfig
    standard: TrainConfig

    @classmethod
    def default(cls, seed: int = 0, *, fast: bool = False, s0: float = 0.1) -> DemoConfig:
        """The demo as the README shows it; `fast` is a minute's worth, for a first look and for tests."""
        world, steps = WorldConfig(seed=seed), {}
        if fast:
            world = replace(world, demonstrations=12_000, problems=64, entropy_samples=4)
            steps = {"stage1_steps": 10, "stage2_steps": 20, "probe_every": 10, "probe_prompts": 8}
        forms = {form: TrainConfig.around(s0, form, seed=seed, **steps) for form in FORMS}
        return cls(world=world, **forms)


def demo_folder(config: DemoConfig, cache_dir: Path | str) -> Path:
    """Where a notebook keeps the checkpoints of a demo, so that the next one need not train it again."""
    return Path(cache_dir) / f"demo-{_fingerprint(config)}"


@dataclass(frozen=True)
class Demo:
    """What `run_demo` returns.

    Attributes:
        world: the small world.
        betas: by form, the trained beta.
        policies: by form, the trained policy.
        table: a row per form and held-out prompt (`beta_table`).
        history: the rows of stage 1, once for each form, and of stage 2.
        alpha: by form, beta per nat of entropy.
    """

    world: World
    betas: Mapping[Form, Beta]
    policies: Mapping[Form, PreTrainedModel]
    table: pd.DataFrame
    history: pd.DataFrame
    alpha: Mapping[Form, float]


def run_demo(
    config: DemoConfig,
    *,
    out: Path | str | None = None,
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> Demo:
    """The small world, stage 1, and stage 2 in both forms.

    Args:
        config: the settings.
        out: a folder for the checkpoints; a run that was killed goes on from there.
        cache_dir: where the small world is kept; None keeps nothing.
        progress: show bars.
    """
    world = small_world(config.world, cache_dir=cache_dir, progress=progress)
    policy = copy.deepcopy(world.reference)
    trained = run_variants(
        policy,
        world.train,
        {form: arm("network", getattr(config, form)) for form in FORMS},
        held_out=world.held_out,
        reference=world.reference,
        pad_id=world.tokenizer.pad_token_id,
        eos_id=world.tokenizer.eos_token_id,
        out=out,
        progress=progress,
    )
    betas, policies, tables, history, alpha = {}, {}, [], [], {}
    for run in trained:
        form, settings = run.name, getattr(config, run.name)
        betas[form], policies[form] = run.beta, copy.deepcopy(policy)
        history.append(run.history)
        alpha[form] = settings.alpha or alpha_for_mean(world.train["ref_entropy"], settings.beta0)
        tables.append(held_out_table(run.beta, world.held_out, form=form, seed=settings.seed))
    table, history = pd.concat(tables, ignore_index=True), pd.concat(history, ignore_index=True)
    return Demo(world, betas, policies, table, history, alpha)
