"""Methods of other packages, through the entry-point group: what is one, and what is not says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from erasure import methods
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.method import ClosedFormMethod, GradientMethod, Method


@dataclass(frozen=True)
class Loose:
    """Looks like a method, and derives from none."""

    method: ClassVar[str] = "outsider"

    def fit(self, base, concepts, run):
        raise AssertionError("called")


@dataclass(frozen=True)
class Bare(GradientMethod):
    method: ClassVar[str] = "outsider"
    iterations: int = 1
    learning_rate: float = 0.1


class Undeclared(ClosedFormMethod):
    method: ClassVar[str] = "outsider"

    def columns(self, base, concepts):
        raise AssertionError("called")


@dataclass(frozen=True)
class Misnamed(ClosedFormMethod):
    method: ClassVar[str] = "insider"

    def columns(self, base, concepts):
        raise AssertionError("called")


@dataclass(frozen=True)
class Direct(Method):
    """Derives from none of the three kinds, and gives only half of what a method must."""

    method: ClassVar[str] = "outsider"

    def fit(self, base, concepts, run):
        raise AssertionError("called")


class Point:
    name = "outsider"

    def __init__(self, value):
        self.value = value

    def load(self):
        return self.value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Loose, "is not a method: .*derived from GradientMethod, ClosedFormMethod or RuntimeMethod"),
        (erase, "is not a method"),
        (Undeclared, "is not a method: it must be a frozen dataclass"),
        (Bare, "Bare lacks loss, prepare"),
        (Direct, "Direct lacks forecast"),
        (Misnamed, "Misnamed.method must be 'outsider'"),
    ],
)
@pytest.mark.parametrize("run", [erase, plan])
def test_an_entry_point_that_is_no_method_says_why(value, says, run, monkeypatch):
    monkeypatch.setattr(methods, "entry_points", lambda group: [Point(value)])
    assert "outsider" in methods.names() and "esd" in methods.names()
    with pytest.raises(ErasureError, match=f"entry point 'outsider' of the group erasure.methods.*{says}"):
        run("no such model", "cat", "outsider")
    assert methods.find("esd").method == "esd"
