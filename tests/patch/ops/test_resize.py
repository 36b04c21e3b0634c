"""Patches of smaller rank: full rank is exact, a lower rank is the best approximation, and the error is reported."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from erasure.errors import ErasureError
from erasure.patch import Delta, Patch, fingerprint
from erasure.patch.ops.rank_report import sizes
from erasure.patch.ops.resize import resize
from erasure.pipelines import load_patch
from tests.patch.making import delta_patch, low_rank_patch, patch_of
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def error(one, other):
    """Return the relative error of `one` against `other`, over all layers."""
    wrong = total = 0.0
    for component in other.components:
        exact = other.deltas(component)
        for name, change in one.deltas(component).items():
            wrong += float((change - exact[name]).double().square().sum())
        total += sum(float(change.double().square().sum()) for change in exact.values())
    return math.sqrt(wrong / total)


@pytest.mark.parametrize("part", ["attn2", "resnets.0.conv", "to_k"])
def test_full_rank_is_exact(pipe, part):
    dense = resizable(pipe, part)
    rank = max(min(change.shape[0], change[0].numel()) for change in dense.deltas("unet").values())
    whole = resize(dense, rank)
    assert whole.payload.kind == "low-rank" and error(whole, dense) < 1e-6
    assert whole.config["error"] < 1e-6
    low = low_rank_patch(pipe, rank=3, alpha=5.0, part=part, components=("unet", "text_encoder"))
    assert error(resize(low, 3), low) < 1e-6
    assert error(resize(low, energy=1.0), low) < 1e-6


def resizable(pipe, part):
    dense = delta_patch(pipe, part=part)
    change = {name: tensor for name, tensor in dense.deltas("unet").items() if tensor.dim() > 1}
    return patch_of(pipe, Delta({"unet": change}))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_best_approximation_of_its_rank(pipe, rank):
    """Compare the errors with those from the singular values that torch computes."""
    dense = resizable(pipe, "conv1")
    small = resize(dense, rank)
    wrong = total = 0.0
    for name, change in dense.deltas("unet").items():
        values = torch.linalg.svdvals(change.flatten(1).double()).square()
        wrong, total = wrong + float(values[rank:].sum()), total + float(values.sum())
        layer = float((values[rank:].sum() / values.sum()).sqrt())
        assert small.config["errors"][f"unet.{name}"] == pytest.approx(layer, rel=1e-4)
    assert small.config["error"] == pytest.approx(math.sqrt(wrong / total), rel=1e-4)
    assert small.config["error"] == pytest.approx(error(small, dense), rel=1e-6)
    assert small.payload.ranks == [rank]


def test_resizing_a_low_rank_patch_equals_resizing_its_differences(pipe):
    low = low_rank_patch(pipe, rank=4, alpha=2.0, part="", size=0.3)
    dense = dataclasses.replace(low, payload=Delta({"unet": low.deltas("unet")}))
    assert error(resize(low, 2), resize(dense, 2)) < 1e-5


def test_energy_chooses_the_rank_of_each_layer(pipe):
    dense = resizable(pipe, "attn2")
    for energy in (0.3, 0.9, 0.99):
        small = resize(dense, energy=energy)
        for name, change in dense.deltas("unet").items():
            values = torch.linalg.svdvals(change.double()).square().cumsum(0)
            rank = small.payload.layers["unet"][name.removesuffix(".weight")][0].shape[0]
            assert values[rank - 1] >= energy * values[-1] * (1 - 1e-9)
            assert rank == 1 or values[rank - 2] < energy * values[-1]
    assert resize(dense, energy=0.3).payload.ranks[0] < resize(dense, energy=0.99).payload.ranks[-1]


def test_the_result_is_saved_loaded_and_keeps_its_gate(pipe, tmp_path):
    gate = {"kind": "text", "texts": ["van gogh"]}
    low = low_rank_patch(pipe, rank=4, gate=gate, results={"metrics": {}})
    back = Patch.load(resize(low, 2).save(tmp_path / "p.safetensors"))
    assert back.gate == gate and back.results is None and back.method == low.method
    assert back.base_fingerprint == low.base_fingerprint
    assert back.config["operation"] == "resize" and back.config["rank"] == 2
    assert back.config["parents"][0]["digest"] == low.payload.digest
    fresh = tiny_pipeline()
    load_patch(fresh, resize(resizable(pipe, "conv"), 1))
    zero = patch_of(pipe, Delta({"unet": {"conv_in.weight": torch.zeros(8, 4, 3, 3)}}))
    assert (
        resize(zero, energy=0.5).config["error"] == 0.0 and not resize(zero, 2).deltas("unet")["conv_in.weight"].any()
    )


def test_parameters_that_are_no_matrices_are_refused_or_left_out_and_counted(pipe):
    change = {"conv_in.weight": torch.randn(8, 4, 3, 3), "conv_in.bias": torch.full((8,), 5.0)}
    mixed = patch_of(pipe, Delta({"unet": change}))
    with pytest.raises(ErasureError, match=r"unet\.conv_in\.bias.*--drop"):
        resize(mixed, 2)
    small = resize(mixed, 8, drop=True, base=pipe)
    share = math.sqrt(200 / (200 + float(change["conv_in.weight"].square().sum())))
    assert small.config["error"] == pytest.approx(share) and small.config["dropped"] == ["unet.conv_in.bias"]
    assert small.base_fingerprint == {"unet": fingerprint(pipe.unet, ["conv_in.weight"])}
    with pytest.raises(ErasureError, match="give base="):
        resize(mixed, 8, drop=True)
    assert sizes(mixed, [8], drop=True).rows[0]["error"] == pytest.approx(share)
    table = patch_of(pipe, Delta({"text_encoder": {"embeddings.token_embedding.weight":
                 torch.randn_like(pipe.text_encoder.get_input_embeddings().weight)}}))  # fmt: skip
    with pytest.raises(ErasureError, match="cannot become low-rank"):
        resize(table, 2, drop=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "from 1 to 2"),
        ({"rank": -1}, "from 1 to 2"),
        ({"rank": 3}, "from 1 to 2"),
        ({"rank": 1.0}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"energy": 0}, "above 0"),
        ({"energy": 1.5}, "at most 1"),
        ({"energy": float("nan")}, "above 0"),
        ({}, "either rank or energy"),
        ({"rank": 1, "energy": 0.5}, "either rank or energy"),
    ],
)
def test_out_of_range(pipe, options, message):
    with pytest.raises(ErasureError, match=message):
        resize(low_rank_patch(pipe, rank=2), **options)


def test_sizes_predict_the_result_of_resizing(pipe):
    dense = resizable(pipe, "attn2")
    report = sizes(dense, dtype="fp16")
    assert [row["rank"] for row in report.rows][:3] == [1, 2, 4]
    assert report.rows[-1]["error"] == 0.0
    for row in report.rows[:3]:
        small = resize(dense, row["rank"])
        assert row["error"] == pytest.approx(small.config["error"], rel=1e-4)
        assert row["bytes"] == sum(tensor.numel() for tensor in small.payload.tensors()) * 2
        assert row["worst_error"] == pytest.approx(max(small.config["errors"].values()), rel=1e-4)
    assert "rank" in report.text() and report.to_json()["now"]["kind"] == "delta"
    with pytest.raises(ErasureError, match="from 1 to"):
        sizes(dense, [0])
    with pytest.raises(ErasureError, match="dtype"):
        sizes(dense, dtype="fp8")


def test_the_chart_is_an_image(pipe, tmp_path):
    from PIL import Image

    report = sizes(resizable(pipe, "attn2"))
    with Image.open(report.chart(tmp_path / "deep" / "sizes.png")) as image:
        assert image.format == "PNG" and len(image.getcolors(100_000)) > 4
    with pytest.raises(ErasureError, match=r"\.png"):
        report.chart(tmp_path / "sizes.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(ErasureError, match="cannot be written"):
        report.chart(tmp_path / "file" / "x.png")
