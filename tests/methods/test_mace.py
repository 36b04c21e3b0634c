"""MACE: each stage against an independent derivation on the tiny checkpoint, and twins that must differ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.mace import LOOKED_AT, MACE, focal, shares, spanned
from erasure.model.attention_maps import AttentionMaps, sides
from erasure.model.base import Base
from erasure.model.closed_form import READERS
from erasure.model.diffusion import add_noise
from erasure.model.text_columns import Pair, places_of_name, states_beside_name
from erasure.training.run import Run
from tests.conformance.quick import QUICK
from tests.methods.encoding import states
from tests.tiny import LENGTH, tiny_pipeline

SMALL = {**QUICK["mace"], "rank": None, "ridge": 0.5}
CAT, DOG = Concept("cat", anchor="red dog", keep=("car",)), Concept("dog", anchor="car")


def started(concepts=(CAT,), seed=3, **settings):
    base = Base("tiny", tiny_pipeline())
    method = dataclasses.replace(MACE(), **{**SMALL, **settings})
    return base, method, method.prepare(base, list(concepts), Run(seed=seed, progress=False))


def lstsq(rows, wanted) -> np.ndarray:
    return np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0].T


def test_words_meet_around_the_name(base):
    """By hand: start a red cat end ... against start a red dog end ...; the name's own token is left out."""
    edit, guide = states_beside_name(base, Pair("a red cat", "cat", "a red dog"))
    assert places_of_name(base, Pair("a red cat", "cat")) == (3, 4)
    around = [0, 1, 2, *range(4, LENGTH)]
    assert np.allclose(edit.numpy(), states(base, "a red cat")[around], atol=1e-6)
    assert np.allclose(guide.numpy(), states(base, "a red dog")[around], atol=1e-6)
    edit, guide = states_beside_name(base, Pair("cat", "cat", "red dog"))
    assert np.allclose(edit.numpy(), states(base, "cat")[[0, *range(2, LENGTH - 1)]], atol=1e-6)
    assert np.allclose(guide.numpy(), states(base, "red dog")[[0, *range(3, LENGTH)]], atol=1e-6)
    empty = states_beside_name(base, Pair("a red cat", "cat", ""))
    assert len(empty[0]) == LENGTH - 3 and np.allclose(empty[1].numpy(), states(base, "")[: LENGTH - 3], atol=1e-6)


@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_the_refinement_is_least_squares(ridge):
    base, method, state = started(ridge=ridge, keep_weight=2.0)
    state.adapter.remove()
    cat, guide, car = states(base, "cat"), states(base, "red dog"), states(base, "car")[1:]
    edit, answer = cat[[0, *range(2, LENGTH - 1)]], guide[[0, *range(3, LENGTH)]]
    refined = method.refined(base, method.prompts(base, [CAT]), torch.from_numpy(car))
    change = (refined.left @ refined.right).numpy()
    for path, module in base.unet.named_modules():
        if path.endswith(READERS):
            weight = module.weight.detach().double().numpy()
            rows = [edit, np.sqrt(2) * car, np.sqrt(ridge) * np.eye(weight.shape[1])]
            wanted = [answer @ weight.T, np.sqrt(2) * car @ weight.T, np.sqrt(ridge) * weight.T]
            expected = lstsq(rows, wanted) - weight
            assert np.allclose(weight @ change, expected, atol=1e-4 * np.abs(expected).max())


def test_the_timesteps_follow_their_law(monkeypatch):
    """The drawn timesteps lie where eq. 8 says; and the latents are the picture's with that noise."""
    law = focal(1000)
    t = np.arange(1000)
    assert np.allclose(law, 1 / (1 + np.exp(-0.05 * (t - 200))) - 1 / (1 + np.exp(-0.05 * (t - 400))))
    base, method, state = started()
    seen = []

    def answer(x, times, conditions):
        seen.append((x, times))
        return torch.zeros_like(x)

    monkeypatch.setattr(base, "predict", answer)
    for own, low, high in ((method, 285, 315), (dataclasses.replace(method, focal=False), 440, 560)):
        seen.clear()
        for step in range(200):
            own.loss(state, step)
        times = torch.cat([times for _, times in seen]).double()
        assert low < times.mean() < high, times.mean()
        assert (abs(times - 300) < 140).double().mean() > 0.95 or not own.focal
    x, times = seen[0]
    a = base.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noise = (x[:, None] - a.sqrt()[:, None] * state.subjects[0].latents) / (1 - a).sqrt()[:, None]
    assert (abs(noise.flatten(2).std(2) - 1) < 0.3).any(1).all()  # of one of the pictures, it is unit noise
    state.adapter.remove()


def test_training_turns_the_object_away_from_the_name():
    """The loss of the same states falls, by each concept's own term; the refinement does not train."""
    base, method, state = started((CAT, DOG), learning_rate=1e-2)
    fixed = [param.clone() for param in state.adapter._fixed.parameters().values()]
    params = state.adapter.parameters()
    optimizer = torch.optim.Adam(params.values(), 5e-2)
    before = [float(method.loss(state, step)["attention"].detach()) for step in (0, 1)]
    for _ in range(15):
        optimizer.zero_grad()
        method.loss(state, 0)["attention"].backward()
        assert all((param.grad is not None) == name.startswith("0.") for name, param in params.items())
        optimizer.step()
    after = [float(method.loss(state, step)["attention"].detach()) for step in (0, 1)]
    assert after[0] < 0.8 * before[0] and after[1] == before[1]  # the other concept's states do not see this term
    assert all(torch.equal(a, b) for a, b in zip(fixed, state.adapter._fixed.parameters().values(), strict=True))
    state.adapter.remove()


def test_the_loss_is_that_of_the_mask(monkeypatch):
    """Nothing of the object: no loss; inverted or everywhere: another one."""
    base, method, state = started()
    subject, found = state.subjects[0], {}
    assert 0 < subject.where.double().mean() < 1  # the base's attention tells one part from another
    for name, where in (
        ("own", subject.where),
        ("inverted", ~subject.where),
        ("all", torch.ones_like(subject.where)),
        ("none", torch.zeros_like(subject.where)),
    ):
        subject.where = where
        found[name] = float(method.loss(state, 0)["attention"].detach())
    assert found["none"] == 0 and len({round(value, 6) for value in found.values()}) == 4
    assert max(found, key=found.get) == "all"
    state.adapter.remove()
    plain = started(mask="none")[2]
    assert plain.subjects[0].where.all()
    plain.adapter.remove()


def test_the_mask_lies_where_the_base_looks_at_the_name():
    base, method, state = started()
    subject, draw = state.subjects[0], torch.Generator().manual_seed(3 * 1_003)
    places = places_of_name(base, subject.shown[0])
    planes = []
    for share in LOOKED_AT:
        t = torch.tensor([int(share * base.scheduler.config.num_train_timesteps)])
        x = add_noise(base.scheduler, subject.latents[:1], torch.randn(subject.latents[:1].shape, generator=draw), t)
        with AttentionMaps(base.unet) as maps, torch.no_grad(), state.adapter.off():
            base.predict(x, t, base.conditions([subject.shown[0].prompt]))
            for layer in maps.layers.values():
                plane = layer[..., slice(*places)].mean((1, 3)).unflatten(1, sides(layer.shape[2], *x.shape[2:]))
                planes.append(torch.nn.functional.interpolate(plane[None], x.shape[2:], mode="bilinear")[0, 0])
    looked, where = torch.stack(planes).mean(0), subject.where[0]
    assert looked[where].min() > looked[~where].max()
    state.adapter.remove()


def test_concepts_take_turns_with_their_own_prompts_and_pictures(monkeypatch):
    base, method, state = started((CAT, DOG))
    for own, subject in enumerate(state.subjects):
        subject.latents = torch.full_like(subject.latents, float(own))
    asked, real = [], base.predict
    monkeypatch.setattr(base, "conditions", lambda texts, real=base.conditions: asked.append(texts) or real(texts))
    monkeypatch.setattr(base, "predict", lambda x, t, c: asked.append(x) or real(x, t, c))
    for step in (0, 1, 2):
        method.loss(state, step)
    assert [set(texts) for texts in asked[0::2]] == [{"cat"}, {"dog"}, {"cat"}]
    means = [float(x.mean()) for x in asked[1::2]]
    assert means[1] > max(means[0], means[2]) + 0.3
    state.adapter.remove()


def test_what_is_kept_counts_in_the_fusion_by_its_weight():
    """A term that answers a kept word's states is taken out of them by a great weight and stays with a small one."""
    left = []
    for weight in (1e-4, 1e6):
        base, method, state = started(keep_weight=weight)
        layer = base.unet.get_submodule(next(iter(base.targets("x-strict")))).weight
        draw = torch.Generator().manual_seed(0)
        terms = [(torch.randn(1, layer.shape[1], generator=draw), torch.randn(len(layer), 1, generator=draw))]
        car = torch.from_numpy(states(base, "car")[1:])
        down, up, _ = state.fusion.factors(layer, terms)
        own = (up[:, -1:] @ down[-1:]).double() @ car.T
        left.append(float(own.norm() / ((terms[0][1] @ terms[0][0]).double() @ car.T).norm()))
        state.adapter.remove()
    assert left[0] > 0.3 and left[1] < 1e-3


def test_off_is_the_base_and_removed_leaves_nothing():
    base, method, state = started()
    x, conditions = torch.randn(1, *base.latent_shape()), base.conditions(["a cat"])
    with torch.no_grad(), state.adapter.off():
        off = base.predict(x, 10, conditions)
    with torch.no_grad():
        on = base.predict(x, 10, conditions)
    state.adapter.remove()
    with torch.no_grad():
        plain = base.predict(x, 10, conditions)
    assert torch.equal(off, plain) and not torch.equal(on, plain)
    assert not any(module._forward_hooks for module in base.unet.modules())


def test_the_patch_is_the_fusion_of_the_trained_terms():
    """One concept, nothing kept, a tiny ridge: on its prompts the patch answers like refinement and term together."""
    base = Base("tiny", tiny_pipeline())
    method = dataclasses.replace(MACE(), **{**SMALL, "keep": "listed", "fusion_ridge": 1e-9, "learning_rate": 5e-2})
    cat, kept = Concept("cat", anchor="red dog"), {}
    real = type(method).prepare

    def keep(self, *rest):
        kept["state"] = real(self, *rest)
        return kept["state"]

    type(method).prepare = keep
    try:
        payload = method.fit(base, [cat], Run(seed=3, progress=False)).payload
    finally:
        type(method).prepare = real
    refined = method.refined(base, method.prompts(base, [cat]), torch.zeros(0, states(base, "cat").shape[1]))
    seen, largest = torch.from_numpy(states(base, "cat"))[1:], []
    for path, module in base.unet.named_modules():
        if path.endswith(READERS):
            weight = module.weight.detach().double()
            (down, up), *_ = kept["state"].adapter.trained(path)
            wanted = (weight @ refined.left @ refined.right + (up @ down).double()) @ seen.T
            got = payload.change("unet", f"{path}.weight").double() @ seen.T
            assert torch.allclose(got, wanted, atol=1e-3 * float(wanted.abs().max()))
            largest.append(float(up.abs().max()))
    assert sum(value > 0 for value in largest) >= len(largest) - 1  # the last values act on no attention


def test_each_concept_gets_its_updates_and_each_prompt_its_weight(base):
    assert configure("mace", "object", count=3).iterations == 3 * MACE().iterations
    pairs = [Pair("cat", "cat"), Pair("kitten", "kitten"), Pair("a cat", "cat"), Pair("red cat", "cat")]
    assert shares(pairs) == [1.0, 1.0, 0.5, 0.5]
    cat, a_cat = states(base, "cat")[1:], states(base, "a cat")[2:]
    expected = cat.T @ cat + a_cat.T @ a_cat
    assert np.allclose(spanned(base, [pairs[0], pairs[2]]).numpy(), expected, rtol=1e-5)


def test_parity_takes_the_published_settings_of_the_kind():
    style, thing, content = (configure("mace", kind, {"parity": True}) for kind in ("style", "object", "content"))
    assert (style.iterations, style.learning_rate, style.keep_weight, style.batch_size) == (50, 1e-4, 8.0, 1)
    assert (thing.learning_rate, thing.keep, thing.focal) == (1e-5, "listed", True)
    assert (content.iterations, content.learning_rate, content.focal) == (120, 1e-5, False)
    with pytest.raises(ErasureError, match="stop=auto has no meaning here"):
        configure("mace", "object", {"stop": "auto"})


def test_the_rank_is_that_of_the_refinement_and_one_for_each_concept():
    settings = {**QUICK["mace"], "rank": 2, "iterations": 1}
    payload = erase(tiny_pipeline(), ["cat", "dog"], "mace", progress=False, **settings).payload
    assert {len(down) for down, _, _ in payload.layers["unet"].values()} == {2 + 2}
