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


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a field of a dataclass of settings with its default and the range it must lie in.

    `check_settings` holds the values to it, and lists show it. None is always allowed where the field's type allows it.

    Args:
        default: the value where none is given.
        at_least: smallest value allowed.
        above: values must be greater than this one.
        at_most: largest value allowed.
        below: values must be smaller than this one.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={key: end for key, end in limits.items() if end is not None})


def allowed(limits: Mapping[str, float]) -> str:
    """Say in words which values a field's limits allow; empty where there are none.

    >>> allowed({"at_least": 1}), allowed({"above": 0, "below": 1})
    ('at least 1', 'above 0 and below 1')
    """
    low = next((f"{text} {limits[key]:g}" for key, text in _LOW.items() if key in limits), "")
    high = next((f"{text} {limits[key]:g}" for key, text in _HIGH.items() if key in limits), "")
    if "at_least" in limits and "at_most" in limits:
        return f"between {limits['at_least']:g} and {limits['at_most']:g}"
    if limits.get("at_least") == 0 and not high:
        return "0 or more"
    return " and ".join(filter(None, (low, high)))


_LOW = {"at_least": "at least", "above": "above"}
_HIGH = {"at_most": "at most", "below": "below"}


def check_settings(settings: Any) -> None:
    """Hold every field of a dataclass to its declared range and choices (`setting`, `Literal`).

    Raises:
        ErasureError: naming the field, its value and what is allowed.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        if choices := literal_choices(hints[field.name]):
            if value not in choices:
                raise unknown(field.name, value, choices)
        elif not _inside(value, field.metadata):
            raise ErasureError(f"{field.name}={value}: expected {allowed(field.metadata)}")


def literal_choices(hint: Any) -> tuple[Any, ...]:
    """Return the choices of a `Literal` type, alone or in a union; empty for any other type."""
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            return typing.get_args(option)
    return ()


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; a `Literal` in a union makes it one of typing's, any other one of Python's."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _inside(value: Any, limits: Mapping[str, float]) -> bool:
    return (
        not limits
        or value >= limits.get("at_least", value)
        and value <= limits.get("at_most", value)
        and ("above" not in limits or value > limits["above"])
        and ("below" not in limits or value < limits["below"])
    )


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
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            return int(value)
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and (option is str or typing.get_origin(option) is typing.Literal):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            kind = typing.get_args(option)[0]
            return tuple(kind(item) for item in value)
        if dict in (option, typing.get_origin(option)) and isinstance(value, dict):
            return {str(key): one for key, one in value.items()}
    raise TypeError(value)


def readable(hint: Any) -> str:
    """Return the name of a type as users know it; of a `Literal`, its choices."""
    if choices := literal_choices(hint):
        return " or ".join(map(str, choices))
    return getattr(hint, "__name__", str(hint)).replace("NoneType", "none")
