"""Which method to take: the order of the methods, what is level with the first, and how attacks are counted."""

from __future__ import annotations

import pytest

from erasure.benchmark.choosing import by_computing, by_kind, by_number, by_threat, figures
from erasure.benchmark.row import Cell, Row
from erasure.benchmark.table import Table


def row(method, concept, h, spread=0.1, calls=10.0, kind="object"):
    cell = Cell(h, h - spread, h + spread, 50, 0.1)
    return Row(method, concept, kind, False, {name: cell for name in ("UA", "IRA", "H")}, COSTS | {"F": calls}, 1000)


COSTS = {"F": 0.0, "B": 2.0, "seconds": 1.0}


@pytest.fixture
def table():
    return Table([row("one", "cat", 0.9), row("two", "cat", 0.85), row("three", "cat", 0.5, calls=0.0)], {})


def test_by_kind(table):
    assert by_kind(table).splitlines()[2:] == [
        "| objects | one 90% [80, 100] | two 85% [75, 95] | three 50% [40, 60] |"
    ]


def test_by_number():
    joint = Table(
        [row("one", "a+b", 0.5), row("two", "a+b", 0.7), row("one", "a+b+c", 0.4), row("one", "cat", 0.4)], {}
    )
    lines = [line.split(" | ")[:2] for line in by_number([joint]).splitlines()[2:]]
    assert lines == [["| 2", "two"], ["| 2", "one"], ["| 3", "one"]]


def test_by_computing(table):
    lines = [line.split(" | ")[0] for line in by_computing(table).splitlines()[2:]]
    assert lines == ["| three", "| one", "| two"]


def test_by_threat():
    def report(plain, won, n=4):
        return {"attacks": {"a": {"plain": plain, "won": dict.fromkeys(range(won)), "n": n}}}

    attacked = {"weak/cat": report(1, 2), "weak/dog": report(0, 4), "strong/cat": report(0, 1)}
    assert [line[: line.index("[")] for line in by_threat(attacked).splitlines()[2:]] == [
        "| strong | 25% ",
        "| weak | 88% ",
    ]


def test_figures_of_one_method(table):
    lines = figures("two", {"here": table}).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| here | objects (1) | 85% [75, 95] |") and "10 + 2" in lines[2]
    assert figures("unheard-of", {"here": table}) == ""
