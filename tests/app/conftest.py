"""What the tests of the page share: models of glyph in a hurry, and a visit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from erasure.app import comparison
from erasure.app.models import Models
from erasure.app.visits import Visits


@pytest.fixture(scope="session")
def models():
    """The bundled models, loaded once."""
    return Models(device="cpu")


@pytest.fixture
def visits():
    """Visits whose files are deleted afterwards."""
    visits = Visits()
    yield visits
    visits.close()


@pytest.fixture
def visit(visits):
    """One visit."""
    return visits.of("a")


@pytest.fixture
def hurried(monkeypatch):
    """Images of two steps, from two seeds."""
    own = comparison.sampling_of
    monkeypatch.setattr(comparison, "sampling_of", lambda pipe: replace(own(pipe), steps=2))
    monkeypatch.setattr(comparison, "SEEDS", (0, 1))
