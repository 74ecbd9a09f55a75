"""Lay out prompts and answers in shared-prefix batches.

Each prompt appears once, followed by its answers (two for a preference pair), and several prompts are packed into a
row. An answer attends to its prompt and itself, never to the other answers, and its positions continue from the end of
the prompt. So the scores equal those of separate sequences, while the shared prompt is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Tokens = Sequence[Sequence[int]]


_ATTENTION = 2048
"""Row length at which attention is assumed to cost as much as the rest of a layer; trades longer against more rows."""

_FEWER = 5
"""Exclusive limit on the number of rows that `_pack` tries to save."""


@dataclass(frozen=True)
class PrefixBatch:
    """B prompts with K answers each, in R rows of T tokens.

    Equal prompts, and equal answers to them, are laid out once: P prompts and U answers. The end token of an answer is
    predicted but not fed to the model.

    Attributes:
        input_ids: (R, T) token ids.
        segments: (R, T) index, within the row, of the prompt or answer that a token belongs to; -1 for padding.
        prefixes: (R, T) segment that a token may attend to besides its own: the prompt of its answer.
        position_ids: (R, T) positions, from 0 in each prompt and from the end of the prompt in each answer.
        predictors: (N,) flat index row·T + t of the hidden state that predicts each answer token.
        targets: (N,) the answer tokens.
        owners: (N,) index in U of the answer that each target belongs to, ascending.
        lengths: (U,) tokens of each answer.
        answers: (B, K) index in U of each answer.
        prompt_tokens: (M,) flat index row·T + t of each prompt token.
        prompt_owners: (M,) index in P of the prompt that each prompt token belongs to, ascending.
        prompt_lengths: (P,) tokens of each prompt.
        prompts: (B,) index in P of each prompt.
    """

    input_ids: Tensor
    segments: Tensor
    prefixes: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor
    lengths: Tensor
    answers: Tensor
    prompt_tokens: Tensor
    prompt_owners: Tensor
    prompt_lengths: Tensor
    prompts: Tensor

    def to(self, device: torch.device | str) -> PrefixBatch:
        """Return the batch on another device; from pinned memory, the copies do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> PrefixBatch:
        """Return the batch in pinned memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PrefixBatch:
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def related(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return True where two tokens of a row are in the same segment, or `key` is in the prompt of `query`.

        The order of the tokens is ignored: the model's own mask handles it, given `position_ids`.

        Args:
            row: row indices; the shapes of all arguments broadcast.
            query: indices in the row of the attending tokens.
            key: indices in the row of the attended tokens.
        """
        # padding attends to padding, because a softmax over nothing would be NaN
        seen = self.segments[row, key]
        return (seen == self.segments[row, query]) | (seen == self.prefixes[row, query])


class _Block(NamedTuple):
    """A prompt followed by answers to it."""

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
        answers: K answers per prompt as token ids, none empty.
        pad_id: padding token.
        packed: merge equal prompts and pack several prompts per row. Otherwise each of the B prompts has its own row.
        room: maximum tokens per packed row, raised if one prompt with one answer is longer; None is no limit.

    Raises:
        ValueError: there are no prompts, a prompt or answer is empty, or the numbers of answers differ.
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

    predictors: list[np.ndarray] = []  # per answer
    prompt_tokens: list[np.ndarray] = []  # per prompt
    number_of_prompt: dict[Hashable, int] = {}
    number_of_answer: dict[tuple[Hashable, tuple[int, ...]], int] = {}
    for number, row in enumerate(rows):
        at, segment = number * width, 0
        for name, prompt, own in row:
            prefix, end = segment, put(prompt, at, segment, segment, 0)
            if name not in number_of_prompt:  # a prompt whose answers are spread over rows occurs again
                prompt_tokens.append(np.arange(at, end))
                number_of_prompt[name] = len(number_of_prompt)
            at = end
            for answer in own:
                segment += 1
                # the last prompt token predicts the first answer token; each answer token predicts the next
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
        lengths=torch.tensor([len(part) for part in predictors]),
        answers=torch.tensor(
            [[number_of_answer[block.name, tuple(answer)] for answer in own]
             for block, own in zip(single, answers, strict=True)]
        ),
        prompt_tokens=torch.from_numpy(np.concatenate(prompt_tokens)),
        prompt_owners=_owners(prompt_tokens),
        prompt_lengths=torch.tensor([len(part) for part in prompt_tokens]),
        prompts=torch.tensor([number_of_prompt[block.name] for block in single]),
    )  # fmt: skip


def _owners(parts: Sequence[np.ndarray]) -> Tensor:
    """Return, for each element of the concatenated parts, the index of its part."""
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def _pack(blocks: Sequence[_Block], limit: int | None) -> list[list[_Block]]:
    """Pack blocks into rows, merging those of one prompt, with the cheapest of several row lengths.

    Row lengths double from the longest block up to the longest merged block. Then fewer rows are tried, just long
    enough to hold all tokens or a tenth longer, where these could cost less.
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
            if total * (_ATTENTION + room) < best[0]:  # the cost without any padding
                best = min(best, _fill(merged.values(), room), key=lambda found: found[0])
    return best[1]


def _fill(blocks: Collection[_Block], room: int) -> tuple[float, list[list[_Block]]]:
    """Return the cost and the rows of first-fit-decreasing packing into rows of at most `room` tokens."""
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
    """Split a block's answers over as many blocks as needed for each to fit; a single answer always fits."""
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
        raise ValueError(f"answers: got {sorted(counts)} per prompt, expected the same number for all, at least 1")
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompts: empty in rows {empty[:10]}, expected at least one token each")
    empty = [i for i, own in enumerate(answers) if any(len(answer) == 0 for answer in own)]
    if empty:
        raise ValueError(f"answers: empty in rows {empty[:10]}, expected at least one token each")


def by_length(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return batches of row indices, sorted by the given row lengths to save padding."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
