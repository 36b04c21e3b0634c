"""What trains: whole weights, or a low-rank term beside them. Off is the base, bit for bit; one UNet serves both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank


class Adapter(Protocol):
    """Trainable tensors on a component, which can be switched off and taken off."""

    component: str

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name, fp32."""

    def off(self) -> Any:
        """Context in which the component is the base."""

    def payload(self) -> Delta | LowRank:
        """What was learnt, for a patch."""

    def remove(self) -> None:
        """Give the component back as it was."""


class Weights:
    """Train the weights and biases of modules in place, keeping the base tensors aside.

    fp32 masters: half-precision modules are trained in fp32 and cast back at the end.
    """

    def __init__(self, module: nn.Module, targets: dict[str, nn.Module], component: str = "unet") -> None:
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
        """Trained tensors by name, fp32."""
        return self._params

    def mask(self, masks: dict[str, Tensor]) -> None:
        """Let only the marked places train: gradients elsewhere are zero, so that Adam leaves them bit for bit.

        Raises:
            ErasureError: a trained tensor has no mask.
        """
        for key, param in self._params.items():
            if key not in masks:
                raise ErasureError(f"the mask says nothing of {key}")
            marks = masks[key].to(param.device)
            self._handles.append(param.register_hook(lambda grad, marks=marks: grad * marks))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Swap the base tensors in: no copy of the values is made."""
        trained = {key: param.data for key, param in self._params.items()}
        for key, param in self._params.items():
            param.data = self._base[key].to(param.dtype)
        try:
            yield
        finally:
            for key, param in self._params.items():
                param.data = trained[key]

    def twin(self, module: nn.Module) -> Weights:
        """The same, untrained, on another copy of the component."""
        paths = dict.fromkeys(key.rpartition(".")[0] for key in self._params)
        return Weights(module, {path: module.get_submodule(path) for path in paths}, self.component)

    def payload(self) -> Delta:
        """Trained minus base, fp32."""
        return Delta(
            {
                self.component: {
                    k: (p.data.float() - self._base[k].float()).cpu().contiguous() for k, p in self._params.items()
                }
            }
        )

    def remove(self) -> None:
        """Put the base's own tensors back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for key, param in self._params.items():
            param.requires_grad_(False)
            param.grad = None
            param.data = self._base[key]


class LowRankTerm:
    """y = Wx + (alpha / rank) up(down(x)) on Linear and Conv2d modules (Hu et al. 2021, eq. 3).

    down starts uniform (Kaiming, a = sqrt 5) or, `normal`, as N(0, 1 / rank); up starts at zero: at step 0 the output
    is the base's, bit for bit.
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
            raise ErasureError(f"rank={rank}: a low-rank patch needs a rank of at least 1")
        self.component, self.alpha, self.scale = component, float(alpha or rank), float(alpha or rank) / rank
        self._on = True
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
                raise ErasureError("low-rank terms on grouped convolutions are not defined")
            return (rank, target.in_channels, *target.kernel_size), (target.out_channels, rank, 1, 1)
        if isinstance(target, nn.Linear):
            return (rank, target.in_features), (target.out_features, rank)
        raise ErasureError(f"low-rank terms go on Linear and Conv2d, not on {type(target).__name__}")

    def _hook(self, path: str) -> Any:
        def add(target: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._on:
                return None
            x, down, up = inputs[0], self._params[f"{path}.down"], self._params[f"{path}.up"]
            if isinstance(target, nn.Conv2d):
                low = F.conv2d(x, down.to(x.dtype), None, target.stride, target.padding, target.dilation)  # type: ignore[arg-type]
                return output + self.scale * F.conv2d(low, up.to(x.dtype))
            return output + self.scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

        return add

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name, fp32."""
        return self._params

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the term out."""
        with self._set(False):
            yield

    @contextmanager
    def on(self) -> Iterator[None]:
        """Put the term in, also inside of `off`."""
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
        """The same, untrained, on another copy of the component."""
        targets = {path: module.get_submodule(path) for path in self._paths}
        rank = len(self._params[f"{self._paths[0]}.down"])
        options: dict[str, Any] = {"rank": rank, "alpha": self.alpha, "component": self.component}
        return LowRankTerm(module, targets, generator=torch.Generator(), **options)

    def payload(self) -> LowRank:
        """Factors by module path."""
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
        """Take the term off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
