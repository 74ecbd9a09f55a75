r"""The training loop, on `accelerate`: a policy by DPO, and beta(x) with it.

Stage 1 trains the policy with a fixed beta; stage 2 goes on with beta(x) and all four terms of the objective
(the derivation, §5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, get_constant_schedule_with_warmup

from dpoviz.beta import Beta, BetaNetwork
from dpoviz.data import digest
from dpoviz.logprobs import evaluating, sample_answers, score_answers, supports_shared_prefix
from dpoviz.losses import Form, TotalLoss, gradients_on_beta, scale, total_loss
from dpoviz.perturbed import perturbed_directions
from dpoviz.rules import FromPrompt, Rule, Seen, Weighed

ANSWER_ENTROPY = ("ref_chosen_entropy", "ref_rejected_entropy")
"""Columns that only a rule reads which looks at the reference's entropy along the answers."""

COLUMNS = (
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "task",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_entropy",
    "ref_features",
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on besides its model and its data.

    Attributes:
        form: what multiplies h, "inverse" (1/beta, as the derivation prints) or "standard" (beta).
        beta0: the fixed beta of stage 1, where beta(x) starts.
        beta_min: lower end of the range.
        beta_max: upper end of the range.
        alpha: beta per nat of entropy; None calibrates it once, so that the mean of alpha·H is beta0.
        lambda_range: weight λ1 of the range term, per unit of beta.
        lambda_smoothness: weight λ2 of the gradient penalty, per squared unit of beta.
        lambda_consistency: weight of the variance of beta within a task, per squared unit of beta.
        lambda_entropy: weight λ3 of the entropy term, per squared unit of beta.
        stage1_steps: steps with the fixed beta.
        stage2_steps: steps with beta(x).
        batch_size: pairs in a step, over all processes: a multiple of their number.
        policy_learning_rate: AdamW on the policy.
        beta_learning_rate: AdamW on beta.
        policy_max_norm: the policy's gradient is clipped at this norm.
        beta_max_norm: the beta-network's gradient is clipped at this norm, by itself.
        warmup_steps: steps in which both learning rates rise from 0, in each stage.
        log_every: steps between rows of the history.
        probe_every: steps between measurements on held-out prompts (KL by sampling, reward accuracy); 0 measures at
            the end of a stage alone.
        probe_prompts: held-out prompts a task in such a measurement.
        max_new_tokens: limit of a sampled answer, in tokens.
        checkpoint_every: steps between checkpoints.
        seed: order of the data, dropout, sampling.
    """

    form: Form = "inverse"
    beta0: float = 10.0
    beta_min: float = 2.5
    beta_max: float = 40.0
    alpha: float | None = None
    lambda_range: float = 0.4
    lambda_smoothness: float = 0.0001
    lambda_consistency: float = 0.0
    lambda_entropy: float = 0.001
    stage1_steps: int = 60
    stage2_steps: int = 120
    batch_size: int = 32
    policy_learning_rate: float = 2e-4
    beta_learning_rate: float = 3e-3
    policy_max_norm: float = 1.0
    beta_max_norm: float = 1.0
    warmup_steps: int = 10
    log_every: int = 5
    probe_every: int = 30
    probe_prompts: int = 32
    max_new_tokens: int = 48
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        scale(self.beta0, self.form)
        for name in ("beta_min", "beta_max", "policy_learning_rate", "beta_learning_rate"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a positive number")
        if self.beta_min >= self.beta_max:
            raise ValueError(f"beta_min, beta_max: came {self.beta_min}, {self.beta_max}, expected beta_min < beta_max")
        inside = self.beta_min <= self.beta0 <= self.beta_max
        _require("beta0", self.beta0, inside, f"a number from {self.beta_min} to {self.beta_max}")
        if self.alpha is not None:
            _require("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number, or None to calibrate")
        for name in ("lambda_range", "lambda_smoothness", "lambda_consistency", "lambda_entropy"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "a number, at least 0")
        for name in ("policy_max_norm", "beta_max_norm"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a positive number")
        for name in ("batch_size", "log_every", "checkpoint_every", "max_new_tokens"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("stage1_steps", "stage2_steps", "warmup_steps", "probe_every", "probe_prompts"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")

    @classmethod
    def around(cls, s0: float, form: Form, **settings) -> TrainConfig:
        """A configuration in which both forms start alike and are regularised alike.

        The scale that multiplies h starts at `s0` in either form. The range is beta0/4 to 4·beta0, and the
        weights are set relative to beta0 (λ1 ∝ 1/beta0, the others ∝ 1/beta0²), so that a given relative
        departure of beta costs the same in both.

        Args:
            s0: the scale at the start, 1/beta0 (inverse) or beta0 (standard).
            form: "inverse" or "standard".
            **settings: other fields; the four λ are then those for beta0 = 1 and are divided as above.
        """
        beta0 = scale(s0, form)  # its own inverse, or itself
        for name, default, power in (
            ("lambda_range", 4.0, 1),
            ("lambda_smoothness", 0.01, 2),
            ("lambda_consistency", 0.0, 2),
            ("lambda_entropy", 0.1, 2),
        ):
            settings[name] = settings.get(name, default) / beta0**power
        settings = {"beta_min": beta0 / 4, "beta_max": beta0 * 4, **settings}
        return cls(form=form, beta0=beta0, **settings)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: came {value!r}, expected {expected}")


def calibrate_alpha(ref_entropy: Sequence[float], beta0: float) -> float:
    """alpha such that the mean of alpha·H over the prompts is beta0.

    Raises:
        ValueError: the mean entropy is not positive, so that no alpha does it.
    """
    mean = sum(ref_entropy) / len(ref_entropy)
    if not 0 < mean < math.inf:
        raise ValueError(f"ref_entropy: mean {mean} nats, expected a positive one; give alpha as a number")
    return beta0 / mean


class _Scorer(nn.Module):
    """The policy as a module whose forward gives (B, 2) log-probs, so that a wrapper around it sees the call.

    Weights that do not learn, those under a LoRA adapter, are no part of its state: a checkpoint holds what
    training changes.
    """

    def __init__(self, policy: PreTrainedModel, pad_id: int, shared_prefix: bool) -> None:
        super().__init__()
        self.policy, self.pad_id, self.shared_prefix = policy, pad_id, shared_prefix
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
        return score_answers(self.policy, prompts, answers, pad_id=self.pad_id, shared_prefix=self.shared_prefix).logps


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
    rule = beta if isinstance(beta, Rule) else FromPrompt(beta)
    _check(pairs, held_out, calibration, config, stage, rule, policy, reference)
    # batch_size is that of all processes together: the schedule takes one step a batch, not one a process
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    kind = accelerator.distributed_type
    _require("processes", kind.value, kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED),
             "data parallelism; dpoviz.trl.BetaDPOTrainer trains a policy cut up by FSDP or DeepSpeed")  # fmt: skip
    _require("mixed_precision", accelerator.mixed_precision, accelerator.mixed_precision != "fp16",
             "bf16 or no: policy and beta have an optimizer each, and float16 scales the loss for one")  # fmt: skip
    _require("batch_size", config.batch_size, config.batch_size % accelerator.num_processes == 0,
             f"a multiple of the {accelerator.num_processes} processes")  # fmt: skip
    steps = config.stage1_steps if stage == 1 else config.stage2_steps
    offset = 0 if stage == 1 else config.stage1_steps
    if config.alpha is None:
        alpha = calibrate_alpha(pairs["ref_entropy"], config.beta0)
    else:
        alpha = config.alpha
    set_seed(config.seed + stage)
    shared_prefix = supports_shared_prefix(policy)
    scorer = accelerator.prepare(_Scorer(policy, pad_id, shared_prefix))
    optimizers = [accelerator.prepare(adamw(policy, config.policy_learning_rate))]
    if rule.learns:
        optimizers.append(accelerator.prepare(adamw(rule, config.beta_learning_rate)))
    if rule.state_dict():  # weights, or moving averages
        accelerator.register_for_checkpointing(rule)
    schedules = [accelerator.prepare(get_constant_schedule_with_warmup(o, config.warmup_steps)) for o in optimizers]
    rule.to(accelerator.device).load_state_dict(broadcast(rule.state_dict()))  # the main process's
    if reference is not None:
        reference.to(accelerator.device).eval()

    probe = _Probe(held_out, reference, config, accelerator, pad_id=pad_id, eos_id=eos_id)
    look = _Look(rule, pairs, policy, reference, config, accelerator, pad_id=pad_id, eos_id=eos_id)
    batches = _batches(len(pairs), config.batch_size, steps, seed=config.seed + stage)
    apart = calibration is not None and stage == 2 and rule.learns
    others = _batches(len(calibration), config.batch_size, steps, seed=config.seed + stage) if apart else []
    identity = {}
    if out is not None:  # what a checkpoint must agree with
        read = COLUMNS + (ANSWER_ENTROPY if "answer_entropy" in rule.needs else ())
        identity = {"config": asdict(config), "stage": stage, "pairs": digest(pairs, read), "rule": repr(rule)}
        identity |= {"calibration": digest(calibration, read)} if apart else {}
    checkpoint = _Checkpoint(accelerator, Path(out) if out is not None else None, identity)
    first, history = checkpoint.load()
    shown = progress and accelerator.is_main_process
    bar = tqdm(total=steps, initial=first, desc=f"stage {stage}, {config.form}", unit="step", disable=not shown)
    for step in range(first, steps):
        batch = _columns(pairs[batches[step]], accelerator.device)
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
            other = _columns(calibration[others[step]], accelerator.device)
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
    _require("stage", stage, stage in (1, 2), "1 (fixed beta) or 2 (beta(x))")
    for name, data in (("pairs", pairs), ("held_out", held_out), ("calibration", calibration)):
        missing = [] if data is None else [column for column in COLUMNS if column not in data.column_names]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; expected what reference_pass returns")
    for name, data in (("pairs", pairs), ("calibration", calibration)):
        if data is not None and len(data) < config.batch_size:
            raise ValueError(f"{name}: came {len(data)}, expected at least batch_size = {config.batch_size}")
    if rule.form not in (None, config.form):
        raise ValueError(f"beta: {type(rule).__name__} is defined in the {rule.form} form, came {config.form!r}")
    lacking = [column for column in ANSWER_ENTROPY if column not in pairs.column_names]
    if "answer_entropy" in rule.needs and lacking:
        raise ValueError(f"pairs: lacks {', '.join(lacking)}, which {type(rule).__name__} looks at")
    if reference is policy:
        adapter_off(policy)  # refuses a model without an adapter
    if rule.needs & {"direction", "kl"} and reference is None:
        raise ValueError(f"reference: came None, expected the model: {type(rule).__name__} looks at it in training")


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


def _columns(rows: dict[str, list], device: torch.device) -> dict[str, object]:
    """A batch out of rows of the data set: token ids as lists, numbers as (B,) tensors, x (B, D)."""

    def tensor(name: str) -> Tensor:
        return torch.tensor(rows[name], dtype=torch.float32, device=device)

    return {
        "rows": rows,
        "prompt_ids": rows["prompt_ids"],
        "answer_ids": [list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)],
        "task": rows["task"],
        "ref_logps": torch.stack([tensor("ref_chosen_logps"), tensor("ref_rejected_logps")], dim=1),
        "ref_entropy": tensor("ref_entropy"),
        "x": tensor("ref_features"),
    }


def answer_entropy(rows: Mapping[str, Sequence], vocabulary: int) -> Tensor:
    """(B,) the reference's next-token entropy over log V, averaged along each answer, then over the two.

    Args:
        rows: of what `reference_pass` returned.
        vocabulary: V.
    """
    means = [
        [total / len(ids) for total, ids in zip(rows[sums], rows[answers], strict=True)]
        for sums, answers in zip(ANSWER_ENTROPY, ("chosen_ids", "rejected_ids"), strict=True)
    ]
    return torch.tensor(means, dtype=torch.float32).mean(dim=0) / math.log(vocabulary)


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


class _Look:
    """What a rule may look at in a step; what it does not need is not computed."""

    def __init__(
        self,
        rule: Rule,
        pairs: Dataset,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        pad_id: int,
        eos_id: int,
    ) -> None:
        self.rule, self.policy, self.reference, self.pad_id = rule, policy, reference, pad_id
        self.vocabulary = policy.config.get_text_config().vocab_size
        self.probe = None
        if "kl" in rule.needs:
            self.probe = _Probe(pairs, reference, config, accelerator, pad_id=pad_id, eos_id=eos_id)

    @torch.no_grad()
    def __call__(self, batch: dict, logps: Tensor, step: int) -> Seen:
        needs = self.rule.needs
        extras = {}
        if "answer_entropy" in needs:
            extras["answer_entropy"] = answer_entropy(batch["rows"], self.vocabulary).to(logps.device)
        if "direction" in needs:
            extras["direction"] = perturbed_directions(
                self.policy,
                self.reference,
                batch["prompt_ids"],
                batch["answer_ids"],
                epsilon=self.rule.epsilon,
                pad_id=self.pad_id,
            )
        if "kl" in needs and step % self.rule.every == 0:
            measured = self.probe.kl(self.policy, seed_shift=step)
            extras["kl"] = {name.removeprefix("kl/"): v for name, v in measured.items() if name.startswith("kl/")}
        ratios = logps.detach() - batch["ref_logps"]
        return Seen(
            h=ratios[:, 0] - ratios[:, 1],
            x=batch["x"],
            task=batch["task"],
            ref_entropy=batch["ref_entropy"],
            **extras,
        )


def _objective(
    logps: Tensor, weighed: Weighed, rule: Rule, batch: dict, config: TrainConfig, alpha: float, stage: int
) -> TotalLoss:
    # a beta that does not learn has nothing to be regularised
    weight = 1.0 if stage == 2 and rule.learns else 0.0
    function = rule.beta if isinstance(rule, FromPrompt) else None
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


def _by_task(name: str, values: Sequence[float], task: Sequence[str]) -> dict[str, float]:
    means = pd.Series(values).groupby(list(task)).mean()
    return {f"{name}/{t}": mean for t, mean in means.items()}


def _ranked_rightly(h: Tensor) -> Tensor:
    """1 where h > 0, 0 where h < 0, a half at a tie; what float32 rounds a zero to counts as one."""
    return (h.sign() * (h.abs() > 1e-4) + 1) / 2


def _measure(objective: TotalLoss, beta_x: Tensor, task: Sequence[str], form: Form, learns: bool) -> dict[str, float]:
    """What the history says of a batch, before its update."""
    margins = objective.dpo.margins
    row = {"loss": objective.total.item(), "loss/dpo": objective.terms["dpo"].item()}
    h = margins / scale(beta_x.detach(), form)
    row |= {"accuracy": _ranked_rightly(h).mean().item(), "margin": margins.mean().item()}
    if learns:
        row |= {f"loss/{name}": term.item() for name, term in objective.terms.items()}
        for term, pull in gradients_on_beta(objective, beta_x).items():
            row |= _by_task(f"grad/{term}", pull.tolist(), task)
    return row


class _Probe:
    """Measurements on held-out prompts, the same prompts and the same draws each time."""

    def __init__(
        self,
        held_out: Dataset | None,
        reference: PreTrainedModel | None,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        pad_id: int,
        eos_id: int,
    ) -> None:
        self.reference, self.config, self.pad_id, self.eos_id = reference, config, pad_id, eos_id
        self.accelerator = accelerator
        self.data = held_out
        if held_out is not None:
            self.task = held_out["task"][:]
            self.x, self.ref_entropy = (
                torch.tensor(held_out[name][:], dtype=torch.float32, device=accelerator.device)
                for name in ("ref_features", "ref_entropy")
            )
            first = pd.DataFrame({"task": self.task, "prompt": map(tuple, held_out["prompt_ids"])})
            some = first.drop_duplicates("prompt").groupby("task").head(config.probe_prompts)
            self.prompts, self.tasks = [list(prompt) for prompt in some["prompt"]], some["task"].tolist()

    @torch.no_grad()
    def beta(self, rule: Rule) -> dict[str, float]:
        """Mean beta by task over the held-out prompts, in evaluation mode, where beta is a function of the prompt."""
        if self.data is None or not isinstance(rule, FromPrompt):
            return {}
        rule.eval()
        values = rule.beta(self.x, task=self.task, ref_entropy=self.ref_entropy)
        return _by_task("beta", values.tolist(), self.task)

    @torch.no_grad()
    def policy(self, scorer: nn.Module, policy: PreTrainedModel) -> dict[str, float]:
        """Reward accuracy on all held-out pairs; KL(policy ‖ reference) from one sampled answer a prompt."""
        if self.data is None:
            return {}
        scorer = self.accelerator.unwrap_model(scorer).eval()
        size, right = self.config.batch_size, []
        starts = range(0, len(self.data), size)
        for start in starts[self.accelerator.process_index :: self.accelerator.num_processes]:
            batch = _columns(self.data[start : start + size], self.accelerator.device)
            ratios = scorer(batch["prompt_ids"], batch["answer_ids"]) - batch["ref_logps"]
            right.append((start, _ranked_rightly(ratios[:, 0] - ratios[:, 1]).tolist()))
        right = [value for _, values in sorted(gather_object(right)) for value in values]
        row = {"held_out_accuracy": sum(right) / len(right)}
        row |= _by_task("held_out_accuracy", right, self.task)
        return row if self.reference is None or not self.prompts else row | self.kl(policy)

    @torch.no_grad()
    def kl(self, policy: PreTrainedModel, *, seed_shift: int = 0) -> dict[str, float]:
        """KL(policy ‖ reference) over the prompts, its standard error, and by task; one sampled answer a prompt."""
        row = [self._kl(policy, seed_shift) if self.accelerator.is_main_process else None]
        return broadcast_object_list(row)[0]

    def _kl(self, policy: PreTrainedModel, seed_shift: int) -> dict[str, float]:
        config = self.config
        answers = sample_answers(
            policy,
            self.prompts,
            1,
            max_new_tokens=config.max_new_tokens,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            seed=config.seed + seed_shift,
        ).answers
        shared = supports_shared_prefix(policy)

        def logps(model: PreTrainedModel) -> Tensor:
            return score_answers(model, self.prompts, answers, pad_id=self.pad_id, shared_prefix=shared).logps[:, 0]

        with evaluating(policy):
            of_policy = logps(policy)
            with adapter_off(policy) if self.reference is policy else nullcontext():
                of_reference = logps(self.reference)
        # the mean of log pi - log pi_ref over answers of the policy is unbiased for the KL
        difference = (of_policy - of_reference).double()
        row = {"kl": difference.mean().item(), "kl_se": (difference.std() / len(difference) ** 0.5).item()}
        return row | _by_task("kl", difference.tolist(), self.tasks)


def adapter_off(policy: PreTrainedModel) -> AbstractContextManager:
    """The reference under a PEFT policy: the same weights with the adapter off, no second copy.

    Raises:
        ValueError: the model has no adapter.
    """
    if not hasattr(policy, "disable_adapter"):
        raise ValueError(
            f"reference: came the policy itself, a {type(policy).__name__} without an adapter to turn off; expected "
            "a copy of it from before training, or a PEFT model"
        )
    return policy.disable_adapter()


class _Checkpoint:
    """The state of a run in a folder; the newest one replaces the last in one move."""

    def __init__(self, accelerator: Accelerator, folder: Path | None, identity: dict) -> None:
        self.accelerator, self.identity = accelerator, identity
        self.folder = None if folder is None else folder / "checkpoint"

    def load(self) -> tuple[int, list[dict]]:
        """Step to go on from, and the rows so far: (0, []) where there is nothing to go on from."""
        if self.folder is None:
            return 0, []
        old = self.folder.with_suffix(".old")
        if self.accelerator.is_main_process and old.exists() and not self.folder.exists():
            old.rename(self.folder)  # killed between the two moves of `save`
        self.accelerator.wait_for_everyone()
        if not (self.folder / "run.json").is_file():
            return 0, []
        saved = json.loads((self.folder / "run.json").read_text())
        if saved["identity"] != self.identity:
            raise ValueError(
                f"out: {self.folder.parent} holds a run with another configuration or other data; "
                "give another folder, or delete that one"
            )
        self.accelerator.load_state(str(self.folder))
        return saved["step"], saved["history"]

    def save(self, step: int, history: list[dict]) -> None:
        if self.folder is None:
            return
        new, old = self.folder.with_suffix(".new"), self.folder.with_suffix(".old")
        main = self.accelerator.is_main_process
        for leftover in (new, old) if main else ():
            shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if main:
            run = {"identity": self.identity, "step": step, "history": history}
            (new / "run.json").write_text(json.dumps(run))
            if self.folder.exists():
                self.folder.rename(old)
            new.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
