"""Compute log-probabilities of answers, next-token entropies along them, and features of prompts.

Prompts are shared by their answers (`dpoviz.lm.packing`) where the model supports it; a trial decides per model
(`dpoviz.lm.trial`). Logits are computed only where an answer is predicted.
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
from dpoviz.lm.packing import PrefixBatch, Tokens, prefix_batch, require_tokens
from dpoviz.lm.processes import autocast
from dpoviz.lm.trial import Road, Size, evaluating, is_right, lay_out, predict

_LOGITS_AT_ONCE = 2**25
"""Elements in one chunk of logits, 128 MiB in float32, for any vocabulary.

Logits, their softmax and the gradients are in memory together: the measured peak is 2 chunks forward and 3 with the
backward pass, or 4 and 5 with entropies; a bfloat16 head adds half a chunk.
"""


FEATURES = "mean of the last hidden states over the prompt's tokens"
"""How the features of a prompt are made."""


class AnswerScores(NamedTuple):
    """Scores of B prompts' K answers.

    Attributes:
        logps: (B, K) log π(y|x) of each answer, summed over its tokens, nats.
        lengths: (B, K) number of tokens of each answer, end token included.
        entropy_sums: (B, K) exact next-token entropies summed along each answer, nats; or None.
        first_entropies: (B,) exact entropy of the first token, nats; or None.
        features: (B, D) mean of the last hidden states over the prompt's tokens, float32, detached; or None.
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
    laid_out: PrefixBatch | None = None,
) -> AnswerScores:
    """Score K answers per prompt on the model's device, with gradients if they are enabled.

    Args:
        model: a causal language model, also with PEFT adapters.
        prompts: B prompts as token ids.
        answers: K answers per prompt as token ids.
        pad_id: padding token.
        entropy: also compute the exact next-token entropies along the answers.
        features: also compute the features of the prompts.
        shared_prefix: None selects the fastest way that agrees with plain forward passes, found by a trial on rows as
            long as these. True shares each prompt among its answers and False gives each answer its own row; both skip
            the trial.
        laid_out: the result of `lay_out_ahead` for these prompts and answers.

    Raises:
        ValueError: as in `prefix_batch`; a token is not in the model's vocabulary; a sequence exceeds its context; the
            adapter is a prompt-tuning one; no way scores the model correctly, as for an encoder.
    """
    model = language_model(model)
    if laid_out is None:
        _require_scorable(model, prompts, answers, pad_id)
    road = None if shared_prefix is None else Road.SHARED if shared_prefix else Road.PADDED
    road, batch = lay_out(model, prompts, answers, pad_id, road, laid_out=laid_out)
    with autocast(model.device):
        found = predict(model, batch, road, prompts=features)
        logps, entropies = _token_scores(found, batch.targets, entropy, _vocabulary(model))
    k = len(answers[0])
    means = None
    if features:
        assert found.of_prompts is not None
        means = _means(found.of_prompts, batch.prompt_owners, batch.prompt_lengths)[batch.prompts]
        means = means if road.shared else means[::k]
    return _collect(logps, entropies, batch, k, means)


def lay_out_ahead(model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], pad_id: int) -> PrefixBatch:
    """Return prompts and answers as shared-prefix rows on the CPU, for `score_answers`; may run in another thread.

    Raises:
        ValueError: as in `score_answers`.
    """
    _require_scorable(language_model(model), prompts, answers, pad_id)
    return prefix_batch(prompts, answers, pad_id)


def _require_scorable(model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], pad_id: int) -> None:
    require_tokens(prompts, answers)
    require_readable(model, prompts, answers)
    require_tokens_of(model, "pad_id", [[pad_id]])


def require_readable(model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens]) -> None:
    """Check that all tokens are in the model's vocabulary and all sequences fit its context.

    Raises:
        ValueError: one does not, named by row.
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
    """Check that all tokens are in the model's vocabulary.

    Raises:
        ValueError: one is not; the message gives `name` and the row.
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
    """Return whether shared-prefix batches agree with plain forward passes, found by a trial.

    Args:
        model: a causal language model, also with PEFT adapters.
        longest: length of a prompt with an answer, in tokens.
        widest: length of a row, in tokens.
    """
    return is_right(model, Road.SHARED, Size(longest, max(longest, widest)))


def _vocabulary(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return model.config.get_text_config(decoder=True).vocab_size if head is None else head.weight.shape[0]


def logits_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the memory that logits of up to `tokens` answer tokens need at once, with their gradients."""
    elements = min(_LOGITS_AT_ONCE, tokens * _vocabulary(model))
    return 14 * elements  # three and a half chunks in float32


def _means(states: Tensor, owners: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of (M, D) hidden states per owner, float32, detached; `counts` has the states of each."""
    sums = states.new_zeros(len(counts), states.shape[1], dtype=torch.float32)
    return sums.index_add(0, owners, states.detach().float()) / counts[:, None]


def _token_scores(found: Predictions, targets: Tensor, entropy: bool, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """Return (N,) log-probabilities of the targets and (N,) entropies or None, at least float32, in chunks.

    With several chunks, the backward pass recomputes the logits, so the full (N, V) is never in memory.
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
    """Return log-probabilities of the same shape, at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def token_entropies(logps: Tensor) -> Tensor:
    """Return the (N,) entropies −Σ p·log p of (N, V) log-probabilities, in nats, with 0·log 0 = 0."""
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(dim=-1)


def _collect(
    logps: Tensor, entropies: Tensor | None, batch: PrefixBatch, k: int, features: Tensor | None
) -> AnswerScores:
    """Sum the token scores of each of the U answers and arrange them as (B, K)."""
    lengths, answers = batch.lengths, batch.answers.view(-1, k)  # (U,); counting the owners would wait for the GPU
    first = (lengths.cumsum(0) - lengths)[answers[:, 0]]  # index of the first token of each prompt's first answer

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(lengths)).index_add(0, batch.owners, values)[answers]

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
    """Score answers with a function of both models' next-token logits, without gradients.

    Args:
        policy: a causal language model, also with PEFT adapters; its training mode is restored afterwards.
        reference: the model it was trained from, on the same device. A PEFT policy may be its own reference: its
            adapter is then turned off.
        prompts: B prompts as token ids.
        answers: K answers per prompt as token ids.
        score: maps policy logits (n, V), reference logits (n, V), both at least float32, and targets (n,) to (n, C);
            called once per chunk.
        pad_id: padding token.

    Returns:
        (B, K, C) scores summed over the tokens of each answer, float64.

    Raises:
        ValueError: the vocabularies differ, `reference` is a policy without an adapter, or as in `prefix_batch`.
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
    road, batch = max(laid, key=lambda one: list(Road).index(one[0]))  # the slower road is correct for both
    with evaluating(policy), evaluating(reference), autocast(policy.device):
        of_policy = predict(models[0], batch, road)
        with adapter_off():
            of_reference = predict(models[1], batch, road)
        parts = []
        size = max(1, _LOGITS_AT_ONCE // (2 * sizes[0]))  # a chunk holds the logits of two models
        for own, other, targets in zip(
            of_policy.states.split(size), of_reference.states.split(size), batch.targets.split(size), strict=True
        ):
            with adapter_off():  # the head may have an adapter too
                ref_logits = of_reference.head(other)
            logits = of_policy.head(own)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            parts.append(score(logits.to(dtype), ref_logits.to(dtype), targets))
    of_tokens = torch.cat(parts).double()  # (N, C)
    sums = of_tokens.new_zeros(len(batch.lengths), of_tokens.shape[1]).index_add(0, batch.owners, of_tokens)
    return sums[batch.answers].view(-1, len(answers[0]), of_tokens.shape[1])
