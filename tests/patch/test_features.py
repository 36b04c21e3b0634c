"""The payload of features: what the file holds, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.errors import ErasureError
from erasure.patch import Features, Patch, read_header
from erasure.patch.loaders import as_it_is
from erasure.patch.ops.arithmetic import merge
from erasure.patch.ops.conflicts import conflicts
from tests.patch.making import features, features_patch


def test_saved_is_what_was_in_memory(tmp_path):
    patch = features_patch()
    path = patch.save(tmp_path / "p.safetensors")
    read = Patch.load(path)
    assert isinstance(read.payload, Features) and read.payload.to_json() == patch.payload.to_json()
    assert read.payload.digest == patch.payload.digest
    assert all(torch.equal(a, b) for a, b in zip(read.payload.tensors(), patch.payload.tensors(), strict=True))
    assert set(load_file(path)) == {f"features.{name}" for name in ("encoder", "bias", "decoder", "limits", "gains")}
    assert read.info()["features"]["about"] == {"of": 64} and read.info()["components"] == {}
    half = Patch.load(patch.save(tmp_path / "h.safetensors", dtype="bf16"))
    assert 0 < half.stored["dtype_error"] < 0.01 and half.payload.digest != patch.payload.digest


def test_it_scales_the_change_alone():
    payload = features()
    twice = payload.scaled(2.0)
    assert torch.equal(twice.gains, 2 * payload.gains) and torch.equal(twice.limits, payload.limits)
    assert torch.equal(twice.encoder, payload.encoder) and twice.digest != payload.digest


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"gains": torch.zeros(3, 2)}, "features.gains has the shape"),
        ({"limits": torch.zeros(2, 3)}, "features.limits has the shape"),
        ({"bias": torch.zeros(3)}, "features.bias has the shape"),
        ({"decoder": torch.zeros(2, 15)}, "features.decoder has the shape"),
        ({"encoder": torch.full((2, 16), float("nan"))}, "contains NaN"),
        ({"timesteps": (1.0, 1.0)}, "occurs twice"),
        ({"timesteps": (1.0, float("inf"))}, "finite numbers"),
        ({"component": "text_encoder"}, "of a block of unet or transformer"),
        ({"block": ""}, "must be the path"),
        ({"made_on": {}}, "at least one parameter"),
        ({"made_on": {"a.weight": [0]}}, "whole numbers above 0"),
        ({"about": {"x": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_bad_values_are_refused(changed, says):
    with pytest.raises(ErasureError, match=says):
        dataclasses.replace(features(), **changed)


def test_damaged_files_are_refused(tmp_path):
    path = features_patch().save(tmp_path / "p.safetensors")
    tensors, header = load_file(path), read_header(path)
    for lost in ("features.gains", "features.bias"):
        save_file({key: value for key, value in tensors.items() if key != lost}, tmp_path / "d.safetensors", header)
        with pytest.raises(ErasureError, match=f"tensor '{lost}' is missing"):
            Patch.load(tmp_path / "d.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "d.safetensors", header)
    with pytest.raises(ErasureError, match="unknown tensor 'more'"):
        Patch.load(tmp_path / "d.safetensors")
    for bad, says in (
        (header | {"erasure.features": "{}"}, "exactly the keys"),
        ({**header}, "lacks erasure.features"),
    ):
        if "lacks" in says:
            del bad["erasure.features"]
        save_file(tensors, tmp_path / "d.safetensors", bad)
        with pytest.raises(ErasureError, match=says):
            Patch.load(tmp_path / "d.safetensors")


def test_a_reader_that_does_not_know_the_kind_says_so(tmp_path):
    """As a version before this kind reads it: the format is 1, and the kind is unknown to it."""
    path = features_patch().save(tmp_path / "p.safetensors")
    header = read_header(path) | {"erasure.kind": "something-newer"}
    save_file(load_file(path), tmp_path / "n.safetensors", header)
    with pytest.raises(ErasureError, match="erasure.kind is 'something-newer', expected .*features"):
        Patch.load(tmp_path / "n.safetensors")


def test_it_changes_no_weight_and_says_what_cannot_be_done_with_it():
    patch = features_patch()
    assert patch.deltas("unet") == {} and conflicts([patch, patch]) == []
    with pytest.raises(ErasureError, match="features change no weight"):
        patch.payload.change("unet", "a.weight")
    with pytest.raises(ErasureError, match="holds features .* changes no weight"):
        merge([(patch, 1.0), (patch.scale(2.0), 1.0)])
    answers = as_it_is(patch)
    assert answers.pop("erasure") == "yes" and all(
        text.startswith("no: it holds features") for text in answers.values()
    )
