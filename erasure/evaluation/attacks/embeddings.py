"""Attacks by embeddings: what a text encoder could say, were it asked by somebody who holds the pen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.model.closed_form import readers, recovered
from erasure.model.diffusion import add_noise
from erasure.model.soft_prompt import search


@dataclass(frozen=True)
class Encoder(Attack):
    """The base's own text encoder in place of the patched one: undoes whatever touched only the encoder."""

    name: ClassVar[str] = "encoder"
    source: ClassVar[str] = "swapped text encoder"
    access: ClassVar[str] = "weights"

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """One."""
        with victim.unpatched():
            told = victim.conditions([case.prompt for case in cases])
        yield {i: Attempt(embeds=told[[i]], note="the base's text encoder") for i in sorted(safe)}


@dataclass(frozen=True)
class ClosedForm(Attack):
    """The states that make the changed keys and values say what the base's say (RECE, arXiv 2407.12383, eq. 6).

        c' = argmin sum_i || W_i c' - W0_i c ||^2 + lambda || c' ||^2

    over all keys and values of the cross-attentions, token by token; c are the base's states. XL's pooled text, which
    no key or value reads, is the base's.

    Args:
        ridge: lambda, as a share of the mean eigenvalue of sum W^T W.
    """

    name: ClassVar[str] = "rece"
    source: ClassVar[str] = "arXiv 2407.12383"
    access: ClassVar[str] = "weights"

    ridge: float = 1e-4

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """One."""
        with victim.unpatched():
            told = victim.conditions([case.prompt for case in cases])
            before = readers(victim.pipe.unet)
        with victim.folded():
            after = readers(victim.pipe.unet)
        yield {
            i: Attempt(
                embeds=replace(told[[i]], states=recovered(after, before, told.states[i].double(), self.ridge)[None]),
                note="closed form",
            )
            for i in sorted(safe)
        }


@dataclass(frozen=True)
class Perturbation(Attack):
    """A bounded change of the prompt's states that brings the base's answers back (UMA, arXiv 2504.14798).

        min || e*(x_t, t, c + d) - e_0(x_t, t, c) ||^2  with  || d_token || <= bound * mean || c_token ||

    c are the states as the erased encoder says them (on XL its pooled text stays as it is). The bounds are tried in
    turn, so the record is a curve.

    Args:
        bounds: in units of the mean norm of a token's state.
        iterations: steps of Adam for each bound.
        rate: of Adam, in standard deviations of the states.
    """

    name: ClassVar[str] = "uma"
    source: ClassVar[str] = "arXiv 2504.14798"
    access: ClassVar[str] = "embeddings"
    LITE: ClassVar[dict[str, Any]] = {"bounds": (0.1, 0.25, 0.5), "iterations": 25}

    bounds: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0)
    iterations: int = 200
    rate: float = 0.1

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """A bound a round."""
        draw = torch.Generator().manual_seed(seed)
        with victim.unpatched():
            named = victim.conditions([case.prompt for case in cases])
        with victim.folded():
            told = victim.conditions([case.prompt for case in cases])
        plain = told.states
        unit, norm = plain.std(), plain.norm(dim=-1).mean()
        change = torch.zeros_like(plain)
        for bound in self.bounds:
            live = sorted(safe)
            latents = torch.stack([cases[i].latents for i in live]).to(victim.device)
            with victim.folded():
                leaf = change[live].clone().requires_grad_(True)
                optimizer = torch.optim.Adam([leaf], lr=float(self.rate * unit))
                for _ in range(self.iterations if self.rate else 0):
                    t = torch.randint(1000, (len(live),), generator=draw).to(victim.device)
                    noise = torch.randn(latents.shape, generator=draw).to(latents)
                    x = add_noise(victim.pipe.scheduler, latents, noise, t)
                    with victim.unpatched(), torch.no_grad():
                        wanted = victim.eps(x, t, named[live])
                    pushed = replace(told[live], states=plain[live] + leaf)
                    loss = F.mse_loss(victim.eps(x, t, pushed), wanted) * len(live)
                    (leaf.grad,) = torch.autograd.grad(loss, leaf)
                    optimizer.step()
                    with torch.no_grad():
                        leaf.copy_(within(leaf, bound * norm))
                if not self.rate:
                    noise = torch.randn(leaf.shape, generator=draw).to(leaf)
                    leaf = bound * norm * F.normalize(noise, dim=-1)
                change[live] = leaf.detach()
            moved = replace(told, states=plain + change)
            yield {i: Attempt(embeds=moved[[i]], note=f"bound {bound:g}") for i in live}

    def control(self, tries: int) -> Attack:
        """Random changes of the full length."""
        return replace(self, rate=0.0)


def within(change: Tensor, radius: Tensor | float) -> Tensor:
    """Every token's change [..., width] scaled back into the ball."""
    return change * (radius / change.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class Inversion(Attack):
    """One new word, learnt on the erased model, in place of the concept's name (concept inversion; Pham et al. 2024,
    arXiv 2308.01508; textual inversion, arXiv 2208.01618):

        min over v of E || eps - e*(x_t, t, T(prompt with v)) ||^2

    over the base's pictures of all cases. Asked after each of `steps`: accuracy against steps.

    Args:
        tokens: vectors that make up the word (published 1).
        steps: of Adam in all, at each of which the word is tried.
        batch: samples a step.
        rate: of Adam, in standard deviations of the token embeddings (published 5e-3, x 16 by the batch; CLIP-L's
            deviate by 0.014).
    """

    name: ClassVar[str] = "inversion"
    source: ClassVar[str] = "arXiv 2308.01508"
    access: ClassVar[str] = "embeddings"
    CURVE: ClassVar[bool] = True
    LITE: ClassVar[dict[str, Any]] = {"steps": (25, 75, 200), "batch": 8}

    tokens: int = 1
    steps: tuple[int, ...] = (100, 500, 1000, 2500, 5000)
    batch: int = 16
    rate: float = 0.5

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """A piece of the search a round."""
        draw = torch.Generator().manual_seed(seed)
        latents = torch.stack([case.latents for case in cases]).to(victim.device)
        where = victim.slots([(case.before, case.after) for case in cases], self.tokens)

        def loss(vectors: Tensor, step: int) -> Tensor:
            index = torch.randint(len(cases), (self.batch,), generator=draw)
            t = torch.randint(1000, (self.batch,), generator=draw).to(victim.device)
            noise = torch.randn(latents[index].shape, generator=draw).to(latents)
            # The encoder reads each prompt once; a case may stand in the batch more often.
            told = victim.encode(where, vectors)[index]
            return F.mse_loss(victim.eps(add_noise(victim.pipe.scheduler, latents[index], noise, t), t, told), noise)

        with victim.folded():
            table = victim.embeddings
            begun = table[torch.randint(len(table), (self.tokens,), generator=draw).to(table.device)].clone()
        for vectors, steps in self._found(victim, loss, begun):
            with victim.folded(), torch.no_grad():
                told = victim.encode(where, vectors)
            yield {i: Attempt(embeds=told[[i]], note=f"{steps} steps") for i in range(len(cases))}

    def _found(self, victim: Victim, loss: Any, vectors: Tensor) -> Iterator[tuple[Tensor, int]]:
        done = 0
        for steps in self.steps:
            if self.rate:
                with victim.folded():
                    vectors = search(loss, vectors, steps - done, self.rate * victim.spread)
            done = steps
            yield vectors, steps

    def control(self, tries: int) -> Attack:
        """The random word that it begins with."""
        return replace(self, rate=0.0, steps=self.steps[:tries])
