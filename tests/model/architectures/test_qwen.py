"""Qwen-Image as the toolkit calls it, against diffusers' own pipeline; erasing from it, and its files in diffusers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline

from erasure.concepts import neighbors, token_states
from erasure.concepts.concept import Concept
from erasure.concepts.similarity import similarities
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.formats import export_patch, import_patch
from erasure.formats.transformer_keys import kind_of
from erasure.methods.esd import ESD
from erasure.methods.gem import GEM
from erasure.model.architectures.mmdit import pack, unpack
from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.loading import open_pipeline
from erasure.model.stochastic import sample, transitions
from erasure.model.trajectories import walk
from erasure.pipelines import ErasedQwenImagePipeline, load_patch, load_pipeline
from erasure.training.run import Run
from tests.tiny import SIDE, WIDTH
from tests.tiny_qwen import asked, tiny_qwen
from tests.tiny_transformers import tiny_transformer

SMALL = {"iterations": 2, "batch_size": 2, "trajectories": 2, "sample_steps": 3, "learning_rate": 1e-2}
KEPT = {"retain_trajectories": 2, "retain_batch_size": 3}
RUNS = {
    "esd": {**SMALL, "sampler": "euler"},
    "gem": {"iterations": 2, "early_steps": 2, "sample_steps": 3, "learning_rate": 1e-2, **KEPT},
    "eraseflow": {**SMALL, "last_steps": 1, "random_steps": 1, **KEPT},
    "spm": {**SMALL, "refresh": 1},
    "unguide": {**SMALL, "variant": "x", "decide_steps": 3, "decide_after": 1, "repeats": 2},
}
CAT = Concept("cat", anchor="dog", keep=("car",))
SIZE = {"height": 2 * SIDE, "width": 2 * SIDE, "output_type": "latent"}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "red cat"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)
    monkeypatch.setattr(token_states, "reference_texts", lambda: ["dog", "a tree", "the red car", "monet"])


def noise(count=1):
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def drawn(pipe, prompts, guidance=4.0, steps=3, **more):
    latents = torch.stack(
        [torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(5 + row)) for row in range(len(prompts))]
    )
    negative = {"negative_prompt": [" "] * len(prompts), "true_cfg_scale": guidance} if guidance else {}
    call = {"latents": pack(latents), "num_inference_steps": steps, **negative, **SIZE, **more}
    return unpack(pipe(prompts, **call).images, SIDE, SIDE)


def test_trajectories_end_where_the_pipeline_ends():
    """Noise, template, sigmas with their shift and end, and guidance agree; its result is as long as the prompt's."""
    pipe = tiny_qwen()
    base = Base("tiny", pipe)
    options = {"seeds": [5, 6], "steps": 3, "judged": False, "stop": 3}
    pairs = [("a cat", ""), ("a red car by the tree", "")]
    ours = walk(base, pairs, guidance=4.0, **options).x
    assert (ours - drawn(pipe, [text for text, _ in pairs])).abs().max() < 1e-4
    assert (ours - drawn(pipe, [text for text, _ in pairs], guidance=2.0)).abs().max() > 1e-2
    with torch.no_grad():
        x, t = noise(), torch.tensor([700.0])
        empty, named = (asked(pipe, x, t, text) for text in ("", "a cat"))
    plain = empty + 4.0 * (named - empty)
    tokens, wanted = pack(base.guided(empty, named, 4.0)), pack(plain)
    assert torch.allclose(tokens.norm(dim=-1), pack(named).norm(dim=-1), rtol=1e-4)
    assert torch.allclose(torch.cosine_similarity(tokens, wanted, dim=-1), torch.ones(1), atol=1e-5)
    assert not torch.allclose(tokens, wanted, rtol=1e-2)
    assert torch.allclose(base.guided(empty, named, 1.0), named, atol=1e-5)


def test_a_wide_image_is_drawn_alike():
    """The network is told height and width, and the sigmas are shifted for its number of tokens."""
    pipe, scale = tiny_qwen(), (0.5, 1.0)
    options = {"seeds": [5], "steps": 3, "judged": False, "stop": 3, "scale": scale}
    ours = walk(Base("tiny", pipe), [("a cat", "")], guidance=4.0, **options).x
    latents = torch.randn(1, 4, SIDE // 2, SIDE, generator=torch.Generator().manual_seed(5))
    call = {"latents": pack(latents), "num_inference_steps": 3, **SIZE, "height": SIDE}
    theirs = pipe("a cat", negative_prompt=" ", true_cfg_scale=4.0, **call).images
    assert ours.shape == latents.shape and torch.allclose(ours, unpack(theirs, SIDE // 2, SIDE), atol=1e-4)


def test_stochastic_trajectories_are_guided_alike():
    """The first transition of EraseFlow's sampler by hand."""
    pipe = tiny_qwen()
    base = Base("tiny", pipe)
    paths = sample(base, [("a cat", "a dog")], seeds=[3], steps=3, guidance=3.0)
    step, x = transitions(base, 3)[0], paths.x[:, 0]
    with torch.no_grad():
        empty, named = (asked(pipe, x, torch.tensor([step.t]), text) for text in ("", "a dog"))
    combined = pack(empty + 3.0 * (named - empty))
    velocity = unpack(
        combined * pack(named).norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True), SIDE, SIDE
    )
    draw = torch.Generator().manual_seed(3)
    torch.randn(4, SIDE, SIDE, generator=draw)
    after = step.mean(x, x - step.t / 1000 * velocity) + step.deviation * torch.randn(4, SIDE, SIDE, generator=draw)
    assert torch.allclose(paths.x[:, 1], after, atol=1e-4)


def test_it_is_told_the_pipelines_text_behind_the_template():
    pipe = tiny_qwen()
    dropped = pipe.prompt_template_encode_start_idx
    base, x, t = Base("tiny", pipe), noise(), torch.tensor([700.0])
    assert base.architecture.flow and base.latent_shape() == (4, SIDE, SIDE) and not base.distilled
    with torch.no_grad():
        for prompt in ("a cat", ""):
            assert torch.allclose(base.predict(x, t, base.conditions([prompt])), asked(pipe, x, t, prompt), atol=1e-6)
    whole = len(pipe.tokenizer(pipe.prompt_template_encode.format("a cat")).input_ids)
    assert base.conditions(["a cat"]).states.shape[1] == whole - dropped
    pipe.prompt_template_encode_start_idx = 0
    assert Base("tiny", pipe).conditions(["a cat"]).states.shape[1] == whole


def test_prompts_of_unlike_length_share_a_batch():
    """The shorter ones are padded and masked, so that each is answered as it is alone."""
    pipe = tiny_qwen()
    base, texts = Base("tiny", pipe), ["a cat", "a photo of a red car by the tree", ""]
    conditions = base.conditions(texts)
    assert conditions.mask.sum(1).unique().numel() == 3 and not conditions.states[0, -1].any()
    x, t = noise(3), torch.full((3,), 400.0)
    with torch.no_grad():
        together = base.predict(x, t, conditions)
        for row, text in enumerate(texts):
            assert torch.allclose(together[row : row + 1], asked(pipe, x[row : row + 1], t[:1], text), atol=1e-5), text
        unmasked = base.predict(x, t, Conditions(conditions.states))
    assert not torch.allclose(unmasked[0], together[0], atol=1e-4)
    with pytest.raises(ErasureError, match="without a mask cannot get 9"):
        Conditions(torch.zeros(1, 7, 2)).padded(9)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_leaves_the_base_as_it_was_and_costs_what_was_planned(method):
    base = Base("tiny", tiny_qwen())
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    forecast = plan(base, CAT, method, **RUNS[method])
    patch = erase(base, CAT, method, progress=False, **RUNS[method])
    assert all(torch.equal(before[name], value) for name, value in base.network.state_dict().items())
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"]) and patch.costs["B"] > 0
    modules = {name.rpartition(".")[0] for name in patch.payload.names("transformer")}
    assert patch.components == ["transformer"] and modules
    assert modules == set(base.targets("transformer" if method == "spm" else "x"))


@pytest.mark.parametrize("rank", [None, 2])
def test_esds_objective_is_its_formula(rank):
    """|v(c) - (v_0(n) - eta (v_0(c) - v_0(n)))|^2 of velocities, at states of the base."""
    pipe, eta = tiny_qwen(), 1.5
    method = dataclasses.replace(ESD(), **RUNS["esd"], rank=rank, negative_guidance=eta)
    state = method.prepare(Base("tiny", pipe), [CAT], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    batch, terms = method.tuples(state, 1), method.loss(state, 1)
    with torch.no_grad():
        v = asked(pipe, batch.x, batch.t, "cat")
        with state.adapter.off():
            v_c, v_n = (asked(pipe, batch.x, batch.t, text) for text in ("cat", "dog"))
    assert torch.allclose(terms["esd"], (v - (v_n - eta * (v_c - v_n))).square().mean(), rtol=1e-4)
    assert not torch.allclose(terms["esd"], (v - (v_n + eta * (v_c - v_n))).square().mean(), rtol=1e-2)
    terms["esd"].backward()
    state.adapter.remove()


def test_weights_of_samples_are_decided_by_the_velocity_that_the_sampler_followed():
    base = Base("tiny", tiny_qwen())
    method = dataclasses.replace(ESD(), **RUNS["esd"], reweight="static", trajectory_guidance=4.0)
    state = method.prepare(base, [CAT], Run(seed=3, progress=False))
    with torch.no_grad():
        batch, term = method.tuples(state, 1), method.loss(state, 1)["esd"]
    named, plain = pack(batch.concept), pack(batch.neutral + 4.0 * (batch.concept - batch.neutral))
    followed = plain * named.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)
    assert torch.allclose(term.own, (named - followed).square().flatten(1).mean(1), rtol=1e-4)
    state.adapter.remove()


def test_gems_objective_is_its_formula():
    pipe = tiny_qwen()
    method = dataclasses.replace(GEM(), **RUNS["gem"], retain_weight=0.0, gamma=10.0)
    state = method.prepare(Base("tiny", pipe), [CAT], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
        batch, loss = method.reached(state, 1), method.loss(state, 1)["erase"]
        v = asked(pipe, batch.x, batch.t, "cat")
        with state.adapter.off():
            v_c, v_a = (asked(pipe, batch.x, batch.t, text) for text in ("cat", "dog"))
    to_anchor, to_concept = ((v - other).flatten(1).norm(dim=1) for other in (v_a, v_c))
    assert torch.allclose(loss, 10 * (to_anchor - to_concept).clamp_min(0).mean(), rtol=1e-3) and loss > 0
    state.adapter.remove()


@pytest.mark.parametrize("rank", [None, 2])
def test_patches_load_as_weights_and_as_a_lora_of_plain_diffusers(rank, tmp_path):
    target = tmp_path / "cat.safetensors"
    patch = erase(Base("tiny", tiny_qwen()), CAT, "esd", out=target, progress=False, **RUNS["esd"], rank=rank)
    pipe = tiny_qwen(ErasedQwenImagePipeline)
    plain = drawn(pipe, ["a cat"])
    pipe.load_patch(target)
    erased = drawn(pipe, ["a cat"])
    assert not torch.allclose(erased, plain, atol=1e-4)
    if rank is not None:
        theirs = tiny_qwen()
        theirs.load_lora_weights(str(target))
        assert torch.allclose(drawn(theirs, ["a cat"]), erased, atol=1e-4)
        exported = export_patch(patch, tmp_path / "peft.safetensors", "peft").path
        back = import_patch(exported, model=tiny_qwen())
        for name in patch.payload.names("transformer"):
            ours, found = (one.payload.change("transformer", name) for one in (patch, back))
            assert torch.allclose(ours, found, atol=1e-5), name
    pipe.unload_patches()
    assert torch.equal(drawn(pipe, ["a cat"]), plain)


@pytest.mark.parametrize("images", [1, 2])
def test_a_text_gate_opens_for_the_prompt_alone_also_under_guidance(images):
    """Guidance reads the negative prompt in calls of its own, in which the gate stays as the prompt set it."""
    pipe = tiny_qwen(ErasedQwenImagePipeline)
    assert similarities(pipe, ["cat", "a cat"], ["cat"]) == [[1.0], [1.0]]
    patch = erase(Base("tiny", pipe), CAT, "spm", progress=False, **RUNS["spm"], gate_threshold=0.95)

    def draw(**more):
        draws = [torch.Generator().manual_seed(row) for row in range(2 * images)]
        call = {"generator": draws, "num_images_per_prompt": images, "num_inference_steps": 2, **SIZE, **more}
        return pipe(["a cat", "a church"], **call).images

    guided = {"true_cfg_scale": 3.0, "negative_prompt": ["cat", "cat"]}
    plain, plain_guided = draw(), draw(**guided)
    pipe.load_patch(patch, "gated")
    for base, found in ((plain, draw()), (plain_guided, draw(**guided))):
        assert [row["gated"] for row in pipe.gate_log] == [pytest.approx(1.0), 0.0]
        assert torch.equal(found[images:], base[images:]) and not torch.equal(found[:images], base[:images])


def test_the_latent_gate_decides_and_combines():
    """A ratio below what the LoRA does opens it: e_0 + (1 - w) (e_L - e_0) in every call; one above keeps each bit."""
    pipe, found = tiny_qwen(ErasedQwenImagePipeline), {}

    def draw():
        """The latents behind the first step, which are affine in the network's output, and the last ones."""
        steps = []
        last = drawn(
            pipe,
            ["a cat"],
            guidance=0,
            steps=2,
            callback_on_step_end=lambda *now: steps.append(now[3]["latents"]) or {},
        )
        return unpack(steps[0], SIDE, SIDE), last

    plain = draw()
    for ratio in (1e-6, 1e6):
        patch = erase(Base("tiny", pipe), CAT, "unguide", progress=False, **RUNS["unguide"], ratio=ratio, scale=40.0)
        pipe.load_patch(patch, "cat")
        found[ratio] = *draw(), pipe.gate_log[0]["cat"]
        pipe.fuse_patches()
        alone = draw()
        pipe.unload_patches()
    assert found[1e-6][2] == pytest.approx(2.0) and found[1e6][2] == 0.0
    assert torch.equal(found[1e6][1], plain[1]) and not torch.allclose(found[1e-6][1], plain[1], atol=1e-4)
    assert torch.allclose(found[1e-6][0], plain[0] + 2 * (alone[0] - plain[0]), atol=1e-5)
    assert not torch.allclose(alone[0], plain[0], atol=1e-4)


def test_its_folder_opens_as_a_base_and_as_an_erased_pipeline(tmp_path):
    tiny_qwen().save_pretrained(tmp_path)
    base = Base.load(tmp_path, device="cpu")
    assert base.architecture.name == "qwen-image" and type(base.pipe) is QwenImagePipeline
    assert type(load_pipeline(tmp_path, device="cpu")) is ErasedQwenImagePipeline
    with pytest.raises(ErasureError, match="FluxPipeline cannot hold it"):
        open_pipeline(FluxPipeline, tmp_path)
    with pytest.raises(ErasureError, match="settings for this checkpoint"):
        erase(base, CAT, "esd", progress=False)


def test_guidance_that_does_nothing_is_refused():
    pipe = tiny_qwen(ErasedQwenImagePipeline)
    embedded = {"negative_prompt_embeds": torch.zeros(1, 3, WIDTH), "true_cfg_scale": 0.5}
    for call, reason in (
        ({"negative_prompt": "dog", "true_cfg_scale": 1.0}, "negative_prompt does nothing at true_cfg_scale=1"),
        (embedded, "negative_prompt does nothing at true_cfg_scale=0.5"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale=4 does nothing without a negative prompt"),
        ({"guidance_scale": 3.5}, "guidance_scale does nothing"),
    ):
        with pytest.raises(ErasureError, match=reason):
            pipe("a cat", num_inference_steps=1, **SIZE, **call)
    assert Base("tiny", pipe).call(2, 4.0) == {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}
    pipe("a cat", num_inference_steps=2, **SIZE, **Base("tiny", pipe).call(1, 1.0))


def test_what_cannot_be_is_refused():
    with pytest.raises(ErasureError, match="zero_cond_t, which Qwen-Image has not"):
        Base.of(tiny_qwen(zero_cond_t=True))
    pipe = tiny_qwen()
    for method, reason in {"uce": "share one attention", "salun": "carried over", "adavd": "share one"}.items():
        with pytest.raises(ErasureError, match=f"{method} cannot erase from.*{reason}"):
            erase(Base("tiny", pipe), CAT, method, progress=False)
    base = Base("tiny", pipe)
    full = "cat" + " cat" * (512 - base.conditions(["cat"]).states.shape[1])
    assert base.conditions([full]).states.shape[1] == 512
    with pytest.raises(ErasureError, match="more than the 512 tokens"):
        base.conditions([full + " cat"])
    flux = erase(tiny_transformer("flux"), CAT, "esd", progress=False, **RUNS["esd"], rank=2)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    for force in (False, True):
        with pytest.raises(ErasureError, match="has 16 of the 22 layers"):
            load_patch(pipe, flux, force=force)
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())
    pipe.text_encoder = None
    with pytest.raises(ErasureError, match="lacks text_encoder"):
        Base.of(pipe)


@pytest.mark.parametrize("path", ["transformer_blocks.59.attn.to_q", "transformer_blocks.0.txt_mlp.net.2"])
def test_its_layers_are_not_taken_for_those_of_flux(path):
    """Both are 3072 wide and name their attention alike; kohya's names would be those of FLUX."""
    factors = {
        layer: (torch.ones(1, 3072), torch.ones(3072, 1), 1.0) for layer in ("transformer_blocks.0.attn.to_q", path)
    }
    with pytest.raises(ErasureError, match="FLUX.1 and Stable Diffusion 3 alone"):
        kind_of(factors)
    assert kind_of({"transformer_blocks.18.attn.to_q": factors["transformer_blocks.0.attn.to_q"]}) == "flux"
