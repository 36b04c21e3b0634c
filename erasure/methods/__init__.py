"""Methods of erasing: one file each, found by its name. `configure` gives one its settings."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from erasure import config
from erasure.errors import unknown

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept

GROUP = "erasure.methods"  # entry points of other packages


def names() -> list[str]:
    """Every method there is: the files of this folder, and other packages' entry points."""
    own = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return sorted({*own, *(point.name for point in entry_points(group=GROUP))})


def find(name: str) -> type[Any]:
    """The dataclass of a method.

    Raises:
        ErasureError: no such method; the message lists them.
    """
    if name not in names():
        raise unknown("method", name, names())
    for point in entry_points(group=GROUP):
        if point.name == name:
            return point.load()
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and getattr(value, "method", None) == name
    )


def configure(name: str, kind: str, *layers: Mapping[str, Any], count: int = 1) -> Any:
    """A method with its settings: defaults, preset of the concept's kind, then `layers`.

    Of `count` things erased together, each gets what the method gives one (PER_CONCEPT); what `layers` say is for all.
    """
    cls = find(name)
    given = {key: value for layer in layers for key, value in layer.items()}
    if given.get("parity"):
        return config.build(cls, cls.PARITY, *layers)
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    defaults |= config.preset(name, kind)
    grown = {key: defaults[key] * count for key in getattr(cls, "PER_CONCEPT", ())} if count > 1 else {}
    return config.build(cls, config.preset(name, kind), grown, *layers)


def configured(method: str, concepts: Sequence[Concept], *layers: Mapping[str, Any]) -> Any:
    """A method with its settings for these concepts."""
    kinds = {one.kind for one in concepts}
    # A content concept is as many things as it has names: a weapon is a bomb, a dagger, ...
    count = sum(len(one.names) if one.kind == "content" else 1 for one in concepts)
    return configure(method, kinds.pop() if len(kinds) == 1 else "mixed", *layers, count=count)
