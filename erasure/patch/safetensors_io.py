"""Safetensors files: a reader that checks all sizes before it allocates memory, and an atomic writer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.fingerprint import tensor_bytes

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The type, shape and position of one tensor in a file.

    Args:
        dtype: the tensor's type.
        shape: the tensor's shape.
        begin: offset of its first byte from the start of the file.
        end: offset of the byte after its last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The checked structure of a safetensors file.

    Args:
        path: the file.
        size: its size in bytes.
        metadata: its header strings.
        entries: the type, shape and position of each tensor, by name.
    """

    path: Path
    size: int
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def read(self) -> dict[str, Tensor]:
        """Read all tensors of the file, in the types that they have there.

        Raises:
            ErasureError: the file changed or became unreadable since the layout was checked.
        """
        with reading(self.path) as handle:
            return {name: self._tensor(handle, name, entry) for name, entry in self.entries.items()}

    def _tensor(self, handle: BinaryIO, name: str, entry: Entry) -> Tensor:
        length = entry.end - entry.begin
        if length == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        handle.seek(entry.begin)
        buffer = bytearray(length)
        if handle.readinto(buffer) != length:  # type: ignore[attr-defined]
            raise ErasureError(f"{self.path}: truncated inside {name!r}")
        return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading inside the context.

    Raises:
        ErasureError: the operating system cannot open or read the file.
    """
    try:
        with path.open("rb") as handle:
            yield handle
    except OSError as error:
        raise ErasureError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_layout(path: str | os.PathLike[str]) -> Layout:
    """Read and check the structure of a safetensors file, without reading its tensors.

    Args:
        path: the file; a leading `~` is expanded.

    Raises:
        ErasureError: the file is missing, unreadable, truncated or not safetensors, or its sizes do not agree.
    """
    path = Path(path).expanduser()
    with reading(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        if start.startswith((b"PK\x03\x04", b"\x80")) and path.suffix != ".safetensors":
            raise ErasureError(
                f"{path} is a pickle and not a safetensors file; pickles can run code, so they are never opened"
            )
        if len(start) < 8:
            raise ErasureError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER or length > size - 8 or length < 2:
            raise ErasureError(
                f"{path}: truncated or not a safetensors file (header of {length} bytes in a file of {size} bytes)"
            )
        text = handle.read(length)
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ErasureError(f"{path}: the header's __metadata__ must map strings to strings")
    data = 8 + length
    entries = {name: _entry(path, name, value, data) for name, value in header.items()}
    _contiguous(path, entries, data, size)
    return Layout(path, size, metadata, entries)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ErasureError(f"{path}: the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ErasureError(f"{path}: the header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    def refuse(fault: str) -> NoReturn:
        raise ErasureError(f"{path}: tensor {name!r}: {fault}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse("its header entry must have exactly dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        refuse(f"unknown dtype {str(kind)[:40]!r}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        refuse(f"its shape must be a list of at most {MAX_DIMENSIONS} whole numbers")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse("its data_offsets must be two whole numbers, the second not below the first")
    dtype = DTYPES[kind]
    count = math.prod(shape)
    if count * dtype.itemsize != offsets[1] - offsets[0]:
        refuse(f"it has {offsets[1] - offsets[0]} bytes, which do not fit the shape {shape} of {kind}")
    if count == 0 and shape != [0]:
        refuse(f"its shape {shape} is empty")
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _contiguous(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ErasureError(f"{path}: tensor {name!r} overlaps another or leaves a gap")
        position = entry.end
    if position > size:
        raise ErasureError(f"{path}: truncated: it has only {size} of {position} bytes")
    if position < size:
        raise ErasureError(f"{path}: {size - position} bytes follow the last tensor")


def digest(tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> str:
    """Return the sha256 of the contents of a file, independent of their order.

    Args:
        tensors: the tensors by name; names, types, shapes and values count.
        fields: the header fields by name.

    Returns:
        64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor_bytes(tensor))
    for key in sorted(fields):
        total.update(f"{key}\0{fields[key]}\0".encode())
    return total.hexdigest()


def write_file(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str], overwrite: bool = True
) -> Path:
    """Write a safetensors file, completely or not at all.

    The file is written under a temporary name in the same folder and then renamed. Equal contents give equal bytes.

    Args:
        path: the file; a leading `~` is expanded, and missing folders are created.
        tensors: the tensors by name.
        metadata: the header strings.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path of the written file.

    Raises:
        ErasureError: the path cannot be written, or it exists and `overwrite` is false. An existing file is then left
            as it was.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ErasureError(f"{path} cannot be written because it is a folder")
    if path.exists() and not overwrite:
        raise ErasureError(f"{path} already exists and overwrite is false; it was left as it was")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, order, metadata)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as handle:
            handle.write(struct.pack("<Q", len(header)) + header)
            for name in order:
                handle.write(tensor_bytes(tensors[name]))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ErasureError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        _discard(temporary)
    return path


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # The folder is a file, or we have no access to it: nothing was written, so there is nothing to remove.
        return


def _header(tensors: dict[str, Tensor], order: list[str], metadata: dict[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    # Padded with spaces to a multiple of 8, which keeps the tensors aligned, as the safetensors library does.
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ErasureError(f"the header has {len(text)} bytes, and readers of safetensors accept at most {MAX_HEADER}")
    return text
