"""SPEED against what its equation promises and an independent derivation, and twins that must differ."""

from __future__ import annotations

import numpy as np
import torch

from erasure.erasing import erase
from erasure.methods.speed import constrained, fixed_states, most_moved, null_space
from erasure.model.base import Base
from tests.conformance.quick import ALONE
from tests.methods.encoding import states

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
CAT = {"name": "cat", "keep": ["dog", "red tree"]}
LAST = {**ALONE, "states": "last", "keep_states": "last", "rank": None, "null_below": 1e-6, "retain": 0.5}
DRAW = torch.Generator().manual_seed(0)
EDIT, KEPT, STILL = (torch.randn(n, 9, generator=DRAW, dtype=torch.float64) for n in (2, 3, 2))


def change(base: Base, concept, layer: str = "to_v", **settings) -> np.ndarray:
    payload = erase(base, concept, "speed", progress=False, **settings).payload
    return payload.change("unet", f"{LAYER}.{layer}.weight").double().numpy()


def by_hand(base: Base, place: int = 1, retain: float = 0.5, sign: float = 1.0, iec: bool = True) -> np.ndarray:
    """The minimum of the objective over changes D P with D P K = 0, from the optimality conditions in one system.

    min |(W0 + D P) c - W0 a|^2 + rho |D P|^2: with D P = Y Z^T for an orthonormal basis Z of the directions that are
    orthogonal to the kept span and to P K, the rows of Y are ordinary ridge regressions.
    """
    weight = base.unet.get_submodule(f"{LAYER}.to_v").weight.detach().double().numpy()
    cat, empty = states(base, "cat")[place], states(base, "")[place]
    kept = np.stack([states(base, "dog")[1], states(base, "red tree")[2]])
    still = fixed_states(torch.tensor(states(base, ""))).numpy() if iec else np.zeros((0, len(cat)))
    _, values, rows = np.linalg.svd(np.vstack([kept, still]))
    free = rows[int((values > 1e-9 * values[0]).sum()) :].T
    x = free.T @ cat
    shift = sign * weight @ (empty - cat)
    return np.outer(shift, np.linalg.solve(np.outer(x, x) + retain * np.eye(len(x)), x)) @ free.T


def test_the_change_is_the_constrained_minimum(base):
    found = change(base, CAT, **LAST)
    assert np.abs(found - by_hand(base)).max() < 1e-6
    for twin in ({"place": 2}, {"retain": 0.6}, {"sign": -1.0}, {"iec": False}):
        assert np.abs(found - by_hand(base, **twin)).max() > 1e-5, twin


def test_kept_states_and_the_empty_prompt_do_not_move(base):
    found = change(base, CAT, **LAST)
    kept = np.stack([states(base, "dog")[1], states(base, "red tree")[2], states(base, "")[0]])
    assert np.abs(found @ kept.T).max() < 1e-6 < 1e-3 < np.abs(found @ states(base, "cat")[1]).max()
    assert np.linalg.matrix_rank(found, tol=1e-7) == 1


def test_the_right_factor():
    """Nothing moves in the kept span and for K, for columns of any number; without a projector it is least squares."""
    mean = EDIT.T @ EDIT / 2
    free = null_space(KEPT, 1e-9)
    assert free.shape == (9, 6)
    right = constrained(EDIT, mean, free @ free.T, STILL, 0.5)
    assert (right @ KEPT.T).abs().max() < 1e-10 and (right @ STILL.T).abs().max() < 1e-10
    assert (right @ EDIT.T).abs().max() > 0.1
    plain = constrained(EDIT, mean, torch.eye(9, dtype=torch.float64), STILL[:0], 0.5)
    assert torch.allclose(plain, EDIT @ torch.linalg.inv(mean + 0.5 * torch.eye(9, dtype=torch.float64)))


def test_the_filter_keeps_what_is_moved_most():
    left, stacked, mean = torch.randn(9, 2, generator=DRAW).double(), torch.eye(9).double(), EDIT.T @ EDIT
    far = torch.linalg.svd(EDIT).Vh[2:4]  # orthogonal to the columns, so not moved
    kept = most_moved(torch.cat([far, EDIT[:1], 2 * EDIT[1:]]), stacked, left, EDIT, mean)
    assert not any((row == one).all() for row in kept for one in far) and len(kept) >= 1
    assert len(most_moved(EDIT[:0], stacked, left, EDIT, mean)) == 0


def test_the_states_that_must_not_move():
    empty = torch.tensor([[9.0, 9], [0, 0], [0, 0.2], [5, 0], [5, 0.2], [0, 7], [0, 7.2]], dtype=torch.float64)
    found = fixed_states(empty)
    assert torch.equal(found[0], empty[0])
    expected = torch.tensor([[0, 0.1], [5, 0.1], [0, 7.1]], dtype=torch.float64)
    assert torch.allclose(found[1:], expected)


def test_values_alone_or_keys_too(base):
    both = erase(base, CAT, "speed", progress=False, **LAST).payload
    values = erase(base, CAT, "speed", progress=False, **LAST, layers="values").payload
    assert {name.rsplit(".", 2)[1] for name in both.names("unet")} == {"to_k", "to_v"}
    assert {name.rsplit(".", 2)[1] for name in values.names("unet")} == {"to_v"}
    name = f"{LAYER}.to_v.weight"
    assert torch.equal(both.change("unet", name), values.change("unet", name))


def test_filter_and_variants_change_what_is_free(base):
    plain = change(base, CAT, **LAST)
    filtered = change(base, CAT, **LAST, filter=True)
    assert np.abs(plain - filtered).max() > 1e-5
    kept = states(base, "dog")[1], states(base, "red tree")[2]
    assert sorted(np.abs(filtered @ one).max() > 1e-4 for one in kept) == [False, True]
    varied = change(base, CAT, **LAST, augment=3)
    assert np.abs(plain - varied).max() > 1e-6
    assert max(np.abs(varied @ one).max() for one in kept) < 1e-6
    assert np.array_equal(varied, change(base, CAT, **LAST, augment=3))
