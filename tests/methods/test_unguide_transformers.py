"""UnGuide on SD3, FLUX, PixArt and SANA: its objective, and its gate in the pipelines, against their formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods.unguide import UnGuide
from erasure.model.base import Base
from erasure.pipelines import (
    ErasedFluxPipeline,
    ErasedPixArtSigmaPipeline,
    ErasedSanaPipeline,
    ErasedStableDiffusion3Pipeline,
)
from erasure.training.run import Run
from tests.tiny import SIDE
from tests.tiny_transformers import asked, tiny_transformer

SMALL = {
    "variant": "x",
    "iterations": 3,
    "batch_size": 2,
    "trajectories": 2,
    "sample_steps": 3,
    "learning_rate": 3e-2,
    "decide_steps": 3,
    "decide_after": 1,
    "repeats": 2,
}
CAT = Concept("cat", anchor="dog", keep=("car",))
ERASED = {"sd3": ErasedStableDiffusion3Pipeline, "flux": ErasedFluxPipeline, "pixart": ErasedPixArtSigmaPipeline}
ERASED["sana"] = ErasedSanaPipeline
CALL = {
    "sd3": {"guidance_scale": 3.0, "max_sequence_length": 8},
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": [""] * 2, "max_sequence_length": 8},
    "pixart": {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8},
    "sana": {"use_resolution_binning": False, "height": 4 * SIDE, "width": 4 * SIDE},
}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


@pytest.mark.parametrize("kind", ERASED)
def test_loss_is_the_formula(kind):
    """e(c) is led to e_0(c_ref) - eta (e_0(c) - e_0(c_ref))."""
    pipe = tiny_transformer(kind)
    method = dataclasses.replace(UnGuide(), **SMALL, negative_guidance=1.5)
    state = method.prepare(Base("tiny", pipe), [CAT], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    batch = method.tuples(state, 1)
    with torch.no_grad():
        v = asked(pipe, kind, batch.x, batch.t, "cat")
        with state.adapter.off():
            v_c, v_r = (asked(pipe, kind, batch.x, batch.t, text) for text in ("cat", "dog"))
    loss = method.loss(state, 1)["lead"]
    assert torch.allclose(loss, ((v - (v_r - 1.5 * (v_c - v_r))) ** 2).mean(), rtol=1e-3)
    assert not torch.allclose(loss, ((v - (v_r + 1.5 * (v_c - v_r))) ** 2).mean(), rtol=1e-2)
    state.adapter.remove()


@pytest.mark.parametrize("kind", ERASED)
def test_the_gate_combines_both_networks_where_it_opens(kind, tmp_path):
    """The outputs of every call are w e_0 + (1 - w) e_L for the concept alone; other prompts keep every bit."""
    pipe, target = tiny_transformer(kind, ERASED[kind]), tmp_path / "cat.safetensors"
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    patch = erase(pipe, CAT, "unguide", out=target, progress=False, **SMALL, weight_on=-0.5)
    assert patch.gate["kind"] == "latent" and patch.components == ["transformer"]
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())

    def draw():
        noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
        size = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 1, "output_type": "latent"}
        return pipe(["cat", "car"], generator=noise, **{**size, **CALL[kind]}).images

    plain = draw()
    pipe.load_patch(target, "cat")
    pipe.fuse_patches()
    alone = draw()
    pipe.unfuse_patches()
    opens = {"cat": True, "car": False}
    decided = pipe._erasure_stack._gates
    decided.strengths = lambda pipe, gated, prompts: {"cat": [1.5 * opens[row[0]] for row in prompts]}
    gated = draw()
    assert torch.equal(gated[1], plain[1]) and not torch.allclose(alone[0], plain[0], atol=1e-3)
    # One step from the noise is affine in the network's output.
    assert torch.allclose(gated[0], plain[0] + 1.5 * (alone[0] - plain[0]), atol=1e-3)
    pipe.unload_patches()
    assert torch.equal(draw(), plain)


@pytest.mark.parametrize("kind", ERASED)
def test_the_gate_decides_from_the_first_steps(kind):
    """A ratio below what the patch does opens it, one above leaves the base."""
    pipe = tiny_transformer(kind, ERASED[kind])
    strengths = []
    for ratio in (1e-6, 1e6):
        patch = erase(pipe, CAT, "unguide", progress=False, **SMALL, ratio=ratio)
        pipe.load_patch(patch, "cat")
        size = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 1, "output_type": "latent"}
        call = {key: value for key, value in CALL[kind].items() if key != "negative_prompt"}
        pipe("cat", **{**size, **call})
        strengths.append(pipe.gate_log[0]["cat"])
        pipe.unload_patches()
    assert strengths[0] == pytest.approx(2.0) and strengths[1] == 0.0


def test_a_distilled_model_is_decided_on_at_guidance_1():
    base = Base("tiny", tiny_transformer("flux", guidance_embeds=True))
    with pytest.raises(ErasureError, match="guidance 3 for a guidance-distilled model"):
        erase(base, CAT, "unguide", progress=False, **SMALL, trajectory_guidance=1.0, ratio=1.0)
    settings = {**SMALL, "trajectory_guidance": 1.0, "decide_guidance": 1.0, "ratio": 1.0}
    assert erase(base, CAT, "unguide", progress=False, **settings).components == ["transformer"]
