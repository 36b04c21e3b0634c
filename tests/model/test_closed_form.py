"""Closed-form edits against the normal equations, gradient descent, and twins that must differ."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model import closed_form
from erasure.model.closed_form import Columns, Edit, applied, principal_states, readers, readers_gram
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
        ((EDITED, GUIDE[:1], KEPT), "a guide of the same width for each"),
        ((EDITED, GUIDE, KEPT[:, :4]), "not as wide as the edited ones"),
        ((EDITED * torch.nan, GUIDE, KEPT), "NaN or infinity"),
        ((EDITED, GUIDE, KEPT, torch.ones(3)), "edit_weight has shape .3,.: give one number, or 2"),
        ((EDITED, GUIDE, KEPT, 1.0, torch.tensor([1.0, 1.0, 0.0])), "keep_weight=.*above 0"),
        ((EDITED, GUIDE, KEPT, 1.0, 1.0, 0.0), "ridge=0.0: must be finite and above 0"),
    ],
)
def test_columns_that_make_no_sense(columns, says):
    with pytest.raises(ErasureError, match=says):
        Columns(*columns)


def test_each_column_may_have_its_own_weight():
    """A column of weight 2 is that column twice."""
    twice = Columns(EDITED[[0, 1, 1]], GUIDE[[0, 1, 1]], KEPT[[0, 0, 1, 2]])
    weighted = Columns(EDITED, GUIDE, KEPT, torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0, 1.0]))
    down, up, _ = Edit(twice).factors(WEIGHT)
    assert torch.allclose((up @ down).double(), change(weighted), atol=1e-5)
    assert not torch.allclose((up @ down).double(), change(Columns(EDITED, GUIDE, KEPT)), atol=1e-3)


def test_other_answers_than_those_of_guides():
    columns = Columns(EDITED, GUIDE, KEPT)
    down, up, _ = Edit(columns).towards(WEIGHT, GUIDE @ WEIGHT.T)
    assert torch.allclose((up @ down).double(), change(columns), atol=1e-5)
    down, up, _ = Edit(columns).towards(WEIGHT, EDITED @ WEIGHT.T)  # what it answers already
    assert (up @ down).abs().max() < 1e-5


def test_fewer_columns_with_the_same_objective():
    """Columns in another basis have the same solution; without the smallest directions it is nearly the same."""
    draw = torch.Generator().manual_seed(2)
    many, guides = (torch.randn(1, 5, generator=draw) + 0.05 * torch.randn(9, 5, generator=draw) for _ in range(2))
    columns = Columns(many, guides, KEPT, torch.rand(9, generator=draw) + 0.5)
    whole = Edit(columns)
    old = WEIGHT.double()
    exact = old @ whole.left @ whole.right
    same = Edit(columns.principal(9))
    assert torch.allclose(old @ same.left @ same.right, exact, atol=1e-9)
    few, one = Edit(columns.principal(2)), Edit(columns.principal(1))
    assert few.rank == 2 and one.rank == 1
    errors = [float((old @ edit.left @ edit.right - exact).norm() / exact.norm()) for edit in (few, one)]
    assert 1e-6 < errors[0] < 0.1 < 1 and errors[0] < errors[1]
    first = Edit(Columns(many[:2], guides[:2], KEPT))  # not the same as taking the first two
    assert (old @ first.left @ first.right - exact).norm() > 2 * errors[0] * exact.norm()


def test_many_columns_are_reduced_by_their_gram_matrix(monkeypatch):
    """The same states, up to their signs and half of the digits."""
    draw = torch.Generator().manual_seed(7)
    states, guides = (torch.randn(12, 5, generator=draw) for _ in range(2))
    weights = torch.rand(12, generator=draw) + 0.5
    (edit, guide) = principal_states(states, guides, weights, 4)
    monkeypatch.setattr(closed_form, "MOST_SVD", 5)
    (other, instead) = principal_states(states, guides, weights, 4)
    signs = (edit * other).sum(1, keepdim=True).sign()
    assert torch.allclose(edit, signs * other, atol=1e-6) and torch.allclose(guide, signs * instead, atol=1e-6)
    assert not torch.allclose(edit.abs().flip(0), other.abs(), atol=1e-2)


def test_one_map_after_another():
    one, two = Edit(Columns(EDITED, GUIDE, KEPT)), Edit(Columns(KEPT, GUIDE[[0, 0, 1]], EDITED))
    both, eye, old = one.then(two), torch.eye(5, dtype=torch.float64), WEIGHT.double()
    expected = old @ (eye + one.left @ one.right) @ (eye + two.left @ two.right) - old
    assert both.rank == 5  # of 2 + 3 columns
    assert torch.allclose(old @ both.left @ both.right, expected, atol=1e-9)
    down, up, _ = both.factors(WEIGHT)
    assert torch.allclose((up @ down).double(), expected, atol=1e-4)
    swapped = two.then(one)
    assert not torch.allclose(old @ swapped.left @ swapped.right, expected, atol=1e-2)


def test_factors_of_nearly_equal_columns_lose_nothing_in_fp32():
    """A name's padding is many nearly equal states: their plain factors would cancel each other."""
    draw = torch.Generator().manual_seed(1)
    many = EDITED[:1] + 1e-4 * torch.randn(20, 5, generator=draw)
    columns = Columns(many.double(), GUIDE[:1].double().expand(20, -1), KEPT.double(), ridge=1e-8)
    edit, weight = Edit(columns), WEIGHT.double()
    down, up, alpha = edit.factors(weight)
    assert edit.rank == alpha == 5 and down.shape == (5, 5)  # never above the width
    gram = columns.ridge * torch.eye(5, dtype=torch.float64) + many.double().T @ many.double()
    gram += KEPT.double().T @ KEPT.double()
    exact = torch.linalg.solve(gram, ((columns.guide - columns.edit) @ weight.T).T.matmul(many.double()).T).T
    assert ((up @ down).double() - exact).norm() < 1e-6 * exact.norm()
    plain = torch.linalg.solve(gram, many.double().T).T.float()
    shift = ((columns.guide - columns.edit) @ weight.T).T.float()
    assert ((shift @ plain).double() - exact).norm() > 1e-6 * exact.norm()


def test_a_ridge_that_float64_cannot_hold_is_refused():
    many = Columns(EDITED[:1].expand(3, -1) * 1e9, GUIDE[:1].expand(3, -1), KEPT[:0], ridge=1e-12)
    with pytest.raises(ErasureError, match="ridge=1e-12 is too small"):
        Edit(many)


def test_layers_of_another_width_are_refused():
    with pytest.raises(ErasureError, match="a layer with 7x4 weights does not read text states of 5 numbers"):
        Edit(Columns(EDITED, GUIDE, KEPT)).factors(WEIGHT[:, :4])


def test_an_edit_is_applied_for_a_while():
    module = torch.nn.Linear(5, 7)
    own = module.weight.data
    values, factors = own.clone(), Edit(Columns(EDITED, GUIDE, KEPT)).factors(own)
    with pytest.raises(KeyError), applied({"mid": module, "other": torch.nn.Linear(2, 2)}, {"mid": factors}):
        assert torch.allclose(module.weight, values + factors[1] @ factors[0])
        assert not torch.equal(module.weight, values)
        raise KeyError
    assert module.weight.data is own or torch.equal(module.weight, values)
    assert module.weight.data_ptr() == own.data_ptr()


def layers(*seeds: int) -> list[torch.Tensor]:
    return [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]


def test_a_smaller_rank_is_the_best_one_over_all_layers():
    """Against the singular values of the stacked answers; neither the first states nor plain truncation reaches it."""
    draw = torch.Generator().manual_seed(3)
    states, guides = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    edit, weights = Edit(Columns(states, guides, KEPT)), layers(4, 5, 6)
    gram = sum(weight.T @ weight for weight in weights)
    small, share = edit.truncated(2, gram, states)
    stacked = torch.cat(weights)
    wanted = stacked @ edit.left @ edit.right @ states.T
    values = torch.linalg.svdvals(wanted)
    error = (stacked @ small.left @ small.right @ states.T - wanted).norm()
    assert small.rank == 2 and float(error) == pytest.approx(float(values[2:].norm()), rel=1e-6)
    assert share == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-6)
    u, s, v = torch.linalg.svd(edit.left @ edit.right)
    plain = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    assert (stacked @ plain @ states.T - wanted).norm() > 1.01 * error


def test_a_smaller_rank_moves_no_state_further():
    draw = torch.Generator().manual_seed(3)
    states, guides = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    edit, weights = Edit(Columns(states, guides, KEPT)), torch.cat(layers(4, 5, 6))
    small, _ = edit.truncated(2, weights.T @ weights, states)
    others = torch.randn(50, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    before, after = ((others @ one.right.T @ one.left.T @ weights.T).norm(dim=1) for one in (edit, small))
    assert (after <= before * (1 + 1e-9)).all() and (after < 0.99 * before).any()


def test_a_rank_that_is_enough_changes_nothing():
    edit = Edit(Columns(EDITED, GUIDE, KEPT))
    same, share = edit.truncated(2, torch.eye(5, dtype=torch.float64), EDITED.double())
    assert same is edit and share == 1.0


def test_the_gram_matrix_of_the_readers():
    unet = torch.nn.ModuleDict(
        {"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(5, 7), "to_v": torch.nn.Linear(5, 3)})}
    )
    unet["attn1"] = torch.nn.ModuleDict({"to_k": torch.nn.Linear(5, 7)})
    stacked = readers(unet)
    assert stacked.shape == (10, 5) and torch.allclose(readers_gram(unet), stacked.T @ stacked)
    with pytest.raises(ErasureError, match="has no cross-attention"):
        readers_gram(torch.nn.Linear(2, 2))
