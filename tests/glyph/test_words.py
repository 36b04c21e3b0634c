"""Glyph's words: what they stand for, and what it was never taught."""

from __future__ import annotations

import logging

from erasure.concepts.vocabulary import Vocabulary
from erasure.erasing import erase
from erasure.glyph import VOCABULARY, objects, styles


def test_every_word_stands_for_labels_that_there_are():
    known = Vocabulary.read(VOCABULARY).meanings
    assert known["kitten"] == ("object", ["cat"]) and known["ink"] == ("style", ["ink"])
    assert "dagger" in known["weapon"][1] and len(known["weapon"][1]) > 1
    assert all(set(labels) <= set(objects() if head == "object" else styles()) for head, labels in known.values())


def test_names_without_any_of_its_words_are_unheard():
    names = ["cat", "A red Kitten ", "ink style", "weapon", "mushroom", "catalogue"]
    assert Vocabulary.read(VOCABULARY).unknown(names) == ["mushroom", "catalogue"]


def test_erasing_what_glyph_cannot_draw_is_warned_of(caplog):
    few = {"iterations": 1, "trajectories": 1, "sample_steps": 2, "batch_size": 1, "progress": False}
    with caplog.at_level(logging.WARNING, "erasure"):
        erase("glyph", "cat", "esd", **few)
        assert not caplog.records
        erase("glyph", "mushroom", "esd", **few)
    assert "glyph was never taught 'mushroom'" in caplog.text
