"""The state of a training run: devices, optimizers, scores of a batch, the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, broadcast, set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, get_constant_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer

from dpoviz.beta import BetaNetwork
from dpoviz.lm.forward import CompiledLayers, language_model
from dpoviz.lm.packing import PrefixBatch
from dpoviz.lm.processes import map_ahead, mixed_precision
from dpoviz.lm.scoring import lay_out_ahead, score_answers
from dpoviz.regularizers import Regularization
from dpoviz.rules import Observation, PromptRule, Rule
from dpoviz.training.batch import Batch, part_rows, read_batch
from dpoviz.training.config import TrainConfig
from dpoviz.training.observe import observe
from dpoviz.training.probes import (
    HeldOut,
    Models,
    held_out_measurements,
    log_ratios,
    mean_betas,
    prompt_betas,
    sampled_kl,
)
from dpoviz.validation import require


class Scorer(nn.Module):
    """The policy as a module whose forward returns (B, 2) log-probabilities, so that wrappers see the call.

    Its state dict holds each trainable tensor once: no frozen weights, such as those under a LoRA adapter, and no
    second name of a tied weight.
    """

    def __init__(self, policy: PreTrainedModel, pad_id: int) -> None:
        super().__init__()
        self.policy, self.pad_id = policy, pad_id
        trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
        # a tied weight has several names, and a state dict holds it under each
        names = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
        self.left_out = tuple(sorted(f"policy.{name}" for name in names - trainable))
        self.register_state_dict_post_hook(Scorer._drop_left_out)
        self.register_load_state_dict_post_hook(Scorer._expect_no_left_out)

    @staticmethod
    def _drop_left_out(module: Scorer, state: dict[str, Tensor], prefix: str, _: object) -> None:
        for name in module.left_out:
            state.pop(prefix + name, None)

    @staticmethod
    def _expect_no_left_out(module: Scorer, keys: Any) -> None:
        # compared by suffix: a wrapper such as DDP puts its own prefix before the names
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(module.left_out)]

    def forward(
        self, prompts: list[list[int]], answers: list[list[list[int]]], laid_out: PrefixBatch | None = None
    ) -> Tensor:
        return score_answers(self.policy, prompts, answers, pad_id=self.pad_id, laid_out=laid_out).logps


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of a module, without weight decay.

    Fused: one pass over the parameters instead of one per operation.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


@contextmanager
def layers_as_set(policy: PreTrainedModel, *, checkpointing: bool, compiled: bool) -> Iterator[None]:
    """Turn on gradient checkpointing and compiled layers as asked, and turn off afterwards what was off before."""
    model: Any = language_model(policy)
    turned_on = checkpointing and not any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    # transformers 5.24 warns of the older name
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if turned_on:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"gradient_checkpointing: got true, but {type(model).__name__} does not support it")
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        with CompiledLayers(model) if compiled else nullcontext():
            yield
    finally:
        if turned_on:
            getattr(model, f"{kind}_checkpointing_disable")()


@contextmanager
def training_mode(policy: PreTrainedModel, *, dropout: bool) -> Iterator[None]:
    """Put the policy in its mode for training: without dropout, like the reference, unless `dropout` is true.

    Evaluation mode turns off dropout under any name, and routing noise. Gradient checkpointing acts only in layers in
    training mode: these layers are put in it, with their dropout probabilities set to 0.
    """
    before = [(module, module.training) for module in policy.modules()]
    probabilities: list[tuple[nn.Module, str, float]] = []
    policy.train(dropout)
    if not dropout:
        for layer in policy.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = True
                named = [(k, v) for k, v in vars(layer).items() if "dropout" in k and isinstance(v, float)]
                probabilities += [(layer, name, value) for name, value in named]
    for layer, name, _ in probabilities:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for layer, name, value in probabilities:
            setattr(layer, name, value)
        for module, mode in before:
            module.training = mode


@dataclass(frozen=True)
class State:
    """The objects that the training loop works on.

    Attributes:
        models: policy and reference.
        rule: the rule for beta.
        config: the settings.
        accelerator: devices and processes.
        scorer: the policy, as the accelerator wrapped it.
        optimizers: that of the policy, and that of beta if it is trainable.
        schedules: the learning-rate schedule of each optimizer.
        alpha: beta per nat of entropy.
        regularization: the penalties on beta; None if there are none.
        held_out: pairs to measure on; None if there are none.
        kl_prompts: training prompts for a rule that observes their KL; None for other rules.
        rescores: whether the reference scores each batch again, together with the policy.
    """

    models: Models
    rule: Rule
    config: TrainConfig
    accelerator: Accelerator
    scorer: nn.Module
    optimizers: list
    schedules: list
    alpha: float
    regularization: Regularization | None
    held_out: HeldOut | None
    kl_prompts: HeldOut | None
    rescores: bool

    @property
    def _parts(self) -> int:
        return self.config.gradient_accumulation

    def scores(self, batch: Batch) -> Tensor:
        """Return (B, 2) log-probabilities of the whole batch, on every process; each computes its own rows.

        Every process computes the loss of the whole batch, so that batch norm and moving averages match those of a
        single process. Gradients flow only through the process's own rows, multiplied by the number of processes to
        undo DDP's averaging.
        """
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if processes == 1:
            if self._parts == 1:
                return self.scorer(*next(batch.parts(1)))
            with torch.no_grad():  # what is kept for the backward pass of all parts together would not fit
                return torch.cat([self.scorer(*part) for part in batch.parts(self._parts)]).requires_grad_()
        rows = len(batch.prompts) // processes
        own = slice(rank * rows, (rank + 1) * rows)
        mine = self.scorer(batch.prompts[own], batch.answers[own])
        whole = self.accelerator.gather(mine.detach())
        mine = mine.detach() + processes * (mine - mine.detach())
        return torch.cat([whole[: own.start], mine, whole[own.stop :]])

    def batches(self, pairs: Dataset, rows: Sequence[list[int]]) -> Iterator[Batch]:
        """Yield a batch for each list of row numbers; in low precision, the reference scores it again.

        The next batch is read and laid out by another thread while this one is trained on. In half precision a score
        depends on the other rows of the batch: scored in the same batch, policy and reference round alike.
        """
        device, policy = self.accelerator.device, self.models.policy

        def read(own: list[int]) -> Batch:
            batch = read_batch(pairs[own])
            if self.accelerator.num_processes == 1:  # else each process lays out its own rows
                laid_out = (lay_out_ahead(policy, p, a, self.models.pad_id) for p, a, _ in batch.parts(self._parts))
                batch = batch._replace(laid_out=tuple(laid_out))
            return batch.pinned() if device.type == "cuda" else batch

        for batch in map_ahead(read, rows):
            batch = batch.to(device)
            yield self._rescored(batch) if self.rescores else batch

    @torch.no_grad()
    def _rescored(self, batch: Batch) -> Batch:
        assert self.models.reference is not None
        with self.models.adapter_off():
            scores = [
                score_answers(self.models.reference, prompts, answers, pad_id=self.models.pad_id, laid_out=laid_out)
                for prompts, answers, laid_out in batch.parts(self._parts)
            ]
        return batch._replace(ref_logps=torch.cat([part.logps for part in scores]).float())

    def observe(self, batch: Batch, logps: Tensor, step: int) -> Observation:
        """Return the rule's observation of the batch."""
        return observe(self.rule, batch, logps, self.models, step, kl=lambda step: self._kl(self.kl_prompts, step))

    def update(self, total: Tensor, batch: Batch, logps: Tensor) -> dict[str, float]:
        """Update policy and beta; return the norm of each one's gradient before clipping.

        The two are clipped separately: together, the few weights of beta would vanish beside a language model's. With
        several parts, the loss of the whole batch gives the gradient of each log-probability, and then each part passes
        through the policy again, for the gradients of the weights (Gao et al. 2021, arXiv:2101.06983).

        Args:
            total: the loss of the batch.
            batch: the batch on which the policy is trained.
            logps: (B, 2) its scores, from which the loss was computed.
        """
        self.accelerator.backward(total)
        if self._parts > 1:
            assert logps.grad is not None  # the result of `scores`, a leaf
            rows_of = part_rows(len(logps), self._parts)
            for part, rows in zip(batch.parts(self._parts), rows_of, strict=True):
                self.scorer(*part).backward(logps.grad[rows])
        policy = self.models.policy.parameters()
        norms = {"policy": self.accelerator.clip_grad_norm_(policy, self.config.policy_max_norm)}
        if self.rule.trainable:
            norms["beta"] = nn.utils.clip_grad_norm_(self.rule.parameters(), self.config.beta_max_norm)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return norms

    def held_out_ratios(self) -> np.ndarray | None:
        """Return (N, 2) log π/π_ref of chosen and rejected of the held-out pairs, in nats."""
        if self.held_out is None:
            return None
        policy, ends, size = self.models.policy, self.models.pad_id, self.config.eval_batch_size
        return log_ratios(policy, self.held_out.pairs, pad_id=ends, batch_size=size, progress=False)

    def measure(self, ratios: np.ndarray | None) -> dict[str, float]:
        """Return the measurements on held-out pairs for the history; accuracy and KL only if `ratios` are given."""
        if self.held_out is None:
            return {}
        row = mean_betas(self.rule, self.held_out)
        if ratios is not None:
            row |= held_out_measurements(ratios, self.held_out.task)
            if self.models.reference is not None and self.held_out.prompts:
                row |= self._kl(self.held_out, 0)
        return row

    def betas(self, step: int) -> dict[int, np.ndarray]:
        """Return (P,) beta at each held-out prompt, by the step; empty if there is none."""
        found = None if self.held_out is None else prompt_betas(self.rule, self.held_out)
        return {} if found is None else {step: found}

    def _kl(self, data: HeldOut | None, seed_shift: int) -> Mapping[str, float]:
        assert data is not None
        limit, seed = self.config.max_new_tokens, self.config.seed + seed_shift
        return sampled_kl(self.models, data.prompts, data.prompt_tasks, max_new_tokens=limit, seed=seed)


def prepare(
    models: Models, rule: Rule, config: TrainConfig, stage: int, pairs: Dataset, held_out: Dataset | None
) -> State:
    """Return the state at the start of a stage: devices, optimizers, and pairs to measure on."""
    # batch_size counts all processes together: the schedule must step once per batch, not once per process
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    _check_accelerator(accelerator, config)
    set_seed(config.seed + stage)
    scorer = accelerator.prepare(Scorer(models.policy, models.pad_id))
    optimizers = [accelerator.prepare(adamw(models.policy, config.policy_learning_rate))]
    if rule.trainable:
        optimizers.append(accelerator.prepare(adamw(rule, config.beta_learning_rate)))
    if rule.state_dict():  # weights, or moving averages
        accelerator.register_for_checkpointing(rule)
    schedules = [accelerator.prepare(get_constant_schedule_with_warmup(o, config.warmup_steps)) for o in optimizers]
    rule.to(accelerator.device).load_state_dict(broadcast(rule.state_dict()))  # as on the main process
    if models.reference is not None:
        models.reference.to(accelerator.device).eval()
    alpha = config.alpha_for(pairs["ref_entropy"])
    weights = regularization_of(rule, config, alpha) if stage == 2 and rule.trainable else None
    held_out, kl_prompts = (
        None if data is None else HeldOut.of(data, config.probe_prompts, accelerator.device)
        for data in (held_out, pairs if "kl" in rule.needs else None)
    )
    low = mixed_precision() != "no" or models.policy.dtype in (torch.bfloat16, torch.float16)
    rescores = low if config.rescore_reference is None else config.rescore_reference
    return State(
        models=models,
        rule=rule,
        config=config,
        accelerator=accelerator,
        scorer=scorer,
        optimizers=optimizers,
        schedules=schedules,
        alpha=alpha,
        regularization=weights,
        held_out=held_out,
        kl_prompts=kl_prompts,
        rescores=rescores and models.reference is not None,
    )


def _check_accelerator(accelerator: Accelerator, config: TrainConfig) -> None:
    kind = accelerator.distributed_type
    require(
        "processes",
        kind.value,
        kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED),
        "data parallelism; dpoviz.trl.BetaDPOTrainer trains a policy cut up by FSDP or DeepSpeed",
    )
    require(
        "mixed_precision",
        accelerator.mixed_precision,
        accelerator.mixed_precision != "fp16",
        "bf16 or no: policy and beta have an optimizer each, and float16 scales the loss for one",
    )
    require(
        "batch_size",
        config.batch_size,
        config.batch_size % accelerator.num_processes == 0,
        f"a multiple of the {accelerator.num_processes} processes",
    )
    require(
        "gradient_accumulation",
        config.gradient_accumulation,
        config.gradient_accumulation == 1 or accelerator.num_processes == 1,
        f"1 with {accelerator.num_processes} processes, each of which scores a part of the batch",
    )


def regularization_of(rule: Rule, config: TrainConfig, alpha: float) -> Regularization:
    """Return the weights of the penalties; the gradient penalty applies only to a beta that reads x."""
    weights = config.regularization(alpha)
    reads_x = isinstance(rule, PromptRule) and isinstance(rule.beta, BetaNetwork)
    return weights if reads_x else replace(weights, smoothness=0.0)
