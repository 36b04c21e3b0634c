"""The class Patch: a change of weights, a guard or features, together with its header. Patches are immutable."""

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
from erasure.patch.features import Features
from erasure.patch.guard import Guard
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
from erasure.patch.payload import RUNTIME, Delta, LowRank, Payload
from erasure.patch.safetensors_io import digest, read_layout, write_file
from erasure.patch.serialization import cast_error, decode, decode_features, encode

ALWAYS = {"kind": "always"}
FIELDS = ("concepts", "base_fingerprint", "config", "gate", "versions", "costs")


@dataclass(frozen=True, eq=False)
class Patch:
    """The result of an erasure: the change of the weights, a guard or features, and a record of how it was made.

    Args:
        payload: the change, a `LowRank` or a `Delta`; or a `Guard` or `Features`, which change no weight.
        method: the name of the method that made the patch.
        concepts: the erased concepts, as JSON objects or objects with `to_json()`. Only their key `name` is used.
        base: the checkpoint that the patch was made from, as the user named it.
        base_fingerprint: for each component, the `fingerprint` of the base parameters that the payload names.
        config: all settings of the method.
        gate: the rule that decides how strongly the patch acts on a prompt, such as `{"kind": "always"}` or
            `{"kind": "text", ...}`.
        versions: the versions of the libraries that made the patch.
        seed: the random seed of the run.
        costs: F and B (forward and backward passes of the UNet, counted in samples), seconds, and peak memory.
        curves: how much was erased and kept in the course of the run, or None where it was not measured.
        results: the measurements of `verify`, or None.
        kept: for a patch of a list, the words that the list keeps (`NameList.to_json`), or None.
        stored: for a loaded patch, the path, bytes, dtype and dtype_error of the file, its number of different alphas
            (1 in files that we write), and for a patch from the hub the repository and revision; otherwise empty.

    Raises:
        ErasureError: a field has the wrong type or cannot be written as JSON.
    """

    payload: Payload
    method: str
    concepts: Sequence[Any]
    base: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=lambda: dict(ALWAYS))
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    costs: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None
    kept: Mapping[str, Any] | None = None
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.payload, Payload):
            raise ErasureError(f"payload must be LowRank, Delta, Guard or Features, not {type(self.payload).__name__}")
        if not isinstance(self.method, str) or not self.method or not isinstance(self.base, str):
            raise ErasureError("method and base must be strings, and method must not be empty")
        if type(self.seed) is not int:
            raise ErasureError(f"seed must be a whole number, not {self.seed!r}")
        if isinstance(self.concepts, str | bytes | Mapping):
            raise ErasureError("concepts must be a list of JSON objects")
        plain = [concept.to_json() if hasattr(concept, "to_json") else concept for concept in self.concepts]
        values = {name: getattr(self, name) for name in FIELDS} | {"concepts": plain}
        for name, value in values.items():
            if not isinstance(value, list if JSON[name] is list else Mapping):
                raise ErasureError(f"{name} must be a JSON {JSON[name].__name__}, not {type(value).__name__}")
        # Converted to JSON and back, the fields are equal to those in the file, and are not shared with the caller.
        values = {name: json.loads(to_json(name, value)) for name, value in values.items()}
        check_fields(values)
        for name, value in values.items():
            object.__setattr__(self, name, tuple(value) if name == "concepts" else value)
        for name in ("curves", "results", "kept"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, json.loads(to_json(name, dict(value))))

    @property
    def names(self) -> list[str]:
        """Return the names of the concepts that the patch erases."""
        return [str(concept.get("name", "?")) for concept in self.concepts]

    @property
    def anchors(self) -> dict[str, str]:
        """Return every erased name, aliases included, that has an anchor -> the anchor."""
        return {
            str(name): str(concept["anchor"])
            for concept in self.concepts
            if concept.get("anchor")
            for name in (concept.get("name", "?"), *concept.get("aliases", ()))
        }

    @property
    def weights(self) -> LowRank | Delta:
        """Return the change of weights that the patch holds.

        Raises:
            ErasureError: the patch is a guard or holds features, which change no weight.
        """
        if isinstance(self.payload, Features):
            raise ErasureError(
                f"{'+'.join(self.names)!r} ({self.method}) holds features that Erasure's pipelines switch off while "
                "they draw, and changes no weight that could be combined, resized or written to another format"
            )
        if isinstance(self.payload, Guard):
            raise ErasureError(
                f"{'+'.join(self.names)!r} ({self.method}) is a guard: it holds texts and settings with which "
                "Erasure's pipelines draw, and changes no weight that could be combined, resized or written to another "
                "format"
            )
        return self.payload

    @property
    def components(self) -> list[str]:
        """Return the components that the patch changes, sorted."""
        return self.payload.components

    def deltas(self, component: str) -> dict[str, Tensor]:
        """Return the dense change of each parameter of a component, by the parameter's name.

        Args:
            component: unet, text_encoder or text_encoder_2.

        Returns:
            Tensors in fp32 on the CPU, which are copies; empty if the patch does not change the component's weights.

        Raises:
            ErasureError: patches cannot change such a component.
        """
        check_component(component)
        if self.payload.kind in RUNTIME:
            return {}
        return {name: self.payload.change(component, name).clone() for name in self.payload.names(component)}

    def scale(self, factor: float) -> Patch:
        """Return a patch with every change multiplied by `factor`.

        Curves and measured results are dropped, because they no longer hold.

        Raises:
            ErasureError: `factor` is not a finite number.
        """
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            raise ErasureError(f"a patch can only be scaled by a finite number, not by {factor!r}")
        return dataclasses.replace(
            self, payload=self.payload.scaled(float(factor)), curves=None, results=None, stored={}
        )

    def info(self) -> dict[str, Any]:
        """Return a description of the patch as plain JSON values.

        `bytes` is the size of the file, or of the fp32 tensors for a patch that was not loaded from a file.
        """
        tensors = self.payload.tensors()
        return {
            "method": self.method,
            "concepts": self.names,
            "base": self.base,
            "base_fingerprint": dict(self.base_fingerprint),
            "gate": self.gate["kind"],
            "kind": self.payload.kind,
            "components": {}
            if self.payload.kind in RUNTIME
            else {name: len(self.payload.names(name)) for name in self.components},
            "rank": self.payload.ranks if isinstance(self.payload, LowRank) else None,
            "guard": self.payload.to_json() if isinstance(self.payload, Guard) else None,
            "features": self.payload.to_json() if isinstance(self.payload, Features) else None,
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
        """Write the patch to a safetensors file, completely or not at all. Missing folders are created.

        Args:
            path: the file, whose suffix should be `.safetensors`.
            dtype: type of the tensors: fp32, bf16 or fp16. The relative error of the cast is stored in the header.
            overwrite: whether an existing file may be replaced.

        Returns:
            The path of the written file.

        Raises:
            ErasureError: the dtype is unknown, a value overflows in it, or the path cannot be written.
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
        optional = {"curves": self.curves, "results": self.results, "kept": self.kept}
        fields |= {name: to_json(name, value) for name, value in optional.items() if value is not None}
        metadata: dict[str, str] = {}
        if isinstance(self.payload, LowRank):
            fields["modules"] = to_json("modules", modules)
            metadata |= loader_keys(self.payload, f"{', '.join(self.names)} erased by {self.method}")
        elif isinstance(self.payload, Guard):
            fields["guard"] = to_json("guard", self.payload.to_json())
        elif isinstance(self.payload, Features):
            fields["features"] = to_json("features", self.payload.to_json())
        else:
            fields["sparse"] = to_json("sparse", shapes)
        fields["digest"] = digest(tensors, fields)
        metadata |= {f"erasure.{name}": text for name, text in fields.items()}
        return write_file(path, tensors, metadata, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch from a file or from the Hugging Face hub.

        Pickles are never read, and all sizes are checked before memory is allocated.

        Args:
            path: the file, or a name on the hub, `owner/name[@revision][/file.safetensors]`. A file on the hub is
                downloaded to the hub's cache; with HF_HUB_OFFLINE set, only the cache is used. Local files take
                precedence.

        Raises:
            ErasureError: the file is missing, damaged or not a patch; the message names the file and the fault.
        """
        source = located(path)
        layout = read_layout(source.path)
        refuse_plain(layout.path, layout.metadata, list(layout.entries))
        try:
            fields = decode_header(layout.metadata)
            kind, dtype = fields.pop("kind"), fields.pop("dtype")
            modules, shapes = fields.pop("modules") or {}, fields.pop("sparse") or {}
            guard, features = fields.pop("guard"), fields.pop("features")
            stored = {"path": str(layout.path), "bytes": layout.size, "dtype": dtype}
            stored["dtype_error"] = fields.pop("dtype_error")
            if source.repository:
                stored |= {"repository": source.repository, "revision": source.revision}
            tensors = layout.read()
            payload: Payload
            if kind == Guard.kind:
                payload = Guard.from_json(guard)
                if tensors:
                    raise ErasureError(f"unknown tensor {min(tensors)!r}: a guard holds no tensors")
            elif kind == Features.kind:
                payload = decode_features(tensors, dtype, features)
            else:
                payload = decode(tensors, kind, dtype, modules, shapes)
            if isinstance(payload, LowRank):
                stored["alphas"] = len({float(value) for key, value in tensors.items() if key.endswith(ALPHA)})
            check_digest(tensors, layout.metadata)
            return cls(payload=payload, stored=stored, **fields)
        except ErasureError as error:
            raise ErasureError(f"{layout.path}: {str(error).removeprefix(f'{layout.path}: ')}") from error
