"""Paired comparisons of methods: what is paired, what is resampled, what is corrected, what is marked."""

from __future__ import annotations

import json

import numpy as np
import pytest

from erasure.benchmark.comparison import BASE, bootstrap_concepts, compare, differences, marks
from erasure.benchmark.row import Cell, Row
from erasure.benchmark.table import Table
from erasure.evaluation.metrics.statistics import holm, mcnemar


def row(method: str, concept: str, outcomes: str, base: str = "", metric: str = "IRA", **options) -> Row:
    """A row whose images have these outcomes, one character each; two images a prompt."""
    ids = [f"{concept}-{i}" for i in range(len(outcomes))]
    share = {metric: dict(zip(ids, (mark == "1" for mark in outcomes), strict=True))}
    before = {metric: dict(zip(ids, (mark == "1" for mark in base or "1" * len(outcomes)), strict=True))}
    value = np.mean([mark == "1" for mark in outcomes])
    cells = {metric: Cell(value, value, value, len(outcomes), 1.0)}
    return Row(method, concept, "object", False, cells, {"F": 1, "B": 1, "seconds": 1}, 1, share, before, **options)


def prompts(*rows: Row) -> dict[str, str]:
    ids = [key for row in rows for share in row.outcomes.values() for key in share]
    return {key: f"{key.rpartition('-')[0]} {int(key.rpartition('-')[2]) // 2}" for key in ids}


def find(comparisons, *names):
    return next(c for c in comparisons if (c.first, c.second) == names)


def test_images_are_paired_by_their_ids_and_concepts_by_their_names():
    rows = [
        row("esd", "dog", "1111000011"),
        row("esd", "owl", "1111111111"),
        row("spm", "dog", "1111111100"),
        row("spm", "castle", "0000000000"),
    ]
    found = find(compare(rows, prompts(*rows)), "esd", "spm")
    # Only the dog has both: four images for spm alone, two for esd alone.
    assert (found.concepts, found.n, found.only_first, found.only_second) == (1, 10, 2, 4)
    assert found.difference == pytest.approx(-0.2) and found.p == mcnemar(2, 4)
    assert found.better == "spm" and found.worse == "esd" and not found.significant


def test_the_order_of_the_images_does_not_matter():
    first, second = row("esd", "dog", "1100"), row("spm", "dog", "0011")
    second.outcomes["IRA"].update(dict(reversed(list(second.outcomes["IRA"].items()))))
    assert find(compare([first, second], {}), "esd", "spm").only_first == 2


def test_clear_differences_survive_and_are_marked():
    names = ("dog", "owl", "car", "key")
    rows = [row("good", name, "1" * 12) for name in names] + [row("bad", name, "0" * 10 + "11") for name in names]
    comparisons = compare(rows, prompts(*rows))
    found = find(comparisons, "good", "bad")
    assert found.significant and (found.better, found.worse) == ("good", "bad")
    assert (found.low, found.high) == (pytest.approx(found.difference, abs=0.3),) * 2 and found.low > 0
    assert find(comparisons, "bad", BASE).significant and not find(comparisons, "good", BASE).significant
    assert marks(comparisons, "objects", "IRA", "good") == (True, False)
    assert marks(comparisons, "objects", "IRA", "bad") == (False, True)
    table = Table(rows, {}, prompts(*rows))
    lines = table.summary(("IRA",), ()).splitlines()
    assert "**100%" in lines[3] and "†" not in lines[3] and "17%" in lines[4] and lines[4].count("†") == 1
    text = differences(comparisons)
    assert text.startswith("1 of 1 differences between methods, and 1 of 2 losses against the base, are significant")
    assert "| objects (4) | IRA | good | bad | 83%" in text and "| 48 | 40 / 0 |" in text
    assert "| objects (4) | IRA | base | bad | 83%" in text


def test_without_a_difference_nothing_is_marked():
    rows = [row("a", "dog", "1110"), row("b", "dog", "0111")]
    assert marks(compare(rows, prompts(*rows)), "objects", "IRA", "a") == (False, False)
    assert "**" not in Table(rows, {}, prompts(*rows)).summary(("IRA",), ())


def test_a_lower_leak_is_better():
    rows = [row(m, c, o * 12, metric="leak") for c in ("dog", "owl") for m, o in (("a", "1"), ("b", "0"))]
    found = find(compare(rows, prompts(*rows)), "a", "b")
    assert found.significant and found.better == "b"
    # A leak below the base's is what erasing is for: it is no loss.
    assert not [c for c in compare(rows, {}) if c.second == BASE]


def test_the_families_are_corrected_apart():
    names = ("dog", "owl", "car")
    rows = [row(m, n, o) for n in names for m, o in (("a", "1" * 8), ("b", "11110000"), ("c", "11000000"))]
    comparisons = compare(rows, prompts(*rows))
    for family in (
        [c for c in comparisons if c.second != BASE],
        [c for c in comparisons if c.second == BASE],
    ):
        assert len(family) == 3
        assert [c.corrected for c in family] == pytest.approx(holm([c.p for c in family]))


def test_tuned_concepts_are_left_out():
    rows = [row("a", "cat", "1111"), row("b", "cat", "0000")]
    tuned = [Row(**{**vars(entry), "tuned": True}) for entry in rows]
    assert compare(rows, {}) and compare(tuned, {}) == []


def test_a_small_p_value_is_not_enough_if_one_concept_makes_it():
    """24 images of one concept out of four give a small p-value, but say little of other concepts."""
    names = ("dog", "owl", "car", "key")
    rows = [row("a", name, "1" * 24) for name in names]
    rows += [row("b", name, ("0" if name == "dog" else "1") * 24) for name in names]
    found = find(compare(rows, prompts(*rows)), "a", "b")
    assert found.corrected < 0.001 and found.low == 0 and not found.significant


def test_prompts_are_resampled_whole_and_concepts_too():
    values, texts = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), list("aabbccdd")
    together = np.std(bootstrap_concepts([(values, texts)]))
    assert together == pytest.approx(0.25, abs=0.02)  # four prompts, not eight images
    assert np.std(bootstrap_concepts([(values, list("abcdefgh"))])) == pytest.approx(0.5 / 8**0.5, abs=0.02)
    # Concepts that agree within but not among each other: the spread is that of two concepts.
    apart = [(np.ones(8), texts), (np.zeros(8), texts)]
    assert np.std(bootstrap_concepts(apart)) == pytest.approx(0.5 / 2**0.5, abs=0.02)


def test_outcomes_survive_a_file_one_character_an_image():
    rows = [row("a", "dog", "1101", "1111"), row("b", "dog", "0101", "1111")]
    table = Table(rows, {"limit": None}, prompts(*rows))
    data = json.loads(json.dumps(table.to_json()))
    assert data["rows"][0]["outcomes"] == {"IRA": "1101"} and data["base"] == {"dog": {"IRA": "1111"}}
    again = Table.from_json(data)
    assert again.rows == rows and again.prompts == table.prompts and again.comparisons == table.comparisons
    # Tables of older versions have none.
    for entry in data["rows"]:
        del entry["outcomes"]
    old = Table.from_json({"settings": {}, "rows": data["rows"]})
    assert old.rows[0].outcomes == {} and old.comparisons == [] and "| dog |" in old.markdown()
