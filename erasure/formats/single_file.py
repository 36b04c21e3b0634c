"""Whole pipelines as one .safetensors file under the original names, as ComfyUI and A1111 load them.

Of FLUX.1 and Stable Diffusion 3 the file holds the transformer, as ComfyUI's `diffusion_models` folder takes it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from erasure.dtypes import DTYPES
from erasure.errors import ErasureError, unknown
from erasure.formats.patch_builder import ImportedPayload, changes, components
from erasure.formats.patched_base import patched
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_only
from erasure.model.base import Base
from erasure.model.clip_tokenizer import clip_tokenizer
from erasure.model.conditioning import text_encoders
from erasure.model.original_keys import clip_tensors, compvis_names, open_clip_tensors, vae_tensors
from erasure.model.original_transformer import CLASSES, FLUX, transformer_tensors
from erasure.model.quantising import is_quantised
from erasure.model.single_file import HEADER, INDEX, SPREAD, TELLING, UNET, open_transformer, read_configs
from erasure.patch import Patch
from erasure.patch.module_keys import TRANSFORMER
from erasure.patch.safetensors_io import write_file
from erasure.pipelines import patch_stack
from erasure.version import __version__

# The names of the architectures in modelspec headers (github.com/Stability-AI/ModelSpec).
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-v": "stable-diffusion-xl-v1-base",
    "flux": "flux-1-dev",
    "flux-schnell": "flux-1-schnell",
    "sd3": "stable-diffusion-v3",
}


def read_single_file(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read the changes of the UNet and the text encoders of a single-file checkpoint, or of a transformer alone.

    The autoencoder is not compared, and of FLUX and Stable Diffusion 3 neither are the text encoders.

    Args:
        source: the file.
        base: the base that it is compared with.

    Raises:
        ErasureError: the file is a pickle or cannot be loaded, lacks a component of the base, does not fit it, or has
            the same weights.
    """
    if source.kind == "pickle":
        raise ErasureError(f"{source.path} is a pickle; whole checkpoints are only read from .safetensors files")
    if base.component == TRANSFORMER:
        network = open_transformer(source.path, type(base.network), base.network.config)
        return ImportedPayload(changes(source, base, {TRANSFORMER: dict(network.named_parameters())}))
    modules = components(Base.load(source.path, device="cpu"))
    if missing := sorted(set(components(base)) - set(modules)):
        raise ErasureError(
            f"{source.path} has no {missing[0]}, but the base {base.name} has one. "
            "Is the file for another architecture?"
        )
    weights = {name: dict(modules[name].named_parameters()) for name in components(base)}
    return ImportedPayload(changes(source, base, weights))


def write_single_file(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the whole patched pipeline as one checkpoint file under the original names.

    Args:
        patch: the patch.
        path: the file.
        base: the base that the patch was made from.

    Returns:
        A note, if ComfyUI would take the file for a model of the other kind of prediction, or if the file is only the
        transformer.

    Raises:
        ErasureError: the patch does not fit the base, its architecture has no such layout, the patch changes a text
            encoder beside a transformer, or the file cannot be written.
    """
    if base.component == TRANSFORMER:
        need_only(patch, TRANSFORMER)
    with patched(patch, base):
        save_single_file(base.pipe, path)
        if base.component == TRANSFORMER:
            return ["the file holds the transformer alone; in ComfyUI it goes into the folder diffusion_models"]
        return prediction_notes(base.pipe)


def check_single_file(patch: Patch) -> None:
    """Check that a patch on a transformer changes nothing else, and a transformer whose original names are known.

    Args:
        patch: the patch.

    Raises:
        ErasureError: it changes another component too, or a transformer of cross-attention (PixArt, SANA).
    """
    if TRANSFORMER not in patch.components:
        return
    need_only(patch, TRANSFORMER)
    names = " ".join(patch.payload.names(TRANSFORMER))
    if ".attn1." in names or (".attn2." in names and ".attn." not in names):
        raise ErasureError(
            "has no names for the layers of this transformer: --format checkpoint writes the whole pipeline, --format "
            "peft a low-rank patch"
        )


def prediction_notes(pipe: Any) -> list[str]:
    """Return a note if ComfyUI takes a Stable Diffusion 2 for one of the other kind of prediction.

    A file does not say whether it predicts v or noise. ComfyUI looks at the spread of one bias: above 0.09 it is v
    (comfy/supported_models.py, SD20.model_type).

    Args:
        pipe: the pipeline that the file was written from.
    """
    kind = family(pipe)
    if not kind.startswith("sd2"):
        return []
    bias = original_tensors(pipe).get(TELLING)
    is_v = bias is not None and float(bias.float().std(unbiased=False)) > SPREAD
    if is_v == kind.endswith("-v"):
        return []
    taken, right = ("noise", "v") if kind.endswith("-v") else ("v", "noise")
    return [
        f"ComfyUI will take this file for a model that predicts {taken}, but it predicts {right}: choose it there with "
        "the node ModelSamplingDiscrete"
    ]


def family(pipe: Any) -> str:
    """Return the layout of a pipeline's single file: `sd1`, `sd2` or `sdxl`, with `-v` appended for v-prediction.

    Of transformers it is `flux`, `flux-schnell` or `sd3`.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        ErasureError: there is no such layout for its architecture.
    """
    if (transformer := getattr(pipe, TRANSFORMER, None)) is not None:
        name = type(transformer).__name__
        if name not in CLASSES:
            raise ErasureError(f"a single file has no names for {name}. Nothing was written")
        schnell = CLASSES[name] == FLUX and not transformer.config.guidance_embeds
        return f"{CLASSES[name]}-schnell" if schnell else CLASSES[name]
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ErasureError(f"a single file needs a model of noise or v-prediction, but this one predicts {kind}")
    if len(text_encoders(pipe)) == 2:
        name = "sdxl"
    else:
        name = "sd2" if pipe.unet.config.use_linear_projection else "sd1"
    return f"{name}-v" if kind == "v_prediction" and name != "sd1" else name


def original_tensors(pipe: Any) -> dict[str, Tensor]:
    """Return all weights of a pipeline under the original names, with the patches that are folded in.

    Args:
        pipe: a diffusers pipeline of Stable Diffusion 1, 2 or XL; of FLUX.1 and Stable Diffusion 3 the transformer.

    Raises:
        ErasureError: its architecture has no original names.
    """
    kind = family(pipe)
    if hasattr(pipe, TRANSFORMER):
        return transformer_tensors(pipe.transformer)
    encoders = [encoder for _, encoder in text_encoders(pipe)]
    names = compvis_names(pipe.unet)
    tensors = {f"{UNET}{names[name]}": value for name, value in pipe.unet.named_parameters()}
    if kind.startswith("sdxl"):
        texts = {"conditioner.embedders.0.transformer.": clip_tensors(encoders[0])}
        texts["conditioner.embedders.1.model."] = open_clip_tensors(encoders[1])
        if kind == "sdxl-v":
            texts[""] = {"v_pred": torch.zeros(0)}  # the mark by which ComfyUI and A1111 detect v-prediction
            if pipe.scheduler.config.get("rescale_betas_zero_snr"):
                texts[""]["ztsnr"] = torch.zeros(0)
    elif kind.startswith("sd2"):
        texts = {"cond_stage_model.model.": open_clip_tensors(encoders[0])}
    else:
        texts = {"cond_stage_model.transformer.": clip_tensors(encoders[0])}
    parts = {"first_stage_model.": vae_tensors(pipe.vae), **texts}
    tensors |= {f"{start}{name}": value for start, table in parts.items() for name, value in table.items()}
    return tensors


def save_single_file(
    pipe: Any, path: str | os.PathLike[str], *, dtype: str | None = None, overwrite: bool = False, title: str = ""
) -> Path:
    """Write a pipeline, with the patches that are folded into its weights, as one checkpoint file.

    ComfyUI and A1111 recognise the three original architectures by their sizes. A smaller one (glyph) can be loaded by
    this package, and by programs that are told its configurations: these are stored in the header, together with the
    tokenizer unless it is CLIP's.

    Args:
        pipe: a diffusers pipeline of Stable Diffusion 1, 2 or XL, of FLUX.1 or Stable Diffusion 3.
        path: the file.
        dtype: `fp32`, `fp16` or `bf16` (default: the dtype of each weight).
        overwrite: whether an existing file may be replaced.
        title: title in the header (default: the name of the file).

    Returns:
        The path of the file.

    Raises:
        ErasureError: the architecture has no such layout, a gated patch is active (a single file cannot hold a gate),
            or weights are quantised, or the file exists or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if gated := patch_stack(pipe).gated:
        raise ErasureError(
            f"{', '.join(gated)}: gated, so not in the weights, and a single file cannot hold a gate. "
            "fuse_patches() folds gated patches in, which makes them act on every prompt. Nothing was written"
        )
    kind, weights = family(pipe), original_tensors(pipe)
    if missing := [name for name, value in weights.items() if value.is_meta]:
        raise ErasureError(
            f"{missing[0]} is not in memory, because the pipeline is offloaded. Load it without offloading. "
            "Nothing was written"
        )
    if packed := [name for name, value in weights.items() if is_quantised(value)]:
        raise ErasureError(f"{packed[0]} is quantised. Load the pipeline unquantised. Nothing was written")
    tensors = {
        name: value.detach().to("cpu", DTYPES[dtype] if dtype is not None else value.dtype).contiguous()
        for name, value in weights.items()
    }
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[kind],
        "modelspec.title": title or Path(path).stem,
        "erasure.version": __version__,
        "format": "pt",
    }
    if not hasattr(pipe, TRANSFORMER):
        files, pads = configurations(pipe)
        header[HEADER] = json.dumps({"files": files, "pads": pads}, sort_keys=True)
        header["modelspec.implementation"] = "sgm" if kind.startswith("sdxl") else "ldm"
        header["modelspec.prediction_type"] = "v" if kind.endswith("-v") else "epsilon"
    return write_file(path, tensors, header, overwrite)


def configurations(pipe: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the JSON files of a pipeline's diffusers folder, and the padding tokens of tokenizers that are CLIP's.

    Args:
        pipe: a diffusers pipeline.

    Returns:
        Path in the folder -> content of the file, and name of the tokenizer -> padding token.

    Raises:
        ErasureError: the pipeline writes no model_index.json.
    """
    clip_vocabulary, pads = clip_tokenizer().get_vocab(), {}
    with TemporaryDirectory(prefix="erasure-config-") as folder:
        pipe.save_config(folder)
        for name, part in pipe.components.items():
            if part is None or name in ("safety_checker", "feature_extractor", "image_encoder"):
                continue
            target = Path(folder) / name
            if name.startswith("tokenizer") and part.get_vocab() == clip_vocabulary:
                pads[name] = part.pad_token
            elif name.startswith("tokenizer"):
                part.save_pretrained(target)
            elif hasattr(part, "save_config"):
                part.save_config(target)
            else:
                part.config.save_pretrained(target)
        files = read_configs(Path(folder))
    if INDEX not in files:
        raise ErasureError(f"{type(pipe).__name__} has written no {INDEX}, so its configurations cannot be stored")
    return files, pads
