"""Weights with patches folded in: base + sum of strength * change, and the base kept aside to give back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch.module_keys import NESTED, find_module, find_parameter
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
    the parameter now lies (sequential offload keeps it beside the network), in the dtype it now has. A change that
    somebody else makes to a touched parameter while a patch is folded in is overwritten by the next change of the
    patches; a LoRA that was fused or unfused meanwhile is refused.
    """

    def __init__(self, component: Callable[[str], nn.Module]) -> None:
        self._component = component
        self._kept: dict[Key, Tensor] = {}
        self._written: dict[Key, list[Share]] = {}
        self._fused: dict[Key, tuple[str, ...]] = {}  # the LoRAs that peft had merged into the kept value

    def base(self, component: str, name: str) -> Tensor:
        """The unpatched value of a parameter: the kept one where a patch is folded in, else the live one."""
        kept = self._kept.get((component, name))
        return self._live(component, name) if kept is None else kept

    def fold(self, shares: list[Share]) -> None:
        """Bring all weights to base + `shares`; parameters that no share touches get their base back.

        Raises:
            ErasureError: a component was replaced, its weights are not in memory, its projections or a LoRA were
                fused meanwhile. Nothing is changed then.
        """
        wanted: dict[Key, list[Share]] = {}
        for share in sorted(shares, key=lambda share: share.order):
            for component in share.payload.components:
                for name in share.payload.names(component):
                    wanted.setdefault((component, name), []).append(share)
        live = {key: self._live(*key) for key in {**wanted, **self._kept}}
        for key in self._kept:
            self._check_fused(key, live[key])
        with torch.no_grad():
            for key, parameter in live.items():
                if key in wanted:
                    self._write(key, parameter, wanted[key])
                else:
                    parameter.copy_(self._kept[key])
                    del self._kept[key], self._written[key], self._fused[key]

    def _write(self, key: Key, parameter: Tensor, shares: list[Share]) -> None:
        if key in self._written and [one.order for one in self._written[key]] == [one.order for one in shares]:
            return
        if key not in self._kept:
            self._fused[key] = self._merged(key)
            self._kept[key] = parameter.detach().to("cpu", copy=True)
        # A write that fails half-way is not taken for the recipe before it.
        self._written[key] = []
        parameter.copy_(self._sum(key, shares).to(parameter.dtype))
        self._written[key] = shares

    def _sum(self, key: Key, shares: list[Share]) -> Tensor:
        total = self._kept[key].double()
        for share in shares:
            total += share.strength * share.payload.change(*key).double()
        return total

    def _check_fused(self, key: Key, parameter: Tensor) -> None:
        """A LoRA that was fused or unfused since would be lost, or stay, with the kept value."""
        merged = self._merged(key)
        if merged == self._fused[key] or not self._written[key]:
            return
        expected = self._sum(key, self._written[key]).to(self._kept[key].dtype).to(parameter.dtype)
        if not torch.equal(parameter.cpu(), expected):
            raise ErasureError(
                f"a LoRA was fused into {key[0]}, or unfused, while patches were folded in: undo that first "
                "(unfuse_lora or fuse_lora), or use an erased pipeline's own fuse_lora and unfuse_lora, which keep "
                "both. Nothing was changed"
            )
        self._fused[key] = merged  # unload_lora_weights: the layer stays as fused, and nobody can unfuse it

    def _merged(self, key: Key) -> tuple[str, ...]:
        root, path = self._component(key[0]), key[1].rpartition(".")[0]
        for spelling in (path, NESTED + path):
            try:
                return tuple(getattr(root.get_submodule(spelling), "merged_adapters", None) or ())
            except AttributeError:
                continue
        return ()

    def _live(self, component: str, name: str) -> Tensor:
        root, (path, _, leaf) = self._component(component), name.rpartition(".")
        parameter = find_parameter(root, name)
        if parameter is None:
            raise ErasureError(f"{component} has lost its parameter {name} while patches were loaded")
        parent, _, last = path.rpartition(".")
        if last in ("to_q", "to_k", "to_v") and _fused_attention(find_module(root, parent)):
            raise ErasureError(
                f"{component}.{path} is not in use: its projections are fused. Call "
                f"pipe.{component}.unfuse_qkv_projections() before patches change, and fuse them again afterwards"
            )
        if not parameter.is_meta:
            return parameter.data
        value = _offloaded(find_module(root, path) if path else root, leaf)
        if value is None:
            raise ErasureError(
                f"{component}.{name} is not in memory (offloaded to disk, or never loaded): "
                "load and unload patches before you offload it"
            )
        return value


def _fused_attention(attention: nn.Module | None) -> bool:
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def _offloaded(layer: nn.Module | None, leaf: str) -> Tensor | None:
    """The value of a parameter that accelerate's sequential offload keeps in memory; None where it keeps none."""
    hook = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        values = getattr(each, "weights_map", None)
        if values is not None:
            value = values[leaf]
            # From a disk every look gives a copy, and what is written to a copy is lost.
            return value.data if value is values[leaf] and not value.is_meta else None
    return None
