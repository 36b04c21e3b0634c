"""Prompt sets: round trips, the sets of the package, and errors that name row and column."""

from __future__ import annotations

import random

import pytest

from erasure.errors import ErasureError
from erasure.glyph import objects, styles
from erasure.glyph.build.captions import caption
from erasure.glyph.build.prompt_sets import build_all
from erasure.glyph.build.render import scenes
from erasure.prompts.prompt_set import PromptSet, names
from erasure.prompts.row import Prompt
from erasure.prompts.subjects import fill, load_subjects


def test_round_trip(tmp_path):
    rows = [
        Prompt("a", 'a "cat", with\na newline', 1, None, {"object": "cat"}),
        Prompt("b", "a dög", 2, 7.5, {"object": "dog", "style": "ink"}),
    ]
    PromptSet("some", rows).write(tmp_path / "some.csv")
    read = PromptSet.read(tmp_path / "some.csv")
    assert list(read.rows) == rows and read.name == "some"
    assert read.sha256 == PromptSet("some", rows).sha256
    assert read.label_values("object") == ["cat", "dog"]


def test_the_packages_sets_equal_the_scripts_output():
    sets = build_all()
    assert sorted(rows.name for rows in sets) == names()
    for rows in sets:
        assert PromptSet.read(rows.name) == rows


def test_every_object_and_style_has_a_prompt():
    rows = PromptSet.read("glyph-objects").rows
    assert {(row.labels["object"], row.labels["style"]) for row in rows} == {
        (o, s) for o in objects() for s in styles()
    }
    seeds = [row.seed for name in names() for row in PromptSet.read(name).rows]
    assert len(set(seeds)) == len(seeds)


def test_plain_prompts_are_not_training_captions():
    rng = random.Random(0)
    trained = {caption(scene, rng).text for scene in scenes() for _ in range(20)}
    for name in ("glyph-plain", "glyph-styles"):
        assert not trained & {row.prompt for row in PromptSet.read(name).rows}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("id,prompt\na,b\n", "'seed' is missing"),
        ("id,prompt,seed\n", "no rows"),
        ("id,prompt,seed\na,b,1\na,c,2\n", "row 3, column 'id': 'a' occurs twice"),
        ("id,prompt,seed\na,b,one\n", "row 2, column 'seed': 'one'"),
        ("id,prompt,seed\n,b,1\n", "row 2, column 'id'"),
        ("id,prompt,seed,guidance\na,b,1,high\n", "row 2, column 'guidance'"),
        ("id,prompt,seed\na,b\n", "row 2"),
        ('id,prompt,seed\na,"b,1\n', "line"),
    ],
)
def test_bad_files_name_row_and_column(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ErasureError, match=message):
        PromptSet.read(tmp_path / "bad.csv")


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(ErasureError, match="did you mean 'glyph-objects'"):
        PromptSet.read("glyph-objetcs")


def test_every_subject_fills_every_template():
    for name, entry in load_subjects()["sets"].items():
        rows = PromptSet.read(name)
        assert rows.label_values(entry["label"]) == entry["names"]
        assert len(rows.rows) == len(entry["names"]) * len(entry["templates"])
        assert all(row.labels[entry["label"]] in row.prompt for row in rows.rows)
        assert len({row.prompt for row in rows.rows}) == len(rows.rows)


def test_any_subject_fills_the_templates():
    rows = fill(["owl", "cat"], "object", first_seed=5)
    assert rows.rows[0].prompt == "a photo of an owl" and rows.rows[0].seed == 5
    assert rows.label_values("object") == ["owl", "cat"]
    assert [row.prompt for row in fill(["ink"], "style", ["{x}!"]).rows] == ["ink!"]
    with pytest.raises(ErasureError, match="did you mean 'object'"):
        fill(["owl"], "objekt")
    for bad in ("a photo", "{x} and {y}", "{x} {", "{x} {0}"):
        with pytest.raises(ErasureError, match="template"):
            fill(["owl"], "object", [bad])
