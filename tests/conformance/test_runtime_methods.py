"""What every runtime method keeps: it trains nothing, and the UNet's calls that it makes are counted and forecast."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from erasure.forecast import plan
from erasure.method import RuntimeMethod
from tests.conformance.quick import small
from tests.conformance.sketches import those
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize("method", those(RuntimeMethod))
def test_it_trains_nothing_and_counts_its_calls(method):
    patch = erase(tiny_pipeline(), ["cat", "dog"], method, progress=False, **small(method))
    assert patch.costs["F"] > 0 == patch.costs["B"] and patch.gate["kind"] != "always"
    forecast = plan(tiny_pipeline(), ["cat", "dog"], method, **small(method))
    assert forecast.F == patch.costs["F"] and forecast.training_bytes == 0 < forecast.prepare_bytes
