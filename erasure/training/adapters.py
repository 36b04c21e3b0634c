"""What trains: whole weights, or a low-rank term next to them. Switched off, the UNet is the base, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.model.quantising import is_quantised
from erasure.patch import Delta, LowRank


class Adapter(Protocol):
    """Trainable tensors on a component of the checkpoint, which can be switched off and removed."""

    component: str

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name, in fp32."""

    def off(self) -> Any:
        """Return a context in which the component is the base."""

    def payload(self) -> Delta | LowRank:
        """Return the trained change, for a patch."""

    def remove(self) -> None:
        """Restore the component as it was."""


class Weights:
    """The weights and biases of modules, trained in place; the base's own tensors are kept.

    What trains is an fp32 copy: modules in half precision are trained in fp32, and get their own tensors back.

    Args:
        module: the component; all other parameters of it are frozen.
        targets: the modules of it that train, by path.
        component: the component's name in a patch.

    Raises:
        ErasureError: a weight is quantised.
    """

    def __init__(self, module: nn.Module, targets: dict[str, nn.Module], component: str = "unet") -> None:
        for path, target in targets.items():
            if any(is_quantised(param) for param in target.parameters(recurse=False)):
                raise ErasureError(
                    f"{component}.{path} is quantised, and whole weights cannot train there. Train a low-rank term "
                    "(esd: rank=R, or a method that has one anyway, such as gem, spm or unguide), or load the model "
                    "unquantised. Nothing was trained"
                )
        self.component = component
        self._params: dict[str, nn.Parameter] = {}
        self._base: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        module.requires_grad_(False)
        for path, target in targets.items():
            for name, param in target.named_parameters(recurse=False):
                key = f"{path}.{name}"
                self._base[key] = param.data
                param.data = param.data.float().clone()
                param.requires_grad_(True)
                self._params[key] = param

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name, in fp32."""
        return self._params

    def mask(self, masks: dict[str, Tensor]) -> None:
        """Let only the marked entries train: other gradients are zero, so that Adam leaves those entries bit for bit.

        Args:
            masks: a boolean tensor of the same shape for every trained tensor, by name.

        Raises:
            ErasureError: a trained tensor has no mask.
        """
        for key, param in self._params.items():
            if key not in masks:
                raise ErasureError(f"the mask lacks {key}, which trains")
            mask = masks[key].to(param.device)
            self._handles.append(param.register_hook(lambda grad, mask=mask: grad * mask))

    def origin(self, name: str) -> Tensor:
        """Return what a trained tensor is where nothing is changed, the base's own, in fp32."""
        return self._base[name].float()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Swap the base's tensors in, without copying any values."""
        trained = {key: param.data for key, param in self._params.items()}
        for key, param in self._params.items():
            param.data = self._base[key].to(param.dtype)
        try:
            yield
        finally:
            for key, param in self._params.items():
                param.data = trained[key]

    def twin(self, module: nn.Module) -> Weights:
        """Return the same adapter, untrained, on another copy of the component."""
        paths = dict.fromkeys(key.rpartition(".")[0] for key in self._params)
        return Weights(module, {path: module.get_submodule(path) for path in paths}, self.component)

    def payload(self) -> Delta:
        """Return trained minus base weights, in fp32."""
        return Delta(
            {
                self.component: {
                    k: (p.data.float() - self._base[k].float()).cpu().contiguous() for k, p in self._params.items()
                }
            }
        )

    def remove(self) -> None:
        """Restore the base's own tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for key, param in self._params.items():
            param.requires_grad_(False)
            param.grad = None
            param.data = self._base[key]


class LowRankTerm:
    """A low-rank term, y = Wx + (alpha / rank) up(down(x)), on Linear and Conv2d modules (Hu et al. 2021, eq. 3).

    `up` starts at zero, so that at step 0 the output is the base's, bit for bit.

    Args:
        module: the component; all its own parameters are frozen.
        targets: the modules of it that get a term, by path.
        rank: rank of the terms.
        alpha: see the equation; None: the rank.
        generator: draws the start of `down`.
        component: the component's name in a patch.
        normal: start `down` as N(0, 1 / rank); otherwise uniform (Kaiming, a = sqrt 5).

    Raises:
        ErasureError: a rank below 1, a grouped convolution, or a module of another type.
    """

    def __init__(
        self,
        module: nn.Module,
        targets: dict[str, nn.Module],
        *,
        rank: int,
        alpha: float | None = None,
        generator: torch.Generator,
        component: str = "unet",
        normal: bool = False,
    ) -> None:
        if rank < 1:
            raise ErasureError(f"rank={rank}: must be at least 1")
        self.component, self.alpha, self.scale = component, float(alpha or rank), float(alpha or rank) / rank
        self._on = True
        self._added: dict[str, Tensor] | None = None
        self._params: dict[str, nn.Parameter] = {}
        self._handles = []
        module.requires_grad_(False)
        for path, target in targets.items():
            down, up = self._shapes(target, rank)
            bound = 1 / math.sqrt(math.prod(down[1:]))
            start = torch.rand(down, generator=generator) * 2 * bound - bound
            if normal:
                start = torch.randn(down, generator=generator) / math.sqrt(rank)
            weight = next(target.parameters())
            self._params[f"{path}.down"] = nn.Parameter(start.to(weight.device))
            self._params[f"{path}.up"] = nn.Parameter(torch.zeros(up, device=weight.device))
            self._handles.append(target.register_forward_hook(self._hook(path)))

    @staticmethod
    def _shapes(target: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(target, nn.Conv2d):
            if target.groups != 1:
                raise ErasureError("a low-rank term cannot be added to a grouped convolution")
            return (rank, target.in_channels, *target.kernel_size), (target.out_channels, rank, 1, 1)
        if isinstance(target, nn.Linear):
            return (rank, target.in_features), (target.out_features, rank)
        raise ErasureError(f"a low-rank term can be added to Linear and Conv2d, not to {type(target).__name__}")

    def _hook(self, path: str) -> Any:
        def add(target: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._on:
                return None
            x, down, up = inputs[0], self._params[f"{path}.down"], self._params[f"{path}.up"]
            if isinstance(target, nn.Conv2d):
                low = F.conv2d(x, down.to(x.dtype), None, target.stride, target.padding, target.dilation)  # type: ignore[arg-type]
                added = self.scale * F.conv2d(low, up.to(x.dtype))
            else:
                added = self.scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
            if self._added is not None:
                self._added[path] = added
            return output + added

        return add

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name, in fp32."""
        return self._params

    def origin(self, name: str) -> Tensor:
        """Return what a trained factor is where nothing is changed, which is 0."""
        return torch.zeros_like(self._params[name])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch the low-rank term off inside the context."""
        with self._set(False):
            yield

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """Hold what the term adds to each module's output in the last call inside the context, with its graph."""
        added: dict[str, Tensor] = {}
        self._added = added
        try:
            yield added
        finally:
            self._added = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch the term on, also inside `off`."""
        with self._set(True):
            yield

    @contextmanager
    def _set(self, on: bool) -> Iterator[None]:
        before, self._on = self._on, on
        try:
            yield
        finally:
            self._on = before

    @property
    def _paths(self) -> list[str]:
        return [key.removesuffix(".down") for key in self._params if key.endswith(".down")]

    def twin(self, module: nn.Module) -> LowRankTerm:
        """Return the same adapter, untrained, on another copy of the component."""
        targets = {path: module.get_submodule(path) for path in self._paths}
        rank = len(self._params[f"{self._paths[0]}.down"])
        options: dict[str, Any] = {"rank": rank, "alpha": self.alpha, "component": self.component}
        return LowRankTerm(module, targets, generator=torch.Generator(), **options)

    def payload(self) -> LowRank:
        """Return the factors by module path."""
        return LowRank(
            {
                self.component: {
                    path: (
                        self._params[f"{path}.down"].data.cpu().clone(),
                        self._params[f"{path}.up"].data.cpu().clone(),
                        self.alpha,
                    )
                    for path in self._paths
                }
            }
        )

    def remove(self) -> None:
        """Remove the low-rank term from every module."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
