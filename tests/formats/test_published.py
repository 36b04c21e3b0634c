"""Files as the published code of each method writes them, and pickles that would run code."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.formats import export_patch, import_patch
from erasure.patch import LowRank
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.training.saliency import compvis_names
from tests.formats.making import SMALL, changed, close, refused
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline


def moved(pipe, component: str, weights: dict) -> set[str]:
    before = getattr(pipe, component).state_dict()
    return {name for name, value in weights.items() if not torch.equal(value, before[name])}


def test_esd_and_uce_some_weights_in_bf16(pipe, base, tmp_path):
    """The files of ESD and UCE hold only the trained weights, in half precision."""
    full = changed(pipe, "unet", "attn2.to_k")
    file = {name: value.bfloat16() for name, value in full.items() if "attn2" in name}
    save_file(file, tmp_path / "esd-Van_Gogh-from-Van_Gogh-esdx.safetensors")
    patch = import_patch(tmp_path / "esd-Van_Gogh-from-Van_Gogh-esdx.safetensors", "auto", base)
    assert patch.config["format"] == "unet" and patch.names == ["Van Gogh"]
    changes = patch.deltas("unet")
    assert set(changes) == {name for name in full if "attn2.to_k" in name}, "the other weights differ only by the cast"
    for name, change in changes.items():
        base_value = pipe.unet.state_dict()[name]
        assert torch.equal((base_value + change).bfloat16(), full[name].bfloat16())


CROSS = ("attn2.to_k", "attn2.to_v")
SCRIPTS = {
    "esd-cat-from-cat-esdxstrict": (CROSS, "esd"),
    "esd-cat-from-animal-esdu": (("attn1",), "esd"),
    "diffusers-cat-ESDx1-UNET": (("attn2",), "esd"),
    "renamed": (("attn2",), "esd"),  # esd-x alone writes cross-attention whole
    "uce_test": (CROSS, "uce"),
    "cat-uce": (CROSS, "uce"),
    "sauce": (CROSS, "unknown"),  # esd-x-strict writes the same keys
    "whole": (("",), "unknown"),
}


@pytest.mark.parametrize("stem", SCRIPTS)
def test_the_name_or_the_keys_tell_which_script_wrote_a_file(pipe, base, tmp_path, stem):
    parts, method = SCRIPTS[stem]
    full = changed(pipe, "unet", "attn")
    path = tmp_path / f"{stem}.safetensors"
    save_file({name: value for name, value in full.items() if any(part in name for part in parts)}, path)
    assert import_patch(path, "auto", base).method == import_patch(path, "unet", base).method == method
    assert import_patch(path, "uce", base).method == "uce", "what the user says counts"


@pytest.mark.parametrize("nested", [False, True])
def test_whole_unets_in_a_pickle(pipe, base, tmp_path, nested):
    """SalUn and old ESD pickle one state dict; another old form is a table with a state dict for each module."""
    full = changed(pipe, "unet", "attn2.to_v")
    content: dict = full
    if nested:
        content = {}
        for name, value in full.items():
            module, _, leaf = name.rpartition(".")
            content.setdefault(f"unet.{module}", {})[leaf] = value
    torch.save(content, tmp_path / "unet.pt")
    with pytest.raises(ErasureError, match="--allow-pickle"):
        import_patch(tmp_path / "unet.pt", model=base)
    patch = import_patch(tmp_path / "unet.pt", "salun", base, allow_pickle=True)
    assert patch.method == "salun" and set(patch.deltas("unet")) == moved(pipe, "unet", full)


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder.", "text_model.", ""])
def test_advunlearns_text_encoder(pipe, base, tmp_path, prefix):
    """AdvUnlearn's file holds every weight twice, under two names, and the old buffer of position ids."""
    full = changed(pipe, "text_encoder", "layers.0.mlp")
    content = {prefix + name.removeprefix("text_model."): value for name, value in full.items()}
    if prefix == "text_encoder.text_model.":
        content |= {name.removeprefix("text_model."): value for name, value in full.items()}
        content[prefix + "embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(content, tmp_path / "TextEncoder.pt")
    patch = import_patch(tmp_path / "TextEncoder.pt", "auto", base, allow_pickle=True)
    names = {name.removeprefix("text_model.") for name in moved(pipe, "text_encoder", full)}
    assert patch.config["format"] == "text-encoder" and set(patch.deltas("text_encoder")) == names


def test_advunlearns_folder(pipe, base, tmp_path):
    model = CLIPTextModel(pipe.text_encoder.config)
    model.load_state_dict(changed(pipe, "text_encoder", "layers.1"))
    model.save_pretrained(tmp_path / "nudity_unlearned")
    patch = import_patch(tmp_path / "nudity_unlearned", "advunlearn", base)
    assert patch.method == "advunlearn" and all("layers.1" in name for name in patch.deltas("text_encoder"))
    # Exported again, the folder loads in transformers with the changed weights.
    export_patch(patch, tmp_path / "out", "advunlearn", base)
    again = CLIPTextModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in model.state_dict().items())


def unguide_file(pipe, rank: int = 2) -> tuple[dict, dict]:
    """Return a lora.pth for the attn2 keys, and the changes 8 (A B)^T that it makes under diffusers' names."""
    generator, names = torch.Generator().manual_seed(0), compvis_names(pipe.unet)
    content, changes = {}, {}
    for ours, theirs in names.items():
        if ours.endswith("attn2.to_k.weight"):
            out, width = pipe.unet.get_parameter(ours).shape
            a, b = torch.randn(width, rank, generator=generator), torch.randn(rank, out, generator=generator)
            content[theirs.replace(".weight", ".lora.A")], content[theirs.replace(".weight", ".lora.B")] = a, b
            changes[ours] = 8 * (a @ b).T
    return content, changes


def test_unguides_lora(pipe, base, tmp_path):
    content, changes = unguide_file(pipe)
    torch.save(content, tmp_path / "lora.pth")
    patch = import_patch(tmp_path / "lora.pth", "auto", base, allow_pickle=True)
    assert patch.config["format"] == patch.method == "unguide" and isinstance(patch.payload, LowRank)
    imported = patch.deltas("unet")
    assert imported.keys() == changes.keys()
    assert all(torch.allclose(imported[name], change, atol=1e-5) for name, change in changes.items())
    # The alpha is read from train_config.json if that file exists.
    (tmp_path / "train_config.json").write_text(json.dumps({"lora_alpha": 4}))
    half = import_patch(tmp_path / "lora.pth", "unguide", base, allow_pickle=True).deltas("unet")
    assert all(torch.allclose(2 * half[name], change, atol=1e-5) for name, change in changes.items())


def test_damaged_unguide_files(pipe, base, tmp_path):
    content, _ = unguide_file(pipe)
    first = next(iter(content))
    count = len(content) // 2
    cases = {
        "half": ({k: v for k, v in content.items() if k != first}, "lacks its .lora.A"),
        "alien": (
            {**content, "x.lora.A": torch.ones(2, 1), "x.lora.B": torch.ones(1, 2)},
            f"{count} of {count + 1}",
        ),
        "odd": ({**content, "bias": torch.ones(2)}, "neither"),
    }
    for name, (file, message) in cases.items():
        torch.save(file, tmp_path / f"{name}.pth")
        with pytest.raises(ErasureError, match=message):
            import_patch(tmp_path / f"{name}.pth", "unguide", base, allow_pickle=True)


def test_a_patch_is_exported_as_published_and_imported_again(pipe, base, tmp_path):
    patch = erase(pipe, "cat", "esd", progress=False, **SMALL)
    imported = import_patch(export_patch(patch, tmp_path / "esd.safetensors", "esd", base).path, "esd", base)
    assert close(patch, imported, 1e-5) and imported.method == "esd"


class Bomb:
    """An object whose pickle creates a folder when it is loaded with code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["auto", "unet", "text-encoder", "unguide"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(pipe, base, tmp_path, form, zipped):
    mark = tmp_path / "it-ran"
    content = {"conv_in.weight": torch.ones(1), "x": Bomb(str(mark))}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ErasureError, match="only read on request"):
        import_patch(tmp_path / "evil.pt", form, base)
    with pytest.raises(ErasureError, match="refused, because it holds more than tensors"):
        import_patch(tmp_path / "evil.pt", form, base, allow_pickle=True)
    assert not mark.exists()
    # Loaded with code, the pickle does create the folder.
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.is_dir()


def test_pickles_without_tensors(base, tmp_path):
    for number, content in enumerate(([1, 2], {"a": 1}, {})):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(ErasureError, match="no table of tensors"):
            import_patch(tmp_path / f"{number}.pt", model=base, allow_pickle=True)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": 1})[:-3])
    with pytest.raises(ErasureError, match="bare.pt"):
        import_patch(tmp_path / "bare.pt", model=base, allow_pickle=True)
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "0.pt").read_bytes())
    with pytest.raises(ErasureError, match="not a safetensors file"):
        import_patch(tmp_path / "renamed.safetensors", model=base, allow_pickle=True)


def test_full_weights_that_do_not_fit(pipe, base, tmp_path):
    full = {name: value.contiguous() for name, value in pipe.unet.state_dict().items()}
    count = len(full)
    cases = {
        "same": (full, "the same weights as"),
        "more": ({**full, "down_blocks.9.conv.weight": torch.ones(1)}, rf"{count} of {count + 1} layers fit"),
        "wide": ({**full, "conv_in.weight": torch.ones(1, 2)}, rf"{count - 1} of {count} .*conv_in.*\[1, 2\]"),
        "none": ({"down_blocks.9.conv.weight": torch.ones(1)}, "0 of 1 layers fit"),
        "whole": ({"model.diffusion_model.out.0.bias": torch.ones(1)}, "whole.safetensors"),
        "else": ({"layer1.weight": torch.ones(1)}, "its first tensor is layer1.weight"),
        "nan": ({"conv_in.weight": torch.full_like(full["conv_in.weight"], float("nan"))}, "NaN"),
    }
    refused(cases, tmp_path, base)


def test_folders_of_other_kinds(base, tmp_path):
    patch = delta_patch(base.pipe)
    exported = export_patch(patch, tmp_path / "pipe", "checkpoint", base)
    assert close(patch, import_patch(exported.path, "checkpoint", base), 1e-5)
    with pytest.raises(ErasureError, match="is the folder of a pipeline"):
        import_patch(exported.path, "unet", base)
    (exported.path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ErasureError, match="holds no weights"):
        import_patch(exported.path, model=base)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ErasureError, match="a folder without"):
        import_patch(tmp_path / "bare", model=base)
    with pytest.raises(ErasureError, match="is not the folder of a pipeline"):
        import_patch(exported.path / "text_encoder", "checkpoint", base)


def test_an_exported_checkpoint_has_the_patched_weights(pipe, base, tmp_path):
    from diffusers import StableDiffusionPipeline

    exported = export_patch(delta_patch(pipe), tmp_path / "pipe", "checkpoint", base)
    theirs = StableDiffusionPipeline.from_pretrained(exported.path, safety_checker=None).unet.state_dict()
    ours = delta_patch(pipe).deltas("unet")
    for name, value in pipe.unet.state_dict().items():
        expected = value + ours[name] if name in ours else value
        assert torch.allclose(theirs[name], expected, atol=1e-6)


def test_a_checkpoint_of_an_erased_pipeline_is_plain_and_not_warned_about(tmp_path, caplog):
    erased = tiny_pipeline(ErasedStableDiffusionPipeline)
    patch = low_rank_patch(erased)
    exported = export_patch(patch, tmp_path / "pipe", "checkpoint", erased)
    assert json.loads((exported.path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert close(patch, import_patch(exported.path, model=erased), 1e-5) and not caplog.records


def test_text_encoders_that_do_not_fit(pipe, base, tmp_path):
    full = {name: value.contiguous() for name, value in pipe.text_encoder.state_dict().items()}
    count, first = len(full), next(iter(full))
    cases = {
        "same": (full, "the same weights as"),
        "more": ({**full, "encoder.layers.9.mlp.fc1.bias": torch.ones(1)}, rf"{count} of {count + 1} layers fit"),
        "wide": ({**full, first: torch.ones(3, 3)}, rf"{count - 1} of {count} .*\[3, 3\] in the file"),
        "none": ({"text_model.encoder.layers.9.mlp.fc1.bias": torch.ones(1)}, "0 of 1 layers fit"),
        "whole": ({**full, first: torch.ones(full[first].shape, dtype=torch.int64)}, "not a floating-point one"),
    }
    refused(cases, tmp_path, base, "text-encoder")
