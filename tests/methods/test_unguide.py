"""UnGuide's objective against its formula, its LoRA, what it leads to, and its gate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from erasure.concepts.concept import KINDS, Concept
from erasure.concepts.neighbors import neighbours
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.unguide import UnGuide, cut
from erasure.model.base import Base
from erasure.model.diffusion import counting
from erasure.pipelines import ErasedStableDiffusionXLPipeline
from erasure.training.run import Run
from tests.patch.making import same, weights
from tests.tiny import latents, tiny_pipeline

SMALL = {"iterations": 3, "batch_size": 2, "trajectories": 2, "sample_steps": 4, "learning_rate": 1e-2}


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


@pytest.mark.parametrize("eta", [1.0, 2.0])
def test_the_loss_is_the_formula(base, eta):
    method = dataclasses.replace(UnGuide(), **SMALL, negative_guidance=eta)
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.1)
    loss = method.loss(state, 1)["lead"]
    batch = method.tuples(state, 1)
    with torch.no_grad():
        output = base.unet(batch.x, batch.t, base.encode(["cat"] * 2)).sample
        with state.adapter.off():
            e_c, e_r = (base.unet(batch.x, batch.t, base.encode([text] * 2)).sample for text in ("cat", "dog"))
    assert torch.allclose(loss, ((output - (e_r - eta * (e_c - e_r))) ** 2).mean(), rtol=1e-4)
    assert not torch.allclose(loss, ((output - (e_c - eta * (e_r - e_c))) ** 2).mean(), rtol=1e-3)
    state.adapter.remove()


def test_parity_leads_to_the_published_references(base):
    parity = configure("unguide", "object", {"parity": True})

    def led(concept):
        return parity.led(base, concept, [concept])

    assert led(Concept("cat")) == [("a photo of the cat", "a photo of the forest")]
    assert led(Concept("cat", anchor="a red dog")) == [("a photo of the cat", "a red dog")]
    nearest = neighbours(base, Concept("guitar"), [Concept("guitar")])[0]
    assert led(Concept("guitar")) == [("a photo of the guitar", f"a photo of the {nearest}")]
    nude = Concept("nudity", aliases=("nude",), kind="content")
    assert led(nude) == [("a photo of a nude person", "a photo of a person wearing clothes")]
    assert ("a dog in ink style", "a dog in oil style") in led(Concept("ink", anchor="oil style", kind="style"))
    assert UnGuide().led(base, Concept("cat", anchor="dog"), []) == [("cat", "dog")]


def test_off_is_the_base_bit_for_bit_and_a_fresh_lora_changes_nothing(base):
    x, texts = torch.randn(2, 4, 8, 8), base.encode(["cat", "dog"])
    with torch.no_grad():
        plain = base.unet(x, 7, texts).sample
        state = UnGuide(**SMALL).prepare(base, [Concept("cat")], Run(progress=False))
        assert torch.equal(base.unet(x, 7, texts).sample, plain)
        for param in state.adapter.parameters().values():
            param.add_(0.1)
        assert not torch.equal(base.unet(x, 7, texts).sample, plain)
        with state.adapter.off():
            assert torch.equal(base.unet(x, 7, texts).sample, plain)
    state.adapter.remove()


def test_the_lora_is_eight_times_its_product_whatever_the_rank(base):
    for rank in (1, 4):
        patch = erase(base, "cat", "unguide", progress=False, **SMALL, rank=rank, ratio=1.0)
        assert patch.payload.ranks == [rank]
        for path, (down, up, alpha) in patch.payload.layers["unet"].items():
            assert "attn2" not in path and alpha / rank == 8
            assert torch.allclose(patch.payload.change("unet", f"{path}.weight"), 8 * up @ down, atol=1e-6)


def test_the_first_factor_starts_normal_with_variance_one_over_rank():
    base = Base("tiny", tiny_pipeline())
    state = UnGuide(**SMALL, rank=16).prepare(base, [Concept("cat")], Run(progress=False))
    downs = torch.cat([p.flatten() for name, p in state.adapter.parameters().items() if name.endswith("down")])
    assert float(downs.detach().std()) == pytest.approx(1 / math.sqrt(16), rel=0.1)
    state.adapter.remove()


def test_the_gate_holds_the_weights(base):
    patch = erase(base, "cat", "unguide", progress=False, **SMALL)
    assert patch.gate["kind"] == "latent" and (patch.gate["on"], patch.gate["off"]) == (-1.0, 1.0)
    parity = configure("unguide", "object", {"parity": True})
    gate = parity.gate(None)
    assert gate["late"] is True and "late" not in patch.gate
    variants = {kind: configure("unguide", kind, {"parity": True}).variant for kind in KINDS}
    assert variants == {"object": "x-strict", "style": "x-strict", "identity": "x-strict", "content": "linear"}
    assert (gate["off"], gate["guidance"], gate["repeats"], gate["early"]) == (2.0, 7.5, 10, False)
    assert (gate["after"], gate["steps"], gate["measure"], gate["ratio"]) == (10, 50, "norm", 1.0)
    assert (parity.iterations, parity.learning_rate, parity.trajectory_guidance) == (200, 3e-5, 9.0)


def test_parity_walks_with_the_lora_on_and_asks_the_base(base):
    method = configure("unguide", "object", {"parity": True, "sample_steps": 6})
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(progress=False))
    drawn = torch.Generator().manual_seed(state.seed * 1_000_003 + 2)
    torch.randint(1, (1,), generator=drawn)
    taken = 6 - max(int(torch.randint(6, (1,), generator=drawn)), 1)
    with counting(base.unet) as counts:
        plain = method.tuples(state, 2)
    assert counts.forward == 2 * taken + 2  # as published: guidance on the way, then both answers of the base
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.3)
    moved = method.tuples(state, 2)
    assert torch.equal(plain.t, moved.t) and not torch.equal(plain.x, moved.x)
    with torch.no_grad(), state.adapter.off():
        expected, reference = (base.unet(moved.x, moved.t, base.encode([text])).sample for text in state.pairs[0])
    assert state.pairs == [("a photo of the cat", "dog")]
    assert torch.allclose(moved.concept, expected, atol=1e-5) and torch.allclose(moved.neutral, reference, atol=1e-5)
    state.adapter.remove()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"decide_after": 25}, "1 to 24"),
        ({"measure": "nrom"}, "did you mean 'norm'"),
        ({"learning_rate": 2}, "above 0 and below 1"),
    ],
)
def test_settings_that_make_no_sense(base, setting, message):
    with pytest.raises(ErasureError, match=message):
        erase(base, "cat", "unguide", progress=False, **{**SMALL, **setting})


def test_on_xl_a_gate_that_could_not_decide_is_refused_before_training():
    """XL's empty prompt is all zeros: what cross-attention learns does not move it, and `norm` has no unit."""
    pipe = tiny_pipeline(ErasedStableDiffusionXLPipeline, kind="sdxl")
    before = weights(pipe)
    for variant in ("x-strict", "x"):
        with pytest.raises(ErasureError, match=f"variant={variant}: .*no unit.*measure=guidance.*Nothing was trained"):
            erase(pipe, "cat", "unguide", progress=False, **SMALL, variant=variant)
    assert same(weights(pipe), before)
    ways = {"decide_after": 1, "decide_steps": 2, "repeats": 1, "ratio": 1.0}
    strict = erase(pipe, "cat", "unguide", progress=False, **SMALL, **ways, variant="x-strict", measure="guidance")
    pipe.load_patch(strict)
    latents(pipe, ["a cat"])
    pipe.unload_patches()
    # The reason given is the truth: drawing finds no unit.
    pipe.load_patch(dataclasses.replace(strict, gate={**strict.gate, "measure": "norm"}))
    with pytest.raises(ErasureError, match="does not affect the empty prompt"):
        latents(pipe, ["a cat"])
    pipe.unload_patches()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    UnGuide(**SMALL, variant="x-strict").prepare(Base.of(pipe), [Concept("cat", anchor="dog")], Run(progress=False))


def test_the_gates_cut_parts_two_samples():
    assert cut([4.0, 9.0], [1.0, -0.5]) == 2.5
    assert cut([4.0, 9.0, 16.0], [1.0, 0.5, 10.0]) == 2.5  # one stray value does not move it
    assert cut([2.0], [2.0]) == 2.0


def test_the_gate_is_set_by_the_concept_in_styles_too():
    texts = ["a dog", "a dog in ink style", "a house in the style of Monet"]
    cat, monet = Concept("cat"), Concept("Van Gogh", kind="style")
    prompts = UnGuide.named([cat], texts)
    assert prompts[: len(cat.prompt_pairs())] == [prompt for prompt, _ in cat.prompt_pairs()]
    assert prompts[-2:] == ["a cat in ink style", "a cat in the style of Monet"]
    assert UnGuide.named([monet], texts) == [prompt for prompt, _ in monet.prompt_pairs()]
