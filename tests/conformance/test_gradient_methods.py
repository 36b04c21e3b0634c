"""What every method that trains keeps: resume after a kill, previews that change nothing, counted UNet calls."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from erasure.forecast import plan
from erasure.method import GradientMethod
from erasure.methods import find
from erasure.training import loop as training
from tests.conformance.quick import QUICK, changes, same, small, weights
from tests.tiny import tiny_pipeline


@pytest.fixture(params=[name for name in sorted(QUICK) if issubclass(find(name), GradientMethod)])
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


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(method, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    out = tmp_path / "p.safetensors"
    real = training._write

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        erase(tiny_pipeline(), "cat", method, out=out, progress=False, **small(method))
    with pytest.raises(ValueError, match="other settings"):
        erase(tiny_pipeline(), "cat", method, out=out, progress=False, seed=9, **small(method))


def test_previews_are_drawn_and_change_nothing(method, tmp_path):
    plain = erase(tiny_pipeline(), "cat", method, progress=False, **small(method))
    out = tmp_path / "p.safetensors"
    watched = erase(tiny_pipeline(), "cat", method, out=out, progress=False, preview_every=2, **small(method))
    drawn = sorted(path.name for path in (tmp_path / "p.safetensors.previews").iterdir())
    assert drawn[:2] == ["step-000000.png", "step-000002.png"]
    assert same(changes(plain), changes(watched)) and plain.costs["F"] == watched.costs["F"]


def test_its_calls_of_the_unet_are_counted(method):
    costs = erase(tiny_pipeline(), "cat", method, progress=False, **small(method)).costs
    assert costs["F"] > costs["B"] > 0
    assert plan(tiny_pipeline(), "cat", method, **small(method)).activation_bytes > 0
