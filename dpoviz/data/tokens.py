"""Convert pairs to token ids: prompt and answer are tokenised together and split at a token.

Prompt and answer are rendered as one text, a chat with the tokenizer's template, and tokenised once. The prompt is the
longest common prefix of the tokens of the prompt alone and of both full texts; the rest is the answer. This is what a
model sees and what TRL trains on: a space, a "▁" or a header between prompt and answer stays where the text has it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpoviz.data.chat_templates import DATE, Chat, Rendered, render

logger = logging.getLogger(__name__)

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns that `tokenize_pairs` adds."""

_CHECKED = 20  # rows in which existing ids are compared with the tokenizer's
_SHOWN = 10  # pairs listed in one message
_ROWS_AT_ONCE = 1000  # held as Python objects
_PROBE = "a plain answer"
_QUESTION = ({"role": "user", "content": "a question"},)

_SAID = {
    "differs": "prompt and answer as one text give other tokens than each by itself ({words}); the one text is used",
    "lost": "{template} leaves out or changes {words}",
    "tools": "{template} does not write the tools: they are not in the prompt",
    "unended": "{template} writes no end token behind an answer; {words} is put there",
    "inside": "an answer has its end token before its end as well; a sampled answer would stop there",
    "same": "both answers give the same tokens, so that nothing can be learned from them",
    "dated": f"{{template}} writes today's date; it is told {DATE:%d %b %Y} on all days, so that a run can be repeated",
}
"""Warnings of `tokenize_pairs` by finding."""


_Value = TypeVar("_Value")


class _Turn(NamedTuple):
    """The text that a template writes after an assistant's answer.

    Attributes:
        tail: the text after the answer.
        end: token that ends the answer: the first added token in the tail, or the tokenizer's end token.
        written: occurrences of `end` in the tail; 0 if the template writes none.
    """

    tail: str
    end: int
    written: int


class _Written(NamedTuple):
    """A pair as texts.

    Attributes:
        prompt: the prompt alone.
        wholes: prompt with each answer, at least up to the end token.
        answers: both answers alone, without trailing end tokens.
        ends: token that ends each answer.
        written: occurrences of the end token after an answer.
        chat: a template rendered the pair.
        found: findings about the pair, by the keys of `_SAID` or "refused".
    """

    prompt: str
    wholes: tuple[str, str]
    answers: tuple[str, str]
    ends: tuple[int, int]
    written: int
    chat: bool
    found: dict[str, str]


class _Cut(NamedTuple):
    """A pair as token ids, with the findings about it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    found: dict[str, str]


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, too_long: str = "refuse"
) -> Dataset:
    """Add `prompt_ids`, `chosen_ids` and `rejected_ids`, unless already present; both answers end with the end token.

    The ids equal those of TRL's `DPOTrainer` up to the first end token. TRL continues after it if the template does
    (usually with a newline), and has two begin or end tokens if a text contains its own.

    - A chat is rendered with the tokenizer's chat template, the column `tools` (a list of schemas, or its JSON) and
      the variables in `chat_template_kwargs`. Its end token is the one that the template writes after an answer.
    - A text is used unchanged, after the tokens that the tokenizer puts before every text. Its end token is the
      tokenizer's, or the template's if the answer contains that one.

    Each warning is given once: where separate tokenisation of prompt and answer would differ, what the template
    leaves out, and the other findings of `_SAID`.

    Args:
        pairs: records as returned by `load_pairs`.
        tokenizer: needs an end token, and a chat template if a prompt is a chat.
        max_length: limit of the prompt and one answer together, in tokens.
        too_long: "refuse" pairs over the limit, or "drop" them, with a warning that counts and names them.

    Raises:
        ValueError: the tokenizer has no end token, or no chat template for a chat; the template refuses a chat or
            does not terminate; a text has tools; a prompt gives no tokens; pairs are over the limit; answers end with
            different tokens; existing ids are another tokenizer's.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end token (eos_token), so that an answer could not end; set one")
    if too_long not in ("refuse", "drop"):
        raise ValueError(f"too_long: got {too_long!r}, expected 'refuse' or 'drop'")
    if set(IDS) <= set(pairs.column_names):
        some = pairs.select(range(min(len(pairs), _CHECKED)))
        own = zip(*(some[name][:] for name in IDS), strict=True)
        if any(ids != cut[:3] for ids, cut in zip(own, _cuts(some, tokenizer), strict=True)):
            raise ValueError(f"pairs: have {', '.join(IDS)}, which are not this tokenizer's; remove these columns")
    else:
        pairs = _with_ids(pairs, tokenizer)
    pairs = _within(pairs, max_length, too_long)
    end_id(pairs)
    return pairs


def end_id(pairs: Dataset) -> int:
    """Return the token that ends the answers of tokenised pairs, at which sampled answers should stop.

    Raises:
        ValueError: the answers end with different tokens.
    """
    arrow = pairs.select_columns(list(IDS[1:])).with_format("arrow")
    first: dict[int, int] = {}
    for name in IDS[1:]:
        column = arrow[name][:]
        behind = pc.list_value_length(column).to_numpy().cumsum()
        ends, rows = np.unique(pc.list_flatten(column).to_numpy()[behind - 1], return_index=True)
        first = dict(zip(ends.tolist(), rows.tolist(), strict=True)) | first
    if len(first) > 1:
        found = ", ".join(f"id {end} in {_name(pairs, row)}" for end, row in sorted(first.items(), key=itemgetter(1)))
        raise ValueError(
            f"pairs: got answers that end with different tokens ({found}), expected one at which sampled answers "
            "can stop; make all prompts chats (as_chat, --chat) or all of them texts, and let all answers end alike"
        )
    return next(iter(first))


def token_counts(pairs: Dataset) -> np.ndarray:
    """Return (N, 3) the numbers of tokens of the prompt, the chosen and the rejected answer of tokenised pairs."""
    arrow = pairs.select_columns(list(IDS)).with_format("arrow")
    return np.stack([pc.list_value_length(arrow[name][:]).to_numpy() for name in IDS], axis=1)


def highest_ids(pairs: Dataset) -> list[int]:
    """Return the highest token id of the prompts, the chosen answers and the rejected answers."""
    arrow = pairs.select_columns(list(IDS)).with_format("arrow")
    return [pc.max(pc.list_flatten(arrow[name][:])).as_py() for name in IDS]


def digest(pairs: Dataset, columns: Sequence[str] | None = None) -> str:
    """Return a hash of the values of some columns, or of all.

    Rows are read in chunks, and lists of numbers are hashed as bytes, to save memory.
    """
    found = hashlib.blake2b(digest_size=16)
    pairs = pairs.select_columns(sorted(columns or pairs.column_names)).with_format("arrow")
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        table = pairs[start : start + _ROWS_AT_ONCE]
        for name in table.column_names:
            found.update(name.encode())
            _hash(found, table[name])
    return found.hexdigest()


def _hash(found: hashlib.blake2b, column: pa.ChunkedArray | pa.Array) -> None:
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if number and not column.null_count:
        found.update(str(column.type).encode() + column.to_numpy().tobytes())
    elif pa.types.is_list(column.type):
        _hash(found, pc.list_value_length(column))
        _hash(found, pc.list_flatten(column))
    else:
        found.update(json.dumps(column.to_pylist(), sort_keys=True, default=str).encode())


def encode_prompts(
    prompts: Sequence[str],
    messages: Sequence[list[dict] | None],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[list[dict] | None] | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts without answers: a chat up to where the answer begins, a text unchanged.

    Args:
        prompts: N texts.
        messages: N chats, None where the prompt is a text.
        tokenizer: needs a chat template if there is a chat.
        tools: N lists of schemas of the functions that may be called, None where there are none.

    Raises:
        ValueError: a chat has no template, or the template refuses it.
    """
    tools = tools or [None] * len(messages)
    chats = {i: Chat(own, tools[i], prompt=True) for i, own in enumerate(messages) if own}
    if chats:
        _require_template(tokenizer, f"prompt {next(iter(chats))} is a chat")
    texts = list(prompts)
    for i, found in zip(chats, render(tokenizer, list(chats.values())), strict=True):
        if found.refusal is not None:
            raise ValueError(f"prompt {i}: {_refusal(tokenizer, found.refusal)}")
        texts[i] = found.text
    return _encode(tokenizer, texts, [i in chats for i in range(len(texts))])


def answer_end(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, object]] | None = None) -> int:
    """Return the token that ends an answer to a chat or a text, at which a sampled answer should stop.

    Args:
        tokenizer: needs an end token, and a chat template if there is a chat.
        chat: messages of the prompt; None for a text.

    Raises:
        ValueError: the chat has no template, or the template refuses it.
    """
    if not chat:
        return tokenizer.eos_token_id
    _require_template(tokenizer, "a prompt is a chat")
    turn = _turn(tokenizer, Chat(chat))
    if isinstance(turn, Rendered):
        raise ValueError(f"a prompt: {_refusal(tokenizer, turn.refusal or '')}")
    return turn.end


def _with_ids(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the pairs with their ids, and log the findings."""
    ids: dict[str, list[np.ndarray]] = {name: [] for name in IDS}
    found: dict[str, list[tuple[int, str]]] = {}
    cuts = tqdm(_cuts(pairs, tokenizer), "cutting into tokens", len(pairs), unit="pair", delay=2, disable=None)
    for row, cut in enumerate(cuts):
        for name, own in zip(IDS, cut[:3], strict=True):
            ids[name].append(np.array(own, np.int32))
        for kind, words in cut.found.items():
            found.setdefault(kind, []).append((row, words))

    def place(kind: str) -> str:
        rows = found[kind]
        more = f" and {len(rows) - 1} more of {len(pairs)} pairs" if len(rows) > 1 else ""
        return f"{_name(pairs, rows[0][0])}{more}"

    if "refused" in found:
        raise ValueError(f"{place('refused')}: {found['refused'][0][1]}")
    if "empty" in found:
        raise ValueError(
            f"prompt: {place('empty')} gives no token, or none that does not merge with the answer; expected a text "
            "that ends where a token ends"
        )
    for kind, text in _SAID.items():
        if kind in found:
            words = text.format(template=_template(tokenizer), words=found[kind][0][1])
            logger.warning("%s: %s", place(kind), words)
    columns = {name: pa.array(own, pa.list_(pa.int32())) for name, own in ids.items()}
    return concatenate_datasets([pairs, Dataset(pa.table(columns))], axis=1)


def _within(pairs: Dataset, max_length: int, too_long: str) -> Dataset:
    """Return the tokenised pairs within the limit."""
    lengths = [(prompt, max(answers)) for prompt, *answers in token_counts(pairs).tolist()]
    long = [i for i, (prompt, answer) in enumerate(lengths) if prompt + answer > max_length]
    if not long:
        return pairs
    message = f"{len(long)} of {len(pairs)} pairs are over max_length = {max_length} tokens:\n" + "\n".join(
        f"  {_name(pairs, i)}: prompt {lengths[i][0]} + longer answer {lengths[i][1]}" for i in long[:_SHOWN]
    )
    if too_long == "refuse" or len(long) == len(pairs):
        drop = ", or pass too_long='drop' to leave them out" if len(long) < len(pairs) else ""
        raise ValueError(f"{message}\nraise max_length{drop}")
    logger.warning("%s\nthey are left out", message)
    dropped = set(long)
    return pairs.select([i for i in range(len(pairs)) if i not in dropped])


def _cuts(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Cut]:
    """Yield each pair as token ids."""
    turn = None
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        some = pairs.select(range(start, min(start + _ROWS_AT_ONCE, len(pairs))))
        chats = _chats(some, tokenizer)
        answers = list(zip(some["chosen"][:], some["rejected"][:], strict=True))
        turn = turn or _first_turn(tokenizer, chats, answers)
        written = _write(some["prompt"][:], chats, answers, turn, tokenizer)
        yield from _cut(written, tokenizer)


def _chats(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Chat | None]:
    """Return the prompts that are chats, with their tools; None for a text."""
    names, found = ("messages", "tools", "chat_template_kwargs"), []
    columns = [pairs[name][:] if name in pairs.column_names else [None] * len(pairs) for name in names]
    for i, (messages, tools, options) in enumerate(zip(*columns, strict=True)):
        try:
            tools, options = (json.loads(own) if isinstance(own, str) else own for own in (tools, options))
        except json.JSONDecodeError as error:
            raise ValueError(f"{_name(pairs, i)}: tools or chat_template_kwargs are not JSON ({error})") from error
        if messages:
            _require_template(tokenizer, f"{_name(pairs, i)} is a chat")
        elif tools:
            raise ValueError(
                f"{_name(pairs, i)}: tools: got some beside a text, expected a chat, into which a template writes "
                "them; make the prompt a chat (as_chat, --chat), or leave the column out"
            )
        found.append(Chat(messages, tools or None, options=options) if messages else None)
    return found


def _first_turn(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat | None], answers: Sequence[tuple[str, str]]
) -> _Turn | None:
    """Return how the template ends an answer, if a prompt is a chat or an answer contains an end token."""
    known = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    probes = [chat for chat in chats if chat]
    if not probes and tokenizer.chat_template and any(own.rstrip().endswith(known) for both in answers for own in both):
        probes = [Chat(_QUESTION)]
    turns = (_turn(tokenizer, chat) for chat in probes)
    return next((turn for turn in turns if isinstance(turn, _Turn)), None)


def _turn(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> _Turn | Rendered:
    """Return how the template ends an answer, read from a rendered probe; or its refusal."""
    (whole,) = render(tokenizer, [chat._replace(messages=[*chat.messages, _assistant(_PROBE)], prompt=False)])
    if whole.refusal is not None:
        return whole
    if _PROBE not in whole.text:
        return whole._replace(refusal="it does not write the assistant's answer")
    tail = whole.text[whole.text.rindex(_PROBE) + len(_PROBE) :]
    # some vocabularies have runs of spaces among their added tokens
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip(" \t\r\n▁")}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    end = next((i for i in ids if i in added), None)
    return _Turn(tail, tokenizer.eos_token_id, 0) if end is None else _Turn(tail, end, ids.count(end))


def _write(
    prompts: Sequence[str],
    chats: Sequence[Chat | None],
    answers: Sequence[tuple[str, str]],
    turn: _Turn | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[_Written]:
    """Return each pair as texts."""
    ends = {tokenizer.eos_token: tokenizer.eos_token_id}
    if turn is not None:
        ends[tokenizer.convert_ids_to_tokens(turn.end)] = turn.end
    bare = [[_without_end(own, ends) for own in both] for both in answers]
    jobs = [_jobs(chat, [own for own, _ in both]) for chat, both in zip(chats, bare, strict=True) if chat]
    rendered, written = iter(render(tokenizer, [chat for own in jobs for chat in own])), []
    jobs_of_chats = iter(jobs)
    for prompt, chat, both in zip(prompts, chats, bare, strict=True):
        own = _two(text for text, _ in both)
        if chat:
            written.append(_written(chat, own, [next(rendered) for _ in next(jobs_of_chats)], turn, tokenizer))
        else:
            marks = [end or tokenizer.eos_token for _, end in both]
            wholes = _two(prompt + text + end for text, end in zip(own, marks, strict=True))
            written.append(_Written(prompt, wholes, own, _two(ends[end] for end in marks), 1, False, {}))
    return written


def _two(values: Iterable[_Value]) -> tuple[_Value, _Value]:
    first, second = values
    return first, second


def _jobs(chat: Chat, answers: Sequence[str]) -> list[Chat]:
    """Return the chats to render for a pair: prompt, prompt with each answer, and prompt without its tools."""
    wholes = [chat._replace(messages=[*chat.messages, _assistant(own)]) for own in answers]
    prompt = chat._replace(prompt=True)
    return [prompt, *wholes, *([prompt._replace(tools=None)] if chat.tools else [])]


def _written(
    chat: Chat,
    answers: tuple[str, str],
    rendered: Sequence[Rendered],
    turn: _Turn | None,
    tokenizer: PreTrainedTokenizerBase,
) -> _Written:
    refusal = next((own.refusal for own in rendered[:3] if own.refusal is not None), None)
    if refusal is not None or turn is None:
        found = {"refused": _refusal(tokenizer, refusal or "it does not write the assistant's answer")}
        return _Written("", ("", ""), answers, (0, 0), 0, True, found)
    prompt, *wholes = (own.text for own in rendered[:3])
    found = {}
    if turn.written == 0:
        wholes = [own.removesuffix(turn.tail) + tokenizer.eos_token for own in wholes]
        found["unended"] = repr(tokenizer.eos_token)
    if any(own.dated for own in rendered):
        found["dated"] = ""
    if chat.tools and rendered[3].text == prompt:
        found["tools"] = ""
    # templates drop the reasoning of earlier answers on purpose
    said = [(message["role"], message["content"], wholes[0]) for message in chat.messages]
    said = [part for part in said if part[0] != "assistant" and isinstance(part[1], str)]
    said += [("assistant", own, whole) for own, whole in zip(answers, wholes, strict=True)]
    lost = next((role for role, content, text in said if content.strip() not in text), None)
    if lost is not None:
        found["lost"] = f"the {lost}'s message"
    return _Written(prompt, _two(wholes), answers, (turn.end, turn.end), max(turn.written, 1), True, found)


def _without_end(text: str, ends: Mapping[str, int]) -> tuple[str, str | None]:
    """Return a text without its trailing end tokens, and the first of these."""
    found = None
    while True:
        bare = text.rstrip()
        end = next((end for end in ends if bare.endswith(end)), None)
        if end is None:
            return text, found
        text, found = bare.removesuffix(end), end


def _cut(written: Sequence[_Written], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Cut]:
    """Yield each pair as token ids, split after the common prefix of the prompt alone and both full texts."""
    chat = [own.chat for own in written]
    alone = _encode(tokenizer, [own.prompt for own in written], chat)
    first, second = (_encode(tokenizer, [own.wholes[side] for own in written], chat) for side in (0, 1))
    apart = [_encode(tokenizer, [own.answers[side] for own in written], [True] * len(written)) for side in (0, 1)]
    for i, own in enumerate(written):
        at = min(_shared(alone[i], first[i]), _shared(alone[i], second[i]))
        prompt, found = first[i][:at], dict(own.found)
        answers = []
        for whole, bare, end in zip((first[i], second[i]), apart, own.ends, strict=True):
            answer, before = _up_to_end(whole[at:], end, own.written)
            answers.append(answer)
            if before:
                found["inside"] = ""
            if (prompt, answer) != (alone[i], [*bare[i], end]) and "differs" not in found:
                found["differs"] = _difference(tokenizer, (prompt, answer), (alone[i], [*bare[i], end]))
        if answers[0] == answers[1]:
            found["same"] = ""
        if not prompt and "refused" not in found:
            found["empty"] = ""
        yield _Cut(prompt, *_two(answers), found)


def _up_to_end(ids: list[int], end: int, count: int) -> tuple[list[int], bool]:
    """Return the ids of an answer up to its end token, and whether that token also occurs earlier.

    Args:
        ids: tokens of the answer and of the template's text after it.
        end: the end token.
        count: occurrences of the end token after the answer.
    """
    places = [i for i, token in enumerate(ids) if token == end]
    if not places:  # this tokenizer reads special tokens as text
        return [*ids, end], False
    return ids[: places[-count:][0] + 1], len(places) > count


def _shared(ids: list[int], others: list[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next(i for i, (own, other) in enumerate(zip([*ids, None], [*others, None], strict=False)) if own != other)


def _difference(
    tokenizer: PreTrainedTokenizerBase, one: tuple[list[int], list[int]], apart: tuple[list[int], list[int]]
) -> str:
    """Show the tokens around the place where two tokenisations of a pair differ, with | after the prompt."""
    boundary = min(len(one[0]), len(apart[0]))
    place = _shared(one[0] + one[1], apart[0] + apart[1])
    start = max(0, min(boundary, place) - 3)

    def shown(prompt: list[int], answer: list[int]) -> str:
        tokens = [repr(token) for token in tokenizer.convert_ids_to_tokens(prompt + answer)]
        tokens.insert(len(prompt), "|")
        return " ".join(tokens[start : max(boundary, place) + 5])

    return f"one text {shown(*one)}, by themselves {shown(*apart)}"


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], bare: Sequence[bool]) -> list[list[int]]:
    """Return token ids with the tokenizer's opening tokens, once; bare texts get none."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    opening = _opening(tokenizer) if not all(bare) else []
    return [
        list(own) if plain or own[: len(opening)] == opening else [*opening, *own]
        for own, plain in zip(ids, bare, strict=True)
    ]


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer puts before every text."""
    bare, dressed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return next(dressed[:i] for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _require_template(tokenizer: PreTrainedTokenizerBase, why: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer: has no chat template, and {why}; give a chat model, or prompts that are texts")


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


def _refusal(tokenizer: PreTrainedTokenizerBase, words: str) -> str:
    return (
        f"{_template(tokenizer)} refuses the chat ({words}); expected a chat that it takes; change the messages (a "
        "system's text can open the user's message), leave such pairs out, or take another model"
    )


def _name(pairs: Dataset, i: int) -> str:
    row = pairs[i]
    place = f"line {row['line']}" if "line" in row else f"row {i}"
    return f"{row['file']}, {place}" if "file" in row else place
