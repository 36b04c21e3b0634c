"""SPM on SD3, FLUX, PixArt and SANA: its terms against their formulas, and the text gate, by CLIP, T5 or Gemma."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.concepts.similarity import gate_encoder
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods.spm import SPM
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

SMALL = {"iterations": 2, "batch_size": 2, "trajectories": 2, "sample_steps": 3, "learning_rate": 1e-2, "refresh": 1}
CAT = Concept("cat", keep=("dog", "car"))
ERASED = {"sd3": ErasedStableDiffusion3Pipeline, "flux": ErasedFluxPipeline, "pixart": ErasedPixArtSigmaPipeline}
ERASED["sana"] = ErasedSanaPipeline


@pytest.mark.parametrize("kind", ERASED)
def test_both_terms_are_their_formulas(kind):
    """Erase: v(c) to v_0(n) - eta (v_0(c) - v_0(n)); anchor: weight x the mean of |v(a) - v_0(a)|^2 over anchors."""
    pipe, eta, weight = tiny_transformer(kind), 1.5, 7.0
    base = Base("tiny", pipe)
    method = dataclasses.replace(SPM(), **{**SMALL, "refresh": 0}, negative_guidance=eta, anchor_weight=weight)
    state = method.prepare(base, [CAT], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    asked_for = []
    conditions = type(base).conditions
    base.conditions = lambda prompts: asked_for.append(list(prompts)) or conditions(base, prompts)
    terms = method.loss(state, 1)
    batch, anchors = method.tuples(state, torch.Generator(), 1), asked_for[1]
    with torch.no_grad():
        v = asked(pipe, kind, batch.x, batch.t, "cat")
        after = torch.cat([asked(pipe, kind, batch.x[i : i + 1], batch.t[i : i + 1], a) for i, a in enumerate(anchors)])
        with state.adapter.off():
            v_0, v_c = (asked(pipe, kind, batch.x, batch.t, prompt) for prompt in ("", "cat"))
            before = [asked(pipe, kind, batch.x[i : i + 1], batch.t[i : i + 1], a) for i, a in enumerate(anchors)]
    assert torch.allclose(terms["erase"], ((v - (v_0 - eta * (v_c - v_0))) ** 2).mean(), rtol=1e-4)
    drift = ((after - torch.cat(before)) ** 2).mean()
    assert drift > 0 and torch.allclose(terms["anchor"], weight * drift, rtol=1e-4)
    state.adapter.remove()


@pytest.mark.parametrize("kind", ERASED)
def test_its_patch_is_gated_by_the_prompt(kind, tmp_path):
    pipe = tiny_transformer(kind, ERASED[kind])
    target = tmp_path / "cat.safetensors"
    patch = erase(Base("tiny", pipe), CAT, "spm", out=target, progress=False, **SMALL)
    assert patch.components == ["transformer"] and patch.gate["texts"] == ["cat"]
    modules = {name.removesuffix(".weight") for name in patch.payload.names("transformer")}
    assert modules == set(Base("tiny", pipe).targets("transformer"))
    options = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 2, "output_type": "latent"}
    more = {"guidance_scale": 2.0, "max_sequence_length": 8, **options}
    more |= {"use_resolution_binning": False, "clean_caption": False} if kind in ("pixart", "sana") else {}
    more |= {"height": 4 * SIDE, "width": 4 * SIDE} if kind == "sana" else {}

    def draw():
        noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return pipe(["cat", "monet"], generator=noise, **more).images

    plain = draw()
    pipe.load_patch(target, "cat")
    gated = draw()
    assert pipe.gate_log[0]["cat"] == pytest.approx(1.0) and pipe.gate_log[1]["cat"] == 0.0
    assert torch.equal(gated[1], plain[1]) and not torch.equal(gated[0], plain[0])


def test_the_gate_reads_clip_where_there_is_one():
    flux, pixart = tiny_transformer("flux"), tiny_transformer("pixart")
    assert gate_encoder(flux) == (flux.tokenizer, flux.text_encoder)
    assert gate_encoder(pixart) == (pixart.tokenizer, pixart.text_encoder)
    flux.tokenizer = None
    assert gate_encoder(flux) == (flux.tokenizer_2, flux.text_encoder_2)
    flux.tokenizer_2 = None
    with pytest.raises(ErasureError, match="FluxPipeline holds no such pair"):
        gate_encoder(flux)
