"""Read settings from a file and from the command line. Importing this module does not load torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def read_settings(path: Path, default: Settings, command: str) -> Settings:
    """Return `default`, updated by the settings in a YAML or JSON file, such as the config.json of a run.

    A setting of a nested group may be given inside its group or, if its name is unique, at the top level.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: invalid YAML, an unknown setting, the file of another command, or a refused value.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not YAML or JSON ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ValueError(f"config: {path} holds a {type(found).__name__}, expected settings by name")
    of = found.pop("command", command)
    if of != command:
        raise ValueError(f"config: {path} holds settings of dpoviz {of}, expected those of dpoviz {command}")
    try:
        return with_settings(default, found)
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from error


def with_settings(default: Settings, given: Mapping[str, object]) -> Settings:
    """Return a dataclass updated by nested values; a unique name of a nested group may be given at the top level.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    own = {f.name: getattr(default, f.name) for f in fields(default)}
    groups = {name: value for name, value in own.items() if is_dataclass(value)}
    inside = {f.name: group for group, value in groups.items() for f in fields(value)}
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, object]] = {}
    for name, value in given.items():
        if name in groups:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}: got {value!r}, expected settings by name")
            nested.setdefault(name, {}).update(value)
        elif name in own:
            changes[name] = _like(name, value, own[name])
        elif name in inside:
            nested.setdefault(inside[name], {})[name] = value
        else:
            near = difflib.get_close_matches(str(name), [*own, *inside], n=1)
            raise ValueError(f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    changes |= {group: with_settings(groups[group], values) for group, values in nested.items()}
    return replace(default, **changes)


def _like(name: str, value: object, default: object) -> object:
    """Return a value from a file, converted to the type of the default: lists to tuples, integers to floats."""
    if isinstance(default, tuple):
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ValueError(f"{name}: got {value!r}, expected a list")
        return tuple(values)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = (bool, int, float, str)
    if isinstance(default, plain) and type(value) is not type(default):
        raise ValueError(f"{name}: got {value!r}, expected a {type(default).__name__}")
    return value


def parse(
    cls: type[Settings], arguments: Sequence[str], *, prog: str, description: str, default: Settings | None = None
) -> Settings:
    """Parse the command line into a dataclass; its docstrings are the help. Exit on --help and usage errors."""
    import tyro

    more = {} if default is None else {"default": default}
    text = " ".join(description.split())
    return tyro.cli(cls, args=_split_pairs(arguments), prog=prog, description=text, **more)


def _split_pairs(arguments: Sequence[str]) -> list[str]:
    """Split each ``theirs=ours`` after ``--columns`` into two words, as tyro parses mappings."""
    found, inside = [], False
    for argument in arguments:
        if argument.startswith("--"):
            inside = argument == "--columns"
            found.append(argument)
        elif inside:
            if argument.count("=") != 1:
                raise ValueError(f"columns: got {argument!r}, expected a pair such as question=prompt")
            found += argument.split("=")
        else:
            found.append(argument)
    return found
