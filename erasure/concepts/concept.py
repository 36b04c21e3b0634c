"""A concept to erase: its names, the anchor that replaces it, and the neighbours that must be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from erasure.concepts.vocabulary import Vocabulary
from erasure.concepts.word_lists import WordLists
from erasure.errors import ErasureError, unknown

KINDS = ("object", "style", "identity", "content")
MOST = 100  # concepts in one run
# Subjects that prompts show in a style. They are common words, so that every checkpoint knows them.
CARRIERS = ("a dog", "a house", "a car", "a flower", "a person", "an apple")
LONGEST = 200  # characters in a name; CLIP reads 77 tokens and drops the rest without a warning


@dataclass(frozen=True)
class Concept:
    """A concept to erase, with its other names and what must not change.

    Args:
        name: the concept as users write it in prompts, such as "Van Gogh" or "cat".
        aliases: other names, which are erased as well.
        anchor: what prompts with the concept should show instead; None lets the method choose.
        keep: neighbours that must stay as they are.
        kind: object, style, identity (a person or character) or content (nudity, weapons).
        prompts: prompts to erase from, with {} for each of the names; empty: the names themselves, and for a style
            also subjects in it.

    Raises:
        ErasureError: an empty or overlong name, an unknown kind, an anchor that is a name of the concept, or a name
            that is both erased and kept.
    """

    name: str
    aliases: tuple[str, ...] = ()
    anchor: str | None = None
    keep: tuple[str, ...] = ()
    kind: str = "object"
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("aliases", "keep", "prompts"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for text in (self.name, *self.aliases, *self.keep, *self.prompts, *([self.anchor] if self.anchor else [])):
            if not isinstance(text, str) or not text.strip():
                raise ErasureError("a concept's name is empty: give a word or a phrase, such as 'cat' or 'Van Gogh'")
            if len(text) > LONGEST:
                raise ErasureError(
                    f"a concept's name has {len(text):,} characters ({text[:30]!r}...), and at most {LONGEST} are "
                    "allowed: the text encoder would not read the rest"
                )
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        names = {name.lower().strip() for name in self.names}
        if self.anchor and self.anchor.lower().strip() in names:
            raise ErasureError(f"the anchor {self.anchor!r} is the concept itself: erasing would change nothing")
        for name in self.keep:
            if name.lower().strip() in names:
                raise _erased_and_kept(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name of the concept, followed by its aliases."""
        return (self.name, *self.aliases)

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Concept, vocabulary: Vocabulary | WordLists | None = None) -> Concept:
        """Make a concept from a name, from a mapping such as a YAML entry, or from a concept.

        Args:
            value: a name, or a mapping with `name` and any other field of `Concept`. A `Concept` is returned as it is.
            vocabulary: the words that the checkpoint was taught, if they are known, or the lists that ship with the
                package. They supply the kind if the mapping has none, and the members of a content concept as
                aliases, except those that are kept, if the mapping has none. Without them the default kind is object.

        Raises:
            ErasureError: a value of another type, an unknown field, no name, or anything that `Concept` refuses.
        """
        if isinstance(value, Concept):
            return value
        if isinstance(value, str):
            return cls.of({"name": value}, vocabulary)
        if not isinstance(value, Mapping):
            raise ErasureError(f"a concept must be a name or a mapping with a name, not {type(value).__name__}")
        allowed = [field.name for field in fields(cls)]
        for key in value:
            if key not in allowed:
                raise unknown("concept field", key, allowed)
        if "name" not in value:
            raise ErasureError("a concept needs a name: add the field `name`")
        concept = cls(**value)
        if vocabulary is None:
            return concept
        members = tuple(name for name in vocabulary.content(concept.name) if name not in concept.keep)
        defaults: dict[str, Any] = {"kind": vocabulary.kind(concept.name), "aliases": members}
        return replace(concept, **{field: default for field, default in defaults.items() if field not in value})

    @classmethod
    def list_of(cls, value: Any, vocabulary: Vocabulary | WordLists | None = None, most: int = MOST) -> list[Concept]:
        """Make a list of concepts to be erased together.

        Args:
            value: anything that `of` accepts, or a list of such values.
            vocabulary: as for `of`.
            most: the largest number of concepts.

        Raises:
            ErasureError: no concept, more than `most`, a name that occurs in two concepts, or a name that one concept
                erases and another keeps.
        """
        several = isinstance(value, Sequence) and not isinstance(value, str)
        concepts = [cls.of(entry, vocabulary) for entry in (value if several else [value])]
        if not concepts:
            raise ErasureError("no concept was given: name at least one")
        if len(concepts) > most:
            raise ErasureError(
                f"{len(concepts)} concepts are too many: one run erases at most {most}. "
                "Erase them in several runs, and load the patches together"
            )
        owner: dict[str, Concept] = {}
        for concept in concepts:
            for name in concept.names:
                if owner.setdefault(name.lower().strip(), concept) is not concept:
                    raise ErasureError(f"{name!r} is in two of the concepts: remove it from one of them")
        for concept in concepts:
            for name in concept.keep:
                if name.lower().strip() in owner:
                    raise _erased_and_kept(name)
        return concepts

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data for the header of a patch; `Concept.of` reads them back."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if not self.prompts:
            del values["prompts"]  # readers of earlier versions do not know the field
        return values

    def bare_pairs(self) -> list[tuple[str, str]]:
        """Return pairs of prompts as published scripts make them: each name as it is, and the anchor or nothing.

        The kind of the concept changes nothing here, and there are no subjects around a style.
        """
        return [(name, self.anchor or "") for name in self.names]

    def prompt_pairs(self) -> list[tuple[str, str]]:
        """Return pairs of prompts: one with the concept, and the prompt that it should be drawn like.

        For an object, the second prompt is the anchor, or empty without one. For a style there are also pairs such as
        ("a dog in ink style", "a dog") for each of CARRIERS: guided away from the empty prompt only, the model would
        lose the dog together with the style. If the concept has `prompts`, they replace both.
        """
        instead = self.anchor or ""
        if self.prompts:
            texts = [text.replace("{}", name) for text in self.prompts for name in self.names]
            return [(text, instead) for text in dict.fromkeys(texts)]
        if self.kind != "style":
            return [(name, instead) for name in self.names]
        pairs = [(f"{name} style", instead) for name in self.names]
        for name in self.names:
            for carrier in CARRIERS:
                pairs.append((f"{carrier} in {name} style", f"{carrier} in {instead}" if instead else carrier))
        return pairs


def _erased_and_kept(name: str) -> ErasureError:
    return ErasureError(f"{name!r} is both to be erased and to be kept: take it out of one of the lists")
