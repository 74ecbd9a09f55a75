"""Prompts and answers to shared-prefix batches, log-probabilities, entropies and prompt features; sampling.

A prompt stands once and its answers behind it (two for a preference pair); short prompts fill up the rows that long
ones need. An answer sees its prompt and itself, never its rivals, and its positions start again after the prompt: so
the scores are those of separate sequences, while what they share is computed once. Logits are computed only where an
answer is predicted.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from inspect import signature
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

logger = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 2**25
"""Numbers in one chunk of logits, 128 MiB in float32, whatever the vocabulary.

Logits, their softmax and what the backward pass makes of them are alive together: the measured peak is 2 such
chunks forward and 3 with the backward pass, 4 and 5 where entropies are wanted too; a bfloat16 head adds half of one.
"""

Tokens = Sequence[Sequence[int]]


_ATTENTION = 2048
"""Tokens a row at which attention is taken to cost as much as all else; it only weighs longer rows against more."""

_FEWER = 5
"""So many rows fewer are not tried any more."""


@dataclass(frozen=True)
class PrefixBatch:
    """B prompts with K answers each, in R rows of T tokens. The end token of an answer is predicted but not fed in.

    Equal prompts, and equal answers to them, are laid out once: P prompts and U answers.

    Attributes:
        input_ids: (R, T).
        segments: (R, T) which prompt or answer of its row a token belongs to, counted from 0; -1 for padding.
        prefixes: (R, T) the segment that a token may see beside its own: its answer's prompt.
        position_ids: (R, T), starting again with each prompt, and after it in each answer.
        predictors: (N,) flat index row * T + t of the hidden state that predicts each answer token.
        targets: (N,) the answer tokens.
        owners: (N,) which of the U answers each belongs to, rising.
        answers: (B, K) which of the U answers stands for each.
        prompt_tokens: (M,) flat index row * T + t of the prompts' tokens.
        prompt_owners: (M,) which of the P prompts each belongs to, rising.
        prompts: (B,) which of the P prompts stands for each.
    """

    input_ids: Tensor
    segments: Tensor
    prefixes: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor
    answers: Tensor
    prompt_tokens: Tensor
    prompt_owners: Tensor
    prompts: Tensor

    def to(self, device: torch.device | str) -> PrefixBatch:
        """The same batch on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """(R, 1, T, T), 0 where a token (third axis) may see another (fourth), the lowest number elsewhere."""
        key, length = self.segments[:, None, :], self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        # padding sees padding, because a row of the softmax that sees nothing would be NaN
        seen = causal & ((key == self.segments[:, :, None]) | (key == self.prefixes[:, :, None]))
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


class _Block(NamedTuple):
    """A prompt, and answers to it that stand behind it."""

    name: Hashable
    prompt: Sequence[int]
    answers: Sequence[tuple[int, ...]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


def prefix_batch(prompts: Tokens, answers: Sequence[Tokens], pad_id: int, *, packed: bool = True) -> PrefixBatch:
    """Lay out prompts and their answers.

    Args:
        prompts: B prompts as token ids, none empty.
        answers: for each prompt K answers as token ids, none empty; the same K for all.
        pad_id: token that fills the rows.
        packed: equal prompts share their tokens, and several stand in a row where they fit. Otherwise each of the B
            has a row of its own.

    Raises:
        ValueError: no prompts, an empty prompt or answer, or different numbers of answers.
    """
    _require_tokens(prompts, answers)
    single = [
        _Block(tuple(prompt) if packed else row, prompt, list(dict.fromkeys(map(tuple, own))))
        for row, (prompt, own) in enumerate(zip(prompts, answers, strict=True))
    ]
    rows = _pack(single) if packed else [[block] for block in single]
    width = max(sum(block.length for block in row) for row in rows)
    input_ids, position_ids = np.full(len(rows) * width, pad_id), np.zeros(len(rows) * width, dtype=np.int64)
    segments, prefixes = np.full((2, len(rows) * width), -1)

    def put(tokens: Sequence[int], at: int, segment: int, prefix: int, position: int) -> int:
        end = at + len(tokens)
        input_ids[at:end], position_ids[at:end] = tokens, np.arange(position, position + len(tokens))
        segments[at:end], prefixes[at:end] = segment, prefix
        return end

    predictors: list[np.ndarray] = []  # of each answer
    prompt_tokens: list[np.ndarray] = []  # of each prompt
    number_of_prompt: dict[Hashable, int] = {}
    number_of_answer: dict[tuple[Hashable, tuple[int, ...]], int] = {}
    for number, row in enumerate(rows):
        at, segment = number * width, 0
        for name, prompt, own in row:
            prefix, end = segment, put(prompt, at, segment, segment, 0)
            if name not in number_of_prompt:  # its answers may be spread over rows
                prompt_tokens.append(np.arange(at, end))
                number_of_prompt[name] = len(number_of_prompt)
            at = end
            for answer in own:
                segment += 1
                # the first token is predicted where the prompt ends, the others where the one before them stands
                predictors.append(np.arange(at - 1, at + len(answer) - 1))
                predictors[-1][0] = end - 1
                number_of_answer[name, answer] = len(number_of_answer)
                at = put(answer[:-1], at, segment, prefix, len(prompt))
            segment += 1
    grid = [torch.from_numpy(own).view(len(rows), width) for own in (input_ids, segments, prefixes, position_ids)]
    return PrefixBatch(
        *grid,
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.fromiter(chain.from_iterable(answer for _, answer in number_of_answer), np.int64)),
        owners=_owners(predictors),
        answers=torch.tensor(
            [[number_of_answer[block.name, tuple(answer)] for answer in own]
             for block, own in zip(single, answers, strict=True)]
        ),
        prompt_tokens=torch.from_numpy(np.concatenate(prompt_tokens)),
        prompt_owners=_owners(prompt_tokens),
        prompts=torch.tensor([number_of_prompt[block.name] for block in single]),
    )  # fmt: skip


def _owners(parts: Sequence[np.ndarray]) -> Tensor:
    """The number of its part for each element of the parts, one after the other."""
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def _pack(blocks: Sequence[_Block]) -> list[list[_Block]]:
    """Rows of blocks: those of one prompt put together; the cheapest of several lengths of a row.

    Rows as long as the longest block are tried, and longer ones, up to all that one prompt has; then fewer rows, long
    enough to hold all and a tenth more, as long as they cost less.
    """
    merged: dict[Hashable, _Block] = {}
    for block in blocks:
        before = merged.get(block.name, block)
        merged[block.name] = before._replace(answers=list(dict.fromkeys([*before.answers, *block.answers])))
    room, most = (max(block.length for block in some) for some in (blocks, merged.values()))
    best = _fill(merged.values(), room)
    while room < most:
        room = min(2 * room, most)
        best = min(best, _fill(merged.values(), room), key=lambda found: found[0])
    total = sum(block.length for block in merged.values())
    for count in range(len(best[1]) - 1, max(0, len(best[1]) - _FEWER), -1):
        for room in (math.ceil(total / count), math.ceil(1.1 * total / count)):
            if total * (_ATTENTION + room) < best[0]:  # what it costs without any padding
                best = min(best, _fill(merged.values(), room), key=lambda found: found[0])
    return best[1]


def _fill(blocks: Collection[_Block], room: int) -> tuple[float, list[list[_Block]]]:
    """What rows of at most so many tokens cost, and the rows: the longest blocks first, each where there is room."""
    rows: list[list[_Block]] = []
    left: list[int] = []
    parts = [(part.length, part) for block in blocks for part in _parts(block, room)]
    for length, part in sorted(parts, key=lambda sized: -sized[0]):
        place = next((i for i, free in enumerate(left) if length <= free), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(part)
        left[place] -= length
    width = room - min(left)
    return len(rows) * width * (_ATTENTION + width), rows


def _parts(block: _Block, room: int) -> Iterator[_Block]:
    """The block's answers over as many blocks as it takes for each to fit; one answer does."""
    some, length = [], len(block.prompt)
    for answer in block.answers:
        if length + len(answer) - 1 > room:
            yield block._replace(answers=some)
            some, length = [], len(block.prompt)
        some.append(answer)
        length += len(answer) - 1
    yield block._replace(answers=some)


def _require_tokens(prompts: Tokens, answers: Sequence[Tokens]) -> None:
    if len(prompts) == 0 or len(prompts) != len(answers):
        raise ValueError(f"prompts, answers: came {len(prompts)} and {len(answers)}, expected as many, at least 1")
    counts = {len(own) for own in answers}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"answers: came {sorted(counts)} a prompt, expected the same number for all, at least 1")
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompts: empty in rows {empty[:10]}, expected at least one token each")
    empty = [i for i, own in enumerate(answers) if any(len(answer) == 0 for answer in own)]
    if empty:
        raise ValueError(f"answers: empty in rows {empty[:10]}, expected at least one token each")


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
        ValueError: as `prefix_batch`, or an adapter by prompt tuning.
    """
    model = _language_model(model)
    if shared_prefix is None:
        shared_prefix = supports_shared_prefix(model)
    score = _shared_scores if shared_prefix else _separate_scores
    return score(model, prompts, answers, pad_id=pad_id, entropy=entropy, features=features)


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, without PEFT's wrapping; its adapters are layers inside it and act as before."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "model: came a prompt-tuning adapter, which lives outside the model; expected one such as LoRA"
        )
    return model.get_base_model()


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model reads, by its configuration; None where that does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
    _require_tokens(prompts, answers)
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
        return logps.gather(-1, targets[:, None]).squeeze(-1), _entropies(logps) if entropy else None

    vocabulary = states.shape[-1] if head is None else head.weight.shape[0]
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    if len(states) <= size:
        return score(states, targets)
    parts = [
        checkpoint(score, s, t, use_reentrant=False) if torch.is_grad_enabled() else score(s, t)
        for s, t in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy else None


def _entropies(logps: Tensor) -> Tensor:
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
    _require_tokens(prompts, answers)
    if reference is policy and not hasattr(policy, "disable_adapter"):
        raise ValueError("reference: came the policy itself, without an adapter to turn off; expected another model")
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"reference: came a vocabulary of {sizes[1]}, expected the policy's {sizes[0]}")
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
    model = _language_model(model)
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
    model = _language_model(model)  # so that a model and its adapters are asked once
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


class Samples(NamedTuple):
    """Answers drawn from a model.

    Attributes:
        answers: for each prompt K answers as token ids, the end token included where one was drawn.
        truncated: for each prompt, how many of its answers hit the limit before they ended.
    """

    answers: list[list[list[int]]]
    truncated: list[int]


class Sampler(NamedTuple):
    """Draws answers from one random stream, batch after batch; what `sampling` gives.

    Attributes:
        draw: prompts → for each K answers as token ids, the end token included where one was drawn; and their scores,
            in float64 sums of float32 numbers, if they were asked for.
        generator: where the draws come from; its state says how far the stream has come.
    """

    draw: Callable[[Tokens], tuple[list[list[list[int]]], AnswerScores | None]]
    generator: torch.Generator


class _Recorder(LogitsProcessor):
    """Reads what generate() draws from, token by token, and leaves it as it is."""

    def __init__(self) -> None:
        self.logps, self.entropies, self.last = [], [], None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.drew(input_ids[:, -1])
        self.last = scores.log_softmax(dim=-1)  # (rows, V)
        self.entropies.append(_entropies(self.last))
        return scores

    def drew(self, tokens: Tensor) -> None:
        """What came of the distribution before; nothing at the first token, before which there is none."""
        if self.last is not None:
            self.logps.append(self.last.gather(-1, tokens[:, None]).squeeze(-1))

    def scores(self, lengths: Tensor) -> AnswerScores:
        """Of (B, K) answers with those lengths; rows that had ended went on, and are not counted there."""
        counted = torch.arange(len(self.logps), device=lengths.device)[:, None] < lengths.flatten()
        logps, entropies = (torch.stack(values).double() for values in (self.logps, self.entropies))  # (steps, B * K)
        return AnswerScores(
            logps=torch.where(counted, logps, 0).sum(dim=0).view_as(lengths),
            lengths=lengths,
            entropy_sums=torch.where(counted, entropies, 0).sum(dim=0).view_as(lengths),
            first_entropies=entropies[0].view_as(lengths)[:, 0],
        )


@contextmanager
def sampling(
    model: PreTrainedModel,
    prompts: Tokens,
    k: int,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    scores: bool = False,
) -> Iterator[Sampler]:
    """Draw K answers to prompts, in batches of the caller's choice; arguments and errors as `sample_answers`.

    Args:
        prompts: all that will be asked for; they are checked before the first is drawn.
        scores: also the log-probabilities and entropies of the answers, read where they are drawn.
    """
    if k < 1:
        raise ValueError(f"k: came {k}, expected at least 1")
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: came none, or an empty one, expected at least one token each")
    model, longest = _language_model(model), max(len(prompt) for prompt in prompts)
    room = context_length(model)
    if room is not None and longest + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens: came {max_new_tokens}, but a prompt has {longest} tokens and the context {room}; "
            "expected fewer, or shorter prompts"
        )
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=pad_id
    )  # fmt: skip

    def draw(some: Tokens) -> tuple[list[list[list[int]]], AnswerScores | None]:
        recorder = _Recorder() if scores else None
        drawn = [_until_end(row, eos_id) for row in _generate(model, some, k, config, recorder)]
        answers = [drawn[i : i + k] for i in range(0, len(drawn), k)]
        if recorder is None:
            return answers, None
        return answers, recorder.scores(torch.tensor([[len(a) for a in own] for own in answers], device=model.device))

    # generate() fills what a configuration leaves open with the model's own settings: both are the same here
    own, model.generation_config = model.generation_config, config
    try:
        with evaluating(model), _seeded(model.device, seed) as generator, torch.no_grad():
            yield Sampler(draw, generator)
    finally:
        model.generation_config = own


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[torch.Generator]:
    """The generator that PyTorch draws from on a device, seeded, and afterwards as it was."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
    else:
        generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield generator
    finally:
        generator.set_state(before)


def by_length(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of row numbers, given each row's length: like beside like, so that little is padded."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def sample_answers(
    model: PreTrainedModel,
    prompts: Tokens,
    k: int,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    batch_size: int = 128,
    progress: bool = False,
) -> Samples:
    """K answers to each prompt, drawn from the model's own distribution (temperature 1, nothing cut off).

    Args:
        model: a causal language model, or one with PEFT's adapters; left in the mode it was in. Its own
            generation settings are not used.
        prompts: token ids.
        k: answers a prompt.
        max_new_tokens: limit of an answer, in tokens.
        eos_id: token that ends an answer.
        pad_id: token that fills the rows.
        seed: the draws; the caller's random state is left alone.
        batch_size: prompts at once. Their answers are drawn side by side: `batch_size` × K sequences, each with a
            cache of keys and values for the prompt and `max_new_tokens`, are in memory.
        progress: show a bar.

    Raises:
        ValueError: k < 1, no prompt or an empty one, an adapter by prompt tuning, or a prompt that leaves no room
            for `max_new_tokens` in the model's context.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    settings = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    with sampling(model, prompts, k, **settings) as sampler, tqdm(
        total=len(prompts), desc="sampling answers", unit="prompt", disable=not progress
    ) as bar:  # fmt: skip
        for rows in by_length([len(prompt) for prompt in prompts], batch_size):
            for row, own in zip(rows, sampler.draw([prompts[row] for row in rows])[0], strict=True):
                answers[row] = own
            bar.update(len(rows))
    return Samples(answers, [sum(answer[-1] != eos_id for answer in own) for own in answers])


def _generate(
    model: PreTrainedModel, prompts: Tokens, k: int, config: GenerationConfig, recorder: _Recorder | None
) -> list[list[int]]:
    """`generate` of k answers to each prompt; the keys and values of a prompt are made once and repeated."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    cache = None
    name = "cache" if "cache" in signature(model.base_model.forward).parameters else "past_key_values"  # before 5.24
    # the last token of a prompt is left to generate(), which goes on from what the cache holds
    if k > 1 and width > 1 and supports_shared_prefix(model):
        positions = (mask[:, :-1].cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        model.base_model(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True, **{name: cache}
        )  # fmt: skip
        cache.batch_repeat_interleave(k)
    ids, mask = ids.repeat_interleave(k, dim=0), mask.repeat_interleave(k, dim=0)
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, **{name: cache},
        logits_processor=None if recorder is None else LogitsProcessorList([recorder]),
    )  # fmt: skip
    if recorder is not None:
        recorder.drew(out[:, -1])
    return out[:, width:].tolist()


def _until_end(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
