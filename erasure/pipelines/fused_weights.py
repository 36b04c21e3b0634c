"""Patches folded into weights (base + sum of strength * change), with a copy of the base for an exact restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.model.quantising import is_quantised
from erasure.patch.module_keys import NESTED, find_module, find_parameter
from erasure.patch.payload import Delta, LowRank
from erasure.pipelines.quantised import Beside

Key = tuple[str, str]  # component, parameter name


@dataclass(frozen=True)
class Share:
    """The contribution of one patch to the weights: its payload times its strength."""

    payload: LowRank | Delta
    strength: float

    @property
    def order(self) -> tuple[str, float]:
        """Return the sort key of the sum: by content, so that the order of loading changes no bit."""
        return self.payload.digest, self.strength


class FoldedWeights:
    """The parameters that patches have changed in place, with a CPU copy of the base value of each in its own dtype.

    Weights are always computed from that copy, in float64 and in one canonical order, and written to wherever the
    parameter currently resides (sequential offload moves it out of the network), in the dtype it currently has. If
    other code changes a parameter while a patch is folded into it, the next change of the patches overwrites that
    change; if a LoRA was fused or unfused meanwhile, the next change of the patches is refused.

    Args:
        component: function from the name of a component to its module.
    """

    def __init__(self, component: Callable[[str], nn.Module]) -> None:
        self._component = component
        self._base: dict[Key, Tensor] = {}
        self._folded: dict[Key, list[Share]] = {}
        self.beside = Beside(component)  # what acts at quantised layers, which nothing can be folded into
        self._merged_loras: dict[Key, tuple[str, ...]] = {}  # LoRAs that peft had merged when the base was copied

    def base(self, component: str, name: str) -> Tensor:
        """Return the unpatched value of a parameter: the copy if a patch is folded into it, else the live value.

        Args:
            component: name of the component, such as `unet`.
            name: name of the parameter.
        """
        value = self._base.get((component, name))
        return self._live(component, name) if value is None else value

    def fold(self, shares: list[Share]) -> None:
        """Set all weights to base + `shares`, and restore the base of parameters that no share changes any more.

        At quantised layers the shares act beside the weights.

        Args:
            shares: the contributions of all patches that are to be folded in; an empty list restores the base.

        Raises:
            ErasureError: a component was replaced, its weights are not in memory, or its projections or a LoRA were
                fused meanwhile. Nothing is changed then.
        """
        shares_of: dict[Key, list[Share]] = {}
        for share in sorted(shares, key=lambda share: share.order):
            for component in share.payload.components:
                for name in share.payload.names(component):
                    shares_of.setdefault((component, name), []).append(share)
        live = {key: self._live(*key) for key in {**shares_of, **self._base}}
        live = {key: value for key, value in live.items() if not is_quantised(value)}
        for key in self._base:
            self._check_loras(key, live[key])
        with torch.no_grad():
            for key, parameter in live.items():
                if key in shares_of:
                    self._write(key, parameter, shares_of[key])
                else:
                    parameter.copy_(self._base[key])
                    del self._base[key], self._folded[key], self._merged_loras[key]
        self.beside.set([(share.payload, share.strength) for share in shares])

    def _write(self, key: Key, parameter: Tensor, shares: list[Share]) -> None:
        if key in self._folded and [share.order for share in self._folded[key]] == [share.order for share in shares]:
            return
        if key not in self._base:
            self._merged_loras[key] = self._lora_names(key)
            self._base[key] = parameter.detach().to("cpu", copy=True)
        # Cleared first, so that after a write that fails half-way the old shares do not count as written.
        self._folded[key] = []
        parameter.copy_(self._sum(key, shares).to(parameter.dtype))
        self._folded[key] = shares

    def _sum(self, key: Key, shares: list[Share]) -> Tensor:
        total = self._base[key].double()
        for share in shares:
            total += share.strength * share.payload.change(*key).double()
        return total

    def _check_loras(self, key: Key, parameter: Tensor) -> None:
        """Refuse if a LoRA was fused or unfused: restoring the base copy would lose it, or keep it for good."""
        merged = self._lora_names(key)
        if merged == self._merged_loras[key] or not self._folded[key]:
            return
        expected = self._sum(key, self._folded[key]).to(self._base[key].dtype).to(parameter.dtype)
        if not torch.equal(parameter.cpu(), expected):
            raise ErasureError(
                f"a LoRA was fused into {key[0]}, or unfused from it, while patches were folded in. Undo that first "
                "(unfuse_lora or fuse_lora), or use the fuse_lora and unfuse_lora of an erased pipeline, which keep "
                "both. Nothing was changed"
            )
        # The weight is unchanged, so the LoRA was unloaded after it was fused: it can no longer be unfused.
        self._merged_loras[key] = merged

    def _lora_names(self, key: Key) -> tuple[str, ...]:
        """Return the names of the LoRAs that peft has merged into the layer of a parameter."""
        root, path = self._component(key[0]), key[1].rpartition(".")[0]
        for spelling in (path, NESTED + path):
            try:
                return tuple(getattr(root.get_submodule(spelling), "merged_adapters", None) or ())
            except AttributeError:
                continue
        return ()

    def _live(self, component: str, name: str) -> Tensor:
        """Return the tensor that holds a parameter now, wherever offloading has put it.

        Raises:
            ErasureError: the parameter is gone, its projection is fused, or its value is not in memory.
        """
        root, (path, _, leaf) = self._component(component), name.rpartition(".")
        parameter = find_parameter(root, name)
        if parameter is None:
            raise ErasureError(f"{component} no longer has the parameter {name}; it had it when patches were loaded")
        parent, _, last = path.rpartition(".")
        if last in ("to_q", "to_k", "to_v") and _is_fused_attention(find_module(root, parent)):
            raise ErasureError(
                f"{component}.{path} is not in use because its projections are fused. Call "
                f"pipe.{component}.unfuse_qkv_projections() before you change patches, then fuse them again"
            )
        if not parameter.is_meta:
            return parameter.data
        value = _offloaded_value(find_module(root, path) if path else root, leaf)
        if value is None:
            raise ErasureError(
                f"{component}.{name} is not in memory (offloaded to disk, or never loaded). "
                "Load and unload patches before you offload it"
            )
        return value


def _is_fused_attention(attention: nn.Module | None) -> bool:
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def _offloaded_value(layer: nn.Module | None, leaf: str) -> Tensor | None:
    """Return the value of a parameter that accelerate's sequential offload keeps in memory, or None."""
    hook = getattr(layer, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        values = getattr(part, "weights_map", None)
        if values is not None:
            value = values[leaf]
            # Weights on disk are loaded anew on every access, and writes to such a copy would be lost.
            return value.data if value is values[leaf] and not value.is_meta else None
    return None
