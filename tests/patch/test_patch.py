"""Patches in memory, and written to and read from intact files."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank, Patch, fingerprint, read_header, same_base
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

CONCEPTS = [{"name": "cat", "aliases": ["kitten"]}, {"name": "dog"}]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def linear(rank=2, alpha=1.0, **fields):
    factors = (torch.arange(8.0).reshape(2, 4)[:rank], torch.ones(3, rank), alpha)
    return Patch(LowRank({"unet": {"a.b_c": factors}}), "random", CONCEPTS, **fields)


@pytest.mark.parametrize("make", [low_rank_patch, delta_patch])
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0.0), ("fp16", 5e-4), ("bf16", 6e-3)])
def test_round_trip(pipe, tmp_path, make, dtype, bound):
    fields = {"config": {"lr": 0.1, "targets": ["a"]}, "versions": {"torch": "2"}, "seed": -7, "costs": {"F": 3}}
    patch = make(pipe, concepts=CONCEPTS, results={"erased": 0.9}, gate={"kind": "always"}, **fields)
    back = Patch.load(patch.save(tmp_path / "deep" / "patch.safetensors", dtype))
    for field in dataclasses.fields(Patch):
        if field.name not in ("payload", "stored"):
            assert getattr(back, field.name) == getattr(patch, field.name), field.name
    assert back.payload.kind == patch.payload.kind
    wrong = total = 0.0
    for component in patch.components:
        before, after = patch.deltas(component), back.deltas(component)
        assert before.keys() == after.keys()
        wrong += sum(float((after[name] - before[name]).double().square().sum()) for name in before)
        total += sum(float(before[name].double().square().sum()) for name in before)
    assert back.info()["dtype_error"] == pytest.approx((wrong / total) ** 0.5, rel=1e-3)
    assert back.info()["dtype_error"] <= bound
    assert (back.info()["dtype_error"] > 0) == (dtype != "fp32")
    assert back.info()["bytes"] == os.path.getsize(tmp_path / "deep" / "patch.safetensors")


def test_saving_again_gives_the_same_bytes(pipe, tmp_path):
    patch = delta_patch(pipe)
    contents = patch.save(tmp_path / "a.safetensors").read_bytes()
    assert Patch.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors").read_bytes() == contents


def test_sparse_differences_take_less_space_and_are_restored_exactly(tmp_path):
    dense = torch.randn(40, 40)
    sparse = dense * (torch.rand(40, 40) < 0.1)
    patch = Patch(Delta({"unet": {"dense.weight": dense, "sparse.weight": sparse}}), "random", CONCEPTS)
    path = patch.save(tmp_path / "p.safetensors")
    stored = load_file(path)
    assert "unet.dense.weight" in stored
    assert "unet.sparse.weight" not in stored
    assert sum(stored[key].nbytes for key in stored if "sparse" in key) < dense.nbytes / 4
    back = Patch.load(path).deltas("unet")
    assert torch.equal(back["dense.weight"], dense)
    assert torch.equal(back["sparse.weight"], sparse)


def test_all_zero_difference_survives(tmp_path):
    patch = Patch(Delta({"unet": {"a.weight": torch.zeros(3, 3)}}), "random", CONCEPTS)
    assert torch.equal(Patch.load(patch.save(tmp_path / "p.safetensors")).deltas("unet")["a.weight"], torch.zeros(3, 3))


def test_low_rank_file_is_kohya_with_alpha_and_no_adapter_metadata(pipe, tmp_path):
    patch = low_rank_patch(pipe, components=("unet", "text_encoder"), alpha=0.5)
    path = patch.save(tmp_path / "p.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in keys)
    stems = {key.split(".")[0] for key in keys}
    ends = (".alpha", ".lora_down.weight", ".lora_up.weight")
    assert keys == {stem + end for stem in stems for end in ends}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in stems
    assert "lora_adapter_metadata" not in metadata
    assert metadata["erasure.format"] == "1"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "0.5")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_two_text_encoders_use_te1_and_te2(tmp_path):
    pair = (torch.ones(1, 4), torch.ones(4, 1), 1.0)
    path = "text_model.encoder.layers.0.mlp.fc1"
    payload = LowRank({"text_encoder": {path: pair}, "text_encoder_2": {path: pair, "text_projection": pair}})
    file = Patch(payload, "random", CONCEPTS).save(tmp_path / "p.safetensors")
    stems = {key.split(".")[0] for key in load_file(file)}
    layer = "text_model_encoder_layers_0_mlp_fc1"
    assert stems == {f"lora_te1_{layer}", f"lora_te2_{layer}", "lora_te2_text_projection"}
    assert Patch.load(file).payload.names("text_encoder_2") == [
        "encoder.layers.0.mlp.fc1.weight",
        "text_projection.weight",
    ]


def test_change_is_alpha_over_rank_times_up_down():
    patch = linear(alpha=0.5)
    down, up, _ = patch.payload.layers["unet"]["a.b_c"]
    assert torch.allclose(patch.deltas("unet")["a.b_c.weight"], 0.25 * up @ down)
    assert patch.deltas("text_encoder") == {}
    with pytest.raises(ErasureError, match="unknown component 'vae'"):
        patch.deltas("vae")


def test_different_alphas_become_one_in_memory_and_in_the_file(tmp_path):
    ones, wide = torch.ones(1, 3), torch.ones(4, 3)
    layers = {"a": (ones, ones.T, 3.0), "b": (wide, wide.T, 2.0), "c": (ones, ones.T, 0.0)}
    payload = LowRank({"unet": layers})
    assert payload.alpha == 4.0 and {alpha for _, _, alpha in payload.layers["unet"].values()} == {4.0}
    for name, change in (("a", 3.0), ("b", 4 * 2.0 / 4), ("c", 0.0)):
        assert torch.equal(payload.change("unet", f"{name}.weight"), torch.full((3, 3), change))
    back = Patch.load(Patch(payload, "random", CONCEPTS).save(tmp_path / "p.safetensors")).payload
    assert back.digest == payload.digest and LowRank(payload.layers).digest == payload.digest
    # A1111 treats an alpha of 0 as missing, so a change of zero is stored in another way.
    assert LowRank({"unet": {"c": layers["c"]}}).alpha == 1.0
    same = LowRank({"unet": {"a": layers["a"]}})
    assert same.alpha == 3.0 and torch.equal(same.layers["unet"]["a"][1], ones.T)
    with pytest.raises(ErasureError, match="unet.a up: contains NaN or infinity"):
        LowRank({"unet": {"a": (ones, 1e38 * ones.T, 1e3), "b": layers["b"]}})


def test_change_of_a_convolution_is_that_of_its_two_layers():
    torch.manual_seed(0)
    base = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    change = Patch(LowRank({"unet": {"conv": (down, up, 4.0)}}), "random", CONCEPTS).deltas("unet")["conv.weight"]
    image = torch.randn(1, 3, 6, 6)
    apart = nn.functional.conv2d(nn.functional.conv2d(image, down, padding=1), up) * 2
    together = nn.functional.conv2d(image, base.weight + change, padding=1)
    assert torch.allclose(together, base(image) + apart, atol=1e-4)


@pytest.mark.parametrize("make", [low_rank_patch, delta_patch])
def test_scale(pipe, make):
    patch = make(pipe, results={"erased": 1.0})
    half = patch.scale(-0.5)
    for name, change in patch.deltas("unet").items():
        assert torch.allclose(half.deltas("unet")[name], -0.5 * change, atol=1e-7)
    assert half.results is None
    assert half.gate == patch.gate
    with pytest.raises(ErasureError, match="finite number, not by nan"):
        patch.scale(float("nan"))


def test_info_is_json(pipe):
    info = low_rank_patch(pipe, rank=3).info()
    assert json.loads(json.dumps(info)) == info
    assert (info["rank"], info["kind"], info["concepts"]) == ([3], "low-rank", ["van gogh"])
    delta = delta_patch(pipe).info()
    assert delta["parameters"] == sum(change.numel() for change in delta_patch(pipe).deltas("unet").values())


def test_a_patch_does_not_change_with_the_tensors_it_was_made_from():
    tensor = torch.ones(2, 2)
    config = {"steps": [1]}
    patch = Patch(Delta({"unet": {"a.weight": tensor}}), "random", CONCEPTS, config=config)
    tensor.zero_()
    config["steps"].append(2)
    assert torch.equal(patch.deltas("unet")["a.weight"], torch.ones(2, 2))
    assert patch.config == {"steps": [1]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        patch.method = "other"
    assert pickle.loads(pickle.dumps(patch)).payload.digest == patch.payload.digest


BAD = float("nan")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: LowRank({}), "erases nothing"),
        (lambda: Delta({"unet": {}}), "erases nothing"),
        (lambda: Delta({"vae": {"a": torch.ones(1)}}), "unknown component 'vae'"),
        (lambda: Delta({"unet": {"../a": torch.ones(1)}}), "not a module path"),
        (lambda: Delta({"unet": {"a": torch.tensor([1.0, BAD])}}), "NaN or infinity"),
        (lambda: Delta({"unet": {"a": torch.ones(2, dtype=torch.int64)}}), "floating-point"),
        (lambda: Delta({"unet": {"a": torch.ones(0)}}), "empty"),
        (lambda: Delta({"text_encoder": {"text_model.a": torch.ones(1), "a": torch.ones(1)}}), "twice"),
        (lambda: LowRank({"unet": {"a": (torch.ones(2, 4), torch.ones(4, 3), 1.0)}}), "rank 2, up has rank 3"),
        (lambda: LowRank({"unet": {"a": (torch.ones(2, 4), torch.ones(4, 2, 1, 1), 1.0)}}), "neither"),
        (lambda: LowRank({"unet": {"a": (torch.ones(2, 4), torch.ones(4, 2), BAD)}}), "alpha is nan"),
        (lambda: LowRank({"unet": {"a": (torch.ones(2, 4), torch.ones(4, 2) * BAD, 1.0)}}), "up: contains NaN"),
        (lambda: LowRank({"unet": {"a": (torch.ones(2, 4), torch.ones(4, 2))}}), "must be \\(down, up, alpha\\)"),
        (lambda: linear(config={"x": BAD}), "config cannot be written as JSON"),
        (lambda: linear(config={"x": object()}), "config cannot be written as JSON"),
        (lambda: linear(gate={}), "gate must have a 'kind'"),
        (lambda: linear(base_fingerprint={"vae": "x"}), "base_fingerprint"),
        (lambda: linear(seed=1.5), "seed must be a whole number"),
        (lambda: Patch(torch.ones(1), "random", CONCEPTS), "payload must be"),
        (lambda: Patch(Delta({"unet": {"a": torch.ones(1)}}), "random", "cat"), "list of JSON objects"),
        (lambda: Patch(Delta({"unet": {"a": torch.ones(1)}}), "random", []), "at least one"),
    ],
)
def test_invalid_patches_are_refused(make, fault):
    with pytest.raises(ErasureError, match=fault):
        make()


def test_overflow_in_half_precision_is_refused_and_the_old_file_stays(tmp_path):
    path = linear().save(tmp_path / "p.safetensors")
    before = path.read_bytes()
    big = Patch(Delta({"unet": {"a.weight": torch.tensor([1e5])}}), "random", CONCEPTS)
    with pytest.raises(ErasureError, match="overflows in fp16"):
        big.save(path, "fp16")
    with pytest.raises(ErasureError, match="unknown dtype 'fp8'"):
        big.save(path, "fp8")
    assert path.read_bytes() == before
    big.save(path, "bf16")


def test_paths_that_cannot_be_written(tmp_path):
    patch = linear()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ErasureError, match="is a folder"):
        patch.save(tmp_path)
    with pytest.raises(ErasureError, match="cannot be written"):
        patch.save(tmp_path / "file" / "p.safetensors")
    path = patch.save(tmp_path / "p.safetensors")
    with pytest.raises(ErasureError, match="already exists"):
        patch.save(path, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == ["file", "p.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path, monkeypatch):
    path = linear().save(tmp_path / "p.safetensors")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ErasureError, match="No space left"):
        linear(alpha=5.0).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path):
    path = linear().save(tmp_path / "p.safetensors")
    before = path.read_bytes()
    with path.open("rb") as reader:
        linear(alpha=5.0).save(path)
        # The file is replaced and not overwritten, so the open file does not change.
        assert reader.read() == before
    assert path.read_bytes() != before


def test_two_modules_with_one_kohya_key_are_refused(tmp_path):
    pair = (torch.ones(1, 2), torch.ones(2, 1), 1.0)
    patch = Patch(LowRank({"unet": {"a.b": pair, "a_b": pair}}), "random", CONCEPTS)
    with pytest.raises(ErasureError, match="kohya key"):
        patch.save(tmp_path / "p.safetensors")


def test_plain_loras_are_named_in_the_message(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.ones(1, 2), "lora_unet_a.lora_up.weight": torch.ones(2, 1)}, path)
    for read in (Patch.load, read_header):
        with pytest.raises(ErasureError, match="lora.safetensors is a plain LoRA.*erasure.format.*load_lora_weights"):
            read(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(ErasureError, match="not a patch"):
        Patch.load(path)


def test_read_header_returns_the_strings_of_the_file(tmp_path):
    header = read_header(linear().save(tmp_path / "p.safetensors"))
    assert json.loads(header["erasure.concepts"]) == CONCEPTS
    assert header["erasure.method"] == "random"


def test_fingerprint_depends_on_names_values_and_nothing_else(pipe):
    names = [name for name, _ in pipe.unet.named_parameters() if "attn2" in name]
    whole = fingerprint(pipe.unet, names)
    assert len(whole) >= 16
    int(whole, 16)
    assert fingerprint(pipe.unet, reversed(names)) == whole
    assert fingerprint(pipe.unet, names[1:]) != whole
    assert not same_base(fingerprint(tiny_pipeline(seed=1).unet, names), whole)
    changed = tiny_pipeline().unet
    assert fingerprint(changed, names) == whole
    changed.get_parameter(names[0]).data.view(-1)[0] += 0.01
    assert not same_base(fingerprint(changed, names), whole)
    with pytest.raises(ErasureError, match="no parameter 'nothing.weight'"):
        fingerprint(pipe.unet, ["nothing.weight"])
    with pytest.raises(ErasureError, match="at least one"):
        fingerprint(pipe.unet, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_half_precision_is_the_same_base(pipe, dtype):
    names = [name for name, _ in pipe.unet.named_parameters()]
    half = tiny_pipeline().unet.to(dtype)
    assert same_base(fingerprint(half, names), fingerprint(pipe.unet, names))
    assert not same_base(fingerprint(half, names), fingerprint(tiny_pipeline(seed=1).unet, names))


def test_fingerprint_accepts_text_encoder_names_in_both_spellings(pipe):
    name = "encoder.layers.0.mlp.fc1.weight"
    assert fingerprint(pipe.text_encoder, [name]) == fingerprint(pipe.text_encoder, [name.removeprefix("text_model.")])
    nested = nn.Module()
    nested.text_model = pipe.text_encoder
    assert (
        fingerprint(nested, [name])
        == fingerprint(nested, ["text_model." + name])
        == fingerprint(pipe.text_encoder, [name])
    )


V1 = Path(__file__).parent / "v1"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_files_of_format_1_load_forever(dtype):
    """The files in the folder v1 were written once and must never be written again."""
    low_rank, delta = Patch.load(V1 / f"low_rank_{dtype}.safetensors"), Patch.load(V1 / f"delta_{dtype}.safetensors")
    change = low_rank.deltas("unet")["mid.conv.weight"]
    assert torch.equal(change, torch.tensor([[1.5, 3.0], [-3.0, -6.0], [0.0, 0.0]]).reshape(3, 2, 1, 1))
    assert low_rank.payload.names("text_encoder") == ["encoder.layers.0.mlp.fc1.weight"]
    assert low_rank.gate == {"kind": "text", "power": 2, "texts": ["cat", "kitten"]}
    assert low_rank.results == {"erased": 0.75}
    assert torch.equal(delta.deltas("unet")["a.bias"], torch.tensor([1.0, -2.0, 0.5]))
    assert torch.equal(delta.deltas("text_encoder")["b.weight"], torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    for patch in (low_rank, delta):
        assert (patch.method, patch.names, patch.base, patch.seed) == ("random", ["cat"], "tiny", 5)
        assert patch.base_fingerprint == {"unet": "0" * 48}
