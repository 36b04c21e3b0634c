"""The pool holds the sampler's own states, and the base's outputs there."""

from __future__ import annotations

import pytest
import torch

from erasure.base import Base
from erasure.trajectories import TrajectoryPool, build_pool, walk
from tests.tiny import tiny_pipeline


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


@pytest.mark.parametrize("neutral", ["", "dog"])
def test_recorded_outputs_are_the_bases_at_the_recorded_states(base, neutral):
    pool = build_pool(base, [("cat", neutral)], trajectories=2, seed=0, steps=3, guidance=3.0)
    assert len(pool) == 6
    cat, other = base.encode(["cat"]), base.encode([neutral])
    with torch.no_grad():
        for i in range(len(pool)):
            x, t = pool.x[i : i + 1], pool.t[i]
            assert torch.allclose(base.unet(x, t, cat).sample[0], pool.concept[i], atol=1e-5)
            assert torch.allclose(base.unet(x, t, other).sample[0], pool.neutral[i], atol=1e-5)


def test_the_walk_is_the_pipelines_own_sampling(base):
    """The last recorded state leads to the image that the pipeline makes from the same noise."""
    noise = torch.randn(base.latent_shape(), generator=torch.Generator().manual_seed(7))[None]
    states = []
    base.pipe(
        "cat",
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, kept: states.append(kept["latents"]) or kept,
    )
    pool = walk(base, [("cat", "")], seeds=[7], steps=4, guidance=3.0)
    assert torch.equal(pool.x[0], noise[0])
    for step in range(3):
        assert torch.allclose(pool.x[step + 1], states[step][0], atol=1e-4)


def test_every_tuple_is_met_once_an_epoch(base):
    pool = build_pool(base, [("cat", ""), ("dog", "")], trajectories=4, seed=0, steps=3, guidance=3.0, batch=3)
    assert sorted(pool.pair.tolist()) == [0] * 6 + [1] * 6
    first = torch.cat([pool.draw(4, step, seed=1) for step in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    second = torch.cat([pool.draw(4, step, seed=1) for step in range(3, 6)])
    assert sorted(second.tolist()) == list(range(12)) and first.tolist() != second.tolist()


def test_saved_and_read(base, tmp_path):
    pool = build_pool(base, [("cat", "")], trajectories=1, seed=0, steps=2, guidance=3.0)
    pool.save(tmp_path / "pool.safetensors")
    read = TrajectoryPool.load(tmp_path / "pool.safetensors")
    assert all(torch.equal(value, getattr(read, key)) for key, value in vars(pool).items())
