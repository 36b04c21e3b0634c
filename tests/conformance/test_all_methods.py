"""What every method keeps, found by discovery: a new file in erasure/methods inherits these."""

from __future__ import annotations

import pytest
import torch

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods import find, names
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.conformance.quick import QUICK, SKETCH, changes, same, small, weights
from tests.tiny import tiny_pipeline


def test_the_methods_are_the_written_list():
    assert sorted([*QUICK, SKETCH]) == names()


@pytest.fixture(params=sorted([*QUICK, SKETCH]))
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
    patch = erase(tiny_pipeline(), "cat", method, progress=False, **small(method))
    other = tiny_pipeline(ErasedStableDiffusionPipeline, seed=5)
    before = weights(other)
    with pytest.raises(ValueError, match="was made from"):
        other.load_patch(patch)
    assert same(before, weights(other))


def test_the_forecast_is_what_the_run_counts(method):
    pipe = tiny_pipeline()
    before = weights(pipe)
    forecast = plan(pipe, "cat", method, **small(method))
    assert same(before, weights(pipe))
    costs = erase(pipe, "cat", method, progress=False, **small(method)).costs
    assert (forecast.F, forecast.B) == (costs["F"], costs["B"])
    assert forecast.seconds > 0 and forecast.model_bytes > 0 and forecast.training_bytes > 0
    assert forecast.modules > 0 and forecast.weights > 0 and "modules" in forecast.text()


def test_several_concepts_make_one_patch(method):
    patch = erase(tiny_pipeline(), ["cat", "dog"], method, progress=False, **small(method))
    assert patch.names == ["cat", "dog"]


def test_the_same_run_gives_the_same_patch(method):
    one, two = (erase(tiny_pipeline(), "cat", method, seed=1, progress=False, **small(method)) for _ in range(2))
    assert same(changes(one), changes(two))


def test_bad_settings_are_named_before_the_model_is_loaded(method):
    with pytest.raises(ErasureError, match="unknown config key 'nothing'"):
        erase("no such model", "cat", method, nothing=1)


def test_previews_and_logs_are_made_or_refused_and_never_ignored(method, tmp_path):
    out = tmp_path / "p.safetensors"
    options = {"out": out, "progress": False, **small(method)}
    if find(method).WATCHED:
        erase(tiny_pipeline(), "cat", method, preview_every=2, **options)
        assert list((tmp_path / "p.safetensors.previews").iterdir())
        return
    for asked in ({"preview_every": 2}, {"trackers": ["tensorboard"]}):
        with pytest.raises(ErasureError, match="no training steps"):
            erase("no such model", "cat", method, **asked, **options)
    assert not out.exists()
