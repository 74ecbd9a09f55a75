"""The pair record: loading, validation, splitting, tokenisation.

A record has `prompt`, `chosen`, `rejected` and `task`, all text, and if wanted `group`: pairs of one group are never
split between training and held-out data. A prompt that is a chat stands in `messages` as well, and its `prompt` is
the chat in plain words. Other fields are kept.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from huggingface_hub import HfApi

from dpoviz.data.presets import PRESETS, Preset

logger = logging.getLogger(__name__)

FIELDS = ("prompt", "chosen", "rejected", "task")

ROLES = ("system", "user", "assistant")

SUFFIXES = (".jsonl", ".json", ".parquet")

_SHOWN = 10  # problems listed in one message

_HUB_TIMEOUT = 5.0  # seconds that the hub has to answer at all

_ROWS_AT_ONCE = 1000  # that stand in Python's objects, ten times as large as Arrow's columns

Source = Path | str | Dataset | Sequence[Path | str]


class _Row(NamedTuple):
    """A record as it was read, or the problem that kept it from being read; `place` and `number` say where it stood."""

    place: str
    number: int
    file: str
    record: object
    problem: str | None = None


def load_pairs(
    source: Source,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    preset: str | None = None,
    tasks: Sequence[str] | None = None,
    split: str = "train",
) -> Dataset:
    """Read preference pairs, all of them or none.

    The prompt is a text or a list of chat messages, ``{"role": …, "content": …}``, whose last one is the user's; an
    answer is a text, or a list of one assistant's message. The prompt may be left out where both answers begin with
    it: it is then the messages that they share, or the characters that they share, less a blank at their end (the
    two layouts that TRL documents as explicit and implicit prompts).

    Args:
        source: a file (JSON Lines; JSON, a list of records or an object whose "data" is one; Parquet), a folder of
            such files, several of these, a `datasets.Dataset`, the name of a preset, or a set on Hugging Face's hub.
        task: the task of all pairs. Where records name one, it must be this.
        columns: other people's names of columns, to ours: ``{"question": "prompt"}``.
        preset: the layout of a known public set, one of `PRESETS`, for a file or a `Dataset` of it. Pairs that
            cannot be used, such as those with two equal answers, are left out there, and counted in a warning.
        tasks: the task names that are expected; None takes any.
        split: the part of a hub's set, or of a `DatasetDict`.

    Returns:
        A data set with the records' fields, `group` (None where there is none), `line` (where each stood: the line of
        a JSON Lines file, the number of the record elsewhere, from 1), `messages` where a prompt is a chat (None
        where not), and `file` where there are several.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: records that are no objects, lack a field, hold something else than text or messages, an empty
            answer, two identical answers, a task that is not expected: each named by file, line and field; another
            field whose values are of different types; a preset that is not known; a hub that cannot be reached,
            within seconds.
    """
    source, layout, split = _resolve(source, preset, split)
    if layout is not None and columns:
        raise ValueError("columns: given together with a preset, which renames them itself; give one of the two")
    _require_renaming(columns or {})
    if layout is not None and task is None:
        task = layout.task
    pairs, problems, left_out, files = _Columns(_named(source)), [], [], set()
    for row in _rows(source, split):
        files.add(row.file)
        if row.problem is not None:
            problems.append(f"{row.place}: {row.problem}")
            continue
        try:
            found = _converted(row.record, layout, columns or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{row.place}: not in the layout of {preset or source} ({type(error).__name__}: {error})")
            continue
        if not found:
            left_out.append(f"{row.place}: no preference")
        for record in found:
            record, wrong = _canonical(record, task, tasks)
            if not wrong:
                pairs.add({**record, "line": row.number, "file": row.file})
            else:  # people's own data are refused; a public set is as it is
                (problems if layout is None else left_out).extend(f"{row.place}: {problem}" for problem in wrong)
    if problems or not len(pairs):
        problems = problems or left_out or [f"{_named(source)}: holds no pairs"]
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError("\n".join(problems[:_SHOWN]) + more)
    if left_out:
        logger.warning("%s: %d pairs are left out, such as %s", _named(source), len(left_out), left_out[0])
    found = pairs.whole()
    if len(files) == 1:
        del found["file"]
    if found["messages"].null_count == len(pairs):
        del found["messages"]
    return Dataset.from_dict(found)


def _resolve(source: Source, preset: str | None, split: str) -> tuple[Source, Preset | None, str]:
    """What to read, in which layout, and which part of it."""
    if preset is None and isinstance(source, str) and source in PRESETS and not Path(source).exists():
        preset = source
        source = PRESETS[preset].hub
        if source is None:
            page = PRESETS[preset].page
            raise ValueError(f"data: {preset} is on no hub; get its file from {page} and give it with this preset")
        split = PRESETS[preset].split if split == "train" else split
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
    return source, None if preset is None else PRESETS[preset], split


def _named(source: Source) -> str:
    if isinstance(source, (Dataset, DatasetDict)):
        return "the data set"
    return str(source) if isinstance(source, (str, Path)) else ", ".join(map(str, source))


def _require_renaming(columns: Mapping[str, str]) -> None:
    allowed = (*FIELDS, "group")
    wrong = [ours for ours in columns.values() if ours not in allowed]
    if wrong:
        raise ValueError(f"columns: got {wrong} as our names, expected some of {', '.join(allowed)}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns: two of {list(columns)} become one, expected a name of ours for each")


def _rows(source: Source, split: str) -> Iterator[_Row]:
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from _rows(part, split)
    elif isinstance(source, DatasetDict):
        if split not in source:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(source)}")
        yield from _rows(source[split], split)
    elif isinstance(source, Dataset):
        for i, record in enumerate(source, start=1):
            yield _Row(f"the data set, row {i}", i, "", record)
    elif Path(source).is_dir():
        files = sorted(path for path in Path(source).iterdir() if path.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{source}: holds no file named {', '.join(SUFFIXES)}")
        for path in files:
            yield from _file(path)
    elif isinstance(source, str) and _is_hub_name(source):
        yield from _rows(_from_hub(source, split), split)
    else:
        yield from _file(Path(source))


def _is_hub_name(source: str) -> bool:
    path = Path(source)
    return not path.exists() and path.suffix not in SUFFIXES and len(path.parts) == 2 and not path.is_absolute()


def _from_hub(name: str, split: str) -> Dataset:
    instead = "give a file, a folder or a datasets.Dataset instead"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline:
        try:
            HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
        except Exception as error:  # the hub's client raises what the HTTP library of its release raises
            raise ValueError(
                f"data: {name} is no file or folder, and the hub has no such set or cannot be reached; {instead}, or "
                "set HF_HUB_OFFLINE=1 to use what was downloaded before"
            ) from error
    try:
        return load_dataset(name, split=split)
    except Exception as error:
        if offline:
            message = "is no file or folder, nor in the local cache, and HF_HUB_OFFLINE forbids the network"
        else:
            message = f"cannot be loaded ({error})"
        raise ValueError(f"data: {name} {message}; {instead}") from error


def _file(path: Path) -> Iterator[_Row]:
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file or folder {path}")
    read = {".json": _json_rows, ".parquet": _parquet_rows}.get(path.suffix, _json_lines)
    yield from read(path)


def _json_lines(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:  # bytes, so that text in another encoding is named by its line as well
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            place = (f"{path}, line {line}", line, path.name)
            try:
                yield _Row(*place, json.loads(text.decode("utf-8-sig")))
            except json.JSONDecodeError as error:
                yield _Row(*place, None, f"not JSON ({error.msg} at character {error.pos})")
            except UnicodeDecodeError as error:
                yield _Row(*place, None, f"not UTF-8 ({error.reason} at byte {error.start})")


def _json_rows(path: Path) -> Iterator[_Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}"
        raise ValueError(f"{path}: not JSON ({error.msg} at {place}); JSON Lines are named .jsonl") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(
            f'{path}: got a JSON {type(content).__name__}, expected a list, or an object whose "data" is one'
        )
    for i, record in enumerate(records, start=1):
        yield _Row(f"{path}, record {i}", i, path.name, record)


def _parquet_rows(path: Path) -> Iterator[_Row]:
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not Parquet ({error})") from error
    for i, record in enumerate(records, start=1):
        yield _Row(f"{path}, record {i}", i, path.name, record)


def _converted(record: object, layout: Preset | None, columns: Mapping[str, str]) -> list[object]:
    if layout is not None:
        return list(layout.convert(record))
    if not isinstance(record, dict) or not columns:
        return [record]
    missing = [theirs for theirs in columns if theirs not in record]
    if missing:
        raise KeyError(f"columns names {', '.join(missing)}; the record has {', '.join(record)}")
    kept = {name: value for name, value in record.items() if name not in columns and name not in columns.values()}
    return [kept | {ours: record[theirs] for theirs, ours in columns.items()}]


def _canonical(record: object, task: str | None, tasks: Sequence[str] | None) -> tuple[dict, list[str]]:
    """The record with its prompt and answers as texts and its chat beside them; or what is wrong with it."""
    if not isinstance(record, dict):
        got = type(record).__name__
        return {}, [f"got a JSON {got}, expected an object with {', '.join(FIELDS)}"]
    record, problems = dict(record), []
    if task is not None:
        own = record.get("task")
        if own not in (None, task):
            problems.append(f"field 'task': got {own!r}, but task={task!r} names the whole source")
        record["task"] = task
    if all(isinstance(record.get(name), (str, list)) for name in ("chosen", "rejected")):
        record = _with_prompt(record)
    for field in FIELDS:
        if field not in record:
            has = ", ".join(map(repr, record)) or "none"
            if field == "task":
                hint = "name the task of the whole source with task= (--task)"
            else:
                hint = "rename other columns with columns= (--columns)"
            problems.append(f"field {field!r} is missing; the line has {has}; {hint}")
        elif field != "task" and isinstance(record[field], list):
            problems += [f"field {field!r}: {text}" for text in _wrong_messages(record[field], field)]
        elif not isinstance(record[field], str):
            problems.append(f"field {field!r}: got {type(record[field]).__name__}, expected text")
        elif not record[field].strip():
            problems.append(f"field {field!r} is empty")
    if not isinstance(record.get("group"), (str, type(None))):
        problems.append(f"field 'group': got {type(record['group']).__name__}, expected text")
    if problems:
        return {}, problems
    for field in ("chosen", "rejected"):
        if isinstance(record[field], list):
            record[field] = record[field][0]["content"]
    messages = None
    if isinstance(record["prompt"], list):
        messages = [{"role": message["role"], "content": message["content"]} for message in record["prompt"]]
        record["prompt"] = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    if record["chosen"] == record["rejected"]:
        text = "fields 'chosen' and 'rejected' are identical: no preference can be learned from them"
        problems.append(text)
    if tasks is not None and record["task"] not in tasks:
        problems.append(f"field 'task': got {record['task']!r}, expected one of {', '.join(tasks)}")
    return {**record, "group": record.get("group"), "messages": messages}, problems


def _with_prompt(record: dict) -> dict:
    """The record with a prompt of its own, if its answers begin with it."""
    chosen, rejected = record["chosen"], record["rejected"]
    whole = isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1
    if "prompt" in record and not whole:
        return record
    if type(chosen) is not type(rejected):
        return record
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1  # the blank belongs to the answers
    if shared == 0:
        return record
    if "prompt" in record and isinstance(record["prompt"], list) and record["prompt"] != chosen[:shared]:
        return record
    return {**record, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _wrong_messages(messages: list, field: str) -> Iterator[str]:
    """What is wrong with a prompt's or an answer's chat messages."""
    if not messages:
        yield "got no messages"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            yield f"message {i + 1}: got {str(message)[:60]!r}, expected an object with role and content"
        elif message["role"] not in ROLES:
            yield f"message {i + 1}: got the role {message['role']!r}, expected one of {', '.join(ROLES)}"
        elif not isinstance(message["content"], str) or not message["content"].strip():
            yield f"message {i + 1}: its content is {'empty' if isinstance(message['content'], str) else 'no text'}"
        elif field == "prompt" and i == len(messages) - 1 and message["role"] != "user":
            yield f"ends with the {message['role']}'s message, expected the user's"
        elif field != "prompt" and message["role"] != "assistant":
            yield f"got the {message['role']}'s message, expected an answer: one assistant's message"
    if field != "prompt" and len(messages) > 1:
        yield f"got {len(messages)} messages, expected an answer of one"


class _Columns:
    """Records that become Arrow's columns a thousand at a time; None where one lacks a field."""

    def __init__(self, name: str) -> None:
        self.name, self.records, self.tables, self.count = name, [], [], 0

    def __len__(self) -> int:
        return self.count

    def add(self, record: dict) -> None:
        self.records.append(record)
        self.count += 1
        if len(self.records) == _ROWS_AT_ONCE:
            self._turn()

    def _turn(self) -> None:
        names = dict.fromkeys(field for record in self.records for field in record)
        table = {}
        for field in names:
            try:
                table[field] = pa.array([record.get(field) for record in self.records])
            except (pa.ArrowException, UnicodeError, OverflowError) as error:
                self._refuse(field, error)
        self.tables.append(pa.table(table))
        self.records = []

    def whole(self) -> dict[str, pa.ChunkedArray]:
        """The columns, in the order in which their fields first appeared."""
        if self.records:
            self._turn()
        found = {}
        for field in dict.fromkeys(name for table in self.tables for name in table.column_names):
            parts = [table.select([field] if field in table.column_names else []) for table in self.tables]
            try:
                # a number may be whole in some rows, and a field may be missing in all rows of a part
                found[field] = pa.concat_tables(parts, promote_options="permissive")[field]
            except pa.ArrowException as error:
                self._refuse(field, error)
        return found

    def _refuse(self, field: str, error: Exception) -> None:
        raise ValueError(f"{self.name}, field {field!r}: the lines' values do not make one column ({error})") from error


def as_chat(pairs: Dataset, tasks: Sequence[str]) -> Dataset:
    """The pairs, with the plain prompts of some tasks put to the model as a user's message.

    Args:
        pairs: records as `load_pairs` returns them; their `prompt` stays as it is.
        tasks: which.

    Raises:
        ValueError: a task that no pair has.
    """
    unknown = sorted(set(tasks) - set(pairs["task"]))
    if unknown:
        raise ValueError(
            f"chat: got {', '.join(unknown)}, expected tasks of the pairs: {', '.join(sorted(set(pairs['task'])))}"
        )

    def put(rows: dict[str, list]) -> dict[str, list]:
        messages = rows.get("messages", [None] * len(rows["prompt"]))
        return {
            "messages": [
                [{"role": "user", "content": prompt}] if own is None and task in tasks else own
                for own, prompt, task in zip(messages, rows["prompt"], rows["task"], strict=True)
            ]
        }

    chat = List({"role": Value("string"), "content": Value("string")})
    return pairs.map(put, batched=True, features=Features({**pairs.features, "messages": chat}), desc="chats")


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
        raise ValueError(f"held_out: got {held_out}, expected a share between 0 and 1")
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
