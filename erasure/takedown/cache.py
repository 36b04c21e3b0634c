"""What the text encoder says of a list, stored in a safetensors file: Gram matrices of kept states, states of names.

A file is named after the text encoders' weights and the words to keep. It is written under a temporary name and then
renamed; a damaged one is noticed by its digest and made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from erasure.config import default_cache
from erasure.errors import ErasureError
from erasure.model.conditioning import text_encoders
from erasure.model.listed_base import ListedBase
from erasure.patch.fingerprint import tensor_bytes
from erasure.patch.safetensors_io import digest, read_layout, write_file

LOG = logging.getLogger("erasure")
VERSION = "1"  # of what the entries mean
MOST_ENTRIES = 20_000  # in one file; beyond that, only those of the present run are kept


def encoder_key(base: ListedBase) -> str:
    """Return a hash of the text encoders' weights and of how their tokenizers pad."""
    total = hashlib.sha256(f"{VERSION} {type(base.pipe).__name__}".encode())
    for tokenizer, encoder in text_encoders(base.pipe):
        total.update(f"{len(tokenizer)} {tokenizer.model_max_length} {tokenizer.pad_token_id}".encode())
        for name, param in sorted(encoder.named_parameters()):
            total.update(f"{name} {list(param.shape)} {param.dtype}".encode())
            total.update(tensor_bytes(param.detach().cpu()))
    return total.hexdigest()


def cache_file(base: ListedBase, folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of the file that holds what is known of a base's text encoders and words to keep."""
    words = "\0".join(sorted(base.prompts()))
    key = hashlib.sha256(f"{encoder_key(base)} {words}".encode()).hexdigest()
    return (default_cache() if folder is None else Path(folder)) / f"list-{key[:24]}.safetensors"


@contextmanager
def stored(base: ListedBase, folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a base what the cache knows, and write what the block adds to it, also if the block fails.

    Args:
        base: the base.
        folder: the folder of the cache; None: `default_cache()`.

    Yields:
        The path of the file.
    """
    path = cache_file(base, folder)
    if path.is_file():
        base.stored |= read_cache(path)
    known = set(base.stored)
    try:
        yield path
    finally:
        if set(base.stored) != known:
            write_cache(path, base)


def read_cache(path: Path) -> dict[str, Tensor]:
    """Return the entries of a cache file; none, with a warning, if it is damaged."""
    try:
        layout = read_layout(path)
        tensors = layout.read()
        if layout.metadata.get("erasure.digest") == digest(tensors, {}):
            return tensors
        fault = "its contents do not match its digest"
    except (ErasureError, ValueError, RuntimeError) as error:
        fault = str(error).removeprefix(f"{path}: ")
    LOG.warning("%s is damaged (%s): it is made again", path, fault)
    return {}


def write_cache(path: Path, base: ListedBase) -> None:
    """Write what a base has stored; a folder that cannot be written to only costs the time to compute it again."""
    whole = len(base.stored) <= MOST_ENTRIES
    entries = {key: value.contiguous() for key, value in base.stored.items() if whole or key in base.used}
    try:
        write_file(path, entries, {"erasure.digest": digest(entries, {})})
    except ErasureError as fault:
        LOG.warning("the text states of this list are not stored: %s", fault)
