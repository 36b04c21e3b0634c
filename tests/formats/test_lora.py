"""LoRAs in all spellings in use: kohya's original names, factors of peft and of older diffusers, and their scales."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.errors import ErasureError
from erasure.formats import export_patch, import_patch
from erasure.patch import LowRank
from erasure.patch.serialization import decode, encode
from erasure.training.saliency import compvis_names
from tests.formats.making import close
from tests.patch.making import low_rank_patch


@pytest.fixture
def written(base, tmp_path):
    """Return a patch whose alpha is not its rank, and its tensors in the formats kohya and peft."""
    patch = low_rank_patch(base.pipe, rank=4, alpha=2.0, part="", components=("unet", "text_encoder"))
    paths = {form: export_patch(patch, tmp_path / f"{form}.safetensors", form).path for form in ("kohya", "peft")}
    return patch, {form: load_file(path) for form, path in paths.items()}


def read(base, tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    return import_patch(tmp_path / "x.safetensors", model=base)


def test_kohyas_original_names_are_read(base, written, tmp_path):
    """kohya's XL trainer names layers as the original code does, and calls the first text encoder te1."""
    patch, tensors = written
    names = {}
    for ours, theirs in compvis_names(base.unet).items():
        names["lora_unet_" + ours.rpartition(".")[0].replace(".", "_")] = theirs.rpartition(".")[0].replace(".", "_")
    renamed = {}
    for key, value in tensors["kohya"].items():
        prefix, _, end = key.partition(".")
        new = f"lora_unet_{names[prefix]}" if prefix in names else prefix.replace("lora_te_", "lora_te1_")
        renamed[f"{new}.{end}"] = value
    assert not renamed.keys() & tensors["kohya"].keys()
    assert close(patch, read(base, tmp_path, renamed))


def test_a_missing_alpha_is_the_rank(base, written, tmp_path):
    patch, tensors = written
    bare = {key: value for key, value in tensors["kohya"].items() if not key.endswith(".alpha")}
    assert close(patch.scale(2.0), read(base, tmp_path, bare))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight")),
        (("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")),
        (("lora_A.weight", "lora_B.weight"), ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
        (("text_encoder.text_model.", "unet."), ("text_encoder.", "base_model.model.unet.")),
    ],
)
def test_spellings_of_peft(base, written, tmp_path, old, new):
    patch, tensors = written
    renamed = {key.replace(old[0], new[0]).replace(old[1], new[1]): value for key, value in tensors["peft"].items()}
    assert not renamed.keys() & tensors["peft"].keys()
    assert close(patch, read(base, tmp_path, renamed))


def test_the_scale_follows_the_settings_of_peft(base, written, tmp_path):
    patch, tensors = written
    for settings, scale in (
        ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 8}, 2.0),
        ({f"{component}.lora_alpha": 8 for component in ("unet", "text_encoder")} | {"unet.use_rslora": True}, None),
    ):
        imported = read(base, tmp_path, tensors["peft"], {"lora_adapter_metadata": json.dumps(settings)})
        if scale:
            assert close(patch.scale(scale), imported)
        else:  # alpha / sqrt(rank) instead of alpha / rank
            ours, theirs = patch.deltas("unet"), imported.deltas("unet")
            assert all(torch.allclose(4.0 * ours[name], theirs[name], atol=1e-6) for name in ours)
    alone = {"unet.lora_alpha": 4, "text_encoder.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_k": 12}}
    changes = read(base, tmp_path, tensors["peft"], {"lora_adapter_metadata": json.dumps(alone)}).deltas("unet")
    for name, change in patch.deltas("unet").items():
        factor = 3.0 if name.endswith("attn2.to_k.weight") else 1.0
        assert torch.allclose(changes[name], factor * change, atol=1e-6)


def test_one_layer_under_two_names_is_refused(base, written, tmp_path):
    _, tensors = written
    kohya = {key.replace("lora_te_", "lora_te1_"): value for key, value in tensors["kohya"].items()}
    peft = {f"base_model.model.{key}": value for key, value in tensors["peft"].items()}
    unet = dict(base.unet.state_dict())
    text = dict(base.pipe.text_encoder.state_dict())
    for content in (
        {**tensors["kohya"], **kohya},
        {**tensors["peft"], **peft},
        {**unet, **{f"unet.{key}": value + 1 for key, value in unet.items()}},
        {**{f"text_model.{key}": value for key, value in text.items()}, **text},
    ):
        with pytest.raises(ErasureError, match="twice, the second time as"):
            read(base, tmp_path, {key: value.clone() for key, value in content.items()})


def test_variants_of_lora_are_refused(base, written, tmp_path):
    _, tensors = written
    kohya, peft = tensors["kohya"], tensors["peft"]
    first = next(key for key in kohya if key.endswith(".alpha"))
    for content, metadata, message in (
        ({**kohya, first.replace(".alpha", ".dora_scale"): torch.ones(1)}, None, "is not a plain LoRA"),
        ({**kohya, first: torch.ones(2)}, None, "must be a single number"),
        ({**peft, "unet.conv_in.lora_magnitude_vector": torch.ones(1)}, None, "is not a low-rank factor"),
        (peft, {"lora_adapter_metadata": '{"unet.use_dora": true}'}, "DoRA"),
        (peft, {"lora_adapter_metadata": "{"}, "not JSON"),
        (peft, {"lora_adapter_metadata": "[]"}, "in its header must be a JSON object"),
        (peft, {"lora_adapter_metadata": '{"unet.lora_alpha": "four"}'}, "must be a number, not 'four'"),
        (
            peft,
            {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'},
            "alpha_pattern of the unet .* must be a JSON object",
        ),
        ({key: value.sum() for key, value in peft.items()}, None, "is a single number"),
    ):
        with pytest.raises(ErasureError, match=message):
            read(base, tmp_path, content, metadata)


def test_patches_of_xl_with_the_names_of_earlier_versions_still_load():
    """They held diffusers' names, which the SPM code still wants."""
    paths = [
        "down_blocks.1.attentions.1.proj_in",
        "up_blocks.1.upsamplers.0.conv",
        "add_embedding.linear_2",
        "conv_out",
    ]
    layers = {path: (torch.full((1, 2), float(n)), torch.ones(3, 1), 1.0) for n, path in enumerate(paths)}
    payload = LowRank(
        {"unet": layers, "text_encoder_2": {"text_projection": (torch.ones(1, 2), torch.ones(2, 1), 1.0)}}
    )
    for old, key in ((True, "up_blocks_1_upsamplers_0_conv"), (False, "output_blocks_5_2_conv")):
        tensors, modules, _ = encode(payload, "fp32", diffusers_names=old)
        assert f"lora_unet_{key}.alpha" in tensors
        again = decode(tensors, "low-rank", "fp32", modules, {})
        assert [float(again.layers["unet"][path][0][0, 0]) for path in paths] == [0.0, 1.0, 2.0, 3.0]
    few = LowRank({"unet": {paths[1]: layers[paths[1]]}, "text_encoder_2": payload.layers["text_encoder_2"]})
    assert f"lora_unet_{paths[1].replace('.', '_')}.alpha" in encode(few, "fp32")[0], "too few layers to tell XL by"
