"""Open only what a closed form reads of a single file: text encoders, and keys and values of cross-attention.

The rest of the UNet stays on the `meta` device, which has shapes and no data, and the autoencoder is left out. So
memory and time do not depend on the UNet.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.model.base import Base
from erasure.model.clip_tokenizer import END, clip_tokenizer
from erasure.model.closed_form import READERS
from erasure.model.loading import look, resolve
from erasure.model.original_keys import OPEN_CLIP, OPEN_CLIP_LAYER, compvis_names
from erasure.model.single_file import INDEX, UNET, DetectedModel, own_tokenizer

# Where the text encoders of each family are in the file, and whether they have OpenCLIP's names and packing.
PLACES: dict[str, dict[str, tuple[tuple[str, bool], ...]]] = {
    "StableDiffusionPipeline": {
        "text_encoder": (("cond_stage_model.transformer.", False), ("cond_stage_model.model.", True))
    },
    "StableDiffusionXLPipeline": {
        "text_encoder": (("conditioner.embedders.0.transformer.", False),),
        "text_encoder_2": (("conditioner.embedders.1.model.", True),),
    },
}


def open_readers(model: str | os.PathLike[str], *, device: Any = None, **options: Any) -> Base:
    """Open a checkpoint to solve closed forms for; see the head of this file.

    A model that is not a single file under the original names is loaded as a whole.

    Args:
        model: as for `Base.load`.
        device: as for `Base.load`; parts of a single file stay on the CPU.
        options: as for `Base.load`.

    Raises:
        ErasureError: as for `Base.load`.
    """
    where = resolve(model)
    if Path(where).is_file():
        detected = look(where, **options)
        if detected.pipeline in PLACES and (pipe := _parts(Path(where), detected)) is not None:
            return Base(os.fspath(model), pipe, detected.about)
    return Base.load(model, device=device, **options)


def _parts(path: Path, detected: DetectedModel) -> Any | None:
    """Return the pipeline with the parts that are read; None if the file has another layout."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights
    from safetensors import safe_open

    files = detected.files
    components: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        names = frozenset(file.keys())
        for part, places in PLACES[detected.pipeline].items():
            cls = getattr(transformers, files[INDEX][part][1])
            with init_empty_weights():
                encoder = cls(cls.config_class.from_dict(files[f"{part}/config.json"]))
            place = next(((start, packed) for start, packed in places if any(n.startswith(start) for n in names)), None)
            if place is None or not _fill_encoder(encoder, file, names, *place):
                return None
            components[part] = encoder.eval()
            name = part.replace("text_encoder", "tokenizer")
            components[name] = own_tokenizer(detected, name) or clip_tokenizer(detected.pads.get(name, END))
        with init_empty_weights():
            unet = diffusers.UNet2DConditionModel.from_config(files["unet/config.json"])
        originals = compvis_names(unet)
        for name, _ in [(n, p) for n, p in unet.named_parameters() if n.removesuffix(".weight").endswith(READERS)]:
            if (original := f"{UNET}{originals[name]}") not in names:
                return None
            value = file.get_tensor(original)
            if value.shape != unet.get_parameter(name).shape:
                return None
            _put(unet, name, value)
    scheduler = getattr(diffusers, files[INDEX]["scheduler"][1])
    components |= {"unet": unet.eval(), "vae": None}
    components["scheduler"] = scheduler.from_config(files["scheduler/scheduler_config.json"])
    cls = getattr(diffusers, detected.pipeline)
    if detected.pipeline == "StableDiffusionPipeline":
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        components["force_zeros_for_empty_prompt"] = bool(files[INDEX].get("force_zeros_for_empty_prompt", True))
    return cls(**components)


def _fill_encoder(encoder: nn.Module, file: Any, names: frozenset[str], start: str, packed: bool) -> bool:
    """Read the weights of a text encoder; return False if the file lacks one or has another shape."""
    for name, param in list(encoder.named_parameters()):
        bare = name.removeprefix("text_model.")
        if packed:
            value = _open_clip(file, names, start, bare)
        else:
            original = f"{start}text_model.{bare}"
            value = file.get_tensor(original) if original in names else None
        if value is None or value.shape != param.shape:
            return False
        _put(encoder, name, value)
    return True


def _open_clip(file: Any, names: frozenset[str], start: str, bare: str) -> Tensor | None:
    """Return a weight that OpenCLIP names and packs in its own way, or None if the file lacks it."""
    if bare in OPEN_CLIP:
        original = f"{start}{OPEN_CLIP[bare]}"
        return file.get_tensor(original) if original in names else None
    if bare == "text_projection.weight":
        original = f"{start}text_projection"
        return file.get_tensor(original).T.contiguous() if original in names else None
    _, _, number, layer = bare.split(".", 3)
    layer, _, leaf = layer.rpartition(".")
    block = f"{start}transformer.resblocks.{number}"
    if layer in OPEN_CLIP_LAYER:
        original = f"{block}.{OPEN_CLIP_LAYER[layer]}.{leaf}"
        return file.get_tensor(original) if original in names else None
    original = f"{block}.attn.in_proj_{leaf}"
    if original not in names:
        return None
    part = file.get_slice(original)
    size = part.get_shape()[0] // 3
    at = "qkv".index(layer.removeprefix("self_attn.")[0]) * size
    return part[at : at + size].clone()


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a parameter's data, in float32, which a run computes in."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter(value.to(torch.float32, copy=True), requires_grad=False)
