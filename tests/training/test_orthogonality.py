"""UNO's term against quadratics, whose Hessians and right angles are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from erasure.training.objective import Objective, kernels

NO_SCALE = torch.amp.GradScaler("cpu", enabled=False)
SPLIT = (3, 2, 4)  # numbers of the tensors: of both losses, of the forgetting one alone, of the retaining one alone


def objective(weight: float) -> Objective:
    options = {"reweight": "none", "reweight_temperature": 1.0, "surgery": "uno", "surgery_weight": weight}
    return Objective(SimpleNamespace(**options, RETAIN=("retain",)), 1000)


class Quadratic:
    """L(x) = 1/2 x' H x - b' x of some of the numbers, all others have no part in it."""

    def __init__(self, seed: int, used: list[int]) -> None:
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.zeros(sum(SPLIT), dtype=torch.float64)
        chosen[used] = 1
        root = torch.randn(sum(SPLIT), sum(SPLIT), generator=draw, dtype=torch.float64)
        self.H = torch.outer(chosen, chosen) * (root @ root.T / 4 + torch.eye(sum(SPLIT), dtype=torch.float64))
        self.b = chosen * torch.randn(sum(SPLIT), generator=draw, dtype=torch.float64)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.H @ x / 2 - self.b @ x

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        return self.H @ x - self.b


both, forgets, retains = (list(part) for part in torch.arange(sum(SPLIT)).split(SPLIT))
FORGET = Quadratic(1, [int(i) for i in (*both, *forgets)])
RETAIN = Quadratic(2, [int(i) for i in (*both, *retains)])


def squared_cosine(x: torch.Tensor) -> torch.Tensor:
    f, r = FORGET.gradient(x), RETAIN.gradient(x)
    return (f @ r) ** 2 / (f @ f) / (r @ r)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(sum(SPLIT), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def parts(x: torch.Tensor) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(part.clone()) for name, part in zip("abc", x.split(SPLIT), strict=True)}


def terms(params) -> dict[str, torch.Tensor]:
    """Both losses, of which each leaves one tensor alone."""
    a, b, c = params.values()
    zero = [torch.zeros_like(value) for value in (a, b, c)]
    return {
        "forget": FORGET.loss(torch.cat([a, b, zero[2]])),
        "retain": RETAIN.loss(torch.cat([a, zero[1], c])),
    }


def after(own: Objective, params, found=None, scaler=NO_SCALE) -> torch.Tensor:
    own.backward(own.reduce(found or terms(params)), params, scaler)
    return torch.cat([param.grad.detach().flatten() for param in params.values()])


def test_the_gradient_is_that_of_the_sum_and_of_the_squared_cosine(x):
    """By the Hessians, by differences, and next to formulas that are nearly right."""
    weight, own = 3.0, objective(3.0)
    found = after(own, parts(x)) - FORGET.gradient(x) - RETAIN.gradient(x)
    step = 1e-5 * torch.eye(len(x), dtype=torch.float64)
    differences = torch.stack([squared_cosine(x + e) - squared_cosine(x - e) for e in step]) / 2e-5
    assert torch.allclose(found, weight * differences, atol=1e-7)
    f, r = FORGET.gradient(x), RETAIN.gradient(x)
    c = f @ r / f.norm() / r.norm()
    u_f, u_r = (r / r.norm() - c * f / f.norm()) / f.norm(), (f / f.norm() - c * r / r.norm()) / r.norm()
    assert torch.allclose(found, weight * 2 * c * (FORGET.H @ u_f + RETAIN.H @ u_r), atol=1e-10)
    assert own.figures["surgery/cosine"] == pytest.approx(float(c)) and abs(c) > 0.05
    wrong = {
        "the cosine, not its square": weight * (FORGET.H @ u_f + RETAIN.H @ u_r),
        "the forgetting side alone": weight * 2 * c * FORGET.H @ u_f,
        "the retaining side alone": weight * 2 * c * RETAIN.H @ u_r,
        "lengths held constant": weight * 2 * c * (FORGET.H @ r + RETAIN.H @ f) / f.norm() / r.norm(),
        "no Hessian": weight * 2 * c * (u_f + u_r),
        "downwards": -weight * differences,
    }
    assert not [name for name, other in wrong.items() if torch.allclose(found, other, rtol=1e-2, atol=1e-4)]


def test_the_term_alone_leads_to_a_right_angle():
    """Two wells: their gradients stand at right angles on the circle over the line between them (Thales)."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    for start in ([0.3, 0.4], [1.2, 1.1]):  # inside, where both pull apart, and outside, where they agree
        params = {"x": nn.Parameter(torch.tensor(start))}
        for _ in range(300):
            found = {name: ((params["x"] - at) ** 2).sum() / 2 for name, at in (("forget", one), ("retain", other))}
            total = after(objective(1.0), params, found)
            plain = sum((params["x"].detach() - at for at in (one, other)), torch.zeros(2))
            params["x"].data -= 0.1 * (total - plain)
        assert float(params["x"].detach().norm()) == pytest.approx(1, abs=1e-3)
        assert torch.allclose(total, plain, atol=1e-3)  # there the term has nothing to do


def test_it_is_the_same_at_any_scale_and_masks_hold_in_both_passes(x):
    params, mask = parts(x), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    handle = params["a"].register_hook(lambda gradient: gradient * mask)
    plain = after(objective(3.0), params)
    scaled = after(objective(3.0), params, scaler=torch.amp.GradScaler("cpu", init_scale=512.0))
    assert torch.allclose(scaled / 512, plain, atol=1e-9)
    whole = torch.ones_like(x)
    whole[1] = 0
    f, r = whole * FORGET.gradient(x), whole * RETAIN.gradient(x)
    c = f @ r / f.norm() / r.norm()
    u_f, u_r = (r / r.norm() - c * f / f.norm()) / f.norm(), (f / f.norm() - c * r / r.norm()) / r.norm()
    wanted = f + r + 3 * 2 * c * whole * (FORGET.H @ (whole * u_f) + RETAIN.H @ (whole * u_r))
    assert plain[1] == 0 and torch.allclose(plain, wanted, atol=1e-9)
    handle.remove()


def test_where_nothing_is_retained_yet_there_is_no_angle():
    """The retain loss is at its minimum, as before the first update of most methods."""
    params = {"x": nn.Parameter(torch.tensor([0.5, -0.5]))}
    for away in (0.0, 1e-6):
        at = params["x"].detach() + away
        found = {"forget": (params["x"] ** 2).sum(), "retain": ((params["x"] - at) ** 2).sum()}
        assert torch.allclose(after(objective(1e3), params, found), torch.tensor([1.0, -1.0]), atol=1e-5)


def test_attention_can_be_differentiated_twice_inside_and_nothing_is_computed_otherwise():
    param = nn.Parameter(torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)))

    def second(surgery: str) -> torch.Tensor:
        with kernels(SimpleNamespace(surgery=surgery)):
            (first,) = torch.autograd.grad(
                scaled_dot_product_attention(param, param, param).square().sum(), param, create_graph=True
            )
            return torch.autograd.grad(first.square().sum(), param)[0]

    assert torch.isfinite(second("uno")).all()
    with pytest.raises(RuntimeError, match="derivative"):
        second("first")


def test_gradients_of_an_update_are_free_of_graphs(x):
    params = parts(x)
    after(objective(3.0), params)
    assert not any(param.grad.requires_grad for param in params.values())
