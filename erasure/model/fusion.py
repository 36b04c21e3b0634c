"""Fusion: many low-rank terms, each good on its own prompts, become one weight in closed form (MACE, arXiv 2403.06135).

With W_r = W0 (I + A B) the refined weight, D_i the term of concept i, k the text states of its own prompts, and p the
states that are kept:

    W = argmin  sum_i sum_k s_k || W k - (W_r + D_i) k ||^2  +  sum_p s_p || W p - W0 p ||^2  +  lambda || W - W_r ||^2

    W - W0 = W0 A B (lambda I + S) G^-1  +  sum_i D_i S_i G^-1        S_i = sum_k s_k k k^T,  S = sum_i S_i
                                                                      G = lambda I + S + sum_p s_p p p^T

Added up, the terms would act on each other's prompts; fused, each acts where its own prompts lie. G does not depend on
the layer: it is factorised once. The rank is that of A B plus that of the terms, so the change is exactly low-rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model.closed_form import Factors, StateMap


class Fusion:
    """The fusion of low-rank terms on refined weights, in float64 on the CPU.

    Args:
        refined: A and B, which all layers share.
        spans: S_i of each term [d, d].
        kept: sum_p s_p p p^T [d, d]; zeros keep nothing.
        ridge: lambda, above 0; greater values leave the terms out and keep the weights refined.

    Raises:
        ErasureError: the ridge is too small for a stable solution.
    """

    def __init__(self, refined: StateMap, spans: Sequence[Tensor], kept: Tensor, ridge: float) -> None:
        self._refined, self._spans = refined, [span.double().cpu() for span in spans]
        own = ridge * torch.eye(len(kept), dtype=torch.float64) + torch.stack(self._spans).sum(0)
        self._factor, failed = torch.linalg.cholesky_ex(own + kept.double().cpu())
        if failed:
            raise ErasureError(f"ridge={ridge:g} is too small: the fusion has no stable solution. Give a larger one")
        self._right = self._solved(refined.right @ own)  # B (lambda I + S) G^-1, the same for all layers

    def _solved(self, rows: Tensor) -> Tensor:
        """Return rows G^-1 for rows [n, d]."""
        return torch.cholesky_solve(rows.T, self._factor).T

    def factors(self, weight: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> Factors:
        """Return the change of one layer's weight.

        Args:
            weight: W0 [out, d].
            terms: down [r, d] and up [out, r] of each D_i = up down, in the order of the spans.

        Returns:
            down and up in float32 on the CPU, and alpha = rank, so that loaders multiply the product by 1.
        """
        pairs = list(zip(terms, self._spans, strict=True))
        down = torch.cat([self._right, *(self._solved(low.double().cpu() @ span) for (low, _), span in pairs)])
        answers = weight.detach().double().cpu() @ self._refined.left
        up = torch.cat([answers, *(high.double().cpu() for (_, high), _ in pairs)], dim=1)
        return down.float(), up.float(), float(len(down))
