"""What is kept on disk: written whole or not at all, with checksums, and read only where it is what was written."""

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
"""In a kept folder: the SHA-256 of each of its other files, by path."""


def require_writable(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be written, before anything is computed for it. It is made if it is not there.

    Args:
        folder: where results will go.
        name: the argument that named it.

    Raises:
        OSError: it cannot be made, or no file in it, with the reason.
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
    """Hold a folder for one run; of several processes of one run, the main one holds it.

    The system frees the lock of a process that ends in any way, so that none is ever left behind.

    Args:
        folder: the folder; made if it is not there.
        name: the argument that named it.

    Raises:
        OSError: another run holds the folder, with its process and machine; or it cannot be written.
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
    """Return what a JSON file holds.

    Args:
        path: the file.
        remedy: what to do where it is damaged, for the message.

    Raises:
        ValueError: it is no JSON, with the file's name.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None


def write_entry(folder: Path, write: Callable[[Path], None]) -> None:
    """Keep a folder: written beside, sealed with checksums, and moved to its place in one step.

    Where another process has finished the same entry in the meantime, that one stays.

    Args:
        folder: its place; the folder above is made if it is not there.
        write: writes the files into the folder that it is given.

    Raises:
        OSError: no room, or no permission; the place is as it was.
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
    """Return what `read` makes of a kept folder; None where there is none.

    A damaged one is removed, with a warning that names the file, and counts as none.
    """
    if not folder.is_dir():
        return None
    try:
        verify(folder)
        return read(folder)
    except Exception as error:  # whatever a file of another version may raise: computing again mends it
        logger.warning("%s cannot be used (%s); it is computed again", folder, error)
    require_writable(folder.parent, "cache")
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        with suppress(FileNotFoundError):  # another process was faster
            folder.rename(Path(scratch) / "damaged")
    return None


def seal(folder: Path) -> None:
    """Write the checksums of all files of a folder into it, and all of it to the disk."""
    sums = {file.relative_to(folder).as_posix(): _checksum(file) for file in _files(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for path in [*_files(folder), *(place for place in folder.rglob("*") if place.is_dir()), folder]:
        _sync(path)


def verify(folder: Path) -> None:
    """Check the files of a folder against its checksums.

    Raises:
        ValueError: one of them is missing, or is not what was written.
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
    """Rename a finished folder to its place; where that is taken by a finished one, the new one is left."""
    try:
        new.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync(folder.parent)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Give one kind of error, with the folder and the room that is left, for what libraries raise on a full disk.

    Raises:
        OSError: what was written could not be.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise their own
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
    """Have the system write a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """A folder with a file of arrays for each batch of a long computation: one that was killed goes on from there.

    A file is written beside and moved, and its arrays carry checksums (it is a zip archive): what is read is
    what was written. The folder belongs to one computation; `fingerprint` gives it a name.

    Args:
        folder: made when the first batch comes; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def add(self, name: str, batch: dict[str, np.ndarray]) -> None:
        """Keep a batch under a name."""
        if self.folder is None:
            return
        with writing(self.folder):
            try:
                _write_batch(self.folder / f"{name}.npz", batch)
            except FileNotFoundError:  # another process has finished the whole, and removed the folder
                _write_batch(self.folder / f"{name}.npz", batch)

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return the batch of a name; None where there is none, and, with a warning, where it is damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.npz"
        try:
            # np.load does not close what it opened itself and cannot read
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a damaged archive may raise: computing again mends it
            logger.warning("%s cannot be read (%s); this batch is computed again", path, error)
            return None

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the batches by name, in the order of names. A damaged one is left out, with a warning."""
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
    """Hash the source of a module of dpoviz, and of every module of dpoviz that it imports, directly or not.

    Args:
        module: its full name, as in ``__name__``.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, source in sorted(sources(module).items()):
        digest.update(f"{name}\n{source}".encode())
    return digest.hexdigest()


@cache
def sources(module: str) -> Mapping[str, str]:
    """Return the source of a module of dpoviz and of those that it imports, directly or not, by name.

    Read from the import statements, so that the list cannot fall behind the code; once, as the code is imported once.
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
    """The file of a module of dpoviz; None where the name is not one."""
    place = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def _imported(source: str) -> list[str]:
    """The names under dpoviz that a source imports: modules, and what it takes from them."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith("dpoviz.")]


def fingerprint(model: nn.Module, facts: object, code: str) -> str:
    """A name for what a model gives under some settings; another one as soon as any of it changes.

    Args:
        model: a model of `transformers`, perhaps with adapters: its weights, its configuration, its device's
            kind, and which adapters act.
        facts: settings and data that JSON can write.
        code: the module that computes it; those that it imports count as well (`code_digest`).
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    of_model: Any = model.config
    # the path that a model was loaded from is part of its configuration, and is not part of what it is
    config = {k: v for k, v in of_model.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    # an adapter that is switched off changes what a model gives, and none of its weights
    layers: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool)
    ]
    adapters = [(layer.disable_adapters, layer.active_adapters) for layer in layers]
    for part in (config, adapters, model.device.type, mixed_precision(), facts, code_digest(code)):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()
