"""Configuration: dataclass defaults, then YAML presets, then a file, then key=value overrides."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from erasure.errors import ErasureError, unknown

CONFIGS = Path(__file__).resolve().parent / "configs"
T = TypeVar("T")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ErasureError: the file cannot be read, is not YAML, or is no mapping.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise ErasureError(f"{path}: cannot be read as YAML: {fault}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ErasureError(f"{path}: expected `key: value` lines, found a {type(found).__name__}")
    return found


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-4", "variant=u"]` to a mapping; values are read as YAML."""
    found = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key.strip():
            raise ErasureError(f"{item!r} is not key=value")
        found[key.strip()] = yaml.safe_load(value)
    return found


def preset(method: str, kind: str) -> dict[str, Any]:
    """What `configs/methods/<method>.yaml` sets for all kinds of concept (`all`) and for this one."""
    path = CONFIGS / "methods" / f"{method}.yaml"
    if not path.is_file():
        return {}
    found = read_yaml(path)
    return {**(found.get("all") or {}), **(found.get(kind) or {})}


def build(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """An instance of a dataclass from layers of values, the later ones winning.

    Raises:
        ErasureError: naming every unknown key and every value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    merged: dict[str, Any] = {}
    faults = []
    for layer in layers:
        for key, value in layer.items():
            if key not in names:
                faults.append(str(unknown("config key", key, names)))
                continue
            try:
                merged[key] = coerce(value, hints[key])
            except (TypeError, ValueError):
                faults.append(f"{key}={value!r}: expected {readable(hints[key])}")
    if faults:
        raise ErasureError("; ".join(faults))
    return cls(**merged)


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type of a field; "1e-4" (a string to YAML) is a float, 3 is 3.0, "x" is no int."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            return int(value)
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if option is str and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            kind = typing.get_args(option)[0]
            return tuple(kind(item) for item in value)
        if dict in (option, typing.get_origin(option)) and isinstance(value, dict):
            return {str(key): one for key, one in value.items()}
    raise TypeError(value)


def readable(hint: Any) -> str:
    """A type as users know it."""
    return getattr(hint, "__name__", str(hint)).replace("NoneType", "none")
