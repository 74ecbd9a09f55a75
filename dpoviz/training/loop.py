"""The training loop, on `accelerate`: DPO for a policy, with β(x) trained alongside.

Stage 1 trains the policy with a fixed beta; stage 2 continues with β(x) and all terms of the objective (the derivation,
§5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.beta import Beta
from dpoviz.data.tokens import digest
from dpoviz.forms import scale
from dpoviz.lm.processes import hidden
from dpoviz.losses import Logps, TotalLoss, gradients_on_beta, total_loss
from dpoviz.regularizers import Regularization
from dpoviz.rules import PromptRule, Rule, RuleOutput
from dpoviz.training.batch import ANSWER_ENTROPY, COLUMNS, NUMBERS, REWARD_MARGIN, Batch, require_finite, shuffled_rows
from dpoviz.training.checkpoint import Checkpoint
from dpoviz.training.config import TrainConfig
from dpoviz.training.probes import Models, betas_by_step, correctly_ranked, means_by_task, quartiles_by_task
from dpoviz.training.state import State, layers_as_set, prepare, training_mode
from dpoviz.validation import require, require_positive_rows, rows_where, trusted_values


@dataclass(frozen=True)
class TrainResult:
    """The result of one stage of training.

    Attributes:
        history: a row per logged step. Measured on the batch before its update: form, seed, stage, step (counted
            across the stages), loss, loss/<term>, accuracy (fraction of the batch with h > 0, ties half), margin (mean
            s·h), grad/<term>/<task> (mean pull of the term on one prompt's beta; see `gradients_on_beta`),
            logratio/chosen/<task> and logratio/rejected/<task> (mean log π/π_ref of the answers, nats; quartiles
            with the suffixes /q25 and /q75), grad_norm/policy and grad_norm/beta (before clipping). Measured on the
            held-out prompts after the update: beta/<task> (mean, evaluation mode), held_out_accuracy and
            held_out_accuracy/<task> (fraction of pairs with h > 0), held_out_logratio/<answer>/<task> with its
            quartiles, kl and kl_se (nats, sampled), kl/<task>.
        alpha: beta per nat of entropy.
        held_out: (N, 2) log π/π_ref of chosen and rejected of each held-out pair after the last step, in nats; None
            without held-out pairs.
        betas: beta at each distinct held-out prompt after the update of each logged step, evaluation mode: step,
            prompt (its number, in order of first appearance), beta; no rows where beta is not a function of the
            prompt.
    """

    history: pd.DataFrame
    alpha: float
    held_out: np.ndarray | None
    betas: pd.DataFrame


def train(
    policy: PreTrainedModel,
    beta: Beta | Rule,
    pairs: Dataset,
    config: TrainConfig,
    *,
    stage: int,
    pad_id: int,
    eos_id: int,
    held_out: Dataset | None = None,
    reference: PreTrainedModel | None = None,
    beta_pairs: Dataset | None = None,
    out: Path | str | None = None,
    after: Callable[[int], object] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `policy`, and with it `beta` if it is trainable. Both are changed in place.

    Under `accelerate launch` or `torchrun`, each process scores its part of a batch, and the updates match those of a
    single process.

    Args:
        policy: a causal language model, in stage 1 equal to the reference.
        beta: a `ConstantBeta` for stage 1; for stage 2 any `Beta`, or a rule of `dpoviz.rules`.
        pairs: pairs scored by `reference_pass`: token ids and the reference's columns.
        config: the settings.
        stage: 1 (DPO with `beta` alone) or 2 (all terms).
        pad_id: id of the padding token.
        eos_id: id of the token that ends an answer, for the sampled KL.
        held_out: pairs of other prompts, on which reward accuracy, beta by task and KL are measured.
        reference: the model that scored `pairs`; without it, KL is not measured. If it is the policy itself, a PEFT
            model, the reference is the policy with its adapter off.
        beta_pairs: pairs on which the policy is not trained. If given, beta is trained on them instead of `pairs`:
            there the policy cannot compensate for beta while it stands still (not from the literature).
        out: a folder for checkpoints, visible to all processes. A run that finds its own checkpoint there resumes from
            it.
        after: called after each update with the number of updates so far; it may measure policy and beta, and must
            leave them and the random state as they were. A run that resumes does not repeat calls.
        progress: show a bar.

    Raises:
        ValueError: missing columns, fewer pairs than a batch, a stage that is not 1 or 2, a rule of the standard
            form in the inverse form, missing inputs of a rule, or a checkpoint of another configuration in `out`.
        FloatingPointError: the policy's log-probabilities are not finite; the message names the step and the rows of
            `pairs`. That batch updates nothing.
    """
    rule = beta if isinstance(beta, Rule) else PromptRule(beta)
    models = Models(policy, reference, pad_id, eos_id)
    if stage == 1 or not rule.trainable:
        beta_pairs = None
    _check(models, rule, config, stage, pairs, held_out, beta_pairs)
    state = prepare(models, rule, config, stage, pairs, held_out)
    steps, offset = (config.stage1_steps, 0) if stage == 1 else (config.stage2_steps, config.stage1_steps)
    rows = shuffled_rows(len(pairs), config.batch_size, steps, seed=config.seed + stage)
    if beta_pairs is not None:
        beta_rows = shuffled_rows(len(beta_pairs), config.batch_size, steps, seed=config.seed + stage)
    identity = {} if out is None else _identity(config, stage, rule, pairs, beta_pairs)
    checkpoint = Checkpoint(state.accelerator, None if out is None else Path(out), identity)
    first, logged = checkpoint.load()
    bar = tqdm(total=steps, initial=first, desc=f"stage {stage}, {config.form}", unit="step", disable=hidden(progress))
    ratios = None

    batches = state.batches(pairs, rows[first:])
    others = repeat(None) if beta_pairs is None else state.batches(beta_pairs, beta_rows[first:])

    layers = layers_as_set(policy, checkpointing=config.gradient_checkpointing, compiled=config.compile)
    with bar, layers, training_mode(policy, dropout=config.dropout):
        for step, batch, other in zip(range(first, steps), batches, others, strict=False):
            rule.train()
            logps = state.scores(batch)  # (B, 2)
            _require_finite(logps, offset + step, rows[step])
            output = _ask(state, batch, logps, step)
            if other is None:
                losses = [_loss(state, batch, logps, output, state.regularization)]
            else:  # beta is trained on other pairs than the policy
                with torch.no_grad():
                    other_logps = state.scores(other)
                of_other = _ask(state, other, other_logps, step)
                fixed = output._replace(beta=output.beta.detach())
                losses = [
                    _loss(state, other, other_logps, of_other, state.regularization),
                    _loss(state, batch, logps, fixed, None),
                ]
            last = step == steps - 1
            log = last or step % config.log_every == 0
            row = {name: value for loss in losses for name, value in _measure(loss).items()} if log else {}
            row |= quartiles_by_task("logratio", logps.detach() - batch.ref_logps, batch.task) if log else {}

            first_loss, *rest = (loss.objective.total for loss in losses)
            norms = state.update(sum(rest, first_loss), batch, logps)
            if after is not None:
                after(step + 1)

            if log:
                probe = last or (config.probe_every > 0 and step % config.probe_every == 0)
                ratios = state.held_out_ratios() if probe else None
                place = {"form": config.form, "seed": config.seed, "stage": stage, "step": offset + step}
                row |= {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}
                logged.rows.append(place | row | state.measure(ratios))
                logged.betas |= state.betas(offset + step)
                bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.2f}", refresh=False)
            bar.update()
            if last or (step + 1) % config.checkpoint_every == 0:
                checkpoint.save(step + 1, logged)
        if ratios is None:  # the run had already finished, or has no steps
            ratios = state.held_out_ratios()
    policy.eval()
    rule.eval()
    return TrainResult(pd.DataFrame(logged.rows), state.alpha, ratios, betas_by_step(logged.betas))


def _check(
    models: Models,
    rule: Rule,
    config: TrainConfig,
    stage: int,
    pairs: Dataset,
    held_out: Dataset | None,
    beta_pairs: Dataset | None,
) -> None:
    """Raise for inputs that would fail later, before anything is computed."""
    require("stage", stage, stage in (1, 2), "1 or 2")
    for name, data in (("pairs", pairs), ("held_out", held_out), ("beta_pairs", beta_pairs)):
        missing = [column for column in COLUMNS if data is not None and column not in data.column_names]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; expected what reference_pass returns")
        if data is not None:
            for column in NUMBERS:
                require_finite(name, data, column)
    for name, data in (("pairs", pairs), ("beta_pairs", beta_pairs)):
        if data is not None and len(data) < config.batch_size:
            raise ValueError(f"{name}: got {len(data)}, expected at least batch_size = {config.batch_size}")
    if isinstance(rule, PromptRule) and rule.beta.made_for is not None:
        rule.beta.require_made_for(form=config.form)
    if rule.form not in (None, config.form):
        raise ValueError(f"beta: {type(rule).__name__} is defined in the {rule.form} form, got {config.form!r}")
    lacking = [column for column in _columns_of(rule) if column not in pairs.column_names]
    if lacking:
        raise ValueError(f"pairs: lacks {', '.join(lacking)}, which {type(rule).__name__} looks at")
    for column in _columns_of(rule):
        require_finite("pairs", pairs, column)
    models.adapter_off()  # raises if the policy is its own reference and has no adapter
    if rule.needs & {"direction", "kl"} and models.reference is None:
        raise ValueError(f"reference: got None, expected the model: {type(rule).__name__} looks at it in training")


def _columns_of(rule: Rule) -> list[str]:
    """Return the further columns of the pairs that a rule reads."""
    read = [*ANSWER_ENTROPY] if "answer_entropy" in rule.needs else []
    return [*read, REWARD_MARGIN] if "reward_margin" in rule.needs else read


def _identity(
    config: TrainConfig, stage: int, rule: Rule, pairs: Dataset, beta_pairs: Dataset | None
) -> dict[str, object]:
    """Return everything that a checkpoint must match for the run to resume from it."""
    read = (*COLUMNS, *_columns_of(rule))
    identity = {"config": asdict(config), "stage": stage, "pairs": digest(pairs, read), "rule": repr(rule)}
    return identity if beta_pairs is None else identity | {"beta_pairs": digest(beta_pairs, read)}


def _ask(state: State, batch: Batch, logps: Tensor, step: int) -> RuleOutput:
    """Return a rule's output for a batch, checked: with the log-probabilities all that a step waits for on a GPU."""
    with trusted_values():  # the columns were checked when training began
        output = state.rule(state.observe(batch, logps, step))
    require_positive_rows("beta", output.beta)
    return output


def _require_finite(logps: Tensor, step: int, rows: Sequence[int]) -> None:
    bad = rows_where(~torch.isfinite(logps))
    if bad:
        raise FloatingPointError(
            f"step {step}: the policy's log-probabilities are not finite for rows {[rows[i] for i in bad]} of the "
            "pairs; a lower policy_learning_rate may keep them finite"
        )


class _Loss(NamedTuple):
    """The loss of a batch, with the inputs it was computed from."""

    objective: TotalLoss
    beta: Tensor
    task: list[str]
    config: TrainConfig


def _loss(
    state: State, batch: Batch, logps: Tensor, output: RuleOutput, regularization: Regularization | None
) -> _Loss:
    # log-probabilities and beta were checked above, the columns when training began; weights are checked here
    with trusted_values() if output.weight is None and output.smoothing is None else nullcontext():
        objective = total_loss(
            Logps(*logps.unbind(dim=1), *batch.ref_logps.unbind(dim=1)),
            output.beta,
            form=state.config.form,
            regularization=regularization,
            weight=output.weight,
            smoothing=output.smoothing,
            normalised=output.normalised,
            ref_entropy=batch.ref_entropy,
            beta_fn=state.rule.beta if isinstance(state.rule, PromptRule) else None,
            x=batch.x,
            task=batch.task,
        )
    return _Loss(objective, output.beta, batch.task, state.config)


def _measure(loss: _Loss) -> dict[str, float]:
    """Return the measurements of a batch for the history, before its update."""
    objective, margins = loss.objective, loss.objective.dpo.margins
    h = margins / scale(loss.beta.detach(), loss.config.form)
    row = {"loss": objective.total.item(), "accuracy": correctly_ranked(h).mean().item()}
    row |= {"margin": margins.mean().item(), **{f"loss/{name}": t.item() for name, t in objective.terms.items()}}
    if loss.beta.requires_grad:
        for term, pull in gradients_on_beta(objective, loss.beta).items():
            row |= means_by_task(f"grad/{term}", pull.tolist(), loss.task)
    return row
