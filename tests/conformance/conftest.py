"""The sketches stand in the registry, as another package's methods would."""

from __future__ import annotations

import pytest

from erasure import methods
from tests.conformance.sketches import SKETCHES, Point


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    points = [Point(name, cls) for name, cls in SKETCHES.items()]
    monkeypatch.setattr(methods, "entry_points", lambda group: points)
