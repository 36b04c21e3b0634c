"""Fusion against one stack of equations by numpy, its oracle, and twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.closed_form import StateMap
from erasure.model.fusion import Fusion

WIDTH, OUT = 9, 5


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


WEIGHT, LEFT, RIGHT = draw(OUT, WIDTH, seed=0), draw(WIDTH, 2, seed=1), draw(2, WIDTH, seed=2)
DOWNS, UPS = [draw(1, WIDTH, seed=3 + i) for i in range(2)], [draw(OUT, 1, seed=5 + i) for i in range(2)]
SEEN, KEPT = [draw(4, WIDTH, seed=7 + i) for i in range(2)], draw(3, WIDTH, seed=9)


def fused(terms=(0, 1), seen=SEEN, kept=KEPT, ridge=0.3, weight=1.0) -> np.ndarray:
    """The new weight by `Fusion`."""
    spans = [torch.from_numpy(weight * seen[i].T @ seen[i]) for i in terms]
    refined = StateMap(torch.from_numpy(LEFT), torch.from_numpy(RIGHT))
    fusion = Fusion(refined, spans, torch.from_numpy(kept.T @ kept), ridge)
    pairs = [(torch.from_numpy(DOWNS[i]), torch.from_numpy(UPS[i])) for i in terms]
    down, up, alpha = fusion.factors(torch.from_numpy(WEIGHT), pairs)
    assert alpha == len(down) == 2 + len(terms)
    return WEIGHT + (up.double() @ down.double()).numpy()


def by_hand(terms=(0, 1), kept=KEPT, ridge=0.3, weight=1.0) -> np.ndarray:
    """The minimum of the objective, as one stack of equations."""
    refined = WEIGHT + WEIGHT @ LEFT @ RIGHT
    rows, wanted = [np.sqrt(ridge) * np.eye(WIDTH), kept], [np.sqrt(ridge) * refined.T, kept @ WEIGHT.T]
    for i in terms:
        rows.append(np.sqrt(weight) * SEEN[i])
        wanted.append(np.sqrt(weight) * SEEN[i] @ (refined + UPS[i] @ DOWNS[i]).T)
    return np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0].T


@pytest.mark.parametrize("options", [{}, {"ridge": 5.0}, {"weight": 4.0}, {"terms": (1,)}, {"kept": KEPT[:0]}])
def test_it_is_least_squares(options):
    assert np.allclose(fused(**options), by_hand(**options), atol=1e-5)


def test_one_term_with_nothing_kept_is_reproduced_on_its_prompts():
    for i in range(2):
        wanted = (WEIGHT + WEIGHT @ LEFT @ RIGHT + UPS[i] @ DOWNS[i]) @ SEEN[i].T
        assert np.allclose(fused((i,), kept=KEPT[:0], ridge=1e-9) @ SEEN[i].T, wanted, atol=1e-4)


def test_twins_differ():
    own = fused()
    for twin in (
        fused(seen=SEEN[::-1]),
        fused(weight=4.0),
        fused(ridge=3.0),
        fused(kept=KEPT[:0]),
        WEIGHT + WEIGHT @ LEFT @ RIGHT + sum(up @ down for up, down in zip(UPS, DOWNS, strict=True)),  # added up
    ):
        assert np.abs(own - twin).max() > 0.05
    with pytest.raises(ErasureError, match="too small"):
        fused((0,), kept=KEPT[:0], ridge=-100.0)
