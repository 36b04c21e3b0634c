"""Weights that are fine-tuned several times from the base, and the negation of what the fine-tunes have learnt.

With tau_k the change of fine-tune k, a task vector (Ilharco et al. 2023, arXiv 2212.04089), n fine-tunes merge to

    tau = mean_k tau_k                                                              by their mean
    tau = mean_k tau_k where all n signs are equal (a change of 0 has none), else 0     by sign consensus

(NegMerge, Kim et al. 2025, arXiv 2410.05583), and the model without what they learnt is theta_0 - lambda tau. Only the
sum of the changes and the sum of their signs are kept, five bytes for each weight, however many fine-tunes there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch import Delta
from erasure.training.adapters import Weights


class TaskVectors(Weights):
    """The weights of modules, which start anew from the base for each fine-tune.

    Args:
        module: the component; all other parameters of it are frozen.
        targets: the modules of it that train, by path.
        component: the component's name in a patch.
        consensus: merge by sign consensus; otherwise by the mean.
    """

    def __init__(
        self, module: nn.Module, targets: dict[str, nn.Module], component: str = "unet", *, consensus: bool
    ) -> None:
        super().__init__(module, targets, component)
        self.consensus, self.count, self.scale = consensus, 0, 0.0
        self._sum = {key: torch.zeros_like(param.data) for key, param in self._params.items()}
        self._signs = {key: torch.zeros_like(param.data, dtype=torch.int8) for key, param in self._params.items()}

    @property
    def held_bytes(self) -> int:
        """Return the bytes that are held besides the trained tensors."""
        return sum(5 * param.numel() for param in self._params.values())

    @torch.no_grad()
    def bank(self) -> None:
        """Add the present fine-tune's change to those before it, and put the base's weights back."""
        for key, param in self._params.items():
            base = self._base[key].float()
            change = param.data - base
            self._sum[key] += change
            self._signs[key] += change.sign().to(torch.int8)
            param.copy_(base)
        self.count += 1

    def merged(self) -> dict[str, Tensor]:
        """Return tau by the name of the parameter."""
        mean = {key: total / self.count for key, total in self._sum.items()}
        if not self.consensus:
            return mean
        return {key: torch.where(self._signs[key].abs() == self.count, tau, 0.0) for key, tau in mean.items()}

    def agreement(self) -> float:
        """Return the share of the weights that all fine-tunes changed in the same direction."""
        agreed = sum(int((signs.abs() == self.count).sum()) for signs in self._signs.values())
        return agreed / sum(signs.numel() for signs in self._signs.values())

    @torch.no_grad()
    def negate(self, scale: float) -> None:
        """Set the weights to theta_0 - scale * tau."""
        self.scale = scale
        for key, tau in self.merged().items():
            self._params[key].copy_(self._base[key].float() - scale * tau)

    def payload(self) -> Delta:
        """Return -scale * tau, whose zeros are exact.

        Raises:
            ErasureError: tau is zero.
        """
        changes = {key: (-self.scale * tau).cpu() for key, tau in self.merged().items()}
        if not any(change.any() for change in changes.values()):
            raise ErasureError(
                f"no weight was changed in the same direction by all {self.count} fine-tunes, so there is nothing to "
                "negate. Use fewer fine_tunes, a higher learning_rate or consensus=none; no patch was written"
            )
        return Delta({self.component: changes})

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept of the fine-tunes that have ended, for a checkpoint; empty before the first."""
        if not self.count:
            return {}
        kept = {f"sum.{key}": total for key, total in self._sum.items()}
        kept |= {f"signs.{key}": signs for key, signs in self._signs.items()}
        return {"count": torch.tensor(self.count), **kept}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        if not tensors:
            return
        self.count = int(tensors["count"])
        for key in self._params:
            self._sum[key].copy_(tensors[f"sum.{key}"])
            self._signs[key].copy_(tensors[f"signs.{key}"])
