"""Saliency masks: the exact top share without sorting, files, and the published names."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from erasure.errors import ErasureError
from erasure.training.saliency import compvis_names, read_mask, top, write_mask
from tests.tiny import tiny_unet


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.999, 1.0])
def test_the_mask_is_the_top_of_one_ranking(density):
    draw = torch.Generator().manual_seed(1)
    scores = {
        name: torch.randn(shape, generator=draw).abs() * scale
        for name, shape, scale in (("a", (40, 7), 1e-9), ("b", (3, 5, 11), 2.0), ("c", (64,), 1e-2))
    }
    masks, everything = top(scores, density), torch.cat([score.flatten() for score in scores.values()])
    count = int(len(everything) * density)
    assert sum(int(mask.sum()) for mask in masks.values()) == count
    chosen = torch.cat([scores[name][masks[name]] for name in scores])
    assert torch.equal(chosen.sort().values, everything.sort().values[len(everything) - count :])


def test_equal_scores_are_taken_in_order():
    masks = top({"a": torch.tensor([1.0, 0, 1]), "b": torch.tensor([1.0, 1, 2])}, 0.5)
    assert masks["a"].tolist() == [True, False, True] and masks["b"].tolist() == [False, False, True]


def test_zeros_may_be_chosen_where_nothing_else_is_left():
    masks = top({"a": torch.tensor([0.0, 0, 3, 0])}, 0.75)
    assert masks["a"].tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("scores", "density", "message"),
    [
        ({"a": torch.ones(4)}, 0.0, "above 0"),
        ({"a": torch.ones(4)}, 1.5, "at most 1"),
        ({"a": torch.ones(4)}, 0.1, "marks none; give a larger share"),
        ({"a": torch.tensor([1.0, float("nan")])}, 0.5, "NaN"),
        ({"a": torch.zeros(4)}, 0.5, "every saliency is zero"),
    ],
)
def test_scores_that_rank_nothing(scores, density, message):
    with pytest.raises(ErasureError, match=message):
        top(scores, density)


def masks_of(unet) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=draw) < 0.5 for name, p in unet.named_parameters()}


def test_a_mask_comes_back_from_its_file_under_both_names(tmp_path):
    unet = tiny_unet()
    masks = masks_of(unet)
    write_mask(masks, tmp_path / "ours.safetensors")
    write_mask(masks, tmp_path / "theirs.safetensors", compvis_names(unet))
    size = sum(p.numel() for p in unet.parameters())
    assert (tmp_path / "ours.safetensors").stat().st_size < size / 8 + 60_000  # a bit a weight, and the names
    for name in ("ours", "theirs"):
        again = read_mask(tmp_path / f"{name}.safetensors", unet)
        assert again.keys() == masks.keys() and all(torch.equal(again[key], masks[key]) for key in masks)


def test_a_mask_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken", tmp_path / "file" / "mask.safetensors"):
        with pytest.raises(ErasureError, match="cannot be written"):
            write_mask({"a": torch.ones(3, dtype=torch.bool)}, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_the_published_file_is_read(tmp_path):
    unet = tiny_unet()
    masks, names = masks_of(unet), compvis_names(unet)
    torch.save({names[key]: mask.long() for key, mask in masks.items()}, tmp_path / "with_0.5.pt")
    read = read_mask(tmp_path / "with_0.5.pt", unet)
    assert all(torch.equal(read[key], masks[key]) for key in masks)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_no_masks(tmp_path, capsys):
    unet = tiny_unet()
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    torch.save({"elsewhere.weight": torch.ones(2)}, tmp_path / "other.pt")
    torch.save({"conv_in.bias": torch.ones(3)}, tmp_path / "shape.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name, message in (
        ("evil.pt", "cannot be read"),
        ("other.pt", "this UNet has no parameter elsewhere.weight"),
        ("shape.pt", "has shape .3., and .8. in this UNet"),
        ("noise.safetensors", "cannot be read"),
        ("nowhere.safetensors", "cannot be read"),
    ):
        with pytest.raises(ErasureError, match=message):
            read_mask(tmp_path / name, unet)
    assert "run" not in capsys.readouterr().out


def test_the_published_names_are_those_that_diffusers_converts():
    """An SD 1 layout: four levels, two layers a block, attention in three levels."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    names = compvis_names(unet)
    assert len(set(names.values())) == len(names)
    old = {f"model.diffusion_model.{theirs}": torch.tensor(i) for i, theirs in enumerate(names.values())}
    converted = convert_ldm_unet_checkpoint(old, dict(unet.config))
    order = list(names)
    assert {key: order[int(value)] for key, value in converted.items()} == {key: key for key in order}
