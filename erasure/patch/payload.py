"""The kinds of payload that change weights, low-rank factors and weight differences, both in fp32 on the CPU."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.checked_tensor import checked_copy
from erasure.patch.features import Features
from erasure.patch.fingerprint import tensor_bytes
from erasure.patch.guard import Guard
from erasure.patch.module_keys import TRANSFORMER, canonical, check_component

Layer = tuple[Tensor, Tensor, float]  # down, up, alpha


@dataclass(frozen=True, eq=False)
class LowRank:
    """Low-rank factors whose product is the change of a layer's weight: (alpha / rank) * up @ down.

    Args:
        layers: (down, up, alpha) of each layer, by component and module path. A linear layer has down [rank, in] and
            up [out, rank], a convolution down [rank, in, height, width] and up [out, rank, 1, 1]. Tensors are copied
            to fp32 on the CPU, and alpha is rounded to fp32 as in the file. If the alphas differ, they are replaced by
            a common one without changing the products (see `_one_alpha`), on a transformer by the ranks.

    Raises:
        ErasureError: there are no layers, a component is unknown, a path is malformed, shapes do not agree, or a value
            is NaN or infinite.
    """

    layers: Mapping[str, Mapping[str, Layer]]
    kind: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        layers = _tidy(self.layers, "layers", _layer)
        object.__setattr__(self, "layers", _own_alphas(layers) if TRANSFORMER in layers else _one_alpha(layers))

    def __reduce__(self) -> tuple[Any, ...]:
        return LowRank, (self.layers,)

    @property
    def components(self) -> list[str]:
        """Return the components that the payload changes, sorted."""
        return list(self.layers)

    @property
    def ranks(self) -> list[int]:
        """Return the distinct ranks of the layers in rising order."""
        return sorted({down.shape[0] for layers in self.layers.values() for down, _, _ in layers.values()})

    @property
    def alpha(self) -> float:
        """Return the alpha of the first layer, which all layers have in common unless they belong to a transformer."""
        return next(alpha for table in self.layers.values() for _, _, alpha in table.values())

    def names(self, component: str) -> list[str]:
        """Return the names of the parameters of `component` that change, sorted."""
        return [f"{path}.weight" for path in self.layers.get(component, {})]

    def shape(self, component: str, name: str) -> tuple[int, ...]:
        """Return the shape of the parameter `name` of a component."""
        down, up, _ = self.layers[component][name.removesuffix(".weight")]
        return (up.shape[0], *down.shape[1:])

    def change(self, component: str, name: str) -> Tensor:
        """Return the dense fp32 change of the parameter `name`."""
        down, up, alpha = self.layers[component][name.removesuffix(".weight")]
        product = up.flatten(1) @ down.flatten(1)
        return (product * (alpha / down.shape[0])).reshape(self.shape(component, name))

    def scaled(self, factor: float) -> LowRank:
        """Return the payload with every change multiplied by `factor`.

        The factor is applied to `up` and not to alpha, because A1111 treats an alpha of 0 as missing.
        """
        return LowRank(
            {
                component: {path: (down, up * factor, alpha) for path, (down, up, alpha) in layers.items()}
                for component, layers in self.layers.items()
            }
        )

    def tensors(self) -> list[Tensor]:
        """Return all factors in the order of the file."""
        return [factor for layers in self.layers.values() for down, up, _ in layers.values() for factor in (down, up)]

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of all names and values, which identifies the payload."""
        digest = hashlib.sha256(self.kind.encode())
        for component, layers in self.layers.items():
            for path, (down, up, alpha) in layers.items():
                digest.update(f"{component}.{path}{list(down.shape)}{list(up.shape)}{alpha!r}".encode())
                digest.update(tensor_bytes(down))
                digest.update(tensor_bytes(up))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Delta:
    """Dense weight differences, which are added to the parameters.

    Args:
        changes: the difference for each parameter, by component and parameter name, in the shape of the parameter.
            Tensors are copied to fp32 on the CPU.

    Raises:
        ErasureError: there are no changes, a component is unknown, a name is malformed, a tensor is empty, or a value
            is NaN or infinite.
    """

    changes: Mapping[str, Mapping[str, Tensor]]
    kind: ClassVar[str] = "delta"

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", _tidy(self.changes, "changes", checked_copy))

    def __reduce__(self) -> tuple[Any, ...]:
        return Delta, (self.changes,)

    @property
    def components(self) -> list[str]:
        """Return the components that the payload changes, sorted."""
        return list(self.changes)

    def names(self, component: str) -> list[str]:
        """Return the names of the parameters of `component` that change, sorted."""
        return list(self.changes.get(component, {}))

    def shape(self, component: str, name: str) -> tuple[int, ...]:
        """Return the shape of the parameter `name` of a component."""
        return tuple(self.changes[component][name].shape)

    def change(self, component: str, name: str) -> Tensor:
        """Return the fp32 change of the parameter `name`; it is not a copy and must not be modified."""
        return self.changes[component][name]

    def scaled(self, factor: float) -> Delta:
        """Return the payload with every change multiplied by `factor`."""
        return Delta(
            {
                component: {name: change * factor for name, change in changes.items()}
                for component, changes in self.changes.items()
            }
        )

    def tensors(self) -> list[Tensor]:
        """Return all differences in the order of the file."""
        return [change for changes in self.changes.values() for change in changes.values()]

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of all names and values, which identifies the payload."""
        digest = hashlib.sha256(self.kind.encode())
        for component, changes in self.changes.items():
            for name, change in changes.items():
                digest.update(f"{component}.{name}{list(change.shape)}".encode())
                digest.update(tensor_bytes(change))
        return digest.hexdigest()


Payload = LowRank | Delta | Guard | Features  # what a patch may hold
RUNTIME = (Guard.kind, Features.kind)  # the kinds that act while a pipeline draws, and change no weight


def stack_layers(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """Stack the factors of several changes of one layer, so that up @ down is the sum of the changes.

    Args:
        layers: (down, up, alpha) of each change; all are for the same layer.

    Returns:
        down [ranks, in] or [ranks, in, height, width], and up [out, ranks] multiplied by alpha / rank of its change.
    """
    scales = torch.tensor([alpha / down.shape[0] for down, _, alpha in layers for _ in range(down.shape[0])])
    return torch.cat([down for down, _, _ in layers]), torch.cat([up for _, up, _ in layers], 1).flatten(1) * scales


def _tidy(tables: Any, noun: str, check: Callable[[str, Any], Any]) -> dict[str, dict[str, Any]]:
    """Return a sorted copy of a payload, with canonical names and values that passed through `check`."""
    if not isinstance(tables, Mapping):
        raise ErasureError(f"{noun} must map component -> name -> tensors, not {type(tables).__name__}")
    tidy: dict[str, dict[str, Any]] = {}
    for component in sorted(tables, key=str):
        table = tables[check_component(component)]
        if not isinstance(table, Mapping):
            raise ErasureError(f"{noun} of {component} must be a mapping, not {type(table).__name__}")
        names = {canonical(component, name): name for name in table}
        if len(names) != len(table):
            raise ErasureError(f"{component}: a name occurs twice, with and without 'text_model.'")
        if names:
            tidy[component] = {name: check(f"{component}.{name}", table[names[name]]) for name in sorted(names)}
    if not tidy:
        raise ErasureError(f"a patch without {noun} erases nothing: give at least one")
    return tidy


def _layer(label: str, value: Any) -> Layer:
    try:
        down, up, alpha = value
        alpha = float(torch.tensor(float(alpha), dtype=torch.float32))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ErasureError(f"{label}: must be (down, up, alpha): {error}") from error
    down, up = checked_copy(f"{label} down", down), checked_copy(f"{label} up", up)
    if down.dim() != up.dim() or down.dim() not in (2, 4) or tuple(up.shape[2:]) not in ((), (1, 1)):
        raise ErasureError(
            f"{label}: down {list(down.shape)} and up {list(up.shape)} fit neither a linear layer ([rank, in] and "
            "[out, rank]) nor a convolution ([rank, in, height, width] and [out, rank, 1, 1])"
        )
    if down.shape[0] != up.shape[1]:
        raise ErasureError(f"{label}: down has rank {down.shape[0]}, up has rank {up.shape[1]}")
    if not math.isfinite(alpha):
        raise ErasureError(f"{label}: alpha is {alpha}, not a finite number")
    return down, up, alpha


def _one_alpha(layers: dict[str, dict[str, Layer]]) -> dict[str, dict[str, Layer]]:
    """Return the same changes with a common alpha, equal to the highest rank; `up` takes the remaining factor.

    All programs then load the file alike. diffusers (0.42.1) looks up the alphas of attention layers by names that it
    has just changed, and therefore uses the most common alpha for all of them; A1111 treats an alpha of 0 as missing.
    """
    alphas = {alpha for table in layers.values() for _, _, alpha in table.values()}
    if len(alphas) == 1 and 0.0 not in alphas:
        return layers
    common = float(max(down.shape[0] for table in layers.values() for down, _, _ in table.values()))
    return {
        component: {
            path: (down, checked_copy(f"{component}.{path} up", up * (alpha / common)), common)
            for path, (down, up, alpha) in table.items()
        }
        for component, table in layers.items()
    }


def _own_alphas(layers: dict[str, dict[str, Layer]]) -> dict[str, dict[str, Layer]]:
    """Return the same changes with the rank as the alpha of each layer, because files of transformers hold no alphas.

    The loaders of diffusers (0.42.1) refuse a LoRA of SD3 with an alpha, and take the rank where there is none.
    """

    def own(component: str, path: str, layer: Layer) -> Layer:
        (down, up, alpha), rank = layer, float(layer[0].shape[0])
        return layer if alpha == rank else (down, checked_copy(f"{component}.{path} up", up * (alpha / rank)), rank)

    return {name: {path: own(name, path, layer) for path, layer in table.items()} for name, table in layers.items()}
