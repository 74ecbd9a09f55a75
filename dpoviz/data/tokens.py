"""The pair record: loading, validation, splitting, tokenisation.

A record has `prompt`, `chosen`, `rejected` and `task`, all text, and if wanted `group`: pairs of one group are never
split between training and held-out data. A prompt that is a chat stands in `messages` as well, and its `prompt` is
the chat in plain words. Other fields are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from dpoviz.data.records import _ROWS_AT_ONCE, _SHOWN, logger

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""What `tokenize_pairs` adds."""

_CHECKED = 20  # rows whose ids are compared with the tokenizer's, where there are ids already


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, too_long: str = "refuse"
) -> Dataset:
    """Add `prompt_ids`, `chosen_ids` and `rejected_ids`, where they are not yet; both answers end with the end token.

    Prompt and answer are tokenised by themselves, so that the prompt is the same tokens for both answers. A chat is
    put into the tokenizer's chat template, up to where the assistant's answer begins.

    Args:
        pairs: records as `load_pairs` returns them.
        tokenizer: with an end token, and with a chat template if a prompt is a chat.
        max_length: limit of the prompt and one answer together, in tokens.
        too_long: "refuse" pairs over the limit, or "drop" them, which is said in a warning that counts and
            names them.

    Raises:
        ValueError: the tokenizer has no end token, or no chat template for a chat, or its template ends a turn with
            another token; a prompt gives no token; pairs are over the limit; ids that another tokenizer gave.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end token (eos_token), so that an answer could not end; set one")
    if too_long not in ("refuse", "drop"):
        raise ValueError(f"too_long: got {too_long!r}, expected 'refuse' or 'drop'")
    if "messages" in pairs.column_names:
        first_chat = next((i for i, own in enumerate(pairs["messages"]) if own), None)
        if first_chat is not None:
            _require_template(tokenizer, f"{_name(pairs, first_chat)} is a chat")
    end = tokenizer.eos_token_id

    def encode(rows: dict[str, list]) -> dict[str, list]:
        messages = rows.get("messages", [None] * len(rows["prompt"]))
        found = {"prompt_ids": encode_prompts(rows["prompt"], messages, tokenizer)}
        for name in ("chosen", "rejected"):
            found[f"{name}_ids"] = [[*own, end] for own in tokenizer(rows[name], add_special_tokens=False)["input_ids"]]
        return found

    if set(IDS) <= set(pairs.column_names):
        some = pairs.select(range(min(len(pairs), _CHECKED)))[:]
        if any(some[name] != own for name, own in encode(some).items()):
            raise ValueError(f"pairs: have {', '.join(IDS)}, which are not this tokenizer's; remove these columns")
    else:  # batch by batch: what a tokenizer returns takes far more memory than the ids
        ids = Features({name: List(Value("int32")) for name in IDS})
        features = Features({**pairs.features, **ids})
        pairs = pairs.map(encode, batched=True, features=features, desc="cutting into tokens")
    lengths = [(prompt, max(answers)) for prompt, *answers in token_counts(pairs).tolist()]
    empty = [i for i, (prompt, _) in enumerate(lengths) if prompt == 0]
    if empty:
        raise ValueError(f"prompt: {_name(pairs, empty[0])} gives no token")
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


def token_counts(pairs: Dataset) -> np.ndarray:
    """(N, 3) tokens of the prompt, the chosen and the rejected answer of each tokenised pair."""
    arrow = pairs.select_columns(list(IDS)).with_format("arrow")
    return np.stack([pc.list_value_length(arrow[name][:]).to_numpy() for name in IDS], axis=1)


def digest(pairs: Dataset, columns: Sequence[str] | None = None) -> str:
    """A hash of the values in some columns, or in all.

    A thousand rows at a time, and lists of numbers as they lie in memory: neither takes much of it.
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
    prompts: Sequence[str], messages: Sequence[list[dict] | None], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of prompts: a chat through the chat template up to where the answer begins, a text as it stands.

    Args:
        prompts: the texts.
        messages: for each its chat, or None.
        tokenizer: with a chat template, where there is a chat.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    # an end that the tokenizer puts behind every text would be the end of the answer before it began
    ids = [own[:-1] if len(own) > 1 and own[-1] == tokenizer.eos_token_id else own for own in ids]
    for i, chat in enumerate(messages):
        if chat:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            # the template writes the special tokens itself
            ids[i] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _require_template(tokenizer: PreTrainedTokenizerBase, why: str) -> None:
    """A chat template, whose turns end with the end token: what an answer is trained, and sampled, to end with."""
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer: has no chat template, and {why}; give a chat model, or prompts that are texts")
    answer = "a plain answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    behind = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    special = [i for i in behind if i in tokenizer.all_special_ids]
    if special and special[0] != tokenizer.eos_token_id:
        ends = tokenizer.convert_ids_to_tokens(special[0])
        raise ValueError(
            f"tokenizer: its chat template ends an answer with {ends!r}, and its end token is "
            f"{tokenizer.eos_token!r}; set tokenizer.eos_token = {ends!r}"
        )


def _name(pairs: Dataset, i: int) -> str:
    row = pairs[i]
    place = f"line {row['line']}" if "line" in row else f"row {i}"
    return f"{row['file']}, {place}" if "file" in row else place
