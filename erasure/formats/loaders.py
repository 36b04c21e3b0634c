"""What other programs load: the one table of facts about them.

Read in the sources of ComfyUI (comfy/lora.py) and A1111 (extensions-builtin/Lora/networks.py), tried with diffusers.
tests/formats/test_loaders.py holds the facts against maps made from the true configurations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from erasure.formats.diff import has_two_encoders, width
from erasure.patch import Delta, LowRank, Patch
from erasure.patch.keys import kohya_prefix

Keys = tuple[tuple[str, str], ...]
BASES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of the text embedding -> family
_LINEAR = r"(mlp_fc[12]|self_attn_(q|k|v|out)_proj)"


@dataclass(frozen=True)
class Loader:
    """One program.

    Args:
        formats: those of the index that it loads.
        gate: whether it runs a patch's gate; without, the patch acts on every prompt.
        misses: (family, pattern): kohya keys it has no layer for, in models of that family ("" for all).
    """

    formats: tuple[str, ...]
    gate: bool = False
    misses: Keys = ()


LOADERS = {
    "erasure": Loader(
        ("spm", "kohya", "peft", "diff", "unet", "text-encoder", "checkpoint", "single-file", "unguide"), gate=True
    ),
    "diffusers": Loader(("spm", "kohya", "peft", "checkpoint", "single-file")),
    "ComfyUI": Loader(
        ("spm", "kohya", "diff", "single-file"),
        # Of the text encoders only the linear layers, and XL's projection.
        misses=(("", rf"lora_te[12]?_(?!text_model_encoder_layers_\d+_{_LINEAR}$|text_projection$).*"),),
    ),
    "A1111": Loader(
        ("spm", "kohya", "diff", "single-file"),
        misses=(
            ("sd1", r"lora_te_(?!text_model_encoder_layers_\d+_).*"),
            # open_clip's encoders: their norms have other names.
            ("sd2", rf"lora_te_(?!text_model_encoder_layers_\d+_{_LINEAR}$).*"),
            ("sdxl", rf"lora_te2_(?!text_model_encoder_layers_\d+_{_LINEAR}$).*"),
            # Its table of upsamplers is that of Stable Diffusion 1, where this block has no attention.
            ("sdxl", r"lora_unet_up_blocks_0_upsamplers_0_conv"),
        ),
    ),
}

# Loaders that give attention layers the commonest alpha of a kohya file; what we write has one, others' may not.
ONE_ALPHA = ("diffusers",)


def family(payload: LowRank | Delta) -> str:
    """sd1, sd2 or sdxl, as far as the payload tells; sd1 where it does not."""
    return "sdxl" if has_two_encoders(payload) else BASES.get(width(payload) or 0, "sd1")


def missed(loader: str, payload: LowRank | Delta) -> list[str]:
    """The kohya keys of a payload for which the loader has no layer, sorted."""
    kind, two = family(payload), has_two_encoders(payload)
    keys = {
        kohya_prefix(component, name.rpartition(".")[0], two)
        for component in payload.components
        for name in payload.names(component)
    }
    patterns = [pattern for base, pattern in LOADERS[loader].misses if base in ("", kind)]
    return sorted(key for key in keys if any(re.fullmatch(pattern, key) for pattern in patterns))


def takes(form: str) -> list[str]:
    """The programs that load a format."""
    return [name for name, loader in LOADERS.items() if form in loader.formats]


def notes(form: str, payload: LowRank | Delta) -> list[str]:
    """What the programs that load a format leave out of this payload."""
    found = []
    for name in takes(form):
        if lost := missed(name, payload):
            found.append(f"{name} has no layer for {len(lost)} of its keys, the first {lost[0]}")
    return found


def as_it_is(patch: Patch) -> dict[str, str]:
    """What each program makes of the patch's own file."""
    gated = patch.gate["kind"] != "always"
    found: dict[str, Any] = {}
    for name, loader in LOADERS.items():
        if loader.gate:
            found[name] = "with its gate" if gated else "yes"
        elif not isinstance(patch.payload, LowRank):
            forms = [form for form in ("diff", "checkpoint") if form in loader.formats]
            found[name] = f"no: export --format {forms[0]}, or kohya --rank R"
        else:
            found[name] = "without its gate" if gated else "yes"
            if lost := missed(name, patch.payload):
                found[name] += f", but not {len(lost)} layers, the first {lost[0]}"
            if name in ONE_ALPHA and patch.stored.get("alphas", 1) > 1:
                found[name] = "no: it mistakes alphas that differ, as this file's do: export --format kohya"
    return found
