"""The form `values`: a text's part is taken out of the values of cross-attention (AdaVD, Wang et al. 2025, CVPR).

In every layer of cross-attention, with q_1, ..., q_k an orthonormal basis of the texts' values and v_j the value of
token j of the prompt,

    v_j <- v_j - sum_i s_ij <q_i, v_j> q_i,    s_ij = peak / (1 + exp(-slope (cos(q_i, v_j) - centre)))

A text's value is that of its last token, and the basis is theirs by Gram-Schmidt. The start token, which is the same in
every prompt, is left alone, and so are negative prompts. With a slope of 0 and a peak of 2 every s is 1: the plain
projection, which leaves nothing of the text. Shifts s below CUT are 0, so that prompts whose values are all far from
the text keep every bit.

`published` is the published code instead, with its defects (joined_values.py).

Values do not depend on the latents or the time. Cost: two thin matrix products for each layer and step, no pass of the
network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.concepts.similarity import tokens
from erasure.config import setting
from erasure.model.architectures import Architecture
from erasure.model.base import Base
from erasure.pipelines.guards.form import Acting, Drawing, Form, rows_of
from erasure.pipelines.guards.joined_values import records, taken_out

CUT = 1e-4  # of a shift
ALIKE = 1e-3  # share of a vector's length outside of the others below which it adds no direction


@dataclass(frozen=True)
class Values(Form):
    """The settings of the projection.

    Args:
        peak: the largest shift.
        slope: how sharply the shift rises with the cosine.
        centre: cosine of a token's value and the text's at which the shift is half of its peak.
        published: whether both halves of classifier-free guidance are joined, as in the published code.
    """

    OPTIONAL: ClassVar[tuple[str, ...]] = ("published",)

    peak: float = setting(2.0, above=0)
    slope: float = setting(100.0, at_least=0)
    centre: float = setting(0.93, at_least=-1, at_most=1)
    published: bool = False

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why there are no values to change: of the other architectures, none reads CLIP's states alone."""
        if drift := architecture.drift("the values of a text"):
            return f"{drift}, and no direction of them is the text's"
        if super().unsuited(architecture):
            return "it takes a text's values from CLIP's state of the last word, and this network reads other states"
        return ""

    @classmethod
    def prepare(cls, drawing: Drawing, guards: Sequence[Acting[Values]]) -> Callable[[], ValueHooks]:
        """Compute the bases of the guards' texts in every layer, or what the published code records of them."""
        layers = value_layers(drawing.base)
        found = [(records if guard.form.published else bases)(drawing.base, guard.texts, layers) for guard in guards]
        return partial(ValueHooks, drawing, guards, layers, found)

    def removed(self, values: Tensor, basis: Tensor) -> Tensor:
        """Return what is taken out of values [n, tokens, width]: sum_i s_ij <q_i, v_j> q_i, and nothing at token 0.

        Args:
            values: v.
            basis: q [k, width], orthonormal.
        """
        inner = values @ basis.T
        cosine = inner / values.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        shift = self.shift(cosine)
        shift = shift.masked_fill(shift < CUT, 0.0)
        shift[:, 0] = 0.0
        return (shift * inner) @ basis

    def shift(self, cosine: Tensor) -> Tensor:
        """Return the shifts s that belong to cosines."""
        return self.peak * torch.sigmoid(self.slope * (cosine - self.centre))


class ValueHooks:
    """Forward hooks on the layers of values, from which they take the guards' texts out.

    Args:
        drawing: the call.
        guards: the guards that act in it.
        layers: the layers by path.
        found: for each guard the basis in each layer, or the record, by path.
    """

    def __init__(
        self,
        drawing: Drawing,
        guards: Sequence[Acting[Values]],
        layers: Mapping[str, nn.Module],
        found: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self.component, self.calls = drawing.base.component, 0
        self._forms = [guard.form for guard in guards]
        self._shares = [guard.shares.repeat_interleave(drawing.images).view(-1, 1, 1) for guard in guards]
        self._bases = found
        self._handles = [module.register_forward_hook(partial(self._shifted, path)) for path, module in layers.items()]

    def remove(self) -> None:
        """Detach the hooks from the network again."""
        for handle in self._handles:
            handle.remove()

    def _shifted(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the layer's values without the texts' parts, in the rows of the prompts; as published, in all rows."""
        self.calls += 1
        first, guided = rows_of(output, len(self._shares[0]))
        values = output[first:].float()
        change, before = torch.zeros_like(values), torch.zeros_like(values)
        for form, share, found in zip(self._forms, self._shares, self._bases, strict=True):
            basis, share = found[path].to(values), share.to(values)
            if not form.published:
                change += share * form.removed(values, basis)
                continue
            empty = output[:first].float() if guided else basis[0, :, : values.shape[-1]].expand_as(values)
            taken = share * taken_out(torch.cat([empty, values], -1), basis, form.shift)
            before, change = before + taken[..., : values.shape[-1]], change + taken[..., values.shape[-1] :]
        result = output.clone()
        result[first:] = (values - change).to(output.dtype)
        if guided and any(form.published for form in self._forms):
            result[:first] = (output[:first].float() - before).to(output.dtype)
        return result


def value_layers(base: Base) -> dict[str, nn.Module]:
    """Return the layers that make the values of cross-attention, by path."""
    return {path: module for path, module in base.targets("x-strict").items() if path.endswith("to_v")}


@torch.no_grad()
def bases(base: Base, texts: Sequence[str], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return an orthonormal basis [k, width] of the texts' values in each layer, by path, in fp32 on the CPU.

    Args:
        base: the checkpoint, for its text encoder.
        texts: the texts; those whose value lies in the span of the others' add no direction.
        layers: layers that read text states.
    """
    states = torch.stack([base.encode([text])[0, tokens(base, text) - 2] for text in texts])
    return {path: gram_schmidt(module(states.to(base.network.dtype)).float().cpu()) for path, module in layers.items()}


def gram_schmidt(vectors: Tensor) -> Tensor:
    """Return orthonormal vectors [k, width] that span the given ones [n, width], in their order; k is at most n."""
    found: list[Tensor] = []
    for vector in vectors.double():
        rest = vector
        for _ in range(2):  # once more, because the first pass leaves rounding errors along the others
            for other in found:
                rest = rest - (rest @ other) * other
        if rest.norm() > ALIKE * vector.norm():
            found.append(rest / rest.norm())
    return torch.stack(found).float() if found else vectors.new_zeros(0, vectors.shape[1])
