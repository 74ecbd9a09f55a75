"""The main job on any model and any pairs: what `dpoviz train` runs, and what it leaves in its folder."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.beta import Beta
from dpoviz.data.records import as_chat, load_pairs, split_by_group
from dpoviz.data.tokens import answer_end, digest, encode_prompts, end_id, tokenize_pairs
from dpoviz.lm.cache import fingerprint
from dpoviz.lm.entropy import estimate_entropy
from dpoviz.lm.models import add_lora, load_lm
from dpoviz.lm.processes import processes
from dpoviz.lm.reference import reference_pass, require_room
from dpoviz.lm.sampling import sample_answers
from dpoviz.losses import Form, scale
from dpoviz.training.config import TrainConfig, alpha_for_mean
from dpoviz.training.methods import METHODS
from dpoviz.training.stages import Variant, arm, held_out_table, log_ratio_differences, run_variants

FIXED = "fixed"
"""The arm that goes on with the beta of stage 1."""

EXAMPLES = ("1+1=", "讲个笑话", "What is 1+1?", "Tell me a joke.")
"""Prompts whose entropy is estimated beside the data's: the derivation's own examples (§5.1.3), and English ones."""

ESTIMATORS = ("first_token", "per_token", "sequence", "monte_carlo", "teacher_forced")


@dataclass(frozen=True)
class RealConfig:
    """A run on a real model.

    Attributes:
        model: what `load_lm` takes.
        data: what `load_pairs` takes: files or folders, a hub name, or a preset's name.
        preset: the layout of a known public set, for a file of it.
        task: the task of all pairs, where they name none.
        columns: other people's column names, to ours.
        chat: tasks whose plain prompts are put to the model as a user's message.
        pairs_per_task: the most pairs a task that are used, drawn by the seed; None uses all.
        held_out: share of the prompts that is held out.
        max_length: limit of the prompt and one answer together, in tokens; longer pairs are left out and named.
        max_new_tokens: limit of a sampled answer.
        entropy_samples: answers a prompt for the entropy of the reference.
        lora_rank: rank of the adapters; 0 trains all weights.
        rule: beta of the arms, a name of `METHODS`, in the forms that it has.
        strength: the rule's one setting; None is its default.
        s0: the scale that multiplies h at the start, in both forms.
        stage1_steps: steps with the fixed beta; None: one pass over the pairs.
        stage2_steps: steps with beta(x), and of the fixed beta that it is compared with; None: one pass.
        batch_size: pairs in a step.
        eval_batch_size: pairs, or prompts with all their samples, at once where nothing is trained.
        learning_rate: of the policy; None: 1e-4 with adapters, 1e-6 without.
        answers: held-out prompts a task whose answers before and after are kept.
        seed: everything that is drawn.
    """

    model: str = "smollm2-135m"
    data: tuple[str, ...] = ()
    preset: str | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: tuple[str, ...] = ()
    pairs_per_task: int | None = None
    held_out: float = 0.25
    max_length: int = 512
    max_new_tokens: int = 64
    entropy_samples: int = 8
    lora_rank: int = 16
    rule: str = "network"
    strength: float | None = None
    s0: float = 0.1
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    batch_size: int = 8
    eval_batch_size: int = 8
    learning_rate: float | None = None
    answers: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"entropy_samples": 2, "batch_size": 1, "eval_batch_size": 1, "max_length": 2, "max_new_tokens": 1}
        whole |= {"lora_rank": 0, "answers": 0, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least {least}")
        for name in ("pairs_per_task", "stage1_steps", "stage2_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value!r}, expected at least 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out!r}, expected a share between 0 and 1")
        if not self.data:
            raise ValueError("data: got none, expected a file, a folder, a hub name or a preset")
        if self.rule not in METHODS:
            raise ValueError(f"rule: got {self.rule!r}, expected one of {', '.join(METHODS)}")
        if self.strength is not None and not METHODS[self.rule].strength:
            raise ValueError(f"strength: got {self.strength!r}, but the rule {self.rule!r} has none")
        scale(self.s0, "standard")

    def training(self, form: Form, pairs: int) -> TrainConfig:
        """The settings of one arm on so many training pairs."""
        once = max(1, pairs // self.batch_size)
        stage1, stage2 = self.stage1_steps or once, self.stage2_steps or once
        return TrainConfig.around(
            self.s0,
            form,
            stage1_steps=stage1,
            stage2_steps=stage2,
            batch_size=self.batch_size,
            policy_learning_rate=self.learning_rate or (1e-4 if self.lora_rank else 1e-6),
            warmup_steps=max(1, stage1 // 10),
            log_every=max(1, (stage1 + stage2) // 100),
            probe_every=0,  # sampling takes long on a real model
            probe_prompts=8,
            max_new_tokens=self.max_new_tokens,
            checkpoint_every=max(5, stage2 // 10),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Prepared:
    """What there is before any training.

    Attributes:
        model: the reference.
        tokenizer: its tokenizer.
        train: pairs to train on, with the reference's columns.
        held_out: pairs of other prompts, likewise.
        entropy: a row per estimator and prompt: estimator, task, prompt, entropy, se, example (whether it is one of
            `EXAMPLES`). Nats; nats per token for per_token and teacher_forced.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset
    entropy: pd.DataFrame


@dataclass(frozen=True)
class RealRun:
    """What a finished run leaves.

    Attributes:
        table: beta at each held-out prompt, a row per form and prompt (`beta_table`).
        history: rows of training; `arm` names the run.
        scores: a row per arm and held-out pair: arm, form, task, group, prompt, h (nats).
        answers: a row per arm and prompt shown: arm ("reference" before training), task, prompt, answer.
        alpha: by form, beta per nat of entropy.
    """

    table: pd.DataFrame
    history: pd.DataFrame
    scores: pd.DataFrame
    answers: pd.DataFrame
    alpha: Mapping[Form, float]


class Loaded(NamedTuple):
    """What `load` returns: the pairs are tokenised."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset


def load(config: RealConfig) -> Loaded:
    """Model, tokenizer, and the pairs to train on and to hold out; all that can be refused is refused here.

    Raises:
        ValueError: as `load_pairs`, `load_lm`, `tokenize_pairs` and `split_by_group`; fewer pairs than a batch.
    """
    source = config.data[0] if len(config.data) == 1 else list(config.data)
    pairs = load_pairs(source, preset=config.preset, task=config.task, columns=dict(config.columns) or None)
    pairs = as_chat(pairs, config.chat) if config.chat else pairs
    # adapters learn in float32 whatever the model's own type is; all weights in bfloat16 would lose small steps
    model, tokenizer = load_lm(config.model, dtype=None if config.lora_rank else torch.float32)
    model.to(processes().device)
    pairs = tokenize_pairs(pairs, tokenizer, config.max_length, too_long="drop")
    require_room(model, pairs, config.max_length, config.max_new_tokens)
    if config.pairs_per_task is not None:
        pairs = _some(pairs, config.pairs_per_task, config.seed)
    train_pairs, held_out = split_by_group(pairs, config.held_out, config.seed)
    if len(train_pairs) < config.batch_size:
        raise ValueError(
            f"data: {len(train_pairs)} pairs are left to train on, expected at least batch_size = {config.batch_size}"
        )
    return Loaded(model, tokenizer, train_pairs, held_out)


def _some(pairs: Dataset, per_task: int, seed: int) -> Dataset:
    of_task: dict[str, list[int]] = {}
    for i, task in enumerate(pairs["task"]):
        of_task.setdefault(task, []).append(i)
    rows = []
    for task, members in sorted(of_task.items()):
        rows += random.Random(f"pairs {seed} {task}").sample(members, min(per_task, len(members)))
    return pairs.select(sorted(rows))


def prepare(config: RealConfig, *, cache_dir: Path | str | None = None, progress: bool = True) -> Prepared:
    """Load, and pass the reference over the pairs and over the examples.

    Args:
        config: the settings.
        cache_dir: where the pass of the reference is kept, also half done; None keeps nothing.
        progress: show bars.
    """
    return score(config, load(config), cache_dir=cache_dir, progress=progress)


def score(config: RealConfig, loaded: Loaded, *, cache_dir: Path | str | None, progress: bool = True) -> Prepared:
    """The reference's pass over what `load` returned, and over the examples."""
    model, tokenizer = loaded.model, loaded.tokenizer
    scored = [
        reference_pass(
            model,
            tokenizer,
            part,
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
            entropy_samples=config.entropy_samples,
            batch_size=config.eval_batch_size,
            seed=config.seed,
            cache_dir=cache_dir,
            progress=progress,
        )
        for part in (loaded.train, loaded.held_out)
    ]
    examples = _examples(config, model, tokenizer, cache_dir, progress)
    entropy = pd.concat([*(entropy_table(part) for part in scored), examples])
    return Prepared(model, tokenizer, *scored, entropy.reset_index(drop=True))


def entropy_table(scored: Dataset) -> pd.DataFrame:
    """The estimates of `reference_pass`, a row per estimator and prompt: estimator, task, prompt, entropy, se.

    `teacher_forced` is that of the prompt's first pair and has no standard error.
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
        max_new_tokens=config.max_new_tokens,
        eos_id=answer_end(tokenizer, messages[0]),
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
        batch_size=config.eval_batch_size,
        keep=cache_dir,
        progress=progress,
    )
    parts = []
    for estimator in ESTIMATORS[:-1]:
        value, se = getattr(estimates, estimator)
        parts.append(pd.DataFrame({"estimator": estimator, "prompt": EXAMPLES, "entropy": value, "se": se}))
    return pd.concat(parts, ignore_index=True).assign(task="example", example=True)


def run_folder(config: RealConfig, prepared: Prepared, cache_dir: Path | str) -> Path:
    """Where a notebook keeps a run that need not be trained again; another folder as soon as anything differs."""
    pairs = [digest(part) for part in (prepared.train, prepared.held_out)]
    return Path(cache_dir) / f"run-{fingerprint(prepared.model, [asdict(config), pairs, torch.__version__], __name__)}"


def arms(config: RealConfig, prepared: Prepared) -> dict[str, Variant]:
    """The runs of stage 2: the rule in each form that it has, and the fixed beta that they are compared with."""
    settings = {form: config.training(form, len(prepared.train)) for form in METHODS[config.rule].forms}
    found = {form: arm(config.rule, own, config.strength) for form, own in settings.items()}
    return {**found, FIXED: arm("constant", config.training("standard", len(prepared.train)))}


def run_real(config: RealConfig, prepared: Prepared, *, out: Path, progress: bool = True) -> RealRun:
    """Stage 1, and stage 2 in each arm; trained policies and betas are left in `out`/<arm>.

    Args:
        config: the settings.
        prepared: what `prepare` returned. Its model gets an adapter, whose weights are those of the last arm
            afterwards; without adapters it is copied.
        out: the folder, also of the checkpoints; a run that was killed goes on from there.
        progress: show bars.
    """
    tokenizer, held_out = prepared.tokenizer, prepared.held_out
    progress = progress and processes().is_main_process
    if config.lora_rank:
        policy = reference = add_lora(prepared.model, rank=config.lora_rank, seed=config.seed)
    else:
        policy, reference = copy.deepcopy(prepared.model), prepared.model
    runs = arms(config, prepared)
    shown = held_out.to_pandas().drop_duplicates("prompt").groupby("task").head(config.answers)
    answers = [_answers(config, policy, tokenizer, shown, "reference", progress)]
    tables, histories, scores, alpha = [], [], [], {}
    for done in run_variants(
        policy,
        prepared.train,
        runs,
        held_out=held_out,
        reference=reference,
        pad_id=tokenizer.pad_token_id,
        eos_id=end_id(prepared.train),
        out=out,
        progress=progress,
    ):
        settings = runs[done.name].config
        # peft would look for the base model's configuration, to see whether its vocabulary grew: ours did not
        whole = {"save_embedding_layers": False} if config.lora_rank else {}
        if processes().is_main_process:
            policy.save_pretrained(out / done.name / "policy", **whole)
            tokenizer.save_pretrained(out / done.name / "policy")
            if isinstance(done.beta, Beta):
                done.beta.save_pretrained(out / done.name / "beta")
        histories.append(done.history.assign(arm=done.name))
        if isinstance(done.beta, Beta) and done.name != FIXED:
            tables.append(held_out_table(done.beta, held_out, form=settings.form, seed=config.seed))
            alpha[settings.form] = settings.alpha or alpha_for_mean(prepared.train["ref_entropy"], settings.beta0)
        h = log_ratio_differences(
            policy, held_out, pad_id=tokenizer.pad_token_id, batch_size=config.eval_batch_size, progress=progress
        )
        rows = held_out.to_pandas()[["task", "group", "prompt"]]
        scores.append(rows.assign(arm=done.name, form=settings.form, h=h))
        answers.append(_answers(config, policy, tokenizer, shown, done.name, progress))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    joined = [pd.concat(parts, ignore_index=True) for parts in (histories, scores, answers)]
    return RealRun(table, *joined, alpha)


def _answers(
    config: RealConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shown: pd.DataFrame,
    arm: str,
    progress: bool,
) -> pd.DataFrame:
    """One answer to each shown prompt, drawn with the same seed in every arm."""
    if shown.empty:
        return pd.DataFrame(columns=["arm", "task", "prompt", "answer"])
    end = int(shown["chosen_ids"].iloc[0][-1])
    drawn = sample_answers(
        model,
        [list(ids) for ids in shown["prompt_ids"]],
        1,
        max_new_tokens=config.max_new_tokens,
        eos_id=end,
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
        progress=progress,
    ).answers
    ids = [own[0][:-1] if own[0][-1] == end else own[0] for own in drawn]  # not every end token counts as special
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return shown[["task", "prompt"]].assign(arm=arm, answer=texts)
