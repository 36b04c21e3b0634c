"""What other programs can load from a patch file, as one table of facts.

The facts come from the source code of ComfyUI (comfy/lora.py) and A1111 (extensions-builtin/Lora/networks.py), and
from tests with diffusers. tests/formats/test_loaders.py checks them against the real configurations of the models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from erasure.model.single_file import VERSIONS
from erasure.patch import Delta, Features, Guard, LowRank, Patch
from erasure.patch.module_keys import TRANSFORMER
from erasure.patch.serialization import kohya_keys, text_width, two_encoders

Keys = tuple[tuple[str, str], ...]
PROJECTIONS = 4  # of an attention layer: q, k, v and out
_LINEAR = r"(mlp_fc[12]|self_attn_(q|k|v|out)_proj)"


@dataclass(frozen=True)
class Loader:
    """What one program can load from a patch file.

    Args:
        gate: whether it evaluates a patch's gate. Without the gate, the patch acts on every prompt.
        delta: the export format in which it loads weight differences.
        misses: pairs (family, pattern) of kohya keys for which it has no layer in models of that family ("" for all).
        joined: pairs (family, pattern) of keys of attention projections that it loads only all four together, and
            without the biases of q, k and v, because the model has one layer for them; group 1 is that layer.
    """

    gate: bool = False
    delta: str = "diff"
    misses: Keys = ()
    joined: Keys = ()


LOADERS = {
    "erasure": Loader(gate=True),
    "diffusers": Loader(delta="checkpoint"),
    "ComfyUI": Loader(
        # It loads only the linear layers of the text encoders, and XL's projection.
        misses=(("", rf"lora_te[12]?_(?!text_model_encoder_layers_\d+_{_LINEAR}$|text_projection$).*"),),
    ),
    "A1111": Loader(
        misses=(
            ("", r"transformer\..*"),
            ("sd1", r"lora_te_(?!text_model_encoder_layers_\d+_).*"),
            # The norms of open_clip's encoders have other names there.
            ("sd2", rf"lora_te_(?!text_model_encoder_layers_\d+_{_LINEAR}$).*"),
            ("sdxl", rf"lora_te2_(?!text_model_encoder_layers_\d+_{_LINEAR}$).*"),
            # It knows diffusers' names for Stable Diffusion 1's upsamplers, where this block has no attention.
            ("sdxl", r"lora_unet_up_blocks_0_upsamplers_0_conv"),
        ),
        # open_clip has one MultiheadAttention there (network_apply_weights in networks.py).
        joined=(
            ("sd2", r"(lora_te_text_model_encoder_layers_\d+)_self_attn_(?:q|k|v|out)_proj"),
            ("sdxl", r"(lora_te2_text_model_encoder_layers_\d+)_self_attn_(?:q|k|v|out)_proj"),
        ),
    ),
}

# Loaders that use the most common alpha of a kohya file for all attention layers. Files that we write have only one
# alpha; files from other programs may have several.
NO_LAYERS = "no: it has none of these layers"
ONE_ALPHA = ("diffusers",)


def family(payload: LowRank | Delta) -> str:
    """Return the family of the base, sd1, sd2 or sdxl; sd1 if the payload does not show it."""
    return "sdxl" if two_encoders(payload) else VERSIONS.get(text_width(payload) or 0, "sd1")


def missed(loader: str, payload: LowRank | Delta) -> list[str]:
    """List the kohya keys of a payload that a program does not load, sorted; a bias that it leaves out ends in `bias`.

    Args:
        loader: the program, a key of `LOADERS`.
        payload: the payload of the patch.
    """
    kind, key_of = family(payload), kohya_keys(payload)
    leaves: dict[str, set[str]] = {}
    for component in payload.components:
        for name in payload.names(component):
            module, _, leaf = name.rpartition(".")
            leaves.setdefault(key_of(component, module), set()).add(leaf)
    program = LOADERS[loader]
    patterns = [pattern for base, pattern in program.misses if base in ("", kind)]
    lost = {key for key in leaves if any(re.fullmatch(pattern, key) for pattern in patterns)}
    joined: dict[str, list[str]] = {}
    for base, pattern in program.joined:
        for key in leaves if base == kind else ():
            if match := re.fullmatch(pattern, key):
                joined.setdefault(match[1], []).append(key)
    for keys in joined.values():
        whole = len(keys) == PROJECTIONS and all("weight" in leaves[key] for key in keys)
        biases = {f"{key}.bias" for key in keys if "bias" in leaves[key] and not key.endswith("out_proj")}
        lost |= biases if whole else set(keys)
    return sorted(lost)


def as_it_is(patch: Patch) -> dict[str, str]:
    """Tell for each program whether it can load the patch's own file, and what it leaves out.

    Returns:
        By the program's name, an answer that begins with "yes", "no", "with its gate" or "without its gate".
    """
    gated = patch.gate["kind"] != "always"
    answers: dict[str, Any] = {}
    for name, loader in LOADERS.items():
        if loader.gate:
            answers[name] = "with its gate" if gated else "yes"
        elif isinstance(patch.payload, Guard):
            answers[name] = "no: it is a guard, which only Erasure's pipelines run"
        elif isinstance(patch.payload, Features):
            answers[name] = "no: it holds features, which only Erasure's pipelines switch off"
        elif not isinstance(patch.payload, LowRank) and TRANSFORMER in patch.components:
            answers[name] = NO_LAYERS if name == "A1111" else "no: export --format peft --rank R"
        elif not isinstance(patch.payload, LowRank):
            answers[name] = f"no: export --format {loader.delta}, or --format kohya --rank R"
        else:
            answers[name] = "without its gate" if gated else "yes"
            lost, number = missed(name, patch.payload), sum(map(len, patch.payload.layers.values()))
            if len(lost) == number:
                answers[name] = NO_LAYERS
            elif lost:
                answers[name] += f", but not {len(lost)} layers (first: {lost[0]})"
            if name in ONE_ALPHA and patch.stored.get("alphas", 1) > 1:
                answers[name] = "no: it misreads files with several alphas, such as this one: export --format kohya"
    return answers
