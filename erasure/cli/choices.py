"""Names that the help texts show, found without importing torch.

Whatever is a file is listed from its folder. The rest is written out here, and a test compares it with the library.
Nothing is refused by these names, for plug-ins may bring more: what a name is good for is checked where it is used.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent

KINDS = ("object", "style", "identity", "content")
DTYPES = ("fp32", "fp16", "bf16")
QUANTISED = ("int8",)
DEVICES = ("cpu", "cuda", "cuda:1", "mps")
STOPS = ("never", "auto")
TRACKERS = ("tensorboard", "wandb")
BUDGETS = ("lite", "full")
ATTACKS = (
    "encoder",
    "rece",
    "ring-a-bell-direct",
    "ring-a-bell",
    "mma-diffusion",
    "unlearndiffatk",
    "p4d",
    "p4d-prefix",
    "uma",
    "inversion",
    "img2img",
    "inpainting",
    "completion",
    "noise-scale",
    "relearning",
    "random",
    "detune",
)
JUDGES = ("classifier", "clip", "glyph", "inception", "nudenet")
BACKBONES = ("alex", "squeeze", "vgg")
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
WRITTEN = ("spm", "kohya", "peft", "diff", "unet", "text-encoder", "checkpoint", "single-file")
READ = (*WRITTEN, "unguide")
CODES = ("esd", "uce", "salun", "advunlearn")  # whose published files are in one of the formats


def methods() -> tuple[str, ...]:
    """List the bundled methods."""
    return _stems("methods", "*.py")


def suites() -> tuple[str, ...]:
    """List the bundled suites."""
    return _stems("configs/suites", "*.yaml")


def prompt_sets() -> tuple[str, ...]:
    """List the bundled prompt sets."""
    return _stems("prompts", "*.csv")


def models() -> tuple[str, ...]:
    """List the models whose checkpoint is bundled."""
    presets = (PACKAGE / "model" / "presets").glob("*.yaml")
    return tuple(sorted(path.stem for path in presets if "\ncheckpoint:" in path.read_text(encoding="utf-8")))


def presets() -> tuple[str, ...]:
    """List the presets of families."""
    return _stems("model/presets", "*.yaml")


def checkpoint_kinds() -> tuple[str, ...]:
    """List the types of single-file checkpoint whose configuration is bundled."""
    return _stems("configs/models", "*.json")


def networks() -> tuple[str, ...]:
    """List the published transformers whose configuration is bundled."""
    return _stems("configs/networks", "*.json")


def _stems(folder: str, pattern: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (PACKAGE / folder).glob(pattern) if not path.stem.startswith("_")))
