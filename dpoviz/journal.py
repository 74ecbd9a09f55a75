"""What a long computation has done so far, kept batch by batch: a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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


def fingerprint(model: nn.Module, facts: object, code: Sequence[ModuleType]) -> str:
    """A name for what a model gives under some settings; another one as soon as any of it changes.

    Args:
        model: a model of `transformers`, perhaps with adapters: its weights, its configuration, its device's
            kind, and which adapters act.
        facts: settings and data that JSON can write.
        code: the modules that compute it.
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
    for part in (config, adapters, model.device.type, facts):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for module in code:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()
