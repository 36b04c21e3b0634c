"""Settings: their declaration, and their values from defaults, a file and key=value overrides."""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from erasure.errors import ErasureError, unknown

CONFIGS = Path(__file__).resolve().parent / "configs"
CACHE_VARIABLE = "ERASURE_CACHE"  # the environment variable that names the folder of the cache
T = TypeVar("T")


def default_cache() -> Path:
    """Return the folder of the cache: that of ERASURE_CACHE, else `erasure` in the user's cache folder."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "erasure"


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a field of a dataclass of settings with its default and the range that its values must lie in.

    `check_settings` checks the values, and `erasure list` shows the range. A field whose type allows None may always
    be None.

    Args:
        default: the value where none is given.
        at_least: smallest allowed value.
        above: values must be greater than this one.
        at_most: largest allowed value.
        below: values must be smaller than this one.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={key: end for key, end in limits.items() if end is not None})


def fields_of(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass, its own before those that it inherits."""
    own = inspect.get_annotations(cls)
    return sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)


def allowed(limits: Mapping[str, float]) -> str:
    """Return in words which values the limits of a field allow; empty where there are none.

    >>> allowed({"at_least": 1}), allowed({"above": 0, "below": 1})
    ('at least 1', 'above 0 and below 1')
    """
    if "at_least" in limits and "at_most" in limits:
        return f"between {limits['at_least']:g} and {limits['at_most']:g}"
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    return " and ".join(f"{text} {limits[key]:g}" for key, text in words.items() if key in limits)


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass against its declared range (`setting`) and choices (`Literal`).

    Raises:
        ErasureError: every field that breaks its declaration, with its value and what is allowed.
    """
    hints = typing.get_type_hints(type(settings))
    faults = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        if choices := literal_choices(hints[field.name]):
            if value not in choices:
                faults.append(str(unknown(field.name, value, choices)))
        elif isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{field.name}={value}: must be a finite number")
        elif not _inside(value, field.metadata):
            faults.append(f"{field.name}={value}: must be {allowed(field.metadata)}")
    if faults:
        raise ErasureError("; ".join(faults))


def literal_choices(hint: Any) -> tuple[Any, ...]:
    """Return the choices of a `Literal` type, alone or in a union; empty for any other type."""
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            return typing.get_args(option)
    return ()


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union (`Literal[...] | None` makes a `typing.Union`, other types do not), or the type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _inside(value: Any, limits: Mapping[str, float]) -> bool:
    tests = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
    return all(test(value, limits[key]) for key, test in tests.items() if key in limits)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ErasureError: the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise ErasureError(f"{path}: cannot be read as YAML: {fault}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ErasureError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    return values


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Parse settings of the command line, such as `["lr=1e-4", "variant=u"]`; their values are read as YAML.

    Raises:
        ErasureError: an item without an equals sign or without a key, or whose value is not YAML.
    """
    values = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key.strip():
            raise ErasureError(f"{item!r} is not key=value")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as fault:
            raise ErasureError(f"{item!r}: the value cannot be read as YAML: {fault}") from None
    return values


def build(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """Build a dataclass from layers of values; later layers override earlier ones.

    Raises:
        ErasureError: naming every unknown key and every value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in fields_of(cls) if field.init]
    merged: dict[str, Any] = {}
    faults = []
    for layer in layers:
        for key, value in layer.items():
            if key not in names:
                faults.append(str(unknown("config key", key, names)))
                continue
            try:
                merged[key] = coerce(value, hints[key])
            except (TypeError, ValueError, OverflowError):
                faults.append(f"{key}={value!r}: expected {readable(hints[key])}")
    if faults:
        raise ErasureError("; ".join(faults))
    return cls(**merged)


def coerce(value: Any, hint: Any) -> Any:
    """Convert a value to the type of a field: the string "1e-4" (YAML reads it as one) to a float, 3 to 3.0.

    The choices of a `Literal` are left to `check_settings`, whose message lists them.

    Raises:
        TypeError, ValueError, OverflowError: the value cannot be converted.
    """
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
            return {str(key): entry for key, entry in value.items()}
    raise TypeError(value)


def readable(hint: Any) -> str:
    """Return the name of a type as users know it; of a `Literal`, its choices."""
    if choices := literal_choices(hint):
        return " or ".join(map(str, choices))
    return getattr(hint, "__name__", str(hint)).replace("NoneType", "none")


def shown(value: Any) -> str:
    """Return a value as YAML and users write it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
