"""The page of a certificate: every figure as a count with its interval in words, also where little was measured."""

from __future__ import annotations

import copy

import pytest
from PIL import Image

from erasure.evaluation.report.certificate_page import certificate_page, counted, likely
from erasure.evaluation.report.html import Shot

CELL = {"value": 0.75, "low": 0.5, "high": 0.9, "n": 8}
LEAK = {**CELL, "value": 0.25, "low": 0.1, "high": 0.5}
ATTACK = {**CELL, "before": 0.25, "control": 0.5, "access": "weights", "adapted": {}}
STATEMENT = {
    "erasure": "1",
    "issued": "2026-01-02",
    "removed": [{"name": "Jane <Doe>", "aliases": [], "kind": "object"}],
    "model": {"name": "some/model", "sha256": "a" * 64, "weights": {}},
    "patch": {
        "file": "p.safetensors",
        "sha256": "b" * 64,
        "base": "some/model",
        "method": "unheard-of",
        "gate": "text",
        "parameters": 1234,
        "components": {"unet": 3},
        "seed": 0,
    },
    "before": {"UA": {**CELL, "value": 0.0, "low": 0.0, "high": 0.32}},
    "results": {
        "metrics": {"UA": CELL, "leak": LEAK, "CRA": CELL, "quality": CELL},
        "attacks": {"rece": ATTACK, "future": {**ATTACK, "value": 1.0, "access": "a crystal ball", "control": None}},
        "how": {"prompts": {"name": "p", "used": 20}, "judge": {"name": "j"}},
    },
    "repeat": ["pip install x", "erasure verify p.safetensors"],
    "key": None,
}


def page(shots=None, **changes):
    statement = copy.deepcopy(STATEMENT)
    for path, value in changes.items():
        *parts, last = path.split("__")
        inner = statement
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return certificate_page(statement, shots or {}).replace("\N{NO-BREAK SPACE}", " ")


def test_counts_in_words():
    assert likely(0.5, 0.9).replace("\N{NO-BREAK SPACE}", " ") == "likely between 50 % and 90 %"
    assert likely(1.0, 1.0).replace("\N{NO-BREAK SPACE}", " ") == "likely about 100 %"
    text = counted(CELL, "requests", inverse=True).replace("\N{NO-BREAK SPACE}", " ")
    assert text == "2 of 8 requests (likely between 10 % and 50 %)"


def test_what_was_tested():
    text = page()
    assert "“Jane &lt;Doe&gt;” was removed from the image model some/model" in text and "<Doe>" not in text
    assert "6 of 8 pictures that asked for “Jane &lt;Doe&gt;” do not show it" in text
    assert "6 of 8 pictures that asked by other words do not show it" in text  # the leak is what still shows it
    assert "Pictures that asked by other words still show it: 2 of 8 (likely between 10 % and 50 %)" in text
    assert "still show it: 2 of 8 (likely between 10 % and 50 %)" in text
    assert "Before the removal: 0 of 8 (likely between 0 % and 32 %)" in text
    assert "6 of 8 pictures of other things" in text and "anybody could have written this page" in text


def test_what_was_tried_with_the_most_successful_first():
    text = page()
    assert text.index("a crystal ball") < text.index("Somebody who has the model’s files")
    assert "Without trying: 2 of 8 (likely between 7 % and 59 %)" in text
    assert "By as many random tries: 4 of 8" in text and text.count("By as many random tries") == 1
    assert "most successful one (future) did so for <b>8 of 8 requests (likely between 50 % and 90 %)</b>" in text
    none = page(results__attacks={})
    assert "Nothing was tried." in none and "Nobody tried to bring it back" in none
    failed = page(results__attacks={"rece": {**ATTACK, "value": 0.0, "low": 0.0, "high": 0.3}})
    assert "No attack brought it back: 0 of 8 requests (likely between 0 % and 30 %)" in failed
    short = page(results__attacks={"rece": {**ATTACK, "adapted": {"tries": 50}}})
    assert "The search was shorter than in its paper" in short and "shorter" not in text


def test_what_was_not_measured_is_said():
    text = page(results__metrics={})
    assert text.count("Not tested") == 4 and "is gone was not tested" in text


@pytest.mark.parametrize(("kind", "shown"), [("object", 3), ("style", 3), ("identity", 0), ("content", 0)])
def test_pictures_of_people_and_of_content_are_left_out(kind, shown):
    image = Image.new("RGB", (8, 8))
    shots = {
        "one": [Shot({"base": image, "patched": image}, "a")],
        "two": [],
        "three": [Shot({"attacked": image}, "b")],
    }
    text = page(shots, removed=[{"name": "Jane", "aliases": ["J."], "kind": kind}])
    assert text.count("<img") == shown and ("shows no pictures" in text) == (not shown)
    assert "Also known as<dd>“J.”" in text and ("<i>after</i>" in text) == bool(shown)


def test_a_long_list_is_counted_and_folded():
    removed = [{"name": f"name {i}", "aliases": [], "kind": "object"} for i in range(40)]
    text = page(removed=removed, results__names={"name 3": {"shown": 1, "base": 4, "n": 4}, "name 4": {"shown": 0}})
    assert "“name 11” and 28 others were removed" in text and "All 40 names" in text and "name 39" in text
    assert "at least one picture still shows: “name 3”." in text


def test_how_it_was_removed():
    assert (
        "A patch of 1,234 numbers changes the part that draws (unet). It was made by the method unheard-of." in page()
    )
    guard = page(patch__components={}, patch__gate="always")
    assert "No weight was changed" in guard and "It acts on every request" in guard and "A patch of" not in guard
