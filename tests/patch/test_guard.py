"""The payload without tensors: what the file holds, what it refuses, and what the operations on patches make of it."""

from __future__ import annotations

import pytest

from erasure.errors import ErasureError
from erasure.patch import Guard, Patch
from erasure.patch.ops.conflicts import conflicts
from erasure.patch.safetensors_io import read_layout, write_file
from tests.patch.making import low_rank_patch
from tests.tiny import tiny_pipeline

SETTINGS = {"size": 2.0, "name": "x", "on": True}


def guard(**changes) -> Guard:
    return Guard(**{"form": "guidance", "texts": ("a cat", "café"), "settings": SETTINGS, **changes})


def patch(**changes) -> Patch:
    return Patch(payload=guard(**changes), method="test", concepts=[{"name": "cat"}])


def test_the_file_holds_texts_and_settings_and_no_tensors(tmp_path):
    file = patch(scale=0.5).save(tmp_path / "p.safetensors")
    layout, read = read_layout(file), Patch.load(file)
    assert (
        layout.entries == {} and layout.metadata["erasure.kind"] == "guard" and layout.metadata["erasure.format"] == "1"
    )
    assert read.payload.to_json() == guard(scale=0.5).to_json() == read.info()["guard"]
    assert read.payload.digest == guard(scale=0.5).digest != guard().digest
    assert read.components == [] and read.info()["tensors"] == 0 and read.info()["rank"] is None
    assert read.deltas("unet") == {}


def test_every_text_setting_and_factor_is_part_of_its_identity():
    changes = [{"form": "other"}, {"texts": ("a cat",)}, {"settings": {**SETTINGS, "size": 2.5}}, {"scale": 2.0}]
    assert len({guard(**change).digest for change in [{}, *changes]}) == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"form": ""}, "form of a guard"),
        ({"texts": ()}, "at least one text"),
        ({"texts": ("cat", " ")}, "no empty ones"),
        ({"texts": "cat"}, "a list of"),
        ({"texts": ("x" * 10_001,)}, "10,001 characters"),
        ({"settings": {"size": float("nan")}}, "cannot be written as JSON"),
        ({"settings": {"size": object()}}, "cannot be written as JSON"),
        ({"settings": [1]}, "must map names to values"),
        ({"scale": float("inf")}, "finite number"),
        ({"scale": True}, "finite number"),
    ],
)
def test_bad_values_are_named(change, says):
    with pytest.raises(ErasureError, match=says):
        guard(**change)


def damaged(tmp_path, change, tensors=None):
    """The file of a guard with other header strings, without its digest."""
    file = patch().save(tmp_path / "p.safetensors")
    metadata = {key: text for key, text in read_layout(file).metadata.items() if key != "erasure.digest"}
    return write_file(tmp_path / "q.safetensors", tensors or {}, change(metadata))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "lacks erasure.guard"),
        ("[]", "JSON list, expected dict"),
        ("{}", "exactly the keys form, scale, settings, texts"),
        ('{"form": "a", "texts": ["b"], "settings": {}, "scale": 1, "more": 1}', "check 'more'"),
        ('{"form": "a", "texts": [1], "settings": {}, "scale": 1}', "at least one text"),
        ('{"form": "a", "texts": ["b"], "settings": {}, "scale": "1"}', "finite number"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, value, says):
    def change(metadata):
        rest = {key: text for key, text in metadata.items() if key != "erasure.guard"}
        return rest if value is None else {**rest, "erasure.guard": value}

    with pytest.raises(ErasureError, match=says):
        Patch.load(damaged(tmp_path, change))


def test_tensors_beside_a_guard_are_refused(tmp_path):
    import torch

    with pytest.raises(ErasureError, match="unknown tensor 'x': a guard holds no tensors"):
        Patch.load(damaged(tmp_path, lambda metadata: metadata, {"x": torch.zeros(1)}))


def test_an_edited_text_does_not_match_the_digest(tmp_path):
    file = patch().save(tmp_path / "p.safetensors")
    metadata = read_layout(file).metadata
    metadata["erasure.guard"] = metadata["erasure.guard"].replace("a cat", "a dog")
    with pytest.raises(ErasureError, match="digest"):
        Patch.load(write_file(tmp_path / "q.safetensors", {}, metadata))


def test_scaling_keeps_the_rest_and_nothing_overlaps():
    scaled = patch().scale(-2.0)
    assert scaled.payload.scale == -2.0 and scaled.payload.texts == guard().texts
    assert conflicts([scaled, low_rank_patch(tiny_pipeline())]) == []
    with pytest.raises(ErasureError, match="no change of unet.x"):
        scaled.payload.change("unet", "x")
