"""Attention maps against diffusers' own attention, masks on planted maps, and the norm by hand."""

from __future__ import annotations

import numpy as np
import torch

from erasure.model.attention_maps import AttentionMaps, attended, masks, sides
from tests.tiny import tiny_pipeline


def test_the_maps_are_those_that_the_layers_use():
    """Probabilities times values, through the layer's own output, are what the layer gives."""
    unet = tiny_pipeline().unet
    name, layer = next((name, module) for name, module in unet.named_modules() if name.endswith("attn2"))
    draw = torch.Generator().manual_seed(0)
    pixels, text = torch.randn(2, 16, layer.to_q.in_features, generator=draw), torch.randn(2, 7, layer.to_k.in_features)
    with torch.no_grad(), AttentionMaps(unet) as maps:
        out = layer(pixels, encoder_hidden_states=text)
        (path, shown), *rest = maps.layers.items()
        values = layer.to_v(text).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        joined = (shown @ values).transpose(1, 2).flatten(2)
        expected = layer.to_out[1](layer.to_out[0](joined)) / layer.rescale_output_factor
    assert path == name and not rest and shown.shape == (2, layer.heads, 16, 7) and not maps.layers
    assert torch.allclose(out, expected + (pixels if layer.residual_connection else 0), atol=1e-5)
    assert torch.allclose(shown.sum(-1), torch.ones(2, layer.heads, 16), atol=1e-5)
    assert not any(module._forward_hooks for module in unet.modules())


def test_what_acts_on_the_keys_is_seen_and_gradients_reach_it():
    unet = tiny_pipeline().unet
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2"))
    pixels, text = torch.randn(1, 4, layer.to_q.in_features), torch.randn(1, 3, layer.to_k.in_features)
    term = torch.zeros(layer.to_k.out_features, requires_grad=True)
    handle = layer.to_k.register_forward_hook(lambda module, given, keys: keys + term * given[0].sum(-1)[..., None])
    with AttentionMaps(unet) as maps:
        layer(pixels, encoder_hidden_states=text)
        next(iter(maps.layers.values()))[..., 1].sum().backward()
    handle.remove()
    assert term.grad.abs().max() > 0


def planted(side: int, rows: slice, tokens: int = 5, token: int = 2) -> torch.Tensor:
    """A map [1, 2, side * side, tokens] whose pixels in some rows look at one token."""
    plane = torch.full((1, 2, side, side, tokens), 0.1)
    plane[:, :, rows, :, token] = 0.9
    return plane.flatten(2, 3)


def test_masks_are_where_the_name_is_looked_at():
    maps = [planted(8, slice(0, 4)), planted(4, slice(0, 2))]
    found = masks(maps, 2, 3, (8, 8), 0.5)
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[:, :4] = True
    assert torch.equal(found, expected)
    assert not masks(maps, 0, 1, (8, 8), 0.5).any()  # another token shows nothing
    assert masks(maps, 2, 3, (8, 8), 0.0).all() and sides(32, 8, 16) == (4, 8)


def test_the_norm_is_that_of_the_tokens_on_the_mask():
    """Two layers, one of half the size: Frobenius norms over heads, pixels and tokens, added up; mean over samples."""
    draw = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 64, 5, generator=draw), torch.rand(2, 3, 16, 5, generator=draw)]
    where = torch.zeros(2, 8, 8, dtype=torch.bool)
    where[0, :4], where[1, :, 6:] = True, True
    total = 0.0
    for sample in range(2):
        for layer, step in zip(maps, (1, 2), strict=True):
            on = where[sample, ::step, ::step].flatten().numpy()
            total += np.linalg.norm(layer[sample, :, on, 1:3].numpy().ravel()) / 2
    assert np.allclose(float(attended(maps, 1, 3, where)), total, rtol=1e-5)
    assert not np.allclose(float(attended(maps, 1, 3, ~where)), total, rtol=1e-2)
    assert float(attended(maps, 1, 3, torch.zeros_like(where))) == 0
