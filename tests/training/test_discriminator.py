"""The discriminator: its shape, what it is told, and that its training reaches nothing but itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from erasure.training.discriminator import Adversary, PatchDiscriminator, towards


@pytest.mark.parametrize(("side", "layers", "patches"), [(64, 4, 3), (16, 2, 3), (8, 1, 3), (4, 1, 3)])
def test_layers_follow_the_size_of_the_latents(side, layers, patches):
    """At 64, the size of Stable Diffusion's latents, it has the four layers and 3x3 patches of the published one."""
    for timed in (True, False):
        net = PatchDiscriminator(4, side, timed=timed)
        assert [layer.out_channels for layer in net.layers] == [64, 128, 256, 512][:layers]
        assert net(torch.randn(2, 4, side, side), torch.tensor([1, 900])).shape == (2, 1, patches, patches)


def test_the_published_one_has_batch_norms_after_the_first_layer_and_is_not_told_t():
    net = PatchDiscriminator(4, 64, timed=False).eval()
    assert [type(norm) for norm in net.norms] == [nn.Identity] + [nn.BatchNorm2d] * 3
    x = torch.randn(2, 4, 64, 64)
    assert torch.equal(net(x, torch.tensor([1, 2])), net(x, torch.tensor([900, 5])))
    timed = PatchDiscriminator(4, 64)
    assert not torch.allclose(timed(x, torch.tensor([1, 2])), timed(x, torch.tensor([900, 5])), atol=1e-4)
    alone = timed(x[:1], torch.tensor([1]))  # group norms: other samples of the batch play no part
    assert torch.allclose(timed(x, torch.tensor([1, 2]))[:1], alone, atol=1e-5)


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two, three = (PatchDiscriminator(4, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(one.head.weight, three.head.weight)


def test_it_learns_to_tell_both_apart_with_positive_logits_for_the_concept():
    draw = torch.Generator().manual_seed(0)
    adversary = Adversary(PatchDiscriminator(4, 16), 1e-3)
    t = torch.full((8,), 300)
    concept, anchor = torch.randn(8, 4, 16, 16, generator=draw) + 0.5, torch.randn(8, 4, 16, 16, generator=draw) - 0.5
    concept.requires_grad_(True)
    losses = [adversary.learn(concept, anchor, t) for _ in range(30)]
    assert losses[-1] < losses[0] / 2 and concept.grad is None
    assert adversary.net(concept, t).mean() > 1 and adversary.net(anchor, t).mean() < -1
    judged = adversary.judged_anchor(concept, t)
    assert judged.shape == (8,) and judged.min() > adversary.judged_anchor(anchor, t).max()


def test_fooling_it_changes_the_latents_towards_the_anchor_and_leaves_it_alone():
    draw = torch.Generator().manual_seed(0)
    adversary = Adversary(PatchDiscriminator(4, 16), 1e-3)
    t = torch.full((8,), 300)
    concept, anchor = (torch.randn(8, 4, 16, 16, generator=draw) + shift for shift in (0.5, -0.5))
    for _ in range(30):
        adversary.learn(concept, anchor, t)
    before = {name: value.clone() for name, value in adversary.net.state_dict().items()}
    latents = concept.clone().requires_grad_(True)
    adversary.judged_anchor(latents, t).mean().backward()
    assert all(param.requires_grad for param in adversary.net.parameters())  # for its next step
    assert all(torch.equal(before[name], value) for name, value in adversary.net.state_dict().items())
    assert ((anchor.mean() - concept.mean()) * -latents.grad.mean()) > 0


def test_the_loss_is_the_cross_entropy_of_each_sample():
    logits = torch.tensor([[[[0.0, 2.0]]], [[[-1.0, 3.0]]]])
    concept, anchor = towards(logits, 1.0), towards(logits, 0.0)
    assert torch.allclose(concept, -torch.log(torch.sigmoid(logits)).mean((1, 2, 3)))
    assert torch.allclose(anchor, -torch.log(1 - torch.sigmoid(logits)).mean((1, 2, 3)))


@pytest.mark.parametrize("timed", [True, False])
def test_a_checkpoint_brings_back_weights_moments_and_norms(timed):
    draw = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randn(4, 4, 16, 16, generator=draw) for _ in range(2)) for _ in range(4)]
    t = torch.full((4,), 300)
    one, two = (Adversary(PatchDiscriminator(4, 16, timed=timed, seed=seed), 1e-3) for seed in (1, 2))
    for pair in pairs[:2]:
        one.learn(*pair, t)
    two.restore({name: value.clone() for name, value in one.tensors().items()})
    for pair in pairs[2:]:
        assert one.learn(*pair, t) == two.learn(*pair, t)
    assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
