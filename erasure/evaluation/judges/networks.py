"""What judges that are networks share: device, batches, weights on this machine and their hash, errors on loading."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

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
def loading_errors(what: str, source: str) -> Iterator[None]:
    """Whatever a library raises on loading becomes an error that names the judge and its source."""
    try:
        yield
    except ErasureError:
        raise
    except Exception as fault:
        raise ErasureError(f"{what} judge: {source!r} cannot be loaded: {type(fault).__name__}: {fault}") from fault


def check_complete(info: dict[str, Any], source: str) -> None:
    """Refuses a transformers model of which a part was not in the checkpoint and is random.

    Raises:
        ErasureError: naming the missing tensors.
    """
    lacking = sorted(map(str, info.get("missing_keys") or ()))
    if lacking:
        shown = ", ".join(lacking[:3])
        raise ErasureError(f"{source!r} lacks {shown}{' ...' if len(lacking) > 3 else ''}: it would judge at random")


class NotInstalled(ErasureError):
    """Something optional is not on this machine. Nothing is fetched; whoever asked says so and goes on without it."""


def local_weights(what: str, published: str, given: str | None, also: tuple[str, ...] = ()) -> Path:
    """The file of a network's published weights, which nothing here fetches.

    Args:
        what: the network, for errors.
        published: the URL that torch would fetch them from; its last part ends in the beginning of the file's sha256.
        given: a file of the user's, in place of the one that torch keeps.
        also: other names that the same file goes by.

    Raises:
        ErasureError: `given` is no file.
        Absent: nothing was given and torch's folder has none of the names.
    """
    if given is not None:
        if not Path(given).is_file():
            raise ErasureError(f"{what}: no file {given}")
        return Path(given)
    folder, name = Path(torch.hub.get_dir()) / "checkpoints", published.rpartition("/")[2]
    for one in (name, *also):
        if (folder / one).is_file():
            return folder / one
    shown = str(folder).replace(str(Path.home()), "~", 1)
    raise NotInstalled(
        f"{what}: its weights are not on this machine; put {name} ({published}) into {shown}, or name a file"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle read as data only.

    Raises:
        ErasureError: neither, or more than tensors in it.
    """
    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as fault:
        raise ErasureError(f"{path}: no weights can be read: {str(fault).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ErasureError(f"{path}: tensors by name are expected")
    return dict(found)


def weights_provenance(path: Path, published: str) -> dict[str, str]:
    """Name and sha256 of a file of weights, for the report, and whether they are the published ones."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    begins = re.findall(r"-([0-9a-f]{8})\.", published)[-1]
    found = {"weights": path.name, "sha256": digest.hexdigest()}
    if not found["sha256"].startswith(begins) and path.suffix != ".safetensors":
        found["warning"] = f"not the published weights, whose sha256 begins with {begins}"
    return found
