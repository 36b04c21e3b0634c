"""What every closed form keeps: no UNet call, exact low-rank factors, a measured time, a forecast from one solve."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.method import ClosedFormMethod
from erasure.methods import configured
from erasure.model.base import Base
from tests.conformance.quick import changes, same, small, weights
from tests.conformance.sketches import METHODS, those
from tests.tiny import tiny_pipeline, tiny_unet


@pytest.fixture(params=those(ClosedFormMethod))
def method(request) -> str:
    return request.param


def test_the_unet_is_never_called_and_the_time_is_measured(method, monkeypatch):
    pipe = tiny_pipeline()

    def called(*arguments, **named):
        raise AssertionError("the UNet was called")

    monkeypatch.setattr(pipe.unet, "forward", called)
    costs = erase(pipe, "cat", method, progress=False, **small(method)).costs
    assert (costs["F"], costs["B"]) == (0, 0) and costs["seconds"] > 0
    forecast = plan(pipe, "cat", method, **small(method))
    assert (forecast.F, forecast.B, forecast.activation_bytes) == (0, 0, 0) and forecast.seconds > 0
    assert "activations" not in forecast.text()


@pytest.mark.parametrize(
    "method", [name for name in those(ClosedFormMethod) if METHODS[name].edit is ClosedFormMethod.edit]
)
def test_the_change_is_the_minimum_of_the_objective_on_the_real_layers(method):
    """Against the normal equations, solved densely for each layer; other closed forms have tests of their own."""
    base = Base("tiny", tiny_pipeline())
    (concept,) = Concept.list_of("cat")
    built = configured(method, [concept], small(method))
    columns = built.columns(base, [concept])
    payload = erase(base, "cat", method, progress=False, **small(method)).payload
    modules = built.modules(base)
    assert payload.names("unet") == sorted(f"{path}.weight" for path in modules)
    assert payload.kind == "low-rank" and payload.ranks == [len(columns.edit)]
    edit, guide, keep = (states.double() for states in (columns.edit, columns.guide, columns.keep))
    weighted = torch.as_tensor(columns.edit_weight) * edit.T
    gram = columns.ridge * torch.eye(edit.shape[1], dtype=torch.float64)
    gram += weighted @ edit + columns.keep_weight * keep.T @ keep
    for path, module in modules.items():
        old = module.weight.detach().double()
        new = columns.ridge * old + old @ (weighted @ guide).T + columns.keep_weight * old @ keep.T @ keep
        expected = torch.linalg.solve(gram, new.T).T - old
        assert torch.allclose(payload.change("unet", f"{path}.weight").double(), expected, atol=1e-6)
        assert not torch.allclose(-payload.change("unet", f"{path}.weight").double(), expected, atol=1e-3)


def test_half_precision_weights_are_read_as_they_are(method, tmp_path):
    """No layer of the UNet is cast, but for previews: a checkpoint in half precision is not held twice."""
    pipe = tiny_pipeline()
    pipe.unet.to(torch.float16)
    before, kinds = weights(pipe), []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda *_: kinds.append(pipe.unet.dtype))
    patch = erase(pipe, "cat", method, progress=False, **small(method))
    hook.remove()
    assert same(before, weights(pipe)) and set(kinds) == {torch.float16}
    assert "precision" not in patch.config
    assert "in fp16" in plan(pipe, "cat", method, **small(method)).text()
    drawn = erase(pipe, "cat", method, out=tmp_path / "p", progress=False, preview_every=1, **small(method))
    assert same(changes(patch), changes(drawn)) and same(before, weights(pipe))
    names = sorted(path.name for path in (tmp_path / "p.previews").iterdir())
    assert names == ["step-000000.png", "step-000001.png"]


def test_a_unet_without_weights_is_forecast_and_a_text_encoder_without_weights_is_refused(method):
    known, pipe = plan(tiny_pipeline(), "cat", method, **small(method)), tiny_pipeline()
    with torch.device("meta"):
        pipe.unet = tiny_unet()
    assert plan(pipe, "cat", method, **small(method)).to_json() == {**known.to_json(), "seconds": 0}
    pipe.text_encoder.to("meta")
    with pytest.raises(ErasureError, match="text encoder, which has no weights"):
        plan(pipe, "cat", method, **small(method))
    with pytest.raises(ErasureError, match="tokenizer"):
        plan(Base("bare", SimpleNamespace(unet=pipe.unet)), "cat", method, **small(method))


def test_layers_that_read_no_text_are_refused_and_nothing_is_changed(method, monkeypatch):
    pipe = tiny_pipeline()
    before = weights(pipe)
    monkeypatch.setattr(METHODS[method], "modules", lambda self, base: base.targets("selfattn"))
    with pytest.raises(ErasureError, match="does not read text states of 32 numbers.*cross-attention"):
        erase(pipe, "cat", method, progress=False, **small(method))
    assert same(before, weights(pipe))
