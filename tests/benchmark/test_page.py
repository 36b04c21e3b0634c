"""The benchmark's page: the order of its parts, what is folded, what is painted, and the strip of images."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from erasure.benchmark.page import page
from erasure.benchmark.row import Cell, Row
from erasure.benchmark.strip import strip
from erasure.benchmark.table import Table
from tests.evaluation.report.test_pages import Folds, pair, tiles


def row(method: str, concept: str, ua: float, h: float, tuned: bool = False, **marks: list[int]) -> Row:
    """Return a row; `marks` are outcomes, with those of the base under names that end with `_base`."""
    values = {"UA": ua, "IRA": 0.8, "quality": 0.6, "H": h, "leak": 0.123}
    cells = {name: Cell(value, value - 0.1, min(1.0, value + 0.1), 20, 0.04) for name, value in values.items()}
    outcomes = {name: {f"{concept}{i}": bool(mark) for i, mark in enumerate(marks[name])} for name in marks}
    base = {name.removesuffix("_base"): outcomes.pop(name) for name in list(outcomes) if name.endswith("_base")}
    costs = {"F": 10, "B": 4, "seconds": 1.5}
    return Row(method, concept, "object", tuned, cells, costs, 2000, outcomes, base)


ROWS = [row("esd", "dog", 0.7, 0.5), row("spm", "dog", 0.9, 0.6), row("esd", "dog+owl", 0.3, 0.9)]


def report_of(concept: str, wins: int = 0, p_dog: float | None = None) -> dict:
    accuracies = {"dog": [9, 9], "rare": [3, 4]}
    data = {
        "concept": concept.split("+"),
        "domain": "object",
        "accuracies": {"base": {"object": accuracies}, "patched": {"object": {"dog": [1, 9], "rare": [1, 4]}}},
        "paired": {"target": pair(0, wins, 0.5), "object": pair(1, 2, 0.5), "quality": pair(1, 0, 0.5)},
        "provenance": {},
    }
    if p_dog is not None:
        data["paired_labels"] = {"object": {"dog": pair(8, 0, p_dog), "rare": pair(2, 0, 0.0)}}
    return data


def reports_of(rows: list[Row], **changes) -> dict:
    return {(entry.method, entry.concept): report_of(entry.concept, **changes) for entry in rows}


def drawn(rows: list[Row] = ROWS, **changes) -> str:
    return page(Table(rows, {"limit": None}), reports_of(rows, **changes), Image.new("RGB", (8, 8)))


def test_the_verdict_comes_first_then_the_table_then_the_tests():
    text = drawn([row("esd", "dog", 0.7, 0.5, UA=[1] * 20), row("spm", "dog", 0.9, 0.6, UA=[0] * 20), ROWS[2]])
    marks = [
        'class="tiles"',
        "2 methods, 2 concepts, 3 runs",
        "<h2>Means",
        "<h2>Paired tests",
        "<h2>Erased",
        "<h2>Inter",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    folds = Folds(text)
    for hidden in ("leak", "seconds", "CLIP", "dog + 1 more"):
        assert hidden in folds.hidden and hidden not in folds.shown, hidden
    assert "esd over spm" in folds.shown and "All paired tests" in folds.shown
    assert folds.hidden.count("leak ↓") == 2  # the means in full, and every concept
    assert "Paired tests" not in drawn()  # older tables have no outcomes


def test_the_tiles_show_the_method_with_the_highest_h_among_single_concepts():
    gone, kept, good = tiles(drawn())
    assert "90%" in gone and "95 %: 80–100" in gone and "base 4%" in gone and "<small>others: 70<" in gone
    assert "spm, objects: highest H" in gone and "80%" in kept and "60%" in good and "50–70" in good
    tuned = [*ROWS, row("esd", "cat", 1.0, 1.0, tuned=True)]
    assert tiles(drawn(tuned))[0] == gone  # settings were tuned on it
    without = row("esd", "dog", 0.7, 0.5)
    del without.cells["quality"]
    assert "not measured" in tiles(drawn([without]))[2]


@pytest.mark.parametrize(("lost", "painted"), [(20, True), (5, False)])
def test_only_significant_differences_are_painted(lost, painted):
    """Five losses of twenty images: p = 1/16 before any correction."""
    worse = [0] * lost + [1] * (20 - lost)
    rows = [
        row("esd", "dog", 0.7, 0.9, UA=[1] * 20, quality=worse, quality_base=[1] * 20, IRA=[1] * 20, IRA_base=[1] * 20),
        row("spm", "dog", 0.9, 0.6, UA=worse, quality=[1] * 20, quality_base=[1] * 20, IRA=[1] * 20, IRA_base=[1] * 20),
    ]
    text = drawn(rows)
    gone, kept, good = tiles(text)
    assert ('<strong class="worse">60%' in good) == painted and "class=" not in gone.split("<small>")[0][8:]
    assert '<strong class="' not in kept
    means = text[text.index("<h2>Means") : text.index("<details>")]
    assert means.count('class="better"') == 2 * painted and means.count("†") == 1 + painted  # one in the legend
    assert ('<b class="better">70%</b>' in means) == painted  # UA of esd, which is significantly better than spm's
    tests = text[text.index("<h2>Paired tests") : text.index("All paired tests")]
    assert ("esd over spm<small>UA, objects (1)" in tests) == ("20 / 0<small>of 20" in tests) == painted
    assert ("base over esd<small>quality" in tests) == ('<b class="worse">+100%</b>' in tests) == painted
    assert f"{3 * painted} of 7 tests" in tests
    # The better of the two comes first, also where it is the second of the comparison.
    assert len(re.findall(r"<td>20 / 0<small>of 20", tests)) == 3 * painted


@pytest.mark.parametrize(("p", "painted"), [(0.04, True), (0.06, False), (None, False)])
def test_the_matrix_paints_only_significant_cells_and_folds_small_ones(p, painted):
    text = drawn(ROWS[:1], p_dog=p)
    many, every = re.findall(r'<table class="matrix">.*?</table>', text)
    assert ("color-mix" in many) == painted == ("color-mix" in every)
    assert "rare" not in many and "rare" in every and "−89" in many and "−50" in every
    assert every.count("color-mix") == painted  # four images are too few, whatever their p-value


def test_the_strip_has_the_base_and_every_method_on_the_same_prompts(tmp_path):
    rows = [row("esd", "cat", 1.0, 1.0, tuned=True), *ROWS, row("esd", "owl", 0.7, 0.5)]
    folders = {(entry.method, entry.concept): tmp_path / entry.method / entry.concept for entry in rows}
    colours = {"base": 10, "esd": 20, "spm": 30}
    records = [("s", "dog", "synonym"), ("k", "cow", ""), ("t", "dog", ""), ("u", "dog", "")]
    lines = [json.dumps({"id": i, "labels": {"object": o, "role": role}}) for i, o, role in records]
    for method, place in [("base", tmp_path / "base"), *((m, folders[m, "dog"] / "patched") for m in ("esd", "spm"))]:
        (place / "images").mkdir(parents=True)
        for add, identity in enumerate("kt"):
            Image.new("L", (8, 8), colours[method] + add).save(place / "images" / f"{identity}.png")
        (place / "records.jsonl").write_text("\n".join(lines))
    (tmp_path / "esd" / "dog" / "patched" / "images" / "k.png").unlink()
    groups = strip(rows, reports_of(rows), folders, tmp_path / "base")
    assert [name.split(":")[0] for name in groups] == ["dog"]  # the others have no images
    seen = {
        shot.note: {name: image and image.getpixel((0, 0))[0] for name, image in shot.images.items()}
        for shot in next(iter(groups.values()))
    }
    assert seen == {
        "base": {"target": 11, "kept": 10},
        "esd": {"target": 21, "kept": None},
        "spm": {"target": 31, "kept": 30},
    }
    text = page(Table(ROWS, {}), reports_of(ROWS), Image.new("RGB", (8, 8)), groups)
    assert text.index('class="tiles"') < text.index("<img") < text.index("<h2>Means")
    assert text[: text.index("<h2>Means")].count("<img") == 5
