"""The pair record: loading, validation, splitting, tokenisation.

A record is a JSON object with `prompt`, `chosen`, `rejected` and `task`, all text, and if wanted `group`: pairs
of one group are never split between training and held-out data. Other fields are kept.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FIELDS = ("prompt", "chosen", "rejected", "task")
_SHOWN = 10  # problems listed in one message


def load_pairs(path: Path | str, *, tasks: Sequence[str] | None = None) -> Dataset:
    """Read preference pairs from a JSON Lines file, all of them or none.

    Args:
        path: a file with one JSON object a line; blank lines are passed over.
        tasks: the task names that are expected; None takes any.

    Returns:
        A data set with the records' fields, and `line`, where each stood in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: lines that are no JSON object, lack a field, hold something else than text, an empty
            answer, two identical answers, or a task that is not expected: each named by file, line and field;
            or another field whose values are of different types.
    """
    path = Path(path)
    records, problems = [], []
    with path.open("rb") as file:  # bytes, so that text in another encoding is named by its line as well
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                problems.append(f"{path}, line {line}: not JSON ({error.msg} at character {error.pos})")
                continue
            except UnicodeDecodeError as error:
                problems.append(f"{path}, line {line}: not UTF-8 ({error.reason} at byte {error.start})")
                continue
            found = _problems(record, tasks)
            problems += [f"{path}, line {line}: {problem}" for problem in found]
            if not found:
                records.append({**record, "group": record.get("group"), "line": line})
    if problems:
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError("\n".join(problems[:_SHOWN]) + more)
    if not records:
        raise ValueError(f"{path}: holds no pairs")
    return Dataset.from_dict(_columns(path, records))


def _columns(path: Path, records: list[dict]) -> dict[str, list]:
    """The fields of all records, None where one lacks a field (Dataset.from_list keeps the first one's alone)."""
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    for name, values in columns.items():
        try:
            pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise ValueError(f"{path}, field {name!r}: the lines' values do not make one column ({error})") from error
    return columns


def _problems(record: object, tasks: Sequence[str] | None) -> list[str]:
    if not isinstance(record, dict):
        return [f"came a JSON {type(record).__name__}, expected an object with {', '.join(FIELDS)}"]
    problems = []
    for field in FIELDS:
        if field not in record:
            problems.append(f"field {field!r} is missing; the line has {', '.join(map(repr, record)) or 'none'}")
        elif not isinstance(record[field], str):
            problems.append(f"field {field!r}: came {type(record[field]).__name__}, expected text")
        elif not record[field].strip():
            problems.append(f"field {field!r} is empty")
    if not isinstance(record.get("group"), (str, type(None))):
        problems.append(f"field 'group': came {type(record['group']).__name__}, expected text")
    if problems:
        return problems
    if record["chosen"] == record["rejected"]:
        problems.append("fields 'chosen' and 'rejected' are identical: no preference can be learned from them")
    if tasks is not None and record["task"] not in tasks:
        problems.append(f"field 'task': came {record['task']!r}, expected one of {', '.join(tasks)}")
    return problems


def split_by_group(pairs: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split so that no prompt and no group stands on both sides, the same share of each task's groups.

    Args:
        pairs: records with `prompt`, `task` and, if some pairs belong together, `group`.
        held_out: share of each task's groups that is held out; at least one group a task. Pairs of several tasks
            that are tied to each other count for the first one's task.
        seed: which ones.

    Returns:
        The pairs to train on, and those held out.

    Raises:
        ValueError: `held_out` is not between 0 and 1, or a task has a single group.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: came {held_out}, expected a share between 0 and 1")
    group = _components(pairs)
    of_task: dict[str, list[int]] = {}
    tasks = pairs["task"][:]
    for g in group:
        of_task.setdefault(tasks[g], []).append(g)
    chosen: set[int] = set()
    for task, groups in sorted(of_task.items()):
        different = sorted(set(groups))
        if len(different) < 2:
            raise ValueError(f"task {task!r}: all its pairs are of one prompt or group, expected at least 2 to split")
        count = min(max(1, round(held_out * len(different))), len(different) - 1)
        chosen.update(random.Random(f"split {seed} {task}").sample(different, count))
    outside = [i for i, g in enumerate(group) if g in chosen]
    inside = [i for i, g in enumerate(group) if g not in chosen]
    return pairs.select(inside), pairs.select(outside)


def _components(pairs: Dataset) -> list[int]:
    """For each pair the number of the first pair that it is tied to, by a shared prompt or a shared group."""
    n = len(pairs)
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    groups = pairs["group"] if "group" in pairs.column_names else [None] * n
    first: dict[tuple[str, str], int] = {}
    for i, (prompt, group) in enumerate(zip(pairs["prompt"], groups, strict=True)):
        for key in (("prompt", prompt), *([("group", group)] if group is not None else [])):
            a, b = sorted((root(i), root(first.setdefault(key, i))))
            parent[b] = a
    return [root(i) for i in range(n)]


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, too_long: str = "refuse"
) -> Dataset:
    """Add `prompt_ids`, `chosen_ids` and `rejected_ids`; both answers end with the end token.

    Prompt and answer are tokenised by themselves, so that the prompt is the same tokens for both answers.

    Args:
        pairs: records as `load_pairs` returns them.
        tokenizer: with an end token.
        max_length: limit of the prompt and one answer together, in tokens.
        too_long: "refuse" pairs over the limit, or "drop" them, which is said in a warning that counts and
            names them.

    Raises:
        ValueError: the tokenizer has no end token, a prompt gives no token, or pairs are over the limit.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no end token (eos_token), so that an answer could not end; set one")
    if too_long not in ("refuse", "drop"):
        raise ValueError(f"too_long: came {too_long!r}, expected 'refuse' or 'drop'")

    def tokens(rows: dict[str, list]) -> dict[str, list]:
        def ids(field: str) -> list[list[int]]:
            return tokenizer(rows[field], add_special_tokens=field == "prompt")["input_ids"]

        end = [tokenizer.eos_token_id]
        return {
            "prompt_ids": ids("prompt"),
            "chosen_ids": [answer + end for answer in ids("chosen")],
            "rejected_ids": [answer + end for answer in ids("rejected")],
        }

    pairs = Dataset.from_dict({**pairs[:], **tokens(pairs[:])})
    lengths = [
        (len(p), max(len(c), len(r)))
        for p, c, r in zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
    ]
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


def _name(pairs: Dataset, i: int) -> str:
    return f"line {pairs[i]['line']}" if "line" in pairs.column_names else f"row {i}"
