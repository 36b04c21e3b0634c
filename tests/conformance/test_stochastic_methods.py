"""What the seed decides: of a method that draws at random everything, of the others nothing."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from tests.conformance.quick import changes, same, small
from tests.conformance.sketches import METHODS
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_patch_and_another_seed_another(method):
    one, two, three = (
        changes(erase(tiny_pipeline(), "cat", method, seed=seed, progress=False, **small(method))) for seed in (1, 1, 2)
    )
    assert same(one, two)
    assert same(one, three) != METHODS[method].STOCHASTIC
