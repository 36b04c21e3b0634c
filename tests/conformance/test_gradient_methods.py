"""What every method that trains keeps: resume after a kill, previews in the course of training, counted UNet calls."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from erasure.forecast import plan
from erasure.method import GradientMethod
from erasure.training import loop as training
from tests.conformance.quick import changes, same, small, weights
from tests.conformance.sketches import those
from tests.tiny import tiny_pipeline


@pytest.fixture(params=those(GradientMethod))
def method(request) -> str:
    return request.param


def test_killed_and_resumed_is_the_straight_run(method, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    straight = erase(tiny_pipeline(), "cat", method, progress=False, **small(method))
    real = training._write

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    out = tmp_path / "p.safetensors"
    pipe = tiny_pipeline()
    before = weights(pipe)
    monkeypatch.setattr(training, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        erase(pipe, "cat", method, out=out, progress=False, **small(method))
    assert not out.exists() and (tmp_path / "p.safetensors.run" / "state.safetensors").exists()
    assert same(before, weights(pipe))
    monkeypatch.setattr(training, "_write", real)
    resumed = erase(pipe, "cat", method, out=out, progress=False, **small(method))
    assert same(changes(straight), changes(resumed))
    assert resumed.costs["F"] == straight.costs["F"] and resumed.costs["B"] == straight.costs["B"]


def test_previews_are_drawn_as_often_as_asked(method, tmp_path):
    erase(
        tiny_pipeline(),
        "cat",
        method,
        out=tmp_path / "p.safetensors",
        progress=False,
        preview_every=2,
        **{**small(method), "iterations": 3},
    )
    drawn = sorted(path.name for path in (tmp_path / "p.safetensors.previews").iterdir())
    assert drawn == ["step-000000.png", "step-000002.png"]


def test_its_calls_of_the_unet_are_counted_and_its_parts_forecast(method):
    costs = erase(tiny_pipeline(), "cat", method, progress=False, **small(method)).costs
    assert costs["F"] > costs["B"] > 0
    forecast = plan(tiny_pipeline(), "cat", method, **small(method))
    assert forecast.activation_bytes > 0 and forecast.training_bytes > 0
    assert forecast.modules > 0 and forecast.weights > 0
