"""Parts of a text encoder: which of its weight matrices change together, how deep they lie, and which suits a change.

The choice is that of SLUG (Cai et al. 2025, arXiv 2407.11867, section 3.2): of the matrices that no other one beats in
both importance and alignment, the deepest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError

MATRIX = re.compile(r"layers\.(\d+)\.(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])\.weight$")
TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "fc1": "mlp", "fc2": "mlp"}  # what changes together
ORDER = ("qkv", "out_proj", "mlp")  # in which a layer's parts act
Gradients = Mapping[str, Tensor]


def part_of(name: str) -> str:
    """Return the part of the encoder that a weight belongs to, such as layers.3.mlp: what changes together."""
    match = MATRIX.search(name)
    if match is None:
        raise ErasureError(f"{name} is no weight matrix of a text encoder's layer")
    leaf = match[2].rpartition(".")[2]
    return f"layers.{match[1]}.{TOGETHER.get(leaf, leaf)}"


def depth(name: str) -> tuple[int, int]:
    """Return a number that grows with the depth of a weight in the encoder: its layer, then its part."""
    _, layer, part = part_of(name).split(".")
    return int(layer), ORDER.index(part)


def gradients(losses: Sequence[Callable[[], Tensor]], weights: Mapping[str, nn.Parameter]) -> Gradients:
    """Return the gradient of the sum of losses, which are computed one after the other; none is left in the weights."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for loss in losses:
        for name, gradient in zip(weights, torch.autograd.grad(loss(), list(weights.values())), strict=True):
            total[name] += gradient
    return total


def length(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of tensors taken together."""
    return float(torch.stack([tensor.detach().double().square().sum() for tensor in tensors]).sum().sqrt())


def alignment(one: Tensor, other: Tensor) -> float:
    """Return | cos | of two gradients; 0 if one is zero."""
    return abs(float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0)))


def fronts(scores: Mapping[str, tuple[float, float]]) -> Iterator[list[str]]:
    """Yield the Pareto fronts of (importance, alignment), the best first: large importance, small alignment.

    Args:
        scores: of each weight, by name.
    """
    left = dict(scores)
    while left:
        front = [
            name
            for name, (size, aligned) in left.items()
            if not any(s >= size and a <= aligned and (s, a) != (size, aligned) for s, a in left.values())
        ]
        yield front
        left = {name: score for name, score in left.items() if name not in front}


@contextmanager
def moved(weights: Mapping[str, nn.Parameter], group: Gradients, s: float) -> Iterator[None]:
    """Add s times the gradient to the weights of a group; afterwards they are what they were, bit for bit."""
    kept = {name: weights[name].data for name in group}
    try:
        for name, gradient in group.items():
            weights[name].data = kept[name] + s * gradient
        yield
    finally:
        for name, own in kept.items():
            weights[name].data = own
