"""The checkpoint that is erased from: where it lies, its components, its modules by type.

The only file that knows architectures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.checkpoints.opening import INDEX, Found, identify
from erasure.conditions import Conditions, blank, encode_prompt, place, predict, text_encoders, unconditional
from erasure.errors import ErasureError, unknown

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
BUNDLED = {"glyph": "the embedded checkpoint: 40 objects in 6 styles, 64x64 pixels, runs on a CPU"}


def resolve(model: str | os.PathLike[str]) -> str:
    """The folder, file or hub id that `model` names; `glyph` is the embedded checkpoint.

    Raises:
        ErasureError: a path that does not exist, or a folder without `model_index.json`.
    """
    name = os.fspath(model)
    if name in BUNDLED:
        from erasure.glyph import CHECKPOINT

        return str(CHECKPOINT)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ErasureError(f"{name}: not a diffusers folder, it holds no model_index.json")
        return str(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ErasureError(f"{name}: only .safetensors files are read, not {path.suffix or 'this file'}")
        return str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".safetensors":
        known, missing = ", ".join(BUNDLED), ": there is no such file" if path.suffix == ".safetensors" else ""
        raise ErasureError(
            f"unknown model {name!r}{missing}. Allowed: {known}, a diffusers folder, a .safetensors file, "
            "or a hub id (owner/name)"
        )
    return name


def look(where: str, **options: Any) -> Found:
    """What kind of model lies where `resolve` says, without loading it; of a hub id one small file is fetched.

    Args:
        options: those of `Base.load`; what says which copy of a hub id is meant is heeded.

    Raises:
        ErasureError: a file of an unknown kind; a hub id that is not in the cache and cannot be reached.
    """
    path = Path(where)
    if path.is_file():
        return identify(path, options.get("config"))
    if options.get("config") is not None:
        raise ErasureError(f"{where}: `config` says what a single file is; a diffusers folder brings its own")
    index = path / INDEX if path.is_dir() else hub_file(where, INDEX, **options)
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ErasureError(f"{where}: its {INDEX} cannot be read: {fault!r}") from None
    return Found("folder", f"a {name}, by its {INDEX}", {INDEX: {"_class_name": name}})


def hub_file(name: str, file: str, **options: Any) -> Path:
    """One file of a hub id, from the cache or the hub.

    Raises:
        ErasureError: it is in neither, or the hub is switched off or out of reach.
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


# Which modules a named variant trains, by the module's path. Only Linear and Conv2d are ever trained.
TARGETS = {
    "x": ("cross-attention: query, key, value and output", lambda path: "attn2" in path),
    "x-strict": ("cross-attention: key and value", lambda path: path.endswith(("attn2.to_k", "attn2.to_v"))),
    "selfattn": ("self-attention", lambda path: "attn1" in path),
    "u": ("all but cross-attention", lambda path: "attn2" not in path),
    "transformer": ("every layer of the transformer blocks", lambda path: ".attentions." in path),
    "linear": (
        "linear layers of self-attention, feed-forward and time projections",
        lambda path: "attn1" in path or ".ff." in path or "time_emb_proj" in path,
    ),
    "full": ("every Linear and Conv2d", lambda path: True),
}


def quiet() -> None:
    """No bars and no advice from diffusers and transformers while they load: our own messages would drown."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def best_device() -> torch.device:
    """The accelerator that this process's launcher gave it, else the first one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass
class Base:
    """A loaded checkpoint: the components that erasing needs, in one copy.

    Args:
        name: as the user gave it.
        pipe: the diffusers pipeline that holds the components.
        about: what it was taken for.
    """

    name: str
    pipe: Any
    about: str = ""
    _texts: dict[str, Conditions] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, model: str | os.PathLike[str] = "glyph", *, device: str | torch.device | None = None, **options: Any
    ) -> Base:
        """Load a checkpoint by the name of an embedded one, folder, file or hub id.

        Args:
            model: its name.
            device: where to compute; None: `best_device()`.
            options: those of diffusers' `from_pretrained`, and `config` for a file (see `checkpoints.identify`).

        Raises:
            ErasureError: the model is unknown or cannot be loaded; there is no such device.
        """
        from erasure import pipelines

        found = look(resolve(model), **options)
        kind = getattr(pipelines, f"Erased{found.pipeline}", None) if found.pipeline in PIPELINES else None
        if kind is None:
            raise ErasureError(
                f"{model}: {found.about}. Concepts are erased from {' and '.join(PIPELINES)}; what is erased there "
                "loads into the others of the family. Nothing was loaded"
            )
        pipe = kind.from_pretrained(model, **options)
        try:
            return cls(os.fspath(model), pipe.to(device or best_device()), found.about)
        except (RuntimeError, AssertionError) as fault:
            raise ErasureError(f"{model} cannot be put on {device or best_device()}: {fault}") from None

    @classmethod
    def of(cls, value: Base | str | os.PathLike[str] | Any) -> Base:
        """A base from a base, a model's name, or a diffusers pipeline (whose components it shares)."""
        if isinstance(value, Base):
            return value
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        if not hasattr(value, "unet") or not hasattr(value, "text_encoder"):
            raise ErasureError(
                f"{type(value).__name__} is no Stable Diffusion pipeline: it has no unet or text_encoder"
            )
        text_encoders(value)  # refuses what lacks one
        channels, vae = value.unet.config.in_channels, getattr(value, "vae", None)
        latents = vae.config.latent_channels if vae is not None else channels
        if channels != latents:
            raise ErasureError(
                f"{type(value).__name__}: its UNet takes {channels} channels, {latents} of them latents (inpainting, "
                "depth or editing): erase from the text-to-image model of the family, and load the patch here"
            )
        listed = value.get_list_patches() if hasattr(value, "get_list_patches") else {}
        if acting := [name for name, entry in listed.items() if entry["strength"]]:
            raise ErasureError(
                f"patches act on this pipeline ({', '.join(acting)}): what is erased next would lean on them. "
                "Unload them, or set_patches({}), first; nothing was changed"
            )
        known = str(getattr(value.config, "_name_or_path", None) or "unknown")
        return cls(next((name for name in BUNDLED if known == resolve(name)), known), value)

    @property
    def unet(self) -> Any:
        """The one UNet."""
        return self.pipe.unet

    @property
    def scheduler(self) -> Any:
        """The checkpoint's own scheduler; its configuration makes the others."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Where the UNet computes; offloaded, its weights rest elsewhere between calls."""
        return place(self.pipe, self.unet)

    def sampler(self, kind: str = "ddim") -> Any:
        """A fresh sampler on the checkpoint's noise schedule: `ddim` or `pndm`."""
        from diffusers import DDIMScheduler, PNDMScheduler

        classes = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}
        if kind not in classes:
            raise unknown("sampler", kind, classes)
        config = self.scheduler.config
        # XL's and other users' schedulers do not clip and may not say so; DDIM would, where it is not told.
        more = {"clip_sample": False} if kind == "ddim" and "clip_sample" not in config else {}
        return classes[kind].from_config(config, **more)

    def latent_shape(self, scale: float | tuple[float, float] = 1.0) -> tuple[int, int, int]:
        """Channels, height, width of the latents at `scale` (of both, or of height and width) times the native size."""
        config = self.unet.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tall, wide = scale if isinstance(scale, tuple) else (scale, scale)
        return config.in_channels, round(height * tall), round(width * wide)

    def encode(self, prompts: list[str]) -> Tensor:
        """What the text encoder says of each prompt [n, tokens, width]; each is encoded once.

        Raises:
            ErasureError: a prompt is longer than the text encoder reads.
        """
        return self._encoded(prompts).states

    def conditions(self, prompts: list[str]) -> Conditions:
        """What the UNet is told for each prompt; the empty one is guidance's unconditional.

        Raises:
            ErasureError: a prompt is longer than the text encoder reads.
        """
        found = self._encoded(prompts)
        if "" not in prompts or found.pooled is None:
            return found
        parts = [found[i : i + 1] for i in range(len(prompts))]
        return Conditions.cat(
            [part if text else unconditional(self.pipe, part) for text, part in zip(prompts, parts, strict=True)]
        )

    def predict(self, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
        """The UNet's output [n, c, h, w] for latents x at timesteps t: noise, v or clean latents, as it was trained."""
        return predict(self.pipe, x, t, conditions)

    def _encoded(self, prompts: list[str]) -> Conditions:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = encode_prompt(self.pipe, prompt)
        return Conditions.cat([self._texts[prompt] for prompt in prompts])

    def targets(self, variant: str) -> dict[str, nn.Module]:
        """The Linear and Conv2d modules of the UNet that a variant trains, by path.

        Raises:
            ErasureError: unknown variant, or no module of this checkpoint fits it.
        """
        if variant not in TARGETS:
            raise unknown("variant", variant, TARGETS)
        test = TARGETS[variant][1]
        found: dict[str, nn.Module] = {
            path: module
            for path, module in self.unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and test(path)
        }
        if not found:
            raise ErasureError(f"variant {variant!r} fits none of the {type(self.unet).__name__}'s modules")
        return found

    def still(self, paths: Iterable[str]) -> bool:
        """Whether no change of these modules can move the answer to the empty prompt.

        XL's is all zeros: cross-attention has keys and values of 0 there and adds nothing, whatever its weights.
        """
        return blank(self.pipe) and all("attn2" in path for path in paths)
