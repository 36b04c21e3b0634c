"""Stochastic trajectories: each transition against diffusers' own sampler with noise, and against Bayes' rule."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from erasure.model.base import Base
from erasure.model.diffusion import counting
from erasure.model.stochastic import Paths, Transition, clean, kept_paths, log_density, sample, transitions
from tests.tiny import SIDE, tiny_pipeline
from tests.tiny_transformers import asked, tiny_transformer

PAIRS = [("cat", "dog"), ("a cat", "car")]


def of(kind: str) -> Base:
    return Base("tiny", tiny_pipeline(kind=kind) if kind in ("sd1", "sd2-v") else tiny_transformer(kind))


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sd3", "flux", "pixart"])
def test_each_transition_is_the_posterior_of_added_noise(kind):
    """For one known x_0, p(x_s | x_t, x_0) is q(x_t | x_s) p(x_s | x_0) / p(x_t | x_0), by products of normals."""
    for step in transitions(of(kind), 5):
        if not step.next_noise:
            assert step.deviation == 0 and step.mean(torch.ones(1), torch.full((1,), 3.0)) == 3 * step.next_signal
            continue
        # In precisions: of x_s from x_0, and from x_t, which is k x_s plus noise.
        before, after = 1 / step.next_noise**2, step.ratio**2 / step.added**2
        x, x0 = torch.tensor([0.7]), torch.tensor([-1.3])
        centre = before * step.next_signal * float(x0) + step.ratio / step.added**2 * float(x)
        assert math.isclose(step.deviation**-2, before + after, rel_tol=1e-3)
        assert math.isclose(float(step.mean(x, x0)), centre / (before + after), rel_tol=1e-3, abs_tol=1e-4)
        # Noise added to x_s gives the marginal at t.
        assert math.isclose(step.ratio * step.next_signal, step.signal, abs_tol=1e-6)
        assert math.isclose((step.ratio * step.next_noise) ** 2 + step.added**2, step.noise**2, rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["sd1", "sd2-v"])
def test_noisy_steps_are_those_of_diffusers_ddim_with_eta_1(kind):
    base = Base("tiny", tiny_pipeline(kind=kind))
    scheduler = DDIMScheduler.from_config(base.scheduler.config)
    scheduler.set_timesteps(5)
    draw = torch.Generator().manual_seed(0)
    x, out, noise = (torch.randn(2, 4, SIDE, SIDE, generator=draw) for _ in range(3))
    for step, t in zip(transitions(base, 5), scheduler.timesteps, strict=True):
        theirs = scheduler.step(out, t, x, eta=1.0, variance_noise=noise).prev_sample
        ours = step.mean(x, clean(base, out, x, torch.full((2,), step.t))) + step.deviation * noise
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_sde_of_a_flow_keeps_its_marginals(kind):
    """Gaussian data of variance w have a known E[x_0 | x_t], linear in x: the variance of x follows step by step."""
    w, found = 0.25, 1.0
    for step in transitions(of(kind), 500):
        variance = step.signal**2 * w + step.noise**2
        assert math.isclose(found, variance, rel_tol=0.04), step.t
        x = torch.ones(1, dtype=torch.float64)
        factor = float(step.mean(x, step.signal * w / variance * x))
        found = factor**2 * found + step.deviation**2
    assert math.isclose(found, w, rel_tol=0.04)


def test_clean_latents_of_a_flow_follow_from_the_velocity():
    base = Base("tiny", tiny_transformer("sd3"))
    draw = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(2, 4, SIDE, SIDE, generator=draw) for _ in range(2))
    t = torch.tensor([250.0, 900.0])
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(clean(base, eps - z, (1 - sigma) * z + sigma * eps, t), z, atol=1e-5)


def test_the_density_is_that_of_a_normal_per_latent():
    draw = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(3, 2, 2, 2, generator=draw) for _ in range(2))
    deviation = torch.tensor([0.5, 1.0, 2.0])
    theirs = torch.distributions.Normal(mean, deviation.view(-1, 1, 1, 1)).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(log_density(x, mean, deviation), theirs, atol=1e-6)


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_a_trajectory_is_the_guided_walk_of_its_guide(kind):
    """One step is drawn again with the network asked apart; outputs are those for a, the empty prompt and c."""
    pipe = tiny_pipeline() if kind == "unet" else tiny_transformer(kind)
    base = Base("tiny", pipe)
    with counting(base.network) as spent:
        paths = sample(base, PAIRS, seeds=[5, 6], steps=3, guidance=3.0)
    assert (spent.forward, spent.backward) == (2 * 3 * 3, 0)
    first = torch.Generator().manual_seed(5)
    start, noise = (torch.randn(4, SIDE, SIDE, generator=first) for _ in range(2))
    assert torch.equal(paths.x[0, 0], start) and paths.x.shape == (2, 4, 4, SIDE, SIDE)
    step = transitions(base, 3)[0]
    x, t = start[None], torch.tensor([step.t])

    def out(prompt):
        with torch.no_grad():
            if kind == "unet":
                return base.predict(x, t, base.conditions([prompt]))
            return asked(pipe, kind, x, t, prompt)

    found = {"neutral": out(""), "guide": out("dog"), "concept": out("cat")}
    for name, value in found.items():
        assert torch.allclose(getattr(paths, name)[0, 0], value[0], atol=1e-5), name
    guided = found["neutral"] + 3 * (found["guide"] - found["neutral"])
    after = step.mean(x, clean(base, guided, x, t)) + step.deviation * noise
    assert torch.allclose(paths.x[0, 1], after[0], atol=1e-4)
    wrong = step.mean(x, clean(base, found["neutral"] + 3 * (found["concept"] - found["neutral"]), x, t))
    assert not torch.allclose(paths.x[0, 1], (wrong + step.deviation * noise)[0], atol=1e-3)


def test_prompts_that_are_the_same_are_asked_for_once():
    base = Base("tiny", tiny_pipeline())
    for pair, guidance, calls in (
        (("cat", ""), 3.0, 2),
        (("cat", "cat"), 3.0, 2),
        (("cat", "dog"), 1.0, 2),
        (("", ""), 3.0, 1),
        (("cat", "cat"), 1.0, 1),
    ):
        with counting(base.network) as spent:
            paths = sample(base, [pair], seeds=[1], steps=2, guidance=guidance)
        assert spent.forward == 2 * calls, pair
        assert torch.equal(paths.guide, paths.neutral) == (pair[1] == "" or guidance == 1)
        assert torch.equal(paths.guide, paths.concept) == (pair[0] == pair[1])


def test_trajectories_are_read_again_with_their_costs(tmp_path):
    base, file = Base("tiny", tiny_pipeline()), tmp_path / "paths.safetensors"
    options = {"count": 3, "seed": 2, "batch": 2, "steps": 2, "guidance": 3.0}
    with counting(base.network) as spent:
        made = kept_paths(file, base, PAIRS, **options)
    with counting(base.network) as again:
        read = kept_paths(file, base, PAIRS, **options)
    assert spent.forward == again.forward == 3 * 2 * 3 and made.pair.tolist() == [0, 1, 0] and len(made) == 3
    assert all(torch.equal(getattr(made, key), getattr(read, key)) for key in vars(made))
    assert not torch.equal(made.x[0], made.x[2])
    assert isinstance(read, Paths) and isinstance(transitions(base, 2)[0], Transition)
