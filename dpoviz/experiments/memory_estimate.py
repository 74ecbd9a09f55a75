"""Estimate the memory of a training run before it starts, and refuse one that would not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpoviz.data.tokens import token_counts
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.real import Loaded
from dpoviz.lm.models import add_lora, lora_targets
from dpoviz.lm.packing import Tokens
from dpoviz.lm.processes import autocast, in_its_precision
from dpoviz.lm.scoring import context_length, logits_bytes
from dpoviz.lm.trial import Road, lay_out, predict
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
    order = token_counts(loaded.train).sum(axis=1).argsort(kind="stable")[::-1]
    widest = loaded.train.select(order[:at_once].tolist())[:]
    answers = [list(own) for own in zip(widest["chosen_ids"], widest["rejected_ids"], strict=True)]
    checkpointing = settings.gradient_checkpointing
    with _as_trained(model, config.lora_rank):
        road, *sizes = kept(model, checkpointing=checkpointing)
        rows, width = lay_out(model, widest["prompt_ids"], answers, 0, road)[1].input_ids.shape
        batch = np.array([1, rows * width, rows * width**2])
        activations = float(batch @ sizes)
        if checkpointing:  # the backward pass computes one layer again at a time
            layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
            activations += float(batch @ kept(model, checkpointing=False)[1:]) / layers
    masks = int(batch[2]) * (1 + model.dtype.itemsize)  # that of the batch, and a layer's copy of it as numbers
    predicted = sum(len(answer) for own in answers for answer in own)
    return Memory(weights, 4 * trained, int(activations) + masks, logits_bytes(model, predicted))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _adapter_weights(layer: Any, rank: int) -> int:
    # the weights of a layer in 4 bits are packed, so that their shape says nothing
    return rank * (layer.in_features + layer.out_features if isinstance(layer, nn.Linear) else sum(layer.weight.shape))


@contextmanager
def _as_trained(model: PreTrainedModel, rank: int) -> Iterator[None]:
    """Give the model adapters of a rank, if it is not 0, and take them off afterwards."""
    if not rank:
        yield
        return
    before = [(p, p.requires_grad) for p in model.parameters()]
    policy: Any = add_lora(model, rank=rank)
    try:
        yield
    finally:
        policy.unload()
        for parameter, trained in before:
            parameter.requires_grad_(trained)


_LONGEST = 64
"""Tokens of the longest prompt on which memory is measured."""


def kept(model: PreTrainedModel, *, checkpointing: bool) -> tuple[Road, float, float, float]:
    """Return how a pair is laid out, and the bytes that a forward pass keeps for the backward pass.

    Measured on pairs of three lengths, of which each is the double of the one before. Tensors that share their memory
    count once, and weights not at all. The head is left out: its memory does not grow with the tokens.

    Returns:
        The way of scoring; and the bytes of a batch, those per token, padding included, and those per square of a row's
        tokens: attention keeps masks.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    longest = min(_LONGEST, (context_length(model) or _LONGEST) // 2) // 4 * 4
    shapes, sizes = [], []
    for n in (longest // 4, longest // 2, longest):
        prompt, *answers = ([(start + i) % vocabulary for i in range(m)] for start, m in ((3, n), (5, n), (7, n)))
        road, rows, width, size = _kept_bytes(model, [prompt], [answers], checkpointing)
        shapes.append([1, rows * width, rows * width**2])
        sizes.append(size)
    constant, per_token, per_square = np.linalg.solve(np.array(shapes, float), sizes)
    return road, max(constant, 0.0), max(per_token, 0.0), max(per_square, 0.0)


def _kept_bytes(
    model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], checkpointing: bool
) -> tuple[Road, int, int, int]:
    """Return the way of scoring, the rows of the batch, their width, and the bytes that are kept."""
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
    rows, width = batch.input_ids.shape
    return road, rows, width, sum(size for _, size in found.values())
