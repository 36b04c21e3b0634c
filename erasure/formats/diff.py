"""Differences of whole tensors under kohya's keys, `.diff` for weights and `.diff_b` for biases (ComfyUI, A1111)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.kohya import places, title
from erasure.formats.patch_builder import ImportedPayload, TensorTarget, check_fit, put
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_unet_names
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch
from erasure.patch.header import family_keys
from erasure.patch.safetensors_io import write_file
from erasure.patch.serialization import kohya_keys

ENDS = {"weight": ".diff", "bias": ".diff_b"}


def read_diff(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read a file of differences.

    Tensors of zeros are left out: writers add them for layers of which only the bias changes.

    Args:
        source: the file.
        base: the base that it must fit.

    Raises:
        ErasureError: there are other tensors, a tensor does not fit the base, or a layer is stored twice.
    """
    prefixes, leaf_of = places(base), {end: leaf for leaf, end in ENDS.items()}
    targets: list[TensorTarget] = []
    tables: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        prefix, dot, end = key.partition(".")
        if dot + end not in leaf_of:
            raise ErasureError(f"{source.path}: the key {key} ends neither in {' nor in '.join(leaf_of)}")
        component, path = prefixes.get(prefix, ("", prefix))
        name = f"{path}.{leaf_of[dot + end]}"
        targets.append(TensorTarget(key, component or None, name, tuple(value.shape)))
        put(source, tables.setdefault(component, {}), name, key, value.float())
    check_fit(source, base, targets)
    return ImportedPayload(
        Delta({part: {name: value for name, value in table.items() if value.any()} for part, table in tables.items()})
    )


def check_diff(patch: Patch) -> None:
    """Check that a patch changes weights and biases alone.

    Args:
        patch: the patch.

    Raises:
        ErasureError: it changes another parameter, or a transformer.
    """
    need_unet_names(patch)
    for component in patch.components:
        for name in patch.payload.names(component):
            if name.rpartition(".")[2] not in ENDS:
                raise ErasureError(f"holds weights and biases only, but {component}.{name} is neither")


def differences(payload: LowRank | Delta) -> dict[str, Tensor]:
    """Return every change of weights and biases as a dense tensor under its kohya key.

    Args:
        payload: the change of the weights, of weights and biases alone (`check_diff`).
    """
    key_of, tensors = kohya_keys(payload), {}
    for component in payload.components:
        for name in payload.names(component):
            module, _, leaf = name.rpartition(".")
            tensors[key_of(component, module) + ENDS[leaf]] = payload.change(component, name).contiguous()
    return tensors


def write_diff(patch: Patch, path: Path) -> list[str]:
    """Write every change as a dense difference; low-rank factors are multiplied out.

    A1111 reads a `.diff_b` only together with a `.diff`, and refuses a file in which one stands alone.

    Args:
        patch: the patch.
        path: the file.

    Returns:
        A note, if A1111 refuses the file.

    Raises:
        ErasureError: the patch changes a parameter that is neither a weight nor a bias, or the file cannot be written.
    """
    check_diff(patch)
    payload = patch.weights
    tensors = differences(payload)
    biases = [key.removesuffix(ENDS["bias"]) for key in tensors if key.endswith(ENDS["bias"])]
    lone_biases = [prefix for prefix in biases if prefix + ENDS["weight"] not in tensors]
    write_file(path, tensors, {"modelspec.title": title(patch), **family_keys(payload)})
    if lone_biases:
        return [
            f"{len(lone_biases)} biases change without their weights (first: {lone_biases[0]}): "
            "ComfyUI loads the file, A1111 refuses it"
        ]
    return []
