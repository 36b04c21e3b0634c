"""The patch between two checkpoints: folders, shards, variants, pipelines, and pairs that cannot be compared."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.errors import ErasureError
from erasure.patch import Patch
from erasure.patch.ops.diff import Checkpoint, diff
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch
from tests.patch.making import delta_patch, gap, low_rank_patch
from tests.tiny import latents, tiny_pipeline, write_tiny

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, the same checkpoint with a patch of both components folded in, and the patch."""
    root = tmp_path_factory.mktemp("pair")
    pipe = tiny_pipeline()
    patch = low_rank_patch(pipe, components=("unet", "text_encoder"))
    write_tiny(root / "base")
    load_patch(pipe, patch)
    pipe.save_pretrained(root / "other")
    return root / "base", root / "other", patch


@pytest.fixture
def copies(folders, tmp_path):
    """Copies that a test may damage."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in folders[:2]]


def agrees(actual, patch, bound=1e-5):
    assert actual.components == patch.components
    for component in patch.components:
        expected, changes = patch.deltas(component), actual.deltas(component)
        assert changes.keys() == expected.keys()
        assert all(gap(changes[name], expected[name]) < bound for name in expected)
    return True


def test_the_difference_is_the_patch(folders, tmp_path):
    base, other, patch = folders
    difference = diff(base, other, ["van gogh"])
    assert agrees(difference, patch) and difference.base == str(base)
    assert difference.base_fingerprint == patch.base_fingerprint
    assert difference.config == {"operation": "diff", "other": str(other), "compared": ["unet", "text_encoder"]}
    back = Patch.load(difference.save(tmp_path / "p.safetensors"))
    pipe = ErasedStableDiffusionPipeline.from_pretrained(base)
    pipe.load_patch(back)
    expected = latents(ErasedStableDiffusionPipeline.from_pretrained(other), ["a cat"])
    assert gap(latents(pipe, ["a cat"]), expected) < 1e-4


def test_pipelines_serve_as_well(folders):
    base, other, patch = folders
    pipe = tiny_pipeline()
    load_patch(pipe, patch)
    assert agrees(diff(tiny_pipeline(), pipe, [{"name": "van gogh"}]), patch)
    with pytest.raises(ErasureError, match="active patches"):
        erased = tiny_pipeline(ErasedStableDiffusionPipeline)
        erased.load_patch(patch)
        diff(erased, base, ["x"])


def test_on_glyph(tmp_path):
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    patch = delta_patch(pipe, part="attn2.to_v", size=0.01)
    pipe.load_patch(patch)
    pipe.save_pretrained(tmp_path)
    difference = diff("glyph", tmp_path, ["cat"])
    assert difference.base == "glyph" and difference.base_fingerprint == patch.base_fingerprint
    assert agrees(difference, patch, 1e-4)


def test_shards_variants_and_the_old_prefix(folders, copies):
    base, other = copies
    whole = load_file(other / UNET)
    (other / UNET).unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, other / "unet" / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (other / f"{UNET}.index.json").write_text(json.dumps(index))
    text = load_file(other / "text_encoder" / "model.safetensors")
    old = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(12)
    (other / "text_encoder" / "model.safetensors").unlink()
    save_file(old, other / "text_encoder" / "model.fp16.safetensors")
    assert agrees(diff(base, other, ["x"]), folders[2])
    (other / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(ErasureError, match="not a file in the same folder"):
        diff(base, other, ["x"])


def test_a_cast_alone_is_no_change(folders, copies):
    base, other = copies
    whole = load_file(base / UNET)
    key = next(key for key in whole if key.endswith("to_k.weight"))
    half = {name: value.half() for name, value in whole.items()}
    half[key] = half[key] + 0.5
    save_file(half, other / UNET)
    forth = diff(base, other, ["x"], components=["unet"])
    assert forth.payload.names("unet") == [key]
    back = diff(other, base, ["x"], components=["unet"])
    assert back.payload.names("unet") == [key]


def test_only_the_chosen_components_are_compared(folders, copies):
    base, other = copies
    shutil.rmtree(other / "text_encoder")
    with pytest.raises(ErasureError, match="--component"):
        diff(base, other, ["x"])
    assert diff(base, other, ["x"], components=["unet"]).components == ["unet"]
    with pytest.raises(ErasureError, match="did you mean 'unet'"):
        diff(base, other, ["x"], components=["unt"])


def test_checkpoints_that_cannot_be_compared(folders, copies, tmp_path):
    base, other = copies
    with pytest.raises(ErasureError, match="have the same weights in unet"):
        diff(base, base, ["x"])
    with pytest.raises(ErasureError, match="no diffusers folder|not a diffusers folder"):
        diff(base, tmp_path, ["x"])
    with pytest.raises(ErasureError, match="concepts"):
        diff(base, other, [])
    whole = load_file(other / UNET)
    key = next(iter(whole))
    save_file({**whole, key: torch.full_like(whole[key], float("nan"))}, other / UNET)
    with pytest.raises(ErasureError, match="NaN"):
        diff(base, other, ["x"])
    save_file({**whole, key: torch.zeros(3)}, other / UNET)
    with pytest.raises(ErasureError, match=r"has the shape \[.*\] in .*base and \[3\]"):
        diff(base, other, ["x"])
    save_file({**whole, "more": torch.zeros(3)}, other / UNET)
    with pytest.raises(ErasureError, match="different architectures"):
        diff(base, other, ["x"])
    (other / UNET).write_bytes(b"12345678{}")
    with pytest.raises(ErasureError, match="cannot be read"):
        diff(base, other, ["x"])
    (other / UNET).rename(other / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ErasureError, match="pickles are not opened"):
        diff(base, other, ["x"])


def test_missing_names(folders):
    opened = Checkpoint.open(folders[0])
    with pytest.raises(ErasureError, match="has no unet.nothing"):
        opened.read("unet", "nothing")
    with pytest.raises(ErasureError, match="has no text_encoder_2"):
        opened.fingerprint("text_encoder_2", ["x"])
