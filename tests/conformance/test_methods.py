"""What every method keeps, found by discovery: a new file in erasure/methods inherits these."""

from __future__ import annotations

import pytest
import torch

from erasure.erasing import erase
from erasure.forecast import plan
from erasure.methods import names
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.training import loop as training
from tests.tiny import tiny_pipeline

# A small run of each method. The list is written by hand, so that a lost method turns the suite red.
SMALL = {"iterations": 4, "batch_size": 2, "trajectories": 2, "sample_steps": 3}
QUICK = {
    "advunlearn": {
        **SMALL,
        "retain_trajectories": 3,
        "retain_sample_steps": 2,
        "retain_batch_size": 2,
        "attack_steps": 2,
        "attack_init": "latest",
        "warm_up": 1,
        "learning_rate": 1e-2,
    },
    "esd": {**SMALL, "learning_rate": 1e-3},
    "salun": {
        "iterations": 4,
        "batch_size": 2,
        "forget_count": 3,
        "retain_count": 3,
        "sample_steps": 2,
        "learning_rate": 1e-3,
    },
    "spm": {**SMALL, "learning_rate": 1e-2, "refresh": 2},
    "unguide": {**SMALL, "learning_rate": 1e-2, "weight_off": 0.0, "repeats": 2},
}


def test_the_methods_are_the_written_list():
    assert sorted(QUICK) == names()


@pytest.fixture(params=sorted(QUICK))
def method(request) -> str:
    return request.param


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def changes(patch: Patch) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": patch.payload.change(part, name)
        for part in patch.payload.components
        for name in patch.payload.names(part)
    }


def test_erasing_gives_the_model_back_bit_for_bit(method):
    pipe = tiny_pipeline()
    before = weights(pipe)
    erase(pipe, "cat", method, progress=False, **QUICK[method])
    assert same(before, weights(pipe))
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(method):
    one, two = (erase(tiny_pipeline(), "cat", method, seed=1, progress=False, **QUICK[method]) for _ in range(2))
    three = erase(tiny_pipeline(), "cat", method, seed=2, progress=False, **QUICK[method])
    assert same(changes(one), changes(two))
    assert not same(changes(one), changes(three))


def test_saved_is_what_was_in_memory(method, tmp_path):
    patch = erase(tiny_pipeline(), "cat", method, out=tmp_path / "p.safetensors", progress=False, **QUICK[method])
    read = Patch.load(tmp_path / "p.safetensors")
    assert same(changes(patch), changes(read))
    assert read.concepts[0]["name"] == "cat" and read.method == method and read.config == patch.config
    assert read.costs["F"] > 0
    assert not (tmp_path / "p.safetensors.run").exists()


def test_killed_and_resumed_is_the_straight_run(method, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    straight = erase(tiny_pipeline(), "cat", method, progress=False, **QUICK[method])
    real = training._write

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    out = tmp_path / "p.safetensors"
    pipe = tiny_pipeline()
    before = weights(pipe)
    monkeypatch.setattr(training, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        erase(pipe, "cat", method, out=out, progress=False, **QUICK[method])
    assert not out.exists() and (tmp_path / "p.safetensors.run" / "state.safetensors").exists()
    assert same(before, weights(pipe))
    monkeypatch.setattr(training, "_write", real)
    resumed = erase(pipe, "cat", method, out=out, progress=False, **QUICK[method])
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
        erase(tiny_pipeline(), "cat", method, out=out, progress=False, **QUICK[method])
    with pytest.raises(ValueError, match="other settings"):
        erase(tiny_pipeline(), "cat", method, out=out, progress=False, seed=9, **QUICK[method])


def test_the_patch_changes_pictures_and_unloading_restores_them(method):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    patch = erase(pipe, "cat", method, progress=False, **QUICK[method])

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
    patch = erase(tiny_pipeline(), "cat", method, progress=False, **QUICK[method])
    other = tiny_pipeline(ErasedStableDiffusionPipeline, seed=5)
    before = weights(other)
    with pytest.raises(ValueError, match="was made from"):
        other.load_patch(patch)
    assert same(before, weights(other))


def test_the_forecast_is_what_the_run_counts(method):
    pipe = tiny_pipeline()
    before = weights(pipe)
    forecast = plan(pipe, "cat", method, **QUICK[method])
    assert same(before, weights(pipe))
    costs = erase(pipe, "cat", method, progress=False, **QUICK[method]).costs
    assert (forecast.F, forecast.B) == (costs["F"], costs["B"])
    assert forecast.seconds > 0 and forecast.training_bytes > 0 and forecast.activation_bytes > 0


def test_several_concepts_make_one_patch(method):
    patch = erase(tiny_pipeline(), ["cat", "dog"], method, progress=False, **QUICK[method])
    assert patch.names == ["cat", "dog"]


def test_previews_are_drawn_and_change_nothing(method, tmp_path):
    plain = erase(tiny_pipeline(), "cat", method, progress=False, **QUICK[method])
    out = tmp_path / "p.safetensors"
    watched = erase(tiny_pipeline(), "cat", method, out=out, progress=False, preview_every=2, **QUICK[method])
    drawn = sorted(path.name for path in (tmp_path / "p.safetensors.previews").iterdir())
    assert drawn[:2] == ["step-000000.png", "step-000002.png"]
    assert same(changes(plain), changes(watched)) and plain.costs["F"] == watched.costs["F"]
