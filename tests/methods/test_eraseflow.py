"""EraseFlow: balance and retain term against densities and divergences computed apart; its file in diffusers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.eraseflow import EraseFlow, balance, divergence
from erasure.model.base import Base
from erasure.model.stochastic import transitions
from erasure.pipelines import ErasedFluxPipeline
from erasure.training.run import Run
from tests.tiny import SIDE, tiny_pipeline
from tests.tiny_transformers import asked, tiny_transformer

SMALL = {
    "iterations": 2,
    "batch_size": 2,
    "trajectories": 2,
    "sample_steps": 4,
    "last_steps": 1,
    "random_steps": 1,
    "learning_rate": 1e-2,
    "rank": 2,
    "retain_trajectories": 2,
    "retain_batch_size": 3,
}
CAT = Concept("cat", anchor="dog", keep=("car",))
KINDS = ("unet", "sd3", "flux", "pixart")


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "red cat"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


def pipeline(kind):
    return tiny_pipeline() if kind == "unet" else tiny_transformer(kind)


def started(kind, concept=CAT, **settings):
    base = Base("tiny", pipeline(kind))
    method = dataclasses.replace(EraseFlow(), **{**SMALL, **settings})
    return base, method, method.prepare(base, [concept], Run(seed=3, progress=False))


def moved_off(state, scale=0.3):
    """Move the low-rank term off the base, so that student and teacher differ."""
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(scale * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))


def gradient(state):
    """The gradient of the factors that start at zero."""
    trained = state.adapter.parameters().items()
    return torch.cat([param.grad.flatten() for name, param in trained if name.endswith("up")])


def transition(base, x, output, step):
    """The normal that a step draws from, for noise prediction or a velocity, written down apart."""
    if base.architecture.flow:
        sigma, after = step.t / 1000, step.next_noise
        x0, eps = x - sigma * output, x + (1 - sigma) * output
        k = (1 - sigma) / (1 - after)
        wide = after * (sigma**2 - (k * after) ** 2) ** 0.5 / sigma
        return Normal((1 - after) * x0 + (after**2 - wide**2) ** 0.5 * eps, wide)
    scheduler = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(4)
    mean = scheduler.step(output, int(step.t), x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
    one = scheduler.step(output, int(step.t), x, eta=1.0, variance_noise=torch.ones_like(x)).prev_sample
    return Normal(mean, (one - mean).mean())


@pytest.mark.parametrize("reference", ["anchor", "noising"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_terms_are_their_formulas(kind, reference):
    base, method, state = started(kind, reference=reference, log_beta=0.5, retain_weight=2.0)
    moved_off(state)
    terms = method.loss(state, 1)
    draw = torch.Generator().manual_seed(3 * 1_000_003 + 1)
    used = method.steps(state, draw)
    # The last step of a flow, and of a schedule that ends in clean latents, is deterministic.
    assert len(used) == 2 and used[-1] == (3 if kind == "unet" else 2)

    def out(x, step, prompt):
        with torch.no_grad():
            t = torch.tensor([step.t])
            if kind == "unet":
                return base.predict(x, t, base.conditions([prompt])).float()
            return asked(base.pipe, kind, x, t, prompt)

    def densities(x, after, step):
        with state.adapter.off():
            empty, anchor, concept = (out(x, step, prompt) for prompt in ("", "dog", "cat"))
        mine = out(x, step, "cat")
        c, a, before = (transition(base, x, empty + 3 * (one - empty), step) for one in (mine, anchor, concept))
        ref = a.log_prob(after)
        if reference == "noising":
            k = step.signal / step.next_signal
            ref = Normal(k * after, (step.noise**2 - (k * step.next_noise) ** 2) ** 0.5).log_prob(x)
        return (c.log_prob(after) - ref).mean(), kl_divergence(before, a).mean()

    found, gaps = [], []
    for row in range(2):
        x, steps = state.paths.x[row], transitions(base, 4)
        pairs = [densities(x[i][None], x[i + 1][None], steps[i]) for i in used]
        found.append(sum(ratio for ratio, _ in pairs) - 0.5)
        gaps.append(sum(gap for _, gap in pairs))
    r, gap = torch.stack(found), torch.stack(gaps).mean()
    assert gap > 0 and r.abs().min() > 1e-3
    assert torch.allclose(terms["balance"], (r / gap).square().mean(), rtol=2e-2)

    rows = torch.randint(3, (3,), generator=draw)
    at = [used[int(i)] for i in torch.randint(2, (3,), generator=draw)]
    moved = []
    for row, i in zip(rows.tolist(), at, strict=True):
        x, step, text = state.retain.x[row, i][None], transitions(base, 4)[i], state.kept[row]
        with state.adapter.off():
            empty, before = out(x, step, ""), out(x, step, text)
        after = out(x, step, text)
        now, then = (transition(base, x, empty + 3 * (one - empty), step) for one in (after, before))
        moved.append(kl_divergence(then, now).mean())
    assert torch.allclose(terms["retain"], 2.0 * 2 * torch.stack(moved).mean() / gap, rtol=2e-2)
    sum(terms.values()).backward()
    assert any(param.grad is not None and param.grad.any() for param in state.adapter.parameters().values())
    state.adapter.remove()


def test_the_balance_is_exact_where_the_network_is_the_base_for_the_anchor():
    """Every trajectory has r = 0 and no gradient; with the published reference r is a constant of the schedule."""
    base, method, state = started("unet", retain_weight=0.0)
    state.pairs[:] = [("dog", "dog")]
    assert state.retain is None
    terms = method.loss(state, 0)
    assert list(terms) == ["balance"] and terms["balance"] < 1e-6
    terms["balance"].backward()
    assert gradient(state).abs().max() < 1e-3
    state.adapter.remove()
    base, method, state = started("unet", reference="noising", retain_weight=0.0, random_steps=2)
    used = method.steps(state, torch.Generator().manual_seed(0))
    steps = [state.steps[i] for i in used]
    offset = sum(torch.log(torch.tensor(step.noise / step.next_noise)) for step in steps)
    assert offset > 0.5  # what log_beta has to meet
    state.adapter.remove()


def test_the_gradient_follows_the_sign_of_the_balance():
    """Below log beta the trajectories are made more likely, above it less: with beta too small the anchor is left."""
    found = {}
    for log_beta in (1.0, -1e4):
        base, method, state = started("unet", log_beta=log_beta, retain_weight=0.0)
        terms = method.loss(state, 0)
        terms["balance"].backward()
        found[log_beta] = gradient(state)
        state.adapter.remove()
    one, other = found.values()
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) < -0.5


def test_small_formulas():
    assert torch.equal(balance(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), 0.5), torch.tensor([2.5, 1.5]))
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 4, 2, 2, generator=draw) for _ in range(2))
    wide = torch.tensor([0.5, 2.0])
    theirs = kl_divergence(Normal(one, wide.view(-1, 1, 1, 1)), Normal(other, wide.view(-1, 1, 1, 1)))
    assert torch.allclose(divergence(one, other, wide), theirs.mean((1, 2, 3)))


def test_the_divergence_is_the_difference_of_signal_to_noise():
    """KL = 1/2 (SNR_s - SNR_t) |x0 - x0'|^2, as in variational diffusion models (arXiv 2107.00630, eq. 13)."""
    base = Base("tiny", tiny_transformer("sd3"))
    draw = torch.Generator().manual_seed(0)
    x, one, other = (torch.randn(1, 4, SIDE, SIDE, generator=draw) for _ in range(3))
    for step in transitions(base, 6)[:-1]:
        rise = (step.next_signal / step.next_noise) ** 2 - (step.signal / step.noise) ** 2
        found = divergence(step.mean(x, one), step.mean(x, other), torch.tensor([step.deviation]))
        assert torch.allclose(found, 0.5 * rise * (one - other).square().mean((1, 2, 3)), rtol=1e-3)


def test_the_last_steps_are_always_used_and_others_change():
    base, method, state = started("unet", sample_steps=10, last_steps=3, random_steps=2, retain_weight=0.0)
    chosen = [method.steps(state, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(steps[-3:] == [7, 8, 9] and len(set(steps)) == 5 and steps == sorted(steps) for steps in chosen)
    assert {step for steps in chosen for step in steps[:2]} == set(range(7))
    state.adapter.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_base_as_it_was_and_costs_what_was_planned(kind, tmp_path):
    base = Base("tiny", pipeline(kind))
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    forecast = plan(base, CAT, "eraseflow", **SMALL)
    patch = erase(base, CAT, "eraseflow", out=tmp_path / "p.safetensors", progress=False, **SMALL)
    assert patch.payload.kind == "low-rank" and patch.gate == {"kind": "always"}
    assert all(torch.equal(before[name], value) for name, value in base.network.state_dict().items())
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"])
    # Three for each of 4 steps of 2 trajectories, two for those of 3 kept prompts; per update 2 steps of 2, 3 kept.
    assert patch.costs["B"] == 2 * (2 * 2 + 3) and patch.costs["F"] == patch.costs["B"] + 4 * (3 * 2 + 2 * 3)
    (component,) = patch.components
    assert any(patch.payload.change(component, name).any() for name in patch.payload.names(component))


def test_it_moves_the_concept_to_its_anchor_and_keeps_what_it_is_told_to_keep():
    """On states of the anchor the prediction for the concept nears the anchor's; the retain term holds others."""
    settings = {**SMALL, "iterations": 12, "learning_rate": 8e-3, "random_steps": 3, "rank": 4, "retain_batch_size": 6}
    near, kept = {}, {}
    for weight in (10.0, 0.0):
        base, method, state = started("unet", **settings, retain_weight=weight)
        state.adapter.remove()
        x, t = state.paths.x[:, 1], torch.full((2,), state.steps[1].t)
        patch = erase(base, CAT, "eraseflow", progress=False, **settings, retain_weight=weight)
        with torch.no_grad():
            before = {prompt: base.predict(x, t, base.conditions([prompt] * 2)) for prompt in ("cat", "dog", "car")}
            for path in patch.payload.names("unet"):
                target, _, name = path.rpartition(".")
                getattr(base.unet.get_submodule(target), name).add_(patch.payload.change("unet", path))
            after = {prompt: base.predict(x, t, base.conditions([prompt] * 2)) for prompt in ("cat", "car")}
        near[weight] = float((after["cat"] - before["dog"]).norm() / (before["cat"] - before["dog"]).norm())
        kept[weight] = float((after["car"] - before["car"]).norm())
    assert near[0.0] < 0.8 and near[10.0] < 1.0 and kept[10.0] < 0.8 * kept[0.0], (near, kept)


def test_its_file_loads_in_plain_diffusers(tmp_path):
    pipe, target = tiny_transformer("flux", ErasedFluxPipeline), tmp_path / "cat.safetensors"
    erase(Base("tiny", pipe), CAT, "eraseflow", out=target, progress=False, **{**SMALL, "variant": "x"})
    x, t = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5)), torch.full((1,), 700.0)
    with torch.no_grad():
        plain = asked(pipe, "flux", x, t, "cat")
        pipe.load_patch(target)
        pipe.fuse_patches()
        ours = asked(pipe, "flux", x, t, "cat")
        theirs = tiny_transformer("flux")
        theirs.load_lora_weights(str(target))
        assert torch.allclose(asked(theirs, "flux", x, t, "cat"), ours, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("unet", {"last_steps": 0, "random_steps": 0}, "no step"),
        ("unet", {"reference": "mean"}, "noising"),
        ("unet", {"variant": "xx"}, "unknown variant 'xx'"),
        ("distilled", {}, "guidance 3 for a guidance-distilled model"),
        ("schnell", {"trajectory_guidance": 1.0}, "no trajectories with added noise"),
    ],
)
def test_what_cannot_be_is_refused(kind, settings, message):
    pipe = tiny_transformer("flux", guidance_embeds=True) if kind == "distilled" else None
    name = "black-forest-labs/FLUX.1-schnell" if kind == "schnell" else "tiny"
    base = Base(name, pipe or pipeline("flux" if kind == "schnell" else kind))
    with pytest.raises(ErasureError, match=message):
        erase(base, CAT, "eraseflow", progress=False, **{**SMALL, **settings})
