"""Closed-form edits against the normal equations, gradient descent, and twins that must differ."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.closed_form import Columns, Edit
from erasure.patch import LowRank

DRAW = torch.Generator().manual_seed(0)
WEIGHT, EDITED, GUIDE, KEPT = (torch.randn(*shape, generator=DRAW) for shape in ((7, 5), (2, 5), (2, 5), (3, 5)))


def change(columns: Columns) -> torch.Tensor:
    down, up, alpha = Edit(columns).factors(WEIGHT)
    assert down.shape == (2, 5) and up.shape == (7, 2)
    return LowRank({"unet": {"mid": (down, up, alpha)}}).change("unet", "mid.weight").double()


def objective(w: torch.Tensor, columns: Columns) -> torch.Tensor:
    old = WEIGHT.double()
    edited = (w @ columns.edit.double().T - old @ columns.guide.double().T).square().sum()
    kept = (w @ columns.keep.double().T - old @ columns.keep.double().T).square().sum()
    return columns.edit_weight * edited + columns.keep_weight * kept + columns.ridge * (w - old).square().sum()


@pytest.mark.parametrize("settings", [{}, {"edit_weight": 3.0, "keep_weight": 0.2, "ridge": 0.05}])
def test_the_solution_is_where_the_objectives_gradient_is_zero(settings):
    columns = Columns(EDITED, GUIDE, KEPT, **settings)
    w = (WEIGHT.double() + change(columns)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(w, columns), w)
    assert gradient.abs().max() < 1e-4
    for twin in (WEIGHT.double() - change(columns), WEIGHT.double() + 0.5 * change(columns)):
        assert objective(twin, columns) > objective(w, columns) + 1e-3


def test_a_small_ridge_reaches_the_guide_and_a_large_weight_keeps():
    strong = WEIGHT.double() + change(Columns(EDITED, GUIDE, KEPT[:0], ridge=1e-9))
    assert torch.allclose(strong @ EDITED.double().T, WEIGHT.double() @ GUIDE.double().T, atol=1e-4)
    kept = change(Columns(EDITED, GUIDE, KEPT, keep_weight=1e7, ridge=1e-3))
    assert (kept @ KEPT.double().T).abs().max() < 1e-3 < (kept @ EDITED.double().T).abs().max()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ((EDITED[:0], GUIDE[:0], KEPT), "at least one column"),
        ((EDITED, GUIDE[:1], KEPT), "a guide for each"),
        ((EDITED, GUIDE, KEPT[:, :4]), "kept columns"),
    ],
)
def test_shapes_that_do_not_agree(columns, says):
    with pytest.raises(ErasureError, match=says):
        Columns(*columns)
    with pytest.raises(ErasureError, match="above 0"):
        Columns(EDITED, GUIDE, KEPT, ridge=0.0)
