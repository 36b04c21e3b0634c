"""The names of the weights that a patch changes: components, module paths, parameter names, and kohya keys.

transformers 4 nests the modules of a CLIP text encoder in `text_model.`, and transformers 5 does not (except for
CLIPTextModelWithProjection). Patches leave out that prefix; `find_module` and `find_parameter` try both spellings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from erasure.errors import ErasureError, unknown
from erasure.model.original_keys import ENDS, original_name

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
TRANSFORMER = "transformer"
NETWORKS = ("unet", TRANSFORMER)  # components that denoise; their module paths have no prefix
NESTED = "text_model."
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
DOWN_PEFT, UP_PEFT = ".lora_A.weight", ".lora_B.weight"  # the factors of transformers, for which the alpha is the rank
# UNet modules whose kohya keys always use the original names: only ComfyUI converts diffusers' names for them.
ORIGINAL = {path: ENDS[path] for path in ("add_embedding.linear_1", "add_embedding.linear_2", "conv_norm_out")}
XL_LAYERS, XL_LEVELS = 2, 3  # residual blocks of each level, and levels, of the UNet of XL
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(?:resnets|attentions)\.(\d+)\..+")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def check_component(component: object) -> str:
    """Return `component` unchanged if it is one that patches can change.

    Raises:
        ErasureError: it is not one of COMPONENTS.
    """
    if not isinstance(component, str) or component not in COMPONENTS:
        raise unknown("component", component, COMPONENTS)
    return component


def canonical(component: str, path: object) -> str:
    """Return a module path or parameter name as patches spell it, without a leading `text_model.`.

    Args:
        component: the component that it belongs to.
        path: the path or name.

    Raises:
        ErasureError: the path is not a string of words joined by dots.
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ErasureError(f"{component}: {path!r} is not a module path (words joined by dots)")
    return path if component in NETWORKS else path.removeprefix(NESTED)


def kohya_prefix(component: str, path: str, two_encoders: bool, original: bool = False) -> str:
    """Return the key that precedes `.lora_down.weight` in kohya's format, which ComfyUI and A1111 read too.

    Args:
        component: the component of the module.
        path: the path of the module, as patches spell it.
        two_encoders: whether the base has two text encoders (XL), which changes the key of the first.
        original: whether layers of the UNet go by Stability's names, as in the files that kohya trains for XL.

    >>> kohya_prefix("text_encoder", "encoder.layers.0.mlp.fc1", two_encoders=False)
    'lora_te_text_model_encoder_layers_0_mlp_fc1'
    """
    if component == TRANSFORMER:
        return f"{TRANSFORMER}.{path}"  # as diffusers writes it: its loaders read no kohya keys of these names
    if component == "unet":
        name = _xl_path(path) if original else ORIGINAL.get(path, path)
        return "lora_unet_" + name.replace(".", "_")
    start = {"text_encoder": "lora_te1_" if two_encoders else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    return start + nested(component, path).replace(".", "_")


def _xl_path(path: str) -> str:
    """Return the original path of a module of XL's UNet, in which every upsampler follows blocks with attention."""
    try:
        return original_name(f"{path}.weight", XL_LAYERS, lambda level: True).removesuffix(".weight")
    except (ValueError, IndexError, KeyError):
        return path  # not a module of such a UNet


def has_xl_blocks(paths: Iterable[str]) -> bool:
    """Tell whether modules of a UNet show the blocks of XL, for which alone `kohya_prefix` knows the original names.

    The number in an original name counts the residual blocks before it, and a payload does not say how many a level
    has. It is taken from the largest number in the paths; a payload that names too few layers to tell counts as
    another UNet, and keeps diffusers' names.

    Args:
        paths: module paths in the UNet, as patches spell them.
    """
    blocks = [(match[1] == "down", int(match[2]), int(match[3])) for match in map(_BLOCK.fullmatch, paths) if match]
    layers = max((number + down for down, _, number in blocks), default=0)
    return layers == XL_LAYERS and max(level for _, level, _ in blocks) < XL_LEVELS


def nested(component: str, path: str) -> str:
    """Return a path as published files and transformers 4 spell it, with a leading `text_model.`.

    >>> nested("text_encoder_2", "text_projection"), nested("text_encoder", "final_layer_norm")
    ('text_projection', 'text_model.final_layer_norm')
    """
    return path if component in NETWORKS or path.startswith("text_projection") else NESTED + path


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at `path`, or None if there is none.

    If a user's LoRA (peft) wraps the module, the module inside the wrapper is returned.
    """
    for spelling in (path, NESTED + path):
        try:
            module = root.get_submodule(spelling)
        except AttributeError:
            continue
        inner = getattr(module, "base_layer", None)
        return inner if isinstance(inner, nn.Module) else module
    return None


def find_parameter(root: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter called `name`, or None if there is none; wrappers are handled as in `find_module`."""
    path, _, leaf = name.rpartition(".")
    module = find_module(root, path) if path else root
    value = getattr(module, leaf, None) if module is not None else None
    return value if isinstance(value, nn.Parameter) else None
