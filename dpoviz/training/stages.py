"""The two stages: one run with a fixed beta, then one run per variant of beta, all from the same weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from dpoviz.beta import Beta, ConstantBeta
from dpoviz.forms import scale
from dpoviz.lm.processes import processes
from dpoviz.lm.workers import one_thread, started
from dpoviz.rules import Rule
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import TrainResult, train
from dpoviz.training.methods import build


@dataclass(frozen=True)
class Variant:
    """One run of stage 2.

    Attributes:
        config: its settings.
        make: builds its initial beta or rule; called as ``make(pairs, vocabulary=V)`` with the training pairs.
    """

    config: TrainConfig
    make: Callable[..., Beta | Rule]

    @classmethod
    def of(cls, rule: str, config: TrainConfig, strength: float | None = None) -> Variant:
        """Return the variant of a rule of `RULES`, given its name and the value of its hyperparameter."""
        return cls(config, partial(build, rule, config, strength=strength))


@dataclass(frozen=True)
class TrainedVariant:
    """The result of one variant. The policy holds its weights until the next variant is requested.

    Attributes:
        name: of the variant.
        config: its settings.
        beta: the trained beta or rule.
        result: history of stage 1, in this variant's form and beta, and of stage 2; alpha; held-out log-ratios.
    """

    name: str
    config: TrainConfig
    beta: Beta | Rule
    result: TrainResult


def run_variants(
    policy: PreTrainedModel,
    pairs: Dataset,
    variants: Mapping[str, Variant],
    *,
    held_out: Dataset,
    reference: PreTrainedModel,
    pad_id: int,
    eos_id: int,
    out: Path | str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Iterator[TrainedVariant]:
    """Run stage 1 once, then stage 2 for each variant, all from the same weights.

    Stage 1 runs once because with a fixed beta the two forms are the same loss where they start at the same
    scale.

    Args:
        policy: trained in place; equal to the reference at the start. It holds the weights of the variant that was
            yielded last. Weights that are not trainable are never copied.
        pairs: pairs scored by `reference_pass`.
        variants: by name.
        held_out: scored pairs of other prompts.
        reference: for the KL; the policy itself if it is a PEFT model.
        pad_id: id of the padding token.
        eos_id: id of the token that ends an answer.
        out: a folder for the checkpoints, from which a run that was killed resumes.
        workers: the number of variants that are trained side by side, in processes of one thread each, with the same
            result as in turn on one thread; needs `out`. On an accelerator, or in a distributed run, they are trained
            in turn.
        progress: show a bar.

    Raises:
        ChildProcessError: a worker process was killed.
        ValueError: the variants do not start at the same scale, or with as many steps of stage 1.
    """
    starts = {
        (round(scale(own.config.beta0, own.config.form), 12), own.config.stage1_steps) for own in variants.values()
    }
    if len(starts) != 1:
        raise ValueError(f"variants: got starts at scales and steps {sorted(starts)}, expected one start for all")
    common: dict[str, Any] = {"pad_id": pad_id, "eos_id": eos_id, "held_out": held_out, "reference": reference}
    place = (lambda name: None) if out is None else (lambda name: Path(out) / name)
    vocabulary = policy.config.get_text_config().vocab_size
    betas = {name: own.make(pairs, vocabulary=vocabulary) for name, own in variants.items()}  # what is wrong fails here
    first = next(iter(variants.values())).config
    fixed = ConstantBeta(first.beta0)
    stage1 = train(policy, fixed, pairs, first, stage=1, out=place("stage1"), progress=progress, **common)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trainable.items()}

    def stage2(name: str) -> TrainedVariant:
        with torch.no_grad():
            for key, parameter in trainable.items():
                parameter.copy_(start[key])
        config = variants[name].config
        result = train(policy, betas[name], pairs, config, stage=2, out=place(name), progress=progress, **common)
        return TrainedVariant(name, config, betas[name], _joined(stage1, result, config))

    if workers == 1 or out is None or processes().num_processes > 1 or processes().device.type != "cpu":
        yield from map(stage2, variants)
        return
    # pickled here: as bytes, the weights are copied, not put into memory that the processes share
    configs = {name: own.config for name, own in variants.items()}
    given = pickle.dumps((policy, betas, pairs, configs, Path(out), common))
    names = list(variants)
    with one_thread(), started(partial(_train_ahead, given), names[1:], workers=workers - 1) as waits:
        yield stage2(names[0])
        for name, wait in zip(names[1:], waits, strict=True):
            wait()
            yield stage2(name)  # from the worker's last checkpoint


def _train_ahead(given: bytes, name: str) -> None:
    """Run stage 2 of a variant to its end, and leave the last checkpoint; for a worker process."""
    policy, betas, pairs, configs, out, common = pickle.loads(given)
    train(policy, betas[name], pairs, configs[name], stage=2, out=out / name, progress=False, **common)


def _joined(stage1: TrainResult, stage2: TrainResult, config: TrainConfig) -> TrainResult:
    """Put the history of stage 1, in a variant's form and beta, before that of stage 2."""
    fixed = {column: config.beta0 for column in stage1.history if column.startswith("beta/")}
    first = stage1.history.assign(form=config.form, **fixed)
    # a rule that is not a function of the prompt has no betas in stage 2
    before = [stage1.betas.assign(beta=np.float32(config.beta0))] if len(stage2.betas) else []
    betas = pd.concat([*before, stage2.betas], ignore_index=True)
    return TrainResult(pd.concat([first, stage2.history], ignore_index=True), stage2.alpha, stage2.held_out, betas)


@torch.no_grad()
def betas_at(beta: Beta, pairs: Dataset) -> pd.DataFrame:
    """Return beta at each prompt of the pairs, once per prompt: task, prompt, beta, ref_entropy, ref_entropy_se."""
    rows = pairs.to_pandas().drop_duplicates("prompt")
    device = next(beta.parameters(), torch.empty(0)).device
    entropy = torch.tensor(rows["ref_entropy"].to_numpy(), device=device)
    x = torch.tensor(np.stack(rows["ref_features"]), device=device)
    values = beta.eval()(x, task=rows["task"].tolist(), ref_entropy=entropy)
    columns = rows[["task", "prompt", "ref_entropy", "ref_entropy_se"]].reset_index(drop=True)
    return columns.assign(beta=values.double().cpu().numpy())
