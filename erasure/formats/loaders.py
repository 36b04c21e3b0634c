"""Which programs load which export formats, and what they leave out of a patch."""

from __future__ import annotations

from erasure.patch import Delta, LowRank
from erasure.patch.loaders import LOADERS, missed

LOADS = {
    "erasure": ("spm", "kohya", "peft", "diff", "unet", "text-encoder", "checkpoint", "single-file", "unguide"),
    "diffusers": ("spm", "kohya", "peft", "checkpoint", "single-file"),
    "ComfyUI": ("spm", "kohya", "diff", "single-file"),
    "A1111": ("spm", "kohya", "diff", "single-file"),
}


def takes(form: str) -> list[str]:
    """List the programs that load a format."""
    return [name for name in LOADERS if form in LOADS[name]]


def notes(form: str, payload: LowRank | Delta) -> list[str]:
    """List what the programs that load a format leave out of this payload, one sentence a program."""
    lost = {name: missed(name, payload) for name in takes(form)}
    return [
        f"{name} has no layer for {len(keys)} of its keys, the first {keys[0]}" for name, keys in lost.items() if keys
    ]
