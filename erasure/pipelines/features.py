"""Features of sparse autoencoders, switched off in the output of a block while pictures are drawn.

What becomes of an output is in `patch/features.py`. All patches that act on a block read the same output and their
changes are added, so that the order of loading changes no bit. Both halves of classifier-free guidance get the strength
of the prompt. The row of a timestep is the nearest one that the patch has, so any sampler and number of steps serve.

Cost: two thin matrix products for each patch, block and step, and no pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch import Features
from erasure.patch.features import TENSORS
from erasure.patch.module_keys import find_module
from erasure.pipelines.replaced_forward import prediction, with_prediction

Term = tuple[Features, Tensor]  # features, and their strength for each row of the batch [rows]


class FeatureHooks:
    """Hooks on a network, which tells the timestep, and on one of its blocks, whose output they change.

    Args:
        network: the network.
        block: the block.
        terms: the features that act on it, with their strengths for each image; under classifier-free guidance they
            are repeated for the second half of the batch.
    """

    def __init__(self, network: nn.Module, block: nn.Module, terms: Sequence[Term]) -> None:
        self.component, self.calls = terms[0][0].component, 0
        self._terms = [(features, shares) for features, shares in terms]
        self._placed: list[dict[str, Tensor]] = []
        self._time: Tensor | None = None
        self._handles = [
            network.register_forward_pre_hook(self._see_time, with_kwargs=True),
            block.register_forward_hook(self._changed),
        ]

    def remove(self) -> None:
        """Detach the hooks from the network again."""
        for handle in self._handles:
            handle.remove()

    def _see_time(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self._time = torch.as_tensor(time, dtype=torch.float32).detach().flatten().cpu()

    def _changed(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the block's output with the features switched off."""
        self.calls += 1
        before = prediction(output)
        if self._time is None:
            raise ErasureError("a block with features was called outside of its network, so its timestep is unknown")
        if not self._placed or self._placed[0]["encoder"].device != before.device:
            self._placed = [
                {name: getattr(features, name).to(before.device) for name in TENSORS} for features, _ in self._terms
            ]
        x = before.movedim(1, -1).float()
        change, touched = torch.zeros_like(x), torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        for (features, shares), tensors in zip(self._terms, self._placed, strict=True):
            if len(x) % len(shares):
                raise ErasureError(
                    f"features were opened for {len(shares)} images, but the network was called with a batch of "
                    f"{len(x)}, which is not a multiple of it"
                )
            strength = shares.to(x).repeat(len(x) // len(shares)).view(-1, 1, 1, 1)
            rows = nearest(features.timesteps, self._time).to(x.device)
            part, active = switched(x, tensors, rows)
            change += strength * part
            touched |= active & (strength[..., 0] != 0)
        # Where no feature passes its limit, the output keeps every bit.
        result = torch.where(touched.unsqueeze(1), before.float() + change.movedim(-1, 1), before.float())
        return with_prediction(output, torch.where(touched.unsqueeze(1), result.to(before.dtype), before))


def switched(x: Tensor, tensors: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change sum_i [z_i > limit_ti] gain_ti z_i d_i of outputs, and where a feature is active.

    Args:
        x: outputs of the block [n, h, w, d].
        tensors: those of the features, by name (`patch.features.TENSORS`).
        rows: the row of the tables for each sample [n], or one for all of them [1].

    Returns:
        The change [n, h, w, d], and a mask [n, h, w] that is true where it is not left out.
    """
    z = x @ tensors["encoder"].T + tensors["bias"]
    limits, gains = (tensors[name][rows][:, None, None] for name in ("limits", "gains"))  # [n or 1, 1, 1, k]
    active = (z > limits) & (gains != 0)
    return (gains * z).masked_fill(~active, 0.0) @ tensors["decoder"], active.any(-1)


def nearest(timesteps: Sequence[float], time: Tensor) -> Tensor:
    """Return for each timestep of a call the index of the nearest of the given ones; of two, the first.

    Args:
        timesteps: t of the rows of a table.
        time: the timesteps of the call [n].
    """
    return (torch.tensor(timesteps)[None] - time[:, None]).abs().argmin(1)


def feature_hooks(
    terms: Sequence[Term], component: Callable[[str], nn.Module], images: int
) -> list[Callable[[], FeatureHooks]]:
    """Return for each block a function that lets the features on it act.

    Args:
        terms: the features, and for each of them one strength per prompt [prompts].
        component: function from the name of a component to its module.
        images: number of images per prompt.

    Raises:
        ErasureError: a network no longer has the block.
    """
    places: dict[tuple[str, str], list[Term]] = {}
    for features, shares in terms:
        places.setdefault((features.component, features.block), []).append((features, shares.repeat_interleave(images)))
    return [_starter(component(name), name, path, found) for (name, path), found in places.items()]


def _starter(network: nn.Module, name: str, path: str, terms: list[Term]) -> Callable[[], FeatureHooks]:
    block = find_module(network, path)
    if block is None:
        raise ErasureError(f"{name} no longer has the block {path}; it had it when patches were loaded")
    return lambda: FeatureHooks(network, block, terms)
