"""What the tests of several methods start from."""

from __future__ import annotations

import pytest

from erasure.model.base import Base
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def base() -> Base:
    """Return the tiny checkpoint, for tests that do not change it."""
    return Base("tiny", tiny_pipeline())
