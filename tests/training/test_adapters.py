"""Adapters: off is the base bit for bit, and what they learn is what a patch holds."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.training.adapters import LowRankTerm, Weights
from tests.tiny import tiny_unet


def targets(unet):
    return {path: m for path, m in unet.named_modules() if "attn2" in path and isinstance(m, torch.nn.Linear)}


def make(kind, unet, chosen):
    if kind == "weights":
        return Weights(unet, chosen)
    return LowRankTerm(unet, chosen, rank=2, alpha=6.0, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["weights", "low rank"])
def kind(request):
    return request.param


def run(unet):
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        x, states = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 12, 32, generator=draw)
        return unet(x, torch.tensor(5), states).sample


def stir(adapter):
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in adapter.parameters().values():
            param.add_(torch.randn(param.shape, generator=draw) * 0.3)


def test_fresh_off_and_removed_are_the_base(kind):
    unet = tiny_unet()
    base = run(unet)
    adapter = make(kind, unet, targets(unet))
    assert torch.equal(run(unet), base)
    stir(adapter)
    moved = run(unet)
    assert not torch.allclose(moved, base, atol=1e-3)
    with adapter.off():
        assert torch.equal(run(unet), base)
    assert torch.equal(run(unet), moved)
    adapter.remove()
    assert torch.equal(run(unet), base)


def test_the_payload_added_to_the_base_gives_the_trained_output(kind):
    unet = tiny_unet()
    adapter = make(kind, unet, targets(unet))
    stir(adapter)
    moved, payload = run(unet), adapter.payload()
    adapter.remove()
    weights = dict(unet.named_parameters())
    with torch.no_grad():
        for name in payload.names("unet"):
            weights[name].add_(payload.change("unet", name))
    assert torch.allclose(run(unet), moved, atol=1e-5)


def test_only_the_adapter_gets_gradients(kind):
    unet = tiny_unet()
    adapter = make(kind, unet, targets(unet))
    stir(adapter)
    unet(torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 12, 32)).sample.sum().backward()
    own = {id(param) for param in adapter.parameters().values()}
    assert all(param.grad is not None for param in adapter.parameters().values())
    assert all(param.grad is None for param in unet.parameters() if id(param) not in own)


def test_rank_0_is_refused():
    unet = tiny_unet()
    with pytest.raises(ErasureError, match="at least 1"):
        LowRankTerm(unet, targets(unet), rank=0, generator=torch.Generator())
