"""How other programs read a patch file: one table of facts about them.

The facts come from the sources of ComfyUI (comfy/lora.py) and A1111 (extensions-builtin/Lora/networks.py), and from
trials with diffusers. tests/formats/test_loaders.py checks them against maps made from the true configurations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from erasure.patch import Delta, LowRank, Patch
from erasure.patch.module_keys import kohya_prefix
from erasure.patch.serialization import text_width, two_encoders

Keys = tuple[tuple[str, str], ...]
BASES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of the text embedding -> family
_LINEAR = r"(mlp_fc[12]|self_attn_(q|k|v|out)_proj)"


@dataclass(frozen=True)
class Loader:
    """How one program reads patches.

    Args:
        gate: whether it runs a patch's gate; without it, the patch acts on every prompt.
        delta: the export format in which it loads differences of whole weights.
        misses: (family, pattern): kohya keys it has no layer for, in models of that family ("" for all).
    """

    gate: bool = False
    delta: str = "diff"
    misses: Keys = ()


LOADERS = {
    "erasure": Loader(gate=True),
    "diffusers": Loader(delta="checkpoint"),
    "ComfyUI": Loader(
        # Of the text encoders only the linear layers, and XL's projection.
        misses=(("", rf"lora_te[12]?_(?!text_model_encoder_layers_\d+_{_LINEAR}$|text_projection$).*"),),
    ),
    "A1111": Loader(
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
    """Return the base's family, sd1, sd2 or sdxl, as far as the payload shows; sd1 where it does not."""
    return "sdxl" if two_encoders(payload) else BASES.get(text_width(payload) or 0, "sd1")


def missed(loader: str, payload: LowRank | Delta) -> list[str]:
    """List the kohya keys of a payload for which the loader has no layer, sorted."""
    kind, two = family(payload), two_encoders(payload)
    keys = {
        kohya_prefix(component, name.rpartition(".")[0], two)
        for component in payload.components
        for name in payload.names(component)
    }
    patterns = [pattern for base, pattern in LOADERS[loader].misses if base in ("", kind)]
    return sorted(key for key in keys if any(re.fullmatch(pattern, key) for pattern in patterns))


def as_it_is(patch: Patch) -> dict[str, str]:
    """Say for each program whether it loads the patch's own file, and what it leaves out."""
    gated = patch.gate["kind"] != "always"
    answers: dict[str, Any] = {}
    for name, loader in LOADERS.items():
        if loader.gate:
            answers[name] = "with its gate" if gated else "yes"
        elif not isinstance(patch.payload, LowRank):
            answers[name] = f"no: export --format {loader.delta}, or kohya --rank R"
        else:
            answers[name] = "without its gate" if gated else "yes"
            if lost := missed(name, patch.payload):
                answers[name] += f", but not {len(lost)} layers, the first {lost[0]}"
            if name in ONE_ALPHA and patch.stored.get("alphas", 1) > 1:
                answers[name] = "no: it mistakes alphas that differ, as this file's do: export --format kohya"
    return answers
