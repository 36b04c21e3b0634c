"""Kinds and members of concepts from the lists that ship with the package."""

from __future__ import annotations

import pytest

from erasure.concepts.concept import Concept
from erasure.concepts.word_lists import WordLists, content_lists, kinds

LISTS = WordLists()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("style", ["Vincent van Gogh", "Van Gogh", "van gogh", "Monet", "Albrecht Dürer", "pixel art", "Klee style"]),
        ("identity", ["Sherlock Holmes", "Napoleon Bonaparte", "astronaut", "a wizard"]),
        ("object", ["tench", "cassette player", "English springer", "automobile", "motorcar", "a cat", "The Dog"]),
        ("content", ["nudity", "violence", "unsafe", "i2p", "self-harm"]),
        (None, ["wood", "monet", "starry night", "gogh", "x", "Snoopy", "weapon"]),
    ],
)
def test_the_kind_of_listed_names(kind, names):
    assert {name: LISTS.find(name) for name in names} == dict.fromkeys(names, kind)
    assert LISTS.kind(names[0]) == (kind or "object")


def test_content_concepts_bring_their_published_words():
    nudity = Concept.of("nudity", LISTS)
    assert nudity.names == ("nudity", "naked", "erotic", "sexual") and nudity.kind == "content"
    assert Concept.of({"name": "nudity", "aliases": []}, LISTS).names == ("nudity",)
    assert "naked" not in Concept.of({"name": "nudity", "keep": ["naked"]}, LISTS).aliases
    assert len(Concept.of("i2p", LISTS).aliases) == 11 and len(Concept.of("inappropriate", LISTS).aliases) == 7
    assert Concept.of("cat", LISTS) == Concept("cat")
    assert all(len(entry["source"]) > 8 for entry in content_lists().values())


def test_no_word_has_two_kinds_in_its_own_right():
    assert set(kinds().values()) == {"object", "style", "identity", "content"} and len(kinds()) > 250
