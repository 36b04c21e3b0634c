"""Concepts made from names and mappings, and the values that are refused."""

from __future__ import annotations

import pytest

from erasure.concepts.concept import Concept
from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError
from erasure.glyph import VOCABULARY

GLYPH = Vocabulary.read(VOCABULARY)
NAMES = ("cat", "ink", "santa claus", "dagger", "weapon", "unheard of")


def test_a_bare_name_gets_the_kind_that_the_vocabulary_knows():
    kinds = {name: Concept.of(name, GLYPH).kind for name in NAMES}
    assert kinds == {
        "cat": "object",
        "ink": "style",
        "santa claus": "identity",
        "dagger": "content",
        "weapon": "content",
        "unheard of": "object",
    }


def test_without_a_vocabulary_a_bare_name_is_only_a_name():
    """The core knows no bundled model: glyph's weapons and styles mean nothing on another checkpoint."""
    assert [Concept.of(name) for name in NAMES] == [Concept(name) for name in NAMES]
    assert {concept.kind for concept in Concept.list_of(list(NAMES))} == {"object"}


def test_json_round_trip():
    concept = Concept("Van Gogh", aliases=("Vincent",), anchor="a painting", keep=("Monet",), kind="style")
    assert Concept.of(concept.to_json()) == concept


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("x" * 10_000, "10,000 characters"),
        ({"name": "cat", "anchor": "Cat"}, "the concept itself"),
        ({"name": "cat", "keep": ["dog", "CAT"]}, "to be kept"),
        ({"name": "cat", "kind": "objekt"}, "did you mean 'object'"),
        ({"name": "cat", "colour": "red"}, "unknown concept field"),
        ({"aliases": ["kitten"]}, "needs a name"),
        (7, "a name or a mapping"),
    ],
)
def test_bad_concepts_say_what_is_wrong(entry, message):
    with pytest.raises(ErasureError, match=message):
        Concept.of(entry)


def test_a_content_concept_brings_its_members_unless_aliases_are_given():
    whole = Concept.of("weapon", GLYPH)
    assert Concept.of({"name": "weapon", "anchor": "flower"}, GLYPH).aliases == whole.aliases
    kept = Concept.of({"name": "weapon", "keep": ["dagger"]}, GLYPH)
    assert set(whole.aliases) - set(kept.aliases) == {"dagger"} and kept.kind == "content"
    alone = Concept.of({"name": "weapon", "aliases": []}, GLYPH)
    assert alone.names == ("weapon",) and Concept.of(alone.to_json()) == alone
