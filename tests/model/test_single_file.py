"""Detection of single files by the names and shapes of the real architectures; the tensors take no memory or disk."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs

from erasure.errors import ErasureError
from erasure.formats.single_file import original_tensors
from erasure.model.base import Base
from erasure.model.loading import look
from erasure.model.meta import parts_of
from erasure.model.original_keys import compvis_names, vae_names
from erasure.model.single_file import TELLING, UNET, carried, identify, kinds
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline, load_pipeline
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def true():
    """The real architectures without weights, and their tensors under the original names."""
    pipes = {kind: parts_of(kind) for kind in ("sd1", "sd2", "sdxl")}
    return {kind: (pipe, original_tensors(pipe)) for kind, pipe in pipes.items()}


def hollow(path, tensors, header=None):
    """Write a safetensors file with these names and shapes, fp16 and all zeros, as a sparse file without data."""
    table, start = {"__metadata__": header} if header else {}, 0
    for name, value in tensors.items():
        end = start + 2 * math.prod(value.shape)
        table[name], start = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [start, end]}, end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return path


def shaped(**shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_true_checkpoints_are_known(true, tmp_path, kind):
    detected = identify(hollow(tmp_path / "x.safetensors", true[kind][1]))
    assert detected.kind == kind and detected.pipeline == carried(kind).pipeline
    assert f"width {detected.files['unet/config.json']['cross_attention_dim']}" in detected.about


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_names_and_shapes_are_those_that_diffusers_reads(true, kind):
    """diffusers' converters, written independently of ours, return every tensor to its own name and shape."""
    pipe, tensors = true[kind]
    assert theirs.infer_diffusers_model_type(tensors) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[kind]
    back = theirs.convert_ldm_unet_checkpoint(tensors, pipe.unet.config)
    assert {n: v.shape for n, v in back.items()} == {n: p.shape for n, p in pipe.unet.named_parameters()}
    back = theirs.convert_ldm_vae_checkpoint(tensors, pipe.vae.config)
    assert {n: v.shape for n, v in back.items()} == {n: p.shape for n, p in pipe.vae.named_parameters()}
    for names in (compvis_names(pipe.unet), vae_names(pipe.vae)):
        assert len(set(names.values())) == len(names)
    # Tensors of the published files: of the UNet, the autoencoder, and the first text encoder as far as it is used.
    start = {"sd1": "cond_stage_model.", "sd2": "cond_stage_model.", "sdxl": "conditioner.embedders.0."}[kind]
    sizes = [sum(n.startswith(s) for n in tensors) for s in (UNET, "first_stage_model.", start)]
    assert sizes == {"sd1": [686, 248, 196], "sd2": [686, 248, 4 + 23 * 12], "sdxl": [1680, 248, 196]}[kind]


def test_prediction_type_of_stable_diffusion_2(true, tmp_path):
    tensors = true["sd2"][1]
    plain = hollow(tmp_path / "a.safetensors", tensors)
    assert identify(plain).kind == "sd2" and "rule of thumb" in identify(plain).about
    spread = tmp_path / "b.safetensors"
    spread.write_bytes(b"")
    hollow(spread, {TELLING: tensors[TELLING], **tensors})
    with open(spread, "r+b") as file:  # the bias comes first in the file
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        file.write(torch.linspace(-1, 1, tensors[TELLING].numel()).half().numpy().tobytes())
    assert identify(spread).kind == "sd2-v" and identify(spread).pads == {"tokenizer": "!"}
    files = identify(spread).files
    assert files["scheduler/scheduler_config.json"]["prediction_type"] == "v_prediction"
    for header, kind in [
        ({"modelspec.prediction_type": "v"}, "sd2-v"),
        ({"modelspec.prediction_type": "epsilon"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "sd2-v"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "sd2"),
    ]:
        assert identify(hollow(spread, tensors, header)).kind == kind
    assert identify(plain, "sd2-v").kind == "sd2-v" and identify(plain, "sd2-v").about.endswith("as given")
    with pytest.raises(ErasureError, match="unknown model configuration 'sd2v': did you mean .*'sd2-v'"):
        identify(plain, "sd2v")


def test_marked_xl(true, tmp_path):
    tensors, path = true["sdxl"][1], tmp_path / "x.safetensors"
    assert identify(hollow(path, {**tensors, **shaped(v_pred=0)})).kind == "sdxl-v"
    detected = identify(hollow(path, {**tensors, **shaped(v_pred=0, ztsnr=0)}))
    scheduler = detected.files["scheduler/scheduler_config.json"]
    assert detected.kind == "sdxl-v-zsnr" and scheduler["rescale_betas_zero_snr"]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_inpainting_is_detected_and_refused_as_a_base(true, tmp_path, kind):
    first = f"{UNET}input_blocks.0.0.weight"
    path = hollow(tmp_path / "x.safetensors", {**true[kind][1], **shaped(**{first: (320, 9, 3, 3)})})
    assert identify(path).kind == f"{kind}-inpaint" and "Inpaint" in identify(path).pipeline
    with pytest.raises(ErasureError, match="inpainting.* Concepts can be erased from"):
        Base.load(path)


def refiner(tensors):
    changed = {n: v for n, v in tensors.items() if ".embedders.1." not in n}
    return changed | {n: torch.empty(v.shape[0], 1280, device="meta") for n, v in tensors.items() if "attn2.to_k" in n}


def without(*starts):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(starts)}


def plus(**shapes):
    return lambda tensors: tensors | shaped(**shapes)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sdxl", refiner, "refiner"),
        ("sdxl", without(f"{UNET}input_blocks.7.1.transformer_blocks.9."), "SSD-1B"),
        ("sdxl", without("conditioner.embedders.1."), "no second text encoder"),
        ("sdxl", plus(edm_mean=4), "EDM"),
        ("sd1", without("first_stage_model."), "no autoencoder"),
        ("sd1", without("cond_stage_model."), "no text encoder"),
        ("sd1", plus(**{f"{UNET}input_blocks.0.0.weight": (320, 7, 3, 3)}), "7 channels"),
        ("sd2", plus(**{f"{UNET}label_emb.0.0.weight": (1280, 2048)}), "unCLIP"),
        ("sd1", lambda _: shaped(**{"double_blocks.0.img_attn.qkv.weight": (1, 1)}), "FLUX's transformer"),
        ("sd1", lambda _: shaped(**{f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": (1, 1)}), "Stable Diffusion 3's"),
        ("sd1", lambda _: shaped(lora_unet_x=(1, 1)), "load it with --patch"),
        ("sd1", lambda _: shaped(**{"down_blocks.0.x": 1}), "diffusers folder"),
        ("sd1", lambda _: shaped(weight=1), "not a Stable Diffusion checkpoint"),
    ],
)
def test_unsupported_files_are_refused_with_the_reason(true, tmp_path, kind, change, message):
    path = hollow(tmp_path / "x.safetensors", change(dict(true[kind][1])))
    with pytest.raises(ErasureError, match=f"x.safetensors: .*{message}.*Nothing was loaded"):
        identify(path)


def test_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ErasureError, match="cannot be read as safetensors"):
        identify(path)
    for bad in ("{", "[]", '{"files": {"../x.json": {}}, "pads": {}}', '{"files": {}, "pads": {}}'):
        with pytest.raises(ErasureError, match="header's erasure.model is damaged"):
            identify(hollow(path, shaped(weight=1), {"erasure.model": bad}))


def test_every_bundled_configuration_is_complete():
    for kind in kinds():
        model = carried(kind)
        index = model.files["model_index.json"]
        assert model.about and index["_class_name"].startswith("StableDiffusion")
        for part, (library, _) in ((name, value) for name, value in index.items() if isinstance(value, list)):
            if library is not None and not part.startswith("tokenizer"):
                assert any(path.startswith(f"{part}/") for path in model.files), (kind, part)
        assert model.pads["tokenizer"] in ("!", "<|endoftext|>")


def test_folders_are_loaded_as_their_class(tmp_path):
    folder = write_tiny(tmp_path / "xl", kind="sdxl")
    assert look(str(folder)).pipeline == "StableDiffusionXLPipeline"
    assert type(Base.load(folder, device="cpu").pipe).__name__ == "StableDiffusionXLPipeline"
    assert isinstance(load_pipeline(folder, device="cpu"), ErasedStableDiffusionXLPipeline)
    with pytest.raises(ErasureError, match="StableDiffusionXLPipeline.* ErasedStableDiffusionPipeline cannot hold it"):
        ErasedStableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ErasureError, match="a diffusers folder brings its own"):
        Base.load(folder, config="sd1")
    with pytest.raises(ErasureError, match="cannot be loaded"):
        Base.load(folder, variant="fp16")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    with pytest.raises(ErasureError, match="Flux2Pipeline.* Concepts can be erased from StableDiffusionPipeline, "):
        Base.load(folder)


def test_weights_are_loaded_in_the_requested_dtype(tmp_path):
    folder = write_tiny(tmp_path / "tiny")
    for options, kind in [({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)]:
        pipe = Base.load(folder, device="cpu", **options).pipe
        assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {kind}


def test_a_hub_id_that_is_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ErasureError, match="nobody/nothing: the hub is switched off .HF_HUB_OFFLINE., and no copy"):
        Base.load("nobody/nothing", cache_dir=tmp_path)
