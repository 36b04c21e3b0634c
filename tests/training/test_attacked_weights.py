"""Weights and words that train in turns: which of them gets gradients, and which weights are swapped in."""

from __future__ import annotations

import torch
from torch import nn

from erasure.training.attacked_weights import AttackedWeights


def started():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).half()
    own = net[0].weight.data.clone()
    return net, own, AttackedWeights(net, {"0": net[0]}, torch.zeros(1, 2, 4), "unet")


def test_one_of_the_two_trains_at_a_time():
    net, _, adapter = started()
    params = adapter.parameters()
    assert set(params) == {"0.weight", "0.bias", "words"} and all(p.dtype == torch.float32 for p in params.values())
    assert all(param.requires_grad for param in params.values())  # the loop registers its hooks before the first step
    for words in (True, False):
        adapter.train(words)
        assert [name for name, param in params.items() if param.requires_grad] == (
            ["words"] if words else ["0.weight", "0.bias"]
        )
    assert not net[1].weight.requires_grad


def test_marked_weights_are_swapped_in_and_the_base_comes_back():
    net, own, adapter = started()
    weight = adapter.parameters()["0.weight"]
    with adapter.earlier():
        assert torch.equal(net[0].weight, own.float())  # nothing was marked: the base
    weight.data += 1
    adapter.mark()
    marked = adapter.marked()
    weight.data += 1
    with adapter.earlier():
        assert torch.equal(net[0].weight, own.float() + 1)
    assert torch.equal(net[0].weight, own.float() + 2)
    assert torch.equal(adapter.payload().change("unet", "0.weight"), torch.full((3, 3), 2.0))
    assert sorted(adapter.payload().names("unet")) == ["0.bias", "0.weight"]
    adapter.restart()
    assert torch.equal(net[0].weight, own.float()) and weight is adapter.parameters()["0.weight"]
    adapter.mark()
    adapter.restore_marked(marked)
    with adapter.earlier():
        assert torch.equal(net[0].weight, own.float() + 1)
    adapter.remove()
    assert torch.equal(net[0].weight, own) and net[0].weight.dtype == torch.half
