"""Damaged and hostile files: reading them raises an ErasureError that names the file, and never another error."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank, Patch, read_header

CONCEPTS = [{"name": "cat"}]
KEY = "lora_unet_a_b"


def low_rank():
    torch.manual_seed(0)
    return Patch(LowRank({"unet": {"a.b": (torch.randn(2, 4), torch.randn(3, 2), 1.0)}}), "random", CONCEPTS)


def delta():
    torch.manual_seed(0)
    sparse = torch.zeros(5, 5)
    sparse[1, 2], sparse[4, 4] = 1.0, 2.0
    return Patch(Delta({"unet": {"a.weight": sparse, "b.weight": torch.randn(3)}}), "random", CONCEPTS)


def split(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def refused(path, data, match=None):
    path.write_bytes(data)
    with pytest.raises(ErasureError, match=match) as caught:
        Patch.load(path)
    assert str(path) in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("make", [low_rank, delta])
def test_cut_anywhere(path, make):
    data = make().save(path).read_bytes()
    for length in range(len(data)):
        refused(path, data[:length])
    refused(path, data + b"x", "follow the last tensor")


def test_missing_folder_and_pickle(tmp_path):
    with pytest.raises(ErasureError, match="cannot be read"):
        Patch.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ErasureError, match="cannot be read"):
        Patch.load(tmp_path)
    refused(tmp_path / "empty.safetensors", b"", "truncated or not a safetensors file")
    torch.save({"a": torch.ones(2)}, tmp_path / "p.pt")
    with pytest.raises(ErasureError, match="a pickle"):
        Patch.load(tmp_path / "p.pt")
    refused(tmp_path / "renamed.safetensors", (tmp_path / "p.pt").read_bytes())


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_header_length_lies(path, length):
    data = low_rank().save(path).read_bytes()
    refused(path, struct.pack("<Q", length) + data[8:], "truncated or not a safetensors file")


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        b"nul",
        b'"a"',
        b"\xff\xff",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"a":1,"a":2}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"erasure.format":1}}',
    ],
)
def test_header_is_not_a_table(path, text):
    refused(path, join(text, b""))


ENTRY = {
    "dtype": ["F33", "", None, 5, ["F32"], "F16", "F64", "U8"],
    "shape": [None, "2", [-1, -8], [2.0, 4], [True, 8], [2**70], [2**40, 2**40], [0, 8], [1] * 40, [10**4000], [9], {}],
    "data_offsets": [
        None,
        [],
        [0],
        [0, 1, 2],
        [5, 3],
        [-8, 24],
        [0, 2**70],
        [0, 2**62],
        [0.0, 32.0],
        [8, 40],
        ["0", 1],
    ],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ENTRY.items() for value in values])
def test_tensor_entry_lies(path, field, value):
    header, body = split(low_rank().save(path).read_bytes())
    header[f"{KEY}.lora_down.weight"][field] = value
    refused(path, join(header, body))


def test_tensor_entry_of_another_form(path):
    header, body = split(low_rank().save(path).read_bytes())
    for entry in (None, [], {}, {"dtype": "F32"}, {**header[f"{KEY}.alpha"], "more": 1}):
        refused(path, join({**header, f"{KEY}.alpha": entry}, body))


def test_a_giant_claim_is_refused_before_it_is_allocated(path):
    header, body = split(low_rank().save(path).read_bytes())
    position = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["huge"] = {"dtype": "F32", "shape": [2**38], "data_offsets": [position, position + 2**40]}
    refused(path, join(header, body), "truncated")


def test_sparse_shape_lies(path):
    header, body = split(delta().save(path).read_bytes())
    for shape in ([2**40, 2**20], [5], [5, 7], [0], [], [-5, -5], "5", [5.0, 5], None, [1] * 9):
        header["__metadata__"]["erasure.sparse"] = json.dumps({"unet.a.weight": shape})
        refused(path, join(header, body), "sparse|mask")
    for table in ({}, {"unet.c.weight": [5, 5]}, {"vae.a": [5, 5]}, {"unet.a.weight": [5, 5], "unet.b.weight": [3]}):
        header["__metadata__"]["erasure.sparse"] = json.dumps(table)
        refused(path, join(header, body))


def test_mask_marks_another_number_of_values(path):
    header, body = split(delta().save(path).read_bytes())
    begin, end = header["unet.a.weight::mask"]["data_offsets"]
    for mask in (b"\xff" * (end - begin), bytes(end - begin), body[begin : end - 1] + b"\x80"):
        refused(path, join(header, body[:begin] + mask + body[end:]), "mask")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"])
def test_nan_in_the_file(path, name, value):
    header, body = split(low_rank().save(path).read_bytes())
    begin = header[name]["data_offsets"][0]
    refused(path, join(header, body[:begin] + struct.pack("<f", value) + body[begin + 4 :]), "NaN|alpha is")


def rewritten(path, **tensors):
    """Write the low-rank file with some tensors replaced, or left out where they are None, and return its bytes."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    low_rank().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    contents = load_file(path)
    contents |= {name.replace("__", "."): tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor is None:
            del contents[name.replace("__", ".")]
    save_file(contents, path, metadata)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({f"{KEY}__alpha": None}, "alpha' is missing"),
        ({f"{KEY}__lora_up__weight": None}, "lora_up.weight' is missing"),
        ({f"{KEY}__lora_up__weight": torch.ones(3, 4)}, "down has rank 2, up has rank 4"),
        ({f"{KEY}__lora_up__weight": torch.ones(3)}, "neither"),
        ({f"{KEY}__lora_up__weight": torch.ones(3, 2, dtype=torch.float16)}, "expected torch.float32"),
        ({f"{KEY}__lora_down__weight": torch.ones(0)}, "empty|neither"),
        ({f"{KEY}__alpha": torch.ones(2)}, "must be a single number"),
        ({"lora_unet_z__alpha": torch.tensor(1.0)}, "unknown tensor 'lora_unet_z.alpha'"),
        ({"gate": torch.ones(1)}, "unknown tensor 'gate'"),
    ],
)
def test_low_rank_triples_that_do_not_agree(path, tensors, fault):
    refused(path, rewritten(path, **tensors), fault)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("format", "2", "newer than this Erasure"),
        ("format", "one", "unknown patch format"),
        ("format", "1" * 5000, "unknown patch format"),
        ("method", None, "lacks erasure.method"),
        ("method", "", "method"),
        ("base_fingerprint", None, "lacks erasure.base_fingerprint"),
        ("base_fingerprint", '{"unet": 5}', "base_fingerprint"),
        ("gate", "always", "erasure.gate is not valid JSON"),
        ("gate", "[]", "erasure.gate is a JSON list, expected dict"),
        ("gate", "{}", "gate must have"),
        ("gate", '{"kind": ["text"]}', "gate must have"),
        ("gate", '{"kind": "text", "power": NaN}', "not valid JSON"),
        ("gate", '{"kind": "text", "power": 1e999}', "not valid JSON"),
        ("config", "[" * 100_000, "not valid JSON"),
        ("concepts", '["cat"]', "concepts"),
        ("concepts", "[]", "concepts"),
        ("concepts", '{"name": "cat"}', "concepts"),
        ("results", "[]", "erasure.results"),
        ("seed", "1.5", "seed"),
        ("seed", "9" * 5000, "seed"),
        ("kind", "diff", "erasure.kind"),
        ("kind", "delta", "lacks erasure.sparse"),
        ("dtype", "fp8", "erasure.dtype"),
        ("dtype", "fp16", "expected torch.float16"),
        ("dtype_error", '"small"', "dtype_error"),
        ("modules", None, "lacks erasure.modules"),
        ("modules", "{}", "erases nothing|unknown tensor"),
        ("modules", '{"unet": ["a.c"]}', "missing"),
        ("modules", '{"unet": ["a.b", "a.b"]}', "distinct"),
        ("modules", '{"unet": "a.b"}', "modules"),
        ("modules", '{"vae": ["a.b"]}', "modules"),
        ("modules", '{"unet": ["a.b/../c"]}', "not a module path"),
        ("modules", '{"unet": ["a.b", "a_b"]}', "missing"),
    ],
)
def test_header_fields(path, name, value, fault):
    header, body = split(low_rank().save(path).read_bytes())
    if value is None:
        del header["__metadata__"][f"erasure.{name}"]
    else:
        header["__metadata__"][f"erasure.{name}"] = value
    refused(path, join(header, body), fault)


@pytest.mark.parametrize("make", [low_rank, delta])
@pytest.mark.parametrize("seed", range(3))
def test_random_damage_never_escapes(path, make, seed):
    data = make().save(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    whole = make()
    draw = random.Random(seed)
    refusals = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(8 + length if draw.random() < 0.8 else len(data))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            back = Patch.load(path)
        except ErasureError as error:
            assert str(path) in str(error)
            refusals += 1
            continue
        # A file loads only if the damage changed neither tensors nor fields, or removed the digest itself.
        assert len(back.payload.names("unet")) == len(whole.payload.names("unet"))
        assert all(torch.isfinite(tensor).all() for tensor in back.payload.tensors())
    assert refusals > 70


def test_read_header_names_the_file_too(path):
    header, body = split(low_rank().save(path).read_bytes())
    header["__metadata__"]["erasure.gate"] = "5"
    path.write_bytes(join(header, body))
    with pytest.raises(ErasureError, match=r"p\.safetensors: erasure\.gate"):
        read_header(path)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with one kind of damage: flipped bits, a zeroed or doubled stretch, two stretches swapped, a cut."""
    body, kind = bytearray(data), draw.choice(["flip", "zero", "swap", "copy", "cut", "insert"])
    at, length = draw.randrange(len(body)), draw.randint(1, 16)
    other = draw.randrange(len(body) - length) if len(body) > length else 0
    if kind == "flip":
        for _ in range(draw.randint(1, 3)):
            body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        body[at : at + length] = bytes(len(body[at : at + length]))
    elif kind == "swap":
        first, second = body[at : at + length], body[other : other + length]
        if len(first) == len(second):
            body[at : at + length], body[other : other + length] = second, first
    elif kind == "copy":
        body[at : at + length] = body[other : other + length][: len(body[at : at + length])]
    elif kind == "cut":
        del body[at:]
    else:
        body[at:at] = bytes(draw.randrange(256) for _ in range(length))
    return bytes(body)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("make", [low_rank, delta])
def test_a_thousand_damaged_files_are_refused_or_the_same_in_effect(path, make, dtype):
    """250 damaged files of each kind; what loads all the same must be the patch that was written."""
    make().save(path, dtype=dtype)
    whole, data = Patch.load(path), path.read_bytes()
    draw, loaded = random.Random(f"{make.__name__} {dtype}"), 0
    for _ in range(250):
        path.write_bytes(mutated(data, draw))
        try:
            patch = Patch.load(path)
        except ErasureError as fault:
            assert str(path) in str(fault)
            continue
        loaded += 1
        assert patch.payload.digest == whole.payload.digest
        fields = ("method", "base", "base_fingerprint", "gate", "config", "concepts", "seed", "results", "costs")
        assert all(getattr(patch, name) == getattr(whole, name) for name in fields)
    assert loaded < 25  # damage outside of what the patch means, such as in the keys for other programs


def test_changed_values_and_changed_gates_do_not_load(path):
    header, body = split(low_rank().save(path).read_bytes())
    refused(path, join(header, body[:-4] + struct.pack("<f", 0.25)), "erasure.digest")
    stronger = {**header["__metadata__"], "erasure.gate": json.dumps({"kind": "text", "texts": ["cat"]})}
    refused(path, join({**header, "__metadata__": stronger}, body), "erasure.digest")


def test_files_from_before_the_digest_still_load(path):
    header, body = split(low_rank().save(path).read_bytes())
    del header["__metadata__"]["erasure.digest"]
    path.write_bytes(join(header, body))
    assert Patch.load(path).payload.digest == low_rank().payload.digest
