"""SalUn's saliency and objective against their formulas, and that masked weights stay."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around, neighbours, retained, words
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.salun import SalUn, published_retain
from erasure.model.base import Base
from erasure.model.diffusion import add_noise, counting
from erasure.training.image_latents import Images, shown
from erasure.training.run import Run
from erasure.training.saliency import read_mask, write_mask
from tests.tiny import tiny_pipeline

SMALL = {
    "iterations": 3,
    "batch_size": 2,
    "forget_count": 3,
    "retain_count": 4,
    "sample_steps": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def test_the_saliency_is_the_signed_sum_of_gradients_of_the_guided_error(base):
    method = dataclasses.replace(SalUn(), **SMALL, mask_guidance=2.0, density=1.0)
    state = method.prepare(base, [Concept("cat")], Run(seed=1, progress=False))
    scores = method.saliency(state)
    draw, total = torch.Generator().manual_seed(30_011), {}
    for index in (torch.tensor([0, 1]), torch.tensor([2])):
        x, t, eps = method.noised(base, state.forget.sample(index, draw), draw)
        named = base.unet(x, t, base.encode(["cat"] * len(index))).sample
        empty = base.unet(x, t, base.encode([""] * len(index))).sample
        loss = ((eps - (3 * named - 2 * empty)) ** 2).mean()
        grads = torch.autograd.grad(loss, list(state.adapter.parameters().values()), allow_unused=True)
        for name, grad in zip(state.adapter.parameters(), grads, strict=True):
            total[name] = total.get(name, 0) + (0 if grad is None else grad)
    for name, value in total.items():
        assert torch.allclose(scores[name], torch.as_tensor(value).abs(), rtol=1e-3, atol=1e-5), name
    state.adapter.remove()


@pytest.mark.parametrize("target", ["current", "base"])
def test_the_loss_is_the_formula(base, target):
    method = dataclasses.replace(SalUn(), **SMALL, target=target, retain_weight=0.3, density=1.0)
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(seed=1, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.mul_(1.1)
    terms = method.loss(state, 2)
    draw = torch.Generator().manual_seed(1_000_003 + 2)
    forget, retain = (torch.randint(n, (2,), generator=draw) for n in (3, 4))
    x, t, _ = method.noised(base, state.forget.sample(forget, draw), draw)
    x_r, t_r, eps = method.noised(base, state.retain.sample(retain, draw), draw)
    with torch.no_grad():
        output = base.unet(x, t, base.encode(["cat", "cat"])).sample
        held = base.unet(x_r, t_r, base.encode([state.retain.prompts[int(i)] for i in retain])).sample
        if target == "base":
            with state.adapter.off():
                target = base.unet(x, t, base.encode(["dog", "dog"])).sample
        else:
            target = base.unet(x, t, base.encode(["dog", "dog"])).sample
    assert torch.allclose(terms["relabel"], ((output - target) ** 2).mean(), rtol=1e-4)
    assert torch.allclose(terms["retain"], 0.3 * ((held - eps) ** 2).mean(), rtol=1e-4)
    sum(terms.values()).backward()
    assert any(param.grad is not None and param.grad.any() for param in state.adapter.parameters().values())
    state.adapter.remove()


@pytest.mark.parametrize("parity", [False, True])
def test_no_gradient_flows_through_the_target(base, parity):
    method = dataclasses.replace(SalUn(), **SMALL, retain_weight=0.0, density=1.0, parity=parity)
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(seed=1, progress=False))
    params = state.adapter.parameters()
    with counting(base.unet) as counts:
        method.loss(state, 2)["relabel"].backward()
    assert (counts.forward, counts.backward) == (3 * 2, 2 * 2)
    draw = torch.Generator().manual_seed(1_000_003 + 2)
    forget, _ = method.chosen(state, 2, draw)
    x, t, _ = method.noised(base, state.forget.sample(forget, draw), draw)
    ((cat, dog),) = state.pseudo.items()
    target = base.unet(x, t, base.encode([dog, dog])).sample
    output = base.unet(x, t, base.encode([cat, cat])).sample
    name, param = next((name, param) for name, param in params.items() if name.endswith("attn2.to_k.weight"))
    (stopped,) = torch.autograd.grad(((output - target.detach()) ** 2).mean(), param, retain_graph=True)
    (through,) = torch.autograd.grad(((output - target) ** 2).mean(), param)
    assert torch.allclose(param.grad, stopped, rtol=1e-3, atol=1e-8), name
    assert not torch.allclose(param.grad, through, rtol=1e-1)
    state.adapter.remove()


def test_masked_weights_stay_bit_for_bit_and_the_density_is_exact(base, tmp_path):
    patch = erase(base, "cat", "salun", progress=False, **SMALL, density=0.5, save_mask=str(tmp_path / "m.safetensors"))
    masks = read_mask(tmp_path / "m.safetensors", base.unet)
    params = dict(base.unet.named_parameters())
    total = sum(p.numel() for p in params.values())
    assert masks.keys() == params.keys() and sum(int(m.sum()) for m in masks.values()) == total // 2
    changed = 0
    for name in patch.payload.names("unet"):
        change = patch.payload.change("unet", name)
        assert not change[~masks[name]].any(), name
        changed += int(torch.count_nonzero(change))
    assert changed > 0.9 * (total // 2)


def test_a_given_mask_is_used(base, tmp_path):
    kwargs = {**SMALL, "save_mask": str(tmp_path / "m.safetensors")}
    one = erase(base, "cat", "salun", progress=False, **kwargs, density=0.1)
    kwargs = {**SMALL, "mask": str(tmp_path / "m.safetensors")}
    two = erase(base, "cat", "salun", progress=False, **kwargs)
    names = one.payload.names("unet")
    assert all(torch.equal(one.payload.change("unet", n), two.payload.change("unet", n)) for n in names)


def test_without_a_mask_everything_trains_norms_and_biases_too(base):
    patch = erase(base, "cat", "salun", progress=False, **SMALL, density=1.0)
    assert set(patch.payload.names("unet")) == {name for name, _ in base.unet.named_parameters()}


def test_the_concept_is_relabelled_to_the_nearest_word_or_as_published_to_the_next(base):
    method = dataclasses.replace(SalUn(), **SMALL)
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    assert state.pseudo == {"cat": neighbours(base, Concept("cat"), [Concept("cat")])[0]}
    state.adapter.remove()
    published, listed = configure("salun", "object", {"parity": True}), words(base)["object"]
    for name, after in zip(listed[3:6], listed[4:7], strict=True):
        assert published.relabelled(base, Concept(name), [Concept(name)]).anchor == after
    both = [Concept(listed[3]), Concept(listed[4])]
    assert published.relabelled(base, both[0], both).anchor == listed[5]
    styles = [word for kind, word in retained(base, [Concept("cat")]) if kind == "style"]
    last = Concept(styles[-1], kind="style")
    assert published.relabelled(base, last, [last]).anchor == f"{styles[0]} style"  # round to the first
    style = dataclasses.replace(SalUn(), **SMALL)
    state = style.prepare(base, [Concept("red", kind="style", anchor="blue style")], Run(progress=False))
    assert state.pseudo["a dog in red style"] == "a dog in blue style"
    state.adapter.remove()


def test_images_of_the_users_folder(base, tmp_path):
    for folder, colour in (("forget", (200, 30, 30)), ("retain/a dog", (30, 200, 30)), ("retain/a car", (30, 30, 200))):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30), colour).save(tmp_path / folder / "1.png")
    method = dataclasses.replace(
        SalUn(), **SMALL, forget_images=str(tmp_path / "forget"), retain_images=str(tmp_path / "retain")
    )
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(progress=False))
    assert state.forget.prompts == ["cat"] and sorted(state.retain.prompts) == ["a car", "a dog"]
    assert state.forget.std.abs().sum() > 0 and torch.isfinite(method.loss(state, 0)["relabel"])
    state.adapter.remove()


def test_the_published_target_sees_another_draw_of_the_posterior(base):
    """With std = 0 the two draws are one latent; with std > 0 the clean loss stays what it was, the published not."""
    images = Images(torch.randn(3, *base.latent_shape()), torch.zeros(3, *base.latent_shape()), ["cat"] * 3)
    clean = dataclasses.replace(SalUn(), **SMALL, density=1.0)
    published = dataclasses.replace(clean, parity=True)
    state = clean.prepare(base, [Concept("cat", anchor="cat person")], Run(progress=False))
    state.forget, state.pseudo = images, {"cat": "cat"}  # relabelled to itself: what is left is the latents' difference
    assert clean.loss(state, 1)["relabel"] < 1e-9 and published.loss(state, 1)["relabel"] < 1e-9
    state.forget = dataclasses.replace(images, std=torch.ones(3, *base.latent_shape()))
    assert clean.loss(state, 1)["relabel"] < 1e-9 and published.loss(state, 1)["relabel"] > 1e-6
    state.adapter.remove()


def test_parity_has_the_published_settings():
    method = configure("salun", "object", {"parity": True})
    assert (method.iterations, method.batch_size, method.learning_rate) == (605, 8, 1e-5)  # 5 epochs of 121 batches
    assert (method.variant, method.density, method.mask_guidance, method.target) == ("all", 0.5, 7.5, "current")
    assert (method.retain_weight, method.sample_steps, method.sample_guidance) == (0.5, 50, 7.5)
    assert method.iterations * method.batch_size == 5 * method.forget_count and method.retain_count == 968
    nudity = configure("salun", "content", {"parity": True})
    assert (nudity.retain_weight, nudity.iterations, nudity.learning_rate) == (0.1, 100, 1e-5)
    assert nudity.iterations * nudity.batch_size == nudity.forget_count == nudity.retain_count == 800  # one epoch


def test_parity_sees_every_image_as_often(base):
    method = dataclasses.replace(SalUn(), **SMALL, parity=True, density=1.0)
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(progress=False))
    n = len(state.retain)
    steps = [method.chosen(state, step, torch.Generator()) for step in range(3 * n)]
    forget, retain = (torch.cat(part).tolist() for part in zip(*steps, strict=True))
    assert forget == [0, 1, 2] * (2 * n)  # in order
    epochs = [retain[start : start + n] for start in range(0, 6 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1]
    state.adapter.remove()


def test_parity_prompts_are_the_published_ones(base, tmp_path):
    method = dataclasses.replace(SalUn(), **SMALL, parity=True, density=1.0)
    state = method.prepare(base, [Concept("cat", aliases=("tree",), anchor="a dog")], Run(progress=False))
    assert state.pseudo == {"an image of a cat": "an image of a dog", "an image of a tree": "an image of a dog"}
    assert all(text.startswith("an image of a ") for text in state.retain.prompts)
    others = {text.removeprefix("an image of a ") for text in state.retain.prompts}
    assert "dog" in others and not others & {"cat", "tree"}
    assert others <= {word for kind, word in retained(base, [Concept("cat")]) if kind != "style"}
    state.adapter.remove()
    nudity, clothed = Concept("nudity", kind="content"), "a photo of a person wearing clothes"
    assert method.prompts(nudity) == [("a photo of a nude person", clothed)]
    assert published_retain(base, [nudity]) == [clothed]
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "1.png")
    method = dataclasses.replace(method, forget_images=str(tmp_path))
    state = method.prepare(base, [Concept("cat", anchor="dog")], Run(progress=False))
    assert state.forget.prompts == ["an image of a cat"]
    state.adapter.remove()


def test_what_is_retained_is_near_the_concept_and_also_far(base):
    method = dataclasses.replace(SalUn(), retain_count=24)
    for concept in (Concept("cat", aliases=("kitten",)), Concept("Claude Monet", kind="style")):
        texts = method.kept(base, [concept], 0)
        near = around(base, [concept])
        assert texts[: len(near)] == near and len(set(texts)) == 24
        assert any("style" not in text for text in texts)
        assert not any(name.lower() in text.lower().split() for text in texts for name in concept.names)
    several = [Concept(name) for name in words(base)["object"][:5]]
    texts = method.kept(base, several, 0)  # 5 x 8 neighbours: a turn each, half of the images
    assert len(texts) == 24 and texts[:5] == around(base, several)[:5]
    keep = tuple(f"cat number {i}" for i in range(30))
    assert set(keep) <= set(method.kept(base, [Concept("cat", keep=keep)], 0))


def test_a_folder_names_the_concepts_of_its_images():
    def label(prompts, *concepts):
        images = Images(torch.zeros(len(prompts), 1), torch.zeros(len(prompts), 1), prompts)
        labelled, pseudo = shown(images, list(concepts))
        return labelled.prompts, pseudo

    cat, car = Concept("cat", aliases=("kitty",), anchor="dog"), Concept("car", anchor="boat")
    assert label(["", "", "kitty", "cats"], cat) == (
        ["cat", "kitty", "cat", "cats"],
        {"cat": "dog", "kitty": "dog", "cats": "dog"},
    )
    assert label(["cat", "a red car"], cat, car) == (["cat", "a red car"], {"cat": "dog", "a red car": "boat"})
    ink = Concept("ink", kind="style", anchor="oil style")
    assert label(["", "a dog in ink style"], ink)[1] == {
        "ink style": "oil style",
        "a dog in ink style": "a dog in oil style",
    }
    with pytest.raises(ErasureError, match="subfolder with its name: cat, car"):
        label(["cat", ""], cat, car)
    with pytest.raises(ErasureError, match="no image of car"):
        label(["cat", "kitty"], cat, car)


@pytest.mark.parametrize("target", ["zeros", "elsewhere"])
def test_a_mask_that_lets_nothing_train_is_refused_before_anything_is_drawn(base, tmp_path, target):
    names = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in base.unet.named_parameters()}
    if target == "elsewhere":  # all that it marks lies outside of the variant
        names["conv_in.weight"] |= True
    write_mask(names, tmp_path / "m.safetensors")
    with pytest.raises(ErasureError, match="none of the weights that train"):
        erase(base, "cat", "salun", progress=False, **SMALL, variant="x", mask=str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"retain_weight": -1.0}, "retain_weight=-1"),
        ({"density": 0.0}, "density=0"),
        ({"target": "teacher"}, "current"),
        ({"forget_images": "nowhere"}, "nowhere is not a folder"),
        ({"mask": "nowhere.safetensors"}, "cannot be read"),
    ],
)
def test_settings_that_make_no_sense(base, setting, message):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with pytest.raises(ErasureError, match=message):
        erase(base, "cat", "salun", progress=False, **{**SMALL, **setting})
    assert all(torch.equal(before[name], value) for name, value in base.unet.state_dict().items())


def test_noise_is_that_of_the_checkpoints_schedule(base):
    method = dataclasses.replace(SalUn(), **SMALL)
    z = torch.randn(3, 4, 8, 8)
    x, t, eps = method.noised(base, z, torch.Generator().manual_seed(0))
    assert torch.equal(x, add_noise(base.scheduler, z, eps, t))
