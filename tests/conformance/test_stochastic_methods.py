"""What every method with a seed keeps. A closed form has none: the same input gives the same patch."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from tests.conformance.quick import QUICK, SKETCH, changes, same, small
from tests.tiny import tiny_pipeline


@pytest.fixture(params=sorted(QUICK))
def method(request) -> str:
    return request.param


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(method):
    one, two = (erase(tiny_pipeline(), "cat", method, seed=1, progress=False, **small(method)) for _ in range(2))
    three = erase(tiny_pipeline(), "cat", method, seed=2, progress=False, **small(method))
    assert same(changes(one), changes(two))
    assert not same(changes(one), changes(three))


def test_a_closed_form_has_no_seed():
    one, two = (erase(tiny_pipeline(), "cat", SKETCH, seed=seed, progress=False) for seed in (1, 2))
    assert same(changes(one), changes(two))
