"""Original names of transformers, against diffusers' own converters, which were written independently of ours."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file

from erasure.cli.main import main
from erasure.errors import ErasureError
from erasure.formats.import_export import export_patch, import_patch
from erasure.formats.single_file import save_single_file
from erasure.model.base import Base
from erasure.model.original_transformer import transformer_tensors
from erasure.patch import Delta, Patch
from erasure.pipelines import load_patch
from tests.formats.test_transformers import made, weights
from tests.tiny_transformers import tiny_network, tiny_transformer


def same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("changes", [{}, {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}])
def test_stable_diffusion_3(changes):
    transformer = tiny_network("sd3", **changes)
    same(
        theirs.convert_sd3_transformer_checkpoint_to_diffusers(transformer_tensors(transformer)),
        transformer.state_dict(),
    )


@pytest.mark.parametrize("guided", [False, True])
def test_flux(guided):
    """True heights, which diffusers' converter expects, and one column, so that it fits into memory."""
    with torch.device("meta"):
        true = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=guided)
    state = {name: torch.randn(value.shape[0], *[1] * (value.dim() - 1)) for name, value in true.state_dict().items()}

    class FluxTransformer2DModel_:
        transformer_blocks = true.transformer_blocks

        def state_dict(self):
            return state

    FluxTransformer2DModel_.__name__ = "FluxTransformer2DModel"
    tensors = transformer_tensors(FluxTransformer2DModel_())
    assert len([name for name in tensors if "guidance_in" in name]) == 4 * guided
    same(theirs.convert_flux_transformer_checkpoint_to_diffusers(dict(tensors)), state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder of Stable Diffusion 3 with random weights."""
    path = tmp_path_factory.mktemp("sd3")
    tiny_transformer("sd3", seed=1).save_pretrained(path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_patched_transformer_is_written_and_opened(tmp_path, folder, prefix):
    pipe = tiny_transformer("sd3")
    patch, file, before = made(pipe), tmp_path / "x.safetensors", weights(pipe)
    notes = export_patch(patch, file, "single-file", model=pipe).notes
    assert len(notes) == 1
    same(weights(pipe), before)
    assert "transformer alone" in " ".join(notes) and "diffusion_models" in " ".join(notes)
    tensors = {f"{prefix}{name}": value for name, value in load_file(file).items()}
    save_file(tensors, file)
    opened = Base.load(file, config=folder, device="cpu")
    assert "Stable Diffusion 3's transformer" in opened.about
    load_patch(pipe, patch)
    assert all(torch.allclose(value, weights(pipe)[name], atol=1e-6) for name, value in weights(opened.pipe).items())
    others = tiny_transformer("sd3", seed=1)  # everything else is the folder's
    for part in ("vae", "text_encoder", "text_encoder_2"):
        same(getattr(opened.pipe, part).state_dict(), getattr(others, part).state_dict())
    half = Base.load(file, config=folder, device="cpu", dtype=torch.float16)
    assert {value.dtype for value in half.pipe.transformer.parameters()} == {torch.float16}


def test_the_file_is_imported_as_a_patch(tmp_path):
    pipe = tiny_transformer("sd3")
    patch, file = made(pipe), tmp_path / "x.safetensors"
    export_patch(patch, file, "single-file", model=pipe)
    back = import_patch(file, model=pipe, concepts=["cat"])
    assert back.payload.names("transformer") == patch.payload.names("transformer")
    for name in patch.payload.names("transformer"):
        change = patch.payload.change("transformer", name)
        assert torch.allclose(back.payload.change("transformer", name), change, atol=1e-5)


def test_the_commands_take_the_folder_too(tmp_path, folder, capsys):
    """A patch of a file is exported into a file and imported again, by name alone."""
    pipe = tiny_transformer("sd3")
    base, patch = str(save_single_file(pipe, tmp_path / "base.safetensors")), tmp_path / "p.safetensors"
    dataclasses.replace(made(pipe), base=base).save(patch)
    config, out = ["--model-config", str(folder)], str(tmp_path / "out.safetensors")
    assert main(["patch", "export", str(patch), "--format", "single-file", *config, "-o", out]) == 0
    back = str(tmp_path / "back.safetensors")
    assert main(["patch", "import", out, "--model", base, *config, "--concept", "cat", "-o", back]) == 0
    names = Patch.load(patch).payload.names("transformer")
    assert Patch.load(back).payload.names("transformer") == names
    assert main(["patch", "export", str(patch), "--format", "single-file", "-o", out]) == 2
    assert "--model-config" in capsys.readouterr().err


@pytest.mark.slow
def test_flux_is_opened_by_diffusers_reader(tmp_path):
    """One block of each kind at the true width, because diffusers' reader knows no other."""
    heads = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 1}
    pipe = tiny_transformer("flux", **heads, axes_dims_rope=(16, 56, 56))
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe, tmp_path / "x.safetensors", dtype="bf16")
    opened = Base.load(tmp_path / "x.safetensors", config=tmp_path / "folder", device="cpu", dtype=torch.bfloat16)
    same(weights(opened.pipe), {name: value.bfloat16() for name, value in weights(pipe).items()})


def written(path, **names):
    save_file({name: torch.zeros(1) for name in names} or {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, path)
    return path


def test_what_cannot_be_opened_says_why(tmp_path, folder):
    flux = written(tmp_path / "flux.safetensors")
    with pytest.raises(ErasureError, match=r"FLUX's transformer.*--model-config.*needs no weights of the transformer"):
        Base.load(flux)
    with pytest.raises(ErasureError, match=r"this is FLUX's transformer, but .* is a StableDiffusion3Pipeline"):
        Base.load(flux, config=folder)
    with pytest.raises(ErasureError, match="and sd1 is none"):
        Base.load(flux, config="sd1")
    scaled = {"double_blocks.0.img_attn.qkv.weight": 1, "double_blocks.0.img_attn.qkv.scale_weight": 1}
    with pytest.raises(ErasureError, match="quantised with scales of its own"):
        Base.load(written(tmp_path / "fp8.safetensors", **scaled), config=folder)
    torn = {name: value for name, value in transformer_tensors(tiny_network("sd3")).items() if ".0.x_block" not in name}
    save_file({name: value.contiguous() for name, value in torn.items()}, tmp_path / "torn.safetensors")
    with pytest.raises(ErasureError, match="does not fit the configuration"):
        Base.load(tmp_path / "torn.safetensors", config=folder)


def test_what_the_file_cannot_hold_is_refused(tmp_path):
    pipe = tiny_transformer("sd3")
    name = next(name for name, value in pipe.text_encoder.named_parameters() if value.dim() == 2)
    change = torch.zeros_like(dict(pipe.text_encoder.named_parameters())[name])
    texts = Patch(Delta({"text_encoder": {name: change}}), "esd", [{"name": "cat"}], base="tiny")
    with pytest.raises(ErasureError, match="of the transformer alone, but this patch changes text_encoder"):
        export_patch(texts, tmp_path / "x.safetensors", "single-file", model=pipe)
    other = tiny_transformer("pixart")
    with pytest.raises(ErasureError, match="no names for the layers of this transformer.*Nothing was written"):
        export_patch(made(other), tmp_path / "x.safetensors", "single-file", model=other)
    assert not (tmp_path / "x.safetensors").exists()
