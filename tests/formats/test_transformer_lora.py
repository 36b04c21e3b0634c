"""LoRAs of FLUX and SD3 under kohya's and ComfyUI's keys: written, read, and read by diffusers."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from erasure.errors import ErasureError
from erasure.formats import export_patch, import_patch
from erasure.formats.transformer_keys import cut, join, kind_of
from erasure.patch import LowRank, Patch, fingerprint
from tests.formats.making import close
from tests.tiny_transformers import tiny_transformer

LAYERS = re.compile(r"attn\.|ff|proj_mlp|proj_out|norm1|norm\.linear|context_embedder|time_text_embed")


@pytest.fixture(scope="module")
def flux():
    return tiny_transformer("flux")


def made(pipe, pattern=LAYERS, rank=2):
    """A patch of random factors on the linear layers that match, with ranks that differ."""
    draws, layers = torch.Generator().manual_seed(0), {}
    for number, (path, module) in enumerate(pipe.transformer.named_modules()):
        if isinstance(module, torch.nn.Linear) and re.search(pattern, path) and "norm_out" not in path:
            own = rank + number % 2
            down = torch.randn(own, module.in_features, generator=draws)
            layers[path] = (down, torch.randn(module.out_features, own, generator=draws), 0.5 * own)
    payload = LowRank({"transformer": layers})
    prints = {"transformer": fingerprint(pipe.transformer, payload.names("transformer"))}
    return Patch(payload, "esd", [{"name": "cat"}], base="tiny", base_fingerprint=prints)


def test_flux_under_kohyas_keys_comes_back_exactly(flux, tmp_path):
    patch = made(flux)
    exported = export_patch(patch, tmp_path / "lora.safetensors", "kohya")
    path = exported.path
    assert not any("diffusers" in note or "ComfyUI" in note for note in exported.notes)
    assert export_patch(patch, tmp_path / "peft.safetensors", "peft").notes == (), "ComfyUI loads all of it"
    keys = {key.split(".")[0] for key in load_file(path)}
    assert {
        "lora_unet_double_blocks_1_img_attn_qkv",
        "lora_unet_double_blocks_0_txt_mlp_2",
        "lora_unet_single_blocks_1_linear1",
        "lora_unet_txt_in",
        "lora_unet_vector_in_in_layer",
        "lora_unet_final_layer_linear",
    } <= keys
    # Ten original layers in a dual block, three in a single one, and six at the ends.
    assert len(keys) == 2 * 10 + 2 * 3 + 6
    back = import_patch(path, model=flux)
    assert back.config["format"] == "kohya" and close(patch, back)


@pytest.mark.parametrize("pattern", [r"attn\.to_[kv]$", r"proj_mlp", r"attn\.add_v_proj|single.*proj_out"])
def test_parts_of_joined_layers_leave_the_others_alone(flux, tmp_path, pattern):
    patch = made(flux, re.compile(pattern))
    back = import_patch(export_patch(patch, tmp_path / "x.safetensors", "kohya").path, model=flux)
    assert close(patch, back) and back.payload.names("transformer") == patch.payload.names("transformer")


def test_diffusers_reads_the_file(flux, tmp_path):
    """Its loader knows the sizes of joined single-stream layers of the true model alone: they are left out here."""
    patch = made(flux, re.compile(r"^transformer_blocks|single.*proj_out|single.*norm\.linear"))
    state = FluxPipeline.lora_state_dict(export_patch(patch, tmp_path / "x.safetensors", "kohya").path)
    changes = {}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        changes[path.removeprefix("transformer.") + ".weight"] = state[path + ".lora_B.weight"] @ state[key]
    ours = patch.deltas("transformer")
    assert changes.keys() == ours.keys()
    assert all(torch.allclose(changes[name], ours[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "", "diffusion_model.", "lora_transformer_"])
def test_the_keys_that_trainers_write_are_read(flux, tmp_path, prefix):
    """ai-toolkit, EraseAnything and OneTrainer write diffusers' names after these prefixes, and alpha = rank."""
    patch = made(flux, re.compile(r"attn\.add_[qk]_proj"))
    content = {}
    for path, (down, up, alpha) in patch.payload.layers["transformer"].items():
        key = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        content[key + ".lora_A.weight"] = down
        content[key + ".lora_B.weight"] = up * (alpha / down.shape[0])
    save_file({key: value.contiguous() for key, value in content.items()}, tmp_path / "x.safetensors")
    assert close(patch, import_patch(tmp_path / "x.safetensors", model=flux))


def test_original_names_after_comfyuis_prefix_are_read(flux, tmp_path):
    patch = made(flux)
    content = {}
    for name, (down, up, alpha) in join("flux", patch.payload.layers["transformer"]).items():
        content[f"diffusion_model.{name}.lora_A.weight"] = down
        content[f"diffusion_model.{name}.lora_B.weight"] = up * (alpha / down.shape[0])
    save_file({key: value.contiguous() for key, value in content.items()}, tmp_path / "x.safetensors")
    assert close(patch, import_patch(tmp_path / "x.safetensors", model=flux))


def test_sd3_is_told_by_its_width(tmp_path):
    factors = {
        f"transformer_blocks.{n}.attn.{leaf}": (torch.full((1, 1536), n + 1.0), torch.ones(1536, 1), 2.0)
        for n in range(2)
        for leaf in ("to_k", "add_v_proj")
    }
    assert kind_of(factors) == "sd3"
    patch = Patch(LowRank({"transformer": factors}), "esd", [{"name": "cat"}])
    exported = export_patch(patch, tmp_path / "x.safetensors", "kohya")
    assert any("diffusers reads no kohya keys" in note for note in exported.notes)
    written = load_file(exported.path)
    x = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    assert {key.split(".")[0] for key in written} == {
        f"lora_unet_joint_blocks_{n}_{part}_block_attn_qkv" for n in range(2) for part in ("x", "context")
    }
    change = written[x + ".lora_up.weight"] @ written[x + ".lora_down.weight"]
    change *= float(written[x + ".alpha"]) / len(written[x + ".lora_down.weight"])
    assert not change[:1536].any() and not change[3072:].any()
    assert (change[1536:3072] == 4.0).all(), "2 in the factor down, and an alpha of 2 at rank 1"


def test_sd3_is_read_back(tmp_path):
    sd3 = tiny_transformer("sd3")
    patch = made(sd3, re.compile(r"attn\.|ff|context_embedder"))
    content = {}
    for name, (down, up, alpha) in join("sd3", patch.payload.layers["transformer"]).items():
        prefix = "lora_unet_" + name.replace(".", "_")
        content |= {prefix + ".lora_down.weight": down, prefix + ".lora_up.weight": up}
        content[prefix + ".alpha"] = torch.tensor(alpha)
    save_file({key: value.contiguous() for key, value in content.items()}, tmp_path / "x.safetensors")
    assert close(patch, import_patch(tmp_path / "x.safetensors", model=sd3))


def test_a_joined_layer_that_others_trained_has_one_down_factor_for_all_parts():
    down, up = torch.randn(2, 4), torch.randn(12, 2)
    parts = cut((down, up, 1.0), [4, 4, 4])
    for number, (own_down, own_up, alpha) in enumerate(parts):
        assert torch.allclose(own_up @ own_down * alpha / 2, up[4 * number : 4 * number + 4] @ down * 0.5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_weights_that_uces_script_for_flux_writes_are_read(flux, tmp_path, prefix):
    names = ("context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight")
    values = {name: flux.transformer.get_parameter(name).detach() for name in names}
    save_file({prefix + name: value + 0.5 for name, value in values.items()}, tmp_path / "x.safetensors")
    patch = import_patch(tmp_path / "x.safetensors", model=flux)
    assert patch.method == "uce" and patch.components == ["transformer"]
    assert all(torch.allclose(patch.payload.change("transformer", name), torch.tensor(0.5)) for name in names)
    more = flux.transformer.get_parameter("transformer_blocks.0.attn.to_k.weight").detach() + 1
    save_file({prefix + "transformer_blocks.0.attn.to_k.weight": more}, tmp_path / "y.safetensors")
    assert import_patch(tmp_path / "y.safetensors", model=flux).method == "unknown"


def test_alphas_are_folded_into_joined_factors():
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    joined = join("flux", {"single_transformer_blocks.0.attn.to_k": (down, up, 6.0)})
    down_all, up_all, alpha = joined["single_blocks.0.linear1"]
    change = up_all @ down_all * alpha / len(down_all)
    assert change.shape == (28, 4) and torch.allclose(change[4:8], 3 * up @ down, atol=1e-6)
    assert not change[:4].any() and not change[8:].any()


def test_what_has_no_name_is_refused(flux, tmp_path):
    unknown = made(tiny_transformer("sd3"), re.compile(r"attn\."))
    with pytest.raises(ErasureError, match="do not tell which.*Nothing was written"):
        export_patch(unknown, tmp_path / "x", "kohya")
    layers = {
        **made(flux).payload.layers["transformer"],
        "norm_out.linear": (torch.ones(1, 16), torch.ones(32, 1), 1.0),
    }
    patch = Patch(LowRank({"transformer": layers}), "esd", [{"name": "cat"}])
    with pytest.raises(ErasureError, match="no name for the layer transformer.norm_out.linear. Nothing was written"):
        export_patch(patch, tmp_path / "x", "kohya")
    other = tiny_transformer("flux", num_attention_heads=4)
    path = export_patch(made(flux), tmp_path / "y.safetensors", "kohya").path
    with pytest.raises(ErasureError, match="outputs, and the base"):
        import_patch(path, model=other)
    assert not (tmp_path / "x").exists()
