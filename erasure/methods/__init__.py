"""Methods of erasing: one file each, found by its name. `configured` gives a method its settings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from erasure import config
from erasure.errors import ErasureError, unknown

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.method import Method

GROUP = "erasure.methods"  # entry points of other packages


def names(kind: type[Method] | None = None) -> list[str]:
    """Return the names of all methods: the files of this folder, and the entry points of other packages.

    Args:
        kind: a class of `erasure.method`, such as GradientMethod: only methods of this kind. None: all.
    """
    own = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    listed = sorted({*own, *(point.name for point in entry_points(group=GROUP))})
    return listed if kind is None else [name for name in listed if issubclass(find(name), kind)]


def find(name: str) -> type[Method]:
    """Return the dataclass of a method.

    Raises:
        ErasureError: no such method (the message lists them), or another package's entry point that is not one.
    """
    if name not in names():
        raise unknown("method", name, names())
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _checked(name, point.load())
    values = vars(importlib.import_module(f"{__name__}.{name}")).values()
    classes: list[type[Any]] = [
        value for value in values if isinstance(value, type) and dataclasses.is_dataclass(value)
    ]
    return next(cls for cls in classes if getattr(cls, "method", None) == name)


def _checked(name: str, cls: Any) -> type[Method]:
    """Return the class behind another package's entry point.

    Raises:
        ErasureError: it is not a dataclass of settings derived from `Method`, is incomplete, or has another name.
    """
    from erasure.method import Method

    label = f"the entry point {name!r} of the group {GROUP}"
    if not isinstance(cls, type) or not issubclass(cls, Method) or not dataclasses.is_dataclass(cls):
        raise ErasureError(
            f"{label} is not a method: it must be a frozen dataclass derived from GradientMethod, ClosedFormMethod or "
            "RuntimeMethod of erasure.method"
        )
    if inspect.isabstract(cls):
        raise ErasureError(f"{label}: {cls.__name__} lacks {', '.join(sorted(cls.__abstractmethods__))}")
    if getattr(cls, "method", None) != name:
        raise ErasureError(f"{label}: {cls.__name__}.method must be {name!r}")
    return cls


def configure(name: str, kind: str, *layers: Mapping[str, Any], count: int = 1) -> Any:
    """Return a method with its settings: defaults, the preset of the kind of concept, then `layers`.

    Args:
        name: of the method.
        kind: of the concepts; "mixed" where they are of several kinds.
        layers: settings that override the preset; later layers override earlier ones.
        count: how many things are erased together. Settings in PER_CONCEPT are multiplied by it, unless `layers` set
            them.

    Raises:
        ErasureError: an unknown method or setting, or a value that is not allowed.
    """
    cls = find(name)
    values = {key: value for layer in layers for key, value in layer.items()}
    if values.get("parity"):
        return config.build(cls, cls.PARITY, cls.PARITY_KINDS.get(kind, {}), *layers)
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    defaults |= config.preset(name, kind)
    grown = {key: defaults[key] * count for key in cls.PER_CONCEPT} if count > 1 else {}
    return config.build(cls, config.preset(name, kind), grown, *layers)


def configured(method: str, concepts: Sequence[Concept], *layers: Mapping[str, Any]) -> Any:
    """Return a method with its settings for these concepts; see `configure`."""
    kinds = {concept.kind for concept in concepts}
    # A content concept is as many things as it has names: a weapon is a bomb, a dagger, ...
    count = sum(len(concept.names) if concept.kind == "content" else 1 for concept in concepts)
    return configure(method, kinds.pop() if len(kinds) == 1 else "mixed", *layers, count=count)
