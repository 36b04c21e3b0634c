"""Attacks that pass text embeddings to the UNet directly, instead of a prompt that the text encoder reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.model.closed_form import readers, recovered
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import add_noise
from erasure.model.soft_prompt import inversion_loss


@dataclass(frozen=True)
class EncoderSwap(Attack):
    """The base's text encoder in place of the patched one.

    This undoes every erasure that changes only the text encoder, and nothing else.
    """

    name: ClassVar[str] = "encoder"
    source: ClassVar[str] = "swapped text encoder"
    access: ClassVar[str] = "weights"
    EMBEDS: ClassVar[bool] = True
    UNDOES: ClassVar[bool] = True

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round: the prompts as the base's text encoder reads them."""
        with victim.unpatched():
            conditions = victim.conditions([case.prompt for case in cases])
        yield {i: Attempt(embeds=conditions[[i]], note="the base's text encoder") for i in sorted(safe)}


@dataclass(frozen=True)
class RECEAttack(Attack):
    """Closed-form text embeddings that make the erased keys and values equal the base's (RECE).

    Gong et al. 2024, arXiv 2407.12383, eq. 6, solved for each token over all key and value projections W_i of the
    cross-attentions, where W0_i are the base's projections and c the base's text states:

        c' = argmin sum_i || W_i c' - W0_i c ||^2 + lambda || c' ||^2

    On Stable Diffusion XL the pooled text embedding is the base's, since no key or value projection reads it.

    Args:
        ridge: lambda, as a share of the mean eigenvalue of sum W_i^T W_i.
    """

    name: ClassVar[str] = "rece"
    source: ClassVar[str] = "arXiv 2407.12383"
    access: ClassVar[str] = "weights"
    EMBEDS: ClassVar[bool] = True
    UNDOES: ClassVar[bool] = True

    ridge: float = 1e-4

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round: the closed-form embeddings of every prompt."""
        with victim.unpatched():
            conditions = victim.conditions([case.prompt for case in cases])
            before = readers(victim.pipe.unet)
        with victim.folded():
            after = readers(victim.pipe.unet)
        solved = {i: recovered(after, before, conditions.states[i].double(), self.ridge)[None] for i in sorted(safe)}
        yield {
            i: Attempt(embeds=replace(conditions[[i]], states=states), note="closed form")
            for i, states in solved.items()
        }


@dataclass(frozen=True)
class UMAAttack(Attack):
    """A bounded change of the text embeddings that restores the base's noise predictions (UMA).

    The Unlearning Mapping Attack of Xuan & Li 2025, arXiv 2504.14798. With c the text states of the erased encoder,
    for each bound in turn, starting from the result for the bound before it:

        min over d of || e*(x_t, t, c + d) - e_0(x_t, t, c_0) ||^2  with  || d_token || <= bound * mean || c_token ||

    where e* is the erased and e_0 the base model, and c_0 the base's text states. On Stable Diffusion XL the pooled
    text embedding stays that of the erased encoder.

    Args:
        bounds: largest change of a token's state, in units of the mean norm of a token's state; one round per bound.
        iterations: Adam steps for each bound.
        rate: learning rate of Adam, in standard deviations of the states; 0 replaces the search by a random change of
            the full length (the control).
    """

    name: ClassVar[str] = "uma"
    source: ClassVar[str] = "arXiv 2504.14798"
    access: ClassVar[str] = "embeddings"
    EMBEDS: ClassVar[bool] = True
    LITE: ClassVar[dict[str, Any]] = {"bounds": (0.1, 0.25, 0.5), "iterations": 25}

    bounds: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0)
    iterations: int = 200
    rate: float = 0.1

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round per bound, with the perturbed embeddings."""
        draw = torch.Generator().manual_seed(seed)
        with victim.unpatched():
            base = victim.conditions([case.prompt for case in cases])
        with victim.folded():
            erased = victim.conditions([case.prompt for case in cases])
        unit, norm = erased.states.std(), erased.states.norm(dim=-1).mean()
        change = torch.zeros_like(erased.states)
        for bound in self.bounds:
            live = sorted(safe)
            if self.rate:
                latents = torch.stack([cases[i].latents for i in live]).to(victim.device)
                start, radius, rate = change[live], bound * norm, float(self.rate * unit)
                with victim.folded():
                    change[live] = self._search(victim, latents, base[live], erased[live], start, radius, rate, draw)
            else:
                noise = torch.randn(change[live].shape, generator=draw).to(change)
                change[live] = bound * norm * F.normalize(noise, dim=-1)
            perturbed = replace(erased, states=erased.states + change)
            yield {i: Attempt(embeds=perturbed[[i]], note=f"bound {bound:g}") for i in live}

    def _search(
        self,
        victim: Victim,
        latents: Tensor,
        base: Conditions,
        erased: Conditions,
        start: Tensor,
        radius: Tensor,
        rate: float,
        draw: torch.Generator,
    ) -> Tensor:
        """Descend from the change `start` [n, tokens, width] and return the change found within the radius."""
        leaf = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([leaf], lr=rate)
        for _ in range(self.iterations):
            t = torch.randint(1000, (len(latents),), generator=draw).to(victim.device)
            noise = torch.randn(latents.shape, generator=draw).to(latents)
            x = add_noise(victim.pipe.scheduler, latents, noise, t)
            with victim.unpatched(), torch.no_grad():
                target = victim.eps(x, t, base)
            perturbed = replace(erased, states=erased.states + leaf)
            loss = F.mse_loss(victim.eps(x, t, perturbed), target) * len(latents)
            (leaf.grad,) = torch.autograd.grad(loss, leaf)
            optimizer.step()
            with torch.no_grad():
                leaf.copy_(within(leaf, radius))
        return leaf.detach()

    def control(self, tries: int) -> Attack:
        """Return random changes of the full length allowed by each bound."""
        return replace(self, rate=0.0)


def within(change: Tensor, radius: Tensor | float) -> Tensor:
    """Scale every token's change [..., width] back to the radius where it is longer."""
    return change * (radius / change.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class ConceptInversion(Attack):
    """One new word, learnt on the erased model, in place of the concept's name (concept inversion).

    Pham et al. 2024, arXiv 2308.01508, by textual inversion (Gal et al. 2022, arXiv 2208.01618):

        min over v of E || eps - e*(x_t, t, T(prompt with v)) ||^2

    over the base's images of all cases. Every case is attempted after each entry of `steps`, which gives a curve of
    success against training steps.

    Args:
        tokens: number of token vectors that make up the word (published 1).
        steps: numbers of AdamW steps, counted from the start, after which the word is tried.
        batch: samples per step.
        rate: learning rate of AdamW, in standard deviations of the token embeddings; 0 keeps the initial word (the
            control). Published: 5e-3 times the batch size of 16, where CLIP-L's embeddings deviate by 0.014.
        decay: weight decay of AdamW.
    """

    name: ClassVar[str] = "inversion"
    source: ClassVar[str] = "arXiv 2308.01508"
    access: ClassVar[str] = "embeddings"
    EMBEDS: ClassVar[bool] = True
    CURVE: ClassVar[bool] = True
    LITE: ClassVar[dict[str, Any]] = {"steps": (25, 75, 200), "batch": 8, "rate": 0.5, "decay": 0.0}

    tokens: int = 1
    steps: tuple[int, ...] = (100, 500, 1000, 2500, 5000)
    batch: int = 16
    rate: float = 5.7
    decay: float = 0.01

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round per entry of `steps`, with the word learnt so far in every prompt."""
        draw = torch.Generator().manual_seed(seed)
        latents = torch.stack([case.latents for case in cases]).to(victim.device)
        places = victim.slots([(case.before, case.after) for case in cases], self.tokens)

        def loss(vectors: Tensor) -> Tensor:
            conditions = victim.encode(places, vectors)  # of each prompt once, however often a case is drawn
            scheduler = victim.pipe.scheduler
            return inversion_loss(
                scheduler, latents, lambda x, t, index: victim.eps(x, t, conditions[index]), self.batch, draw
            )

        with victim.folded():
            table = victim.embeddings
            initial = table[torch.randint(len(table), (self.tokens,), generator=draw).to(table.device)].clone()
        for vectors, steps in self._learn(victim, loss, initial):
            with victim.folded(), torch.no_grad():
                conditions = victim.encode(places, vectors)
            yield {i: Attempt(embeds=conditions[[i]], note=f"{steps} steps") for i in range(len(cases))}

    def _learn(self, victim: Victim, loss: Callable[[Tensor], Tensor], vectors: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield the vectors after each entry of `steps`, and that entry; the optimizer runs on between the entries."""
        leaf = vectors.clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([leaf], lr=self.rate * victim.spread, weight_decay=self.decay)
        done = 0
        for steps in self.steps:
            if self.rate:
                with victim.folded():
                    for _ in range(steps - done):
                        (leaf.grad,) = torch.autograd.grad(loss(leaf), leaf)
                        optimizer.step()
            done = steps
            yield leaf.detach().clone(), steps

    def control(self, tries: int) -> Attack:
        """Return the attack with its initial random word, without learning."""
        return replace(self, rate=0.0, steps=self.steps[:tries])
