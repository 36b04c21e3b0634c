"""A concept to erase: its names, the anchor that replaces it, and the neighbours to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError, unknown

KINDS = ("object", "style", "identity", "content")
MOST = 100  # concepts in one run
# Subjects that carry a style: common words, so that any checkpoint has them.
CARRIERS = ("a dog", "a house", "a car", "a flower", "a person", "an apple")
LONGEST = 200  # characters; CLIP reads 77 tokens and cuts the rest off silently


@dataclass(frozen=True)
class Concept:
    """A concept to erase, with everything that a method needs to know about it.

    Args:
        name: the name that users write in prompts, such as "Van Gogh" or "cat".
        aliases: other names that are erased along with it.
        anchor: what its prompts should show instead; None leaves the choice to the method.
        keep: neighbours that must not change.
        kind: object, style, identity (a person or character) or content (nudity, weapons).
    """

    name: str
    aliases: tuple[str, ...] = ()
    anchor: str | None = None
    keep: tuple[str, ...] = ()
    kind: str = "object"

    def __post_init__(self) -> None:
        """Check every field; raises ErasureError."""
        object.__setattr__(self, "aliases", tuple(self.aliases))
        object.__setattr__(self, "keep", tuple(self.keep))
        for text in (self.name, *self.aliases, *self.keep, *([self.anchor] if self.anchor else [])):
            if not isinstance(text, str) or not text.strip():
                raise ErasureError("a concept's name is empty: give a word or a phrase, such as 'cat' or 'Van Gogh'")
            if len(text) > LONGEST:
                raise ErasureError(
                    f"a concept's name has {len(text):,} characters ({text[:30]!r}...); "
                    f"at most {LONGEST} are allowed: the text encoder would cut the rest off"
                )
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        lower = {name.lower().strip() for name in self.names}
        if self.anchor and self.anchor.lower().strip() in lower:
            raise ErasureError(f"the anchor {self.anchor!r} is the concept itself: erasing would change nothing")
        for name in self.keep:
            if name.lower().strip() in lower:
                raise ErasureError(f"{name!r} is both to be erased and to be kept: remove it from one of the lists")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name followed by its aliases."""
        return (self.name, *self.aliases)

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Concept, vocabulary: Vocabulary | None = None) -> Concept:
        """Make a concept from a bare name, a mapping (a YAML entry) or a concept.

        Args:
            value: what the user gave. A `Concept` is returned as it is.
            vocabulary: the words of the checkpoint at hand, where they are known. They give a name its kind, and a
                content concept its members as aliases, as far as none are given and they are not to be kept.
                Without a vocabulary a name whose kind is not given is an object.

        Raises:
            ErasureError: a value of another type, an unknown field, no name, or whatever `Concept` refuses.
        """
        if isinstance(value, Concept):
            return value
        if isinstance(value, str):
            return cls.of({"name": value}, vocabulary)
        if not isinstance(value, Mapping):
            raise ErasureError(f"a concept is a name or a mapping with a name, not {type(value).__name__}")
        allowed = [field.name for field in fields(cls)]
        for key in value:
            if key not in allowed:
                raise unknown("concept field", key, allowed)
        if "name" not in value:
            raise ErasureError("a concept needs a name")
        concept = cls(**value)
        if vocabulary is None:
            return concept
        members = tuple(name for name in vocabulary.content(concept.name) if name not in concept.keep)
        known: dict[str, Any] = {"kind": vocabulary.kind(concept.name), "aliases": members}
        return replace(concept, **{key: one for key, one in known.items() if key not in value})

    @classmethod
    def list_of(cls, value: Any, vocabulary: Vocabulary | None = None) -> list[Concept]:
        """Make concepts from one value, or a list of values, that `of` accepts.

        Raises:
            ErasureError: an empty list, more than MOST concepts, a name given twice, or one that another concept keeps.
        """
        several = isinstance(value, Sequence) and not isinstance(value, str)
        concepts = [cls.of(one, vocabulary) for one in (value if several else [value])]
        if not concepts:
            raise ErasureError("no concept was given: name at least one")
        if len(concepts) > MOST:
            raise ErasureError(
                f"{len(concepts)} concepts at once: at most {MOST} are erased in one run. "
                "Erase them in several runs: patches stack"
            )
        owner: dict[str, Concept] = {}
        for one in concepts:
            for name in one.names:
                if owner.setdefault(name.lower().strip(), one) is not one:
                    raise ErasureError(f"{name!r} is named in two of the concepts: name it once")
        for one in concepts:
            for name in one.keep:
                if name.lower().strip() in owner:
                    raise ErasureError(f"{name!r} is both to be erased and to be kept: remove it from one of the lists")
        return concepts

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the patch's header; `Concept.of` reads it back."""
        return {**asdict(self), "aliases": list(self.aliases), "keep": list(self.keep)}

    def prompt_pairs(self) -> list[tuple[str, str]]:
        """Return pairs (prompt that shows the concept, the same prompt without it).

        For an object, the second is the empty prompt or the anchor. A style is also paired on CARRIERS, "a dog in ink
        style" with "a dog": pushed away from the empty prompt, the dog would be erased along with the style.
        """
        instead = self.anchor or ""
        if self.kind != "style":
            return [(name, instead) for name in self.names]
        pairs = [(f"{name} style", instead) for name in self.names]
        for name in self.names:
            for carrier in CARRIERS:
                pairs.append((f"{carrier} in {name} style", f"{carrier} in {instead}" if instead else carrier))
        return pairs
