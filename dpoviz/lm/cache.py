"""What a long computation has done so far, kept batch by batch: a run that was killed goes on where it stopped."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

logger = logging.getLogger(__name__)


class Journal:
    """A folder with a file of arrays for each batch.

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
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **batch)
            os.replace(scratch, self.folder / f"{name}.npz")
        except BaseException:
            os.unlink(scratch)
            raise

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """The batches by name, in the order of names. A damaged one is left out, with a warning."""
        found = {}
        for path in sorted(self.folder.glob("*.npz")) if self.folder is not None else ():
            try:
                # np.load does not close what it opened itself and cannot read
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    found[path.stem] = dict(arrays)
            except Exception as error:  # whatever a damaged archive may raise: computing again mends it
                logger.warning("%s cannot be read (%s); this batch is computed again", path, error)
        return found


def code_digest(module: str) -> str:
    """Hash the source of a module of dpoviz, and of every module of dpoviz that it imports, directly or not.

    Args:
        module: its full name, as in ``__name__``.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, source in sorted(sources(module).items()):
        digest.update(f"{name}\n{source}".encode())
    return digest.hexdigest()


def sources(module: str) -> dict[str, str]:
    """Return the source of a module of dpoviz and of those that it imports, directly or not, by name.

    Read from the import statements, so that the list cannot fall behind the code.
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
    # the path that a model was loaded from is part of its configuration, and is not part of what it is
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    # an adapter that is switched off changes what a model gives, and none of its weights
    layers = [module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool)]
    adapters = [(layer.disable_adapters, layer.active_adapters) for layer in layers]
    for part in (config, adapters, model.device.type, facts, code_digest(code)):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()
