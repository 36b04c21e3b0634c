"""Every method on Stable Diffusion 2 with v-prediction and on XL: it runs, its patch loads back and changes pictures.

Where a method makes no sense it refuses, with the reason. (Stable Diffusion 1: test_all_methods.py.)
"""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.guard_method import GuardMethod
from erasure.method import GradientMethod
from erasure.methods import configure, names
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from erasure.training.run import Run
from tests.conformance.quick import QUICK, small
from tests.conformance.sketches import METHODS, those
from tests.tiny import tiny_pipeline

PIPELINES = {"sd2-v": ErasedStableDiffusionPipeline, "sdxl": ErasedStableDiffusionXLPipeline}
REFUSED = {
    ("advunlearn", "sdxl"): "trains the one text encoder of Stable Diffusion 1 and 2, and unknown reads two",
    ("slug", "sdxl"): "changes the one text encoder of Stable Diffusion 1 and 2, and unknown reads two",
}
RUNS = [(method, kind) for method in METHODS for kind in PIPELINES if (method, kind) not in REFUSED]
SHORT: dict = {
    method: {**small(method), "iterations": 2} if method in those(GradientMethod) else small(method)
    for method in METHODS
}
SHORT["unguide"] |= {"ratio": 1.0, "decide_after": 1, "decide_steps": 3}
SHORT["stereo"] |= {"iterations": 3}  # one for each of its parts


def tiny(kind):
    return tiny_pipeline(PIPELINES[kind], kind=kind)


def picture(pipe):
    draw = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=draw, output_type="latent").images


def weights(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [value.clone() for part in parts for value in part.state_dict().values()]


@pytest.mark.parametrize(("method", "kind"), RUNS)
def test_runs_and_its_patch_changes_pictures(method, kind, tmp_path):
    pipe = tiny(kind)
    before, base = weights(pipe), picture(pipe)
    patch = erase(pipe, "cat", method, out=tmp_path / "p.safetensors", progress=False, **SHORT[method])
    assert all(torch.equal(one, two) for one, two in zip(before, weights(pipe), strict=True))
    other = tiny(kind)
    other.load_patch(Patch.load(tmp_path / "p.safetensors"))
    assert not torch.equal(base, picture(other))
    other.unload_patches()
    assert torch.equal(base, picture(other))
    forecast = plan(pipe, "cat", method, **SHORT[method])
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"])
    guards = issubclass(METHODS[method], GuardMethod)
    assert (forecast.modules > 0) == (forecast.weights > 0) == (not guards)


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_refuses_with_the_reason(method, kind):
    pipe = tiny(kind)
    before = weights(pipe)
    with pytest.raises(ErasureError, match=REFUSED[method, kind]):
        erase(pipe, "cat", method, progress=False, **QUICK[method])
    assert all(torch.equal(one, two) for one, two in zip(before, weights(pipe), strict=True))


def test_parity_of_esd_is_of_the_other_script():
    with pytest.raises(ErasureError, match="follows esd_sd.py.*without parity"):
        erase(tiny("sdxl"), "cat", "esd", progress=False, parity=True, iterations=2)


def test_every_method_has_an_answer():
    assert {method for method, _ in [*RUNS, *REFUSED]} == set(names())


@pytest.mark.parametrize("kind", PIPELINES)
def test_parity_of_spm_draws_noise_for_all_conditions(kind):
    method = configure("spm", "object", {"parity": True, "iterations": 2, "sample_steps": 4})
    base = Base("tiny", tiny(kind))
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    cat = base.conditions(["cat"])
    anchors, _ = method.anchors(state, cat, torch.Generator().manual_seed(1))
    assert len(anchors) == 3 and (anchors.pooled is None) == (kind == "sd2-v")
    if anchors.pooled is not None:
        ratio = anchors.pooled[1:].norm(dim=1) / cat.pooled.norm()
        assert ((ratio > 0.8) & (ratio < 1.2)).all()
    assert all(torch.isfinite(term) for term in method.loss(state, 1).values())
    state.adapter.remove()


@pytest.mark.parametrize(("method", "kind"), [("esd", "sdxl"), ("advunlearn", "sd2-v")])
def test_half_precision_weights_train_by_fp32_masters_and_come_back(method, kind):
    pipe = tiny(kind).to(torch.bfloat16)
    before = weights(pipe)
    patch = erase(pipe, "cat", method, progress=False, **SHORT[method])
    assert all(torch.equal(one, two) for one, two in zip(before, weights(pipe), strict=True))
    component = patch.payload.components[0]
    assert any(patch.payload.change(component, name).any() for name in patch.payload.names(component))


def test_v_targets_lead_where_noise_targets_lead():
    """The objective over v is that over noise, each sample weighted by 1 / a(t): the minimum is the same."""
    base = Base("tiny", tiny("sd2-v"))
    method = configure("esd", "object", {**QUICK["esd"], "batch_size": 3})
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.mul_(1.2)
    from erasure.model.diffusion import signal_and_noise, to_eps

    batch = method.tuples(state, 0)
    with torch.no_grad():
        output = base.predict(batch.x, batch.t, base.conditions(["cat"] * 3))
        loss = method.loss(state, 0)["esd"]
    out, neutral, concept = (
        to_eps(base.scheduler, one, batch.x, batch.t) for one in (output, batch.neutral, batch.concept)
    )
    noise = (out - (neutral - (concept - neutral))) ** 2
    signal, _ = signal_and_noise(base.scheduler, batch.t)
    assert torch.allclose(loss, (noise / signal**2).mean(), rtol=1e-3)
    assert not torch.allclose(loss, noise.mean(), rtol=1e-2)
    state.adapter.remove()


def test_saluns_saliency_and_retain_loss_are_of_the_noise():
    base = Base("tiny", tiny("sd2-v"))
    method = configure("salun", "object", QUICK["salun"])
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    draw = torch.Generator().manual_seed(state.seed * 1_000_003)
    index = [torch.randint(len(images), (2,), generator=draw) for images in (state.forget, state.retain)]
    method.noised(base, state.forget.sample(index[0], draw), draw)
    x, t, eps = method.noised(base, state.retain.sample(index[1], draw), draw)
    with torch.no_grad():
        terms = method.loss(state, 0)
        v = base.predict(x, t, base.conditions([state.retain.prompts[int(i)] for i in index[1]]))
    clean = state.retain.mean[index[1]]
    velocity = base.scheduler.get_velocity(clean, eps, t)
    from erasure.model.diffusion import signal_and_noise

    signal, _ = signal_and_noise(base.scheduler, t)
    assert torch.allclose(terms["retain"], method.retain_weight * ((signal * (v - velocity)) ** 2).mean(), rtol=1e-3)
    assert not torch.allclose(terms["retain"], method.retain_weight * ((v - eps) ** 2).mean(), rtol=1e-2)
    state.adapter.remove()
