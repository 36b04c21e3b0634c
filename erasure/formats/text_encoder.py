"""The weights of a text encoder, as AdvUnlearn publishes them: a file, or the folder of a CLIPTextModel."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from erasure.formats.patch_builder import ImportedPayload, changes, put
from erasure.formats.patched_base import patched, write_folder
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_only
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.patch.module_keys import NESTED

TEXT = "text_encoder"
BUFFERS = ("position_ids",)  # stored by old versions of transformers; not weights
# AdvUnlearn's files hold every weight a second time, under shorter names that start with these.
TWINS = ("embedding.", "embeddings.", "encoder.", "final_layer_norm.")


def read_text_encoder(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read the weights of a text encoder, whose names may start with `text_encoder.`, `text_model.`, both or neither.

    Args:
        source: the file or folder.
        base: the base that it is compared with.

    Raises:
        ErasureError: the weights do not fit the base, or none of them differs from it.
    """
    return ImportedPayload(changes(source, base, {TEXT: text_weights(source)}))


def text_weights(source: PublishedFile) -> dict[str, Tensor]:
    """Return the weights of a text encoder under the names that patches use, without duplicates and buffers.

    Args:
        source: a file or folder with the weights of one text encoder.

    Raises:
        ErasureError: a weight is stored twice under names that mean the same.
    """
    tensors, table = source.read(), dict[str, Tensor]()
    if any(key.startswith(f"{TEXT}.") for key in tensors):
        tensors = {key: value for key, value in tensors.items() if not key.startswith(TWINS)}
    for key, value in tensors.items():
        if key.rpartition(".")[2] not in BUFFERS:
            put(source, table, key.removeprefix(f"{TEXT}.").removeprefix(NESTED), key, value)
    return table


def write_text_encoder(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the patched text encoder as a folder that `CLIPTextModel.from_pretrained` loads.

    Args:
        patch: a patch of the text encoder alone.
        path: the folder, which must not exist yet.
        base: the base that the patch was made from.

    Returns:
        No notes, because the whole change is written.

    Raises:
        ErasureError: the patch changes another component, does not fit the base, or the folder cannot be written.
    """
    need_only(patch, TEXT)
    with patched(patch, base):
        write_folder(path, base.pipe.text_encoder.save_pretrained)
    return []
