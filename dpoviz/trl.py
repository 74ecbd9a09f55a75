"""The objective inside TRL's `DPOTrainer`, for those who train with it already (the extra `trl`)."""

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
"""What beta(x) and its regularisers read beside a pair; `reference_pass` makes them."""


def trl_dataset(scored: Dataset) -> Dataset:
    """Pairs in the layout of TRL, with what the reference makes of them beside each.

    Args:
        scored: what `reference_pass` returned.

    Returns:
        prompt, chosen and rejected, as chat messages where a prompt is a chat, and as texts elsewhere; a set holds one
        kind. ref_chosen_logps and ref_rejected_logps, of our tokens: TRL's are others where a prompt is a chat, and
        `BetaDPOTrainer` has its own. `COLUMNS`.

    Raises:
        ValueError: texts and chats in one set, which TRL does not take.
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
    """The trainer's batch, and beside it what beta reads of each pair."""

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
        columns = data.column_names or list(next(iter(data)))  # a stream may not know its columns
        missing = [column for column in COLUMNS if column not in columns]
        if missing:
            raise ValueError(f"{name}: lacks {', '.join(missing)}; expected what trl_dataset returns")


class BetaDPOTrainer(DPOTrainer):
    r"""TRL's `DPOTrainer` with a beta that depends on the prompt, in either form, and its regularisers.

    The loss of each pair is TRL's, with :math:`s(x)` where TRL has its one beta; rewards, margins and the other loss
    types follow, but for "aot" and "aot_unpaired", which sort a batch before they multiply by beta. To it come
    :math:`L_{range} + L_{smooth} + L_{entropy}` (the derivation, §5), where beta learns. Logged beside TRL's numbers:
    beta/<task>, and loss/<term> of each regulariser. Several processes train one beta, that of the main process at the
    start; its batch norm and its terms are those of each process's share of a batch. FSDP and DeepSpeed may cut up the
    policy; each process holds all of beta.

    Args:
        model: as in `DPOTrainer`, and so are all other arguments, which are given by name.
        beta: any `Beta`. One that learns is trained with the policy, by an AdamW of its own: its own learning rate, on
            the policy's schedule, and its own clipping.
        config: form, range, weights of the regularisers, beta's learning rate and norm; the rest is `args`'. Its
            `beta0` is not read.
        train_dataset: with the columns `COLUMNS`, as `trl_dataset` gives it; a stream needs `config.alpha` where the
            entropy term acts.

    Raises:
        ValueError: a data set without those columns, no alpha for a stream, a loss type that sorts with a beta that
            varies, float16 under DeepSpeed, or several processes that precompute the reference of a set in memory,
            where they cannot share what TRL writes to a file.
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
            raise ValueError("args.fp16: expected bf16 or float32 under DeepSpeed, which scales the loss out of sight")
        beta.to(self.accelerator.device).load_state_dict(broadcast(beta.state_dict()))  # the main process's
        if self.learns:
            self.beta_optimizer = adamw(beta, config.beta_learning_rate)
        self.data_collator = _Collator(self.data_collator)

    def _weights(self, train_dataset: Dataset | IterableDataset | None) -> Regularization:
        """The penalties' weights, with alpha from the data where the configuration leaves it open."""
        config = self.config
        entropy: Any = None
        if config.alpha is None and config.lambda_entropy > 0 and train_dataset is not None:
            if isinstance(train_dataset, IterableDataset):
                raise ValueError("config.alpha: got None, expected a number, as a stream is not read before")
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
        # every loss of the parent multiplies by its one beta; (B,) in its place gives each pair its own
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
        # TRL's own, of its own tokens: a chat's go on there with what the template puts behind the end of a turn
        found = dataset.column_names or []  # a stream may not know its columns, and TRL refuses it
        ours = [column for column in ("ref_chosen_logps", "ref_rejected_logps") if column in found]
        if found and self.accelerator.num_processes > 1 and not dataset.cache_files:
            raise ValueError(
                f"{name}_dataset: is in memory; with args.precompute_ref_log_probs and several processes expected one "
                "on disk, by save_to_disk and load_from_disk, beside which they share what TRL computes"
            )
        return super()._precompute_ref_logps(dataset.remove_columns(ours) if ours else dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in COLUMNS})

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            _require_columns("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        group = self.optimizer.param_groups[0]  # before DeepSpeed's engine steps, and its schedule with it
        start = group.get("initial_lr", self.args.learning_rate)
        rate = self.config.beta_learning_rate * (float(group["lr"]) / start if start else 1.0)
        loss = super().training_step(*args, **kwargs)
        if self.learns and self.accelerator.sync_gradients:
            self._step_beta(rate)
        return loss

    def _step_beta(self, learning_rate: float) -> None:
        """By an optimizer of its own: those of FSDP and DeepSpeed know the weights of the policy alone."""
        (group,), scaler = self.beta_optimizer.param_groups, self.accelerator.scaler
        for weight in group["params"]:
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = self.accelerator.reduce(own, reduction="mean")
            if scaler is not None:  # float16: what is backpropagated is the loss times this
                weight.grad /= scaler.get_scale()
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.beta_max_norm)
        if norm.isfinite():  # one step that is not would spoil beta for good
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
        super()._load_optimizer_and_scheduler(checkpoint)  # called in every setting, _load_from_checkpoint is not
        if self.learns and checkpoint is not None:
            self._load_beta(checkpoint)
            saved = Path(checkpoint) / "beta" / "optimizer.pt"
            if saved.is_file():  # not with save_only_model
                self.beta_optimizer.load_state_dict(torch.load(saved, weights_only=True))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.learns:
            assert self.state.best_model_checkpoint is not None
            self._load_beta(self.state.best_model_checkpoint)

    def _load_beta(self, checkpoint: str) -> None:
        self.beta_module.load_state_dict(load_file(Path(checkpoint) / "beta" / "model.safetensors"))
