"""Methods of erasing: one file each, found by its name. `choose` gives a method its settings, with their sources."""

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
from erasure.model import presets
from erasure.model.presets import Family

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.method import Method
    from erasure.model.architectures import Architecture

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
    # `is_dataclass` would take the dataclass that a method which trains inherits its options from.
    declared = isinstance(cls, type) and "__dataclass_fields__" in vars(cls)
    if not declared or not issubclass(cls, Method):
        raise ErasureError(
            f"{label} is not a method: it must be a frozen dataclass derived from GradientMethod, ClosedFormMethod or "
            "RuntimeMethod of erasure.method"
        )
    if inspect.isabstract(cls):
        raise ErasureError(f"{label}: {cls.__name__} lacks {', '.join(sorted(cls.__abstractmethods__))}")
    if getattr(cls, "method", None) != name:
        raise ErasureError(f"{label}: {cls.__name__}.method must be {name!r}")
    return cls


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A method with its settings, and where each of them came from.

    Args:
        method: the method.
        sources: setting -> its source, in words.
    """

    method: Any
    sources: Mapping[str, str]

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Return the settings by their source, in the order of the method's fields: source -> name -> value."""
        groups: dict[str, dict[str, Any]] = {}
        for name, source in self.sources.items():
            groups.setdefault(source, {})[name] = getattr(self.method, name)
        return groups

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return value and source of each setting as plain data."""
        return {
            name: {"value": list(value) if isinstance(value, tuple) else value, "source": source}
            for name, source in self.sources.items()
            for value in [getattr(self.method, name)]
        }


GENERAL = "esd"  # the method of papers and scripts for every kind of network


def default(concepts: Sequence[Concept], family: Family, architecture: Architecture) -> tuple[str, str]:
    """Return the method to take for concepts where none is named, and why: the last of the preset's that holds.

    Args:
        concepts: what is erased by one patch.
        family: the checkpoint's family, whose preset says which method is best for a kind of concept.
        architecture: of the checkpoint's network; methods that cannot erase from it are passed over.
    """
    kinds = {concept.kind for concept in concepts}
    if family.preset is not None:
        for entry in reversed(family.preset.default):
            if entry.holds(kinds, len(concepts)) and not find(entry.method).unsuited(architecture):
                return entry.method, f"preset {family.preset.name}: {entry.source}"
    return GENERAL, f"{family.text} says no other; it is published for every kind of network"


DECISIVE = ("iterations", "learning_rate")  # without them, a checkpoint of no family is not trained


def choose(
    name: str, kind: str, layers: Mapping[str, Mapping[str, Any]], *, count: int = 1, family: Family | None = None
) -> Chosen:
    """Return a method with its settings: defaults, those of the checkpoint's family, then `layers`.

    Args:
        name: of the method.
        kind: of the concepts; "mixed" where they are of several kinds.
        layers: settings that override the family's, by where they come from; later layers override earlier ones.
        count: how many things are erased together. Settings in PER_CONCEPT are multiplied by it, unless `layers` set
            them.
        family: the checkpoint's family; None: glyph's, on which the defaults were tuned.

    Raises:
        ErasureError: an unknown method or setting, a value that is not allowed, a method that does not suit the family,
            or no family and not enough settings.
    """
    cls = find(name)
    given = {key: source for source, layer in layers.items() for key in layer}
    values = {key: value for layer in layers.values() for key, value in layer.items()}
    fields = [field.name for field in config.fields_of(cls)]
    if "stop" in values and not hasattr(cls, "stop"):
        raise ErasureError(
            f"{name}: stop has no meaning here: there are no updates to end. Leave it out; nothing was changed"
        )
    if values.get("parity"):
        script = {**cls.PARITY, **cls.PARITY_KINDS.get(kind, {})}
        published = dict.fromkeys(script, "parity: the published script")
        return _chosen(cls, [script, *layers.values()], "the method's default", {**published, **given})
    preset = presets.find("glyph") if family is None else family.preset
    if preset is None and family is not None:
        _check_decisive(cls, values, family)
    own = {} if preset is None else preset.settings(name, kind)
    known = {key: value for key, (value, _) in own.items()}
    label = "" if preset is None else f"preset {preset.name}"
    sources = {key: f"{label}: {source}" for key, (_, source) in own.items()}
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    defaults |= known
    grown = {key: defaults[key] * count for key in cls.PER_CONCEPT} if count > 1 else {}
    rest = "the method's default" + (f", {preset.defaults}" if preset is not None and preset.defaults else "")
    if preset is not None and not preset.defaults and name not in preset.groups:
        rest += f", because the {label} has no settings for it"
    sources |= {key: f"{sources.get(key, rest)}; times {count} for as many concepts" for key in grown}
    if preset is not None and name in preset.without:
        rest = f"{rest}; {label}: {preset.without[name]}"
    return _chosen(cls, [known, grown, *layers.values()], rest, {**sources, **given}, fields)


def _chosen(
    cls: type[Method],
    layers: Sequence[Mapping[str, Any]],
    rest: str,
    sources: Mapping[str, str],
    fields: Sequence[str] | None = None,
) -> Chosen:
    built = config.build(cls, *layers)
    names = fields or [field.name for field in config.fields_of(cls)]
    return Chosen(built, {key: sources.get(key, rest) for key in names})


def _check_decisive(cls: type[Method], values: Mapping[str, Any], family: Family) -> None:
    """Refuse to train a checkpoint of no family with settings that were tuned on another one.

    Raises:
        ErasureError: the presets have settings for the method, and the user gives none.
    """
    known = [other for other in presets.names() if cls.method in presets.find(other).groups]
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    missing = [key for key in DECISIVE if key in fields and key not in values]
    if known and missing:
        raise ErasureError(
            f"{cls.method} has no settings for this checkpoint: {family.why}. Take those of a family (--preset, or "
            f"preset=; {', '.join(known)}), or give your own for {' and '.join(missing)} at least (--set, --config). "
            "Nothing was changed"
        )


def configure(name: str, kind: str, *layers: Mapping[str, Any], count: int = 1, family: Family | None = None) -> Any:
    """Return a method with its settings, without their sources; see `choose`."""
    merged = {key: value for layer in layers for key, value in layer.items()}
    return choose(name, kind, {"given": merged}, count=count, family=family).method


def configured(method: str, concepts: Sequence[Concept], *layers: Mapping[str, Any]) -> Any:
    """Return a method with its default settings for these concepts, whatever the checkpoint; see `choose`."""
    return configure(method, kind_of(concepts), *layers, count=count_of(concepts))


def kind_of(concepts: Sequence[Concept]) -> str:
    """Return the kind of the concepts; "mixed" where they are of several kinds."""
    kinds = {concept.kind for concept in concepts}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def count_of(concepts: Sequence[Concept], members: bool = True) -> int:
    """Return how many things the concepts are.

    Args:
        concepts: the concepts.
        members: count a content concept as many times as it has names: a weapon is a bomb, a dagger, ...
    """
    return sum(len(concept.names) if members and concept.kind == "content" else 1 for concept in concepts)


def worded(concepts: Sequence[Concept], method: str, family: Family | None) -> list[Concept]:
    """Return the concepts with the prompts and anchors that a family's preset sets, where they bring none."""
    if family is None or family.preset is None:
        return list(concepts)
    dressed = []
    for concept in concepts:
        prompts, anchor, _ = family.preset.wording(method, concept.kind, concept.name)
        anchor = anchor if concept.anchor is None else concept.anchor
        dressed.append(dataclasses.replace(concept, prompts=concept.prompts or prompts, anchor=anchor))
    return dressed
