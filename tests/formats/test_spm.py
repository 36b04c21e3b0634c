"""Importing and exporting the files of SPM."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.formats import export_patch, import_patch
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.formats.making import SMALL, refused
from tests.patch.making import delta_patch
from tests.tiny import latents, tiny_pipeline


@pytest.fixture
def pipe() -> ErasedStableDiffusionPipeline:
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture(scope="module")
def erased():
    return erase(tiny_pipeline(ErasedStableDiffusionPipeline), "cat", "spm", progress=False, **SMALL)


@pytest.fixture
def file(erased, tmp_path):
    patch = erased
    return patch, export_patch(patch, tmp_path / "cat.safetensors", "spm").path


def test_the_file_is_the_published_layout(file):
    patch, path = file
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    family = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}  # for A1111; the SPM code reads the first three alone
    assert header == {"prompts": "cat", "rank": "1", "alpha": "1.0", **family}
    stems = {key.split(".")[0] for key in tensors}
    assert all(stem.startswith("lora_unet_") for stem in stems) and len(tensors) == 3 * len(stems)
    assert all(tensors[f"{stem}.alpha"].dim() == 0 for stem in stems)
    assert len(stems) == len(patch.payload.names("unet"))


def test_exported_and_imported_again_is_the_same_patch(pipe, file):
    patch, path = file
    imported = import_patch(path, "spm", Base.of(pipe))
    assert imported.payload.digest == patch.payload.digest and imported.names == ["cat"]
    assert imported.gate == {"kind": "text", "texts": ["cat"], "power": 2.0}
    pipe.load_patch(imported)


def test_diffusers_loads_it_with_the_effect_of_the_ungated_patch(pipe, file):
    patch, path = file
    base = latents(pipe, ["a cat"])
    pipe.load_patch(patch)
    pipe.fuse_patches()
    ours = latents(pipe, ["a cat"])
    pipe.unload_patches()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs = latents(pipe, ["a cat"])
    assert torch.allclose(ours, theirs, atol=1e-3) and not torch.allclose(ours, base, atol=1e-2)


def test_the_published_gate_scales_both_factors(pipe, file):
    """Scaling both factors by gamma scales their product by gamma squared, which is a gate of power 2."""
    patch, path = file
    imported = import_patch(path, "spm", Base.of(pipe))
    pipe.load_patch(imported)
    gated = latents(pipe, ["a red cat by monet"])
    gamma = pipe.gate_log[0]["cat"] ** 0.5
    assert 0 < gamma <= 1
    pipe.unload_patches()
    layers = {
        path: (gamma * down, gamma * up, alpha) for path, (down, up, alpha) in patch.payload.layers["unet"].items()
    }
    scaled = Patch(
        payload=type(patch.payload)({"unet": layers}),
        **{name: getattr(patch, name) for name in ("method", "concepts", "base", "base_fingerprint", "versions")},
        config={},
        gate={"kind": "always"},
        seed=0,
        costs={},
    )
    pipe.load_patch(scaled)
    assert torch.allclose(gated, latents(pipe, ["a red cat by monet"]), atol=1e-4)


def test_what_the_format_cannot_hold(pipe, file, tmp_path):
    patch, _ = file
    with pytest.raises(ErasureError, match="low-rank"):
        export_patch(delta_patch(pipe), tmp_path / "x.safetensors", "spm")
    comma = erase(pipe, {"name": "cat, red"}, "spm", progress=False, **SMALL)
    with pytest.raises(ErasureError, match="commas"):
        export_patch(comma, tmp_path / "x.safetensors", "spm")
    part = erase(pipe, "cat", "esd", progress=False, **SMALL, rank=1, variant="x")
    with pytest.raises(ErasureError, match="needs a term on every layer"):
        export_patch(part, tmp_path / "x.safetensors", "spm")
    with pytest.raises(ErasureError, match="unknown format"):
        export_patch(patch, tmp_path / "x.safetensors", "smp")
    assert not (tmp_path / "x.safetensors").exists()


def test_files_of_other_kinds(pipe, file, tmp_path):
    _, path = file
    tensors, base = load_file(path), Base.of(pipe)
    key = next(iter(key for key in tensors if key.endswith("lora_up.weight")))
    stray = {f"lora_unet_x.lora_{end}.weight": torch.ones(1, 1) for end in ("up", "down")}
    refused({"plain": (tensors, "lacks `prompts`")}, tmp_path, base, "spm")
    cases = {
        "half": ({k: v for k, v in tensors.items() if k != key}, "lacks its"),
        "other": (stray, "matches no layer"),
    }
    refused(cases, tmp_path, base, "spm", write=partial(save_file, metadata={"prompts": "a"}))


def test_aliases_become_erased_texts(pipe, tmp_path):
    patch = erase(
        pipe, {"name": "cat", "aliases": ["tree"]}, "esd", progress=False, **SMALL, rank=1, variant="transformer"
    )
    assert patch.gate == {"kind": "always"}
    imported = import_patch(export_patch(patch, tmp_path / "x.safetensors", "spm").path, "spm", Base.of(pipe))
    assert imported.gate["texts"] == ["cat", "tree"] and imported.payload.digest == patch.payload.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_whole_number_alphas_are_read(pipe, file, tmp_path, dtype):
    """The published code casts every tensor, also alpha, which is a whole number if it is one in the YAML."""
    patch, path = file
    header = {"prompts": "cat", "rank": "1", "alpha": "1"}
    tensors = {
        key: (torch.tensor(1) if value.dim() == 0 else value.to(dtype)) for key, value in load_file(path).items()
    }
    save_file(tensors, tmp_path / "half.safetensors", metadata=header)
    imported = import_patch(tmp_path / "half.safetensors", "spm", Base.of(pipe))
    name = patch.payload.names("unet")[0]
    assert torch.allclose(
        imported.payload.change("unet", name), patch.payload.change("unet", name), rtol=2e-2, atol=1e-6
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"rank": "4"}, "says rank 4"),
        ({"rank": "one"}, "rank in its header must be a number"),
        ({"alpha": "2.0"}, "says alpha 2"),
        ({"alpha": "nan"}, "says alpha nan"),
        ({"prompts": " , "}, "names no concept"),
    ],
)
def test_headers_that_contradict_the_tensors(pipe, file, tmp_path, header, message):
    _, path = file
    metadata = {"prompts": "cat", "rank": "1", "alpha": "1.0", **header}
    save_file(load_file(path), tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ErasureError, match=message):
        import_patch(tmp_path / "x.safetensors", "spm", Base.of(pipe))


def test_a_file_of_another_width_is_refused(pipe, file, tmp_path):
    _, path = file
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("attn2_to_k.lora_down.weight"))
    tensors[key] = torch.ones(1, 7)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"prompts": "cat", "rank": "1", "alpha": "1.0"})
    with pytest.raises(ErasureError, match="in the file and"):
        import_patch(tmp_path / "x.safetensors", "spm", Base.of(pipe))
