"""The filter of a prompt's tokens, against states and projections computed here in another way."""

from __future__ import annotations

import math

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.conditioning import token_ids
from erasure.patch import Guard, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from erasure.pipelines.guards.tokens import Tokens
from tests.patch.making import low_rank_patch
from tests.tiny import latents, tiny_pipeline
from tests.tiny_transformers import tiny_transformer

# With a midpoint of 0 and this slope, every prompt that has a trigger is filtered in all steps.
SETTINGS = {
    **{"margin": 0.1, "steps": 1.0, "midpoint": 0.0, "slope": 1e4, "padding": False, "negative": False},
    **{"reattention": False, "wide_scale": 0.9, "narrow_scale": 0.2, "published": False},
}
PROMPTS = ["a red cat", "van gogh night"]


def guard(*texts, gate=None, **settings) -> Patch:
    payload = Guard("tokens", texts or ("cat",), {**SETTINGS, **settings})
    fields = {} if gate is None else {"gate": gate}
    return Patch(payload=payload, method="test", concepts=[{"name": payload.texts[0]}], **fields)


def read(pipe, prompts, steps=1, **more) -> list[torch.Tensor]:
    """The text states that cross-attention reads in each step."""
    seen: list[torch.Tensor] = []
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    latents(pipe, prompts, steps=steps, **more)
    handle.remove()
    return seen


def end(pipe, ids, mask=None):
    """The state at the end token; the tokens end where the first end token stands."""
    with torch.no_grad():
        states = pipe.text_encoder(ids, attention_mask=mask).last_hidden_state
    return states[0, int((ids[0] == pipe.tokenizer.eos_token_id).nonzero()[0])].double()


def without(vector, others):
    """What is left of a vector orthogonal to others, by least squares."""
    columns = torch.stack(others).T
    return vector - columns @ torch.linalg.lstsq(columns, vector[:, None]).solution[:, 0]


def derived(pipe, prompt, texts, margin):
    """Which tokens are triggers, their filtered states by place, and beta."""
    kept_out = [end(pipe, token_ids(pipe.tokenizer, [text])) for text in texts]
    ids = token_ids(pipe.tokenizer, [prompt])
    hidden = []
    for place in range(1, int((ids[0] == pipe.tokenizer.eos_token_id).nonzero()[0])):
        mask = torch.ones_like(ids)
        mask[0, place] = 0
        hidden.append(end(pipe, ids, mask))
    distances = [without(vector, kept_out).norm().item() for vector in hidden]
    triggers, filtered, angles = [], {}, []
    for place, own in enumerate(distances):
        rest = distances[:place] + distances[place + 1 :]
        triggers.append(own > (1 + margin) * sum(rest) / len(rest))
    states = Base("", pipe).encode([prompt])[0].double()
    for place in range(len(hidden) + 2):
        inside = states[place] - without(states[place], hidden)
        turned = without(inside, kept_out)
        filtered[place] = turned
        angles.append(torch.cosine_similarity(turned, states[place], dim=0).item())
    return triggers, filtered, 1 - sum(angles) / len(angles)


@pytest.mark.parametrize("texts", [("cat",), ("night", "red")])
def test_the_states_of_triggers_are_projected_and_no_others(texts):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = Base("", pipe)
    plain, empty = base.encode(PROMPTS), base.encode(["", ""])
    pipe.load_patch(guard(*texts, margin=0.02))
    (found,) = read(pipe, PROMPTS)
    wanted, counted = plain.clone(), 0
    for row, prompt in enumerate(PROMPTS):
        triggers, filtered, _ = derived(pipe, prompt, texts, 0.02)
        for place, trigger in enumerate(triggers, 1):
            if trigger:
                wanted[row, place] = filtered[place].float()
                counted += 1
    assert 0 < counted < sum(len(prompt.split()) for prompt in PROMPTS)
    assert torch.allclose(found, torch.cat([empty, wanted]), atol=1e-4)
    assert not torch.allclose(found[2:], plain, atol=1e-2)


def test_padding_is_filtered_with_a_trigger_alone():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    plain = Base("", pipe).encode(["a red cat", "dog"])
    pipe.load_patch(guard("cat", padding=True, margin=0.05))
    (found,) = read(pipe, ["a red cat", "dog"])
    triggers, filtered, _ = derived(pipe, "a red cat", ["cat"], 0.05)
    assert triggers == [True, False, False]  # by chance of these weights
    assert torch.equal(found[3], plain[1])  # no trigger: every bit
    changed = [not torch.equal(one, other) for one, other in zip(found[2], plain[0], strict=True)]
    assert changed == [False, True, False, False] + [True] * 8
    assert torch.allclose(found[2, 4], filtered[4].float(), atol=1e-4)


def test_a_token_is_a_trigger_above_the_mean_of_the_others():
    form = Tokens(**{**SETTINGS, "margin": 0.1})
    distances = torch.tensor([1.0, 2.0, 1.0, 1.2])  # the first is that of the whole prompt
    assert form.triggers(distances).tolist() == [True, False, False]
    assert Tokens(**{**SETTINGS, "margin": 0.9}).triggers(distances).tolist() == [False, False, False]
    assert form.triggers(torch.tensor([1.0, 1.09])).tolist() == [False]
    assert form.triggers(torch.tensor([1.0, 1.11])).tolist() == [True]
    published = Tokens(**{**SETTINGS, "published": True})
    assert published.triggers(torch.tensor([1.0, 0.5])).tolist() == [True]  # whatever a prompt of one token is
    assert published.triggers(distances).tolist() == [True, False, False]


def test_the_share_of_the_schedule_grows_with_beta():
    form = Tokens(**{**SETTINGS, "steps": 0.2, "midpoint": 0.5, "slope": 50.0})
    for beta in (0.0, 0.47, 0.5, 0.6, 1.0):
        assert form.share(beta) == pytest.approx(0.2 / (1 + math.exp(-50 * (beta - 0.5))), abs=1e-12)
    published = Tokens(**{**SETTINGS, "steps": 0.2, "midpoint": 0.5, "slope": 50.0, "published": True})
    # round(10 sigmoid) of 50 steps, and the step of that number too
    assert [published.share(beta) for beta in (0.0, 0.5, 1.0)] == pytest.approx([0.02, 0.12, 0.22])


def test_the_projection_decides_how_many_steps_are_filtered():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    plain = Base("", pipe).encode(["a red cat"])[0]
    triggers, _, beta = derived(pipe, "a red cat", ["cat"], 0.1)
    assert any(triggers)
    counts = []
    for above in (0.0, 1.0, -1.0):
        # a share of 1 / (1 + exp(-above)), of ten steps from time 901 on
        pipe.load_patch(guard("cat", midpoint=beta - above / 4, slope=4.0), name="cat")
        filtered = [not torch.equal(states[1], plain) for states in read(pipe, ["a red cat"], steps=10)]
        share = 1 / (1 + math.exp(-above))
        count = sum((901 - 100 * step) / 1000 >= 1 - share for step in range(10))
        assert filtered == [True] * count + [False] * (10 - count)
        counts.append(count)
        pipe.unload_patches()
    assert counts == [5, 7, 2]


@pytest.mark.parametrize(("aside", "filtered"), [(-0.005, True), (0.005, False)])
def test_beta_is_the_mean_over_the_tokens_with_start_and_end(aside, filtered):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    _, _, beta = derived(pipe, "a red cat", ["cat"], 0.05)
    pipe.load_patch(guard("cat", margin=0.05, midpoint=beta + aside, slope=1e4))
    (found,) = read(pipe, ["a red cat"])
    assert torch.equal(found[1], Base("", pipe).encode(["a red cat"])[0]) != filtered


def test_without_a_trigger_every_bit_is_kept_and_unloading_leaves_no_trace():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = latents(pipe, PROMPTS)
    pipe.load_patch(guard(margin=100.0), name="none")
    assert torch.equal(latents(pipe, PROMPTS), base)
    pipe.delete_patches("none")
    pipe.load_patch(guard(padding=True), name="cat")
    found = latents(pipe, PROMPTS)
    assert not torch.allclose(found, base, atol=1e-4) and pipe.gate_log == [{"cat": 1.0}] * 2
    pipe.set_patches({"cat": 0.0})
    assert torch.equal(latents(pipe, PROMPTS), base)
    pipe.unload_patches()
    assert torch.equal(latents(pipe, PROMPTS), base) and "forward" not in vars(pipe.unet)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_strength_scales_the_change_and_images_share_it():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    plain = Base("", pipe).encode(["a red cat"])
    moves = []
    for strength in (1.0, 0.5, -1.0):
        pipe.load_patch(guard("cat"), strength=strength)
        (states,) = read(pipe, ["a red cat"], num_images_per_prompt=2)
        assert torch.equal(states[2], states[3])
        moves.append(states[2] - plain[0])
        pipe.unload_patches()
    assert moves[0].abs().max() > 1e-2
    assert torch.allclose(moves[1], 0.5 * moves[0], atol=1e-5) and torch.allclose(moves[2], -moves[0], atol=1e-5)


def test_a_gate_keeps_prompts_out():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = latents(pipe, PROMPTS)
    gate = {"kind": "text", "texts": ["van gogh night"], "power": 0.0, "threshold": 0.999}
    pipe.load_patch(guard("cat", "night", gate=gate, padding=True), name="p")
    found = latents(pipe, PROMPTS)
    assert pipe.gate_log == [{"p": 0.0}, {"p": 1.0}]
    assert torch.equal(found[0], base[0]) and not torch.equal(found[1], base[1])


def test_the_negative_prompt_is_the_texts_if_so_set():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = Base("", pipe)
    pipe.load_patch(guard("cat", "dog", negative=True, margin=100.0), strength=0.5)
    (found,) = read(pipe, PROMPTS)
    empty, names = base.encode([""])[0], base.encode(["cat, dog"])[0]
    assert torch.allclose(found[:2], (empty + 0.5 * (names - empty)).expand(2, -1, -1), atol=1e-5)
    assert torch.equal(found[2:], base.encode(PROMPTS))


def test_it_stacks_in_any_order_with_other_guards_and_patches():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    settings = {"safety_scale": 50.0, "threshold": 1.0, "warm_up": 0.0, "momentum": 0.5, "momentum_decay": 0.7}
    guided = Patch(payload=Guard("guidance", ("dog",), settings), method="test", concepts=[{"name": "dog"}])
    gated = low_rank_patch(pipe, gate={"kind": "text", "texts": ["a red cat"], "threshold": 0.99})
    both = guard("cat", padding=True, reattention=True), guard("night", padding=True)
    found = []
    for order in ((both[0], both[1], gated, guided), (guided, gated, both[1], both[0])):
        for patch in order:
            pipe.load_patch(patch)
        found.append(latents(pipe, PROMPTS, num_images_per_prompt=2))
        pipe.unload_patches()
    assert torch.equal(*found)


def test_guidance_away_from_a_text_is_not_filtered():
    """The other guard's own passes, with its text in the place of the prompts, must see that text as it is."""
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    settings = {"safety_scale": 50.0, "threshold": 1.0, "warm_up": 0.0, "momentum": 0.5, "momentum_decay": 0.7}
    payload = Guard("guidance", ("cat",), settings)
    pipe.load_patch(Patch(payload=payload, method="test", concepts=[{"name": "cat"}]))
    pipe.load_patch(guard("cat", padding=True))
    plain, concept = read(pipe, ["a red cat"])
    base = Base("", pipe)
    assert torch.equal(concept, base.encode(["cat"])) and not torch.equal(plain[1], base.encode(["a red cat"])[0])


def test_reattention_costs_a_row_and_a_scale_of_one_changes_nothing():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    prompts = ["a red cat", "dog"]
    base, rows = latents(pipe, prompts), []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = []
    for settings in ({}, {"reattention": True, "wide_scale": 1.0, "narrow_scale": 1.0}, {"reattention": True}):
        rows.clear()
        pipe.load_patch(guard("cat", padding=True, margin=0.05, **settings))
        found.append(latents(pipe, prompts))
        pipe.unload_patches()
        assert rows == ([1, 4, 1, 4] if settings else [4, 4])
    handle.remove()
    assert torch.allclose(found[0], found[1], atol=1e-5) and not torch.allclose(found[0], found[2], atol=1e-4)
    assert all(torch.equal(pair[1], base[1]) for pair in found)  # no trigger: every bit


def test_on_xl_each_encoder_filters_its_own_states_and_the_pooled_text():
    pipe = tiny_pipeline(ErasedStableDiffusionXLPipeline, kind="sdxl")
    plain = Base("", pipe).conditions(["a red cat"])
    pooled = []
    handle = pipe.unet.add_embedding.register_forward_pre_hook(lambda module, args: pooled.append(args[0][:, :24]))
    pipe.load_patch(guard("cat", margin=0.0))
    found = read(pipe, ["a red cat"], steps=2)[0][1]
    handle.remove()
    moved = (found - plain.states[0]).abs() > 1e-3
    # By chance of these weights, the triggers of the first encoder are "a" and "red", that of the second is "cat".
    assert [place for place in range(12) if moved[place, :32].any()] == [1, 2]
    assert [place for place in range(12) if moved[place, 32:].any()] == [3]
    assert not torch.allclose(pooled[0][1], plain.pooled[0], atol=1e-3)
    pipe.unload_patches()
    pipe.load_patch(guard("cat", margin=0.2, padding=True))
    second = read(pipe, ["a red cat"], steps=2)[0][1]
    assert torch.equal(second[:, :32], plain.states[0][:, :32])  # the first encoder has no trigger any more
    assert (second[4:, 32:] != plain.states[0][4:, 32:]).any(1).all()
    with torch.no_grad():
        concept = pipe.text_encoder_2(token_ids(pipe.tokenizer_2, ["cat"]))[0][0]
    assert abs(float(pooled[0][1] @ concept)) < 1e-3 * float(concept.norm() * pooled[0][1].norm())


def test_it_needs_the_words():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    states = Base("", pipe).encode(["a red cat", ""])
    pipe.load_patch(guard("cat", padding=True), name="cat")
    named = latents(pipe, ["a red cat"])
    options = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:], "output_type": "latent"}
    options |= {"num_inference_steps": 2, "guidance_scale": 7.5}
    noise = torch.Generator().manual_seed(0)
    with pytest.raises(ErasureError, match="'cat'.*reads the words of the prompt.*erasure_prompts"):
        pipe(**options)
    pipe.fuse_patches()
    with pytest.raises(ErasureError, match="'cat'.*reads the words of the prompt"):
        pipe(**options)
    found = pipe(**options, erasure_prompts=["a red cat"], generator=noise).images
    assert torch.allclose(found, named, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_other_networks_are_refused(kind):
    import erasure.pipelines as pipelines

    names = {"sd3": "ErasedStableDiffusion3Pipeline", "pixart": "ErasedPixArtSigmaPipeline"}
    pipe = tiny_transformer(kind, getattr(pipelines, names[kind]))
    with pytest.raises(ErasureError, match="is a guard of the form tokens.*state at its end token"):
        pipe.load_patch(guard("cat"))
