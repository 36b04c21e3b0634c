"""Full weights: a UNet's, all or some (ESD, UCE, SalUn), a text encoder's (AdvUnlearn)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from erasure.formats.conversion import Found, changes, need_only, put
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.patch.module_keys import NESTED, find_parameter
from erasure.patch.safetensors_io import write_file
from erasure.pipelines.stack import patch_stack

UNET, TEXT = "unet", "text_encoder"
BUFFERS = ("position_ids",)  # in old text encoders; no weights
# What stands in AdvUnlearn's files a second time, under shorter names.
TWINS = ("embedding.", "embeddings.", "encoder.", "final_layer_norm.")


def read_unet(source: Source, base: Base) -> Found:
    """Weights under diffusers' names, with `unet.` in front or without."""
    table: dict[str, Tensor] = {}
    for key, value in source.read().items():
        put(source, table, key.removeprefix(f"{UNET}."), key, value)
    return Found(changes(source, base, {UNET: table}))


def read_text_encoder(source: Source, base: Base) -> Found:
    """A text encoder's weights, with `text_encoder.` and `text_model.` in front, with either, or without."""
    return Found(changes(source, base, {TEXT: text_weights(source)}))


def text_weights(source: Source) -> dict[str, Tensor]:
    """Weights by the names that patches use; AdvUnlearn's doubles and buffers are left out."""
    tensors, table = source.read(), dict[str, Tensor]()
    if any(key.startswith(f"{TEXT}.") for key in tensors):
        tensors = {key: value for key, value in tensors.items() if not key.startswith(TWINS)}
    for key, value in tensors.items():
        if key.rpartition(".")[2] not in BUFFERS:
            put(source, table, key.removeprefix(f"{TEXT}.").removeprefix(NESTED), key, value)
    return table


def write_unet(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the new values of the weights that change, under diffusers' names without a prefix, as ESD does.

    The published loader takes them with `unet.load_state_dict(file, strict=False)`.
    """
    need_only(patch, UNET)
    with patched(patch, base):
        found = {name: find_parameter(base.unet, name) for name in patch.payload.names(UNET)}
        tensors = {name: value.detach().cpu().clone() for name, value in found.items() if value is not None}
    write_file(path, tensors, {"format": "pt"})
    return []


@contextmanager
def patched(patch: Patch, base: Base) -> Iterator[None]:
    """The base with the patch folded in, at full strength on every prompt; given back bit for bit.

    Raises:
        ErasureError: the patch was made from another base, or does not fit.
    """
    stack = patch_stack(base.pipe)
    name = stack.load(dataclasses.replace(patch, gate={"kind": "always"}))
    try:
        yield
    finally:
        stack.delete_patches(name)
