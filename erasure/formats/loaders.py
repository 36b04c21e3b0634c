"""The programs that load each export format, and what they leave out of a patch."""

from __future__ import annotations

from erasure.patch import Delta, LowRank
from erasure.patch.loaders import LOADERS, missed
from erasure.patch.module_keys import TRANSFORMER

LOADS = {
    "erasure": ("spm", "kohya", "peft", "diff", "unet", "text-encoder", "checkpoint", "single-file", "unguide"),
    "diffusers": ("spm", "kohya", "peft", "checkpoint", "single-file"),
    "ComfyUI": ("spm", "kohya", "diff", "single-file"),
    "A1111": ("spm", "kohya", "diff", "single-file"),
}


def takes(form: str) -> list[str]:
    """Return the names of the programs that load a format.

    Args:
        form: name of the format, one of `FORMATS`.
    """
    return [name for name in LOADERS if form in LOADS[name]]


def notes(form: str, payload: LowRank | Delta) -> list[str]:
    """Return what the programs that load a format leave out of a payload, one sentence per program.

    Args:
        form: name of the format, one of `FORMATS`.
        payload: the change of the weights.
    """
    if form == "single-file" and TRANSFORMER in payload.components:
        return []  # a model, in which programs that know the model have every layer
    unmatched = {name: missed(name, payload) for name in takes(form)}
    return [
        f"{name} ignores {len(keys)} keys, for which it has no layer (first: {keys[0]})"
        for name, keys in unmatched.items()
        if keys
    ]
