"""Settings of dataclasses and functions as rows of a table: name, default, type, allowed values, meaning."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "none"}


@dataclass(frozen=True)
class Row:
    """A setting of a method or attack, as a row of a list.

    Args:
        name: the name of the field or parameter.
        default: the default as a plain value; None if there is no default.
        type: the type, as it is written in the code.
        allowed: the kind of value and its range, in words.
        about: the meaning, from the docstring.
        required: whether the setting has no default.
    """

    name: str
    default: Any
    type: str
    allowed: str
    about: str
    required: bool = False

    @property
    def shown(self) -> str:
        """Return the default as text, as it is shown in a table."""
        return "required" if self.required else shown(self.default)

    def cells(self) -> tuple[str, str, str, str]:
        """Return name, default, allowed values and meaning."""
        return self.name, self.shown, self.allowed, self.about


def shown(value: Any) -> str:
    """Return a value as YAML and users write it."""
    from erasure.config import shown as written  # which imports yaml, and help must not wait for it

    return written(value)


def rows(cls: type[Any]) -> list[Row]:
    """Return the settings of a dataclass."""
    from erasure.config import fields_of

    hints, about = typing.get_type_hints(cls), described(cls)
    return [
        Row(
            field.name,
            _plain(_default(field)),
            str(field.type),
            allowed(hints[field.name], field.metadata),
            about.get(field.name, ""),
        )
        for field in fields_of(cls)
        if field.init
    ]


def parameters(make: Callable[..., Any]) -> list[Row]:
    """Return the parameters of a class or function, as `judge` texts set them."""
    about = described(make)
    if inspect.isclass(make):
        about |= described(make.__init__)
    try:
        signature = inspect.signature(make, eval_str=True)
    except NameError:  # of a plug-in whose types are for type checkers only
        signature = inspect.signature(make)
    return [
        Row(
            parameter.name,
            None if parameter.default is parameter.empty else _plain(parameter.default),
            "" if parameter.annotation is parameter.empty else str(parameter.annotation),
            "" if parameter.annotation is parameter.empty else allowed(parameter.annotation, {}),
            about.get(parameter.name, ""),
            parameter.default is parameter.empty,
        )
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def allowed(hint: Any, limits: Mapping[str, Any]) -> str:
    """Return in words what values a field takes: its type, and the range that it declares with `config.setting`."""
    from erasure import config

    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    text = " or ".join(map(_kind, typing.get_args(hint) if union else (hint,)))
    return ", ".join(filter(None, [text, config.allowed(limits)]))


def _kind(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    origin = typing.get_origin(kind) or kind
    if origin in (tuple, list, collections.abc.Sequence):
        return "list"
    if origin in (dict, collections.abc.Mapping):
        return "mapping"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def described(thing: Any) -> dict[str, str]:
    """Read the `Args:` of a docstring, and of the classes that a class derives from: name -> what it means."""
    entries: dict[str, str] = {}
    for owner in reversed(inspect.getmro(thing)) if inspect.isclass(thing) else [thing]:
        section = re.search(r"^Args:\n((?:[ ]+.*(?:\n|$)|\n)*)", inspect.cleandoc(owner.__doc__ or ""), re.MULTILINE)
        name = ""
        for line in section[1].splitlines() if section else ():
            entry = re.fullmatch(r"    (\w[\w, ]*): (.*)", line)
            if entry:
                name = entry[1]
                entries[name] = entry[2].strip()
            elif name and line.strip():
                entries[name] += f" {line.strip()}"
    return entries


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    """Return the value as JSON has it, else its text."""
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, bool | int | float | str | list | dict) else str(value)
