"""The pipeline of every run: scored pairs → stages → tables → folder."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.analysis.diagnose import reference_ranks
from dpoviz.analysis.tables import beta_table, write_parquet
from dpoviz.beta import Beta, MadeFor
from dpoviz.data.records import pairs_table
from dpoviz.data.tokens import end_id
from dpoviz.experiments.folder import environment, write_tables
from dpoviz.experiments.kept import frozen_rows, frozen_table, reference_record, save_if_small
from dpoviz.forms import Form
from dpoviz.lm.models import add_lora
from dpoviz.lm.processes import processes
from dpoviz.lm.reference import reference_columns
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import FEATURES
from dpoviz.rules import PromptRule
from dpoviz.training.config import TrainConfig
from dpoviz.training.probes import log_ratios, pulls_at
from dpoviz.training.stages import TrainedVariant, Variant, betas_at, run_variants
from dpoviz.training.state import regularization_of


@dataclass(frozen=True)
class ScoredPairs:
    """The reference and the pairs that it has scored.

    Attributes:
        model: the reference.
        tokenizer: its tokenizer.
        train: pairs to train on, with the reference's columns (`reference_pass`).
        held_out: pairs of other prompts, with the same columns.
        entropy: a row per estimator and prompt: estimator, task, prompt, entropy, se, example; None if the run does not
            compare estimators.
        metadata: further values to show in the report, by name.
        seconds: seconds spent so far, by part of the work.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset
    entropy: pd.DataFrame | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The tables of a finished run.

    Attributes:
        table: beta at each held-out prompt, a row per form and prompt (`beta_table`); empty if beta is not a function
            of the prompt.
        history: the histories of training; the column `variant` names the variant.
        scores: a row per variant and held-out pair: variant, form, task, group, prompt, chosen, rejected (log π/π_ref
            of the two answers) and h, their difference; ref_chosen, ref_rejected (log π_ref of them), all in nats;
            chosen_tokens, rejected_tokens (their lengths).
        answers: a row per variant and displayed prompt: variant ("reference" before training), task, prompt, answer.
        alpha: beta per nat of entropy, by form.
        entropy: as in `ScoredPairs`.
        betas: beta at each held-out prompt after each logged step: form, step, prompt (its row among those of the form
            in `table`), beta.
        pulls: the pull of each term on beta at each held-out prompt after the last step: form, task, prompt, and a
            column per term (`pulls_at`).
    """

    table: pd.DataFrame
    history: pd.DataFrame
    scores: pd.DataFrame
    answers: pd.DataFrame
    alpha: Mapping[Form, float]
    entropy: pd.DataFrame | None
    betas: pd.DataFrame
    pulls: pd.DataFrame


def run(
    scored: ScoredPairs,
    variants: Mapping[str, Variant],
    *,
    out: Path,
    baseline: str | None = None,
    lora_rank: int = 0,
    answers: int = 3,
    workers: int = 1,
    progress: bool = True,
) -> Results:
    """Train every variant on the scored pairs; save its policy and beta, then the tables, in a folder.

    Args:
        scored: the pairs.
        variants: by name.
        out: the folder of results and checkpoints; a run that was killed resumes from it.
        baseline: the variant that the others are compared with; its beta is not drawn.
        lora_rank: rank of the adapters; 0 trains all weights of a copy of the model. With adapters, the model holds
            those of the last variant afterwards.
        answers: held-out prompts per task whose answers before and after training are saved.
        workers: the number of variants that are trained side by side (`run_variants`).
        progress: show bars.
    """
    began = time.monotonic()
    seed = next(iter(variants.values())).config.seed
    record = reference_record(scored.model, scored.held_out)
    if processes().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        save_if_small(scored.model, scored.tokenizer, out / "reference")
    policy: Any  # a model, or PEFT's around it
    reference: Any
    if lora_rank:
        policy = reference = add_lora(scored.model, rank=lora_rank, seed=seed)
    else:
        policy, reference = copy.deepcopy(scored.model), scored.model
    shown = scored.held_out.to_pandas().drop_duplicates("prompt").groupby("task").head(answers)
    parts = _Parts()
    first = next(iter(variants.values())).config
    parts.answers.append(_answers(policy, scored.tokenizer, shown, "reference", first))
    trained = run_variants(
        policy,
        scored.train,
        variants,
        held_out=scored.held_out,
        reference=reference,
        pad_id=scored.tokenizer.pad_token_id,
        eos_id=end_id(scored.train),
        out=out,
        workers=workers,
        progress=progress and processes().is_main_process,
    )
    some = scored.train.select(frozen_rows(len(scored.train), seed))
    for variant in trained:
        _save(variant, policy, scored.tokenizer, out, record, adapters=lora_rank > 0)
        parts.add(variant, scored.held_out, drawn=variant.name != baseline)
        parts.answers.append(_answers(policy, scored.tokenizer, shown, variant.name, variant.config))
        if variant.name != baseline:
            size, pad_id = variant.config.eval_batch_size, scored.tokenizer.pad_token_id
            ratios = log_ratios(policy, some, pad_id=pad_id, batch_size=size, progress=False)
            parts.h[variant.config.form] = ratios[:, 0] - ratios[:, 1]
    results = parts.results(scored.entropy)
    if processes().is_main_process:
        configs = {own.config.form: own.config for name, own in variants.items() if name != baseline}
        lines = {name: {form: getattr(c, name) for form, c in configs.items()} for name in _LINES}
        seconds = {**scored.seconds, "training": time.monotonic() - began}
        metadata = {**lines, "alpha": dict(results.alpha), "baseline": baseline, **scored.metadata}
        metadata |= {"training pairs": len(scored.train), "answers cut": _answers_cut(scored)}
        metadata |= {"reference on training pairs": reference_ranks(reference_columns(scored.train))}
        metadata |= {"reference": record, "training": {form: asdict(config) for form, config in configs.items()}}
        metadata |= {"seconds": {name: round(value, 1) for name, value in seconds.items()}, **environment()}
        frozen, pairs = frozen_table(some, parts.h), pairs_table(scored.held_out)
        write_parquet(out, beta_steps=results.betas, frozen=frozen, pairs=pairs)
        tables = {"beta": results.table, "history": results.history, "held_out": results.scores, "pulls": results.pulls}
        if scored.entropy is not None:
            tables["entropy"] = scored.entropy
        write_tables(out, metadata=metadata, **tables, answers=results.answers)
    return results


def _answers_cut(scored: ScoredPairs) -> dict[str, float]:
    """Return the fraction of the answers sampled for the entropy that hit the length limit, by task."""
    columns = ["task", "prompt", "ref_entropy_truncated"]
    rows = pd.concat([part.select_columns(columns).to_pandas() for part in (scored.train, scored.held_out)])
    return rows.drop_duplicates(["task", "prompt"]).groupby("task")["ref_entropy_truncated"].mean().to_dict()


_LINES = ("beta0", "beta_min", "beta_max")
"""The properties of a configuration that the figures draw as lines, by form."""


@dataclass
class _Parts:
    """The tables of the finished variants."""

    tables: list[pd.DataFrame] = field(default_factory=list)
    histories: list[pd.DataFrame] = field(default_factory=list)
    scores: list[pd.DataFrame] = field(default_factory=list)
    answers: list[pd.DataFrame] = field(default_factory=list)
    alpha: dict[Form, float] = field(default_factory=dict)
    betas: list[pd.DataFrame] = field(default_factory=list)
    pulls: list[pd.DataFrame] = field(default_factory=list)
    h: dict[Form, np.ndarray] = field(default_factory=dict)

    def add(self, variant: TrainedVariant, held_out: Dataset, *, drawn: bool) -> None:
        form, result = variant.config.form, variant.result
        self.histories.append(result.history.assign(variant=variant.name))
        chosen, rejected = np.asarray(result.held_out).T
        columns = {"chosen": chosen, "rejected": rejected, "h": chosen - rejected}
        rows = reference_columns(held_out)
        self.scores.append(rows.assign(variant=variant.name, form=form, **columns))
        if drawn and isinstance(variant.beta, Beta):
            self.alpha[form] = result.alpha
            columns = betas_at(variant.beta, held_out).to_dict("list")
            self.tables.append(beta_table(form=form, seed=variant.config.seed, **columns))
            betas = result.betas
            self.betas.append(betas.assign(form=form)[["form", *betas.columns]])
            weights = None
            if any(p.requires_grad for p in variant.beta.parameters()):
                weights = regularization_of(PromptRule(variant.beta), variant.config, result.alpha)
            pulls = pulls_at(variant.beta, held_out, np.asarray(result.held_out), form, weights)
            self.pulls.append(pulls.assign(form=form)[["form", *pulls.columns]])

    def results(self, entropy: pd.DataFrame | None) -> Results:
        def joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
            return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

        table, betas, pulls = joined(self.tables), joined(self.betas), joined(self.pulls)
        history, scores, answers = joined(self.histories), joined(self.scores), joined(self.answers)
        return Results(table, history, scores, answers, self.alpha, entropy, betas, pulls)


def _save(
    variant: TrainedVariant,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    reference: Mapping[str, Any],
    *,
    adapters: bool,
) -> None:
    """Save a variant's policy and beta in its folder; a rule that is not a `Beta` is not saved."""
    if not processes().is_main_process:
        return
    # else peft looks up the base model's configuration to see whether the vocabulary grew; ours did not
    more: dict[str, Any] = {"save_embedding_layers": False} if adapters else {}
    policy.save_pretrained(out / variant.name / "policy", **more)
    tokenizer.save_pretrained(out / variant.name / "policy")
    if isinstance(variant.beta, Beta):
        variant.beta.made_for = MadeFor(variant.config.form, reference["name"], reference["fingerprint"], FEATURES)
        variant.beta.save_pretrained(out / variant.name / "beta")


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shown: pd.DataFrame, name: str, config: TrainConfig
) -> pd.DataFrame:
    """Return one answer to each displayed prompt, sampled with the same seed for every variant."""
    if shown.empty:
        return pd.DataFrame(columns=["variant", "task", "prompt", "answer"])
    end = int(shown["chosen_ids"].iloc[0][-1])
    sampled = sample_answers(
        model,
        [list(ids) for ids in shown["prompt_ids"]],
        1,
        max_new_tokens=config.max_new_tokens,
        eos_id=end,
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
    ).answers
    ids = [own[:-1] if own[-1] == end else own for (own,) in sampled]  # not every end token counts as special
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return shown[["task", "prompt"]].assign(variant=name, answer=texts)
