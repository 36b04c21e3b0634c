"""The weights of a UNet under diffusers' names, all or some of them, as ESD, UCE and SalUn publish them."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from erasure.formats.patch_builder import ImportedPayload, changes, network_of, put
from erasure.formats.patched_base import patched
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_only
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.patch.module_keys import find_parameter
from erasure.patch.safetensors_io import write_file

UNET = "unet"
# Names of the files that published scripts write: esd_sd.py's esd-CONCEPT-from-CONCEPT-esdx, the older
# diffusers-CONCEPT-ESDx1-UNET, and what uce_sd_erase.py is told to call its file (uce_test if nothing).
FILE_NAMES = {
    "esd": re.compile(r"esd-.+-from-.+|.*[-_]esd[-_]?[xua].*", re.IGNORECASE),
    "uce": re.compile(r"(.*[-_])?uce([-_].*)?", re.IGNORECASE),
}
# What uce_flux_edit.py edits: the text entry and the first layer of the pooled text.
UCE_FLUX = {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
_CROSS = re.compile(r"\.attn2\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)$")


def script_of(stem: str, names: set[str]) -> str:
    """Return the method of the script that wrote a file, as far as its name or its keys tell, or `unknown`.

    Of the official scripts only ESD's (`esd-x`) writes cross-attention whole and nothing else, and only UCE's for FLUX
    the text entry. Keys and values alone come from UCE and from `esd-x-strict`, so there the name of the file decides.

    Args:
        stem: the name of the file, without its extension.
        names: the parameters in the file, under diffusers' names.
    """
    found = [method for method, pattern in FILE_NAMES.items() if pattern.fullmatch(stem)]
    if len(found) == 1:
        return found[0]
    if names == UCE_FLUX:
        return "uce"
    layers = [match[1] if (match := _CROSS.search(name)) else "" for name in names]
    return "esd" if set(layers) == {"to_q", "to_k", "to_v", "to_out.0"} else "unknown"


def read_unet(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read weights of a UNet or transformer under diffusers' names, with or without `unet.` or `transformer.` before.

    Args:
        source: the file.
        base: the base that it is compared with.

    Raises:
        ErasureError: the weights do not fit the base, or none of them differs from it.
    """
    network, table = network_of(base), dict[str, Tensor]()
    for key, value in source.read().items():
        put(source, table, key.removeprefix(f"{network}."), key, value)
    return ImportedPayload(changes(source, base, {network: table}), script_of(source.path.stem, set(table)))


def write_unet(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the new values of the weights that the patch changes, under diffusers' names without a prefix, as ESD does.

    The published loader reads the file with `unet.load_state_dict(file, strict=False)`.

    Args:
        patch: a patch of the UNet alone.
        path: the file.
        base: the base that the patch was made from.

    Returns:
        No notes, because the whole change is written.

    Raises:
        ErasureError: the patch changes another component, does not fit the base, or the file cannot be written.
    """
    need_only(patch, UNET)
    with patched(patch, base):
        parameters = {name: find_parameter(base.unet, name) for name in patch.payload.names(UNET)}
        tensors = {name: value.detach().cpu().clone() for name, value in parameters.items() if value is not None}
    write_file(path, tensors, {"format": "pt"})
    return []
