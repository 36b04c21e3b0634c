"""The average of patches, and one of them taken out again: equal to the average that never had it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.errors import ErasureError
from erasure.patch import Patch
from erasure.patch.ops.arithmetic import scale
from erasure.patch.ops.soup import average, remove
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

NAMES = ("cat", "dog", "car")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def contributors(pipe, make):
    return [make(pipe, seed=i + 1, concepts=({"name": name},)) for i, name in enumerate(NAMES)]


def dense(patch):
    return {name: patch.payload.change("unet", name).double() for name in patch.payload.names("unet")}


MAKERS = pytest.mark.parametrize("make", [delta_patch, low_rank_patch])


@MAKERS
def test_the_average_is_the_mean_of_the_changes(pipe, make):
    patches = contributors(pipe, make)
    found, parts = dense(average(patches)), [dense(patch) for patch in patches]
    for name, change in found.items():
        right = sum(part[name] for part in parts) / 3
        assert (change - right).abs().max() <= 1e-6 * right.abs().max() and right.any()


@MAKERS
@pytest.mark.parametrize("gone", range(3))
def test_without_one_it_is_the_average_that_never_had_it(pipe, make, gone, tmp_path):
    patches = contributors(pipe, make)
    path = average(patches).save(tmp_path / "soup.safetensors")
    left = remove(Patch.load(path), patches[gone])
    rest = patches[:gone] + patches[gone + 1 :]
    right, found = average(rest), dense(left)
    for name, change in dense(right).items():
        assert (found[name] - change).abs().max() <= 4e-7 * max(
            p.abs().max() for p in (change, dense(patches[gone])[name])
        )
        assert (found[name] - dense(patches[gone])[name]).abs().max() > 1e-3
    assert left.names == right.names == [name for i, name in enumerate(NAMES) if i != gone]
    assert left.config == right.config and left.base_fingerprint == right.base_fingerprint
    if make is low_rank_patch:
        assert left.payload.ranks == right.payload.ranks == [4]
        for (down, up, _), (other, own, _) in zip(
            left.payload.layers["unet"].values(), right.payload.layers["unet"].values(), strict=True
        ):
            assert torch.equal(down, other) and torch.allclose(up, own, rtol=1e-6)


@MAKERS
def test_one_after_the_other_can_be_taken_out_in_any_order_but_not_the_last(pipe, make):
    patches = contributors(pipe, make)
    last = remove(remove(average(patches), patches[2]), patches[0])
    for name, change in dense(patches[1]).items():
        assert (dense(last)[name] - change).abs().max() <= 2e-6 * change.abs().max()
    with pytest.raises(ErasureError, match="is all that is left"):
        remove(last, patches[1])


@MAKERS
def test_multiples_of_one_patch_are_told_apart(pipe, make):
    patch = make(pipe, seed=1)
    multiples = [patch, scale(patch, 0.5), scale(patch, -2.0)]
    left, right = dense(remove(average(multiples), multiples[1])), dense(average([multiples[0], multiples[2]]))
    for name, change in right.items():
        assert (left[name] - change).abs().max() <= 1e-6 * dense(patch)[name].abs().max()


def test_what_is_left_draws_what_the_average_of_the_others_draws(pipe):
    patches = contributors(pipe, delta_patch)
    latents = []
    for patch in (remove(average(patches), patches[0]), average(patches[1:]), average(patches)):
        pipe.load_patch(patch, name="soup")
        draw = torch.Generator().manual_seed(0)
        latents.append(pipe("a cat", num_inference_steps=2, generator=draw, output_type="latent").images)
        pipe.unload_patches()
    assert torch.allclose(latents[0], latents[1], atol=1e-4)
    assert (latents[0] - latents[2]).abs().max() > 10 * (latents[0] - latents[1]).abs().max()


def test_what_cannot_be_averaged(pipe):
    one, two, _ = contributors(pipe, delta_patch)
    with pytest.raises(ErasureError, match="at least two"):
        average([one])
    with pytest.raises(ErasureError, match="'cat'.* occurs twice"):
        average([one, two, one])
    for other in (delta_patch(pipe, part="attn1.to_q"), low_rank_patch(pipe)):
        with pytest.raises(ErasureError, match="only patches of one kind that change the same parameters"):
            average([one, other])
    with pytest.raises(ErasureError, match="different bases"):
        average([one, dataclasses.replace(two, base_fingerprint={"unet": "another"})])


def test_what_cannot_be_taken_out(pipe, tmp_path):
    patches = contributors(pipe, delta_patch)
    with pytest.raises(ErasureError, match="is not an average of patches"):
        remove(patches[0], patches[1])
    soup = average(patches[:2])
    with pytest.raises(ErasureError, match="'car'.*is not in the average, which has 'cat'.*'dog'"):
        remove(soup, patches[2])
    with pytest.raises(ErasureError, match="is not in the average"):
        remove(soup, scale(patches[0], 0.5))
    half = Patch.load(soup.save(tmp_path / "half.safetensors", dtype="bf16"))
    with pytest.raises(ErasureError, match="stored in bf16.*Keep averages in fp32"):
        remove(half, patches[0])
    left, right = dense(remove(half, patches[0], force=True)), dense(patches[1])
    assert all((left[name] - right[name]).abs().max() <= 0.05 * right[name].abs().max() for name in right)
