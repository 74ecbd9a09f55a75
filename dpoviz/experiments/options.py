"""Read settings from a file and from the command line. Importing this module does not load torch."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


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
    groups: dict[str, Any] = {name: value for name, value in own.items() if is_dataclass(value)}
    inside = {f.name: group for group, value in groups.items() for f in fields(value)}
    types_ = get_type_hints(type(default))
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, object]] = {}
    for name, value in given.items():
        if name in groups:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}: got {value!r}, expected settings by name")
            nested.setdefault(name, {}).update(value)
        elif name in own:
            changes[name] = _like(name, value, types_[name])
        elif name in inside:
            nested.setdefault(inside[name], {})[name] = value
        else:
            near = difflib.get_close_matches(str(name), [*own, *inside], n=1)
            raise ValueError(f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    changes |= {group: with_settings(groups[group], values) for group, values in nested.items()}
    return replace(default, **changes)


def _like(name: str, value: object, expected: Any) -> object:
    """Return a value from a file in a type; a file has lists for tuples, and YAML reads 1e-4 as text."""
    options = get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)
    if value is None and types.NoneType in options:
        return None
    (kind,) = (option for option in options if option is not types.NoneType)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list | tuple | str):
        return tuple(_like(name, one, inner[0]) for one in ([value] if isinstance(value, str) else value))
    if origin is Mapping and isinstance(value, Mapping):
        return {_like(name, key, inner[0]): _like(name, one, inner[1]) for key, one in value.items()}
    if origin is Literal and value in inner:
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(kind, type) and origin is None and type(value) is kind:
        return value
    shown = {tuple: "a list", Mapping: "pairs of names", Literal: f"one of {', '.join(map(str, inner))}"}
    raise ValueError(f"{name}: got {value!r}, expected {shown.get(origin, f'a value of type {kind.__name__}')}")


def parse(
    cls: type[Settings], arguments: Sequence[str], *, prog: str, description: str, default: Settings | None = None
) -> Settings:
    """Parse the command line into a dataclass; its docstrings are the help. Exit on --help and usage errors."""
    import tyro

    more: dict[str, Any] = {} if default is None else {"default": default}
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
