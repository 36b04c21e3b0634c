"""Which of the trained numbers change: options that every method with weights or low-rank factors of its own can take.

The change of a number is its distance from the base: of a whole weight from the base's, of a low-rank factor from 0.

- `l1`: after each update at the rate r, changes go towards 0 by r * l1, and stop there: the proximal step of
  l1 * || change ||_1. CLEAR (arXiv 2410.18057) adds this norm of a LoRA's factors to the loss and l1-sparse unlearning
  (Jia et al. 2023, arXiv 2304.04934) that of all weights. As a term of the loss it would give small numbers but no
  zeros, and Adam would divide it by the size of the gradient; here l1 is a share of Adam's full step.
- `prune`: after a share of the updates only the largest changes are kept, in one ranking over all tensors. The others
  go back to 0, and only those that are kept train on: prune first, then unlearn (Jia et al. 2023), with the change in
  the place of the model, whose own weights cannot be pruned as far.
- `sara` (arXiv 2409.06633): only the smallest weights of the base train. After a share of the updates, those of them
  that have grown beyond the largest at the start are frozen as they are. Before each update, with one matrix W drawn at
  random and M the mask of what trains, the gradient of rank_weight * || M * W ||_* (nuclear norm) is added.

Where what trains is chosen anew, Adam begins anew, as published for SaRA: its moments would move what is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from erasure.config import setting
from erasure.errors import ErasureError
from erasure.training.adapters import Adapter, LowRankTerm, Weights
from erasure.training.saliency import top


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """Settings that decide which numbers change.

    Args:
        sparsity: `l1` draws every change towards zero, `prune` keeps the largest changes and trains on with these
            alone, `sara` trains the base's smallest weights (`training/sparsity.py`).
        sparsity_l1: strength of `l1`, as a share of Adam's full step.
        sparsity_share: share of the numbers that may change with `prune` and `sara`.
        sparsity_turn: share of the updates after which `prune` chooses, and `sara` chooses again.
        sparsity_rank: weight of the nuclear norm of `sara`.
    """

    sparsity: Literal["none", "l1", "prune", "sara"] = "none"
    sparsity_l1: float = setting(0.1, above=0)
    sparsity_share: float = setting(0.1, above=0, below=1)
    sparsity_turn: float = setting(0.5, above=0, below=1)
    sparsity_rank: float = setting(5e-4, at_least=0)


class Sparse(Protocol):
    """The part of a gradient method that decides which numbers change."""

    @property
    def iterations(self) -> int:
        """Return the number of updates."""

    @property
    def method(self) -> str:
        """Return the name of the method."""

    @property
    def weight_decay(self) -> float:
        """Return the weight decay of AdamW."""

    @property
    def weight_rounding(self) -> str:
        """Return "none", or what the weights are rounded to."""

    @property
    def stop(self) -> str:
        """Return "auto" if the run ends by its measurements, or "never"."""

    @property
    def sparsity(self) -> str:
        """Return "none", "l1", "prune" or "sara"."""

    @property
    def sparsity_l1(self) -> float:
        """Return the strength of "l1"."""

    @property
    def sparsity_share(self) -> float:
        """Return the share of the numbers that may change."""

    @property
    def sparsity_turn(self) -> float:
        """Return the share of the updates after which the choice is made, or made again."""

    @property
    def sparsity_rank(self) -> float:
        """Return the weight of the nuclear norm."""


def check_sparsity(settings: Sparse, why_not: str) -> None:
    """Refuse a form of sparsity that has no meaning with the other settings of a method.

    Args:
        settings: the method with its settings; one with a `rank` trains low-rank factors.
        why_not: why the method can have no sparsity; empty where it can.

    Raises:
        ErasureError: naming the option and why it has no meaning.
    """
    form = settings.sparsity
    if form == "none":
        return
    if not why_not and getattr(settings, "parity", False):
        why_not = "the published script has no such option"
    if not why_not and form != "l1" and getattr(settings, "rank", None) is not None:
        why_not = (
            "low-rank factors train, and a product of sparse factors is not sparse. l1 works, or whole weights where "
            "the method has them (rank=null)"
        )
    if not why_not and settings.weight_rounding != "none":
        why_not = "weight_rounding rounds all weights after every update, also those that must not change"
    if not why_not and form != "l1" and settings.weight_decay:
        why_not = "weight_decay draws all weights to 0, also those that must not change"
    if not why_not and form != "l1" and settings.stop == "auto":
        why_not = "stop=auto may go back to weights from before the choice, and does not know the last update"
    if why_not:
        raise ErasureError(
            f"{settings.method}: sparsity={form} has no meaning here: {why_not}. Leave sparsity out; nothing was "
            "changed"
        )


class Sparsity:
    """The form of sparsity of a run.

    Args:
        settings: which form, and how.
        adapter: what trains, still untrained or, with `restore`, as a checkpoint left it.
        seed: draws the matrix of SaRA's nuclear norm.

    Attributes:
        masks: where a number may change, by trained tensor; empty: everywhere.

    Raises:
        ErasureError: the adapter is of a kind that this form cannot be used with.
    """

    def __init__(self, settings: Sparse, adapter: Adapter, seed: int = 0) -> None:
        self.settings, self.form, self.seed = settings, settings.sparsity, seed
        self.turn = max(1, round(settings.iterations * settings.sparsity_turn))
        self.masks: dict[str, Tensor] = {}
        self._params: dict[str, nn.Parameter] = {}
        if self.form == "none":
            return
        kinds = (Weights, LowRankTerm) if self.form == "l1" else (Weights,)
        if not isinstance(adapter, kinds):
            raise ErasureError(
                f"sparsity={self.form} works with whole weights{' and low-rank terms' if self.form == 'l1' else ''}, "
                f"and here a {type(adapter).__name__} trains. Leave sparsity out; no patch was written"
            )
        self._adapter, self._params = adapter, adapter.parameters()
        if self.form == "sara":
            self.masks = self._smallest()

    def begin(self, step: int) -> bool:
        """Choose what trains from a step on, if this is the one, and return whether Adam begins anew there."""
        if self.form not in ("prune", "sara") or step != self.turn:
            return False
        if self.form == "prune":
            self._prune()
        else:
            self._freeze_grown()
        return True

    @torch.no_grad()
    def _smallest(self) -> dict[str, Tensor]:
        sizes = {name: self._adapter.origin(name).abs() for name in self._params}
        count = sum(size.numel() for size in sizes.values())
        larger = top(sizes, (count - int(self.settings.sparsity_share * count) + 0.5) / count)  # rounded down there
        return {name: ~mask for name, mask in larger.items()}

    @torch.no_grad()
    def _prune(self) -> None:
        changes = {name: (param - self._adapter.origin(name)).abs() for name, param in self._params.items()}
        self.masks = top(changes, self.settings.sparsity_share)
        for name, param in self._params.items():
            param.copy_(torch.where(self.masks[name], param, self._adapter.origin(name)))

    @torch.no_grad()
    def _freeze_grown(self) -> None:
        """Freeze the weights that are larger now than the largest that trained at the start."""
        small = max(float((self._adapter.origin(name).abs() * mask).max()) for name, mask in self.masks.items())
        for name, param in self._params.items():
            self.masks[name] = self.masks[name] & (param.abs() <= small)

    @torch.no_grad()
    def gradients(self, step: int, scale: float = 1.0) -> None:
        """Change the gradients of an update: add that of the nuclear norm, then drop those of what must not change.

        Args:
            step: the update.
            scale: of the loss, in fp16.
        """
        if self.form == "sara" and self.settings.sparsity_rank:
            self._add_nuclear(step, scale)
        for name, mask in self.masks.items():
            gradient = self._params[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    def _add_nuclear(self, step: int, scale: float) -> None:
        matrices = [name for name, param in self._params.items() if param.dim() == 2 and param.grad is not None]
        if not matrices:
            return
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        name = matrices[int(torch.randint(len(matrices), (1,), generator=draw))]
        matrix, gradient = self._params[name] * self.masks[name], self._params[name].grad
        if gradient is not None:
            gradient.add_(nuclear_gradient(matrix), alpha=self.settings.sparsity_rank * scale)

    @torch.no_grad()
    def settle(self, rate: float) -> None:
        """Take the proximal step of `l1` after an update at a learning rate."""
        if self.form != "l1":
            return
        for name, param in self._params.items():
            origin = self._adapter.origin(name)
            param.copy_(origin + shrunk(param - origin, rate * self.settings.sparsity_l1))

    def tensors(self) -> dict[str, Tensor]:
        """Return the masks, for a checkpoint."""
        return {name: mask.to(torch.uint8) for name, mask in self.masks.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        if tensors:
            self.masks = {name: mask.to(self._params[name].device, torch.bool) for name, mask in tensors.items()}


def held_bytes(form: str, params: Mapping[str, nn.Parameter]) -> int:
    """Return the bytes that a form of sparsity holds at most besides what trains.

    These are the masks, with `prune` the sizes of the changes while it chooses, and with `sara` the factors of the
    largest matrix.
    """
    numbers = sum(param.numel() for param in params.values())
    if form == "prune":
        return 5 * numbers
    if form != "sara":
        return 0
    shapes = [param.shape for param in params.values() if param.dim() == 2]
    return numbers + 4 * max((2 * a * b + min(a, b) * (a + b + 1) for a, b in shapes), default=0)


def shrunk(change: Tensor, by: float) -> Tensor:
    """Return sign(change) max(|change| - by, 0), the soft threshold."""
    return change.sign() * (change.abs() - by).clamp_min(0)


def nuclear_gradient(matrix: Tensor) -> Tensor:
    """Return U V^T of a matrix U S V^T, the gradient of its nuclear norm (a subgradient where its rank is not full)."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > s.max() * max(matrix.shape) * torch.finfo(s.dtype).eps
    return (u[:, kept] @ v[kept]).to(matrix)
