"""Find a checkpoint, detect its type, and open it as a diffusers pipeline."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from erasure.errors import ErasureError
from erasure.model import presets
from erasure.model.single_file import INDEX, DetectedModel, identify, of_type, open_single_file

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def resolve(model: str | os.PathLike[str]) -> str:
    """Return the folder, file or hub id that `model` names; `glyph` is a bundled checkpoint.

    Raises:
        ErasureError: a path that does not exist, or a folder without `model_index.json`.
    """
    name = os.fspath(model)
    if name in presets.bundled():
        return str(presets.bundled()[name].checkpoint)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ErasureError(f"{name} is not a diffusers folder: it holds no model_index.json")
        return str(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ErasureError(f"{name}: only .safetensors files can be loaded, not {path.suffix or 'this file'}")
        return str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".safetensors":
        known, missing = (
            ", ".join(presets.bundled()),
            ": there is no such file" if path.suffix == ".safetensors" else "",
        )
        raise ErasureError(
            f"unknown model {name!r}{missing}. Allowed: {known}, a diffusers folder, a .safetensors file, "
            "or a hub id (owner/name)"
        )
    return name


def look(where: str, **options: Any) -> DetectedModel:
    """Detect the type of a model without loading it; for a hub id, one small file is fetched.

    Args:
        where: a folder, file or hub id, as `resolve` returns it.
        options: arguments of `Base.load`; `revision`, `cache_dir`, `token` and `local_files_only` choose the copy of a
            hub id.

    Raises:
        ErasureError: a file of an unknown type, or a hub id that is not in the cache and cannot be reached.
    """
    path = Path(where)
    if path.is_file():
        return identify(path, options.get("config"))
    if options.get("config") is not None:
        raise ErasureError(
            f"{where}: `config` names the type of a single file; a diffusers folder brings its own configuration"
        )
    index = path / INDEX if path.is_dir() else hub_file(where, INDEX, **options)
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ErasureError(f"{where}: its {INDEX} cannot be read: {fault!r}") from None
    return DetectedModel("folder", f"a {name}, by its {INDEX}", {INDEX: {"_class_name": name}})


def hub_file(name: str, file: str, **options: Any) -> Path:
    """Return the path of one file of a hub id, from the cache or from the hub.

    Raises:
        ErasureError: the file is in neither, or the hub is switched off or out of reach.
    """
    from huggingface_hub import constants, hf_hub_download

    wanted = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    try:
        return Path(hf_hub_download(name, file, **wanted))
    except Exception as fault:  # the hub's client, and the one below it, have no common error
        offline = constants.HF_HUB_OFFLINE or wanted.get("local_files_only")
        reason = (
            "the hub is switched off (HF_HUB_OFFLINE)" if offline else f"the hub does not give it ({_first(fault)})"
        )
        raise ErasureError(
            f"{name}: {reason}, and no copy is in the cache {wanted.get('cache_dir', constants.HF_HUB_CACHE)}. "
            f"Fetch it where there is a network (hf download {name}), or give a folder or a .safetensors file"
        ) from None


def _first(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def quiet() -> None:
    """Silence the progress bars and hints of diffusers and transformers, which would hide our own messages."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def best_device() -> torch.device:
    """Return the accelerator that the launcher assigned to this process, else the first one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def name_of(pipe: Any) -> str:
    """Return what a pipeline was loaded from: the name of a bundled checkpoint, a folder, a hub id, or "unknown"."""
    known = str(getattr(pipe.config, "_name_or_path", None) or "unknown")
    return next((name for name in presets.bundled() if known == resolve(name)), known)


def open_pipeline(cls: type[Any], model: str | os.PathLike[str], **options: Any) -> Any:
    """Open a checkpoint as a pipeline of a class.

    Stable Diffusion 1 and 2 come without a safety checker unless one is passed: it would blacken images that an
    evaluation is to judge. Weights come as fp32 unless `dtype` (or `torch_dtype`) is passed.

    Args:
        cls: a diffusers pipeline class, or one derived from it.
        model: a bundled name, a diffusers folder, a `.safetensors` file or a hub id.
        options: those of diffusers' `from_pretrained`; for a file, `config` names its kind (see `single_file.kinds()`)
            or is a diffusers folder.

    Raises:
        ErasureError: `model` names nothing that this class can hold.
    """
    import torch
    from diffusers import DiffusionPipeline

    where = resolve(model)
    detected = look(where, **options)
    # An erased class stands for the diffusers class behind it.
    kind = next(one.__name__ for one in cls.__mro__ if one.__module__.startswith("diffusers."))
    if "StableDiffusion" in kind and ("XL" in kind) != ("XL" in detected.pipeline):
        raise ErasureError(
            f"{model}: {detected.about}; {cls.__name__} cannot hold it. erasure.load_pipeline finds the class itself"
        )
    if "safety_checker" in inspect.signature(cls.__init__).parameters and "safety_checker" not in options:
        options["safety_checker"] = None
        options.setdefault("requires_safety_checker", False)
    options |= of_type(options.pop("dtype", options.pop("torch_dtype", None)) or torch.float32)
    if Path(where).is_file():
        return open_single_file(
            cls, where, detected, **{key: value for key, value in options.items() if key != "config"}
        )
    try:
        return DiffusionPipeline.from_pretrained.__func__(cls, where, **options)  # type: ignore[attr-defined]
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{model} cannot be loaded: {fault}") from None
