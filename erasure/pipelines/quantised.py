"""Patches on quantised layers (8 or 4 bits: torchao, bitsandbytes, quanto, GGUF), which they cannot be folded into.

To round base + change to 8 bits would lose most of a small change, and the base could not be restored. A low-rank patch
therefore acts beside such a layer, as a gated one does: y = Q(W) x + s up(down(x)). The patch itself is not rounded, so
the result differs from the patched full-precision model by the error of the quantised base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from erasure.model.quantising import is_quantised
from erasure.patch.module_keys import find_parameter
from erasure.patch.payload import Delta, LowRank
from erasure.pipelines.gated_lora import membranes


class Beside:
    """The low-rank terms that act beside quantised layers, in every call.

    Args:
        component: function from the name of a component to its module.
    """

    def __init__(self, component: Callable[[str], nn.Module]) -> None:
        self._component = component
        self._handles: list[RemovableHandle] = []

    @property
    def acts(self) -> bool:
        """Return whether anything acts beside the weights."""
        return bool(self._handles)

    def set(self, terms: Sequence[tuple[LowRank | Delta, float]]) -> None:
        """Let these payloads act beside all their quantised layers, and nothing else.

        Args:
            terms: each payload with its strength.
        """
        parts = []
        for payload, strength in terms:
            if isinstance(payload, LowRank) and (kept := self._quantised(payload)):
                parts.append((LowRank(kept), torch.tensor([strength])))
        pairs = membranes(parts, self._component, 1)
        for handle in self._handles:
            handle.remove()
        self._handles = [membrane.attach(module) for membrane, module in pairs]

    def _quantised(self, payload: LowRank) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
        """Return the factors of a payload that belong to quantised layers."""
        kept = {}
        for name, layers in payload.layers.items():
            paths = {
                path: layer
                for path, layer in layers.items()
                if is_quantised(find_parameter(self._component(name), f"{path}.weight"))
            }
            if paths:
                kept[name] = paths
        return kept
