"""Writing patched weights: a base with the patch folded in, and folders that are written whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.pipelines.stack import patch_stack


@contextmanager
def patched(patch: Patch, base: Base) -> Iterator[None]:
    """Fold a patch into the weights of a base inside a context, at full strength and without its gate.

    The base is restored bit for bit at the end.

    Args:
        patch: the patch.
        base: the base that it was made from.

    Raises:
        ErasureError: the patch was made from another base, or does not fit this one.
    """
    stack = patch_stack(base.pipe)
    name = stack.load(dataclasses.replace(patch, gate={"kind": "always"}))
    try:
        yield
    finally:
        stack.delete_patches(name)


def write_folder(path: Path, save: Callable[[Any], Any]) -> None:
    """Write a folder under a temporary name and rename it at the end, so that it appears whole or not at all.

    Args:
        path: the folder; it must not exist or must be empty.
        save: function that fills the folder whose path it is passed.

    Raises:
        ErasureError: something else is at `path`, or the folder cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ErasureError(f"{path} already exists, and a model is only written into a new folder. Nothing was written")
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        save(temporary)
        os.replace(temporary, path)
    except OSError as fault:
        raise ErasureError(f"{path} cannot be written: {fault.strerror or fault}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
