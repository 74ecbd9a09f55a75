"""Read rows from files, folders, data sets and the hub, each with its place and, if unreadable, its problem."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_HUB_TIMEOUT = 5.0  # seconds before the hub counts as unreachable

_BATCH = 1000  # Parquet rows in memory at once

_DEEPEST = 25  # nesting levels in a row: Arrow's conversion is recursive and fails at 40

_BESIDE = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}
"""JSON files that lie beside data and hold metadata only."""

_PACKINGS: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zstd", lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd"))),
}
"""Compression formats by magic number; the file name is not trusted."""

_PACKED = {".gz", ".bz2", ".xz", ".zst", ".zstd"}

_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel sheet; unpack it, or save it as CSV",
    b"SQLite format": "an SQLite database; export it as CSV",
    b"\x80\x04": "a Python pickle; write it as JSON Lines",
    b"\x80\x05": "a Python pickle; write it as JSON Lines",
    b"%PDF": "a PDF",
}

Source: TypeAlias = Path | str | Dataset | DatasetDict | list[Path | str] | tuple[Path | str, ...]


class Row(NamedTuple):
    """A record and its position, or the problem that made it unreadable."""

    place: str
    number: int
    file: str
    record: object
    problem: str | None = None

    @property
    def shown(self) -> str:
        """The position, with the file relative to the source: a warning is printed in notebooks that others read."""
        return self.file + self.place[self.place.rindex(", ") :] if self.file else self.place


def rows(source: Source, split: str) -> Iterator[Row]:
    """Yield the rows of a source in order.

    Args:
        source: as in `load_pairs`.
        split: split of a hub data set, of its clone, of a saved data set or of a `DatasetDict`.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: a file's content does not match its suffix, or the split or data set does not exist.
    """
    parts = list(_parts(source, split))
    paths = [part for part in parts if isinstance(part, Path)]
    root = os.path.commonpath([path.parent.absolute() for path in paths]) if paths else ""
    for part in parts:
        if isinstance(part, Path):
            found = _file(part, os.path.relpath(part.absolute(), root))
        else:
            found = (Row(f"the data set, row {i}", i, "", record) for i, record in enumerate(part, start=1))
        yield from (row if row.problem else row._replace(problem=_flaw(row.record)) for row in found)


def exists(path: str) -> bool:
    """Return whether a file or folder of this name exists."""
    return Path(path).exists()


def named(source: Source) -> str:
    """Return the name of a source for messages."""
    if isinstance(source, (Dataset, DatasetDict)):
        return "the data set"
    return str(source) if isinstance(source, (str, Path)) else ", ".join(map(str, source))


def shown(source: Source) -> str:
    """Return the name of a source for warnings: of an absolute path, its last part."""
    if isinstance(source, (list, tuple)):
        return ", ".join(map(shown, source))
    return Path(source).name if isinstance(source, (str, Path)) and Path(source).is_absolute() else named(source)


def _parts(source: Source, split: str) -> Iterator[Path | Dataset]:
    """Yield the files and data sets of a source."""
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from _parts(part, split)
    elif isinstance(source, DatasetDict):
        if split not in source:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(source)}")
        yield source[split]
    elif isinstance(source, Dataset):
        yield source
    elif not isinstance(source, (str, Path)):
        got = type(source).__name__
        raise ValueError(
            f"data: got {got}, expected a file, a folder or a datasets.Dataset; Dataset.from_list makes one"
        )
    elif Path(source).is_dir():
        yield from _folder(Path(source), split)
    elif isinstance(source, str) and _is_hub_name(source):
        yield from _parts(_from_hub(source, split), split)
    elif Path(source).exists():
        yield Path(source)
    else:
        raise FileNotFoundError(f"data: there is no file or folder {source}")


# --- folders and the hub ---------------------------------------------------------------------------------------------


def _folder(folder: Path, split: str) -> Iterator[Path | Dataset]:
    if {"state.json", "dataset_dict.json"} & {path.name for path in folder.iterdir()}:
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(f"{folder}: not a whole folder of Dataset.save_to_disk ({error})") from error
        yield from _parts(saved, split)
        return
    there = sorted(path for path in folder.rglob("*") if _is_data(path.relative_to(folder)) and path.is_file())
    if not there:
        raise ValueError(f"{folder}: holds no file named {', '.join(READERS)}, packed or not, nor a saved data set")
    own = [path for path in there if path.parent == folder]
    splits = _splits(folder)
    if not own and not splits:
        raise ValueError(
            f"{folder}: got files in several folders ({_few(there, folder)}), expected those of one set; give them"
        )
    if set(splits) <= {"train"}:
        chosen = own or splits["train"]
    elif split in splits:
        chosen = [path for path in splits[split] if path in there]
    else:
        raise ValueError(
            f"split: got {split!r}, expected one of {', '.join(splits)}, which {folder} holds, or files by name"
        )
    others = [str(path.relative_to(folder)) for path in there if path not in chosen]
    if others:
        logger.warning("%s: %s is read; not %s", shown(folder), _few(chosen, folder), ", ".join(others[:5]))
    yield from chosen


def _few(paths: list[Path], folder: Path) -> str:
    shown = ", ".join(str(path.relative_to(folder)) for path in paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name not in _BESIDE and kind(path) in READERS


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split, read from the README or the file names; empty if neither names splits."""
    try:
        files = load_dataset_builder(str(folder.absolute())).config.data_files
    except Exception:  # `datasets` finds no data set in this folder
        return {}
    return {
        str(name): [folder / os.path.relpath(path, folder.absolute()) for path in own] for name, own in files.items()
    }


def kind(path: Path) -> str:
    """Return the suffix that selects the reader: lower case, without a compression suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    while suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_hub_name(source: str) -> bool:
    path = Path(source)
    return not path.exists() and kind(path) not in READERS and len(path.parts) == 2 and not path.is_absolute()


def _from_hub(name: str, split: str) -> Dataset:
    instead = "give a file, a folder or a datasets.Dataset instead"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline:
        try:
            HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
        except Exception as error:  # the exception type depends on the HTTP library of the hub client's release
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


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: Path, label: str) -> Iterator[Row]:
    with path.open("rb") as file:
        start = file.read(16)
    for magic, what in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: is {what}; expected a file named {', '.join(READERS)}, packed or not")
    read = READERS.get(kind(path))
    if read is None:
        raise ValueError(f"{path}: got the suffix {path.suffix!r}, expected one of {', '.join(READERS)}, packed or not")
    packing = next((known for magic, known in _PACKINGS.items() if start.startswith(magic)), None)
    if packing is None:
        yield from read(path, label, lambda: path.open("rb"))
        return
    name, unpack = packing
    try:
        yield from read(path, label, partial(unpack, path))
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not whole {name} ({error}); get the file again") from error


def _encoding(start: bytes) -> str:
    """Return the encoding detected from the first bytes; UTF-8 by default."""
    found = json.detect_encoding(start[:4])
    return "utf-8-sig" if found == "utf-8" else found


def _lines(path: Path, open_: Callable[[], IO[bytes]]) -> Iterator[str | UnicodeDecodeError]:
    """Yield the lines of a text with any line ending; for a line that is not UTF-8, yield its error."""
    with open_() as file:
        encoding = _encoding(file.read(4))
    with open_() as file:
        if not encoding.startswith("utf-8"):
            yield from _decoded(path, file, encoding)
            return
        for chunk in file:
            for line in chunk.splitlines() or [b""]:  # bytes.splitlines splits at \n, \r and \r\n only
                try:
                    yield line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    yield error


def _decoded(path: Path, file: IO[bytes], encoding: str, newline: str | None = None) -> Iterator[str]:
    try:
        with io.TextIOWrapper(io.BufferedReader(file), encoding=encoding, newline=newline) as text:  # type: ignore
            yield from text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {encoding.upper()} ({error.reason} at byte {error.start})") from error


class _Twice(dict):
    """A JSON object that contains `key` twice."""

    key = ""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = _Twice(found)
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


def _json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or contains a number with too many digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_json(text: str) -> Any:
    """Parse a JSON text inside a row.

    Raises:
        ValueError: the text is not JSON, contains a key twice, or is nested too deeply.
    """
    value = _json(text)
    flaw = _flaw(value)
    if flaw:
        raise ValueError(flaw)
    return value


def _flaw(record: object) -> str | None:
    """Return the structural problem of a row, a duplicate key or too deep nesting; None if there is none."""
    level: list[object] = [record]
    for _ in range(_DEEPEST):
        twice = next((value for value in level if isinstance(value, _Twice)), None)
        if twice is not None:
            return f"the key {twice.key!r} stands twice in one object, expected it once"
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [v for values in inner if not isinstance(values, (str, int, float)) for v in _inside(values)]
        if not level:
            return None
    return f"lists and objects are nested over {_DEEPEST} levels deep"


def _inside(values: object) -> list[object]:
    """Return the lists and dicts among the values."""
    if not isinstance(values, (list, type({}.values()))):
        return []
    return [value for value in values if isinstance(value, (dict, list))]


def _json_lines(path: Path, label: str, open_: Callable[[], IO[bytes]]) -> Iterator[Row]:
    if _is_whole(path, open_):
        yield from _json_rows(path, label, open_)
        return
    for number, text in enumerate(_lines(path, open_), start=1):
        place = (f"{path}, line {number}", number, label)
        if isinstance(text, UnicodeDecodeError):
            yield Row(*place, None, f"not UTF-8 ({text.reason} at byte {text.start})")
        elif text.strip():
            try:
                yield Row(*place, _json(text))
            except json.JSONDecodeError as error:
                yield Row(*place, None, f"not JSON ({error.msg} at character {error.pos})")
            except ValueError as error:
                yield Row(*place, None, f"not JSON ({error})")


def _is_whole(path: Path, open_: Callable[[], IO[bytes]]) -> bool:
    """Return whether the file is one JSON value over several lines rather than one record per line."""
    first = next((text for text in _lines(path, open_) if isinstance(text, UnicodeDecodeError) or text.strip()), "")
    return isinstance(first, str) and re.match(r"\s*(\[\s*(\{|$)|\{\s*$)", first) is not None


def _json_rows(path: Path, label: str, open_: Callable[[], IO[bytes]]) -> Iterator[Row]:
    with open_() as file:
        raw = file.read()
    try:
        content = _json(raw.decode(_encoding(raw)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and not _is_whole(path, open_):  # JSON Lines with the suffix .json
            yield from _json_lines(path, label, open_)
            return
        place = f"line {error.lineno}, character {error.colno}"
        raise ValueError(f"{path}: not JSON ({error.msg} at {place})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    records = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(records, list) or (isinstance(content, dict) and records == [content] and _is_table(content)):
        raise ValueError(
            f'{path}: got one JSON value, expected a list of records, an object whose "data" is one, or lines'
        )
    for i, record in enumerate(records, start=1):
        yield Row(f"{path}, record {i}", i, label, record)


def _is_table(content: dict[str, Any]) -> bool:
    """Return whether an object maps column names to columns, as `DataFrame.to_json` writes it."""
    firsts = [v.get("0") if isinstance(v, dict) else v[:1] if isinstance(v, list) else None for v in content.values()]
    return bool(firsts) and all(
        first and not (isinstance(first, list) and isinstance(first[0], dict)) for first in firsts
    )


def _csv_rows(path: Path, label: str, open_: Callable[[], IO[bytes]]) -> Iterator[Row]:
    """Yield CSV or TSV rows with every cell as text; no types are guessed."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default limit is too small for a long answer
    with open_() as file:
        encoding = _encoding(file.read(4))
    with open_() as file:
        text = _decoded(path, file, encoding, newline="")
        first = next(text, "")
        apart = max("\t,;|" if kind(path) == ".tsv" else ",;\t|", key=first.count)
        reader = csv.reader(chain([first], text), delimiter=apart, strict=True)
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            place = (f"{path}, line {line}", line, label)
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{place[0]}: not CSV ({error})") from error
            if cells is None:
                return
            if names is None:
                names = _header(path, cells)
            elif cells and len(cells) != len(names):
                yield Row(*place, None, f"got {len(cells)} cells, expected {len(names)}, as the first line has")
            elif cells:
                yield Row(*place, {name: cell or None for name, cell in zip(names, cells, strict=True)})


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell or f"column {i}" for i, cell in enumerate(cells, start=1)]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: the first line names a column twice ({', '.join(names)}), expected each once")
    return names


def _parquet_rows(path: Path, label: str, open_: Callable[[], IO[bytes]]) -> Iterator[Row]:
    try:
        with open_() as file:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH)
            records = chain.from_iterable(batch.to_pylist() for batch in batches)
            for i, record in enumerate(records, start=1):
                yield Row(f"{path}, record {i}", i, label, record)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not Parquet ({error})") from error


def _arrow_rows(path: Path, label: str, open_: Callable[[], IO[bytes]]) -> Iterator[Row]:
    try:
        records = Dataset.from_file(str(path))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not an Arrow stream as Dataset.save_to_disk writes it ({error})") from error
    for i, record in enumerate(records, start=1):
        yield Row(f"{path}, record {i}", i, label, record)


READERS: dict[str, Callable[[Path, str, Callable[[], IO[bytes]]], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_rows,
    ".ndjson": _json_lines,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
"""Readers by lower-case suffix, without a compression suffix."""
