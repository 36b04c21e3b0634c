"""Differences of whole tensors under kohya's keys, as A1111 and ComfyUI read them: `.diff` of a weight, `.diff_b`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.conversion import Found, Wanted, check_fit, put
from erasure.formats.kohya import places, title
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.patch import Delta, Patch
from erasure.patch.module_keys import kohya_prefix
from erasure.patch.safetensors_io import write_file
from erasure.patch.serialization import two_encoders

ENDS = {"weight": ".diff", "bias": ".diff_b"}


def read_diff(source: Source, base: Base) -> Found:
    """A file of differences; tensors of zeros, which stand beside a bias that changes alone, are left out."""
    known, back = places(base), {end: leaf for leaf, end in ENDS.items()}
    wanted: list[Wanted] = []
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        prefix, dot, end = key.partition(".")
        if dot + end not in back:
            raise ErasureError(f"{source.path}: {key} is neither {' nor '.join(back)}")
        component, path = known.get(prefix, ("", prefix))
        name = f"{path}.{back[dot + end]}"
        wanted.append(Wanted(key, component or None, name, tuple(value.shape)))
        put(source, found.setdefault(component, {}), name, key, value.float())
    check_fit(source, base, wanted)
    tables = {part: {name: value for name, value in table.items() if value.any()} for part, table in found.items()}
    return Found(Delta(tables))


def check_diff(patch: Patch) -> None:
    """Raise an ErasureError for a patch that changes a parameter that is neither a weight nor a bias."""
    for component in patch.components:
        for name in patch.payload.names(component):
            if name.rpartition(".")[2] not in ENDS:
                raise ErasureError(f"holds weights and biases, and {component}.{name} is neither")


def write_diff(patch: Patch, path: Path) -> list[str]:
    """Write every change as it is, dense; a low-rank one multiplied out.

    A1111 takes a `.diff_b` only beside a `.diff`, and stops at a file where it stands alone.
    """
    check_diff(patch)
    tensors: dict[str, Tensor] = {}
    payload, alone = patch.payload, []
    two = two_encoders(payload)
    for component in payload.components:
        names = payload.names(component)
        for name in names:
            module, _, leaf = name.rpartition(".")
            prefix = kohya_prefix(component, module, two)
            tensors[prefix + ENDS[leaf]] = payload.change(component, name).contiguous()
            if leaf == "bias" and f"{module}.weight" not in names:
                alone.append(prefix)
    write_file(path, tensors, {"modelspec.title": title(patch)})
    if alone:
        return [f"{len(alone)} biases change alone: ComfyUI takes them, A1111 refuses the file ({alone[0]})"]
    return []
