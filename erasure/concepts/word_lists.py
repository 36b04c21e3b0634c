"""What kind of concept a word is, by the lists that ship with the package, for checkpoints without a vocabulary.

The lists are artists, people and characters, and nouns (configs/words.yaml and prompts/subjects.yaml, with Imagenette's
classes), MACE's classes with their other words (configs/suites/mace-objects.yaml), and published word lists of content
concepts (configs/content.yaml). An artist or person is also found by the end of the name, such as "Van Gogh".
"""

from __future__ import annotations

from functools import cache
from typing import Any

from erasure.config import CONFIGS, read_yaml

KIND_OF_LIST = {"objects": "object", "identities": "identity", "styles": "style"}


class WordLists:
    """The lists, with the part of `Vocabulary` that makes a concept from a name."""

    def kind(self, name: str) -> str:
        """Return the kind of a name; "object" for a name that is in no list."""
        return self.find(name) or "object"

    def content(self, name: str) -> tuple[str, ...]:
        """Return the other words of a content concept, such as naked for "nudity"; empty for other names."""
        entry = content_lists().get(_plain(name), {"words": ()})
        return tuple(word for word in entry["words"] if word != _plain(name))

    def find(self, name: str) -> str | None:
        """Return the kind of a name, or None if it is in no list.

        Case and a leading article are ignored. The whole name is looked for first, then the end of a longer name: at
        least two words, or one that is written with a capital letter ("Monet").
        """
        word = _plain(name)
        if word in kinds():
            return kinds()[word]
        if word.endswith(" style"):
            return "style"
        if " " in word or name.strip()[:1].isupper():
            people = {full: kind for full, kind in kinds().items() if kind in ("style", "identity")}
            ends = {kind for full, kind in people.items() if full.endswith(f" {word}")}
            return ends.pop() if len(ends) == 1 else None
        return None


@cache
def kinds() -> dict[str, str]:
    """Return the kind of every listed word, by the word in lower case; where lists differ, the first one counts."""
    known: dict[str, str] = {}

    def add(names: Any, kind: str) -> None:
        for name in names:
            known.setdefault(_plain(str(name)), kind)

    for title, entry in content_lists().items():
        add([title, *entry["words"]], "content")
    for entry in read_yaml(CONFIGS.parent / "prompts" / "subjects.yaml")["sets"].values():
        add(entry["names"], entry["label"])
    for part in read_yaml(CONFIGS / "suites" / "mace-objects.yaml")["parts"].values():
        add((name for names in part["fill"].values() for name in names), "object")
    words = read_yaml(CONFIGS / "words.yaml")
    for title, kind in KIND_OF_LIST.items():
        add(words[title], kind)
    return known


@cache
def content_lists() -> dict[str, dict[str, Any]]:
    """Return the published word lists of content concepts: name -> `words` and their `source`."""
    return read_yaml(CONFIGS / "content.yaml")


def _plain(name: str) -> str:
    """Return a name in lower case, without an article before it."""
    words = name.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
