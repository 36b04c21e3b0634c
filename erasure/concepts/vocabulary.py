"""The vocabulary of a checkpoint: the objects and styles that it was taught, with their families and synonyms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from erasure.config import read_yaml


@dataclass(frozen=True)
class Vocabulary:
    """The words that one checkpoint was taught.

    Args:
        families: maps each family to the `words` that name it and the `kind` of its members (object, identity,
            content).
        entries: maps each object to its `family` and its `synonyms`.
        looks: maps each style to the `words` that name it.
    """

    families: Mapping[str, Mapping[str, Any]]
    entries: Mapping[str, Mapping[str, Any]]
    looks: Mapping[str, Mapping[str, Any]]

    @classmethod
    @cache
    def read(cls, path: Path) -> Vocabulary:
        """Read a vocabulary from a YAML file with the keys `families`, `objects` and `styles`.

        Raises:
            ErasureError: the file cannot be read.
        """
        words = read_yaml(path)
        return cls(words["families"], words["objects"], words["styles"])

    @property
    def objects(self) -> list[str]:
        """List the names of the objects, in the order of the file."""
        return list(self.entries)

    @property
    def styles(self) -> list[str]:
        """List the names of the styles, in the order of the file."""
        return list(self.looks)

    def family(self, name: str) -> str:
        """Return the name of the family that an object belongs to."""
        return str(self.entries[name]["family"])

    def family_named(self, word: str) -> str | None:
        """Return the family that a word such as "weapon" or "dangerous weapon" names, or None."""
        return next((family for family, entry in self.families.items() if word in (family, *entry["words"])), None)

    def members(self, family: str) -> list[str]:
        """List the objects that belong to a family."""
        return [name for name in self.entries if self.family(name) == family]

    def kind(self, name: str) -> str:
        """Return the kind of a name: "style", or the kind of its family; "object" for an unknown name."""
        if any(name in (style, *entry["words"]) for style, entry in self.looks.items()):
            return "style"
        for label, entry in self.entries.items():
            if name in (label, *entry["synonyms"]):
                return str(self.families[entry["family"]]["kind"])
        kinds = (str(entry["kind"]) for entry in self.families.values() if name in entry["words"])
        return next(kinds, "object")

    def content(self, name: str) -> tuple[str, ...]:
        """Return the members of a content concept, such as dagger and bomb for "weapon"; empty for other names."""
        families = {
            family for family, entry in self.families.items() if entry["kind"] == "content" and name in entry["words"]
        }
        return tuple(label for label in self.entries if self.family(label) in families)

    def synonyms(self, name: str) -> list[str]:
        """List the other words for an object or a style."""
        names = [*self.entries.get(name, {}).get("synonyms", ()), *self.looks.get(name, {}).get("words", ())]
        return [word for word in names if word != name]

    def by_kind(self) -> dict[str, tuple[str, ...]]:
        """Return the names of each kind, by kind: object, identity, content, style."""
        kinds: dict[str, list[str]] = {"object": [], "identity": [], "content": [], "style": self.styles}
        for label in self.entries:
            kinds[self.families[self.family(label)]["kind"]].append(label)
        return {kind: tuple(labels) for kind, labels in kinds.items()}

    @cached_property
    def meanings(self) -> dict[str, tuple[str, list[str]]]:
        """Map each word to the classifier head that judges it, "object" or "style", and the labels that it means."""
        known: dict[str, tuple[str, list[str]]] = {}
        for family, entry in self.families.items():
            known |= dict.fromkeys([family, *entry["words"]], ("object", self.members(family)))
        for label, entry in self.entries.items():
            known |= dict.fromkeys([label, *entry["synonyms"]], ("object", [label]))
        for label, entry in self.looks.items():
            known |= dict.fromkeys([label, *entry["words"]], ("style", [label]))
        return known

    def unknown(self, names: Iterable[str]) -> list[str]:
        """List the names that contain no word of the vocabulary, so that the checkpoint was never taught them."""
        return [name for name in names if not any(f" {word} " in f" {name.lower().strip()} " for word in self.meanings)]
