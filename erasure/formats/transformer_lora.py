"""LoRAs of FLUX.1 and Stable Diffusion 3 under original names: kohya's keys, and `diffusion_model.` as in ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.formats.patch_builder import components, put
from erasure.formats.published_file import PublishedFile
from erasure.formats.transformer_keys import PREFIXES, cut, join, kind_of, parts_in
from erasure.model.base import Base
from erasure.model.original_transformer import CLASSES, FLUX, SD3, original_layer
from erasure.patch import LowRank
from erasure.patch.module_keys import ALPHA, DOWN, TRANSFORMER, UP, kohya_prefix
from erasure.patch.payload import Layer

COMFY = "diffusion_model."


def check_transformer(payload: LowRank) -> None:
    """Check that kohya's keys have a name for every layer of a patch on a transformer.

    Args:
        payload: the factors.

    Raises:
        ErasureError: the transformer or one of the layers has none.
    """
    layers = payload.layers[TRANSFORMER]
    kind = kind_of(layers)
    for path in layers:
        original_layer(kind, path)
    if kind == FLUX and "text_encoder_2" in payload.layers:
        raise ErasureError("has no names for the layers of T5")


def transformer_tensors(payload: LowRank) -> dict[str, Tensor]:
    """Return the tensors of a patch on a transformer under kohya's keys.

    Args:
        payload: the factors, for which `check_transformer` found names.
    """
    tensors: dict[str, Tensor] = {}
    for component, layers in payload.layers.items():
        if component == TRANSFORMER:
            named = {
                PREFIXES[0] + name.replace(".", "_"): layer for name, layer in join(kind_of(layers), layers).items()
            }
        else:
            named = {kohya_prefix(component, path, two_encoders=True): layer for path, layer in layers.items()}
        for prefix, (down, up, alpha) in named.items():
            tensors[prefix + DOWN], tensors[prefix + UP] = down.contiguous(), up.contiguous()
            tensors[prefix + ALPHA] = down.new_tensor(alpha)
    return tensors


def transformer_notes(payload: LowRank) -> list[str]:
    """Return what programs leave out of a file of `transformer_tensors`, one sentence each.

    Args:
        payload: the factors.
    """
    if kind_of(payload.layers[TRANSFORMER]) == SD3:
        return ["diffusers reads no kohya keys for Stable Diffusion 3: use --format peft for diffusers"]
    return []


def transformer_of(base: Base) -> nn.Module | None:
    """Return the transformer of a base if its layers have original names here, else None."""
    module = components(base).get(TRANSFORMER)
    return module if type(module).__name__ in CLASSES else None


def put_transformer_layer(
    source: PublishedFile, base: Base, table: dict[str, dict[str, Any]], key: str, layer: Layer
) -> bool:
    """Put a layer that goes by an original name into a table, taken apart into those of diffusers.

    Args:
        source: the file, for messages.
        base: the base.
        table: component -> module path -> (key in the file, factors); extended.
        key: key of the layer in the file, without its ending.
        layer: the factors.

    Returns:
        Whether the key is such a name and the base has the layer.

    Raises:
        ErasureError: the file holds a layer twice, or its outputs are not as many as those of the base.
    """
    network = transformer_of(base)
    if network is None or not key.startswith((*PREFIXES, COMFY)):
        return False
    outputs = {path: module.out_features for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    names = _names(CLASSES[type(network).__name__], outputs)
    plain = re.sub(rf"^({'|'.join(map(re.escape, (*PREFIXES, COMFY)))})", "", key).replace(".", "_")
    paths = names.get(plain)
    if paths is None:
        return False
    rows = [outputs[path] for path in paths]
    if layer[1].dim() != 2 or layer[1].shape[0] != sum(rows):
        raise ErasureError(
            f"{source.path}: {key} has {layer[1].shape[0]} outputs, and the base {base.name} {sum(rows)} there. "
            "Nothing was written"
        )
    for path, part in zip(paths, [layer] if len(paths) == 1 else cut(layer, rows), strict=True):
        if part is not None:
            put(source, table.setdefault(TRANSFORMER, {}), path, key, (key, part))
    return True


def _names(kind: str, outputs: Mapping[str, int]) -> dict[str, list[str]]:
    """Map names, with underscores for dots, to diffusers' layers: original names, and diffusers' own."""
    names = {path.replace(".", "_"): [path] for path in outputs}
    return names | {name.replace(".", "_"): paths for name, paths in parts_in(kind, outputs).items()}
