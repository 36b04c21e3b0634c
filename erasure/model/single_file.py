"""Single-file checkpoints: detect which Stable Diffusion a file contains, and load it without a network.

The type is detected from parameter names, shapes and the header. diffusers reads the weights (`from_single_file`). The
configurations that it would fetch from the hub are bundled in `configs/models`, one JSON file each: the files of a
diffusers folder by path, and the configuration that it extends (`like`). A file that we wrote (formats/single_file.py)
has its configurations in its header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from erasure.config import CONFIGS
from erasure.errors import ErasureError, unknown

HEADER = "erasure.model"  # header key of the configurations in files that we wrote, as JSON
UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
# Files of Stable Diffusion 2 do not record the prediction type. Like ComfyUI, we take a bias with a standard deviation
# above SPREAD to mean v-prediction.
TELLING, SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
VERSIONS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the text states
INDEX = "model_index.json"

# Transformers under their original names: how the names begin, after UNET or alone; the model; its pipelines' names.
TRANSFORMERS = {
    "joint_blocks.": ("Stable Diffusion 3", "StableDiffusion3"),
    "double_blocks.": ("FLUX", "Flux"),
}
# Other things that users have in such files: how parameter names begin in them, and what the message says.
FOREIGN = {
    "lora_": "a LoRA or a low-rank patch, not a model: load it with --patch into the model that it was made for",
    "control_model.": "a ControlNet, which cannot draw images by itself",
    "down_blocks.": "a UNet with diffusers' parameter names: give the whole diffusers folder that it comes from",
    "unet.down_blocks.": "a patch, or a UNet with diffusers' parameter names: give --patch, or a diffusers folder",
}


@dataclass(frozen=True)
class DetectedModel:
    """The detected type of a checkpoint, with the configurations that open it.

    Args:
        kind: a name in `configs/models`; `own` for a file that we wrote, `given` for a folder that the user gave as the
            configuration, `transformer` for a file of which only the transformer is read, `folder` for a diffusers
            folder.
        about: the type in words, and how it was detected.
        files: the JSON files of a diffusers folder, by path.
        pads: the padding token of each tokenizer that the files do not include.
        folder: the diffusers folder that everything but the transformer is loaded from.
    """

    kind: str
    about: str
    files: dict[str, Any]
    pads: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def pipeline(self) -> str:
        """Return the name of the diffusers pipeline class."""
        return self.files[INDEX]["_class_name"]


def kinds() -> list[str]:
    """List the names of the bundled configurations."""
    return sorted(path.stem for path in (CONFIGS / "models").glob("*.json"))


def carried(kind: str) -> DetectedModel:
    """Return a bundled configuration by its name.

    Raises:
        ErasureError: there is no such configuration; the message lists them.
    """
    path = CONFIGS / "models" / f"{kind}.json"
    if kind not in kinds():
        raise unknown("model configuration", kind, kinds())
    own = json.loads(path.read_text(encoding="utf-8"))
    base = carried(own.pop("like")) if "like" in own else DetectedModel(kind, "", {})
    about, pads = own.pop("about"), {**base.pads, **own.pop("pads", {})}
    files = {name: dict(values) for name, values in base.files.items()}
    for name, values in own.items():
        merged = {**files.get(name, {}), **values}
        files[name] = {key: value for key, value in merged.items() if value is not None}
    return DetectedModel(kind, about, files, pads)


def identify(path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> DetectedModel:
    """Detect the type of the checkpoint in a .safetensors file.

    Only the header and at most one small tensor are read.

    Args:
        path: the file.
        config: overrides the detected type: one of `kinds()`, or a diffusers folder with the configuration, whose
            weights are not read. With a transformer (FLUX, Stable Diffusion 3) it is the diffusers folder that the text
            encoders, tokenizers and the autoencoder are loaded from.

    Raises:
        ErasureError: the file is damaged or its type is not supported; the message says why.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            for start, (model, line) in TRANSFORMERS.items():
                if any(name.removeprefix(UNET).startswith(start) for name in names):
                    return _transformer(path, config, model, line, names)
            if config is not None:
                return _given(config)
            if HEADER in header:
                return _own(path, header[HEADER])
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith(UNET)}
            bias = file.get_tensor(TELLING).float() if TELLING in shapes else None
    except (OSError, SafetensorError) as fault:
        raise ErasureError(f"{path}: cannot be read as safetensors; the copy may be incomplete ({fault})") from None
    try:
        kind, why = _kind(shapes, frozenset(names), header, bias)
    except ErasureError as fault:
        raise ErasureError(f"{path}: {fault}. Nothing was loaded. Supported: {', '.join(kinds())}") from None
    detected = carried(kind)
    return DetectedModel(kind, f"{detected.about}, by {why}", detected.files, detected.pads)


def _kind(
    shapes: Mapping[str, tuple[int, ...]], names: frozenset[str], header: Mapping[str, str], bias: Any
) -> tuple[str, str]:
    """Return the name of the matching bundled configuration, and what it was detected by."""
    for start, reason in FOREIGN.items():
        if any(name.startswith(start) for name in names):
            raise ErasureError(f"this is {reason}")
    if FIRST not in shapes:
        raise ErasureError(f"this is not a Stable Diffusion checkpoint: it contains no {FIRST}")
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    if width == 1280:
        raise ErasureError(
            "this is the refiner of Stable Diffusion XL, which only refines images: erase from the base model"
        )
    if width not in VERSIONS:
        raise ErasureError(
            f"its UNet reads text states of width {width}; {', '.join(map(str, VERSIONS))} are supported"
        )
    version, channels = VERSIONS[width], shapes[FIRST][1]
    why = f"text states of width {width}"
    extra = f"{UNET}label_emb.0.0.weight" in shapes
    if extra != (version == "sdxl"):
        raise ErasureError("its UNet reads more than text (an unCLIP model, for example), or less than XL's")
    if version == "sdxl" and f"{UNET}input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight" not in shapes:
        raise ErasureError(
            "this is a reduced XL with fewer transformer blocks (SSD-1B, Vega): give its diffusers folder"
        )
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        raise ErasureError(
            "this XL was trained with another noise schedule (EDM, like Playground 2.5), which is not supported"
        )
    if channels in (4, 9):
        _complete(version, names)
    if channels == 9:
        return f"{version}-inpaint", f"{why} and 9 latent channels"
    if channels != 4:
        raise ErasureError(f"its UNet reads {channels} channels (depth, upscaling or editing); 4 and 9 are supported")
    if version == "sd1":
        return version, why
    if version == "sdxl":
        if "v_pred" not in names:
            return version, why
        return (
            ("sdxl-v-zsnr", f"{why}, marked v_pred, ztsnr") if "ztsnr" in names else ("sdxl-v", f"{why}, marked v_pred")
        )
    prediction, design = (header.get(f"modelspec.{key}", "").lower() for key in ("prediction_type", "architecture"))
    if prediction or design.startswith("stable-diffusion-v2"):
        vector = prediction.startswith("v") if prediction else "768-v" in design
        return ("sd2-v" if vector else "sd2"), f"{why} and its header ({prediction or design})"
    if bias is None:
        raise ErasureError(
            "this Stable Diffusion 2 predicts either noise or v, and the file does not say which. Set --model-config "
            "(config=) to sd2 or sd2-v"
        )
    spread = float(bias.std(correction=0))
    guess = f"{spread:.3f} (a rule of thumb; override it with --model-config or config=)"
    return ("sd2-v" if spread > SPREAD else "sd2"), f"{why} and the spread of {TELLING.removeprefix(UNET)}, {guess}"


def _complete(version: str, names: frozenset[str]) -> None:
    """Refuse a file without the autoencoder or a text encoder; a UNet alone cannot draw images."""
    parts = {"autoencoder": "first_stage_model.", "text encoder": "cond_stage_model."}
    if version == "sdxl":
        parts |= {"text encoder": "conditioner.embedders.0.", "second text encoder": "conditioner.embedders.1."}
    for part, start in parts.items():
        if not any(name.startswith(start) for name in names):
            raise ErasureError(f"it contains no {part} ({start}*); a complete checkpoint is needed")


def _given(config: str | os.PathLike[str]) -> DetectedModel:
    folder = Path(config)
    if not folder.is_dir():
        detected = carried(os.fspath(config))
        return DetectedModel(detected.kind, f"{detected.about}, as given", detected.files, detected.pads)
    if not (folder / INDEX).is_file():
        raise ErasureError(f"{folder} is not a diffusers folder: it contains no {INDEX}")
    return DetectedModel("given", f"a model as configured in {folder}", read_configs(folder))


def _transformer(path: Any, config: Any, model: str, line: str, names: list[str]) -> DetectedModel:
    """Return how a transformer under its original names is opened: beside the parts of a diffusers folder."""
    if any(name.endswith(("scale_weight", "weight_scale", "scaled_fp8", ".absmax")) for name in names):
        raise ErasureError(
            f"{path}: this {model} is quantised with scales of its own, which are not read: take the file in bf16, "
            "fp16 or plain fp8. Nothing was loaded"
        )
    folder = Path(config) if config is not None else None
    if folder is None or not (folder / INDEX).is_file():
        given = f", and {config} is none" if config is not None else ""
        raise ErasureError(
            f"{path}: this is {model}'s transformer under its original names. Its text encoders, tokenizers and "
            f"autoencoder are loaded from a diffusers folder of the same model{given}: give one with --model-config "
            "(config=). The folder needs no weights of the transformer. Nothing was loaded"
        )
    files = read_configs(folder)
    pipeline = files[INDEX].get("_class_name", "")
    if not pipeline.startswith(line):
        raise ErasureError(f"{path}: this is {model}'s transformer, but {folder} is a {pipeline}. Nothing was loaded")
    return DetectedModel("transformer", f"{model}'s transformer, with the other parts of {folder}", files, {}, folder)


def open_transformer(path: str | os.PathLike[str], cls: Any, config: Mapping[str, Any], **options: Any) -> Any:
    """Load a transformer from a file with its original names.

    Args:
        path: the file.
        cls: diffusers' class of the transformer.
        config: its configuration.
        options: arguments of diffusers' `from_single_file`.

    Raises:
        ErasureError: the weights do not fit the configuration.
    """
    with TemporaryDirectory(prefix="erasure-config-") as folder:
        target = Path(folder, "transformer", "config.json")
        target.parent.mkdir()
        target.write_text(json.dumps(dict(config)), encoding="utf-8")
        try:
            part = cls.from_single_file(
                os.fspath(path), config=folder, subfolder="transformer", local_files_only=True, **options
            )
        except (ValueError, RuntimeError, KeyError, OSError, TypeError, IndexError) as fault:
            raise ErasureError(f"{path}: its transformer does not fit the configuration: {fault}") from None
    if missing := [name for name, value in part.named_parameters() if value.is_meta]:
        raise ErasureError(f"{path}: {len(missing)} weights of the transformer are missing (first: {missing[0]})")
    return part


def _own(path: Any, text: str) -> DetectedModel:
    try:
        stored = json.loads(text)
        files = {name: dict(values) for name, values in stored["files"].items()}
        if any(".." in Path(name).parts or Path(name).is_absolute() for name in files):
            raise ValueError("it has a path outside of the folder")
        return DetectedModel("own", f"{files[INDEX]['_class_name']}, by its header", files, dict(stored["pads"]))
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ErasureError(f"{path}: its header's {HEADER} is damaged: {fault}") from None


def read_configs(folder: Path) -> dict[str, Any]:
    """Read the JSON files of a diffusers folder.

    Left out are the path that the folder was loaded from, indexes of shards, and the components that single files do
    not contain (safety checker, feature extractor, image encoder).

    Returns:
        The contents of each file, by its path in the folder.
    """
    files = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name.endswith(".safetensors.index.json") or not isinstance(values, dict):
            continue
        values.pop("_name_or_path", None)
        files[path.relative_to(folder).as_posix()] = values
    index = files.get(INDEX, {})
    for part in ("safety_checker", "feature_extractor", "image_encoder"):
        if part in index:
            index[part] = [None, None]
    return files


def open_single_file(cls: Any, path: str | os.PathLike[str], detected: DetectedModel, **options: Any) -> Any:
    """Load a single file as a diffusers pipeline, without a network.

    Args:
        cls: the pipeline class.
        path: the file.
        detected: its type, as `identify` returns it.
        options: arguments of diffusers' `from_single_file`.

    Raises:
        ErasureError: weights that the configuration needs are missing from the file or have other shapes.
    """
    from erasure.model.clip_tokenizer import clip_tokenizer

    with TemporaryDirectory(prefix="erasure-config-") as folder:
        for name, values in detected.files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(values), encoding="utf-8")
        for name, (library, _) in _modules(detected.files[INDEX]).items():
            if library == "transformers" and name.startswith("tokenizer") and not _included(detected.files, name):
                options.setdefault(name, clip_tokenizer(detected.pads.get(name, "<|endoftext|>")))
        try:
            pipe = cls.from_single_file(os.fspath(path), config=folder, local_files_only=True, **options)
        except (ValueError, RuntimeError, KeyError, OSError, TypeError) as fault:
            raise ErasureError(
                f"{path}: Detected as {detected.about}, but it cannot be loaded as that: {fault}"
            ) from None
    for name, part in pipe.components.items():
        missing = [key for key, value in getattr(part, "named_parameters", dict)() if value.is_meta] if part else []
        if missing:
            lacking = f"{len(missing)} {name} weights are missing (first: {missing[0]})"
            raise ErasureError(f"{path}: Detected as {detected.about}, but {lacking}")
    return pipe


def own_tokenizer(detected: DetectedModel, name: str) -> Any | None:
    """Return the tokenizer that a file of ours brings in its header; None if it brings none.

    Args:
        detected: the file's type.
        name: the component, such as tokenizer_2.
    """
    if not _included(detected.files, name):
        return None
    import transformers

    with TemporaryDirectory(prefix="erasure-tokenizer-") as folder:
        for path, values in detected.files.items():
            if path.startswith(f"{name}/"):
                Path(folder, Path(path).name).write_text(json.dumps(values), encoding="utf-8")
        return getattr(transformers, detected.files[INDEX][name][1]).from_pretrained(folder)


def of_type(dtype: Any) -> dict[str, Any]:
    """Return a dtype as the keyword argument of diffusers' loaders, which was called `torch_dtype` before 0.42."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


def _modules(index: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def _included(files: Mapping[str, Any], name: str) -> bool:
    return any(path.startswith(f"{name}/") for path in files)
