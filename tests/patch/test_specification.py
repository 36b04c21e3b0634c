"""docs/patch-format.md, implemented from its text alone: files read and written byte for byte as Erasure does.

The reader and the writer here use nothing of `erasure.patch` but the files that it makes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from erasure.patch import Delta, Patch
from erasure.patch.header import JSON, OPTIONAL, TEXTS
from erasure.patch.header import KINDS as HEADER_KINDS
from erasure.pipelines.gates import parse
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "patch-format.md").read_text(encoding="utf-8")
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
TORCH = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "U8": "torch.uint8"}
TYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}
ORIGINAL = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
}


def split(data: bytes):
    """Return the header fields, and key -> (type, shape, bytes)."""
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    fields = table.pop("__metadata__")
    body = data[8 + length :]
    tensors = {key: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for key, e in table.items()}
    return fields, tensors


def join(fields, tensors) -> bytes:
    """Write a file as "How files are written" says."""
    table, position = {"__metadata__": dict(sorted(fields.items()))}, 0
    order = sorted(tensors, key=lambda key: (-SIZES[tensors[key][0]], key))
    for key in order:
        kind, shape, data = tensors[key]
        table[key] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"".join(tensors[key][2] for key in order)


def digest(fields, tensors) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        kind, shape, data = tensors[key]
        total.update(f"{key}\0{TORCH[kind]}\0{shape}\0".encode() + data)
    for key in sorted(fields):
        if key.startswith("erasure.") and key != "erasure.digest":
            total.update(f"{key.removeprefix('erasure.')}\0{fields[key]}\0".encode())
    return total.hexdigest()


def array(tensor):
    kind, shape, data = tensor
    return np.frombuffer(data, TYPES[kind]).reshape(shape).astype(np.float64)


def nested(component, path):
    return path if component in ("unet", "transformer") or path.startswith("text_projection") else f"text_model.{path}"


def prefix(component, path, two):
    if component == "unet":
        return "lora_unet_" + ORIGINAL.get(path, path).replace(".", "_")
    start = {"text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    return start + nested(component, path).replace(".", "_")


def changes(data: bytes):
    """Read the change of every parameter, component -> name -> array."""
    fields, tensors = split(data)
    found: dict = {}
    if fields["erasure.kind"] == "low-rank":
        modules = json.loads(fields["erasure.modules"])
        read = [tensors.get(prefix("unet", path, False) + ".lora_down.weight") for path in modules.get("unet", [])]
        widths = [one[1][1] for path, one in zip(modules.get("unet", []), read, strict=True) if "attn2.to_" in path]
        two = "text_encoder_2" in modules or 2048 in widths
        for component, paths in modules.items():
            for path in paths:
                key = prefix(component, path, two)
                down, up, alpha = (
                    array(tensors[key + end]) for end in (".lora_down.weight", ".lora_up.weight", ".alpha")
                )
                product = up.reshape(len(up), -1) @ down.reshape(len(down), -1) * (float(alpha) / len(down))
                change = product.reshape(len(up), *down.shape[1:])
                found.setdefault(component, {})[f"{path}.weight"] = change
        return found
    for key, shape in json.loads(fields["erasure.sparse"]).items():
        bits = np.frombuffer(tensors.pop(f"{key}::mask")[2], np.uint8)
        flat = np.zeros(int(np.prod(shape)))
        marked = [i for i in range(len(flat)) if bits[i // 8] >> (i % 8) & 1]
        flat[marked] = array(tensors.pop(f"{key}::values"))
        tensors[key] = ("F32", shape, flat.astype(np.float32).tobytes())
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = array(tensor)
    return found


def fingerprint(parameters) -> str:
    parts = []
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        total = hashlib.sha256()
        for name in sorted(parameters):
            value = parameters[name].detach().to(kind).contiguous()
            total.update(f"{name}{list(value.shape)}".encode() + value.view(torch.uint8).numpy().tobytes())
        parts.append(total.hexdigest()[:16])
    return "".join(parts)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def made(pipe, kind):
    if kind == "delta":
        return delta_patch(pipe, concepts=[{"name": "ünï"}], results={"a": 1})
    if kind == "xl":
        xl = tiny_pipeline(kind="sdxl")
        return low_rank_patch(xl, components=("unet", "text_encoder", "text_encoder_2"), part="")
    return low_rank_patch(pipe, components=("unet", "text_encoder"), part="")


KINDS = ("low-rank", "delta", "xl")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_files_are_written_byte_for_byte(kind, dtype, pipe, tmp_path):
    data = made(pipe, kind).save(tmp_path / "p.safetensors", dtype=dtype).read_bytes()
    fields, tensors = split(data)
    assert join(fields, tensors) == data
    assert digest(fields, tensors) == fields["erasure.digest"]
    stored = {kind for key, (kind, _, _) in tensors.items() if not key.endswith((".alpha", "::mask"))}
    assert stored == {{"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_changes_are_read(kind, pipe, tmp_path):
    patch = made(pipe, kind)
    read = changes(patch.save(tmp_path / "p.safetensors").read_bytes())
    assert sorted(read) == patch.components
    for component in patch.components:
        exact = patch.deltas(component)
        assert sorted(read[component]) == sorted(exact)
        for name, change in exact.items():
            assert read[component][name].shape == tuple(change.shape)
            assert np.allclose(read[component][name], change.numpy(), rtol=1e-4, atol=1e-6), name


def test_a_file_of_another_program_is_loaded(pipe, tmp_path):
    """A patch that was put together from the page alone, with its tensors in another order and a field of its own."""
    name = next(name for name, _ in pipe.unet.named_parameters() if name.endswith("attn2.to_k.weight"))
    weight = pipe.unet.get_parameter(name)
    change = np.arange(weight.numel(), dtype=np.float32).reshape(weight.shape)
    fields = {
        **{"format": "1", "kind": "delta", "method": "by-hand", "concepts": '[{"name": "cat"}]', "base": "tiny"},
        **{"base_fingerprint": json.dumps({"unet": fingerprint({name: weight})}), "config": "{}", "seed": "0"},
        **{"gate": '{"kind": "always"}', "versions": "{}", "costs": "{}", "dtype": "fp32", "dtype_error": "0"},
        **{"sparse": "{}", "colour": "blue"},
    }
    fields = {f"erasure.{key}": text for key, text in fields.items()}
    tensors = {f"unet.{name}": ("F32", list(weight.shape), change.tobytes())}
    fields["erasure.digest"] = digest(fields, tensors)
    path = tmp_path / "p.safetensors"
    path.write_bytes(join(fields, tensors))
    patch = Patch.load(path)
    assert isinstance(patch.payload, Delta) and np.array_equal(patch.deltas("unet")[name].numpy(), change)
    assert patch.base_fingerprint["unet"] == patch_fingerprint(pipe, name)
    path.write_bytes(join(fields | {"erasure.colour": "red"}, tensors))
    with pytest.raises(ValueError, match="digest"):
        Patch.load(path)


def patch_fingerprint(pipe, name):
    from erasure.patch import fingerprint as ours

    return ours(pipe.unet, [name])


def test_the_page_names_every_field_and_gate():
    table = PAGE.split("## Header fields")[1].split("## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`.+?) \|", table, re.M))))
    assert named == {"format", "seed", "dtype_error", "digest", *TEXTS, *JSON}
    optional = next(line for line in table.splitlines() if line.endswith("| optional |"))
    assert set(re.findall(r"`([a-z_]+)`", optional)) == set(OPTIONAL) - {"modules", "sparse", "guard", "features"}
    kinds = next(line for line in table.splitlines() if line.startswith("| `kind` |"))
    assert set(re.findall(r"`([a-z-]+)`", kinds)) == {"kind", *HEADER_KINDS}
    gates = PAGE.split("## Gates")[1].split("## ")[0]
    rows = {
        kind: set(re.findall(r"`(\w+)`", keys)) for kind, keys in re.findall(r"^\| `(\w+)` \| (.*?) \|", gates, re.M)
    }
    assert rows.keys() - {"kind"} == set(parse.KINDS)
    for kind, cls in parse.CLASSES.items():
        assert rows[kind] == set(cls.__dataclass_fields__), kind
