"""Closed-form edits of linear layers: regularised least squares in float64, with the change as exact factors.

For a matrix W0 [out, d] that reads text states, and columns c_e to edit, g_e to imitate and c_k to keep (UCE, Gandikota
et al. 2024, arXiv 2308.14761):

    W = argmin  sum_e s_e || W c_e - W0 g_e ||^2  +  sum_k s_k || W c_k - W0 c_k ||^2  +  lambda || W - W0 ||^2

    W - W0 = [ sum_e s_e W0 (g_e - c_e) c_e^T ] G^-1       G = lambda I + sum_e s_e c_e c_e^T + sum_k s_k c_k c_k^T

G does not depend on W0: it is factorised once for all layers. The change has at most as many ranks as there are edited
columns, so that it is an exact low-rank patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError

READERS = ("attn2.to_k", "attn2.to_v")  # the layers that read text states: keys and values of cross-attention


@dataclass(frozen=True)
class Columns:
    """What a closed-form edit is given: text states as rows, d numbers each.

    Args:
        edit: states to edit [n, d].
        guide: the states whose answers the edited ones get instead [n, d].
        keep: states whose answers stay [m, d]; m may be 0.
        edit_weight: s_e, one number for all edited columns.
        keep_weight: s_k, one number for all kept columns.
        ridge: lambda; greater values keep the weights nearer to where they were.

    Raises:
        ErasureError: shapes that do not agree, nothing to edit, or a weight or ridge that is not above 0.
    """

    edit: Tensor
    guide: Tensor
    keep: Tensor
    edit_weight: float = 1.0
    keep_weight: float = 1.0
    ridge: float = 0.5

    def __post_init__(self) -> None:
        if self.edit.dim() != 2 or not len(self.edit) or self.edit.shape != self.guide.shape:
            raise ErasureError(
                f"a closed form needs at least one column to edit and a guide for each: got {tuple(self.edit.shape)} "
                f"and {tuple(self.guide.shape)}"
            )
        if self.keep.dim() != 2 or self.keep.shape[1] != self.edit.shape[1]:
            raise ErasureError(f"kept columns are {tuple(self.keep.shape)}, and edited ones {tuple(self.edit.shape)}")
        if min(self.edit_weight, self.keep_weight, self.ridge) <= 0:
            raise ErasureError("the weights of edited and kept columns and the ridge must be above 0")


class Edit:
    """The part of a closed-form edit that all layers share: G, factorised once, in float64 on the CPU."""

    def __init__(self, columns: Columns) -> None:
        edit, guide, keep = (states.double().cpu() for states in (columns.edit, columns.guide, columns.keep))
        gram = columns.ridge * torch.eye(edit.shape[1], dtype=torch.float64)
        gram += columns.edit_weight * edit.T @ edit + columns.keep_weight * keep.T @ keep
        self.difference = columns.edit_weight * (guide - edit)  # [n, d]
        self.down = torch.cholesky_solve(edit.T, torch.linalg.cholesky(gram)).T.contiguous()  # c_e^T G^-1, [n, d]

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the change of a matrix [out, d] as (down [n, d], up [out, n], alpha): the change is up @ down.

        alpha equals the rank n, so that loaders scale the product by 1.
        """
        up = weight.detach().double().cpu() @ self.difference.T
        return self.down.float(), up.float(), float(len(self.down))


def readers(unet: Any) -> Tensor:
    """Return the present weights of all keys and values of cross-attention, stacked [outputs, d], in float64."""
    weights = [module.weight.detach().double() for path, module in unet.named_modules() if path.endswith(READERS)]
    return torch.cat(weights)


def recovered(after: Tensor, before: Tensor, states: Tensor, ridge: float) -> Tensor:
    """Return the states that make edited weights answer as the base's do (RECE, arXiv 2407.12383, eq. 6).

        c' = argmin || W c' - W0 c ||^2 + lambda || c' ||^2

    Args:
        after: the edited weights W [outputs, d], float64; see `readers`.
        before: the base's weights W0 [outputs, d], float64.
        states: c, one a row [tokens, d], float64.
        ridge: lambda, as a share of the mean eigenvalue of W^T W.

    Returns:
        c' [tokens, d] in float32.
    """
    gram = after.T @ after
    ridged = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(ridged, after.T @ (before @ states.T)).T.float()
