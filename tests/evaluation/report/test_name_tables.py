"""The tables of a report on several names: their order, their counts, and that one name has none."""

from __future__ import annotations

import dataclasses

from erasure.evaluation.report.evaluation_page import page
from erasure.evaluation.report.name_tables import erased_rows, kept_rows, name_tables
from erasure.evaluation.verify import header_results
from tests.evaluation.report.test_pages import images, report

BASE = {"cat": (9, 10), "dog": (8, 8), "owl": (4, 4), "car": (5, 6), "key": (4, 6), "bus": (6, 6)}
PATCHED = {"cat": (1, 10), "dog": (4, 8), "owl": (0, 4), "car": (5, 6), "key": (5, 6), "bus": (2, 6)}


def several(**values):
    made = report(**values)
    accuracies = {"base": {"object": BASE}, "patched": {"object": PATCHED}}
    return dataclasses.replace(made, concept=("cat", "dog", "owl"), accuracies=accuracies)


def test_the_least_erased_and_the_most_damaged_come_first():
    erased, kept = erased_rows(several()), kept_rows(several())
    assert [(row.label, row.before, row.after, row.n) for row in erased] == [
        ("dog", 8, 4, 8),
        ("cat", 9, 1, 10),
        ("owl", 4, 0, 4),
    ]
    assert [(row.label, row.after - row.before) for row in kept] == [("bus", -4), ("car", 0), ("key", 1)]


def test_the_tables_stand_on_the_page_of_several_names_alone():
    text = page(several(), images(2, 2))
    assert "Each name, the least erased first" in text and "Each kept object, the most damaged first" in text
    table = name_tables(several())
    assert (
        table.index(">dog<") < table.index(">cat<") < table.index(">owl<") < table.index(">bus<") < table.index(">car<")
    )
    assert "<td>dog<td>8/8<td><b>4/8</b>" in table
    assert "Each name" not in page(report(), images(2, 2)) and name_tables(report()) == ""


def test_a_verified_patch_holds_a_row_for_each_name():
    names = header_results(several(), None)["names"]
    assert list(names) == ["dog", "cat", "owl"] and names["cat"] == {"shown": 1, "base": 9, "n": 10}
    assert "names" not in header_results(report(), None)
