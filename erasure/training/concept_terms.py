"""What trains where each concept has a low-rank term of its own, on weights that a closed form has changed before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from erasure.model.base import Base
from erasure.model.closed_form import StateMap
from erasure.patch import LowRank
from erasure.training.adapters import LowRankTerm


class ConceptTerms:
    """A fixed low-rank change, and on top of it a rank-1 term for each concept that trains, on all keys and values.

    Args:
        base: the checkpoint.
        fixed: what all layers share of the fixed change.
        count: number of concepts.
        seed: of the terms' start.
        closing: what ends with the terms.
    """

    def __init__(self, base: Base, fixed: StateMap, count: int, seed: int, closing: ExitStack) -> None:
        self.component, self._closing = base.component, closing
        targets = base.targets("x-strict")
        layers = {path: fixed.factors(module.get_parameter("weight")) for path, module in targets.items()}
        draw = torch.Generator().manual_seed(seed)
        self._fixed = LowRankTerm(base.network, targets, rank=fixed.rank, generator=draw)
        for name, param in self._fixed.parameters().items():
            down, up, _ = layers[name.rpartition(".")[0]]
            param.data = (down if name.endswith(".down") else up).to(param)
            param.requires_grad_(False)
        self._own = [LowRankTerm(base.network, targets, rank=1, generator=draw) for _ in range(count)]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained tensors by name, in fp32."""
        return {f"{i}.{name}": param for i, term in enumerate(self._own) for name, param in term.parameters().items()}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch everything off inside the context, so that the UNet is the base."""
        with ExitStack() as stack:
            for term in (self._fixed, *self._own):
                stack.enter_context(term.off())
            yield

    @contextmanager
    def only(self, own: int) -> Iterator[None]:
        """Leave only the fixed change and one concept's term on inside the context."""
        with ExitStack() as stack:
            for place, term in enumerate(self._own):
                if place != own:
                    stack.enter_context(term.off())
            yield

    def trained(self, path: str) -> list[tuple[Tensor, Tensor]]:
        """Return down and up of each concept's term on one layer."""
        found = [term.parameters() for term in self._own]
        return [(own[f"{path}.down"].data, own[f"{path}.up"].data) for own in found]

    def twin(self, module: torch.nn.Module) -> LowRankTerm:
        """Return one concept's term, untrained, on another copy of the UNet."""
        return self._own[0].twin(module)

    def payload(self) -> LowRank:
        """Return the first term; the method makes the patch of all of them (`trained`)."""
        return self._own[0].payload()

    def remove(self) -> None:
        """Remove the fixed change and the terms."""
        for term in (self._fixed, *self._own):
            term.remove()
        self._closing.close()
