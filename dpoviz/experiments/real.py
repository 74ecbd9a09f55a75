"""Train on any model and any pairs, as `dpoviz train` does."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.analysis.plots import plot_entropy_estimators
from dpoviz.analysis.tables import write_table
from dpoviz.data.records import as_chat, load_pairs, split_by_group
from dpoviz.data.tokens import answer_end, digest, encode_prompts, tokenize_pairs
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.folder import write_config
from dpoviz.experiments.pipeline import Results, ScoredPairs, run
from dpoviz.lm.cache import fingerprint
from dpoviz.lm.entropy import estimate_entropy
from dpoviz.lm.models import LanguageModel, load_lm, lora_targets, random_lm, require_peft
from dpoviz.lm.processes import in_its_precision, processes
from dpoviz.lm.reference import reference_pass, require_room
from dpoviz.training.methods import require_column, require_rule
from dpoviz.training.stages import Variant

FIXED = "fixed"
"""The variant that continues with the beta of stage 1."""

RANDOM = "random:"
"""Beginning of the name of a model with random weights, before its size."""

EXAMPLES = ("1+1=", "讲个笑话", "What is 1+1?", "Tell me a joke.")
"""Further prompts whose entropy is estimated: the derivation's examples (§5.1.3), and English ones."""

ESTIMATORS = ("first_token", "per_token", "sequence", "monte_carlo", "teacher_forced")


class Loaded(NamedTuple):
    """A model, its tokenizer, and tokenised pairs, as `load` returns them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset


def load(config: RealConfig, *, training: bool = True) -> Loaded:
    """Load the model, the tokenizer, and the pairs to train on and to hold out.

    Args:
        config: the settings.
        training: also check what training needs: the rule, the adapters, and at least one batch of pairs.

    Raises:
        ValueError: as `load_whole` and `split_by_group`; or fewer pairs than a batch.
        ImportError: adapters are to be trained and peft is not installed.
    """
    model, tokenizer, pairs = load_whole(config, training=training)
    train_pairs, held_out = split_by_group(pairs, config.held_out, config.training.seed)
    if training:
        size = config.settings(len(train_pairs)).batch_size
        assert size is not None  # filled in
        if len(train_pairs) < size:
            raise ValueError(
                f"data: {len(train_pairs)} pairs are left to train on, expected at least batch_size = {size}"
            )
    return Loaded(model, tokenizer, train_pairs, held_out)


def load_whole(
    config: RealConfig, *, training: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset]:
    """Load the model, on its device, the tokenizer, and all tokenised pairs, none held out.

    Args:
        config: the settings.
        training: also check what training needs: the rule and the adapters.

    Raises:
        ValueError: as `load_pairs`, `load_lm` and `tokenize_pairs`.
        ImportError: adapters are to be trained and peft is not installed.
    """
    config.require_data()
    if training:
        require_rule(config.rule, config.strength)
        if config.lora_rank:
            require_peft()
    source = config.data[0] if len(config.data) == 1 else list(config.data)
    pairs = load_pairs(
        source,
        preset=config.preset,
        task=config.task,
        columns=dict(config.columns) or None,
        ignore_columns=config.ignore_columns,
    )
    if training:
        require_column(config.rule, pairs)
    pairs = as_chat(pairs, config.chat) if config.chat else pairs
    model, tokenizer = _language_model(config, pairs)
    if training and config.lora_rank:
        lora_targets(model)  # raises if no adapter fits the model
    model.to(processes().device)
    pairs = tokenize_pairs(pairs, tokenizer, config.max_length, too_long="drop")
    require_room(model, pairs, config.max_length, config.training.max_new_tokens)
    if config.pairs_per_task is not None:
        pairs = _some(pairs, config.pairs_per_task, config.training.seed)
    return model, tokenizer, pairs


def _language_model(config: RealConfig, pairs: Dataset) -> LanguageModel:
    if config.model.startswith(RANDOM):
        texts = [row[name] for row in pairs for name in ("prompt", "chosen", "rejected")]
        size = config.model.removeprefix(RANDOM)
        return random_lm(size, texts, dtype=config_dtype(config) or torch.float32, device=processes().device)
    return load_lm(config.model, dtype=config_dtype(config), four_bit=config.four_bit)


def config_dtype(config: RealConfig) -> torch.dtype | None:
    """Return the type of the model's weights; None: as the device has it."""
    # adapters are trained in float32 whatever the model's dtype; all weights in bfloat16 would lose small updates
    if not config.lora_rank:
        return torch.float32
    return None if config.precision == "auto" else getattr(torch, config.precision)


def _some(pairs: Dataset, per_task: int, seed: int) -> Dataset:
    of_task: dict[str, list[int]] = {}
    for i, task in enumerate(pairs["task"]):
        of_task.setdefault(task, []).append(i)
    rows = []
    for task, members in sorted(of_task.items()):
        rows += random.Random(f"pairs {seed} {task}").sample(members, min(per_task, len(members)))
    return pairs.select(sorted(rows))


@in_its_precision
def score(config: RealConfig, loaded: Loaded, *, cache_dir: Path | str | None, progress: bool = True) -> ScoredPairs:
    """Score the pairs of `load` with the reference, and estimate its entropy at the examples."""
    began = time.monotonic()
    model, tokenizer = loaded.model, loaded.tokenizer
    train, held_out = (
        score_pairs(config, model, tokenizer, part, cache_dir=cache_dir, progress=progress)
        for part in (loaded.train, loaded.held_out)
    )
    examples = _examples(config, model, tokenizer, cache_dir, progress)
    entropy = pd.concat([*(entropy_table(part) for part in (train, held_out)), examples])
    seconds = {"reference": time.monotonic() - began}
    return ScoredPairs(model, tokenizer, train, held_out, entropy.reset_index(drop=True), seconds=seconds)


@in_its_precision
def score_pairs(
    config: RealConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    cache_dir: Path | str | None,
    progress: bool = True,
) -> Dataset:
    """Return tokenised pairs with the reference's columns (`reference_pass`), under the settings."""
    return reference_pass(
        model,
        tokenizer,
        pairs,
        max_length=config.max_length,
        max_new_tokens=config.training.max_new_tokens,
        entropy_samples=config.entropy_samples,
        batch_size=config.training.eval_batch_size,
        static_cache=config.training.compile,
        seed=config.training.seed,
        cache_dir=cache_dir,
        progress=progress,
    )


def write_entropy(out: Path, scored: ScoredPairs) -> None:
    """Write the estimates of the reference's entropy into a folder, as a table and a picture."""
    write_table(scored.entropy, out / "entropy.csv")
    figure: Any = plot_entropy_estimators(scored.entropy).figure
    figure.savefig(out / "entropy.png", dpi=150)


def entropy_table(scored: Dataset) -> pd.DataFrame:
    """Return the estimates of `reference_pass` at each prompt: estimator, task, prompt, entropy, se, example.

    `teacher_forced` is taken from the prompt's first pair; its se is 0.
    """
    rows = scored.to_pandas().drop_duplicates("prompt")
    own = {"per_token": "ref_entropy"}
    parts = []
    for estimator in ESTIMATORS:
        column = own.get(estimator, f"ref_entropy_{estimator}")
        if estimator == "teacher_forced":
            entropy = rows["ref_chosen_entropy"] / rows["chosen_ids"].map(len)
        else:
            entropy = rows[column]
        part = rows[["task", "prompt"]].assign(estimator=estimator, entropy=entropy.astype(float))
        parts.append(part.assign(se=rows[f"{column}_se"].astype(float) if f"{column}_se" in rows else 0.0))
    return pd.concat(parts, ignore_index=True).assign(example=False)


def _examples(
    config: RealConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path | str | None,
    progress: bool,
) -> pd.DataFrame:
    chat = bool(tokenizer.chat_template)
    messages = [[{"role": "user", "content": text}] if chat else None for text in EXAMPLES]
    ids = encode_prompts(EXAMPLES, messages, tokenizer)
    estimates = estimate_entropy(
        model,
        ids,
        samples=config.entropy_samples,
        max_new_tokens=config.training.max_new_tokens,
        eos_id=answer_end(tokenizer, messages[0]),
        pad_id=tokenizer.pad_token_id,
        seed=config.training.seed,
        batch_size=config.training.eval_batch_size,
        keep=cache_dir,
        progress=progress,
    )
    parts = []
    for estimator in ESTIMATORS[:-1]:
        value, se = getattr(estimates, estimator)
        parts.append(pd.DataFrame({"estimator": estimator, "prompt": EXAMPLES, "entropy": value, "se": se}))
    return pd.concat(parts, ignore_index=True).assign(task="example", example=True)


def run_folder(config: RealConfig, scored: ScoredPairs, cache_dir: Path | str) -> Path:
    """Return the folder in which a notebook caches a run: another one if settings, pairs, model or code change."""
    pairs = [digest(part) for part in (scored.train, scored.held_out)]
    return Path(cache_dir) / f"run-{fingerprint(scored.model, [asdict(config), pairs, torch.__version__], __name__)}"


def variants(config: RealConfig, pairs: int) -> dict[str, Variant]:
    """Return the variants of stage 2: the rule in each of its forms, and the fixed beta as the baseline.

    Args:
        config: the settings.
        pairs: number of training pairs.
    """
    settings = config.settings(pairs)
    found: dict[str, Variant] = {
        form: Variant.of(config.rule, settings.in_form(form), config.strength) for form in config.forms
    }
    return {**found, FIXED: Variant.of("constant", settings.in_form("standard"))}


@in_its_precision
def run_real(config: RealConfig, scored: ScoredPairs, *, out: Path, progress: bool = True) -> Results:
    """Run stage 1, then stage 2 of each variant, on scored pairs.

    Args:
        config: the settings.
        scored: the result of `score`. Its model gets adapters, which afterwards hold the weights of the last variant;
            without adapters a copy of it is trained.
        out: the folder of results and checkpoints; a run that was killed resumes from it.
        progress: show bars.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    if processes().is_main_process:
        write_config(out, {"command": "train", **asdict(config)})
    return run(
        scored,
        variants(config, len(scored.train)),
        out=out,
        baseline=FIXED,
        lora_rank=config.lora_rank,
        answers=config.answers,
        progress=progress,
    )
