"""Write a pipeline as one .safetensors file under the original names, as ComfyUI and A1111 read it."""

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
from erasure.model.clip_tokenizer import clip_tokenizer
from erasure.model.conditioning import text_encoders
from erasure.model.original_keys import clip_tensors, compvis_names, open_clip_tensors, vae_tensors
from erasure.model.single_file import HEADER, INDEX, UNET, read_configs
from erasure.patch.safetensors_io import write_file
from erasure.pipelines import patch_stack
from erasure.version import __version__

# modelspec's names of the architectures (github.com/Stability-AI/ModelSpec).
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-v": "stable-diffusion-xl-v1-base",
}


def family(pipe: Any) -> str:
    """Which layout a pipeline's single file has: sd1, sd2 or sdxl, with `-v` for v-prediction.

    Raises:
        ErasureError: another architecture.
    """
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ErasureError(f"its UNet predicts {kind}: single files are of noise or v-prediction")
    if len(text_encoders(pipe)) == 2:
        name = "sdxl"
    else:
        name = "sd2" if pipe.unet.config.use_linear_projection else "sd1"
    return f"{name}-v" if kind == "v_prediction" and name != "sd1" else name


def original_tensors(pipe: Any) -> dict[str, Tensor]:
    """All weights of a pipeline under the original names, as they now are.

    Raises:
        ErasureError: an architecture without original names.
    """
    kind, encoders = family(pipe), [encoder for _, encoder in text_encoders(pipe)]
    names = compvis_names(pipe.unet)
    found = {f"{UNET}{names[name]}": value for name, value in pipe.unet.named_parameters()}
    if kind.startswith("sdxl"):
        texts = {"conditioner.embedders.0.transformer.": clip_tensors(encoders[0])}
        texts["conditioner.embedders.1.model."] = open_clip_tensors(encoders[1])
        if kind == "sdxl-v":
            texts[""] = {"v_pred": torch.zeros(0)}  # as ComfyUI and A1111 tell it
            if pipe.scheduler.config.get("rescale_betas_zero_snr"):
                texts[""]["ztsnr"] = torch.zeros(0)
    elif kind.startswith("sd2"):
        texts = {"cond_stage_model.model.": open_clip_tensors(encoders[0])}
    else:
        texts = {"cond_stage_model.transformer.": clip_tensors(encoders[0])}
    parts = {"first_stage_model.": vae_tensors(pipe.vae), **texts}
    found |= {f"{start}{name}": value for start, several in parts.items() for name, value in several.items()}
    return found


def save_single_file(
    pipe: Any, path: str | os.PathLike[str], *, dtype: str | None = None, overwrite: bool = False, title: str = ""
) -> Path:
    """Write a pipeline, patches that are folded into its weights included, as one checkpoint file.

    ComfyUI and A1111 know the original three architectures by their sizes; a smaller one (glyph) opens here, and where
    its configurations are given. They stand in the header, with the tokenizer where it is not CLIP's.

    Args:
        dtype: fp32, fp16 or bf16; None: as the weights are.
        overwrite: replace a file that stands there.
        title: for the header.

    Returns:
        The file.

    Raises:
        ErasureError: an architecture that has no such layout, gated patches (no plain file can hold a gate), a file
            that cannot be written or exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if gated := patch_stack(pipe).gated:
        raise ErasureError(
            f"{', '.join(gated)}: gated, so not in the weights; a single file cannot hold a gate. "
            "fuse_patches() folds them in: they then act on every prompt. Nothing was written"
        )
    kind, weights = family(pipe), original_tensors(pipe)
    if absent := [name for name, value in weights.items() if value.is_meta]:
        raise ErasureError(f"{absent[0]} is not in memory (offloaded): load the pipeline without offloading")
    tensors = {
        name: value.detach().to("cpu", DTYPES[dtype] if dtype is not None else value.dtype).contiguous()
        for name, value in weights.items()
    }
    files, pads = configurations(pipe)
    header = {
        HEADER: json.dumps({"files": files, "pads": pads}, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[kind],
        "modelspec.implementation": "sgm" if kind.startswith("sdxl") else "ldm",
        "modelspec.prediction_type": "v" if kind.endswith("-v") else "epsilon",
        "modelspec.title": title or Path(path).stem,
        "erasure.version": __version__,
        "format": "pt",
    }
    return write_file(path, tensors, header, overwrite)


def configurations(pipe: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The JSON files of a pipeline's diffusers folder, and what fills up prompts for tokenizers that are CLIP's."""
    known, pads = clip_tokenizer().get_vocab(), {}
    with TemporaryDirectory(prefix="erasure-config-") as folder:
        pipe.save_config(folder)
        for name, part in pipe.components.items():
            if part is None or name in ("safety_checker", "feature_extractor", "image_encoder"):
                continue
            target = Path(folder) / name
            if name.startswith("tokenizer") and part.get_vocab() == known:
                pads[name] = part.pad_token
            elif name.startswith("tokenizer"):
                part.save_pretrained(target)
            elif hasattr(part, "save_config"):
                part.save_config(target)
            else:
                part.config.save_pretrained(target)
        files = read_configs(Path(folder))
    if INDEX not in files:
        raise ErasureError(f"{type(pipe).__name__} wrote no {INDEX}")
    return files, pads
