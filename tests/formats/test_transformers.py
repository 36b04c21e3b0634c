"""Files of patches on transformers: what diffusers writes and reads, and what has no names for their layers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Victim
from erasure.formats.import_export import export_patch, import_patch
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch, fingerprint
from erasure.patch.loaders import as_it_is
from erasure.pipelines import load_patch
from erasure.pipelines.strengths import switched_off
from tests.tiny_transformers import tiny_transformer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def made(pipe, dense=False):
    """A patch of the pipeline's attention, of low rank or dense."""
    draws, changes = torch.Generator().manual_seed(0), {}
    for path, module in Base("tiny", pipe).targets("x").items():
        down, up = (
            torch.randn(2, module.in_features, generator=draws),
            torch.randn(module.out_features, 2, generator=draws),
        )
        changes[path] = (down, up * 0.1, 2.0)
    payload = LowRank({"transformer": changes})
    if dense:
        payload = Delta(
            {"transformer": {name: payload.change("transformer", name) for name in payload.names("transformer")}}
        )
    prints = {"transformer": fingerprint(pipe.transformer, payload.names("transformer"))}
    return Patch(payload, "esd", [{"name": "cat"}], base="tiny", base_fingerprint=prints)


def weights(pipe):
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def test_a_lora_that_diffusers_wrote_is_imported_exactly(tmp_path):
    """As trained with peft: its alpha is in the header alone, its scale is 4."""
    pipe = tiny_transformer("sd3")
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=ATTENTION, init_lora_weights=False))
    state = {key: value for key, value in pipe.transformer.state_dict().items() if "lora_" in key}
    layers = {key.replace(".default", ""): value for key, value in state.items()}
    metadata = {"r": 2, "lora_alpha": 8, "target_modules": ATTENTION}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    ours, theirs = tiny_transformer("sd3"), tiny_transformer("sd3")
    patch = import_patch(file, model=ours, concepts=["cat"])
    assert patch.components == ["transformer"] and len(patch.payload.names("transformer")) == 15
    load_patch(ours, patch)
    theirs.load_lora_weights(file)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    before = tiny_transformer("sd3").transformer.state_dict()
    for name, value in weights(theirs).items():
        assert torch.allclose(value, weights(ours)[name], atol=1e-5), name
    assert any((value - before[name]).abs().max() > 0.1 for name, value in weights(ours).items())


@pytest.mark.parametrize("dense", [False, True])
def test_exports_are_read_back(dense, tmp_path):
    pipe = tiny_transformer("sd3")
    patch = made(pipe, dense)
    export_patch(patch, tmp_path / "lora.safetensors", "peft", rank=2 if dense else None)
    back = import_patch(tmp_path / "lora.safetensors", model=pipe)
    for name in patch.payload.names("transformer"):
        change = patch.payload.change("transformer", name)
        assert torch.allclose(back.payload.change("transformer", name), change, atol=1e-5)
    export_patch(patch, tmp_path / "folder", "checkpoint", model=tiny_transformer("sd3"))
    assert (
        json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    )
    whole = import_patch(tmp_path / "folder", model=tiny_transformer("sd3"))
    assert whole.payload.names("transformer") == patch.payload.names("transformer")


@pytest.mark.parametrize("form", ["spm", "diff", "unet"])
def test_formats_without_names_for_transformers_refuse_them(form, tmp_path):
    pipe = tiny_transformer("flux")
    with pytest.raises(ErasureError, match=r"transformer.*Nothing was written"):
        export_patch(made(pipe, dense=form == "diff"), tmp_path / "x.safetensors", form, model=pipe)
    assert not any(tmp_path.iterdir())


def test_it_is_said_which_programs_read_the_file():
    pipe = tiny_transformer("flux")
    answers = as_it_is(made(pipe))
    assert answers["diffusers"] == answers["ComfyUI"] == "yes" and answers["A1111"].startswith("no")
    assert "peft --rank R" in as_it_is(made(pipe, dense=True))["diffusers"]


def test_attacks_say_that_they_need_a_unet():
    with pytest.raises(ErasureError, match="reach into a UNet, which this FluxPipeline does not have"):
        Victim(tiny_transformer("flux"), switched_off)
