"""Run a model's body on a shared-prefix batch, and its own head on selected hidden states.

A `transformers` model builds its attention mask from its own rule (causal, sliding window, chunked) and the indices of
two tokens in a row. Here the rule gets their positions in their own sequence instead, and tokens of other sequences
are masked too, so windows of any kind work as in the model. The head is all of the model's code after its body, so
scaled or capped logits are the model's own as well.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer

from dpoviz.lm.packing import PrefixBatch


class Predictions(NamedTuple):
    """Predictions of the answer tokens.

    Attributes:
        states: (N, ·) hidden states, or logits.
        head: maps states (n, ·) to logits (n, V).
        of_prompts: (M, D) hidden states of the prompt tokens, or None.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    of_prompts: Tensor | None = None


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without PEFT's wrapper; its adapters are layers inside it and stay active."""
    if not hasattr(model, "get_base_model"):
        return model
    wrapped: Any = model  # a PeftModel
    if wrapped.active_peft_config.is_prompt_learning:
        raise ValueError("model: got a prompt-tuning adapter, which lives outside the model; expected one such as LoRA")
    return wrapped.get_base_model()


def context_length(model: PreTrainedModel) -> int | None:
    """Return the context length in tokens from the model's configuration; None if it has none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def predict_shared(model: PreTrainedModel, batch: PrefixBatch) -> Predictions:
    """Predict the answers of a shared-prefix batch, with several prompts and answers per row."""
    with _shared_masks(batch):
        return _predict(model, batch, position_ids=batch.position_ids)


def predict_padded(model: PreTrainedModel, batch: PrefixBatch) -> Predictions:
    """Predict the answers of a batch with one prompt and one answer per row, padded on the right."""
    return _predict(model, batch)


def predict_alone(model: PreTrainedModel, batch: PrefixBatch, *, prompts: bool = False) -> Predictions:
    """Predict the answers of a batch with one prompt and one answer per row, by one plain forward pass per row.

    Args:
        prompts: also return the hidden states of the prompts.
    """
    logits, of_prompts = [], []
    last = batch.lengths.cumsum(0) - 1  # index in targets of the last token of each answer
    for row in range(len(batch.input_ids)):
        length = int((batch.segments[row] >= 0).sum())
        start = int((batch.segments[row] == 0).sum())
        ids = torch.cat([batch.input_ids[row, :length], batch.targets[last[row], None]])
        out = _plain(model, ids[None], output_hidden_states=prompts)
        logits.append(out.logits[0, start - 1 : length])
        if prompts:
            of_prompts.append(out.hidden_states[-1][0, :start])
    return Predictions(torch.cat(logits), lambda states: states, torch.cat(of_prompts) if prompts else None)


def plain_logits(model: PreTrainedModel, tokens: list[int], places: Tensor | None = None) -> Tensor:
    """Return the (T, V) logits of one sequence alone in its batch, the ground truth for all other ways.

    Args:
        places: (n,) return the (n, V) logits at these positions only.
    """
    ids = torch.tensor([tokens], device=model.device)
    if places is None:
        return _plain(model, ids).logits[0]
    if "logits_to_keep" in signature(model.forward).parameters:
        logits = _plain(model, ids, logits_to_keep=places).logits[0]
        if len(logits) == len(places):
            return logits
    return plain_logits(model, tokens)[places]


def _plain(model: PreTrainedModel, ids: Tensor, **more: object) -> Any:
    if "attention_mask" in signature(model.forward).parameters:  # else padding tokens cause a warning
        more["attention_mask"] = torch.ones_like(ids)
    return model(input_ids=ids, use_cache=False, **more)


def _predict(model: PreTrainedModel, batch: PrefixBatch, **more: Any) -> Predictions:
    out = _body_output(model, batch.input_ids, attention_mask=(batch.segments >= 0).long(), **more)
    hidden = out["last_hidden_state"].flatten(0, 1)
    return Predictions(hidden[batch.predictors], _own_head(model, out), hidden[batch.prompt_tokens])


def fill_cache(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache) -> None:
    """Fill a cache with the keys and values of (B, T) tokens, padded on the left."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    more: dict[str, Any] = {cache_argument(model): cache}
    _body_output(model, ids, attention_mask=mask, position_ids=positions, use_cache=True, **more)


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the model's cache argument."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # before 5.24


def _body_output(model: PreTrainedModel, ids: Tensor, *, use_cache: bool = False, **more: object) -> dict[str, Any]:
    """Return the output of the model's body, from a call of the whole model whose head sees one token per row."""
    kept: list[Any] = []

    def look(*args, **kwargs):
        out = inner(*args, **kwargs)
        kept.append(out)
        return type(out)(**{**out, "last_hidden_state": out["last_hidden_state"][:, :1]})

    with _body_stands_for(model) as (body, inner):
        body.forward = look
        model(input_ids=ids, use_cache=use_cache, **more)
    if len(kept) != 1:
        raise NotImplementedError(f"{type(model).__name__} calls its body {len(kept)} times")
    return kept[0]


def _own_head(model: PreTrainedModel, out: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the map from (n, D) hidden states to (n, V) logits: the model's code after its body."""

    def head(states: Tensor) -> Tensor:
        given = type(out)(**{**out, "last_hidden_state": states[None]})
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        with _body_stands_for(model) as (body, _):
            body.forward = lambda *args, **kwargs: given
            return model(input_ids=ids, use_cache=False).logits[0]

    return head


@contextmanager
def _body_stands_for(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Callable]]:
    """Yield the model's body and its forward, and restore the forward afterwards."""
    body = _body(model)
    inner, own = body.forward, vars(body).get("forward")
    try:
        yield body, inner
    finally:
        if own is None:
            vars(body).pop("forward", None)
        else:
            body.forward = own


_BODIES: weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref] = weakref.WeakKeyDictionary()


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the module whose hidden states the head reads: the first inner model that is called."""
    if model not in _BODIES:
        called = []
        inside = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
        hooks = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in inside]
        try:
            with torch.no_grad():
                _plain(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
        finally:
            for hook in hooks:
                hook.remove()
        if not called:
            raise NotImplementedError(f"{type(model).__name__} calls no body")
        _BODIES[model] = weakref.ref(called[0])
    body = _BODIES[model]()
    assert body is not None  # it is a part of the model, which is there
    return body


class CompiledLayers:
    """The layers of a model, compiled by `torch.compile`; used inside ``with``, and as they were outside.

    All layers share their code, so that one is compiled for all: few large kernels instead of many small ones, which a
    CPU launches too slowly for a GPU that computes a small model. The first calls inside compile, for minutes on a CPU.

    Raises:
        ValueError: the model has no layers that `transformers` marks as such.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"compile: got {type(model).__name__}, which has no layers that can be compiled; leave it")
        # dynamic: the rows of each batch have another shape
        self._layers = [(layer, torch.compile(layer._call_impl, dynamic=True)) for layer in layers]

    def __enter__(self) -> None:
        for layer, call in self._layers:
            layer._compiled_call_impl = call

    def __exit__(self, *_: object) -> None:
        for layer, _call in self._layers:
            layer._compiled_call_impl = None


_MASKS = threading.RLock()


@contextmanager
def _shared_masks(batch: PrefixBatch) -> Iterator[None]:
    """Build masks with each model's own rule applied to positions, and mask tokens of other sequences."""
    own = dict(ALL_MASK_ATTENTION_FUNCTIONS.items())

    def wrap(make: Callable) -> Callable:
        def mask(*args, mask_function: Callable, **kwargs):
            def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                at = batch.position_ids
                return mask_function(row, head, at[row, query], at[row, key]) & batch.related(row, query, key)

            return make(*args, mask_function=seen, **{**kwargs, "attention_mask": None, "allow_is_causal_skip": False})

        return mask

    with _MASKS:  # the table is shared by all threads
        try:
            for name, make in own.items():
                ALL_MASK_ATTENTION_FUNCTIONS[name] = wrap(make)
            yield
        finally:
            for name, make in own.items():
                del ALL_MASK_ATTENTION_FUNCTIONS[name]
                if ALL_MASK_ATTENTION_FUNCTIONS.get(name) is not make:  # it had been an override
                    ALL_MASK_ATTENTION_FUNCTIONS[name] = make
