"""A pipeline that is written as one file under the original names loads as the same pipeline."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from erasure.errors import ErasureError
from erasure.formats.single_file import save_single_file
from erasure.model.base import Base
from erasure.model.single_file import HEADER
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import KINDS, tiny_pipeline, write_tiny


def pictures(pipe, prompts=("a cat", "van gogh"), steps=2):
    pipe.set_progress_bar_config(disable=True)
    draw = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(list(prompts), num_inference_steps=steps, generator=draw, output_type="np").images


def erased(kind):
    cls = ErasedStableDiffusionXLPipeline if kind == "sdxl" else ErasedStableDiffusionPipeline
    return tiny_pipeline(cls, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_pipeline_generates_the_same_images_bit_for_bit(tmp_path, kind):
    pipe = erased(kind)
    path = save_single_file(pipe, tmp_path / "model.safetensors")
    base = Base.load(path, device="cpu")
    assert (pictures(base.pipe) == pictures(pipe)).all() and "by its header" in base.about
    assert base.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    assert type(base.scheduler) is type(pipe.scheduler)
    assert type(base.pipe).__name__ == type(pipe).__name__.removeprefix("Erased")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipe, part):
            written, loaded = getattr(pipe, part).state_dict(), getattr(base.pipe, part).state_dict()
            assert written.keys() == loaded.keys() and all(torch.equal(written[name], loaded[name]) for name in written)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.prediction_type"] == ("v" if kind == "sd2-v" else "epsilon")
    assert str(tmp_path) not in json.dumps(header)


def test_glyph_as_a_single_file(tmp_path):
    glyph = Base.load("glyph", device="cpu")
    path = save_single_file(glyph.pipe, tmp_path / "glyph.safetensors")
    again = Base.load(path, device="cpu").pipe
    prompts = ["a cat in blueprint style", "a church"]
    assert (pictures(again, prompts) == pictures(glyph.pipe, prompts)).all()
    # A file that has lost its header (merging in A1111 drops it) loads with the configurations of a folder.
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), tmp_path / "bare.safetensors")
    with pytest.raises(ErasureError, match="text states of width 128"):
        Base.load(tmp_path / "bare.safetensors")
    bare = Base.load(tmp_path / "bare.safetensors", device="cpu", config=glyph.pipe.config._name_or_path).pipe
    assert (pictures(bare, prompts) == pictures(glyph.pipe, prompts)).all()


def test_folded_patches_are_written_and_gated_ones_refused(tmp_path):
    pipe = erased("sd1")
    plain = pictures(pipe)
    pipe.load_patch(delta_patch(pipe), name="all")
    changed = pictures(pipe)
    path = save_single_file(pipe, tmp_path / "erased.safetensors")
    assert (pictures(Base.load(path, device="cpu").pipe) == changed).all() and not (plain == changed).all()
    pipe.unload_patches()
    pipe.load_patch(low_rank_patch(pipe, gate={"kind": "text", "texts": ["cat"]}), name="gated")
    with pytest.raises(ErasureError, match="gated: gated, .*Nothing was written"):
        save_single_file(pipe, tmp_path / "gated.safetensors")
    assert not (tmp_path / "gated.safetensors").exists()
    pipe.fuse_patches()
    save_single_file(pipe, tmp_path / "gated.safetensors")


def test_the_dtype_of_the_weights(tmp_path):
    pipe = erased("sdxl")
    path = save_single_file(pipe, tmp_path / "half.safetensors", dtype="fp16")
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    reloaded = Base.load(path, device="cpu").pipe
    assert reloaded.unet.dtype == torch.float32
    assert torch.equal(reloaded.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())
    with pytest.raises(ErasureError, match="unknown dtype 'fp8'"):
        save_single_file(pipe, tmp_path / "x.safetensors", dtype="fp8")


def test_existing_files_are_kept_and_missing_weights_reported(tmp_path):
    pipe = erased("sd1")
    path = save_single_file(pipe, tmp_path / "model.safetensors")
    with pytest.raises(ErasureError, match="already exists"):
        save_single_file(pipe, path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del tensors["first_stage_model.decoder.conv_in.weight"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(
        ErasureError, match=r"1 vae weights are missing .first: decoder.conv_in.weight|cannot be loaded as that"
    ):
        Base.load(path, device="cpu")
    folder = write_tiny(tmp_path / "xl", kind="sdxl")  # configurations of another model
    with pytest.raises(ErasureError, match="model.safetensors: Detected as"):
        Base.load(path, device="cpu", config=folder)
    assert HEADER in header


@pytest.mark.parametrize(
    ("kind", "spread", "note"),
    [
        ("sd2", 0.0, None),
        ("sd2", 0.2, "predicts v, but it predicts noise"),
        ("sd2-v", 0.2, None),
        ("sd2-v", 0.05, "predicts noise, but it predicts v"),
        ("sd1", 0.2, None),
    ],
)
def test_comfyui_tells_v_from_noise_by_the_spread_of_a_bias(monkeypatch, kind, spread, note):
    from erasure.formats import single_file
    from erasure.model.single_file import TELLING

    weights = {TELLING: spread * torch.tensor([1.0, -1.0])}
    monkeypatch.setattr(single_file, "original_tensors", lambda pipe: weights)
    monkeypatch.setattr(single_file, "family", lambda pipe: kind)
    notes = single_file.prediction_notes(None)
    assert [note in text for text in notes] == ([] if note is None else [True])
