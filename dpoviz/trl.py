"""The objective inside TRL's `DPOTrainer`, for users who already train with it (the extra `trl`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import broadcast, gather_object
from datasets import Dataset, IterableDataset, concatenate_datasets
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOTrainer

from dpoviz.beta import Beta, BetaNetwork, ConstantBeta
from dpoviz.forms import scale
from dpoviz.regularizers import Regularization, penalties
from dpoviz.training.config import TrainConfig
from dpoviz.training.state import adamw

COLUMNS = ("task", "ref_entropy", "ref_features")
"""The columns that beta(x) and its regularisers read in addition to the pair; `reference_pass` computes them."""


def trl_dataset(scored: Dataset) -> Dataset:
    """Return scored pairs in TRL's layout, together with the columns that beta reads.

    Args:
        scored: the return value of `reference_pass`.

    Returns:
        A data set with the columns prompt, chosen and rejected, ref_chosen_logps and ref_rejected_logps, and `COLUMNS`.
        The first three are chat messages if the prompts are chats, and texts otherwise. The reference's
        log-probabilities are of dpoviz's tokens. For chats TRL tokenises differently, so `BetaDPOTrainer` computes its
        own.

    Raises:
        ValueError: the data set mixes texts and chats, which TRL does not accept.
    """
    chats = [bool(own) for own in scored["messages"]] if "messages" in scored.column_names else [False]
    if any(chats) and not all(chats):
        raise ValueError(
            f"scored: {sum(chats)} of {len(chats)} prompts are chats, expected all or none: TRL's sets hold one kind; "
            "dpoviz.data.as_chat turns texts into chats"
        )
    texts = ("prompt", "chosen", "rejected")
    kept = scored.select_columns([*texts, *COLUMNS, "ref_chosen_logps", "ref_rejected_logps"])
    if not any(chats):
        return kept

    def as_messages(rows: dict[str, list]) -> dict[str, list]:
        return {name: [[{"role": "assistant", "content": answer}] for answer in rows[name]] for name in texts[1:]}

    answers = kept.select_columns(list(texts[1:])).map(as_messages, batched=True, desc="answers as messages")
    prompts = scored.select_columns(["messages"]).rename_column("messages", "prompt")
    return concatenate_datasets([prompts, answers, kept.remove_columns(list(texts))], axis=1)


@dataclass
class _Collator:
    """The trainer's batch, plus the columns that beta reads for each pair."""

    own: Callable[[list[dict]], Mapping]

    def __call__(self, examples: list[dict]) -> dict:
        numbers = {
            name: torch.tensor([example[name] for example in examples], dtype=torch.float32) for name in COLUMNS[1:]
        }
        return {**self.own(examples), "task": [example["task"] for example in examples], **numbers}


def _require_columns(name: str, data: Dataset | IterableDataset | dict | None) -> None:
    if isinstance(data, dict):
        for key, part in data.items():
            _require_columns(f"{name}[{key!r}]", part)
    elif data is not None:
        columns = data.column_names or list(next(iter(data)))  # a stream may not know its column names
        missing = [column for column in COLUMNS if column not in columns]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; expected what trl_dataset returns")


class BetaDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with a beta that depends on the prompt, in either form, and its regularisers.

        L = L_TRL(s(x)·h) + L_range + L_smooth + L_entropy

    L_TRL is TRL's loss with s(x) in place of its one beta. Rewards, margins and the other loss types
    follow, except "aot" and "aot_unpaired", which sort the batch before multiplying by beta. The regularisers (the
    derivation, §5) are added if beta is trainable. Logged in addition to TRL's numbers: beta/<task>, and loss/<term>
    for each regulariser.

    Several processes train a single beta, initialised from the main process; batch norm and the regularisers are
    computed on each process's part of a batch. FSDP and DeepSpeed may shard the policy; every process holds all of
    beta.

    Args:
        model: as in `DPOTrainer`. All other arguments of `DPOTrainer` are passed by name.
        beta: any `Beta`. A trainable one is trained together with the policy by a separate AdamW, with its own learning
            rate (on the policy's schedule) and its own gradient clipping.
        config: the form, the range, the weights of the regularisers, beta's learning rate and maximum gradient norm;
            `args` has the rest. Its `initial_scale` sets the units of the range, of alpha and of the weights, so `beta`
            should start at `config.beta0`.
        train_dataset: a data set with the columns `COLUMNS`, as `trl_dataset` returns it. For a stream, `config.alpha`
            is required if the entropy term is on.

    Raises:
        ValueError: a data set lacks those columns; there is no alpha for a stream; a loss type sorts the batch and beta
            is not constant; float16 is used under DeepSpeed; or several processes precompute the reference of an
            in-memory data set, for which TRL writes no file that they could share.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    _signature_columns: Any  # None until it is first asked for

    def __init__(
        self,
        model,
        *,
        beta: Beta,
        config: TrainConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        **kwargs,
    ) -> None:
        _require_columns("train_dataset", train_dataset)
        _require_columns("eval_dataset", kwargs.get("eval_dataset"))
        self.config, self.beta_module = config, beta
        self.learns = any(p.requires_grad for p in beta.parameters())
        self.regularization = self._weights(train_dataset) if self.learns else None
        super().__init__(model, train_dataset=train_dataset, **kwargs)
        sorting = [name for name in self.loss_types if name.startswith("aot")]
        if sorting and not isinstance(beta, ConstantBeta):
            raise ValueError(f"args.loss_type: got {sorting[0]!r}, which sorts pairs apart from their beta; expected "
                             "another, or a ConstantBeta")  # fmt: skip
        if self.learns and self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16":
            raise ValueError("args.fp16: got float16, expected bf16 or float32: DeepSpeed scales the loss internally")
        beta.to(self.accelerator.device).load_state_dict(broadcast(beta.state_dict()))  # of the main process
        if self.learns:
            self.beta_optimizer = adamw(beta, config.beta_learning_rate)
        self.data_collator = _Collator(self.data_collator)

    def _weights(self, train_dataset: Dataset | IterableDataset | None) -> Regularization:
        """Return the penalties' weights, with alpha computed from the data if the configuration leaves it open."""
        config = self.config
        entropy: Any = None
        if config.alpha is None and config.lambda_entropy > 0 and train_dataset is not None:
            if isinstance(train_dataset, IterableDataset):
                raise ValueError("config.alpha: got None, expected a number; a stream's mean entropy is unknown")
            entropy = train_dataset["ref_entropy"][:]
        known = config.alpha is not None or entropy is not None
        weights = config.regularization(config.alpha_for(entropy) if known else None)
        reads_x = isinstance(self.beta_module, BetaNetwork)
        return weights if reads_x else replace(weights, smoothness=0.0)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in COLUMNS if column not in self._signature_columns]

    def _compute_loss(self, model, inputs, return_outputs):
        seen = {name: inputs[name] for name in COLUMNS}
        inputs = {name: value for name, value in inputs.items() if name not in COLUMNS}
        self.beta_module.train(self.model.training)
        beta = self.beta_module(seen["ref_features"], task=seen["task"], ref_entropy=seen["ref_entropy"])  # (B,)
        # every loss of the parent class multiplies by self.beta; a (B,) tensor there gives each pair its own factor
        own, self.beta = self.beta, scale(beta, self.config.form)
        try:
            found = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.beta = own
        terms: dict[str, Tensor] = {}
        if self.regularization is not None:
            terms = penalties(
                beta,
                self.regularization,
                ref_entropy=seen["ref_entropy"],
                beta_fn=self.beta_module,
                x=seen["ref_features"],
                task=seen["task"],
            ).terms
        self._log_beta(beta, seen["task"], terms)
        added = sum(terms.values())
        return (found[0] + added, found[1]) if return_outputs else found + added

    def _log_beta(self, beta: Tensor, task: list[str], terms: dict[str, Tensor]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, term in terms.items():
            metrics[f"loss/{name}"].append(self.accelerator.gather(term.detach()).mean().item())
        betas = pd.Series(gather_object(beta.tolist()))
        for name, mean in betas.groupby(gather_object(list(task))).mean().items():
            metrics[f"beta/{name}"].append(mean)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # TRL computes these on its own tokens, which in a chat include what the template adds after the end of a turn
        found = dataset.column_names or []  # a stream may not know its column names; TRL refuses streams here
        ours = [column for column in ("ref_chosen_logps", "ref_rejected_logps") if column in found]
        if found and self.accelerator.num_processes > 1 and not dataset.cache_files:
            raise ValueError(
                f"{name}_dataset: is in memory; with args.precompute_ref_log_probs and several processes expected one "
                "on disk, where they share the file that TRL writes beside it; use save_to_disk and load_from_disk"
            )
        return super()._precompute_ref_logps(dataset.remove_columns(ours) if ours else dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in COLUMNS})

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            _require_columns("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        group = self.optimizer.param_groups[0]  # read before the step: DeepSpeed's engine also advances the schedule
        start = group.get("initial_lr", self.args.learning_rate)
        rate = self.config.beta_learning_rate * (float(group["lr"]) / start if start else 1.0)
        loss = super().training_step(*args, **kwargs)
        if self.learns and self.accelerator.sync_gradients:
            self._step_beta(rate)
        return loss

    def _step_beta(self, learning_rate: float) -> None:
        """Step beta with its own optimizer, because those of FSDP and DeepSpeed know only the policy's weights."""
        (group,), scaler = self.beta_optimizer.param_groups, self.accelerator.scaler
        for weight in group["params"]:
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = self.accelerator.reduce(own, reduction="mean")
            if scaler is not None:  # float16: the loss was multiplied by this before backward
                weight.grad /= scaler.get_scale()
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.beta_max_norm)
        if norm.isfinite():  # a single non-finite step would ruin beta for good
            group["lr"] = learning_rate
            self.beta_optimizer.step()
        self.beta_optimizer.zero_grad()

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            assert folder is not None  # transformers fills it in
            self.beta_module.save_pretrained(Path(folder) / "beta")
        super().save_model(output_dir, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.learns and self.args.should_save:
            torch.save(self.beta_optimizer.state_dict(), Path(output_dir) / "beta" / "optimizer.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # always called, unlike _load_from_checkpoint
        if self.learns and checkpoint is not None:
            self._load_beta(checkpoint)
            saved = Path(checkpoint) / "beta" / "optimizer.pt"
            if saved.is_file():  # absent with save_only_model
                self.beta_optimizer.load_state_dict(torch.load(saved, weights_only=True))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.learns:
            assert self.state.best_model_checkpoint is not None
            self._load_beta(self.state.best_model_checkpoint)

    def _load_beta(self, checkpoint: str) -> None:
        self.beta_module.load_state_dict(load_file(Path(checkpoint) / "beta" / "model.safetensors"))
