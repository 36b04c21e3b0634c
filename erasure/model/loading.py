"""Find checkpoints by name or path, detect their types, and open them as diffusers pipelines."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erasure.concepts.vocabulary import Vocabulary
from erasure.concepts.word_lists import WordLists
from erasure.errors import ErasureError
from erasure.model import presets
from erasure.model.architectures import architecture_of
from erasure.model.presets import Family, Sampling
from erasure.model.quantising import check_quantising, quantise
from erasure.model.single_file import INDEX, DetectedModel, identify, of_type, open_single_file, open_transformer

THIRD = ("text_encoder_3", "tokenizer_3")


def resolve(model: str | os.PathLike[str]) -> str:
    """Return the folder, file or hub id that a model's name or path refers to.

    A hub id is returned without looking it up.

    Args:
        model: the name of a bundled checkpoint such as `glyph`, a diffusers folder, a `.safetensors` file or a hub id.

    Raises:
        ErasureError: the path does not exist, the folder has no `model_index.json`, or the file is not `.safetensors`.
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
            raise ErasureError(
                f"{name}: only .safetensors files can be loaded, not {path.suffix or 'files without a suffix'}"
            )
        return str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".safetensors":
        bundled = ", ".join(presets.bundled())
        missing = ": there is no such file" if path.suffix == ".safetensors" else ""
        raise ErasureError(
            f"unknown model {name!r}{missing}. Allowed: {bundled}, a diffusers folder, a .safetensors file, "
            "or a hub id (owner/name)"
        )
    return name


def look(where: str, **options: Any) -> DetectedModel:
    """Detect the type of a model without loading it; for a hub id, one small file is fetched.

    Args:
        where: a folder, file or hub id, as `resolve` returns it.
        options: arguments of `Base.load`. `config` overrides the type of a single file; `revision`, `cache_dir`,
            `token` and `local_files_only` choose the copy of a hub id.

    Returns:
        The type. For a folder or hub id, only its class name is filled in.

    Raises:
        ErasureError: the file is of an unknown type, the hub id is not in the cache and the hub cannot be reached, or
            `config` is given for something other than a single file.
    """
    path = Path(where)
    if path.is_file():
        return identify(path, options.get("config"))
    if options.get("config") is not None:
        raise ErasureError(
            f"{where}: `config` sets the type of a single file; a diffusers folder brings its own configuration"
        )
    index = path / INDEX if path.is_dir() else hub_file(where, INDEX, **options)
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ErasureError(f"{where}: its {INDEX} cannot be read or names no pipeline class: {fault!r}") from None
    return DetectedModel("folder", f"a {name}, by its {INDEX}", {INDEX: {"_class_name": name}})


def hub_file(name: str, file: str, **options: Any) -> Path:
    """Return the local path of one file of a hub id, downloading it unless the cache has it.

    Args:
        name: the hub id, `owner/name`.
        file: the path of the file inside the repository.
        options: `revision`, `cache_dir`, `token` and `local_files_only` of the hub's client; others are ignored.

    Raises:
        ErasureError: the file is in neither place, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import constants, hf_hub_download

    settings = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    try:
        return Path(hf_hub_download(name, file, **settings))
    except Exception as fault:  # the errors of the hub's client and of its HTTP library have no common base class
        offline = constants.HF_HUB_OFFLINE or settings.get("local_files_only")
        reason = (
            "the hub is switched off (HF_HUB_OFFLINE)" if offline else f"the hub did not deliver it ({_first(fault)})"
        )
        raise ErasureError(
            f"{name}: {reason}, and no copy is in the cache {settings.get('cache_dir', constants.HF_HUB_CACHE)}. "
            f"Download it on a machine with a network (hf download {name}), or give a folder or a .safetensors file"
        ) from None


def _first(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def quiet() -> None:
    """Silence the progress bars and hints of diffusers and transformers, which would hide our messages."""
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
    source = str(getattr(getattr(pipe, "config", None), "_name_or_path", None) or "unknown")
    return next((name for name in presets.bundled() if source == resolve(name)), source)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline's checkpoint; see `presets.family`."""
    return presets.family(pipe, name_of(pipe))


def words_of(pipe: Any) -> Vocabulary | WordLists:
    """Return what says of which kind a concept is: the vocabulary of a pipeline's checkpoint, else our lists."""
    return presets.vocabulary(name_of(pipe)) or WordLists()


def sampling_of(pipe: Any, steps: int | None = None, guidance: float | None = None) -> Sampling:
    """Return how images of a checkpoint are sampled: as given, else as its family's preset says.

    A checkpoint of no family is sampled as its pipeline class does where nothing is said.

    Args:
        pipe: the pipeline.
        steps: number of steps; None: not given.
        guidance: classifier-free guidance scale; None: not given.

    Raises:
        ErasureError: a value is not given, and neither a preset nor the pipeline has one.
    """
    if steps is not None and guidance is not None:
        return Sampling(steps, guidance, source="given")
    family = family_of(pipe)
    if family.preset is not None:
        own: Sampling | None = family.preset.sampling
    else:
        own = _class_sampling(pipe)
    if own is None:
        raise ErasureError(f"{family.why}, so nothing says how to sample its images: give steps and guidance")
    return replace(
        own,
        steps=own.steps if steps is None else steps,
        guidance=own.guidance if guidance is None else guidance,
        source=own.source if family.preset is None else f"preset {family.preset.name}: {own.source}",
    )


def call_of(pipe: Any, prompts: int, guidance: float, family: Family | None = None) -> dict[str, Any]:
    """Return the arguments with which a pipeline draws n prompts at a guidance scale.

    Args:
        pipe: the diffusers pipeline.
        prompts: number of prompts.
        guidance: scale of classifier-free guidance.
        family: the checkpoint's family; None: found out.

    Raises:
        ErasureError: the model is distilled from a guided one, and the scale is not 1.
    """
    preset = (family or family_of(pipe)).preset
    return architecture_of(pipe).call(pipe, prompts, guidance, {} if preset is None else preset.call)


def _class_sampling(pipe: Any) -> Sampling | None:
    """Return the defaults of the diffusers class that a pipeline is or derives from; None if it has none."""
    scale = architecture_of(pipe).guidance
    for parent in type(pipe).__mro__:
        parameters = inspect.signature(parent.__call__).parameters if "__call__" in vars(parent) else {}
        values = [parameters[key].default for key in ("num_inference_steps", scale) if key in parameters]
        if len(values) == 2 and all(isinstance(value, int | float) for value in values):
            return Sampling(values[0], values[1], source=f"defaults of {parent.__name__}")
    return None


def _line(pipeline: str) -> str | None:
    """Return the line of models that a pipeline class is for, by its name; None if it is none of ours."""
    lines = ("StableDiffusionXL", "StableDiffusion3", "StableDiffusion", "Flux", "PixArt", "Sana", "QwenImage")
    return next((line for line in lines if pipeline.startswith(line)), None)


def _left_out(where: str, options: Mapping[str, Any]) -> list[str]:
    """Return the parts of the third text encoder that a folder or hub id of Stable Diffusion 3 does not have."""
    if Path(where).is_file() or not (names := [name for name in THIRD if name not in options]):
        return []
    index = Path(where, INDEX) if Path(where).is_dir() else hub_file(where, INDEX, **options)
    entries = json.loads(index.read_text(encoding="utf-8"))
    return [name for name in names if name in entries and entries[name] in (None, [None, None])]


def open_pipeline(cls: type[Any], model: str | os.PathLike[str], **options: Any) -> Any:
    """Load a checkpoint as a pipeline of the given class.

    Weights are loaded as fp32 unless `dtype` (or `torch_dtype`) is passed. Stable Diffusion 1 and 2 are loaded without
    a safety checker unless one is passed, because it would replace images that an evaluation has to judge by black
    ones.

    Args:
        cls: a diffusers pipeline class, or a class derived from one.
        model: the name of a bundled checkpoint, a diffusers folder, a `.safetensors` file or a hub id.
        options: arguments of diffusers' `from_pretrained`. For a single file, `config` is its type (one of
            `single_file.kinds()`) or a diffusers folder with its configuration. `quantize` is the kind of 8-bit
            layers to load it with, see `quantising`.

    Raises:
        ErasureError: the model does not exist, cannot be loaded, or is not of a type that the class supports.
    """
    kind = options.pop("quantize", None)
    check_quantising(kind)
    pipe = _opened(cls, model, **options)
    if kind is not None:
        quantise(pipe)
    return pipe


def _opened(cls: type[Any], model: str | os.PathLike[str], **options: Any) -> Any:
    import diffusers

    where = resolve(model)
    detected = look(where, **options)
    # The type of an erased class is that of the diffusers class from which it derives.
    kind = next(parent.__name__ for parent in cls.__mro__ if parent.__module__.startswith("diffusers."))
    if None not in (own := (_line(kind), _line(detected.pipeline))) and own[0] != own[1]:
        raise ErasureError(
            f"{model}: {detected.about}; {cls.__name__} cannot hold it. erasure.load_pipeline chooses the right class"
        )
    dtype = options.pop("dtype", options.pop("torch_dtype", None)) or torch.float32
    if detected.folder is not None:
        options.pop("config")
        transformer, configs = detected.files[INDEX]["transformer"][1], detected.files["transformer/config.json"]
        options["transformer"] = open_transformer(where, getattr(diffusers, transformer), configs, **of_type(dtype))
        where = os.fspath(detected.folder)
    for name in _left_out(where, options):  # diffusers takes it for an error that they are missing
        options.setdefault(name, None)
    if "safety_checker" in inspect.signature(cls.__init__).parameters and "safety_checker" not in options:
        options["safety_checker"] = None
        options.setdefault("requires_safety_checker", False)
    options |= of_type(dtype)
    if Path(where).is_file():
        return open_single_file(
            cls, where, detected, **{key: value for key, value in options.items() if key != "config"}
        )
    try:
        return diffusers.DiffusionPipeline.from_pretrained.__func__(cls, where, **options)  # type: ignore[attr-defined]
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{model} cannot be loaded: {fault}") from None
