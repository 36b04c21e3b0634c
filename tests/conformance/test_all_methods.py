"""What every method keeps, of whatever kind: a new file in erasure/methods inherits these tests."""

from __future__ import annotations

import pytest
import torch

from erasure import erasing
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.guard_method import GuardMethod
from erasure.method import Method
from erasure.methods import find, names
from erasure.patch import Guard, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.conformance.quick import QUICK, changes, same, small, weights
from tests.conformance.sketches import METHODS, SKETCHES, those
from tests.tiny import tiny_pipeline


def test_the_methods_are_the_written_list():
    assert sorted([*QUICK, *SKETCHES]) == names()
    assert all(find(name) is cls for name, cls in METHODS.items())


@pytest.fixture(params=those(Method))
def method(request) -> str:
    return request.param


def test_erasing_gives_the_model_back_bit_for_bit(method):
    pipe = tiny_pipeline()
    before = weights(pipe)
    erase(pipe, "cat", method, progress=False, **small(method))
    assert same(before, weights(pipe))
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_saved_is_what_was_in_memory(method, tmp_path):
    patch = erase(tiny_pipeline(), "cat", method, out=tmp_path / "p.safetensors", progress=False, **small(method))
    read = Patch.load(tmp_path / "p.safetensors")
    assert same(changes(patch), changes(read))
    assert read.concepts[0]["name"] == "cat" and read.method == method and read.config == patch.config
    assert read.costs["seconds"] > 0
    assert ("precision" in read.config) == METHODS[method].CALLS_UNET  # recorded where it had an effect
    assert not (tmp_path / "p.safetensors.run").exists()


def test_the_patch_changes_pictures_and_unloading_restores_them(method):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    patch = erase(pipe, "cat", method, progress=False, **small(method))

    def picture():
        draw = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, generator=draw, output_type="latent").images

    base = picture()
    pipe.load_patch(patch)
    assert not torch.equal(base, picture())
    pipe.unload_patches()
    assert torch.equal(base, picture())
    assert not pipe.get_list_patches()
    pipe.load_patch(patch, strength=0.0)
    assert torch.equal(base, picture())


def test_wrong_base_is_refused(method):
    """A guard was made from no weights, and fits every base."""
    patch = erase(tiny_pipeline(), "cat", method, progress=False, **small(method))
    other = tiny_pipeline(ErasedStableDiffusionPipeline, seed=5)
    before = weights(other)
    if isinstance(patch.payload, Guard):
        other.load_patch(patch)
        assert same(before, weights(other))
        return
    with pytest.raises(ValueError, match="was made from"):
        other.load_patch(patch)
    assert same(before, weights(other))


def test_the_forecast_is_what_the_run_counts(method):
    pipe = tiny_pipeline()
    before = weights(pipe)
    settings = {key: value for key, value in small(method).items() if key != "ratio"}  # found by calls of the UNet
    forecast = plan(pipe, "cat", method, **settings)
    assert same(before, weights(pipe))
    costs = erase(pipe, "cat", method, progress=False, **settings).costs
    assert (forecast.F, forecast.B) == (costs["F"], costs["B"])
    if issubclass(METHODS[method], GuardMethod):
        assert costs["F"] == 0 == forecast.seconds and forecast.model_bytes == forecast.peak_bytes > 0
        assert "no weight changes" in forecast.text()
        return
    assert forecast.seconds > 0 and 0 < forecast.model_bytes < forecast.peak_bytes
    assert "modules" in forecast.text()


def test_several_concepts_make_one_patch(method):
    patch = erase(tiny_pipeline(), ["cat", "dog"], method, progress=False, **small(method))
    assert patch.names == ["cat", "dog"]
    alone = erase(tiny_pipeline(), "cat", method, progress=False, **small(method))
    assert not same(changes(patch), changes(alone))


def test_a_killed_run_is_resumed_as_itself_and_not_mixed_with_another(method, tmp_path, monkeypatch):
    straight = erase(tiny_pipeline(), "cat", method, seed=1, progress=False, **small(method))
    out, real, pipe = tmp_path / "p.safetensors", erasing.assemble, tiny_pipeline()
    before = weights(pipe)

    def killed(*arguments):
        raise KeyboardInterrupt

    options = {"out": out, "progress": False, **small(method)}
    monkeypatch.setattr(erasing, "assemble", killed)
    with pytest.raises(KeyboardInterrupt):
        erase(pipe, "cat", method, seed=1, **options)
    assert same(before, weights(pipe)) and not out.exists()
    monkeypatch.setattr(erasing, "assemble", real)
    with pytest.raises(ErasureError, match="other settings; it was left untouched"):
        erase(tiny_pipeline(), "dog", method, seed=1, **options)
    resumed = erase(pipe, "cat", method, seed=1, **options)
    assert same(changes(straight), changes(resumed)) and out.exists()
    assert [resumed.costs[key] for key in "FB"] == [straight.costs[key] for key in "FB"]
    assert not (tmp_path / "p.safetensors.run").exists()


def test_bad_settings_are_named_before_the_model_is_loaded(method):
    for run in (erase, plan):
        with pytest.raises(ErasureError, match="unknown config key 'nothing'"):
            run("no such model", "cat", method, nothing=1)


@pytest.mark.parametrize(
    ("option", "flag", "says"),
    [
        ({"preview_every": 2}, "PREVIEWS", "no intermediate results to draw"),
        ({"trackers": ["tensorboard"]}, "LOGS", "no training steps to log"),
        ({"precision": "bf16", "compile": True}, "CALLS_UNET", "so precision, compile would have no effect"),
    ],
)
def test_an_option_without_meaning_is_refused_before_the_model_is_loaded(method, option, flag, says, tmp_path):
    """`plan` takes neither previews nor trackers; what the options do where they have a meaning is tested elsewhere."""
    if not getattr(METHODS[method], flag):
        with pytest.raises(ErasureError, match=f"{method}: .*{says}.*nothing was changed"):
            erase("no such model", "cat", method, out=tmp_path / "p.safetensors", **option)
        assert not list(tmp_path.iterdir())
    if flag == "CALLS_UNET" and not METHODS[method].CALLS_UNET:
        with pytest.raises(ErasureError, match=says):
            plan("no such model", "cat", method, **option)


def test_previews_are_drawn_and_change_nothing(method, tmp_path):
    if not METHODS[method].PREVIEWS:
        return
    plain = erase(tiny_pipeline(), "cat", method, progress=False, **small(method))
    out, pipe = tmp_path / "p.safetensors", tiny_pipeline()
    before = weights(pipe)
    watched = erase(pipe, "cat", method, out=out, progress=False, preview_every=2, **small(method))
    drawn = sorted((tmp_path / "p.safetensors.previews").iterdir())
    assert len(drawn) >= 2 and drawn[0].name == "step-000000.png"
    assert drawn[0].read_bytes() != drawn[-1].read_bytes()
    assert same(changes(plain), changes(watched)) and plain.costs["F"] == watched.costs["F"]
    assert same(before, weights(pipe))
