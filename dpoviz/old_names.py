"""The module names of dpoviz 0.1, before it had sub-packages; importing them works until 0.3, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NEW_HOMES = {
    "logprobs": ("lm.scoring", "lm.sampling", "lm.packing"),
    "models": ("lm.models",),
    "entropy": ("lm.entropy",),
    "reference": ("lm.reference",),
    "train": ("training.loop", "training.config"),
    "table": ("analysis.tables",),
    "plots": ("analysis.plots",),
    "tasks": ("data.tasks",),
    "presets": ("data.presets",),
    "checks": ("learn.checks",),
    "explore": ("learn.sliders",),
}
"""Each module of 0.1, and the modules that now hold its contents."""


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = name.removeprefix("dpoviz.")
        return ModuleSpec(name, self) if name.startswith("dpoviz.") and old in NEW_HOMES else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [f"dpoviz.{home}" for home in NEW_HOMES[module.__name__.removeprefix("dpoviz.")]]
        warnings.warn(
            f"{module.__name__} is a name of dpoviz 0.1; import from dpoviz, or from {' or '.join(homes)}",
            DeprecationWarning,
            stacklevel=2,
        )
        for home in reversed(homes):
            module.__dict__.update({k: v for k, v in vars(import_module(home)).items() if not k.startswith("_")})
        if module.__name__ == "dpoviz.train":
            module.__dict__["train"] = _train


def _train(*args: object, **kwargs: object) -> object:
    """Train, and return only the history, as in 0.1."""
    return import_module("dpoviz.training.loop").train(*args, **kwargs).history


def install() -> None:
    """Register the old names with Python's import system, after all other finders."""
    sys.meta_path.append(_Finder())
