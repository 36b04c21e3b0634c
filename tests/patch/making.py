"""Random patches for the tiny pipeline, and comparisons of tensors and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from erasure.patch import Delta, Features, LowRank, Patch, fingerprint


def low_rank_patch(
    pipe: Any,
    seed: int = 1,
    rank: int = 2,
    alpha: float = 3.0,
    part: str = "attn2",
    components: tuple[str, ...] = ("unet",),
    size: float = 0.1,
    **fields: Any,
) -> Patch:
    """Make a random low-rank patch for each Linear and Conv2d of `components`, in networks with `part` in the path."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    layers: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    for component in components:
        for path, module in getattr(pipe, component).named_modules():
            if component in ("unet", "transformer") and part not in path:
                continue
            if isinstance(module, nn.Linear):
                pair = draw(rank, module.in_features), draw(module.out_features, rank)
            elif isinstance(module, nn.Conv2d):
                pair = draw(rank, module.in_channels, *module.kernel_size), draw(module.out_channels, rank, 1, 1)
            else:
                continue
            layers.setdefault(component, {})[path] = (*pair, alpha)
    return patch_of(pipe, LowRank(layers), **fields)


def delta_patch(
    pipe: Any, seed: int = 1, part: str = "attn2.to_k", component: str = "unet", size: float = 0.1, **fields: Any
) -> Patch:
    """Make random differences for each parameter of `component` whose name contains `part`.

    Every second difference is mostly zero, so that it is stored sparsely.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    names = [name for name, _ in getattr(pipe, component).named_parameters() if part in name]
    for number, name in enumerate(names):
        shape = getattr(pipe, component).get_parameter(name).shape
        change = torch.randn(shape, generator=generator) * size
        if number % 2:
            change = change * (torch.rand(shape, generator=generator) < 0.2)
        changes[name] = change
    return patch_of(pipe, Delta({component: changes}), **fields)


def features(**changed: Any) -> Features:
    """Make two random features of a block of the tiny pipeline, each active in about half of the outputs."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    block = "up_blocks.0.attentions.1"
    values: dict[str, Any] = {
        "component": "unet",
        "block": block,
        "made_on": {f"{block}.proj_out.weight": [16, 16, 1, 1]},
        "timesteps": (501.0, 1.0),
        "encoder": draw(2, 16),
        "bias": draw(2) / 10,
        "decoder": draw(2, 16),
        "limits": draw(2, 2).abs() / 10,
        "gains": -1 - draw(2, 2).abs(),
        "about": {"of": 64},
    }
    return Features(**values | changed)


def features_patch(**fields: Any) -> Patch:
    """Make a patch of random features."""
    return Patch(payload=features(), method="test", concepts=[{"name": "cat"}], **fields)


def patch_of(pipe: Any, payload: LowRank | Delta, **fields: Any) -> Patch:
    """Make a patch of a payload with the fingerprint of a pipeline."""
    fingerprints = {name: fingerprint(getattr(pipe, name), payload.names(name)) for name in payload.components}
    defaults = {"method": "random", "concepts": [{"name": "van gogh"}], "base": "tiny"}
    return Patch(payload, **(defaults | {"base_fingerprint": fingerprints} | fields))


def gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `other`."""
    return float((one - other).abs().max() / other.abs().max())


def weights(pipe: Any) -> dict[str, Tensor]:
    """Copy all weights of the UNet and the text encoder."""
    return {
        f"{component}.{name}": value.detach().clone()
        for component in ("unet", "text_encoder")
        for name, value in getattr(pipe, component).named_parameters()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Tell whether two sets of weights agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
