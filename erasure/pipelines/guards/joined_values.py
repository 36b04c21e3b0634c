"""What AdaVD's published code takes out of values, with its defects (WYuan1001/AdaVD, `src/main.py`).

It joins the values of both halves of classifier-free guidance. With u_j the unconditional value of token j and v_j the
prompt's, x_j = [u_j, v_j]; the record of text i is t_ij = [e_j, c_i], of the empty prompt's value and that of the
text's last token, c_i, which stands at every token but the first. With P the identity, and below its diagonal
P_il = - <t_lj, t_ij> / <t_lj, t_lj>, and cosines C_lj = cos(t_lj, x_j),

    o_ij = sum_l P_il t_lj,   s_lj = peak / (1 + exp(-slope (C_lj - centre)))
    x_j <- x_j - sum_i <o_ij, x_j> / <o_ij, o_ij> sum_l P_il s_lj t_lj

Its defects: e_j and u_j are the same, so that every cosine is far too high; the unconditional branch is scaled by the
same shift, which weakens the negative prompt; P projects on the t_l as they are instead of on what is orthogonal, so
that from three texts on the o_i are no orthogonal basis. It has no cut: a shift of 1e-9 still changes the bits.

The code reshapes for eight heads whatever the layer has, which is right for Stable Diffusion 1 and fails or mixes
images elsewhere. Here all heads of a layer are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from erasure.concepts.similarity import tokens
from erasure.model.base import Base


@torch.no_grad()
def records(base: Base, texts: Sequence[str], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the joined values t of texts [k, tokens, 2 width] in each layer, by path, in fp32 on the CPU.

    Args:
        base: the checkpoint, for its text encoder.
        texts: k texts.
        layers: layers that read text states.
    """
    empty, found = base.encode([""])[0].to(base.network.dtype), base.encode(list(texts)).to(base.network.dtype)
    spread = found.clone()
    for number, text in enumerate(texts):
        spread[number, 1:] = found[number, tokens(base, text) - 2]
    joined = {}
    for path, module in layers.items():
        named, nothing = module(spread).float().cpu(), module(empty).float().cpu()
        joined[path] = torch.cat([nothing.expand_as(named), named], -1)
    return joined


def taken_out(values: Tensor, record: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what is subtracted from joined values [n, tokens, 2 width]; nothing at token 0.

    Args:
        values: x.
        record: t [k, tokens, 2 width].
        shift: returns s of cosines.
    """
    texts = record.transpose(0, 1)  # [tokens, k, 2 width]
    inner = texts @ texts.transpose(1, 2)
    below = torch.tril(inner, -1) / inner.diagonal(dim1=1, dim2=2)[:, None, :]
    turn = torch.eye(len(record), dtype=record.dtype, device=record.device) - below  # P [tokens, k, k]
    basis = turn @ texts
    share = (values[:, :, None] * basis).sum(-1) / basis.square().sum(-1)  # [n, tokens, k]
    cosine = torch.cosine_similarity(values[:, :, None], texts, dim=-1)
    weights = (share.nan_to_num(0.0)[:, :, None] @ turn)[:, :, 0] * shift(cosine)
    weights[:, 0] = 0.0
    return (weights[..., None] * texts).sum(2)
