"""Prompts and answers to shared-prefix batches, log-probabilities, entropies and prompt features; sampling.

A prompt stands once and its answers behind it (two for a preference pair); short prompts fill up the rows that long
ones need. An answer sees its prompt and itself, never its rivals, and its positions start again after the prompt: so
the scores are those of separate sequences, while what they share is computed once. Logits are computed only where an
answer is predicted.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpoviz.lm.packing import PrefixBatch, Tokens, prefix_batch, require_tokens

logger = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 2**25
"""Numbers in one chunk of logits, 128 MiB in float32, whatever the vocabulary.

Logits, their softmax and what the backward pass makes of them are alive together: the measured peak is 2 such
chunks forward and 3 with the backward pass, 4 and 5 where entropies are wanted too; a bfloat16 head adds half of one.
"""


class AnswerScores(NamedTuple):
    """Scores of B prompts' K answers.

    Attributes:
        logps: (B, K) log-probability of each answer, summed over its tokens, in nats.
        lengths: (B, K) tokens of each answer, its end token included.
        entropy_sums: (B, K) the exact next-token entropies along each answer, summed, in nats; or None.
        first_entropies: (B,) the exact entropy of the first token, in nats; or None.
        features: (B, D) mean of the last hidden states over the prompt's tokens, in float32, detached; or None.
    """

    logps: Tensor
    lengths: Tensor
    entropy_sums: Tensor | None = None
    first_entropies: Tensor | None = None
    features: Tensor | None = None


def score_answers(
    model: PreTrainedModel,
    prompts: Tokens,
    answers: Sequence[Tokens],
    *,
    pad_id: int,
    entropy: bool = False,
    features: bool = False,
    shared_prefix: bool | None = None,
) -> AnswerScores:
    """Log-probabilities of K answers to each prompt, on the model's device, with gradient where it is on.

    Args:
        model: a causal language model, or one with PEFT's adapters.
        prompts: B prompts as token ids.
        answers: for each prompt K answers as token ids.
        pad_id: token that fills the rows.
        entropy: also the exact next-token entropies along the answers.
        features: also the prompts' features.
        shared_prefix: compute each prompt once for all its answers; None asks `supports_shared_prefix`.

    Raises:
        ValueError: as `prefix_batch`, a token that the model does not know, or an adapter by prompt tuning.
    """
    model = language_model(model)
    require_known(model, chain([[pad_id]], prompts, *answers))
    if shared_prefix is None:
        shared_prefix = supports_shared_prefix(model)
    score = _shared_scores if shared_prefix else _separate_scores
    return score(model, prompts, answers, pad_id=pad_id, entropy=entropy, features=features)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, without PEFT's wrapping; its adapters are layers inside it and act as before."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("model: got a prompt-tuning adapter, which lives outside the model; expected one such as LoRA")
    return model.get_base_model()


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model reads, by its configuration; None where that does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def require_known(model: PreTrainedModel, tokens: Iterable[Sequence[int]]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        ValueError: there is one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    wrong = next((token for own in tokens for token in own if not 0 <= token < rows), None)
    if wrong is not None:
        raise ValueError(
            f"tokens: got the id {wrong}, expected 0 to {rows - 1}: the model has {rows} embeddings; use its own "
            "tokenizer, or give the model rows for the new tokens (model.resize_token_embeddings)"
        )


def _shared_scores(
    model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], *, pad_id: int, entropy: bool, features: bool
) -> AnswerScores:
    batch = prefix_batch(prompts, answers, pad_id).to(model.device)
    hidden = _hidden_states(model, batch)  # (R * T, D)
    logps, entropies = _token_scores(model.get_output_embeddings(), hidden[batch.predictors], batch.targets, entropy)
    means = _means(hidden[batch.prompt_tokens], batch.prompt_owners)[batch.prompts] if features else None
    return _collect(logps, entropies, batch.owners, batch.answers, means)


def _hidden_states(model: PreTrainedModel, batch: PrefixBatch) -> Tensor:
    return model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask(model.dtype),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)


def _separate_scores(
    model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], *, pad_id: int, entropy: bool, features: bool
) -> AnswerScores:
    """One sequence an answer, by the model's own logits: for models that cannot take the mask; the slow twin.

    The model itself makes the logits here, of all positions and at once, in its own precision.
    """
    require_tokens(prompts, answers)
    k = len(answers[0])
    rows = [(list(p), list(a)) for p, own in zip(prompts, answers, strict=True) for a in own]
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True, padding_value=pad_id)
    length = torch.tensor([len(p) + len(a) for p, a in rows])
    start = torch.tensor([len(p) for p, _ in rows])
    t = torch.arange(ids.shape[1])
    ids, length, start, t = (tensor.to(model.device) for tensor in (ids, length, start, t))
    out = model(
        input_ids=ids, attention_mask=(t < length[:, None]).long(), use_cache=False, output_hidden_states=features
    )
    row, place = ((t >= start[:, None]) & (t < length[:, None])).nonzero(as_tuple=True)
    logps, entropies = _token_scores(None, out.logits[row, place - 1], ids[row, place], entropy)
    means = None
    if features:
        prompt, place = (t < start[::k, None]).nonzero(as_tuple=True)
        means = _means(out.hidden_states[-1][::k][prompt, place], prompt)
    return _collect(logps, entropies, row, torch.arange(len(rows), device=row.device).view(-1, k), means)


def _means(states: Tensor, owners: Tensor) -> Tensor:
    """Mean of those of the (M, D) hidden states that have one owner, in float32 and detached; owners rise from 0."""
    counts = owners.bincount()
    sums = states.new_zeros(len(counts), states.shape[1], dtype=torch.float32)
    return sums.index_add(0, owners, states.detach().float()) / counts[:, None]


def _token_scores(
    head: Callable[[Tensor], Tensor] | None, states: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probability of each target, and (N,) entropies, in at least float32, chunk by chunk.

    A chunk's logits are computed again in the backward pass when there are several: (N, V) is never held.
    """

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = states if head is None else head(states)
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        return logps.gather(-1, targets[:, None]).squeeze(-1), token_entropies(logps) if entropy else None

    vocabulary = states.shape[-1] if head is None else head.weight.shape[0]
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    if len(states) <= size:
        return score(states, targets)
    parts = [
        checkpoint(score, s, t, use_reentrant=False) if torch.is_grad_enabled() else score(s, t)
        for s, t in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy else None


def token_entropies(logps: Tensor) -> Tensor:
    """(N,) entropies of the distributions with (N, V) log-probabilities."""
    return -(logps.exp() * logps).sum(dim=-1)


def _collect(
    logps: Tensor, entropies: Tensor | None, owners: Tensor, answers: Tensor, features: Tensor | None
) -> AnswerScores:
    """Sum over the tokens of each of the U answers, and give (B, K) of them."""
    lengths = owners.bincount()  # (U,)
    first = (lengths.cumsum(0) - lengths)[answers[:, 0]]  # where the first answer to each prompt begins

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(lengths)).index_add(0, owners, values)[answers]

    return AnswerScores(
        logps=total(logps),
        lengths=lengths[answers],
        entropy_sums=None if entropies is None else total(entropies),
        first_entropies=None if entropies is None else entropies[first],
        features=features,
    )


@torch.no_grad()
def score_both(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Tokens,
    answers: Sequence[Tokens],
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    pad_id: int,
) -> Tensor:
    """Look at the next-token logits of two models side by side, wherever an answer is predicted; no gradient.

    Args:
        policy: a causal language model, or one with PEFT's adapters; left in the mode it was in.
        reference: the model it started from, on the same device. A PEFT policy may stand for it itself: its
            adapter is then turned off.
        prompts: B prompts as token ids.
        answers: for each prompt K answers as token ids.
        score: (policy's logits (n, V), reference's logits (n, V), targets (n,)) → (n, C), in at least float32;
            called chunk by chunk.
        pad_id: token that fills the rows.

    Returns:
        (B, K, C) the scores of each answer's tokens, summed, in float64.

    Raises:
        ValueError: the models differ in their vocabulary, `reference` is a policy without an adapter, or as
            `prefix_batch`.
    """
    require_tokens(prompts, answers)
    if reference is policy and not hasattr(policy, "disable_adapter"):
        raise ValueError("reference: got the policy itself, without an adapter to turn off; expected another model")
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"reference: got a vocabulary of {sizes[1]}, expected the policy's {sizes[0]}")
    adapter_off = policy.disable_adapter if reference is policy else nullcontext
    shared = supports_shared_prefix(policy) and supports_shared_prefix(reference)
    k = len(answers[0])
    if not shared:  # a row for each answer
        prompts = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
        answers = [[answer] for own in answers for answer in own]
    batch = prefix_batch(prompts, answers, pad_id, packed=shared).to(policy.device)
    with evaluating(policy), evaluating(reference):
        of_policy, policy_head = _predictors(policy, batch, shared)
        with adapter_off():
            of_reference, reference_head = _predictors(reference, batch, shared)
        parts = []
        size = max(1, _LOGITS_AT_ONCE // (2 * sizes[0]))  # the logits of two models at once
        for own, other, targets in zip(
            of_policy.split(size), of_reference.split(size), batch.targets.split(size), strict=True
        ):
            with adapter_off():  # it may sit on the head too
                ref_logits = reference_head(other)
            logits = policy_head(own)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            parts.append(score(logits.to(dtype), ref_logits.to(dtype), targets))
    of_tokens = torch.cat(parts).double()  # (N, C)
    sums = of_tokens.new_zeros(int(batch.owners[-1]) + 1, of_tokens.shape[1]).index_add(0, batch.owners, of_tokens)
    return sums[batch.answers].view(-1, k, of_tokens.shape[1])


def _predictors(model: PreTrainedModel, batch: PrefixBatch, shared: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(N, ·) what predicts each answer token, and what makes logits of it."""
    model = language_model(model)
    if shared:
        return _hidden_states(model, batch)[batch.predictors], model.get_output_embeddings()
    mask = (batch.segments >= 0).long()
    logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
    return logits.flatten(0, 1)[batch.predictors], lambda logits: logits


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode, and back in the mode it was in, whatever happens."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


_SUPPORT: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def supports_shared_prefix(model: PreTrainedModel) -> bool:
    """Whether shared-prefix batches give what separate sequences give, found by trying; asked once a model.

    Attention that ignores the mask or the positions, and heads that do more than multiply, are found by their
    numbers. A model that fails is scored by separate sequences, which is slower, and a warning says so.
    """
    model = language_model(model)  # so that a model and its adapters are asked once
    if model not in _SUPPORT:
        with evaluating(model):
            _SUPPORT[model] = _both_ways_agree(model)
        if not _SUPPORT[model]:
            logger.warning(
                "%s cannot take shared-prefix batches; each answer is scored by itself, at about twice the cost, and "
                "all logits of a batch are in memory",
                type(model).__name__,
            )
    return _SUPPORT[model]


def _both_ways_agree(model: PreTrainedModel) -> bool:
    draw = torch.Generator().manual_seed(0)
    top = model.get_input_embeddings().num_embeddings
    one, two, three = torch.randint(top, (3, 18), generator=draw).tolist()
    # the last two fill a row together
    prompts = [one[:6], two[:3], three[:2]]
    answers = [[one[6:13], one[13:]], [two[3:9], two[9:11]], [three[2:6], three[6:9]]]
    try:
        # a window is part of a model's own mask, which ours replaces; the trial is too short to meet it
        if getattr(model.config.get_text_config(), "sliding_window", None):
            raise ValueError("its attention has a sliding window")
        tried = [f(model, prompts, answers, pad_id=0, entropy=False, features=False).logps
                 for f in (_shared_scores, _separate_scores)]  # fmt: skip
    except Exception as error:  # whatever an unfamiliar model raises: separate sequences are the way out
        logger.info("shared-prefix trial of %s: %s", type(model).__name__, error)
        return False
    # half precision rounds the two routes differently; a wrong mask is off by whole nats
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.02
    return torch.allclose(*tried, rtol=tolerance, atol=tolerance)
