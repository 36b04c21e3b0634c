"""Recorded outputs of a block: the right half, the right steps, and files that a killed run finds again."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.patch.module_keys import find_module
from erasure.training import activations
from erasure.training.activations import Recorded, Recording, record
from tests.tiny import tiny_pipeline

BLOCK = "up_blocks.0.attentions.1"


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def test_it_records_the_prompts_own_half_at_every_step(base):
    seen, block = [], find_module(base.network, BLOCK)
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    found = record(base, ["a cat", "a dog"], [4, 5], Recording(BLOCK, 3, 3.0))
    handle.remove()
    assert found.shape == (3, 2, 16, 16) and found.dtype == torch.float16 and not block._forward_hooks
    for step, output in enumerate(seen):
        assert len(output) == 4  # the prompts, then the empty one
        wanted = output[:2].flatten(2).transpose(1, 2).half()
        assert torch.equal(found[step], wanted)
    assert not torch.equal(found[:, 0], found[:, 1])
    assert record(base, [""], [4], Recording(BLOCK, 3, 3.0)).shape == (3, 1, 16, 16)


def test_some_pixels_are_drawn_anew_for_each_step(base):
    whole = record(base, ["a cat"], [4], Recording(BLOCK, 3, 3.0))
    part = record(base, ["a cat"], [4], Recording(BLOCK, 3, 3.0, positions=5))
    assert part.shape == (3, 1, 5, 16)
    places = []
    for step in range(3):
        same = (part[step, 0][:, None] == whole[step, 0][None]).all(-1)
        assert same.any(1).all()
        places.append(same.nonzero()[:, 1].tolist())
    assert places[0] != places[1] and all(len(set(row)) == 5 for row in places)


def test_many_trajectories_run_in_parts_and_each_has_its_own_noise(base, monkeypatch):
    whole = record(base, ["a cat", "a dog", "a car"], [4, 5, 6], Recording(BLOCK, 2, 3.0))
    monkeypatch.setattr(activations, "BATCH", 2)
    parts = record(base, ["a cat", "a dog", "a car"], [4, 5, 6], Recording(BLOCK, 2, 3.0))
    assert torch.allclose(whole.float(), parts.float(), atol=1e-2)


def test_files_that_exist_are_read_with_their_costs(base, tmp_path):
    made = Recorded(tmp_path, (("a cat",), ("a dog",)), 1, Recording(BLOCK, 2, 3.0))
    with counting(base.network) as first:
        assert made.collect(base)
    assert first.forward == 2 * 2 * 2 and [outputs.shape for outputs in made.words()] == [(2, 1, 16, 16)] * 2
    kept = made.read(0)
    made.path(1).unlink()
    with counting(base.network, Counts()) as second:
        assert made.collect(base)
    assert second.forward == first.forward and torch.equal(made.read(0), kept)
    assert not torch.equal(made.read(0), made.read(1))


def test_a_network_that_does_not_run_gives_nothing_and_a_missing_block_is_named(base, monkeypatch, tmp_path):
    with pytest.raises(ErasureError, match="has no block 'up_blocks.7'"):
        record(base, ["a cat"], [1], Recording("up_blocks.7", 2, 3.0))
    monkeypatch.setattr(activations, "walk", lambda *_, **__: None)
    assert record(base, ["a cat"], [1], Recording(BLOCK, 2, 3.0)) is None
    assert not Recorded(tmp_path, (("a cat",),), 1, Recording(BLOCK, 2, 3.0)).collect(base)
