"""The header of a patch file: strings under `erasure.*`, and the modelspec and ss_ keys that LoRA loaders read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from erasure.dtypes import DTYPES
from erasure.errors import ErasureError
from erasure.hub_files import located
from erasure.patch.features import Features
from erasure.patch.guard import Guard
from erasure.patch.module_keys import COMPONENTS, DOWN, TRANSFORMER
from erasure.patch.payload import Delta, LowRank
from erasure.patch.safetensors_io import digest, read_layout
from erasure.patch.serialization import text_width, two_encoders

FORMAT = 1
PREFIX = "erasure."  # of all header keys that Erasure reads
# Kind of payload -> the field that describes it besides the tensors.
KINDS = {LowRank.kind: "modules", Delta.kind: "sparse", Guard.kind: "guard", Features.kind: "features"}
# Field -> type of its JSON value. TEXTS lists the fields that are plain strings.
JSON: dict[str, type] = {
    "concepts": list,
    "base_fingerprint": dict,
    "config": dict,
    "gate": dict,
    "versions": dict,
    "costs": dict,
    "curves": dict,
    "results": dict,
    "kept": dict,
    "modules": dict,
    "sparse": dict,
    "guard": dict,
    "features": dict,
}
OPTIONAL = ("curves", "results", "kept", *KINDS.values())
TEXTS = ("method", "base", "kind", "dtype")
# Width of the text embedding -> names of the architecture for other loaders.
ARCHITECTURES = {
    768: ("stable-diffusion-v1/lora", "sd_v1", "512x512"),
    1024: ("stable-diffusion-v2-512/lora", "sd_v2", "512x512"),
    2048: ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "1024x1024"),
}


def to_json(label: str, value: Any) -> str:
    """Return a value as JSON text.

    Args:
        label: what the value is, for the message.
        value: plain data.

    Raises:
        ErasureError: the value contains NaN, infinity, or a type that JSON does not have.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ErasureError(f"{label} cannot be written as JSON: {error}") from error


def from_json(label: str, text: str, kind: type | tuple[type, ...]) -> Any:
    """Return the value of a JSON text.

    Args:
        label: what the text is, for the message.
        text: the JSON text.
        kind: the type, or types, that the outermost value may have.

    Raises:
        ErasureError: the text is not JSON, its value has another type, or it contains NaN or infinity.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ErasureError(f"{label} is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        expected = "a number" if isinstance(kind, tuple) else kind.__name__
        raise ErasureError(f"{label} is a JSON {type(value).__name__}, expected {expected}")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def check_fields(fields: dict[str, Any]) -> None:
    """Check the contents of the JSON fields of a header.

    Raises:
        ErasureError: a field has the wrong type; the message names it.
    """
    if not fields["concepts"] or not all(isinstance(concept, dict) for concept in fields["concepts"]):
        raise ErasureError("concepts must be a list of at least one JSON object")
    for component, fingerprint in fields["base_fingerprint"].items():
        if component not in COMPONENTS or not isinstance(fingerprint, str):
            raise ErasureError(
                f"base_fingerprint must map components ({', '.join(COMPONENTS)}) to strings; "
                f"the entry {component!r} does not"
            )
    if not isinstance(fields["gate"].get("kind"), str):
        raise ErasureError('gate must have a \'kind\', such as {"kind": "always"}')
    for component, paths in (fields.get("modules") or {}).items():
        good = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if component not in COMPONENTS or not good or len(set(paths)) != len(paths):
            raise ErasureError(
                f"modules must map components ({', '.join(COMPONENTS)}) to lists of distinct module paths; "
                f"the entry {component!r} does not"
            )
    for key, shape in (fields.get("sparse") or {}).items():
        if not isinstance(shape, list) or not 0 < len(shape) <= 8 or not all(type(n) is int and n > 0 for n in shape):
            raise ErasureError(f"sparse: the shape of {key!r} must be a list of 1 to 8 whole numbers above 0")


def decode_header(metadata: dict[str, str]) -> dict[str, Any]:
    """Decode and check the `erasure.*` fields of a file's header.

    Args:
        metadata: the header strings, as `read_header` returns them.

    Returns:
        The decoded fields, by their names without `erasure.`; absent optional fields are None.

    Raises:
        ErasureError: the format is unknown or newer than this version, or a field is missing or of the wrong type.
    """
    version = metadata.get("erasure.format", "")
    if re.fullmatch(r"[0-9]{1,9}", version) and int(version) > FORMAT:
        raise ErasureError(
            f"patch format {version} is newer than this Erasure, which reads format {FORMAT}; upgrade erasure-diffusion"
        )
    if version != str(FORMAT):
        raise ErasureError(f"unknown patch format {version[:40]!r}, expected '{FORMAT}'")
    required = [*TEXTS, "seed", "dtype_error", *(name for name in JSON if name not in OPTIONAL)]
    missing = [f"erasure.{name}" for name in required if f"erasure.{name}" not in metadata]
    if missing:
        raise ErasureError(f"the header lacks {', '.join(missing)}")
    fields: dict[str, Any] = {name: metadata[f"erasure.{name}"] for name in TEXTS}
    for name, kind in JSON.items():
        text = metadata.get(f"erasure.{name}")
        fields[name] = None if text is None else from_json(f"erasure.{name}", text, kind)
    if fields["kind"] not in KINDS:
        raise ErasureError(f"erasure.kind is {fields['kind'][:40]!r}, expected {' or '.join(KINDS)}")
    if fields["dtype"] not in DTYPES:
        raise ErasureError(f"erasure.dtype is {fields['dtype'][:40]!r}, expected {', '.join(DTYPES)}")
    if not re.fullmatch(r"-?[0-9]{1,20}", metadata["erasure.seed"]):
        raise ErasureError("erasure.seed is not a whole number")
    fields["seed"] = int(metadata["erasure.seed"])
    fields["dtype_error"] = from_json("erasure.dtype_error", metadata["erasure.dtype_error"], (int, float))
    needed = KINDS[fields["kind"]]
    if fields[needed] is None:
        raise ErasureError(f"the header lacks erasure.{needed}")
    check_fields(fields)
    return fields


def check_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Compare a file's tensors and `erasure.*` fields with the digest in its header.

    Files that older versions wrote have no digest and are accepted.

    Args:
        tensors: the tensors of the file by key.
        metadata: the header strings of the file.

    Raises:
        ErasureError: they differ, so the file was changed after it was written.
    """
    fields = {key.removeprefix(PREFIX): text for key, text in metadata.items() if key.startswith(PREFIX)}
    recorded = fields.pop("digest", None)
    if recorded is not None and digest(tensors, fields) != recorded:
        raise ErasureError(
            "its tensors or header do not match the digest in erasure.digest: the file was damaged or changed after it "
            "was written. Download or make it again; nothing was loaded"
        )


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read and check the header of a patch file without reading its tensors.

    Args:
        path: the file, or a name on the hub, as for `Patch.load`.

    Returns:
        The header strings as they are in the file: `erasure.method`, `erasure.concepts` (JSON) and so on.

    Raises:
        ErasureError: the file is missing, damaged or not a patch, or it was written by a newer version.
    """
    layout = read_layout(located(path).path)
    refuse_plain(layout.path, layout.metadata, list(layout.entries))
    try:
        decode_header(layout.metadata)
    except ErasureError as error:
        raise ErasureError(f"{layout.path}: {error}") from error
    return layout.metadata


def refuse_plain(path: os.PathLike[str], metadata: dict[str, str], keys: list[str]) -> None:
    """Refuse a file without the header of a patch.

    Args:
        path: the file, for the message.
        metadata: its header strings.
        keys: the names of its tensors.

    Raises:
        ErasureError: the header lacks `erasure.format`; the message says what the file is instead.
    """
    if "erasure.format" in metadata:
        return
    if any(key.endswith((DOWN, "lora_A.weight", "lora.down.weight")) for key in keys):
        raise ErasureError(
            f"{path} is a plain LoRA and not a patch: its header lacks erasure.format, erasure.method, "
            "erasure.concepts, erasure.base_fingerprint and the other fields. `erasure patch import` turns it into a "
            "patch; pipe.load_lora_weights loads it without one"
        )
    raise ErasureError(
        f"{path} is a safetensors file but not a patch: its header lacks erasure.format. `erasure patch import` "
        "turns files from other programs into patches"
    )


def loader_keys(payload: LowRank, title: str) -> dict[str, str]:
    """Return the header fields that kohya, ComfyUI and A1111 read from a LoRA.

    Args:
        payload: the low-rank payload of the file.
        title: a title for people.
    """
    if TRANSFORMER in payload.components:  # the layers do not say of which one
        return {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers", "modelspec.title": title}
    architecture, _, resolution = _architecture(payload)
    ranks = payload.ranks
    keys = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        **family_keys(payload),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{payload.alpha:g}",
    }
    return {**keys, "modelspec.resolution": resolution} if resolution else keys


def family_keys(payload: LowRank | Delta) -> dict[str, str]:
    """Return the header fields by which A1111 tells the family of a file; it hides files of another family.

    Without them every file with a header counts as Stable Diffusion 1 there (extensions-builtin/Lora/network.py).

    Args:
        payload: the change of the weights.
    """
    if TRANSFORMER in payload.components:
        return {}
    base = _architecture(payload)[1]
    return {"ss_base_model_version": base, "ss_v2": str(base == ARCHITECTURES[1024][1])}


def _architecture(payload: LowRank | Delta) -> tuple[str, str, str]:
    """Return the entry of ARCHITECTURES, without a resolution if the payload does not show the family."""
    width = 2048 if two_encoders(payload) else text_width(payload)
    return ARCHITECTURES.get(width or 0, (*ARCHITECTURES[768][:2], ""))
