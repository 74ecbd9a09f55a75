"""Estimate the memory of a training run before it starts, and refuse one that would not fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoviz.data.tokens import token_counts
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.real import Loaded
from dpoviz.lm.models import lora_targets
from dpoviz.lm.packing import Tokens
from dpoviz.lm.processes import autocast, in_its_precision
from dpoviz.lm.scoring import logits_bytes
from dpoviz.lm.trial import lay_out, predict
from dpoviz.training.batch import part_rows
from dpoviz.training.state import layers_as_set, training_mode


@dataclass(frozen=True)
class Memory:
    """Memory that a training step needs, in bytes.

    Attributes:
        weights: those of the model, of the reference's copy if all weights are trained, and of the adapters.
        training: gradients, AdamW's two moments, and the trained weights at the end of stage 1.
        activations: what the widest part of a batch keeps for its backward pass.
        logits: one chunk of logits with what its backward pass needs.
    """

    weights: int
    training: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.logits


def require_memory(config: RealConfig, loaded: Loaded) -> Memory:
    """Return the estimated memory of a run, and refuse one that would not fit.

    Raises:
        ValueError: it needs more than the device has: the GPU's free memory and what PyTorch holds, or a computer's
            memory. The message names the parts, and the settings that would make it fit.
    """
    needed, room = estimate_memory(config, loaded), available(loaded.model.device)
    if needed.total <= room:
        return needed
    parts = ", ".join(f"{name} {_gb(value)}" for name, value in vars(needed).items())
    advice = []
    for change, other in _changes(config):
        less = estimate_memory(other, loaded).total
        if less < needed.total:
            advice.append(f"{change} ({_gb(less)})")
    raise ValueError(
        f"memory: got an estimated {_gb(needed.total)} ({parts}), expected at most {_gb(room)}; try "
        + ", ".join([*advice, "a smaller --max-length, a smaller model"])
    )


def _changes(config: RealConfig) -> list[tuple[str, RealConfig]]:
    """Return the settings that save memory, each alone and then all together, with the option that sets them."""

    def changed(**settings: Any) -> RealConfig:
        return replace(config, training=replace(config.training, **settings))

    parts = config.training.gradient_accumulation * 4
    both = changed(gradient_accumulation=parts, gradient_checkpointing=True)
    found = [
        (f"--gradient-accumulation {parts}", changed(gradient_accumulation=parts)),
        ("--gradient-checkpointing", changed(gradient_checkpointing=True)),
        ("both", both),
    ]
    return found if config.lora_rank else [*found, ("--lora-rank 16", replace(config, lora_rank=16))]


def available(device: torch.device) -> int:
    """Return the bytes that a run may use: on a GPU the free ones and those that PyTorch holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)  # the model, which the estimate counts, is a part of it
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@in_its_precision
def estimate_memory(config: RealConfig, loaded: Loaded) -> Memory:
    """Return the estimated memory of the widest step of a run."""
    model, settings = loaded.model, config.settings(len(loaded.train))
    assert settings.batch_size is not None  # filled in
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    if config.lora_rank:
        adapters = 4 * sum(
            _adapter_weights(model.get_submodule(name), config.lora_rank) for name in lora_targets(model)
        )
        weights, trained = own + adapters, adapters
    else:
        weights, trained = 2 * own, own
    parts = part_rows(settings.batch_size, settings.gradient_accumulation)
    at_once = max(rows.stop - rows.start for rows in parts)
    lengths = sorted(token_counts(loaded.train).sum(axis=1).tolist(), reverse=True)
    constant, per_token = kept(model, loaded.train, checkpointing=settings.gradient_checkpointing)
    widest = sum(lengths[:at_once])
    activations = int(constant + per_token * widest)
    return Memory(weights, 4 * trained, activations, logits_bytes(model, widest))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _adapter_weights(layer: Any, rank: int) -> int:
    # the weights of a layer in 4 bits are packed, so that their shape says nothing
    return rank * (layer.in_features + layer.out_features if isinstance(layer, nn.Linear) else sum(layer.weight.shape))


def kept(model: PreTrainedModel, pairs: Dataset, *, checkpointing: bool) -> tuple[float, float]:
    """Return the bytes that a forward pass keeps for the backward pass: a constant, and those per token.

    Measured on the shortest pair and on the three shortest. Tensors that share their memory count once, and weights not
    at all. The head is left out: its memory does not grow with the tokens.
    """
    lengths = token_counts(pairs).sum(axis=1)
    order = lengths.argsort(kind="stable")
    tokens, sizes = [], []
    for rows in (order[:1], order[:3]):
        some = pairs.select(rows.tolist())[:]
        answers = [list(own) for own in zip(some["chosen_ids"], some["rejected_ids"], strict=True)]
        tokens.append(int(lengths[rows].sum()))
        sizes.append(_kept_bytes(model, some["prompt_ids"], answers, checkpointing))
    if tokens[0] == tokens[1]:  # a single pair
        return 0.0, sizes[0] / tokens[0]
    per_token = (sizes[1] - sizes[0]) / (tokens[1] - tokens[0])
    return max(0.0, sizes[0] - per_token * tokens[0]), per_token


def _kept_bytes(model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], checkpointing: bool) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[Tensor, int]] = {}  # the tensor too, so that its memory is not used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    road, batch = lay_out(model, prompts, answers, 0)
    layers = layers_as_set(model, checkpointing=checkpointing, compiled=False)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with layers, training_mode(model, dropout=False), saved, autocast(model.device), torch.enable_grad():
        predict(model, batch, road)
    return sum(size for _, size in found.values())
