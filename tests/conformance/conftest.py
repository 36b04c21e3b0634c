"""The closed form of CONTRIBUTING.md stands in the registry, as another package's method would."""

from __future__ import annotations

import pytest

from erasure import methods
from tests.conformance.quick import SKETCH, written


class Point:
    """An entry point of another package."""

    def __init__(self, name: str, value: type) -> None:
        self.name, self.value = name, value

    def load(self) -> type:
        return self.value


@pytest.fixture(scope="session")
def sketch() -> type:
    return written()


@pytest.fixture(autouse=True)
def registered(monkeypatch, sketch):
    monkeypatch.setattr(methods, "entry_points", lambda group: [Point(SKETCH, sketch)])
