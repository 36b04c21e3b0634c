"""Weights with patches folded in: base + sum of strength * change, and the base kept aside to give back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch.keys import find_parameter
from erasure.patch.payload import Delta, LowRank

Key = tuple[str, str]  # component, parameter name


@dataclass(frozen=True)
class Share:
    """One patch's part in the weights."""

    payload: LowRank | Delta
    strength: float

    @property
    def order(self) -> tuple[str, float]:
        """Place in the sum: by content, so that the order of loading changes no bit."""
        return self.payload.digest, self.strength


class FoldedWeights:
    """The parameters that patches have changed in place, each with its base value on the CPU in its own dtype.

    Weights are always computed from the kept base, in float64 and in one canonical order, and written to wherever
    the parameter now lies, in the dtype it now has. A change that somebody else makes to a touched parameter while
    a patch is folded in is overwritten by the next change of the patches.
    """

    def __init__(self, component: Callable[[str], nn.Module]) -> None:
        self._component = component
        self._kept: dict[Key, Tensor] = {}
        self._written: dict[Key, list[tuple[str, float]]] = {}

    def base(self, component: str, name: str) -> Tensor:
        """The unpatched value of a parameter: the kept one where a patch is folded in, else the live one."""
        kept = self._kept.get((component, name))
        return self._live(component, name) if kept is None else kept

    def fold(self, shares: list[Share]) -> None:
        """Bring all weights to base + `shares`; parameters that no share touches get their base back.

        Raises:
            ErasureError: a component was replaced or its weights are not in memory.
        """
        wanted: dict[Key, list[Share]] = {}
        for share in sorted(shares, key=lambda share: share.order):
            for component in share.payload.components:
                for name in share.payload.names(component):
                    wanted.setdefault((component, name), []).append(share)
        live = {key: self._live(*key) for key in {**wanted, **self._kept}}
        with torch.no_grad():
            for key, parameter in live.items():
                if key in wanted:
                    self._write(key, parameter, wanted[key])
                else:
                    parameter.copy_(self._kept[key])
                    del self._kept[key], self._written[key]

    def _write(self, key: Key, parameter: Tensor, shares: list[Share]) -> None:
        recipe = [share.order for share in shares]
        if self._written.get(key) == recipe:
            return
        if key not in self._kept:
            self._kept[key] = parameter.detach().to("cpu", copy=True)
        # A write that fails half-way is not taken for the recipe before it.
        self._written[key] = []
        total = self._kept[key].double()
        for share in shares:
            total += share.strength * share.payload.change(*key).double()
        parameter.copy_(total.to(parameter.dtype))
        self._written[key] = recipe

    def _live(self, component: str, name: str) -> Tensor:
        parameter = find_parameter(self._component(component), name)
        if parameter is None:
            raise ErasureError(f"{component} has lost its parameter {name} while patches were loaded")
        if parameter.is_meta:
            raise ErasureError(
                f"{component}.{name} is not in memory (sequential offload): load patches first, then enable offload"
            )
        return parameter.data
