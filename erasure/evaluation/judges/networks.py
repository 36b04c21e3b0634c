"""Code that all judges with a network share: device, batches, local weights and their hashes, loading errors."""

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


class NotInstalled(ErasureError):
    """An optional library or file that is not on this machine; callers report it and continue without it."""


def pick_device(device: str | None) -> torch.device:
    """Return the requested device; without one, the GPU if there is one, otherwise the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def batches(images: list[Image.Image]) -> Iterator[list[Image.Image]]:
    """Yield the images in RGB, in batches of at most BATCH."""
    for start in range(0, len(images), BATCH):
        yield [image.convert("RGB") for image in images[start : start + BATCH]]


def weights_sha256(module: nn.Module) -> str:
    """Return a SHA-256 digest of a network's weights that does not depend on where they were loaded from.

    The digest covers names, shapes, types and bytes of all tensors.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


@contextmanager
def loading_errors(judge: str, source: str) -> Iterator[None]:
    """Turn every exception that a library raises on loading into an error that names the judge and its source.

    Args:
        judge: name of the judge.
        source: where its network is loaded from.

    Raises:
        ErasureError: anything in the block raised an exception.
    """
    try:
        yield
    except ErasureError:
        raise
    except Exception as fault:
        raise ErasureError(f"{judge} judge: {source!r} cannot be loaded: {type(fault).__name__}: {fault}") from fault


def check_complete(info: dict[str, Any], source: str) -> None:
    """Refuse a transformers model with parts that the checkpoint lacks and that therefore have random weights.

    Args:
        info: what `from_pretrained` returned as its loading information.
        source: where the model was loaded from.

    Raises:
        ErasureError: weights are missing; the message names some of them.
    """
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ErasureError(f"{source!r} lacks the weights {shown}: with random ones it would judge at random")


def local_weights(network: str, published: str, file: str | None, other_names: tuple[str, ...] = ()) -> Path:
    """Return the path of a network's published weights on this machine; nothing is downloaded.

    Args:
        network: name of the network, for messages.
        published: the URL that torch would download the weights from; its file name ends with the first digits of the
            file's SHA-256 digest.
        file: a file of the user's, in place of the one in torch's hub folder.
        other_names: other names under which the same file is distributed.

    Raises:
        ErasureError: `file` does not exist.
        NotInstalled: no `file` is given, and torch's hub folder has a file under none of the names.
    """
    if file is not None:
        if not Path(file).is_file():
            raise ErasureError(f"{network}: there is no file {file}")
        return Path(file)
    folder, name = Path(torch.hub.get_dir()) / "checkpoints", published.rpartition("/")[2]
    for candidate in (name, *other_names):
        if (folder / candidate).is_file():
            return folder / candidate
    shown = str(folder).replace(str(Path.home()), "~", 1)
    raise NotInstalled(
        f"{network}: its weights are not on this machine; put {name} ({published}) into {shown}, or name a file"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a pickle without running any code in it.

    Raises:
        ErasureError: the file cannot be read, or it contains anything but tensors by name.
    """
    try:
        tensors = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as fault:
        raise ErasureError(f"{path}: the weights cannot be read: {str(fault).splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ErasureError(f"{path}: expected a file of tensors by name")
    return dict(tensors)


def weights_provenance(path: Path, published: str) -> dict[str, str]:
    """Return the name and the SHA-256 digest of a weights file, with a warning if it is not the published one.

    Args:
        path: the file.
        published: URL of the published file, whose name contains the first digits of its digest.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    start = re.findall(r"-([0-9a-f]{8})\.", published)[-1]
    provenance = {"weights": path.name, "sha256": digest.hexdigest()}
    if not provenance["sha256"].startswith(start) and path.suffix != ".safetensors":
        provenance["warning"] = f"not the published weights, whose sha256 begins with {start}"
    return provenance
