"""Files that other programs load: diffusers and lycoris are run, ComfyUI and A1111 are checked by their key maps."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lycoris import kohya as lycoris
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from erasure.formats import FORMATS, as_it_is, export_patch, exports, import_patch, rows
from erasure.formats.loaders import LOADS
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch
from erasure.patch.loaders import LOADERS, family, missed
from erasure.patch.module_keys import kohya_prefix
from erasure.patch.ops.arithmetic import merge
from erasure.patch.serialization import encode
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from tests.formats import truth
from tests.formats.making import close
from tests.patch.making import delta_patch, gap, low_rank_patch, patch_of
from tests.pipelines.making import tiny_xl
from tests.tiny import latents, tiny_pipeline

PROMPTS = ["a photo of a cat by van gogh", "a red dog"]
KINDS = ("sd1", "sd2", "sdxl")
TEXT = {"kind": "text", "texts": ["van gogh"]}


@pytest.mark.parametrize("form", ["peft", "kohya", "spm"])
def test_diffusers_loads_the_export_with_the_effect_of_the_ungated_patch(tmp_path, form):
    """The alpha of the patch differs from its rank."""
    ours, theirs = tiny_pipeline(ErasedStableDiffusionPipeline), tiny_pipeline()
    parts = ("unet",) if form == "spm" else ("unet", "text_encoder")
    part = "attentions" if form == "spm" else ""
    patch = low_rank_patch(ours, rank=4, part=part, alpha=2.0, components=parts, size=0.05, gate=TEXT)
    base = latents(ours, PROMPTS)
    ours.load_patch(patch)
    ours.fuse_patches()
    patched = latents(ours, PROMPTS)
    assert gap(patched, base) > 1e-3
    exported = export_patch(patch, tmp_path / "lora.safetensors", form)
    theirs.load_lora_weights(exported.path)
    assert gap(latents(theirs, PROMPTS), patched) < 1e-5


def test_diffusers_loads_layers_of_different_ranks(tmp_path):
    """Each layer keeps its own scale, although a PEFT file without metadata has no alpha."""
    ours, theirs = tiny_pipeline(ErasedStableDiffusionPipeline), tiny_pipeline()
    layers = dict(low_rank_patch(ours, rank=4, alpha=1.0, size=0.2).payload.layers["unet"])
    for path in list(layers)[::2]:
        layers[path] = low_rank_patch(ours, rank=1, alpha=3.0, size=0.2).payload.layers["unet"][path]
    patch = patch_of(ours, LowRank({"unet": layers}))
    ours.load_patch(patch)
    patched = latents(ours, PROMPTS)
    for form in ("peft", "kohya"):
        theirs.load_lora_weights(export_patch(patch, tmp_path / f"{form}.safetensors", form).path)
        assert gap(latents(theirs, PROMPTS), patched) < 1e-5, form
        theirs.unload_lora_weights()


@pytest.fixture
def merged():
    """Merge two patches with different ranks, alphas and layers, so that alphas would differ by layer."""
    pipe = tiny_pipeline()
    first = low_rank_patch(pipe, 1, rank=4, alpha=1.0, part="attentions", components=("unet", "text_encoder"), size=0.2)
    return merge([(first, 1.0), (low_rank_patch(pipe, 2, rank=1, alpha=3.0, size=0.2), -0.5)], base=pipe)


def answer(pipe):
    """Return the output of the UNet for text states of the pipeline's own encoder."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        states = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        return pipe.unet(torch.randn(2, 4, 8, 8, generator=draw), 500, states).sample


@pytest.mark.parametrize("form", ["kohya", "peft", None])
def test_diffusers_loads_a_merged_patch_with_the_same_effect(tmp_path, merged, form):
    """This holds for exports and for the patch's own file."""
    ours, theirs = tiny_pipeline(ErasedStableDiffusionPipeline), tiny_pipeline()
    assert len(merged.payload.ranks) == 2
    base, path = answer(ours), tmp_path / "merged.safetensors"
    ours.load_patch(merged)
    assert gap(answer(ours), base) > 1e-2
    if form:
        export_patch(merged, path, form)
    else:
        merged.save(path)
    theirs.load_lora_weights(path)
    assert gap(answer(theirs), answer(ours)) < 1e-5


def test_diffusers_misreads_alphas_that_differ(tmp_path, merged):
    """If alphas were written per layer, diffusers would apply another change: this is why they are folded in."""
    ours, theirs = tiny_pipeline(ErasedStableDiffusionPipeline), tiny_pipeline()
    patch = Patch.load(own_alphas(merged, tmp_path / "foreign.safetensors"))
    ours.load_patch(patch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of peft warn that they ignore some alphas
        theirs.load_lora_weights(tmp_path / "foreign.safetensors")
    assert close(patch, merged) and gap(answer(theirs), answer(ours)) > 1e-3
    assert as_it_is(patch)["diffusers"].startswith("no: it misreads files with several alphas")
    assert set(as_it_is(Patch.load(patch.save(tmp_path / "ours.safetensors"))).values()) == {"yes"}


def own_alphas(patch, path):
    """Write the patch to a file in which the alpha of each layer is its rank, without a digest, like older files."""
    tensors = load_file(patch.save(path))
    for key in [key for key in tensors if key.endswith(".alpha")]:
        down, up = (f"{key.removesuffix('.alpha')}.lora_{end}.weight" for end in ("down", "up"))
        rank = tensors[down].shape[0]
        tensors[up] = tensors[up] * (tensors[key] / rank)
        tensors[key] = torch.tensor(float(rank))
    with safe_open(path, "pt") as file:
        header = {key: text for key, text in file.metadata().items() if key != "erasure.digest"}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header)
    return path


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_diffusers_loads_every_layer_of_xl(tmp_path, form):
    """The layers include add_embedding, which only XL has, and both text encoders."""
    ours, theirs = tiny_xl(ErasedStableDiffusionXLPipeline), tiny_xl(StableDiffusionXLPipeline)
    parts = ("unet", "text_encoder", "text_encoder_2")
    patch = low_rank_patch(ours, part="", alpha=3.0, components=parts, size=0.05)
    assert "add_embedding.linear_1" in patch.payload.layers["unet"]
    ours.load_patch(patch)
    patched = latents(ours, PROMPTS, height=16, width=16)
    theirs.load_lora_weights(export_patch(patch, tmp_path / "lora.safetensors", form).path)
    assert gap(latents(theirs, PROMPTS, height=16, width=16), patched) < 1e-5
    assert close(
        patch, import_patch(tmp_path / "lora.safetensors", "auto", Base.of(tiny_xl(StableDiffusionXLPipeline)))
    )


def test_a_lora_that_diffusers_wrote_is_read_with_its_metadata(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs, ours = tiny_pipeline(), tiny_pipeline(ErasedStableDiffusionPipeline)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_q"], alpha_pattern={"attn2.to_k": 1})
    theirs.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = latents(theirs, PROMPTS)
    state = get_peft_model_state_dict(theirs.unet)
    theirs.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict())
    patch = import_patch(tmp_path / "pytorch_lora_weights.safetensors", "auto", Base.of(ours))
    assert patch.config["format"] == "peft"
    ours.load_patch(patch)
    assert gap(latents(ours, PROMPTS), expected) < 1e-5


def every_layer(kind: str) -> LowRank:
    """Return factors of rank 1 for every Linear and Conv2d of a full-size model."""
    layers: dict = {}
    for component, path, module in truth.modules(kind):
        if isinstance(module, nn.Linear | nn.Conv2d):
            out, *shape = module.weight.shape
            up = torch.zeros(out, 1, *[1] * (len(shape) - 1))
            layers.setdefault(component, {})[path] = (torch.zeros(1, *shape), up, 1.0)
    return LowRank(layers)


def every_parameter(kind: str) -> Delta:
    """Return placeholders for the change of every parameter; only the width of the text embedding is real."""
    changes: dict = {}
    for component, root in vars(truth.pipeline(kind)).items():
        for name, value in root.named_parameters():
            width = value.shape[1] if name.endswith("attn2.to_k.weight") else 1
            changes.setdefault(component, {})[name] = torch.ones(1, width)
    return Delta(changes)


def unmatched(keys: set[str], kind: str) -> dict[str, list[str]]:
    known = truth.comfy(kind)
    return {
        "ComfyUI": sorted(key for key in keys if key not in known),
        "A1111": sorted(key for key in keys if not truth.a1111(key, kind)),
    }


# Keys of factors for every Linear and Conv2d that a program does not load although it reads the format.
MISSES = {
    "sd1": {"ComfyUI": [], "A1111": []},
    "sd2": {"ComfyUI": [], "A1111": []},
    "sdxl": {"ComfyUI": [], "A1111": ["lora_te2_text_projection"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_low_rank_key_has_a_layer_in_comfyui_and_a1111(kind):
    payload = every_layer(kind)
    assert family(payload) == kind
    keys = {key.split(".")[0] for key in encode(payload, "fp32")[0]}
    assert len(keys) > {"sd1": 250, "sd2": 300, "sdxl": 900}[kind]
    missing = unmatched(keys, kind)
    assert missing == MISSES[kind]
    assert {name: missed(name, payload) for name in missing} == missing, "the table agrees with the key maps"


XL_FILES = ["patch", "kohya", "diff"]


@pytest.mark.parametrize("form", XL_FILES)
def test_every_unet_key_of_xl_has_stabilitys_name_alone(tmp_path, form):
    """InvokeAI refuses a file that mixes them with diffusers' names; the names are those of kohya's XL trainer."""
    payload: LowRank | Delta = every_parameter("sdxl") if form == "diff" else every_layer("sdxl")
    patch, path = made_of(payload), tmp_path / "xl.safetensors"
    path = patch.save(path) if form == "patch" else export_patch(patch, path, form).path
    found = {key.split(".")[0] for key in load_file(path) if key.startswith("lora_unet_")}
    layers = {name.rpartition(".")[0] for name in payload.names("unet")}
    names = [theirs.replace(".", "_") for ours, theirs in truth.originals("sdxl").items() if ours in layers]
    expected = {f"lora_unet_{name}" for name in names}
    assert found == expected and len(found) > 700
    if form == "patch":
        assert Patch.load(path).payload.layers.keys() == payload.layers.keys()
        assert Patch.load(path).payload.names("unet") == payload.names("unet")


def test_diffusers_finds_every_layer_of_xl_under_stabilitys_names(tmp_path):
    """Its conversion returns each of our layers under the path that it has in diffusers, with its own factors."""
    layers = {"unet": {}}
    for number, (path, (down, up, alpha)) in enumerate(every_layer("sdxl").layers["unet"].items()):
        layers["unet"][path] = (down + number, up, alpha)
    path = export_patch(made_of(LowRank(layers)), tmp_path / "xl.safetensors", "kohya").path
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(path), unet_config=SimpleNamespace(layers_per_block=2), return_alphas=True
    )
    assert len(alphas) == len(layers["unet"])
    found = {}
    for key, value in state.items():
        place, _, side = key.rpartition("lora")
        if side.startswith((".down", "_A")):
            layer = place.removeprefix("unet.").replace(".processor", "").strip("._")
            found[layer + ".0" * layer.endswith("to_out")] = float(value.flatten()[0])
    assert found == {name: float(number) for number, name in enumerate(layers["unet"])}


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_lists_the_differences_that_are_left_out(tmp_path, kind):
    payload = every_parameter(kind)
    patch = made_of(payload)
    exported = export_patch(patch, tmp_path / "diff.safetensors", "diff")
    missing = unmatched({key.split(".")[0] for key in load_file(exported.path)}, kind)
    encoder = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}.get(kind, "")
    layers = [path for part, path, _ in truth.modules(kind) if part == encoder]
    joined = [path.removeprefix("text_model.") for path in layers if re.search(r"self_attn\.[qkv]_proj", path)]
    missing["A1111"] = sorted(
        missing["A1111"] + [kohya_prefix(encoder, path, kind == "sdxl") + ".bias" for path in joined]
    )
    assert {name: missed(name, payload) for name in missing} == missing
    unet = {name: [key for key in keys if "unet" in key] for name, keys in missing.items()}
    assert unet == {name: [key for key in keys if "unet" in key] for name, keys in MISSES[kind].items()}
    notes = [
        f"{name} ignores {len(keys)} keys, for which it has no layer (first: {keys[0]})"
        for name, keys in missing.items()
    ]
    assert [note for note in exported.notes if "no layer" in note] == notes


A1111_FAMILY = {"sd1": ("sd_v1", "False"), "sd2": ("sd_v2", "True"), "sdxl": ("sdxl_base_v1-0", "False")}


@pytest.mark.parametrize("form", ["kohya", "diff", None])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_a1111_is_told_the_family(tmp_path, kind, part, form):
    """It takes a file with a header for Stable Diffusion 1 unless one of these two fields says otherwise."""
    ends = ("attn2.to_k",) if part == "unet" else ("layers.0.self_attn.q_proj",)
    every = every_layer(kind)
    layers = {
        component: {path: factors for path, factors in every.layers[component].items() if path.endswith(ends)}
        # The first encoder of XL has the width of Stable Diffusion 1: only the second tells.
        for component in ((part, "text_encoder_2") if (kind, part) == ("sdxl", "text_encoder") else (part,))
    }
    patch, path = made_of(LowRank(layers)), tmp_path / "x.safetensors"
    path = patch.save(path) if form is None else export_patch(patch, path, form).path
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == A1111_FAMILY[kind]


def test_the_spm_file_tells_a1111_its_family(tmp_path):
    path = export_patch(low_rank_patch(tiny_pipeline(), part="attentions"), tmp_path / "x.safetensors", "spm").path
    with safe_open(path, "pt") as file:
        assert {"prompts", "ss_base_model_version", "ss_v2"} <= file.metadata().keys()


@pytest.mark.parametrize("kind, start", [("sd2", "lora_te_"), ("sdxl", "lora_te2_")])
def test_a1111_loads_the_projections_of_open_clip_only_all_four_together(kind, start):
    component = "text_encoder_2" if kind == "sdxl" else "text_encoder"
    paths = [f"encoder.layers.0.self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")] + [
        "encoder.layers.0.mlp.fc1"
    ]
    factors = {path: every_layer(kind).layers[component][path] for path in paths}
    keys = [f"{start}text_model_{path.replace('.', '_')}" for path in paths]
    assert missed("A1111", LowRank({component: factors})) == []
    del factors[paths[2]]
    assert missed("A1111", LowRank({component: factors})) == sorted(key for key in keys[:4] if key != keys[2])
    one = {f"{paths[0]}.weight": torch.ones(1024, 1024), f"{paths[0]}.bias": torch.ones(1024)}
    assert missed("A1111", Delta({component: one})) == [keys[0]]
    four = {f"{path}.weight": torch.ones(1024, 1024) for path in paths[:4]}
    four |= {f"{path}.bias": torch.ones(1024) for path in (paths[0], paths[3])}
    assert missed("A1111", Delta({component: four})) == [f"{keys[0]}.bias"]
    assert missed("ComfyUI", Delta({component: four})) == []


def test_exports_say_what_kohyas_scripts_and_comfyui_leave_out(tmp_path):
    every = every_layer("sdxl").layers
    paths = ("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.1.attentions.0.proj_in")
    layers = {"unet": {path: every["unet"][path] for path in paths}, "text_encoder_2": {}}
    layers["text_encoder_2"]["text_projection"] = every["text_encoder_2"]["text_projection"]
    (note,) = [n for n in export_patch(made_of(LowRank(layers)), tmp_path / "k", "kohya").notes if "sd-scripts" in n]
    assert note.endswith("conv_in, conv_out, text_projection, time_embedding.linear_1") and "ignore 4 layers" in note
    plain = made_of(LowRank({"unet": {paths[0]: every_layer("sd1").layers["unet"][paths[0]]}}))
    assert not any("sd-scripts" in n for n in export_patch(plain, tmp_path / "p", "kohya").notes)
    assert any("ComfyUI loads only part" in n for n in export_patch(plain, tmp_path / "f", "peft").notes)


def made_of(payload):
    return Patch(payload, "random", [{"name": "cat"}])


def test_diffusers_converts_the_original_names_of_xl_back():
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from erasure.training.saliency import compvis_names

    unet = truth.pipeline("sdxl").unet
    names = compvis_names(unet)
    original = {f"model.diffusion_model.{theirs}": torch.tensor(i) for i, theirs in enumerate(names.values())}
    converted, order = convert_ldm_unet_checkpoint(original, dict(unet.config)), list(names)
    assert {key: order[int(value)] for key, value in converted.items()} == {key: key for key in order}


def test_which_programs_load_a_patch_directly():
    pipe = tiny_pipeline()
    gated = low_rank_patch(pipe, gate=TEXT, part="attentions")
    verdicts = as_it_is(gated)
    assert verdicts["erasure"] == "with its gate" and verdicts["diffusers"] == verdicts["A1111"] == "without its gate"
    assert set(as_it_is(low_rank_patch(pipe)).values()) == {"yes"}
    delta = as_it_is(delta_patch(pipe))
    assert delta["erasure"] == "yes" and delta["ComfyUI"].startswith("no: export --format diff")


def test_exports_predicts_what_export_patch_does(tmp_path):
    pipe = tiny_pipeline()
    base = Base.of(pipe)
    for number, patch in enumerate([low_rank_patch(pipe, part="attentions"), low_rank_patch(pipe), delta_patch(pipe)]):
        for form, word in exports(patch).items():
            target = tmp_path / f"{number}-{form}"
            rank = 1 if word.startswith("with --rank") else None
            if word.startswith("no"):
                with pytest.raises(ValueError, match="Nothing was written"):
                    export_patch(patch, target, form, base)
            else:
                assert word.startswith("yes") or rank
                assert export_patch(patch, target, form, base, rank=rank).path.exists()


def test_the_support_matrix():
    table = {row["format"]: row for row in rows()}
    assert set(table) == set(FORMATS)
    assert {form for forms in LOADS.values() for form in forms} == set(FORMATS) and LOADS.keys() == LOADERS.keys()
    assert table["diff"]["loaders"] == ["erasure", "ComfyUI", "A1111"] and not table["unguide"]["writes"]
    assert all(row["about"] and row["reads"] for row in table.values())


@pytest.mark.parametrize("form", ["kohya", "diff"])
def test_lycoris_loads_the_export(tmp_path, monkeypatch, form):
    """lycoris is an independent reader of kohya's keys and of .diff."""
    # Without these, lycoris would add layers of its own to train.
    for target in ("UNET_TARGET_REPLACE_MODULE", "UNET_TARGET_REPLACE_NAME"):
        monkeypatch.setattr(lycoris.LycorisNetworkKohya, target, [])
    theirs, ours = tiny_pipeline(), tiny_pipeline()
    patch = low_rank_patch(ours, part="attentions") if form == "kohya" else delta_patch(ours, part="ff.net")
    path = export_patch(patch, tmp_path / "x.safetensors", form).path
    network, tensors = lycoris.create_network_from_weights(1.0, str(path), None, None, theirs.unet)
    modules = {key.split(".")[0] for key in tensors}
    assert len(network.unet_loras) == len(modules)
    network.merge_to(None, theirs.unet, tensors, None, None)
    changes = patch.deltas("unet")
    for name, value in ours.unet.named_parameters():
        expected = value + changes[name] if name in changes else value
        assert torch.allclose(theirs.unet.get_parameter(name), expected, atol=1e-5), name
