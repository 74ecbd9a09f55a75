"""Keep results on disk: entries are written atomically, with checksums, and verified when read."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from dpoviz.lm.processes import mixed_precision, processes

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

CHECKSUMS = "checksums.json"
"""File in an entry that holds the SHA-256 of each of its other files, by path."""


def require_writable(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be written, before anything is computed for it; create it if missing.

    Args:
        folder: folder for results.
        name: name of the argument that gave the folder, for the message.

    Raises:
        OSError: the folder, or a file in it, cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(
            f"{name}: got {folder}, which cannot be written ({error.strerror}); give another folder"
        ) from error


@contextmanager
def lock_folder(folder: Path, name: str = "out") -> Iterator[None]:
    """Lock a folder for one run; in a distributed run the main process holds the lock.

    The system releases the lock when the process ends for any reason, so no stale lock remains.

    Args:
        folder: the folder; created if missing.
        name: name of the argument that gave the folder, for the message.

    Raises:
        OSError: another run, named by process and machine, holds the lock; or the folder cannot be written.
    """
    if not processes().is_main_process:
        yield
        return
    require_writable(folder, name)
    owner = folder / ".lock-owner"
    try:
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise OSError(f"{name}: {folder} is in use by {who}; wait for its end, or give another folder") from None
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def read_json(path: Path, remedy: str = "delete it") -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        remedy: advice for a damaged file, for the message.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a job as JSON with a checksum, to a temporary file that is renamed; see `read_result`."""
    text = json.dumps(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        scratch.write_text(json.dumps({"sha256": _digest(text), "result": text}))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_result(path: Path) -> dict[str, Any]:
    """Return what `write_result` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    remedy = "delete it and give the command again"
    found = read_json(path, remedy)
    text = found.get("result") if isinstance(found, dict) else None
    if not isinstance(text, str) or found.get("sha256") != _digest(text):
        raise ValueError(f"{path}: damaged, its checksum is another one; {remedy}")
    return json.loads(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_entry(folder: Path, write: Callable[[Path], None]) -> None:
    """Write an entry to a temporary folder, add checksums, and rename it to its final place.

    If another process finishes the same entry first, that one is kept.

    Args:
        folder: final place; its parent is created if missing.
        write: writes the files into the folder it is given.

    Raises:
        OSError: no space or no permission; nothing has changed at the final place.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            write(new)
            seal(new)
            move(new, folder)


def open_entry(folder: Path, read: Callable[[Path], Read]) -> Read | None:
    """Verify an entry and return `read(folder)`; None if there is no entry.

    A damaged entry is removed, with a warning that names the file, and treated as missing.
    """
    if not folder.is_dir():
        return None
    try:
        verify(folder)
        return read(folder)
    except Exception as error:  # a file of another version may raise anything; recomputing is safe
        logger.warning("%s cannot be used (%s); it is computed again", folder, error)
    require_writable(folder.parent, "cache")
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        with suppress(FileNotFoundError):  # another process has removed it first
            folder.rename(Path(scratch) / "damaged")
    return None


def seal(folder: Path) -> None:
    """Add the checksums of all files to a folder, and flush it to disk."""
    sums = {file.relative_to(folder).as_posix(): _checksum(file) for file in _files(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for path in [*_files(folder), *(place for place in folder.rglob("*") if place.is_dir()), folder]:
        _sync(path)


def verify(folder: Path) -> None:
    """Check the files of a folder against its checksums.

    Raises:
        ValueError: a file is missing or has changed.
    """
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{CHECKSUMS} is missing")
    sums = read_json(folder / CHECKSUMS)
    if not isinstance(sums, dict) or not sums:
        raise ValueError(f"{CHECKSUMS} is damaged")
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _checksum(folder / name) != expected:
            raise ValueError(f"{name} is damaged")


def move(new: Path, folder: Path) -> None:
    """Rename a finished folder to its final place, unless a finished one is already there."""
    try:
        new.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync(folder.parent)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the various errors that libraries raise on a full disk into one, with the folder and the free space.

    Raises:
        OSError: writing failed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise error types of their own
        place = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(place).free
        raise OSError(
            f"{folder} cannot be written, with {free:,} bytes free there ({error}); make room and start again"
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """The finished batches of a long computation on disk, so that a killed run can resume.

    Each batch is written to a temporary file and renamed. `.npz` is a zip archive with checksums, so a damaged file is
    detected. A folder belongs to one computation, whose `fingerprint` names it.

    Args:
        folder: created with the first batch; None stores nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def add(self, name: str, batch: dict[str, np.ndarray]) -> None:
        """Store a batch under a name."""
        if self.folder is None:
            return
        with writing(self.folder):
            try:
                _write_batch(self.folder / f"{name}.npz", batch)
            except FileNotFoundError:  # another process has finished everything and removed the folder
                _write_batch(self.folder / f"{name}.npz", batch)

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return the batch stored under a name; None if missing, or, with a warning, if damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.npz"
        try:
            # np.load would leave a file open that it opened itself and cannot read
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged archive may raise anything; recomputing is safe
            logger.warning("%s cannot be read (%s); this batch is computed again", path, error)
            return None

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """Return all batches by name, sorted by name; damaged ones are left out, with a warning."""
        names = sorted(path.stem for path in self.folder.glob("*.npz")) if self.folder is not None else []
        found = {name: self.get(name) for name in names}
        return {name: batch for name, batch in found.items() if batch is not None}


def _write_batch(path: Path, batch: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **batch)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def code_digest(module: str) -> str:
    """Hash the code of a dpoviz module and of all dpoviz modules that it imports, directly or indirectly.

    Docstrings, comments and layout do not count.

    Args:
        module: full name, as in ``__name__``.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, source in sorted(sources(module).items()):
        digest.update(f"{name}\n{_code(source)}".encode())
    return digest.hexdigest()


@cache
def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def sources(module: str) -> Mapping[str, str]:
    """Return the sources, by name, of a dpoviz module and of all dpoviz modules it imports, directly or indirectly.

    The list is read from the import statements, so it cannot become outdated. It is cached because a process imports
    the code only once.
    """
    found: dict[str, str] = {}
    open_ = [module]
    while open_:
        name = open_.pop()
        path = _source(name)
        if name not in found and path is not None:
            found[name] = path.read_text(encoding="utf-8")
            open_ += _imported(found[name])
    return found


def _source(name: str) -> Path | None:
    """Return the file of a dpoviz module; None if the name is not a module."""
    place = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def _imported(source: str) -> list[str]:
    """Return the dpoviz names that a source imports: modules, and names from modules."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith("dpoviz.")]


def fingerprint(model: nn.Module, facts: object, code: str) -> str:
    """Return a hash that identifies a result computed with a model: model, settings, data and code.

    Args:
        model: a `transformers` model, possibly with adapters. Its weights, configuration, device type and active
            adapters enter the hash.
        facts: settings and data, serialisable as JSON.
        code: name of the module that computes the result; its imports count too (`code_digest`).
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    of_model: Any = model.config
    # the configuration holds the path a model was loaded from, which does not affect its results
    config = {k: v for k, v in of_model.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    # switching off an adapter changes the results, but no weights
    layers: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool)
    ]
    adapters = [(layer.disable_adapters, layer.active_adapters) for layer in layers]
    for part in (config, adapters, model.device.type, mixed_precision(), facts, code_digest(code)):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()
