"""Neighbours and retained words, chosen with glyph's text encoder."""

from __future__ import annotations

import pytest

from erasure.concepts.concept import MOST, Concept
from erasure.concepts.neighbors import COUNT, around, neighbours, retained, words
from erasure.errors import ErasureError
from erasure.glyph import objects, styles
from erasure.model.base import Base
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.load("glyph")


def test_neighbours_are_of_the_kind_and_never_the_concept(base):
    cat, ink = Concept.of("cat", base.vocabulary), Concept.of("ink", base.vocabulary)
    near = neighbours(base, cat, [cat])
    assert len(near) == COUNT and "cat" not in near and not set(near) & set(styles())
    assert set(neighbours(base, ink, [ink])) <= set(styles()) - {"ink"}


def test_what_the_user_keeps_comes_first(base):
    concept = Concept("cat", keep=("dog", "zebra"))
    assert neighbours(base, concept, [concept]) == ["dog", "zebra"]
    assert [word for _, word in retained(base, [concept])][:2] == ["dog", "zebra"]


def test_other_names_of_the_concept_are_not_retained(base):
    kept = {word for _, word in retained(base, [Concept("kitten")])}
    assert "cat" not in kept and "dog" in kept
    kept = {word for _, word in retained(base, [Concept("apple", aliases=("banana",))])}
    assert not kept & {"apple", "banana"}


def test_joint_concepts_are_all_left_out(base):
    kept = {word for _, word in retained(base, Concept.list_of(["cat", "dog"], base.vocabulary))}
    assert kept == {*objects(), *styles()} - {"cat", "dog"}


def test_no_concept_is_the_neighbour_of_another(base):
    """Words of one family are close to each other; erased together, none may be kept for another."""
    cat = Concept.of("cat", base.vocabulary)
    names = ["cat", "guitar", *neighbours(base, cat, [cat])[:2]]
    several = Concept.list_of(names, base.vocabulary)
    near = around(base, several)
    assert not set(near) & set(names)
    assert len(near) == len(set(near)) > COUNT
    assert near[0] == neighbours(base, cat, several)[0] and near[1] == neighbours(base, several[1], several)[0]
    assert around(base, [Concept.of("ink", base.vocabulary)])[0].endswith(" style")


def test_a_content_concept_brings_its_members(base):
    weapon = Concept.of("weapon", base.vocabulary)
    assert weapon.kind == "content" and set(weapon.aliases) >= {"bomb", "dagger"}


def test_other_checkpoints_get_everyday_words():
    base = Base.of(tiny_pipeline())
    assert base.vocabulary is None and "Claude Monet" in words(base)["style"]
    assert ("style", "Claude Monet") not in retained(base, [Concept("Claude Monet", kind="style")])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no concept"),
        (["cat", "cat"], "two of the concepts"),
        (["cat", {"name": "feline", "aliases": ["cat"]}], "two of the concepts"),
        (["cat", {"name": "dog", "keep": ["cat"]}], "to be kept"),
        ([f"concept {i}" for i in range(MOST + 1)], f"at most {MOST}"),
    ],
)
def test_contradictory_lists(entries, message):
    with pytest.raises(ErasureError, match=message):
        Concept.list_of(entries)
