"""AdvUnlearn's objectives against their formulas, its pools, its layers and its published loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.advunlearn import AdvUnlearn, plain, trained
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.model.soft_prompt import encode
from erasure.model.trajectories import walk
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.training.run import Run
from tests.tiny import tiny_pipeline, tiny_text_encoder

SMALL = {
    "iterations": 3,
    "batch_size": 2,
    "trajectories": 2,
    "sample_steps": 4,
    "retain_trajectories": 4,
    "retain_sample_steps": 3,
    "retain_batch_size": 3,
    "attack_steps": 2,
    "attack_tokens": 2,
    "warm_up": 0,
    "learning_rate": 1e-2,
}


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def moved(method: AdvUnlearn, base: Base):
    """A state whose encoder has left the base."""
    state = method.prepare(base, [Concept("cat")], Run(seed=2, progress=False))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.05 * torch.randn(param.shape, generator=draw))
    return state


def test_the_attack_is_the_formula(base):
    state = moved(method := dataclasses.replace(AdvUnlearn(), **SMALL), base)
    vectors = torch.randn(1, 32)
    loss = method.attack_loss(state, 0, vectors, torch.Generator().manual_seed(5))
    batch = method.concept(state, 0, torch.Generator().manual_seed(5))
    texts = encode(base.pipe.text_encoder, state.places[0], vectors).expand(2, -1, -1)
    with torch.no_grad():
        attacked = base.unet(batch.x, batch.t, texts).sample
        with state.adapter.off():
            concept = base.unet(batch.x, batch.t, base.encode(["cat", "cat"])).sample
    assert torch.allclose(loss, ((attacked - concept) ** 2).mean(), rtol=1e-4)
    state.adapter.remove()


def test_the_loss_is_the_formula_with_the_attack_found(base):
    method = dataclasses.replace(AdvUnlearn(), **SMALL, negative_guidance=1.5, retain_weight=0.4, attack_init="latest")
    state = moved(method, base)
    before = state.latest[0].clone()
    terms = method.loss(state, 1)
    vectors = state.latest[0]
    assert not torch.equal(before, vectors)
    draw = torch.Generator().manual_seed(2 * 1_000_003 + 1)
    torch.randint(1, (1,), generator=draw)
    for _ in range(2):  # the attack's batches
        method.concept(state, 0, draw)
    batch, kept = (
        method.concept(state, 0, draw),
        state.retain.take(torch.randint(len(state.retain), (3,), generator=draw)),
    )
    words = [state.kept[int(i)] for i in kept.pair]
    with torch.no_grad():
        output = base.unet(batch.x, batch.t, encode(base.pipe.text_encoder, state.places[0], vectors).expand(2, -1, -1))
        held = base.unet(kept.x, kept.t, base.pipe.text_encoder(plain(base, words).ids)[0]).sample
        with state.adapter.off():
            e_c, e_n = (base.unet(batch.x, batch.t, base.encode([text] * 2)).sample for text in ("cat", ""))
            still = base.unet(kept.x, kept.t, base.encode(words)).sample
    assert torch.allclose(terms["erase"], ((output.sample - (e_n - 1.5 * (e_c - e_n))) ** 2).mean(), rtol=1e-3)
    assert torch.allclose(terms["retain"], 0.4 * ((held - still) ** 2).mean(), rtol=1e-3)
    state.adapter.remove()


@pytest.mark.parametrize("parity", [False, True])
def test_the_published_attack_adds_its_gradients_up_and_drops_its_last_step(base, monkeypatch, parity):
    """Each attack step's gradient is known here: 1, then -0.9; what Adam makes of them tells how they were kept."""
    method = dataclasses.replace(AdvUnlearn(), **{**SMALL, "attack_steps": 3, "attack_init": "latest"}, parity=False)
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    method, slopes = dataclasses.replace(method, parity=parity), iter([1.0, -0.9, 0.5])
    monkeypatch.setattr(AdvUnlearn, "attack_loss", lambda self, state, number, d, draw: next(slopes) * d.sum())
    first = state.latest[0].clone()
    method.loss(state, 0)
    given = torch.tensor([1.0, -0.9, 0.5])
    moved = torch.zeros(1, requires_grad=True)
    adam, rate = torch.optim.Adam([moved], lr=method.attack_rate * state.unit), []
    for gradient in given.cumsum(0) if parity else given:
        rate.append(float(moved.detach()))
        moved.grad = gradient.reshape(1)
        adam.step()
    expected = rate[-1] if parity else float(moved.detach())
    assert torch.allclose(state.latest[0] - first, torch.full_like(first, expected), rtol=1e-3)
    state.adapter.remove()


def test_the_pool_is_what_sampling_anew_would_give(base):
    """Same seed and step: the same latents, timestep and answers, and so the same loss."""
    method = dataclasses.replace(AdvUnlearn(), **SMALL)
    state = method.prepare(base, [Concept("cat")], Run(seed=2, progress=False))
    options = {"steps": 4, "guidance": method.trajectory_guidance}
    for index in (0, 3, 5):
        trajectory, k = index % 2, index // 2
        live = walk(base, [("cat", "")], seeds=[2 * 10_007 + trajectory], stop=k, **options)
        pooled = state.pool.take(torch.tensor([index]))
        assert torch.equal(live.t, pooled.t)
        for name in ("x", "neutral", "concept"):
            assert torch.allclose(getattr(live, name), getattr(pooled, name), atol=1e-5), name
    state.adapter.remove()


def test_the_loss_over_the_pool_is_the_loss_over_live_sampling(base):
    """Oracle 6 of the digest: same seed, state and timestep, one value; another state gives another."""
    method = dataclasses.replace(AdvUnlearn(), **{**SMALL, "batch_size": 1, "trajectories": 1, "sample_steps": 3})
    state, index = moved(method, base), 2
    state.pool = state.pool.take(torch.tensor([index]))
    vectors = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    pooled = method.attack_loss(state, 0, vectors, torch.Generator())
    for k in range(3):
        with state.adapter.off():
            live = walk(base, [("cat", "")], seeds=[2 * 10_007], stop=k, steps=3, guidance=method.trajectory_guidance)
        texts = encode(base.pipe.text_encoder, state.places[0], vectors)
        with torch.no_grad():
            again = ((base.unet(live.x, live.t, texts).sample - live.concept) ** 2).mean()
        assert torch.allclose(pooled, again, rtol=1e-4) == (k == index)
    state.adapter.remove()


def test_only_the_text_encoders_first_layers_change(base):
    patch = erase(base, "cat", "advunlearn", progress=False, **SMALL, layers=1)
    assert patch.components == ["text_encoder"]
    assert all(".layers.0." in name for name in patch.payload.names("text_encoder"))
    everything = erase(base, "cat", "advunlearn", progress=False, **SMALL, layers=None)
    names = everything.payload.names("text_encoder")
    assert any(".layers.1." in name for name in names) and any("final_layer_norm" in name for name in names)
    assert not any("embedding" in name for name in names)


def test_layer_1_is_not_layer_10():
    from transformers import CLIPTextModel

    config = tiny_text_encoder().config
    config.num_hidden_layers = 12
    modules = trained(CLIPTextModel(config), 2)
    assert {path.split("layers.")[1].split(".")[0] for path in modules} == {"0", "1"}


@pytest.mark.parametrize(
    ("layers", "norm", "there"), [(1, None, False), (1, True, True), (None, None, True), (None, False, False)]
)
def test_the_final_norm_is_a_setting(layers, norm, there):
    assert any("final_layer_norm" in path for path in trained(tiny_text_encoder(), layers, norm)) == there


def test_content_trains_every_layer():
    assert configure("advunlearn", "object").layers == 1
    content = configure("advunlearn", "content")
    assert content.layers is None and content.retain_weight == 0.3


def test_the_users_prompts_and_file_are_what_is_retained(base, tmp_path):
    file = tmp_path / "keep.csv"
    file.write_text('case_num,source,prompt\n0,x,a photo of a dog\n1,x,"a Cat, in red"\n2,x,a category\n3,x,\n')
    method = dataclasses.replace(AdvUnlearn(), **SMALL, retain=("a car",), retain_file=str(file))
    state = method.prepare(base, [Concept("cat", keep=("tree",))], Run(progress=False))
    assert state.kept == ["a car", "tree", "a photo of a dog", "a category"]
    assert len(state.retain) == 4 * 3 and state.retain.pair.unique().tolist() == [0, 1, 2, 3]
    state.adapter.remove()


def test_a_style_leaves_its_subjects_and_is_attacked_on_them(base, monkeypatch):
    monkeypatch.setattr(
        "erasure.concepts.concept.CARRIERS", ("a dog", "a car")
    )  # others are too long for the tiny window
    style = Concept("van gogh", kind="style")
    method = dataclasses.replace(AdvUnlearn(), **SMALL)
    state = method.prepare(base, [style], Run(progress=False))
    assert ("a dog in van gogh style", "a dog") in state.pairs and len(state.places) == len(state.pairs)
    number = state.pairs.index(("a dog in van gogh style", "a dog"))
    batch = method.concept(state, number, torch.Generator().manual_seed(0))
    with torch.no_grad(), state.adapter.off():
        neutral = base.unet(batch.x, batch.t, base.encode(["a dog"] * 2)).sample
    assert torch.allclose(batch.neutral, neutral, atol=1e-5)
    assert not any("van gogh" in text for text in state.kept)
    state.adapter.remove()


def test_the_base_of_the_attack_stays_frozen(base):
    """Neither the UNet nor the token embeddings collect gradients."""
    method = dataclasses.replace(AdvUnlearn(), **SMALL)
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    torch.stack(list(method.loss(state, 0).values())).sum().backward()
    trained_tensors = {id(param) for param in state.adapter.parameters().values()}
    both = [*base.unet.parameters(), *base.pipe.text_encoder.parameters()]
    assert all((param.grad is not None) == (id(param) in trained_tensors) for param in both)
    state.adapter.remove()


def test_an_update_costs_what_the_docstring_says(base):
    method, costs = dataclasses.replace(AdvUnlearn(), **SMALL), Counts()
    state = method.prepare(base, [Concept("cat")], Run(seed=2, progress=False))
    with counting(base.unet, costs):
        torch.stack(list(method.loss(state, 0).values())).sum().backward()
    assert (costs.forward, costs.backward) == (2 * 2 + 2 + 3, 2 * 2 + 2 + 3)
    state.adapter.remove()


def test_no_attack_during_warm_up(base):
    method, costs = dataclasses.replace(AdvUnlearn(), **{**SMALL, "warm_up": 2}), Counts()
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    with counting(base.unet, costs):
        method.loss(state, 1)
        assert costs.forward == 5
        method.loss(state, 2)
    assert costs.forward == 5 + 9
    state.adapter.remove()


def test_parity_samples_anew_for_every_loss(base):
    method = configure("advunlearn", "object", {"parity": True, "warm_up": 0, "attack_steps": 2, "sample_steps": 6})
    assert (method.iterations, method.batch_size, method.retain_batch_size, method.learning_rate) == (1000, 1, 5, 1e-5)
    state, costs = method.prepare(base, [Concept("cat")], Run(progress=False)), Counts()
    with counting(base.unet, costs):
        method.loss(state, 0)
    # Two attack steps and one update, each from a walk of at least a step, the retain walk for five prompts.
    least = 2 * (2 + 2 + 1) + (2 + 2 + 1) + 5 * (2 + 2 + 1)
    assert costs.forward >= least and state.pool is None
    state.adapter.remove()


def test_the_patch_goes_onto_any_pipeline_with_the_encoder():
    patch = erase(tiny_pipeline(), "cat", "advunlearn", progress=False, **SMALL)
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    pipe.load_patch(patch)
    assert any(not torch.equal(before[name], value) for name, value in pipe.text_encoder.state_dict().items())
    pipe.unload_patches()
    assert all(torch.equal(before[name], value) for name, value in pipe.text_encoder.state_dict().items())


def test_parity_keeps_the_published_tokens_and_layers():
    method = configure("advunlearn", "object", {"parity": True})
    assert (method.layers, method.attack, method.attack_tokens, method.attack_init) == (1, "prefix", 1, "random")
    assert (method.attack_steps, method.warm_up, method.retain_weight) == (30, 200, 0.5)
    assert method.attack_rate == 1e-3
    nudity = configure("advunlearn", "content", {"parity": True})
    assert (nudity.layers, nudity.retain_weight, nudity.iterations) == (None, 0.3, 1000)


@pytest.mark.parametrize("parity", [False, True])
def test_parity_steps_in_the_embeddings_own_units_and_adds_random_tokens(base, parity):
    quirks = {"parity": True, "attack_steps": 2, "warm_up": 0, "sample_steps": 4} if parity else {**SMALL}
    method = configure("advunlearn", "object", {**quirks, "attack": "add", "attack_init": "latest"})
    concept = Concept("red cat", kind="style" if parity else "object")
    state = method.prepare(base, [concept], Run(seed=1, progress=False))
    assert state.pairs == [("red cat", "")]  # in parity mode the bare name, whatever the kind
    table, first = base.pipe.text_encoder.get_input_embeddings().weight, state.latest[0].clone()
    assert len(first) == 2 and all((table == vector).all(1).any() for vector in first) if parity else not first.any()
    method.loss(state, 0)
    moved = (state.latest[0] - first).abs().max()  # Adam's first step is the rate; the second does not count in parity
    unit = 1e-3 if parity else 2 * 0.5 * float(table.std())
    assert 0.5 * unit < moved < 1.01 * unit
    state.adapter.remove()


def test_parity_shares_t_and_goes_through_the_retain_prompts(base):
    method = configure("advunlearn", "object", {"parity": True, "sample_steps": 4, "retain_batch_size": 5})
    state = method.prepare(base, [Concept("cat")], Run(seed=1, progress=False))
    state.kept = state.kept[:12]  # two batches of five, then a new order
    seen = []
    for step in range(3):
        batch, kept = method.states(state, 0, step, torch.Generator().manual_seed(step))
        assert len({*batch.t.tolist(), *kept.t.tolist()}) == 1
        assert len(batch) == 1 and not torch.equal(batch.x[0], kept.x[0])
        words = [state.kept[int(i)] for i in kept.pair]
        with torch.no_grad():
            expected = base.unet(kept.x, kept.t, base.encode(words)).sample
        assert torch.allclose(kept.concept, expected, atol=1e-5)
        seen.append(kept.pair.tolist())
    assert len({*seen[0], *seen[1]}) == 10 and len(set(seen[2])) == 5
    state.adapter.remove()


def test_parity_gives_the_vectors_from_before_the_last_update(base):
    """K = 1 is no attack at all in the published code."""
    quirks = {"parity": True, "warm_up": 0, "attack_steps": 1, "sample_steps": 4, "attack_init": "latest"}
    method = configure("advunlearn", "object", quirks)
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    before = state.latest[0].clone()
    method.loss(state, 0)
    assert torch.equal(before, state.latest[0])
    method = dataclasses.replace(method, parity=False, trajectories=1, **{k: SMALL[k] for k in SMALL if "retain" in k})
    state.adapter.remove()
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    method.loss(state, 0)
    assert not torch.equal(before, state.latest[0])
    state.adapter.remove()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"layers": 9}, "has 2"),
        ({"attack": "infix"}, "prefix"),
        ({"attack_init": "last"}, "latest"),
        ({"attack_tokens": 40}, "there is room"),
        ({"retain_batch_size": 0}, "at least 1"),
        ({"retain": ["a red cat"]}, "names what is to be erased"),
        ({"retain": ["van gogh " * 20]}, "the text encoder reads"),
        ({"retain_file": "nowhere.csv"}, "cannot be read"),
    ],
)
def test_settings_that_make_no_sense(base, setting, message):
    with pytest.raises(ErasureError, match=message):
        erase(base, "cat", "advunlearn", progress=False, **{**SMALL, **setting})


def test_no_retain_prompts_is_an_error(base, monkeypatch):
    monkeypatch.setattr("erasure.concepts.neighbors.retained", lambda base, concepts: [])
    with pytest.raises(ErasureError, match="no retain prompts"):
        erase(base, "cat", "advunlearn", progress=False, **SMALL)


def test_a_file_without_prompts_is_an_error(base, tmp_path):
    file = tmp_path / "keep.csv"
    for content, message in (
        ("id,text\n1,a dog\n", "column 'prompt' is missing; it has id, text"),
        ("prompt\n", "no ret"),
    ):
        file.write_text(content)
        with pytest.raises(ErasureError, match=message):
            erase(base, "cat", "advunlearn", progress=False, **SMALL, retain_file=str(file))
