"""DoCo's objective against its formulas, its projection, and the published code's defects."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.doco import DoCo
from erasure.model.base import Base
from erasure.model.diffusion import counting
from erasure.training.objective import Objective, published
from erasure.training.run import Run
from tests.tiny import tiny_pipeline

SMALL = {
    "iterations": 2,
    "batch_size": 3,
    "warm_up": 2,
    "anchor_count": 4,
    "retain_count": 3,
    "sample_steps": 2,
    "learning_rate": 1e-3,
}
CAT = Concept("cat", anchor="dog", keep=("car",))
NO_SCALE = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "red cat"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def started(base, concept=CAT, moved=True, **settings):
    method = dataclasses.replace(DoCo(), **{**SMALL, **settings})
    state = method.prepare(base, [concept], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.mul_(1.3 if moved else 1.0)
    return method, state


def clean(base, x, t, text):
    """The clean latents that the network predicts, by the noise schedule written out."""
    a = base.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x - (1 - a).sqrt() * base.unet(x, t, base.encode([text] * len(x))).sample) / a.sqrt()


def test_the_loss_is_the_formula(base):
    method, state = started(base, prior_weight=0.7)
    before = {name: value.clone() for name, value in state.adversary.tensors().items()}
    terms, params = method.loss(state, 1), state.adapter.parameters()
    gradient = torch.autograd.grad(terms["fool"], list(params.values()))
    after = {name: value.clone() for name, value in state.adversary.tensors().items()}
    draw = torch.Generator().manual_seed(state.seed * 1_000_003 + 1)
    x, t, concept, anchor = method.noised(state, draw)
    assert concept == ["cat"] * 3 and anchor == ["dog"] * 3 and 100 <= int(t.min()) <= int(t.max()) <= 800
    named = clean(base, x, t, "cat")
    with torch.no_grad(), state.adapter.off():
        shown = clean(base, x, t, "dog")
    # The discriminator's step: Adam on BCE with 1 for the concept and 0 for the anchor, of the trained network's x0.
    state.adversary.restore(before)
    net = state.adversary.net
    logits = net(named.detach(), t), net(shown, t)
    loss = F.binary_cross_entropy_with_logits(logits[0], torch.ones_like(logits[0]))
    loss = loss + F.binary_cross_entropy_with_logits(logits[1], torch.zeros_like(logits[1]))
    state.adversary.optimizer.zero_grad()
    loss.backward()
    state.adversary.optimizer.step()
    found = state.adversary.tensors()
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in found.items())
    # The network's: the same latents are to pass for the anchor's, by the discriminator after its step.
    fooled = F.binary_cross_entropy_with_logits(net(named, t), torch.zeros_like(logits[0]))
    assert torch.allclose(terms["fool"], fooled, rtol=1e-4)
    caught = F.binary_cross_entropy_with_logits(net(named, t), torch.ones_like(logits[0]))
    assert not torch.allclose(terms["fool"], caught, rtol=1e-2)
    index = torch.randint(len(state.kept), (3,), generator=draw)
    x, t, _ = method._noise(state, state.kept, index, draw)
    texts = [state.kept.prompts[int(i)] for i in index]
    with torch.no_grad():
        now = base.unet(x, t, base.encode(texts)).sample
        with state.adapter.off():
            still = base.unet(x, t, base.encode(texts)).sample
    assert torch.allclose(terms["prior"], 0.7 * ((now - still) ** 2).mean(), rtol=1e-4)
    assert "cat" not in texts and {"dog", "car"} & set(state.kept.prompts)
    expected = torch.autograd.grad(fooled, list(params.values()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(gradient, expected, strict=True))
    state.adapter.remove()


def test_the_projected_gradient_does_not_hurt_what_is_kept(base):
    method, state = started(base)
    params = state.adapter.parameters()
    terms = method.loss(state, 1)
    fool, prior = (torch.autograd.grad(terms[name], list(params.values()), retain_graph=True) for name in terms)
    opposed = {"fool": terms["fool"] * (-1 if sum((a * b).sum() for a, b in zip(fool, prior, strict=True)) > 0 else 1)}
    Objective(method, 1000).backward({**opposed, "prior": terms["prior"]}, params, NO_SCALE)
    rest = [param.grad - grad for param, grad in zip(params.values(), prior, strict=True)]
    lengths = sum((a**2).sum() for a in rest).sqrt() * sum((b**2).sum() for b in prior).sqrt()
    assert abs(float(sum((a * b).sum() for a, b in zip(rest, prior, strict=True)) / lengths)) < 1e-4
    state.adapter.remove()


def test_the_published_projection_subtracts_the_cosine_in_each_tensor_and_drops_the_retain_gradient():
    forget = {"a": torch.tensor([0.3, 0.0]), "b": torch.tensor([0.0, 0.4]), "c": torch.tensor([30.0])}
    retain = {"a": torch.tensor([-4.0, 3.0]), "b": torch.tensor([0.0, 5.0])}
    clip = 1 / (0.3**2 + 0.4**2 + 30.0**2) ** 0.5
    found = published(forget, retain)
    # cos = -0.8 in `a`, whose gradient has a length of 0.01 after clipping: it now points along the retain gradient.
    assert torch.allclose(found["a"], clip * forget["a"] + 0.8 * torch.tensor([-0.8, 0.6]))
    assert torch.allclose(found["b"], clip * forget["b"]) and torch.allclose(found["c"], torch.tensor([30 * clip]))
    right = clip * (forget["a"] - (forget["a"] @ retain["a"]) / (retain["a"] @ retain["a"]) * retain["a"])
    assert not torch.allclose(found["a"], right, atol=0.1)
    scaled = published({k: 512 * v for k, v in forget.items()}, {k: 512 * v for k, v in retain.items()}, 1 / 512)
    assert all(torch.allclose(scaled[name] / 512, found[name], rtol=1e-4) for name in found)


def test_the_discriminator_starts_on_the_bases_predictions_and_costs_no_backward(base):
    with counting(base.unet) as counts:
        _, state = started(base, moved=False)
    images = 2 * 2 * (4 + len(state.kept))  # two steps of two forwards for each image
    assert counts.forward == images + 2 * 2 * 3 and counts.backward == 0
    fresh, learnt = (started(base, moved=False, warm_up=count)[1].adversary.net.head.weight for count in (0, 2))
    assert not torch.equal(fresh, learnt)
    state.adapter.remove()


def test_an_update_takes_four_forwards_and_two_backwards_for_each_image(base):
    method, state = started(base)
    with counting(base.unet) as counts:
        Objective(method, 1000).backward(method.loss(state, 0), state.adapter.parameters(), NO_SCALE)
    assert (counts.forward, counts.backward) == (4 * 3, 2 * 3)
    state.adapter.remove()


def test_concepts_and_styles_share_the_images_of_their_anchors_in_turn(base):
    method = dataclasses.replace(DoCo(), **{**SMALL, "batch_size": 40})
    concepts = [Concept("monet", kind="style", anchor="red"), Concept("cat", anchor="dog")]
    state = method.prepare(base, concepts, Run(seed=3, progress=False))
    _, _, named, shown = method.noised(state, torch.Generator().manual_seed(0))
    assert ("a dog in monet style", "a dog in red style") in state.pairs or len(state.pairs) > 2
    assert set(zip(named, shown, strict=True)) <= set(state.pairs) and len(set(named)) > 2
    assert state.anchors.prompts == [state.pairs[i % len(state.pairs)][1] for i in range(len(state.anchors))]
    state.adapter.remove()


def test_parity_follows_the_published_code_with_its_defects(base):
    method = configure("doco", "object", {"parity": True})
    assert (method.surgery, method.timed, method.least_time, method.most_time) == ("doco", False, 0, 999)
    assert (method.prior_weight, method.keep, method.iterations, method.warm_up) == (0.1, "anchor", 1000, 1000)
    assert configure("doco", "style", {"parity": True}).discriminator_rate == 5e-4
    method = dataclasses.replace(method, **{**SMALL, "batch_size": 8})
    state = method.prepare(base, [CAT], Run(seed=3, progress=False))
    assert state.kept is state.anchors
    terms = method.loss(state, 1)
    draw = torch.Generator().manual_seed(state.seed * 1_000_003 + 1)
    method.noised(state, draw)
    index = torch.randint(len(state.kept), (8,), generator=draw)
    x, t, noise = method._noise(state, state.kept, index, draw)
    output = base.unet(x, t, base.encode(["dog"] * 8)).sample
    assert torch.allclose(terms["prior"], 0.1 * ((output - noise) ** 2).mean(), rtol=1e-4)
    state.adapter.remove()
    patch = erase(base, CAT, "doco", progress=False, parity=True, **SMALL)
    assert patch.config["surgery"] == "doco" and patch.payload.kind == "delta"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"least_time": 500, "most_time": 400}, "least_time=500: must be at most most_time=400"),
        ({"most_time": 1000}, "most_time=1000: tiny has timesteps 0 to 999"),
        ({"prior_weight": 0.0}, "prior_weight=0.0: must be above 0"),
        ({"keep": "nothing"}, "words, anchor"),
        ({"reweight": "static"}, "doco: reweight=static has no meaning here"),
        ({"variant": "attn"}, "x-strict"),
    ],
)
def test_bad_settings_say_what_is_allowed(base, setting, says):
    with pytest.raises(ErasureError, match=says):
        erase(base, CAT, "doco", progress=False, **{**SMALL, **setting})
