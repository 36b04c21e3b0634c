"""Gradients of an update: weights of forget samples, and gradient surgery, against formulas of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from erasure.errors import ErasureError
from erasure.training.objective import Objective, kept_from_hurting
from erasure.training.orthogonality import cosine
from erasure.training.reweighting import MEMORY, Reweighting, Samples

NO_SCALE = torch.amp.GradScaler("cpu", enabled=False)


def objective(**options) -> Objective:
    defaults = {"reweight": "none", "reweight_temperature": 1.0, "surgery": "none", "surgery_weight": 1.0}
    defaults |= {"RETAIN": ("retain",)}
    return Objective(SimpleNamespace(**{**defaults, **options}), 1000)


@pytest.fixture
def params() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (4,), "forget_only": (2,), "retain_only": (3,), "idle": (2,)}
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def terms(params, retain_sign: float = 1.0) -> dict[str, torch.Tensor]:
    """Terms that pull against each other in `a`, and agree in `b` a little."""
    a, b = params["a"], params["b"]
    return {
        "forget": (a**2).sum() + b.sum() + (params["forget_only"] ** 3).sum(),
        "other": 0.3 * (a[0] ** 3).sum(),
        "retain": retain_sign * (-2 * (a**2).sum() + 0.1 * b.sum() + params["retain_only"].sum()),
    }


def flat(gradients: dict, params) -> torch.Tensor:
    return torch.cat([gradients.get(name, torch.zeros_like(p)).detach().flatten() for name, p in params.items()])


def gradient(term, params) -> torch.Tensor:
    found = torch.autograd.grad(term, list(params.values()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params.values(), found, strict=True)]
    )


def after(own: Objective, found, params, scaler=NO_SCALE) -> torch.Tensor:
    own.backward(own.reduce(found), params, scaler)
    return flat({name: p.grad for name, p in params.items() if p.grad is not None}, params)


def test_without_options_the_gradient_is_that_of_the_sum(params):
    for param in params.values():
        param.grad = torch.ones_like(param)  # of an earlier update
    assert torch.allclose(after(objective(), terms(params), params), gradient(sum(terms(params).values()), params))


def test_surgery_takes_out_what_would_hurt_what_is_retained(params):
    forget = gradient(terms(params)["forget"] + terms(params)["other"], params)
    retain = gradient(terms(params)["retain"], params)
    assert forget @ retain < 0
    own = objective(surgery="first")
    found = after(own, terms(params), params)
    kept = forget - (forget @ retain) / (retain @ retain) * retain
    assert torch.allclose(found, retain + kept, atol=1e-5)
    assert abs(float((found - retain) @ retain)) < 1e-4  # to first order the forgetting step leaves the retain loss
    assert abs(own.figures["surgery/cosine"] - float(forget @ retain / forget.norm() / retain.norm())) < 1e-5
    wrong = {
        "added": retain + forget + (forget @ retain) / (retain @ retain) * retain,
        "of the retain gradient": forget + retain - (forget @ retain) / (forget @ forget) * forget,
        "with the cosine alone": retain + forget - (forget @ retain) / forget.norm() / retain.norm() ** 2 * retain,
        "none": forget + retain,
    }
    assert not [name for name, other in wrong.items() if torch.allclose(found, other, atol=1e-2)]


def test_the_projection_is_of_all_tensors_together_and_not_of_each():
    forget = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 2.0])}
    retain = {"a": torch.tensor([-3.0, 1.0]), "b": torch.tensor([0.0, 1.0])}
    found = kept_from_hurting(forget, retain)  # <g_f, g_r> = -3 + 2 = -1, ||g_r||^2 = 11
    assert torch.allclose(found["a"], torch.tensor([1 - 3 / 11, 1 / 11]))
    assert torch.allclose(found["b"], torch.tensor([0.0, 2 + 1 / 11]))


def test_gradients_that_agree_are_left_as_they_are(params):
    found = after(objective(surgery="first"), terms(params, retain_sign=-1.0), params)
    assert torch.allclose(found, gradient(sum(terms(params, retain_sign=-1.0).values()), params), atol=1e-5)


def test_a_retain_gradient_of_zero_protects_nothing(params):
    zero = {**terms(params), "retain": 0 * params["a"].sum()}
    found, own = after(objective(surgery="first"), zero, params), gradient(zero["forget"] + zero["other"], params)
    assert torch.allclose(found, own)
    forget, rounding = {"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([-1e-5, 0.0])}
    assert torch.equal(kept_from_hurting(forget, rounding)["a"], forget["a"])
    assert kept_from_hurting(forget, {"a": torch.tensor([-1e-3, 0.0])})["a"].tolist() == [0.0, 1.0]
    assert cosine({"a": torch.ones(2)}, {"a": torch.zeros(2)}) == 0


def test_a_loss_whose_settings_leave_nothing_to_retain_is_refused(params):
    with pytest.raises(ErasureError, match="surgery=first: with these settings nothing is retained"):
        after(objective(surgery="first"), {"forget": params["a"].sum()}, params)


def test_tensors_that_one_side_lacks_are_zero_in_it():
    found = kept_from_hurting({"a": torch.tensor([1.0])}, {"a": torch.tensor([-1.0]), "b": torch.tensor([1.0])})
    assert torch.allclose(found["a"], torch.tensor([0.5])) and torch.allclose(found["b"], torch.tensor([0.5]))


def test_surgery_is_the_same_at_any_scale_and_masks_hold_in_both_passes(params):
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    handle = params["a"].register_hook(lambda grad: grad * mask)
    own = objective(surgery="first")
    plain = after(own, terms(params), params)
    scaled = after(own, terms(params), params, torch.amp.GradScaler("cpu", init_scale=512.0))
    assert torch.allclose(scaled / 512, plain, rtol=1e-4, atol=1e-5)
    assert not params["a"].grad[mask == 0].any()
    handle.remove()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_gradient_is_that_of_the_weighted_mean_with_constant_weights(mode):
    x = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    own, t = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([50, 50, 50, 950])
    hidden = own * (x / x.detach())  # a way for gradients through the weights, which must not be taken
    found = after(objective(reweight=mode), {"forget": Samples(x**2, hidden, t)}, {"x": x})
    weights = Reweighting(1.0, 1000, None).weights(Samples(x, own, t)).detach()
    assert torch.allclose(found, weights * 2 * x.detach() / 4, rtol=1e-5)
    assert not torch.allclose(weights, torch.ones(4), atol=1e-2)
    assert torch.allclose(after(objective(), {"forget": Samples(x**2, own, t)}, {"x": x}), x.detach() / 2)


def test_a_checkpoint_holds_what_the_weights_depend_on():
    own = objective(reweight="dynamic")
    batch = Samples(torch.ones(2), torch.tensor([1.0, 2.0]), torch.tensor([50, 60]))
    own.reduce({"forget": batch})
    again = objective(reweight="dynamic")
    again.restore(own.tensors())
    assert torch.equal(own.reduce({"f": batch})["f"], again.reduce({"f": batch})["f"])
    assert not objective().tensors()
    assert (own.reweighting.memory, objective(reweight="static").reweighting.memory) == (MEMORY, None)
