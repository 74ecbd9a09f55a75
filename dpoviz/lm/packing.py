"""Prompts and answers to shared-prefix batches, log-probabilities, entropies and prompt features; sampling.

A prompt stands once and its answers behind it (two for a preference pair); short prompts fill up the rows that long
ones need. An answer sees its prompt and itself, never its rivals, and its positions start again after the prompt: so
the scores are those of separate sequences, while what they share is computed once. Logits are computed only where an
answer is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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

    def related(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return True where two tokens of a row are of one prompt or answer, or `key` is of the prompt of `query`.

        Which of them comes first is not looked at: that is what the model's own mask says, given `position_ids`.

        Args:
            row: numbers of rows, and of the tokens in them, of shapes that broadcast.
            query: the tokens that look.
            key: the tokens that are looked at.
        """
        # padding sees padding, because a row of the softmax that sees nothing would be NaN
        seen = self.segments[row, key]
        return (seen == self.segments[row, query]) | (seen == self.prefixes[row, query])


class _Block(NamedTuple):
    """A prompt, and answers to it that stand behind it."""

    name: Hashable
    prompt: Sequence[int]
    answers: Sequence[tuple[int, ...]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


def prefix_batch(
    prompts: Tokens, answers: Sequence[Tokens], pad_id: int, *, packed: bool = True, room: int | None = None
) -> PrefixBatch:
    """Lay out prompts and their answers.

    Args:
        prompts: B prompts as token ids, none empty.
        answers: for each prompt K answers as token ids, none empty; the same K for all.
        pad_id: token that fills the rows.
        packed: equal prompts share their tokens, and several stand in a row where they fit. Otherwise each of the B
            has a row of its own.
        room: most tokens of a packed row; one prompt with one answer may be longer. None is no limit.

    Raises:
        ValueError: no prompts, an empty prompt or answer, or different numbers of answers.
    """
    require_tokens(prompts, answers)
    single = [
        _Block(tuple(prompt) if packed else row, prompt, list(dict.fromkeys(map(tuple, own))))
        for row, (prompt, own) in enumerate(zip(prompts, answers, strict=True))
    ]
    rows = _pack(single, room) if packed else [[block] for block in single]
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

    def grid(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).view(len(rows), width)

    return PrefixBatch(
        input_ids=grid(input_ids),
        segments=grid(segments),
        prefixes=grid(prefixes),
        position_ids=grid(position_ids),
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


def _pack(blocks: Sequence[_Block], limit: int | None) -> list[list[_Block]]:
    """Rows of blocks: those of one prompt put together; the cheapest of several lengths of a row, up to a limit.

    Rows as long as the longest block are tried, and longer ones, up to all that one prompt has; then fewer rows, long
    enough to hold all and a tenth more, as long as they cost less.
    """
    merged: dict[Hashable, _Block] = {}
    for block in blocks:
        before = merged.get(block.name, block)
        merged[block.name] = before._replace(answers=list(dict.fromkeys([*before.answers, *block.answers])))
    room, most = (max(block.length for block in some) for some in (blocks, merged.values()))
    if limit is not None:
        shortest = max(len(block.prompt) + len(answer) - 1 for block in blocks for answer in block.answers)
        limit = max(limit, shortest)
        room, most = min(room, limit), min(most, limit)
    best = _fill(merged.values(), room)
    while room < most:
        room = min(2 * room, most)
        best = min(best, _fill(merged.values(), room), key=lambda found: found[0])
    total = sum(block.length for block in merged.values())
    for count in range(len(best[1]) - 1, max(0, len(best[1]) - _FEWER), -1):
        for room in (math.ceil(total / count), math.ceil(1.1 * total / count)):
            if limit is not None and room > limit:
                continue
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
    some: list[tuple[int, ...]] = []
    length = len(block.prompt)
    for answer in block.answers:
        if length + len(answer) - 1 > room:
            yield block._replace(answers=some)
            some, length = [], len(block.prompt)
        some.append(answer)
        length += len(answer) - 1
    yield block._replace(answers=some)


def require_tokens(prompts: Tokens, answers: Sequence[Tokens]) -> None:
    if len(prompts) == 0 or len(prompts) != len(answers):
        raise ValueError(f"prompts, answers: got {len(prompts)} and {len(answers)}, expected as many, at least 1")
    counts = {len(own) for own in answers}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"answers: got {sorted(counts)} a prompt, expected the same number for all, at least 1")
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompts: empty in rows {empty[:10]}, expected at least one token each")
    empty = [i for i, own in enumerate(answers) if any(len(answer) == 0 for answer in own)]
    if empty:
        raise ValueError(f"answers: empty in rows {empty[:10]}, expected at least one token each")


def by_length(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of row numbers, given each row's length: like beside like, so that little is padded."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
