"""The patch itself: its tensors and its header, both immutable."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from erasure.errors import ErasureError
from erasure.hub_files import located
from erasure.patch.header import (
    FORMAT,
    JSON,
    check_digest,
    check_fields,
    decode_header,
    loader_keys,
    refuse_plain,
    to_json,
)
from erasure.patch.module_keys import ALPHA, check_component
from erasure.patch.payload import Delta, LowRank
from erasure.patch.safetensors_io import digest, read_layout, write_file
from erasure.patch.serialization import cast_error, decode, encode

ALWAYS = {"kind": "always"}
FIELDS = ("concepts", "base_fingerprint", "config", "gate", "versions", "costs")


@dataclass(frozen=True, eq=False)
class Patch:
    """The result of an erasure: the change of the weights, and a record of how it was made.

    Args:
        payload: the change, `LowRank` or `Delta`.
        method: the name of the method that made it.
        concepts: the erased concepts, as JSON objects (or objects with `to_json()`); only the key `name` is required.
        base: the checkpoint that it was made from, as the user named it.
        base_fingerprint: component -> `fingerprint(module, names)` of the base parameters that the payload changes.
        config: all settings of the method.
        gate: how strongly the patch acts on a prompt; `{"kind": "always"}`, or `{"kind": "text", ...}`.
        versions: the versions of the libraries.
        seed: the random seed of the run.
        costs: F and B counts, seconds, and peak memory.
        results: what `verify` measured, or None.
        stored: for a loaded patch, the file's path, bytes, dtype and dtype_error, the number of different alphas
            (ours have one), and for a patch from the hub its repository and revision; empty otherwise.

    Raises:
        ErasureError: a field of the wrong type, or one that cannot be written as JSON.
    """

    payload: LowRank | Delta
    method: str
    concepts: Sequence[Any]
    base: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=lambda: dict(ALWAYS))
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    costs: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.payload, LowRank | Delta):
            raise ErasureError(f"payload must be LowRank or Delta, not {type(self.payload).__name__}")
        if not isinstance(self.method, str) or not self.method or not isinstance(self.base, str):
            raise ErasureError("method and base must be strings, and method not an empty one")
        if type(self.seed) is not int:
            raise ErasureError(f"seed must be a whole number, not {self.seed!r}")
        if isinstance(self.concepts, str | bytes | Mapping):
            raise ErasureError("concepts must be a list of JSON objects")
        plain = [one.to_json() if hasattr(one, "to_json") else one for one in self.concepts]
        values = {name: getattr(self, name) for name in FIELDS} | {"concepts": plain}
        for name, value in values.items():
            if not isinstance(value, list if JSON[name] is list else Mapping):
                raise ErasureError(f"{name} must be a JSON {JSON[name].__name__}, not {type(value).__name__}")
        # Through JSON and back: what is in memory is what the file will say, and nobody else's object.
        values = {name: json.loads(to_json(name, value)) for name, value in values.items()}
        check_fields(values)
        for name, value in values.items():
            object.__setattr__(self, name, tuple(value) if name == "concepts" else value)
        if self.results is not None:
            object.__setattr__(self, "results", json.loads(to_json("results", dict(self.results))))

    @property
    def names(self) -> list[str]:
        """Return the names of the erased concepts."""
        return [str(concept.get("name", "?")) for concept in self.concepts]

    @property
    def components(self) -> list[str]:
        """Return the components that the patch changes, sorted."""
        return self.payload.components

    def deltas(self, component: str) -> dict[str, Tensor]:
        """Return the dense fp32 change of each parameter, by name; empty for a component that does not change.

        Raises:
            ErasureError: patches cannot change this component.
        """
        check_component(component)
        return {name: self.payload.change(component, name).clone() for name in self.payload.names(component)}

    def scale(self, factor: float) -> Patch:
        """Return the patch with every change multiplied by `factor`; its results no longer hold and are dropped.

        Raises:
            ErasureError: `factor` is not a finite number.
        """
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            raise ErasureError(f"cannot scale a patch by {factor!r}")
        return dataclasses.replace(self, payload=self.payload.scaled(float(factor)), results=None, stored={})

    def info(self) -> dict[str, Any]:
        """Describe the patch as plain JSON values; `bytes` is the size of the file, or of the tensors in memory."""
        tensors = self.payload.tensors()
        return {
            "method": self.method,
            "concepts": self.names,
            "base": self.base,
            "base_fingerprint": dict(self.base_fingerprint),
            "gate": self.gate["kind"],
            "kind": self.payload.kind,
            "components": {name: len(self.payload.names(name)) for name in self.components},
            "rank": self.payload.ranks if isinstance(self.payload, LowRank) else None,
            "tensors": len(tensors),
            "parameters": sum(tensor.numel() for tensor in tensors),
            "bytes": self.stored.get("bytes", sum(tensor.numel() * tensor.element_size() for tensor in tensors)),
            "dtype": self.stored.get("dtype", "fp32"),
            "dtype_error": self.stored.get("dtype_error", 0.0),
            "seed": self.seed,
            "versions": dict(self.versions),
            "costs": dict(self.costs),
            "results": None if self.results is None else dict(self.results),
        }

    def save(self, path: str | os.PathLike[str], dtype: str = "fp32", overwrite: bool = True) -> Path:
        """Write the patch to a file, completely or not at all; missing folders are created.

        Args:
            path: the file, by convention `.safetensors`.
            dtype: data type of the tensors: fp32, bf16 or fp16. Its relative error is stored in the header.
            overwrite: whether an existing file may be replaced.

        Returns:
            The path of the written file.

        Raises:
            ErasureError: an unknown dtype, a value that overflows in it, or a path that cannot be written.
        """
        tensors, modules, shapes = encode(self.payload, dtype)
        fields: dict[str, str] = {
            "format": str(FORMAT),
            "kind": self.payload.kind,
            "method": self.method,
            "base": self.base,
            "seed": str(self.seed),
            "dtype": dtype,
            "dtype_error": to_json("dtype_error", cast_error(self.payload, dtype)),
        }
        fields |= {name: to_json(name, getattr(self, name)) for name in FIELDS}
        if self.results is not None:
            fields["results"] = to_json("results", self.results)
        metadata: dict[str, str] = {}
        if isinstance(self.payload, LowRank):
            fields["modules"] = to_json("modules", modules)
            metadata |= loader_keys(self.payload, f"{', '.join(self.names)} erased by {self.method}")
        else:
            fields["sparse"] = to_json("sparse", shapes)
        fields["digest"] = digest(tensors, fields)
        metadata |= {f"erasure.{name}": text for name, text in fields.items()}
        return write_file(path, tensors, metadata, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch file. Pickles are never read, and nothing is allocated before the sizes are checked.

        Args:
            path: the file, or a name on the Hugging Face hub, `owner/name[@revision][/file.safetensors]`, which is
                fetched into the hub's cache (or only read from there with HF_HUB_OFFLINE). Local files come first.

        Raises:
            ErasureError: the file is missing, damaged or not a patch; the message says which.
        """
        source = located(path)
        layout = read_layout(source.path)
        refuse_plain(layout.path, layout.metadata, list(layout.entries))
        try:
            fields = decode_header(layout.metadata)
            kind, dtype = fields.pop("kind"), fields.pop("dtype")
            modules, shapes = fields.pop("modules") or {}, fields.pop("sparse") or {}
            stored = {"path": str(layout.path), "bytes": layout.size, "dtype": dtype}
            stored["dtype_error"] = fields.pop("dtype_error")
            if source.repository:
                stored |= {"repository": source.repository, "revision": source.revision}
            tensors = layout.read()
            payload = decode(tensors, kind, dtype, modules, shapes)
            if isinstance(payload, LowRank):
                stored["alphas"] = len({float(value) for key, value in tensors.items() if key.endswith(ALPHA)})
            check_digest(tensors, layout.metadata)
            return cls(payload=payload, stored=stored, **fields)
        except ErasureError as error:
            raise ErasureError(f"{layout.path}: {str(error).removeprefix(f'{layout.path}: ')}") from error
