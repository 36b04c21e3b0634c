"""The page of each method: its docstring, its settings and its figures, also for a method that is new."""

from __future__ import annotations

import dataclasses

import pytest

from erasure import methods
from erasure.benchmark.table import Table
from erasure.cli.method_pages import kind, method_list, method_page, summary
from tests.benchmark.test_choosing import row


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_page(name):
    page = method_page(name, {})
    assert page.startswith(f"# {name}\n") and summary(name) in " ".join(page.split())
    assert f"--method {name}" in page and f"`erasure bench --methods {name}` measures it" in page
    settings = page.split("## Settings")[1]
    assert settings.count("\n| ") == 1 + len(dataclasses.fields(methods.find(name)))


def test_measured_figures_are_shown():
    name = methods.names()[0]
    page = method_page(name, {"here": Table([row(name, "cat", 0.9)], {})})
    assert "| here | objects (1) | 90% [80, 100] |" in page and "Not in the tables" not in page
    listed = method_list({"here": Table([row(name, "cat", 0.9)], {})})
    lines = listed.splitlines()[4:]
    assert [line.split("]")[0] for line in lines] == [f"| [{one}" for one in methods.names()]
    assert [line for line in lines if line.endswith(" here |")] == lines[:1]


def test_the_kind_of_a_method():
    assert "without training" in kind("uce") and kind("esd") == "trains"
