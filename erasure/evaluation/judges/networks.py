"""What judges that are networks share: device, batches, the hash of their weights, errors on loading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import nn

from erasure.errors import ErasureError
from erasure.patch.fingerprint import tensor_bytes

BATCH = 32


def pick_device(device: str | None) -> torch.device:
    """The device asked for, else the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def batches(images: list[Image.Image]) -> Iterator[list[Image.Image]]:
    """The images as RGB, BATCH at a time."""
    for start in range(0, len(images), BATCH):
        yield [image.convert("RGB") for image in images[start : start + BATCH]]


def weights_sha256(module: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all tensors: the same for a folder, a hub id and a file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


@contextmanager
def loading(what: str, source: str) -> Iterator[None]:
    """Whatever a library raises on loading becomes an error that names the judge and its source."""
    try:
        yield
    except ErasureError:
        raise
    except Exception as fault:
        raise ErasureError(f"{what} judge: {source!r} cannot be loaded: {type(fault).__name__}: {fault}") from fault


def all_there(info: dict[str, Any], source: str) -> None:
    """Refuses a transformers model of which a part was not in the checkpoint and is random.

    Raises:
        ErasureError: naming the missing tensors.
    """
    lacking = sorted(map(str, info.get("missing_keys") or ()))
    if lacking:
        shown = ", ".join(lacking[:3])
        raise ErasureError(f"{source!r} lacks {shown}{' ...' if len(lacking) > 3 else ''}: it would judge at random")
