"""Pools hold the sampler's own states, and the base model's outputs at these states."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.model.trajectories import TrajectoryPool, build_pool, late_states, shifts, walk
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
    """The recorded states are those through which the pipeline denoises the same noise."""
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


def test_every_tuple_is_drawn_once_an_epoch(base):
    pool = build_pool(base, [("cat", ""), ("dog", "")], trajectories=4, seed=0, steps=3, guidance=3.0, batch=3)
    assert sorted(pool.pair.tolist()) == [0] * 6 + [1] * 6
    first = torch.cat([pool.draw(4, step, seed=1) for step in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    second = torch.cat([pool.draw(4, step, seed=1) for step in range(3, 6)])
    assert sorted(second.tolist()) == list(range(12)) and first.tolist() != second.tolist()


def test_save_and_load(base, tmp_path):
    pool = build_pool(base, [("cat", "")], trajectories=1, seed=0, steps=2, guidance=3.0)
    pool.save(tmp_path / "pool.safetensors")
    read = TrajectoryPool.load(tmp_path / "pool.safetensors")
    assert all(torch.equal(value, getattr(read, key)) for key, value in vars(pool).items())


def test_late_states_are_the_published_samplers_at_every_noise_level(base):
    """With k = 0 and 1 it returns the clean latents, after the last timestep; else t is two to three steps too high."""
    pairs, steps, width, drawn = [("cat", "")], 4, 250, set()
    for number in range(24):
        draw = torch.Generator().manual_seed(number)
        k = int(torch.randint(steps, (1,), generator=draw))
        seed = torch.randint(2**31, (1,), generator=draw).tolist()
        counts = Counts()
        with counting(base.unet, counts):
            late = late_states(base, pairs, torch.Generator().manual_seed(number), steps=steps, guidance=3.0)
        assert width * k <= late.t < width * (k + 1)
        taken = steps - max(k, 1)  # of the three steps that remain without the first
        assert counts.forward == 2 * taken
        states = walk(base, pairs, seeds=seed, steps=steps, guidance=3.0, skip=1)
        if taken < len(states):
            assert torch.allclose(late.x[0], states.x[taken], atol=1e-5)
            assert 2 * width - 1 <= late.t[0] - states.t[taken] <= 3 * width - 2  # 39 to 58, where width is 20
        else:
            assert not torch.allclose(late.x[0], states.x[-1], atol=1e-3)
        drawn.add(k)
    assert drawn == set(range(steps))
    both = late_states(base, [("cat", ""), ("dog", "")], draw, steps=steps, guidance=3.0)
    assert both.t[0] == both.t[1] and not torch.equal(both.x[0], both.x[1])


@pytest.mark.parametrize("measure", ["norm", "guidance"])
def test_late_shifts_are_measured_at_the_published_timestep(base, measure):
    """Of 50 steps the first is left out, so that after 10 the state is that of 761; t is one of 800 to 819."""
    seen, options = [], {"after": 10, "steps": 50, "guidance": 3.0, "measure": measure}
    handle = base.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], args[1])), with_kwargs=True
    )

    @contextmanager
    def patched():
        with torch.no_grad():
            base.unet.conv_out.weight.mul_(2)
            yield
            base.unet.conv_out.weight.div_(2)

    late = shifts(base, "cat", [4, 5], patched, late=True, **options)
    x, t = seen[-1]
    states = walk(base, [("cat", "")] * 2, seeds=[4, 5], steps=50, guidance=3.0, skip=1, stop=10, judged=False)
    handle.remove()
    assert torch.equal(x, states.x) and set(states.t.tolist()) == {761.0}
    assert 800 <= float(t[0]) < 820 and len(set(t.tolist())) == 1
    assert late != shifts(base, "cat", [4, 5], patched, **options)
