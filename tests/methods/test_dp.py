"""DP against what its equation promises, solved apart with numpy, and twins that must differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configured
from erasure.methods.dp import projected
from erasure.model.base import Base
from tests.conformance.quick import ALONE
from tests.methods.encoding import states

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
CAT = {"name": "cat", "keep": ["dog", "red tree"]}
EXACT = {**ALONE, "states": "last", "keep_states": "last", "kept_share": 1.0, "cut": 1e-6, "rank": None}


def weight_of(base: Base) -> np.ndarray:
    return base.unet.get_submodule(LAYER).weight.detach().double().numpy()


def change(base: Base, concept, **settings) -> np.ndarray:
    payload = erase(base, concept, "dp", progress=False, **settings).payload
    return payload.change("unet", f"{LAYER}.weight").double().numpy()


def test_one_column_is_mapped_exactly_and_the_kept_span_is_not_moved(base):
    """Rank 1: W0 (c* - c) x^T U^T / |x|^2 with x = U^T c, where U U^T comes from numpy's own projector."""
    weight, cat, empty = weight_of(base), states(base, "cat")[1], states(base, "")[1]
    kept = np.stack([states(base, "dog")[1], states(base, "red tree")[2]])
    found = change(base, CAT, **EXACT)
    assert np.abs((weight + found) @ cat - weight @ empty).max() < 1e-5
    assert np.abs(found @ kept.T).max() < 1e-6
    assert np.linalg.matrix_rank(found, tol=1e-6) == 1
    outside = np.eye(len(cat)) - np.linalg.pinv(kept) @ kept
    x = outside @ cat
    right = np.outer(weight @ (empty - cat), x) / (x @ x)
    assert np.abs(found - right).max() < 1e-6
    wrong = states(base, "red tree")[1]  # one place early
    for kept_twin in (kept[:1], np.stack([kept[0], wrong])):
        x = (np.eye(len(cat)) - np.linalg.pinv(kept_twin) @ kept_twin) @ cat
        assert np.abs(found - np.outer(weight @ (empty - cat), x) / (x @ x)).max() > 1e-4
    for twin in (-right, np.outer(weight @ (states(base, "")[0] - cat), outside @ cat) / (x @ x)):
        assert np.abs(found - twin).max() > 1e-4


def test_the_joint_form_maps_every_name(base):
    concepts = [CAT, {"name": "car", "anchor": "blue"}]
    found, weight = change(base, concepts, **EXACT), weight_of(base)
    assert np.linalg.matrix_rank(found, tol=1e-6) == 2
    assert np.abs((weight + found) @ states(base, "cat")[1] - weight @ states(base, "")[1]).max() < 1e-5
    assert np.abs((weight + found) @ states(base, "car")[1] - weight @ states(base, "blue")[1]).max() < 1e-5
    assert np.abs(found @ states(base, "dog")[1]).max() < 1e-6
    alone = change(base, CAT, **EXACT)
    assert np.abs(alone - found).max() > 1e-3


def test_small_singular_values_are_cut(base):
    """The states of one name are nearly equal: mapping each exactly would take a very large change."""
    tail = {**EXACT, "states": "tail"}
    large, small = change(base, CAT, **tail), change(base, CAT, **{**tail, "cut": 0.3})
    assert 0 < np.linalg.norm(small) < 0.7 * np.linalg.norm(large)


def test_a_share_of_the_kept_space_leaves_more_to_edit(base):
    half = change(base, CAT, **{**EXACT, "kept_share": 0.5})
    kept = np.stack([states(base, "dog")[1], states(base, "red tree")[2]])
    assert np.abs(half @ kept.T).max() > 1e-3
    assert np.linalg.norm(half) < np.linalg.norm(change(base, CAT, **EXACT))


def test_the_safe_guide_is_the_projection_on_the_neighbours(base):
    settings = {**EXACT, "guide": "safe"}
    (concept,) = Concept.list_of(CAT)
    columns = configured("dp", [concept], settings).columns(base, [concept])
    safe = np.stack([states(base, "dog")[1], states(base, "red tree")[2]])
    cat = states(base, "cat")[1]
    expected = safe.T @ np.linalg.solve(safe @ safe.T, safe @ cat)
    assert np.allclose(columns.guide[0], expected, atol=1e-6)
    assert torch.allclose(projected(torch.tensor(safe), torch.tensor(safe)), torch.tensor(safe))
    parity = configured("dp", [concept], {"parity": True})
    assert (parity.states, parity.guide, parity.kept_share, parity.rank) == ("last", "safe", 1.0, None)


def test_a_kept_space_that_leaves_nothing_is_refused(base):
    words = "a an the of in by at photo painting style dog car tree church van gogh monet red blue starry night".split()
    everything = [f"{word} {other}" for word in words[:4] for other in words[4:14]]
    before = weight_of(base).copy()
    with pytest.raises(ErasureError, match="nothing can be edited for 'cat'.*1 of 32"):
        change(base, {"name": "cat", "keep": everything}, **EXACT)
    assert np.array_equal(before, weight_of(base))
