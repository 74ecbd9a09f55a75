"""Preference pairs as records: read, validate, split.

A record has the text fields `prompt`, `chosen`, `rejected` and `task`, and optionally `group`: pairs of one group are
never split between training and held-out data. If the prompt is a chat, `messages` holds the chat, `prompt` its
rendering as plain text, and `tools` the JSON schemas of its tools. Other fields are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value
from datasets.table import InMemoryTable

from dpoviz.data import files
from dpoviz.data.columns import FIELDS, RENAMED, Reader, Refused, Tie, as_text, chat_flaws, is_context
from dpoviz.data.files import Row, Source
from dpoviz.data.presets import PRESETS, Preset, recognised

logger = logging.getLogger(__name__)

RESERVED_TASKS = ("all",)
"""Names that tables use for all tasks together."""

KEPT = ("task", "group", "reward_margin")
"""Fields that are read beside those of a preset's layout."""

_SHOWN = 10  # problems listed in one message

_ROWS_AT_ONCE = 1000  # held as Python objects, which take ten times the memory of Arrow columns

_CHAT = List({"role": Value("string"), "content": Value("string")})


def load_pairs(
    source: Source,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    preset: str | None = None,
    tasks: Sequence[str] | None = None,
    split: str = "train",
    ignore_columns: Sequence[str] = (),
) -> Dataset:
    """Read preference pairs; refuse the whole source if any record is invalid.

    The prompt is a text or a list of chat messages, ``{"role": …, "content": …}``, the last of them the user's; an
    answer is a text or one assistant message. `data/README.md` lists the columns that are read and their names. The
    prompt may be missing if both answers begin with it: it is then the messages, or the words, that they share (TRL's
    explicit and implicit prompts). Anything that could change the prompt or the label and cannot be used is refused by
    name.

    Args:
        source: a file (JSON Lines, JSON, CSV, TSV, Parquet, compressed or not), a folder (of such files, of a clone
            of a hub data set, or of `Dataset.save_to_disk`), a list of these, a `datasets.Dataset`, the name of a
            preset, or a data set on the Hugging Face Hub.
        task: task of all pairs; records that name a task must name this one.
        columns: column names of the source mapped to ours: ``{"question": "prompt"}``.
        preset: layout of a known public data set, a key of `PRESETS`, for a file or `Dataset` of it; detected if its
            columns are unique. Unusable pairs of a preset, such as identical answers, are left out and counted in a
            warning.
        tasks: the accepted task names; None accepts any.
        split: split of a hub data set or of a `DatasetDict`.
        ignore_columns: columns, or fields of messages, to skip.

    Returns:
        A data set with the records' fields, `group` (None if missing), `line` (line number in a text file, record
        number elsewhere, from 1), `messages` if a prompt is a chat (None in the other rows), `tools` if there are any,
        and `file` if there are several files. A column of several types becomes JSON text.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: a record is not an object, lacks a field, has a field that is neither text nor messages, an empty
            answer, two identical answers, an unexpected task, or a column that would be lost or that a later step
            writes (each named by file, line and field); the preset is unknown; the hub does not respond within
            seconds.
    """
    source, layout, split = _resolve(source, preset, split)
    if layout is not None and columns:
        raise ValueError("columns: given together with a preset, which renames them itself; give one of the two")
    _require_renaming(columns or {})
    if task in RESERVED_TASKS:
        raise ValueError(f"task: got {task!r}, the name of all tasks together in tables; expected another")
    if isinstance(ignore_columns, str):
        raise ValueError(f"ignore_columns: got the text {ignore_columns!r}, expected a list of names")
    loading = _Loading(source, Reader(columns or {}, ignore_columns), layout, task, tasks)
    for row in files.rows(source, split):
        loading.add(row)
    return loading.whole()


def _resolve(source: Source, preset: str | None, split: str) -> tuple[Source, Preset | None, str]:
    """Return the source to read, its layout, and its split."""
    if preset is None and isinstance(source, str) and source in PRESETS and not files.exists(source):
        preset = source
        source = PRESETS[preset].hub
        if source is None:
            page = PRESETS[preset].page
            raise ValueError(f"data: {preset} is on no hub; get its file from {page} and give it with this preset")
        split = PRESETS[preset].split if split == "train" else split
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
    return source, None if preset is None else PRESETS[preset], split


def _require_renaming(columns: Mapping[str, str]) -> None:
    wrong = [ours for ours in columns.values() if ours not in RENAMED]
    if wrong:
        raise ValueError(f"columns: got {wrong} as our names, expected some of {', '.join(RENAMED)}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns: two of {list(columns)} become one, expected a name of ours for each")


class _Loading:
    """Collector of the pairs, problems and warnings of a source."""

    def __init__(
        self, source: Source, reader: Reader, layout: Preset | None, task: str | None, tasks: Sequence[str] | None
    ) -> None:
        self.reader, self.layout, self.task, self.tasks = reader, layout, task, tasks
        self.name, self.shown = files.named(source), files.shown(source)  # in errors, and in warnings
        self.pairs = _Columns(self.shown)
        self.files: dict[str, Preset | None] = {}  # with the layout of each
        self.problems: list[str] = []
        self.left_out: list[str] = []
        self.of_columns: set[str] = set()
        self.said, self.contrary = array("q"), array("q")  # hashes of the pairs, and of the pairs flipped

    def add(self, row: Row) -> None:
        """Add the pairs of a row, or its problems."""
        if row.file not in self.files:
            self.files[row.file] = self.layout or self._recognised(row)
        layout = self.files[row.file]
        if row.problem is not None:
            self.problems.append(f"{row.place}: {row.problem}")
            return
        for record, wrong in self._records(row, layout):
            if not wrong:
                self.pairs.add({**record, "line": row.number, "file": row.file})
                self._count(record)
            else:  # the user can mend their own data, but not a public data set
                place, found = (row.place, self.problems) if layout is None else (row.shown, self.left_out)
                found.extend(f"{place}: {text}" for text in wrong)

    def _recognised(self, row: Row) -> Preset | None:
        if not isinstance(row.record, dict) or self.reader.columns:
            return None
        record = self.reader.without_ignored(row.record)
        name = recognised(record)
        # with an extra context column it is another data set: the preset's converter would drop a system message
        if name is None or any(is_context(own) and own not in {*PRESETS[name].columns} for own in record):
            return None
        found = PRESETS[name]
        said = "%s: read as the public set %s (%s), preferred by %s"
        logger.warning(said, row.file or self.shown, name, found.page, found.preferred_by)
        return found

    def _records(self, row: Row, layout: Preset | None) -> Iterable[tuple[dict, list[str]]]:
        if not isinstance(row.record, dict):
            yield {}, [f"got a JSON {type(row.record).__name__}, expected an object with {', '.join(FIELDS)}"]
            return
        try:
            found = [row.record] if layout is None else list(layout.convert(self.reader.without_ignored(row.record)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = next(name for name, own in PRESETS.items() if own is layout)
            self.problems.append(f"{row.place}: not in the layout of {name} ({type(error).__name__}: {error})")
            return
        if not found:
            self.left_out.append(f"{row.shown}: no preference")
        named = {name: row.record[name] for name in KEPT if layout is not None and name in row.record}
        if len(found) > 1:
            named.pop("reward_margin", None)  # of which pair it is, nobody knows
        for record in found:
            try:
                record = self.reader.read(named | record)
            except Tie:
                self.left_out.append(f"{row.shown}: no preference")
            except Refused as error:
                if error.column is None:
                    yield {}, [str(error)]
                elif error.column not in self.of_columns:
                    self.of_columns.add(error.column)
                    self.problems.append(f"{row.place}: {error}")
            else:
                yield self._canonical(record, layout)

    def _canonical(self, record: dict, layout: Preset | None) -> tuple[dict, list[str]]:
        """Return the record with prompt and answers as text and its chat in `messages`, and its problems."""
        problems = []
        task = self.task or (layout.task if layout is not None and "task" not in record else None)
        if task is not None:
            own = record.get("task")
            if own not in (None, task):
                problems.append(f"field 'task': got {own!r}, but task={task!r} names the whole source")
            record["task"] = task
        problems += [text for field in FIELDS for text in _field_flaws(record, field)]
        if not isinstance(record.get("group"), (str, type(None))):
            problems.append(f"field 'group': got {type(record['group']).__name__}, expected text")
        if problems:
            return {}, problems
        for field in ("chosen", "rejected"):
            if isinstance(record[field], list):
                record[field] = record[field][0]["content"]
        messages = None
        if isinstance(record["prompt"], list):
            messages = record["prompt"]
            record["prompt"] = as_text(messages, record.get("tools"))
        if record["chosen"] == record["rejected"]:
            problems.append("fields 'chosen' and 'rejected' are identical: no preference can be learned from them")
        if record["task"] in RESERVED_TASKS:
            problems.append(
                f"field 'task': got {record['task']!r}, the name of all tasks together in tables; rename it"
            )
        if self.tasks is not None and record["task"] not in self.tasks:
            problems.append(f"field 'task': got {record['task']!r}, expected one of {', '.join(self.tasks)}")
        return {**record, "group": record.get("group"), "messages": messages}, problems + _surrogates(record, messages)

    def _count(self, record: dict) -> None:
        prompt, chosen, rejected = record["prompt"], record["chosen"], record["rejected"]
        self.reader.counts["have answers that differ in blanks alone"] += chosen.split() == rejected.split()
        self.said.append(hash((prompt, chosen, rejected)))
        self.contrary.append(hash((prompt, rejected, chosen)))

    def _count_repeats(self) -> None:
        """Count duplicate pairs, and pairs that also occur flipped."""
        said, contrary = (np.frombuffer(hashes, np.int64) for hashes in (self.said, self.contrary))  # without a copy
        said.sort()
        self.reader.counts["say the same as one before"] = int((said[1:] == said[:-1]).sum())
        nearest = np.searchsorted(said, contrary).clip(max=len(said) - 1)
        self.reader.counts["say the contrary of another: the same answers, the other way round"] = int(
            (said[nearest] == contrary).sum()
        )

    def whole(self) -> Dataset:
        """Return the pairs, and log the warnings.

        Raises:
            ValueError: there are problems, or no pairs.
        """
        unknown = sorted(self.reader.ignored - self.reader.seen)
        if unknown and not self.problems:
            self.problems.append(f"ignore_columns: got {', '.join(unknown)}, which no row has")
        if self.problems or not len(self.pairs):
            problems = self.problems or self.left_out or [f"{self.name}: holds no pairs"]
            more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ValueError("\n".join(problems[:_SHOWN]) + more)
        if self.left_out:
            logger.warning("%s: %d pairs are left out, such as %s", self.shown, len(self.left_out), self.left_out[0])
        self._count_repeats()
        for text, count in self.reader.counts.items():
            if count:
                logger.warning("%s: %d of %d pairs %s", self.shown, count, len(self.pairs), text)
        return self.pairs.whole(several_files=len(self.files) > 1)


def _dataset(columns: Mapping[str, pa.ChunkedArray]) -> Dataset:
    """Return the columns as a data set whose fingerprint is their hash; `Dataset.from_dict` would pickle a copy."""
    digest = hashlib.sha256(repr([(name, str(column.type)) for name, column in columns.items()]).encode())
    for column in columns.values():
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                digest.update(b"-" if buffer is None else buffer)
    return Dataset(InMemoryTable(pa.table(dict(columns))), fingerprint=digest.hexdigest()[:16])


def _field_flaws(record: Mapping, field: str) -> list[str]:
    if field not in record:
        has = ", ".join(map(repr, record)) or "none"
        if field == "task":
            hint = "name the task of the whole source with task= (--task)"
        else:
            hint = "rename other columns with columns= (--columns)"
        return [f"field {field!r} is missing; the line has {has}; {hint}"]
    value = record[field]
    if field != "task" and isinstance(value, list):
        return [f"field {field!r}: {text}" for text in chat_flaws(value, field)]
    if not isinstance(value, str):
        return [f"field {field!r}: got {type(value).__name__}, expected text"]
    return [] if value.strip() else [f"field {field!r} is empty"]


def _surrogates(record: Mapping, messages: list[dict] | None) -> list[str]:
    """Return the fields with an unpaired surrogate, which JSON allows and no encoding can write."""
    texts = {name: record.get(name) or "" for name in (*FIELDS, "group", "tools")}
    texts["prompt"] += json.dumps(messages, ensure_ascii=False)
    texts |= {f"name {name!a}": name for name in record}
    found = []
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found.append(f"field {name!r}: half of a surrogate pair ({text[error.start]!a}), which is no text")
    return found


_OBJECTS = Features(messages=List(Json())).arrow_schema.field("messages").type
"""Arrow's type of a list of objects with any fields: each is JSON text, which `datasets` parses when it is read."""


def _as_objects(lists: pa.Array) -> pa.Array:
    """Return the column of JSON texts of lists as one of lists of objects."""
    parsed = [text and json.loads(text) for text in lists.to_pylist()]
    texts = [own and [json.dumps(message, ensure_ascii=False) for message in own] for own in parsed]
    return pa.array(texts, pa.list_(pa.string())).cast(_OBJECTS)


class _Columns:
    """Converter of records to Arrow, in chunks of 1,000; missing fields become None, mixed types JSON text."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.records: list[dict] = []
        self.tables: list[pa.Table] = []
        self.in_json: dict[str, set[int]] = {}  # per field of mixed types, the chunks already converted to JSON text
        self.rich = False  # a message has fields besides role and content

    def __len__(self) -> int:
        return self.count

    def add(self, record: dict) -> None:
        self.rich = self.rich or any(len(message) > 2 for message in record["messages"] or [])
        self.records.append(record)
        self.count += 1
        if len(self.records) == _ROWS_AT_ONCE:
            self._turn()

    def _turn(self) -> None:
        table = {}
        for field in dict.fromkeys(field for record in self.records for field in record):
            values = [record.get(field) for record in self.records]
            try:
                if field == "messages" and self.rich:
                    raise pa.ArrowTypeError("objects of any fields")
                table[field] = pa.array(values)
            except (pa.ArrowException, UnicodeError, OverflowError):
                self.in_json.setdefault(field, set()).add(len(self.tables))
                table[field] = _in_json(values)
        self.tables.append(pa.table(table))
        self.records = []

    def whole(self, *, several_files: bool) -> Dataset:
        """Return the columns as a data set, ordered by first appearance of their fields."""
        if self.records:
            self._turn()
        found = {name: self._joined(name) for name in dict.fromkeys(n for t in self.tables for n in t.column_names)}
        if not several_files:
            del found["file"]
        chats = found["messages"]
        if self.rich or chats.null_count == self.count:
            del found["messages"]
        if set(self.in_json) - {"messages"}:
            names = ", ".join(repr(name) for name in self.in_json if name != "messages")
            logger.warning("%s: columns %s hold values of several types; kept as JSON text", self.name, names)
        if self.rich:
            found["messages"] = pa.chunked_array([_as_objects(chunk) for chunk in chats.chunks], _OBJECTS)
        return _dataset(found)

    def _joined(self, field: str) -> pa.ChunkedArray:
        parts = [table.select([field] if field in table.column_names else []) for table in self.tables]
        if field not in self.in_json:
            try:
                # chunks may mix int and float, and a field may be missing in a whole chunk
                return pa.concat_tables(parts, promote_options="permissive")[field]
            except pa.ArrowException:
                self.in_json[field] = set()
        columns = []
        for i, part in enumerate(parts):
            values = part[field].to_pylist() if field in part.column_names else [None] * len(part)
            columns.append(pa.array(values, pa.string()) if i in self.in_json[field] else _in_json(values))
        return pa.chunked_array(columns)


def _in_json(values: list) -> pa.Array:
    """Return values as JSON text; None stays None."""
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values], pa.string())


def as_chat(pairs: Dataset, tasks: Sequence[str]) -> Dataset:
    """Turn the text prompts of some tasks into chats of one user message.

    Args:
        pairs: records as returned by `load_pairs`; `prompt` is unchanged.
        tasks: the tasks whose prompts become chats.

    Raises:
        ValueError: no pair has one of the tasks.
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

    features = Features({"messages": _CHAT, **pairs.features})
    return pairs.map(put, batched=True, features=features, desc="chats")


def split_by_group(pairs: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split pairs into training and held-out data, stratified by task, with no prompt or group in both.

    Args:
        pairs: records with `prompt`, `task` and optionally `group`.
        held_out: fraction of each task's groups to hold out, at least one group per task. Pairs connected by a prompt
            or group count towards the task of the first of them.
        seed: random seed.

    Returns:
        The training pairs and the held-out pairs.

    Raises:
        ValueError: `held_out` is not between 0 and 1, or a task has only one group.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: got {held_out}, expected a fraction between 0 and 1")
    group = components(pairs)
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


def folds_by_group(pairs: Dataset, folds: int, seed: int) -> list[list[int]]:
    """Return the rows of each fold: each pair is in one, no prompt or group is in two, and tasks are spread evenly.

    Args:
        pairs: records with `prompt`, `task` and optionally `group`.
        folds: number of folds, at least 2.
        seed: random seed.

    Raises:
        ValueError: a task has fewer groups than there are folds.
    """
    group, tasks = components(pairs), pairs["task"][:]
    of_task: dict[str, list[int]] = {}
    for g in dict.fromkeys(group):
        of_task.setdefault(tasks[g], []).append(g)
    fold_of: dict[int, int] = {}
    for task, groups in sorted(of_task.items()):
        if len(groups) < folds:
            raise ValueError(f"folds: got {folds}, expected at most {len(groups)}, the groups of pairs of {task!r}")
        random.Random(f"folds {seed} {task}").shuffle(groups)
        begin = len(fold_of)  # so that the first folds do not get the remainder of every task
        fold_of |= {g: (begin + i) % folds for i, g in enumerate(groups)}
    return [[row for row, g in enumerate(group) if fold_of[g] == fold] for fold in range(folds)]


def components(pairs: Dataset) -> list[int]:
    """Return, per pair, the index of the first pair it is connected to by shared prompts and groups."""
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


def pairs_table(held_out: Dataset) -> pd.DataFrame:
    """Return the texts of the held-out pairs, in the order of held_out.csv.

    Returns:
        task, prompt, chosen, rejected, messages (JSON of the chat; "" where the prompt is a text), prompt_ids.
    """
    rows = held_out.select_columns(["task", "prompt", "chosen", "rejected", "prompt_ids"]).to_pandas()
    chats = held_out["messages"][:] if "messages" in held_out.column_names else [None] * len(rows)
    return rows.assign(messages=[json.dumps(chat, ensure_ascii=False) if chat else "" for chat in chats])
