"""Log-probabilities of answers, next-token entropies along them, and features of prompts.

A prompt stands once and its answers behind it (`dpoviz.lm.packing`) wherever the model allows that; which way is right
for a model is found by trying (`dpoviz.lm.trial`). Logits are computed only where an answer is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpoviz.lm.forward import Predictions, context_length, language_model
from dpoviz.lm.packing import Tokens, require_tokens
from dpoviz.lm.processes import autocast
from dpoviz.lm.trial import Road, Size, evaluating, is_right, lay_out, predict

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
    """Return log-probabilities of K answers to each prompt, on the model's device, with gradient where it is on.

    Args:
        model: a causal language model, or one with PEFT's adapters.
        prompts: B prompts as token ids.
        answers: for each prompt K answers as token ids.
        pad_id: token that fills the rows.
        entropy: also the exact next-token entropies along the answers.
        features: also the prompts' features.
        shared_prefix: None takes the fastest way that gives what plain forwards give, found by trying, on rows as
            long as these; True computes each prompt once for all its answers, False has a row for each answer,
            and nothing is tried.

    Raises:
        ValueError: as `prefix_batch`; a token that the model has no row for, a sequence beyond its context; an adapter
            by prompt tuning; or a model that is scored rightly in no way, such as an encoder.
    """
    model = language_model(model)
    require_tokens(prompts, answers)
    require_readable(model, prompts, answers)
    require_tokens_of(model, "pad_id", [[pad_id]])
    road = None if shared_prefix is None else Road.SHARED if shared_prefix else Road.PADDED
    road, batch = lay_out(model, prompts, answers, pad_id, road)
    with autocast(model.device):
        found = predict(model, batch, road, prompts=features)
        logps, entropies = _token_scores(found, batch.targets, entropy, _vocabulary(model))
    k = len(answers[0])
    means = None
    if features:
        assert found.of_prompts is not None
        means = _means(found.of_prompts, batch.prompt_owners)[batch.prompts]
        means = means if road.shared else means[::k]
    return _collect(logps, entropies, batch.owners, batch.answers.view(-1, k), means)


def require_readable(model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens]) -> None:
    """Refuse tokens that the model does not have, and sequences beyond its context.

    Raises:
        ValueError: by row.
    """
    require_tokens_of(model, "prompts", prompts)
    for j in range(len(answers[0])):
        require_tokens_of(model, "answers", [own[j] for own in answers])
    context = context_length(model)
    for row, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        longest = len(prompt) + max(len(answer) for answer in own)
        if context is not None and longest > context:
            raise ValueError(
                f"answers: got {longest} tokens with the prompt in row {row}, expected at most the model's context, "
                f"{context}; leave longer ones out"
            )


def require_tokens_of(model: PreTrainedModel, name: str, texts: Tokens) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        ValueError: by name and row.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    for row, text in enumerate(texts):
        odd = next((token for token in (min(text), max(text)) if not 0 <= token < rows), None)
        if odd is not None:
            raise ValueError(
                f"{name}: got token {odd} in row {row}, expected 0 to {rows - 1}, those of the model; use its own "
                "tokenizer, or model.resize_token_embeddings"
            )


def supports_shared_prefix(model: PreTrainedModel, longest: int = 32, widest: int = 64) -> bool:
    """Return True where shared-prefix batches give what plain forwards give, found by trying.

    Args:
        model: a causal language model, or one with PEFT's adapters.
        longest: tokens of a prompt with an answer.
        widest: tokens of a row.
    """
    return is_right(model, Road.SHARED, Size(longest, max(longest, widest)))


def _vocabulary(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return model.config.get_text_config(decoder=True).vocab_size if head is None else head.weight.shape[0]


def _means(states: Tensor, owners: Tensor) -> Tensor:
    """Mean of those of the (M, D) hidden states that have one owner, in float32 and detached; owners rise from 0."""
    counts = owners.bincount()
    sums = states.new_zeros(len(counts), states.shape[1], dtype=torch.float32)
    return sums.index_add(0, owners, states.detach().float()) / counts[:, None]


def _token_scores(found: Predictions, targets: Tensor, entropy: bool, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probability of each target, and (N,) entropies, in at least float32, chunk by chunk.

    A chunk's logits are computed again in the backward pass when there are several: (N, V) is never held.
    """

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logps = log_softmax(found.head(states))
        return logps.gather(-1, targets[:, None]).squeeze(-1), token_entropies(logps) if entropy else None

    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    if len(found.states) <= size:
        return score(found.states, targets)
    parts: list[Any] = [
        checkpoint(score, s, t, use_reentrant=False) if torch.is_grad_enabled() else score(s, t)
        for s, t in zip(found.states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy else None


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def token_entropies(logps: Tensor) -> Tensor:
    """Return (N,) entropies of the distributions with (N, V) log-probabilities; p log p is 0 where p is 0."""
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(dim=-1)


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
    adapter_off: Any = policy.disable_adapter if reference is policy else nullcontext
    models = [language_model(model) for model in (policy, reference)]
    for model in models:
        require_readable(model, prompts, answers)
    laid = [lay_out(model, prompts, answers, pad_id) for model in models]
    road, batch = max(laid, key=lambda one: list(Road).index(one[0]))  # the slower one is right for both
    with evaluating(policy), evaluating(reference), autocast(policy.device):
        of_policy = predict(models[0], batch, road)
        with adapter_off():
            of_reference = predict(models[1], batch, road)
        parts = []
        size = max(1, _LOGITS_AT_ONCE // (2 * sizes[0]))  # the logits of two models at once
        for own, other, targets in zip(
            of_policy.states.split(size), of_reference.states.split(size), batch.targets.split(size), strict=True
        ):
            with adapter_off():  # it may sit on the head too
                ref_logits = of_reference.head(other)
            logits = of_policy.head(own)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            parts.append(score(logits.to(dtype), ref_logits.to(dtype), targets))
    of_tokens = torch.cat(parts).double()  # (N, C)
    sums = of_tokens.new_zeros(int(batch.owners[-1]) + 1, of_tokens.shape[1]).index_add(0, batch.owners, of_tokens)
    return sums[batch.answers].view(-1, len(answers[0]), of_tokens.shape[1])
