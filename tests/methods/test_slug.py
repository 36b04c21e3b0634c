"""SLUG: its gradients, choice and step against their formulas, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure, slug
from erasure.methods.slug import Seen, Slug, Texts, forget_loss, fronts, gradients, matrices, smallest
from erasure.model.base import Base
from erasure.model.clip_towers import contrastive, load_towers
from tests.tiny import tiny_pipeline, write_tiny_clip

RIVALS = ["dog", "car", "tree", "red church", "blue van"]
DRAW = {"forget_count": 3, "retain_count": 4, "sample_steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


@pytest.fixture
def opened(base, folder):
    """The text tower over the base's encoder, pictures that show a cat, and the matrices."""
    towers = load_towers(base, folder)
    with matrices(towers, base.pipe.text_encoder) as weights:
        texts = Texts(base, towers, RIVALS)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            own = texts.read(["cat"]) - texts.read(RIVALS).mean(0)
            noise = 0.1 * torch.randn(6, own.shape[1], generator=draw)
            images = F.normalize(F.normalize(own, dim=-1) + noise, dim=-1)
        yield texts, weights, Seen(images, ["cat"])


def plain_loss(base, folder, images, captions, scale=None):
    """The losses from transformers' own CLIP, with the base's weights copied into its text tower."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder)
    state = {name.removeprefix("text_model."): p for name, p in base.pipe.text_encoder.state_dict().items()}
    own = {name.removeprefix("text_model."): name for name in clip.text_model.state_dict()}
    clip.text_model.load_state_dict({own[name]: p.clone() for name, p in state.items() if name in own})
    ids = base.pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    read = clip.text_projection(clip.text_model(ids).pooler_output)
    cos = F.cosine_similarity(images[:, None], read[None], dim=-1)
    if scale is None:
        loss = (1 - cos.diagonal()).mean()
    else:
        logits = scale * cos
        loss = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    loss.backward()
    return {name.removeprefix("text_model."): p.grad for name, p in clip.text_model.named_parameters()}


def test_the_forget_gradient_is_that_of_the_cosines(base, folder, opened):
    texts, weights, seen = opened
    found = gradients([lambda: forget_loss(seen.images, texts.read(seen.captions()))], weights)
    right = plain_loss(base, folder, seen.images, ["cat"] * 6)
    assert len(found) == 12 and all(torch.allclose(found[name], right[name], atol=1e-6) for name in found)
    assert all(weight.grad is None for weight in weights.values())


def test_the_retain_gradient_is_that_of_clips_loss_alone(base, folder, opened):
    """Of the whole set, batch by batch, whatever was differentiated before: nothing is left from the forget loss."""
    texts, weights, seen = opened
    gradients([lambda: forget_loss(seen.images, texts.read(seen.captions()))], weights)
    prompts, images = ["dog", "car", "tree", "a red church"], seen.images[:4]
    found = Slug(batch_size=2).retain_gradients(texts, weights, images, prompts)
    parts = [
        plain_loss(base, folder, images[part], [prompts[i] for i in part], texts.towers.scale)
        for part in ([0, 1], [2, 3])
    ]
    for name in found:
        assert torch.allclose(found[name], (parts[0][name] + parts[1][name]) / 2, atol=1e-6)
    assert (
        float(contrastive(torch.eye(3), torch.eye(3), 50.0))
        < 1e-6
        < float(contrastive(torch.eye(3), torch.eye(3), 1.0))
    )


def test_a_step_raises_the_loss_as_the_gradient_says_and_none_is_the_base(base, opened):
    texts, weights, seen = opened
    loss = lambda: forget_loss(seen.images, texts.read(seen.captions()))  # noqa: E731
    found = gradients([loss], weights)
    name = "encoder.layers.1.mlp.fc2.weight"
    own = weights[name].data.clone()
    with torch.no_grad():
        before, s = float(loss()), 1e-2
        with slug.moved(weights, {name: found[name]}, 0.0):
            assert float(loss()) == before
        with slug.moved(weights, {name: found[name]}, s):
            rise = float(loss()) - before
    assert rise == pytest.approx(s * float(found[name].square().sum()), rel=0.02) and rise > 0
    assert torch.equal(weights[name].data, own)


def test_margins_are_the_best_name_against_the_best_other_word(opened):
    texts, _, seen = opened
    seen = Seen(seen.images, ["cat", "a cat"])
    with torch.no_grad():
        read = texts.read(["cat", "a cat", *RIVALS]).numpy()
    fits = seen.images.numpy() @ read.T
    right = np.maximum(fits[:, 0], fits[:, 1]) - fits[:, 2:].max(1)
    assert np.abs(texts.margins(seen).numpy() - right).max() < 1e-6
    assert seen.captions() == ["cat", "a cat"] * 3


def test_the_front_is_what_nothing_beats_in_both():
    rng = np.random.default_rng(0)
    scores = {str(i): (float(a), float(b)) for i, (a, b) in enumerate(rng.random((40, 2)))}
    left, found = dict(scores), list(fronts(scores))
    for front in found:
        best = {n for n, (s, a) in left.items() if all(not (t > s and b < a) for t, b in left.values())}
        assert set(front) == best
        left = {n: score for n, score in left.items() if n not in best}
    assert not left and len(found) > 2
    assert list(fronts({"a": (1.0, 0.5), "b": (1.0, 0.4), "c": (0.5, 0.4)})) == [["b"], ["a", "c"]]


NAMES = {
    "encoder.layers.0.self_attn.v_proj.weight": (0.9, 0.5),
    "encoder.layers.1.self_attn.q_proj.weight": (0.5, 0.1),
    "encoder.layers.1.mlp.fc1.weight": (0.4, 0.3),
    "encoder.layers.1.mlp.fc2.weight": (0.3, 0.2),
}


def scored(names):
    """Weights and gradients with given importance and alignment."""
    weights = {name: torch.tensor([[1.0, 0.0]]) for name in names}
    found = {name: torch.tensor([[size, 0.0]]) for name, (size, _) in names.items()}
    against = {name: torch.tensor([[cos, (1 - cos**2) ** 0.5]]) for name, (_, cos) in names.items()}
    return weights, found, against


def test_the_deepest_part_on_the_front_is_chosen_and_taken_ones_are_left():
    """The first front holds layers 0 and 1's queries; the MLP is deeper, but behind them."""
    method, parts = Slug(prefer="deepest"), scored(NAMES)
    assert Slug(prefer="shallowest").choices(*parts, set())[0] == "layers.0.qkv"
    assert Slug(prefer="shallowest").choices(*parts, {"layers.0.qkv"})[0] == "layers.1.qkv"
    assert method.choices(*parts, set())[0] == "layers.1.qkv"
    assert method.choices(*parts, {"layers.1.qkv"})[0] == "layers.0.qkv"
    assert method.choices(*parts, {"layers.1.qkv", "layers.0.qkv"})[0] == "layers.1.mlp"
    assert method.choices(*parts, set()) == ["layers.1.qkv", "layers.0.qkv", "layers.1.mlp"]
    assert method.choices(*parts, {"layers.1.qkv", "layers.0.qkv", "layers.1.mlp"}) == []
    assert dataclasses.replace(method, layer="layers.1.mlp").choices(*parts, set())[0] == "layers.1.mlp"
    with pytest.raises(ErasureError, match="layer='layers.7.mlp': must be one of layers.0.qkv"):
        dataclasses.replace(method, layer="layers.7.mlp").choices(*parts, set())


def test_the_sign_of_the_alignment_does_not_count():
    weights, found, against = scored(NAMES)
    turned = {name: -gradient for name, gradient in against.items()}
    assert Slug(prefer="deepest").choices(weights, found, turned, set())[0] == "layers.1.qkv"


@pytest.mark.parametrize("least", [0.03, 0.1, 0.9])
def test_the_smallest_sufficient_step_is_found(least):
    tried = []

    def gone(s):
        tried.append(s)
        return s >= least

    found = smallest(gone, 0.1, 10)
    assert least <= found < least + 0.1 * least + 1e-4 and tried[0] == 0.1
    assert smallest(lambda s: s >= least, 0.1, 0) == 0.1 * 2 ** max(0, int(np.ceil(np.log2(least / 0.1) - 1e-9)))
    assert smallest(lambda s: False, 0.1, 10) is None


def test_after_the_change_no_picture_is_taken_for_the_concept_and_a_smaller_step_leaves_one(base, opened, caplog):
    texts, weights, seen = opened
    against = {name: torch.ones_like(weight) for name, weight in weights.items()}
    before = {name: weight.data.clone() for name, weight in weights.items()}
    assert (texts.margins(seen) > 0).all()
    with caplog.at_level(logging.INFO, "erasure"):
        changes = Slug(margin=0.002, beyond=1.0).changes(texts, weights, seen, against, set())
    assert "CLIP takes 0 of 6 pictures for it, before 6" in caplog.text
    assert all(torch.equal(weight.data, before[name]) for name, weight in weights.items())
    parts = {slug.part_of(name) for name in changes}
    assert len(parts) == 1 and len(changes) == {"qkv": 3, "mlp": 2, "out_proj": 1}[parts.pop().split(".")[-1]]
    for factor, gone in ((1.0, True), (0.98, False)):
        with slug.moved(weights, changes, factor):
            assert bool((texts.margins(seen) <= -0.002).all()) == gone
    losses = []
    for factor in (-0.05, 0.0, 0.05):
        with torch.no_grad(), slug.moved(weights, changes, factor):
            losses.append(float(forget_loss(seen.images, texts.read(seen.captions()))))
    assert losses == sorted(set(losses))
    further = Slug(margin=0.002, beyond=2.0).changes(texts, weights, seen, against, set())
    assert all(torch.allclose(further[name], 2 * changes[name]) for name in changes)


def test_where_no_step_suffices_the_next_part_is_tried(opened, monkeypatch):
    texts, weights, seen = opened
    against = {name: torch.ones_like(weight) for name, weight in weights.items()}
    real, tried = Slug.searched, []

    def searched(self, *rest):
        tried.append({slug.part_of(name) for name in rest[3]}.pop())
        return None if len(tried) < 3 else real(self, *rest)

    monkeypatch.setattr(Slug, "searched", searched)
    changes = Slug().changes(texts, weights, seen, against, set())
    assert len(set(tried)) == 3 and {slug.part_of(name) for name in changes} == {tried[-1]}
    monkeypatch.setattr(Slug, "searched", lambda self, *rest: None)
    with pytest.raises(ErasureError, match="'cat': CLIP still takes pictures.*6 times, in layers.*nothing was changed"):
        Slug().changes(texts, weights, seen, against, set())
    with pytest.raises(ErasureError, match="in no part, because other concepts change all of them. Erase fewer"):
        Slug().changes(texts, weights, seen, against, {slug.part_of(name) for name in weights})


def test_a_given_step_is_a_share_of_the_weights(base, opened):
    texts, weights, seen = opened
    against = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    changes = Slug(step=0.25, layer="layers.0.qkv").changes(texts, weights, seen, against, set())
    own = [weights[name] for name in changes]
    assert len(changes) == 3
    assert slug.length(list(changes.values())) == pytest.approx(0.25 * slug.length(own), rel=1e-5)


def test_pictures_that_clip_does_not_recognise_are_refused(opened):
    texts, weights, seen = opened
    found = {name: torch.ones_like(weight) for name, weight in weights.items()}
    with pytest.raises(ErasureError, match="does not recognise 'cat' on any of the 6 pictures.*nothing was changed"):
        Slug().changes(texts, weights, Seen(-seen.images, ["cat"]), found, set())


def test_several_concepts_change_several_parts_each_from_the_bases_weights(folder):
    pipe, settings = tiny_pipeline(), {**DRAW, "clip": folder, "step": 0.1, "progress": False}
    both = erase(pipe, ["cat", "dog"], "slug", **settings).payload
    parts = {slug.part_of(name) for name in both.names("text_encoder")}
    assert len(parts) == 2 and both.components == ["text_encoder"]
    texts = copy.deepcopy(pipe.text_encoder.state_dict())
    assert all(torch.equal(value, pipe.text_encoder.state_dict()[name]) for name, value in texts.items())


def test_the_change_does_not_depend_on_what_trains_or_was_left_in_the_encoder(folder):
    """Gradients that other code has left in the weights are not added."""
    settings = {**DRAW, "clip": folder, "step": 0.1, "progress": False}
    pipe = tiny_pipeline()
    plain = erase(pipe, "cat", "slug", **settings).payload
    for param in pipe.text_encoder.parameters():
        param.grad = torch.ones_like(param)
    again = erase(pipe, "cat", "slug", **settings).payload
    assert plain.digest == again.digest


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"margin": -0.1}, "margin=-0.1: must be between 0 and 2"),
        ({"step": 0}, "step.*above 0"),
        ({"retain_count": 1}, "retain_count.*at least 2"),
        ({"clip": "nowhere"}, "nowhere is not on this machine"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ErasureError, match=says):
        erase(tiny_pipeline(), "cat", "slug", progress=False, **settings)


def test_published_settings_on_stable_diffusion():
    from erasure.model import presets

    for family in ("sd1", "sd2"):
        method = configure("slug", "object", family=presets.Family(presets.find(family), "as asked for"))
        assert (method.first_step, method.bisections, method.margin, method.beyond) == (0.1, 10, 0.0, 1.0)
        assert method.layer is None and method.prefer == "deepest"
