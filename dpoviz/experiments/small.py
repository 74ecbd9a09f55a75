"""The small world: a tiny reference model, and preference pairs whose true reward is known."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dpoviz.data import tasks
from dpoviz.data.records import split_by_group
from dpoviz.experiments.config import WorldConfig
from dpoviz.lm import models
from dpoviz.lm.cache import code_digest, open_entry, require_writable, write_entry
from dpoviz.lm.reference import reference_pass
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.workers import one_thread

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class World:
    """A small world: a reference model and the preference pairs sampled from it.

    Attributes:
        reference: the tiny language model, in evaluation mode.
        tokenizer: its tokenizer.
        train: pairs to train on, with the reference's columns.
        held_out: pairs of other prompts, with the same columns.
        rewards: mean true reward of the reference's samples, by task.
        left_out: prompts without a pair because all their sampled answers have the same reward, by task.
    """

    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    held_out: Dataset
    rewards: Mapping[str, float]
    left_out: Mapping[str, list[str]]


@one_thread()
def small_world(config: WorldConfig, *, cache_dir: Path | str | None = None, progress: bool = True) -> World:
    """Train the reference, sample and label pairs from it, and score them with it.

    The world does not depend on the number of cores: training always uses two threads, all else one.

    Args:
        config: the settings.
        cache_dir: a folder that caches all of it, by a fingerprint of the settings and the code; None: no cache.
        progress: show bars.
    """
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            return small_world(config, cache_dir=scratch, progress=progress)
    folder = Path(cache_dir) / f"small-world-{config_digest(config, __name__)}"
    built = open_entry(folder, _read)
    if built is None:
        require_writable(folder.parent, "cache")
        _build(config, folder, progress)
        built = _read(folder)
    reference, tokenizer, facts, pairs = built
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


def config_digest(config: DataclassInstance, module: str) -> str:
    """Return a digest of the settings, the code of a module, and the version of PyTorch: the key of a cache entry."""
    parts = [json.dumps(asdict(config)), torch.__version__, code_digest(module)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def pretrain(config: WorldConfig, *, progress: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train the reference of a small world on its demonstrations; return it with its tokenizer."""
    demonstrations = tasks.corpus(config.demonstrations, config.seed)
    tokenizer = models.tiny_tokenizer([prompt + answer for prompt, answer in demonstrations[:6000]])
    reference = models.tiny_lm(tokenizer, hidden_size=config.hidden_size, layers=config.layers, seed=config.seed)
    models.fit_lm(reference, tokenizer, demonstrations, seed=config.seed, progress=progress)
    return reference, tokenizer


def _build(config: WorldConfig, folder: Path, progress: bool) -> None:
    """Make the reference and its labelled pairs, and store them in `folder` once they are complete."""
    reference, tokenizer = pretrain(config, progress=progress)
    records, facts = _sample_pairs(reference, tokenizer, config, progress)

    def write(place: Path) -> None:
        reference.save_pretrained(place / "reference")
        tokenizer.save_pretrained(place / "reference")
        (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (place / "facts.json").write_text(json.dumps(facts))

    write_entry(folder, write)


def _read(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, dict], Dataset]:
    """Return what `_build` stored: the reference, its tokenizer, facts and pairs."""
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", trust_remote_code=False).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "reference", trust_remote_code=False)
    facts = json.loads((folder / "facts.json").read_text())
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    # not load_pairs, which refuses a chosen answer with the lower reward: some labels are noise
    pairs = Dataset.from_list([{**json.loads(text), "line": i} for i, text in enumerate(lines, start=1)])
    return reference, tokenizer, facts, pairs


def _sample_pairs(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: WorldConfig, progress: bool
) -> tuple[list[dict], dict[str, dict]]:
    """Return labelled pairs of answers sampled from the reference; and rewards and prompts without a pair, by task."""
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
    records: list[dict] = []
    left_out: dict[str, list[str]] = {task: [] for task in tasks.TASKS}
    rewards: dict[str, list[float]] = {task: [] for task in tasks.TASKS}
    for problem, answers in zip(problems, sampled.answers, strict=True):
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        rewards[problem.task] += [tasks.reward(problem, text) for text in texts]
        pairs = tasks.label_pairs(problem, texts, config.pairs_per_prompt, rng)
        records += pairs
        if not pairs:
            left_out[problem.task].append(problem.prompt)
    means = {task: sum(values) / len(values) for task, values in rewards.items()}
    return records, {"rewards": means, "left_out": left_out}
