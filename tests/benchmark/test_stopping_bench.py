"""The table of bench/stopping.py: what counts as reached, refused and missed, and how it is shown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import erasure
from erasure.training import stopping

ROOT = Path(erasure.__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("stopping_bench", ROOT / "bench" / "stopping.py")
assert SPEC is not None and SPEC.loader is not None
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

BASE = {name: [value, 0.0, 1.0] for name, value in (("UA", 0.05), ("IRA", 0.9), ("CRA", 0.95))}


def row(gone: bool, **cells: float) -> dict[str, Any]:
    values = {"UA": 0.9, "IRA": 0.85, "CRA": 0.9, **cells}
    rule = stopping.StopRule(75, {}, step=41, least=0.55 if gone else 0.2, most=0.4, lowered=2, why="updates")
    return {
        **{"method": "esd", "concept": "owl", "factor": "1/3", "limit": 40, "base": BASE},
        **{"stop": rule.to_json(), "costs": {"F": 1234, "B": 600}},
        "cells": {name: [value, value - 0.1, min(value + 0.1, 1.0)] for name, value in values.items()},
    }


@pytest.mark.parametrize(
    ("gone", "cells", "outcome"),
    [
        (True, {}, "reached"),
        (False, {}, "reached"),
        (True, {"UA": 0.89}, "missed"),
        (True, {"IRA": 0.84}, "missed"),
        (True, {"CRA": 0.89}, "missed"),
        (False, {"UA": 0.3}, "refused"),
    ],
)
def test_the_aim_is_to_erase_and_to_keep_or_to_say_that_it_is_not_gone(gone, cells, outcome):
    assert bench.outcome(row(gone, **cells)) == outcome


def test_the_table_has_the_base_once_and_says_why_each_run_ended():
    head, _, *table = bench.markdown([row(True), row(False, UA=0.3)]).splitlines()
    assert f"gone from {stopping.GONE:g}, gain {stopping.GAIN:g}, drift {stopping.DRIFT:g}" in head
    assert len({line.count("|") for line in table}) == 1
    assert [line.split("|")[2].strip() for line in table[2:]] == ["*base*", "esd", "esd"]
    assert "| × 1/3 | updates | 41 of 75 | 2 | 0.55 | 0.40 |" in table[3] and table[3].endswith(
        "| 1,234 | 600 | reached |"
    )
    assert "| updates, not gone |" in table[4] and "30% [20, 40]" in table[4] and table[4].endswith("| refused |")
