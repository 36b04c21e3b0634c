"""Whole pipelines in diffusers' folder layout, with the patch in the weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.patch_builder import ImportedPayload, changes, components
from erasure.formats.patched_base import patched, write_folder
from erasure.formats.published_file import PublishedFile
from erasure.formats.text_encoder import text_weights
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.patch.module_keys import NETWORKS


def read_checkpoint(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read the changes of the network that denoises and the text encoders of a pipeline's folder; the VAE is not read.

    Args:
        source: the folder of the pipeline.
        base: the base that it is compared with.

    Raises:
        ErasureError: a component is missing, its weights do not fit the base, or none of them differs from it.
    """
    weights: dict[str, dict[str, Tensor]] = {}
    for name, module in components(base).items():
        part = source.part(name)
        if part is None:
            raise ErasureError(
                f"{source.path} has no {name}, but the base {base.name} has one. Is the file for another architecture?"
            )
        if name in NETWORKS:
            buffers = {buffer for buffer, _ in module.named_buffers()}  # SD3's positions, which are no weights
            weights[name] = {key: value for key, value in part.read().items() if key not in buffers}
        else:
            weights[name] = text_weights(part)
    return ImportedPayload(changes(source, base, weights))


def write_checkpoint(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the whole patched pipeline as a folder that `from_pretrained` loads.

    Args:
        patch: the patch.
        path: the folder, which must not exist yet.
        base: the base that the patch was made from.

    Returns:
        No notes, because the whole change is written.

    Raises:
        ErasureError: the patch does not fit the base, or the folder cannot be written.
    """
    with patched(patch, base):
        # Not the method of an erased pipeline, which would warn that patches are folded in: that is intended here.
        write_folder(path, partial(DiffusionPipeline.save_pretrained, base.pipe))
    return []
