"""The training loop, on `accelerate`: a policy by DPO, and beta(x) with it.

Stage 1 trains the policy with a fixed beta; stage 2 goes on with beta(x) and all four terms of the objective
(the derivation, §5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    broadcast,
    set_seed,
)
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, get_constant_schedule_with_warmup

from dpoviz.beta import Beta, BetaNetwork
from dpoviz.data.tokens import digest
from dpoviz.lm.scoring import score_answers
from dpoviz.losses import Form, TotalLoss, gradients_on_beta, scale, total_loss
from dpoviz.rules import PromptRule, Rule, RuleOutput
from dpoviz.training.batch import COLUMNS, batch_columns
from dpoviz.training.checkpoint import Checkpoint
from dpoviz.training.config import TrainConfig, alpha_for_mean, require
from dpoviz.training.observe import ANSWER_ENTROPY, Observer
from dpoviz.training.probes import Probe, adapter_off, by_task, correctly_ranked


class _Scorer(nn.Module):
    """The policy as a module whose forward gives (B, 2) log-probs, so that a wrapper around it sees the call.

    Weights that do not learn, those under a LoRA adapter, are no part of its state: a checkpoint holds what
    training changes.
    """

    def __init__(self, policy: PreTrainedModel, pad_id: int) -> None:
        super().__init__()
        self.policy, self.pad_id = policy, pad_id
        self.frozen = {f"policy.{name}" for name, p in policy.named_parameters() if not p.requires_grad}
        self.register_state_dict_post_hook(_Scorer._drop_frozen)
        self.register_load_state_dict_post_hook(_Scorer._expect_no_frozen)

    @staticmethod
    def _drop_frozen(module: _Scorer, state: dict[str, Tensor], prefix: str, _: object) -> None:
        for name in module.frozen:
            state.pop(prefix + name, None)

    @staticmethod
    def _expect_no_frozen(module: _Scorer, keys: object) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in module.frozen]

    def forward(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> Tensor:
        return score_answers(self.policy, prompts, answers, pad_id=self.pad_id).logps


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
    calibration: Dataset | None = None,
    out: Path | str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train `policy`, and `beta` with it where beta learns. Both are changed in place.

    Under `accelerate launch`, or `torchrun`, each process scores its share of a batch, and all of them take the step
    that one process would take.

    Args:
        policy: a causal language model, in stage 1 equal to the reference.
        beta: a `ConstantBeta` for stage 1; for stage 2 whatever gives beta(x), or a rule of `dpoviz.rules`.
        pairs: what `reference_pass` returned: token ids, and the reference's columns.
        config: the settings.
        stage: 1 (DPO with `beta` alone) or 2 (all four terms).
        pad_id: token that pads.
        eos_id: token that ends an answer, for the sampled KL.
        held_out: pairs whose prompts are not in `pairs`: reward accuracy, beta by task, and prompts for KL.
        reference: the model that `pairs` was scored with; without it the KL is not measured. The policy itself,
            if it is a PEFT model: the reference is then the policy with its adapter off.
        calibration: pairs that the policy is not trained on. If they are given, beta learns from them and not
            from `pairs`: there the policy cannot make up for any beta, and beta is identified (our rule; no
            paper's).
        out: a folder for checkpoints, which all processes see. A run that finds its own checkpoint there goes on from
            it.
        progress: show a bar.

    Returns:
        The history, a row per logged step. Measured on the batch before its update:
        form, seed, stage, step (runs on across the stages), loss, loss/<term>, accuracy (share of the batch
        with h > 0, ties half), margin (mean s·h), grad/<term>/<task> (mean pull of the term on one prompt's beta; see
        `gradients_on_beta`), grad_norm/policy and grad_norm/beta (before clipping); and, measured on the
        held-out prompts after the update, beta/<task> (mean, evaluation mode), held_out_accuracy and
        held_out_accuracy/<task> (share of pairs with h > 0), kl and kl_se (nats, sampled), kl/<task>.

    Raises:
        ValueError: missing columns, fewer pairs than a batch, a stage that is not 1 or 2, a rule of the standard
            form in the inverse one, a rule that lacks what it looks at, or a checkpoint of another configuration
            in `out`.
        FloatingPointError: the policy's log-probabilities are not finite, by step and row of `pairs`; nothing is
            updated by that batch.
    """
    rule = beta if isinstance(beta, Rule) else PromptRule(beta)
    _check(pairs, held_out, calibration, config, stage, rule, policy, reference)
    # batch_size is that of all processes together: the schedule takes one step a batch, not one a process
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    kind = accelerator.distributed_type
    require("processes", kind.value, kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED),
             "data parallelism; dpoviz.trl.BetaDPOTrainer trains a policy cut up by FSDP or DeepSpeed")  # fmt: skip
    require("mixed_precision", accelerator.mixed_precision, accelerator.mixed_precision != "fp16",
             "bf16 or no: policy and beta have an optimizer each, and float16 scales the loss for one")  # fmt: skip
    require("batch_size", config.batch_size, config.batch_size % accelerator.num_processes == 0,
             f"a multiple of the {accelerator.num_processes} processes")  # fmt: skip
    steps = config.stage1_steps if stage == 1 else config.stage2_steps
    offset = 0 if stage == 1 else config.stage1_steps
    if config.alpha is None:
        alpha = alpha_for_mean(pairs["ref_entropy"], config.beta0)
    else:
        alpha = config.alpha
    set_seed(config.seed + stage)
    scorer = accelerator.prepare(_Scorer(policy, pad_id))
    optimizers = [accelerator.prepare(adamw(policy, config.policy_learning_rate))]
    if rule.learns:
        optimizers.append(accelerator.prepare(adamw(rule, config.beta_learning_rate)))
    if rule.state_dict():  # weights, or moving averages
        accelerator.register_for_checkpointing(rule)
    schedules = [accelerator.prepare(get_constant_schedule_with_warmup(o, config.warmup_steps)) for o in optimizers]
    rule.to(accelerator.device).load_state_dict(broadcast(rule.state_dict()))  # the main process's
    if reference is not None:
        reference.to(accelerator.device).eval()

    probe = Probe(held_out, reference, config, accelerator, pad_id=pad_id, eos_id=eos_id)
    look = Observer(rule, pairs, policy, reference, config, accelerator, pad_id=pad_id, eos_id=eos_id)
    batches = _batches(len(pairs), config.batch_size, steps, seed=config.seed + stage)
    apart = calibration is not None and stage == 2 and rule.learns
    others = _batches(len(calibration), config.batch_size, steps, seed=config.seed + stage) if apart else []
    identity = {}
    if out is not None:  # what a checkpoint must agree with
        read = COLUMNS + (ANSWER_ENTROPY if "answer_entropy" in rule.needs else ())
        identity = {"config": asdict(config), "stage": stage, "pairs": digest(pairs, read), "rule": repr(rule)}
        identity |= {"calibration": digest(calibration, read)} if apart else {}
    checkpoint = Checkpoint(accelerator, Path(out) if out is not None else None, identity)
    first, history = checkpoint.load()
    shown = progress and accelerator.is_main_process
    bar = tqdm(total=steps, initial=first, desc=f"stage {stage}, {config.form}", unit="step", disable=not shown)
    for step in range(first, steps):
        batch = batch_columns(pairs[batches[step]], accelerator.device)
        scorer.train(), rule.train()
        logps = _scores(scorer, batch, accelerator)  # (B, 2)
        bad = (~torch.isfinite(logps)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"step {offset + step}: the policy's log-probabilities are not finite for rows "
                f"{[batches[step][i] for i in bad]} of the pairs; a lower policy_learning_rate may keep them finite"
            )
        weighed = rule(look(batch, logps, step))
        if apart:  # the policy learns from its pairs, beta from others
            other = batch_columns(calibration[others[step]], accelerator.device)
            with torch.no_grad():
                other_logps = _scores(scorer, other, accelerator)
            fixed = weighed._replace(beta=weighed.beta.detach())
            policy_objective = _objective(logps, fixed, rule, batch, config, alpha, stage=1)
            of_beta = rule(look(other, other_logps, step))
            objective = _objective(other_logps, of_beta, rule, other, config, alpha, stage)
            total = policy_objective.total + objective.total
        else:
            policy_objective, of_beta, other = None, weighed, batch
            objective = _objective(logps, weighed, rule, batch, config, alpha, stage)
            total = objective.total
        log = step % config.log_every == 0 or step == steps - 1
        row = _measure(objective, of_beta.beta, other["task"], config.form, rule.learns) if log else {}
        if log and apart:
            row |= _measure(policy_objective, weighed.beta, batch["task"], config.form, False)

        accelerator.backward(total)
        # each by its own norm: the few weights of beta would vanish beside a language model's
        norms = {"policy": accelerator.clip_grad_norm_(policy.parameters(), config.policy_max_norm)}
        if rule.learns:
            norms["beta"] = nn.utils.clip_grad_norm_(rule.parameters(), config.beta_max_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        if log:
            row |= {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}
            row |= probe.beta(rule)
            if step == steps - 1 or (config.probe_every and step % config.probe_every == 0):
                row |= probe.policy(scorer, policy)
            place = {"form": config.form, "seed": config.seed, "stage": stage, "step": offset + step}
            history.append(place | row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.2f}", refresh=False)
        bar.update()
        if (step + 1) % config.checkpoint_every == 0 or step == steps - 1:
            checkpoint.save(step + 1, history)
    bar.close()
    policy.eval(), rule.eval()
    return pd.DataFrame(history)


def _check(
    pairs: Dataset,
    held_out: Dataset | None,
    calibration: Dataset | None,
    config: TrainConfig,
    stage: int,
    rule: Rule,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
) -> None:
    require("stage", stage, stage in (1, 2), "1 (fixed beta) or 2 (beta(x))")
    for name, data in (("pairs", pairs), ("held_out", held_out), ("calibration", calibration)):
        missing = [] if data is None else [column for column in COLUMNS if column not in data.column_names]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; expected what reference_pass returns")
    for name, data in (("pairs", pairs), ("calibration", calibration)):
        if data is not None and len(data) < config.batch_size:
            raise ValueError(f"{name}: got {len(data)}, expected at least batch_size = {config.batch_size}")
    if rule.form not in (None, config.form):
        raise ValueError(f"beta: {type(rule).__name__} is defined in the {rule.form} form, got {config.form!r}")
    lacking = [column for column in ANSWER_ENTROPY if column not in pairs.column_names]
    if "answer_entropy" in rule.needs and lacking:
        raise ValueError(f"pairs: lacks {', '.join(lacking)}, which {type(rule).__name__} looks at")
    if reference is policy:
        adapter_off(policy)  # refuses a model without an adapter
    if rule.needs & {"direction", "kl"} and reference is None:
        raise ValueError(f"reference: got None, expected the model: {type(rule).__name__} looks at it in training")


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """The optimizer of both, policy and beta, over what learns of a module; no weight decay.

    Fused: a step reads and writes each number once, and not for each term.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def _batches(n: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Rows of each step: one permutation of the data after another, cut into batches; a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * size / n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)] or [torch.empty(0)])
    return order[: steps * size].long().view(steps, size).tolist()


def _scores(scorer: nn.Module, batch: dict, accelerator: Accelerator) -> Tensor:
    """(B, 2) log-probabilities of the whole batch, on every process; each computes its own rows.

    So every process has the objective of the whole batch, and beta, its batch norm and a rule's averages are what
    one process would have. Only a process's own rows carry a gradient to the policy, as many times as there are
    processes, because the average over processes divides it by their number.
    """
    prompts, answers = batch["prompt_ids"], batch["answer_ids"]
    processes, rank = accelerator.num_processes, accelerator.process_index
    if processes == 1:
        return scorer(prompts, answers)
    rows = len(prompts) // processes
    own = slice(rank * rows, (rank + 1) * rows)
    mine = scorer(prompts[own], answers[own])
    whole = accelerator.gather(mine.detach())
    mine = mine.detach() + processes * (mine - mine.detach())
    return torch.cat([whole[: own.start], mine, whole[own.stop :]])


def _objective(
    logps: Tensor, weighed: RuleOutput, rule: Rule, batch: dict, config: TrainConfig, alpha: float, stage: int
) -> TotalLoss:
    # a beta that does not learn has nothing to be regularised
    weight = 1.0 if stage == 2 and rule.learns else 0.0
    function = rule.beta if isinstance(rule, PromptRule) else None
    reads_x = isinstance(function, BetaNetwork)
    return total_loss(
        logps[:, 0],
        logps[:, 1],
        batch["ref_logps"][:, 0],
        batch["ref_logps"][:, 1],
        weighed.beta,
        weight=weighed.weight,
        form=config.form,
        beta_min=config.beta_min,
        beta_max=config.beta_max,
        ref_entropy=batch["ref_entropy"],
        alpha=alpha,
        lambda_range=weight * config.lambda_range,
        lambda_smoothness=weight * config.lambda_smoothness * reads_x,
        lambda_consistency=weight * config.lambda_consistency,
        lambda_entropy=weight * config.lambda_entropy,
        beta_fn=function,
        x=batch["x"],
        task=batch["task"],
    )


def _measure(objective: TotalLoss, beta_x: Tensor, task: Sequence[str], form: Form, learns: bool) -> dict[str, float]:
    """What the history says of a batch, before its update."""
    margins = objective.dpo.margins
    row = {"loss": objective.total.item(), "loss/dpo": objective.terms["dpo"].item()}
    h = margins / scale(beta_x.detach(), form)
    row |= {"accuracy": correctly_ranked(h).mean().item(), "margin": margins.mean().item()}
    if learns:
        row |= {f"loss/{name}": term.item() for name, term in objective.terms.items()}
        for term, pull in gradients_on_beta(objective, beta_x).items():
            row |= by_task(f"grad/{term}", pull.tolist(), task)
    return row
