"""Values without a text's part, against numbers computed one by one, and twins that must differ."""

from __future__ import annotations

import math

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.patch import Guard, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.guards.values import Values, bases, gram_schmidt, value_layers
from tests.patch.making import low_rank_patch
from tests.tiny import latents, tiny_pipeline
from tests.tiny_transformers import tiny_transformer

WHOLE = {"peak": 2.0, "slope": 0.0, "centre": 0.0}
PROMPTS = ["a cat", "a red car"]


def guard(*texts, **settings) -> Patch:
    payload = Guard("values", texts, {**WHOLE, **settings})
    return Patch(payload=payload, method="test", concepts=[{"name": texts[0]}])


def test_the_shift_token_by_token():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2, 4, 5, generator=draw)
    basis = gram_schmidt(torch.randn(2, 5, generator=draw))
    form = Values(peak=1.5, slope=6.0, centre=0.2)
    found = form.removed(values, basis)
    for row in range(2):
        for token in range(4):
            v, wanted = values[row, token].tolist(), [0.0] * 5
            for q in basis.tolist() if token else ():
                inner = sum(a * b for a, b in zip(v, q, strict=True))
                shift = 1.5 / (1 + math.exp(-6 * (inner / math.hypot(*v) - 0.2)))
                wanted = [w + shift * inner * b for w, b in zip(wanted, q, strict=True)]
            assert found[row, token].tolist() == pytest.approx(wanted, abs=1e-5)
    assert form.removed(values[:, 1:], basis)[0, 0].abs().max() == 0  # whatever is first


def test_the_plain_projection_leaves_nothing_and_the_orthogonal_part_is_left():
    vectors = torch.tensor([[3.0, 0, 0, 4.0], [1.0, 2.0, 0, 0]])
    basis, form = gram_schmidt(vectors), Values(**WHOLE)
    values = torch.stack([torch.ones(4), vectors[0], vectors[1], torch.tensor([0.0, 0, 5.0, 0])])[None]
    left = values - form.removed(values, basis)
    assert torch.equal(left[0, 0], values[0, 0]) and torch.equal(left[0, 3], values[0, 3])
    assert left[0, 1].abs().max() < 1e-6 and left[0, 2].abs().max() < 1e-6
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-6)
    assert gram_schmidt(torch.cat([vectors, vectors.sum(0, keepdim=True)])).shape == (2, 4)


def test_values_that_are_far_keep_every_bit_and_near_ones_lose_twice_their_part():
    values = torch.tensor([[[1.0, 0], [0.6, 0.8], [1.0, 0.0]]])
    found = Values(peak=2.0, slope=100.0, centre=0.9).removed(values, torch.tensor([[1.0, 0.0]]))
    assert torch.equal(found[0, 1], torch.zeros(2))  # its shift, 2e-13, is cut
    assert found[0, 2, 0] == pytest.approx(2.0, abs=1e-3)


def test_the_layers_lose_the_last_token_of_the_text():
    """The hooks on the pipeline's own layers against the values of the same prompt, computed here."""
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base, seen = Base("", pipe), {}
    layers = value_layers(base)
    assert layers and all(path.endswith("attn2.to_v") for path in layers)
    pipe.load_patch(guard("red car"))
    handles = []

    def watch(path):
        return lambda module, args, output: seen.__setitem__(path, output.clone())

    def late(unet, args):
        """Register hooks after those of the guard, so that they see what it returns."""
        if not handles:
            handles.extend(module.register_forward_hook(watch(path)) for path, module in layers.items())

    handle = pipe.unet.register_forward_pre_hook(late)
    latents(pipe, ["a cat", "a red car"], steps=1)
    for one in (handle, *handles):
        one.remove()
    states, empty = base.encode(["a cat", "a red car"]), base.encode(["", ""])
    last = base.encode(["red car"])[0, 2]  # start, red, car
    with torch.no_grad():
        for path, module in layers.items():
            q = torch.nn.functional.normalize(module(last), dim=0)
            values = module(states)
            wanted = values - (values @ q)[..., None] * q
            wanted[:, 0] = values[:, 0]
            assert torch.allclose(seen[path], torch.cat([module(empty), wanted]), atol=1e-5)
            assert not torch.allclose(seen[path], torch.cat([module(empty), values]), atol=1e-3)


def test_unloading_leaves_no_trace_and_strength_scales():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = latents(pipe, PROMPTS)
    pipe.load_patch(guard("cat"), name="cat")
    whole = latents(pipe, PROMPTS)
    pipe.set_patches({"cat": 0.5})
    half = latents(pipe, PROMPTS)
    assert pipe.gate_log == [{"cat": 0.5}] * 2
    assert not torch.allclose(whole, base, atol=1e-3) and not torch.allclose(half, whole, atol=1e-3)
    pipe.unload_patches()
    assert torch.equal(latents(pipe, PROMPTS), base)
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_it_stacks_in_any_order_with_guidance_and_with_patches():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    settings = {"safety_scale": 50.0, "threshold": 1.0, "warm_up": 0.0, "momentum": 0.5, "momentum_decay": 0.7}
    guided = Patch(payload=Guard("guidance", ("dog",), settings), method="test", concepts=[{"name": "dog"}])
    gated = low_rank_patch(pipe, gate={"kind": "text", "texts": ["a cat"], "threshold": 0.99})
    found = []
    for order in ((guard("cat"), guard("car"), gated, guided), (guided, gated, guard("car"), guard("cat"))):
        for patch in order:
            pipe.load_patch(patch)
        found.append(latents(pipe, PROMPTS, num_images_per_prompt=2))
        pipe.unload_patches()
    assert torch.equal(*found)


def test_a_basis_of_several_texts_is_orthonormal_in_every_layer():
    base = Base("", tiny_pipeline())
    found = bases(base, ["cat", "red car", "cat"], value_layers(base))
    for basis in found.values():
        assert basis.shape[0] == 2 and torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-5)


@pytest.mark.parametrize(("kind", "why"), [("sd3", "share one attention"), ("pixart", "reads other states")])
def test_other_networks_are_refused_with_the_reason(kind, why):
    import erasure.pipelines as pipelines

    names = {"sd3": "ErasedStableDiffusion3Pipeline", "pixart": "ErasedPixArtSigmaPipeline"}
    pipe = tiny_transformer(kind, getattr(pipelines, names[kind]))
    with pytest.raises(ErasureError, match=f"is a guard of the form values.*{why}"):
        pipe.load_patch(guard("cat"))


def joined(texts, halves, token: int, peak: float, slope: float, centre: float) -> list[float]:
    """The published shift of one token's joined value, number by number."""

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    turn = [[float(i == j) for j in range(len(texts))] for i in range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):  # on the texts as they are, not on what is left of them
            turn[i][j] = -dot(texts[j], texts[i]) / dot(texts[j], texts[j])
    scaled = []
    for text in texts:
        cosine = dot(text, halves) / math.hypot(*text) / math.hypot(*halves)
        scaled.append([peak / (1 + math.exp(-slope * (cosine - centre))) * number for number in text])
    taken = [0.0] * len(halves)
    for row in turn if token else []:
        basis = [sum(p * text[d] for p, text in zip(row, texts, strict=True)) for d in range(len(halves))]
        share = dot(basis, halves) / dot(basis, basis)
        for d in range(len(halves)):
            taken[d] += share * sum(p * text[d] for p, text in zip(row, scaled, strict=True))
    return taken


@pytest.mark.parametrize("names", [("red car",), ("cat", "dog"), ("cat", "red car", "dog")])
def test_as_published_both_halves_of_guidance_are_joined(names):
    """Both rows of a real call with a negative prompt, against a computation of every number by itself."""
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base, seen, handles = Base("", pipe), {}, []
    numbers = {"peak": 2.0, "slope": 7.0, "centre": 0.4}
    pipe.load_patch(Patch(Guard("values", names, {**numbers, "published": True}), "test", [{"name": names[0]}]))
    layers = value_layers(base)

    def late(unet, args):
        for path, module in () if handles else layers.items():
            handles.append(module.register_forward_hook(lambda m, a, out, path=path: seen.update({path: out.clone()})))

    pipe.unet.register_forward_pre_hook(late)
    pipe("a cat", negative_prompt="a tree", num_inference_steps=1, output_type="latent", guidance_scale=3.0)
    for handle in handles:
        handle.remove()
    before, prompt, empty = (base.encode([text])[0] for text in ("a tree", "a cat", ""))
    last = [base.encode([name])[0, len(name.split())] for name in names]
    assert seen
    with torch.no_grad():
        for path, module in layers.items():
            u, v, e = (module(states) for states in (before, prompt, empty))
            for token in range(len(v)):
                texts = [[*e[token].tolist(), *module(state).tolist()] for state in last]
                halves = [*u[token].tolist(), *v[token].tolist()]
                taken = joined(texts, halves, token, **numbers)
                wanted = torch.tensor(halves) - torch.tensor(taken)
                assert torch.allclose(seen[path][:, token].flatten(), wanted, atol=1e-4)
    clean = tiny_pipeline(ErasedStableDiffusionPipeline)
    clean.load_patch(guard(*names, **numbers))
    assert not torch.allclose(latents(clean, PROMPTS), latents(pipe, PROMPTS), atol=1e-3)


def test_as_published_a_call_without_guidance_has_the_empty_prompts_half():
    """The joined value of the text itself is its record: all of it goes, whatever the half before it."""
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base, seen = Base("", pipe), []
    settings = {"peak": 2.0, "slope": 0.0, "centre": 0.0, "published": True}
    pipe.load_patch(Patch(Guard("values", ("cat",), settings), "test", [{"name": "cat"}]))
    path, module = next(iter(value_layers(base).items()))

    def late(unet, args):
        if not seen:
            seen.append(module.register_forward_hook(lambda m, a, out: seen.append(out.clone())))

    pipe.unet.register_forward_pre_hook(late)
    pipe("cat", num_inference_steps=1, output_type="latent", guidance_scale=1.0)
    assert len(seen[1]) == 1
    with torch.no_grad():
        own = module(base.encode(["cat"]))
    assert seen[1][0, 1].abs().max() < 1e-5 and torch.allclose(seen[1][0, 0], own[0, 0], atol=1e-6)


def test_patches_from_before_the_published_form_load():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(Patch(payload=Guard("values", ("cat",), WHOLE), method="test", concepts=[{"name": "cat"}]))
    with pytest.raises(ErasureError, match="lacks the settings centre"):
        pipe.load_patch(
            Patch(
                payload=Guard("values", ("cat",), {"peak": 2.0, "slope": 0.0}), method="test", concepts=[{"name": "c"}]
            )
        )
