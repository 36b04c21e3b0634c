"""A tiny pipeline and its base, for tests that leave them as they are."""

from __future__ import annotations

import pytest

from erasure.model.base import Base
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def base(pipe):
    return Base.of(pipe)
