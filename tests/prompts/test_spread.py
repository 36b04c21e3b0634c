"""The choice of some rows, spread over labels and seeds."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from erasure.prompts.row import Prompt
from erasure.prompts.spread import spread

ROWS = [
    Prompt(f"{i:03d}", f"a {thing} in {style}", seed, None, {"object": thing, "style": style})
    for i, (style, thing, seed) in enumerate(product("abcdefgh", "stuvw", (188, 288, 588)))
]
BOTH = ("object", "style")


def counts(rows, label):
    return Counter(row.labels[label] for row in rows)


@pytest.mark.parametrize("count", [3, 8, 17, 40, 77])
def test_every_value_and_seed_comes_about_equally_often(count):
    rows = spread(ROWS, count, BOTH)
    assert len(rows) == count == len({row.id for row in rows})
    for values, found in (
        (8, counts(rows, "style")),
        (5, counts(rows, "object")),
        (3, Counter(row.seed for row in rows)),
    ):
        assert len(found) == min(values, count)
        assert max(found.values()) - min(found.values()) <= 1 + (count > 40)


def test_the_choice_depends_on_ids_alone_and_keeps_the_order():
    rows = spread(ROWS, 20, BOTH)
    assert spread(ROWS[::-1], 20, BOTH) == rows[::-1]
    assert rows == [row for row in ROWS if row in rows] and rows != ROWS[:20] and rows != ROWS[::6]


def test_a_label_that_is_not_named_is_not_spread():
    rows = [Prompt(str(i), "x", i, None, {"object": "cat" if i < 90 else "dog"}) for i in range(100)]
    assert counts(spread(rows, 20, ["object"]), "object") == {"cat": 10, "dog": 10}
    assert counts(spread(rows, 20, ["style"]), "object")["dog"] < 6


def test_wanted_rows_come_first_among_equals():
    for value in "stuvw":
        assert (
            spread(ROWS, 1, BOTH, lambda row, value=value: row.labels["object"] == value)[0].labels["object"] == value
        )
    assert len(counts(spread(ROWS, 5, BOTH, lambda row: row.labels["object"] == "s"), "object")) == 5


def test_a_greater_count_takes_all():
    assert spread(ROWS, 500, BOTH) == ROWS and spread(ROWS, len(ROWS), BOTH) == ROWS
