"""A list of names to erase together, with the words to keep: a YAML file, as `erase --list` reads it.

    erase:
      - Van Gogh
      - {name: Claude Monet, aliases: [Monet], kind: style, anchor: a painting}
    keep:
      - Rembrandt
      - {name: oak, kind: object}
      - {file: keep.txt}
    defaults: [objects, artists]

`erase` has the fields of `Concept`. `keep` has names, and files of names: text, one name a line, or CSV with a column
`name` and perhaps `kind`. `defaults` names shipped lists whose words are kept as well, other than those to be erased;
left out, these are the words that a run without a list keeps.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erasure.concepts.concept import KINDS, Concept
from erasure.concepts.neighbors import everyday_words
from erasure.concepts.vocabulary import Vocabulary
from erasure.concepts.word_lists import WordLists
from erasure.config import read_yaml
from erasure.errors import ErasureError, unknown

FIELDS = ("erase", "keep", "defaults")
MOST_NAMES = 2000  # in one solve: text states have 768 to 2048 directions, and each name needs one of its own
MOST_KEPT = 20_000
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class NameList:
    """Names to erase together, and words to keep.

    Args:
        concepts: what is erased.
        keep: the words that the user wants kept, as pairs (kind, word).
        defaults: the shipped lists that are kept as well; None: what is kept without a list.
        merged: spellings that were read as a name that stands before them in the list.
        assumed: names of which no list knows the kind, so that they are erased as objects.
    """

    concepts: tuple[Concept, ...]
    keep: tuple[tuple[str, str], ...] = ()
    defaults: tuple[str, ...] | None = None
    merged: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], vocabulary: Vocabulary | WordLists | None = None, kind: str | None = None
    ) -> NameList:
        """Read a list from a YAML file.

        Args:
            path: the file; files that it names are relative to its folder.
            vocabulary: what says of which kind a name is, where the list does not; see `Concept.of`.
            kind: the kind of entries that name none, instead.

        Raises:
            ErasureError: a file cannot be read, or anything that `of` refuses.
        """
        try:
            return cls.of(read_yaml(Path(path)), vocabulary, Path(path).parent, kind)
        except ErasureError as fault:
            raise ErasureError(f"{path}: {str(fault).removeprefix(f'{path}: ')}") from None

    @classmethod
    def of(
        cls,
        values: Mapping[str, Any],
        vocabulary: Vocabulary | WordLists | None = None,
        folder: Path | None = None,
        kind: str | None = None,
    ) -> NameList:
        """Make a list from plain data.

        Names that differ in case and spaces alone are one name, if their entries do not contradict each other.

        Args:
            values: the fields of the file.
            vocabulary: as for `read`.
            folder: where the files of `keep` are; None: the working folder.
            kind: as for `read`.

        Raises:
            ErasureError: an unknown field or list, nothing to erase, too many names, an entry that `Concept` refuses,
                a name in two entries that differ, or names that are both erased and kept.
        """
        for key in values:
            if key not in FIELDS:
                raise unknown("field of a list", key, FIELDS)
        entries = _sequence("erase", values.get("erase"))
        if not entries:
            raise ErasureError("there is nothing to erase: name it under `erase`")
        if len(entries) > MOST_NAMES:
            raise ErasureError(
                f"{len(entries):,} names to erase are too many: one solve takes at most {MOST_NAMES:,}, because text "
                "states have no more directions than that. Erase them in several runs. Nothing was changed"
            )
        entries = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
        unsaid = [entry for entry in entries if isinstance(entry, Mapping) and "kind" not in entry]
        assumed: list[str] = []
        if kind is None and isinstance(vocabulary, WordLists):
            assumed = [str(entry.get("name")) for entry in unsaid if vocabulary.find(str(entry.get("name"))) is None]
        if kind is not None:
            entries = [{"kind": kind, **entry} if isinstance(entry, Mapping) else entry for entry in entries]
        concepts, merged = _distinct([Concept.of(entry, vocabulary) for entry in entries])
        keep = tuple(dict.fromkeys(_kept(values.get("keep"), vocabulary, folder or Path())))
        if len(keep) > MOST_KEPT:
            raise ErasureError(f"{len(keep):,} words to keep are too many: at most {MOST_KEPT:,}. Nothing was changed")
        _check_apart(concepts, keep)
        chosen = values.get("defaults")
        defaults = None if chosen is None else tuple(map(str, _sequence("defaults", chosen)))
        for name in defaults or ():
            if name not in shipped():
                raise unknown("shipped list", name, shipped())
        return cls(concepts, keep, defaults, merged, tuple(assumed))

    def words(self, vocabulary: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """Return all words to keep by kind: the user's, then those of the shipped lists.

        Args:
            vocabulary: the words that are kept without a list, by kind.
        """
        known: dict[str, str] = {}
        for kind, word in self.keep:
            known.setdefault(word, kind)
        lists = [vocabulary] if self.defaults is None else [shipped()[name] for name in self.defaults]
        for words in lists:
            for kind, listed in words.items():
                for word in listed:
                    known.setdefault(word, kind)
        return {kind: tuple(word for word, of in known.items() if of == kind) for kind in KINDS}

    def to_json(self) -> dict[str, Any]:
        """Return what is kept as plain data for the header of a patch, which has the concepts already."""
        return {
            "keep": [{"name": word, "kind": kind} for kind, word in self.keep],
            "defaults": None if self.defaults is None else list(self.defaults),
        }


def shipped() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the lists of words to keep that come with the package, by name; each has words by kind."""
    words = everyday_words()
    artists = tuple(word for word in words["style"] if word[0].isupper())
    return {
        "objects": {"object": words["object"]},
        "identities": {"identity": words["identity"]},
        "styles": {"style": words["style"]},
        "artists": {"style": artists},
    }


def plain(name: str) -> str:
    """Return a name as it is compared: in lower case, with single spaces."""
    return " ".join(name.lower().split())


def _sequence(label: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ErasureError(f"`{label}` must be a list, not {type(value).__name__}")
    return list(value)


def _distinct(concepts: Sequence[Concept]) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """Return the concepts with each name once, and the spellings that were left out.

    Raises:
        ErasureError: a name in two entries that differ in more than spelling.
    """
    found: dict[str, Concept] = {}
    merged: list[str] = []
    for concept in concepts:
        key = plain(concept.name)
        aliases: dict[str, str] = {}
        for alias in concept.aliases:
            if plain(alias) == key or plain(alias) in aliases:
                merged.append(alias)
            aliases.setdefault(plain(alias), alias)
        aliases.pop(key, None)
        concept = replace(concept, aliases=tuple(aliases.values()))
        first = found.setdefault(key, concept)
        if first is concept:
            continue
        same = replace(first, name=concept.name, aliases=concept.aliases) == concept
        if not same or set(map(plain, first.aliases)) != set(map(plain, concept.aliases)):
            raise ErasureError(
                f"{concept.name!r} and {first.name!r} are one name in two entries that differ: make them one. Nothing "
                "was changed"
            )
        merged.append(concept.name)
    owners: dict[str, Concept] = {}
    for concept in found.values():
        for name in concept.names:
            owner = owners.setdefault(plain(name), concept)
            if owner is not concept:
                raise ErasureError(
                    f"{name!r} stands in the entries {owner.name!r} and {concept.name!r}: remove it from one of them. "
                    "Nothing was changed"
                )
    return tuple(found.values()), tuple(merged)


def _kept(value: Any, vocabulary: Vocabulary | WordLists | None, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, word) of each entry of `keep`."""
    lists = vocabulary or WordLists()
    for entry in _sequence("keep", value):
        if isinstance(entry, Mapping) and set(entry) == {"file"}:
            rows = read_names(folder / str(entry["file"]))
        elif isinstance(entry, Mapping) and "name" in entry and set(entry) <= {"name", "kind"}:
            rows = [(str(entry["name"]), entry.get("kind"))]
        elif isinstance(entry, str):
            rows = [(entry, None)]
        else:
            raise ErasureError(f"keep: {entry!r} is neither a name, nor {{name:, kind:}}, nor {{file:}}")
        for word, kind in rows:
            if kind is not None and kind not in KINDS:
                raise unknown("kind", str(kind), KINDS)
            yield Concept(word, kind=kind or lists.kind(word)).kind, word


def read_names(path: Path) -> list[tuple[str, str | None]]:
    """Read a file of names: CSV with a column `name` and perhaps `kind`, or text with a name a line.

    In a text, empty lines and what follows a # are left out.

    Raises:
        ErasureError: the file cannot be read, or is a CSV without a column `name`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            return [(row["name"].strip(), (row.get("kind") or "").strip() or None) for row in rows if row["name"]]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise ErasureError(f"{path}: cannot be read: {fault}") from None
    except KeyError:
        raise ErasureError(f"{path}: column 'name' is missing") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [(line, None) for line in lines if line]


def _check_apart(concepts: Sequence[Concept], keep: Sequence[tuple[str, str]]) -> None:
    """Refuse words that are both erased and kept; all of them are named, up to SHOWN."""
    names = {plain(name): concept for concept in concepts for name in concept.names}
    both = [(word, names[plain(word)]) for _, word in keep if plain(word) in names]
    if both:
        shown = ", ".join(
            f"{word!r}" + ("" if plain(word) == plain(concept.name) else f" (an alias of {concept.name!r})")
            for word, concept in both[:SHOWN]
        )
        more = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
        raise ErasureError(
            f"{shown}{more}: both to be erased and to be kept. Take each out of one of the lists. Nothing was changed"
        )
