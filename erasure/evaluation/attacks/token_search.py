"""Attacks by text: tokens before the prompt, found through the erased model's gradients; random ones to compare."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import add_noise
from erasure.model.soft_prompt import Slots


@dataclass(frozen=True)
class RandomTokens(Attack):
    """Random tokens before the prompt: what as many tries give without a search."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"
    access: ClassVar[str] = "text"
    LITE: ClassVar[dict[str, Any]] = {"tries": 5}

    tokens: int = 3
    tries: int = 50

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """New tokens every time."""
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.tries):
            picks = torch.randint(len(victim.words), (len(cases), self.tokens), generator=draw)
            yield {i: Attempt(prefixed(victim, victim.words[picks[i]], cases[i])) for i in sorted(safe)}

    def control(self, tries: int) -> None:
        """It is one."""


@dataclass(frozen=True)
class TokenSearch(Attack):
    """Tokens before every case's prompt, searched for all cases in one batch.

    Args:
        tokens: how many stand before the prompt.
        levels: noise levels, from low to high; after each the tokens found so far are tried.
        iterations: steps a level.
        lowest: of the levels.
        highest: of the levels.
        mixed: draw the level anew for every case and step, as the papers' expectation over t has it; their code
            goes from level to level.
    """

    access: ClassVar[str] = "text"

    tokens: int = 3
    levels: int = 50
    iterations: int = 40
    lowest: int = 10
    highest: int = 990
    mixed: bool = False

    @abstractmethod
    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """What descends."""

    @abstractmethod
    def begin(self, victim: Victim, count: int, draw: torch.Generator) -> Tensor:
        """What is searched [cases, tokens, ...], to begin with."""

    @abstractmethod
    def picked(self, victim: Victim, variable: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """For a step: token vectors [n, tokens, width] as the encoder reads them, and the leaf that they hang on."""

    @abstractmethod
    def chosen(self, victim: Victim, variable: Tensor) -> Tensor:
        """The ids that are meant [n, tokens]."""

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Descend at each level in turn, then try."""
        draw = torch.Generator().manual_seed(seed)
        with victim.folded():
            places = victim.slots([("", case.prompt) for case in cases], self.tokens)
            variable = self.begin(victim, len(cases), draw)
        optimizer = self.optimizer(victim, variable)
        for level in torch.linspace(self.lowest, self.highest, self.levels).round().long():
            live = sorted(safe)
            with victim.folded():
                wanted = self.wanted(victim, [cases[i] for i in live])
                here = [Slots(one.ids[live], one.at[live]) for one in places]
                for _ in range(self.iterations):
                    t = level.repeat(len(live))
                    if self.mixed:
                        t = torch.randint(self.lowest, self.highest + 1, t.shape, generator=draw)
                    vectors, leaf = self.picked(victim, variable[live], draw)
                    loss = self.loss(victim, wanted, victim.encode(here, vectors), t, draw)
                    (gradient,) = torch.autograd.grad(loss, leaf)
                    variable.grad = torch.zeros_like(variable)
                    variable.grad[live] = self.shaped(gradient)
                    optimizer.step()
                    self.project(variable)
                found = self.chosen(victim, variable)
            yield {i: Attempt(prefixed(victim, found[i], cases[i])) for i in live}

    def wanted(self, victim: Victim, cases: list[Case]) -> tuple[Any, ...]:
        """Latents of the base's pictures, and whatever else the objective asks for."""
        return (torch.stack([case.latents for case in cases]).to(victim.device),)

    def loss(
        self, victim: Victim, wanted: tuple[Any, ...], read: Conditions, t: Tensor, draw: torch.Generator
    ) -> Tensor:
        """|| eps - e*(x_t, t, c') ||^2, the diffusion classifier's (UnlearnDiffAtk, eq. 5); summed over the cases."""
        latents = wanted[0]
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        t = t.to(latents.device)
        made = victim.eps(add_noise(victim.pipe.scheduler, latents, noise, t), t, read)
        return F.mse_loss(made, noise) * len(latents)

    def shaped(self, gradient: Tensor) -> Tensor:
        """What the optimiser gets."""
        return gradient

    def project(self, variable: Tensor) -> None:
        """Back to where the variable may be."""

    def control(self, tries: int) -> Attack:
        """Random tokens."""
        return RandomTokens(self.tokens, tries)


@dataclass(frozen=True)
class UnlearnDiffAtk(TokenSearch):
    """A distribution over the vocabulary for each token, on the simplex (Zhang et al. 2024, arXiv 2310.11868).

    No other model helps: the erased model is its own classifier. Every step samples one-hot tokens, the gradient
    (straight through, cut to [-1, 1]) goes to their distribution. Nudity takes 5 tokens, as published.

    Args:
        rate: of Adam.
        decay: of Adam, added to the gradient. As published it outweighs the gradient as soon as a token has a share of
            some per cent (0.1 x 0.03 against about 0.001): the shares stay nearly even, and the most probable tokens
            mean little. The published attack has 51 tries to make up for it; few tries need a decay of 0.
    """

    name: ClassVar[str] = "unlearndiffatk"
    source: ClassVar[str] = "arXiv 2310.11868"
    LITE: ClassVar[dict[str, Any]] = {
        # A small vocabulary's tokens say less each: 3 bring nothing back where 16 do, as in P4D.
        **{"tokens": 16, "levels": 3, "iterations": 25, "rate": 0.03, "decay": 0.0},
        **{"lowest": 200, "highest": 850, "mixed": True},  # beyond these, the prompt hardly matters to the loss
    }

    rate: float = 0.01
    decay: float = 0.1

    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """Adam as published."""
        return torch.optim.Adam([variable], lr=self.rate, weight_decay=self.decay)

    def begin(self, victim: Victim, count: int, draw: torch.Generator) -> Tensor:
        """Every token alike."""
        size = len(victim.words)
        return torch.full((count, self.tokens, size), 1 / size, device=victim.device)

    def picked(self, victim: Victim, variable: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """A sample; the gradient of the one-hot vectors is taken for the distribution's."""
        shares = variable.flatten(0, 1).cpu()
        index = torch.multinomial(shares, 1, generator=draw).view(variable.shape[:2]).to(victim.device)
        hot = F.one_hot(index, variable.shape[-1]).float().requires_grad_(True)
        return hot @ victim.embeddings[victim.words], hot

    def shaped(self, gradient: Tensor) -> Tensor:
        """Cut."""
        return gradient.clamp(-1, 1)

    def project(self, variable: Tensor) -> None:
        """Onto the simplex."""
        variable.copy_(simplex(variable))

    def chosen(self, victim: Victim, variable: Tensor) -> Tensor:
        """The most probable tokens."""
        return victim.words[variable.argmax(-1)]


@dataclass(frozen=True)
class P4D(TokenSearch):
    """Continuous vectors, read as their nearest tokens (Chin et al. 2024, arXiv 2309.06135; PEZ, arXiv 2302.03668).

    The erased model has to say with the new prompt what the base says with the plain one.

    Args:
        rate: of AdamW, in standard deviations of the embeddings (published 0.1, where CLIP-L's deviate by 0.014).
    """

    name: ClassVar[str] = "p4d"
    source: ClassVar[str] = "arXiv 2309.06135"
    LITE: ClassVar[dict[str, Any]] = {"levels": 6, "iterations": 15}

    tokens: int = 16
    levels: int = 60
    iterations: int = 50
    rate: float = 7.0

    def begin(self, victim: Victim, count: int, draw: torch.Generator) -> Tensor:
        """Embeddings of random tokens."""
        picks = torch.randint(len(victim.words), (count, self.tokens), generator=draw)
        return victim.embeddings[victim.words[picks]].clone()

    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """AdamW as published."""
        return torch.optim.AdamW([variable], lr=self.rate * victim.spread, weight_decay=0.1)

    def picked(self, victim: Victim, variable: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """The nearest tokens; their gradient is taken for the vectors'."""
        leaf = victim.embeddings[self.chosen(victim, variable)].requires_grad_(True)
        return leaf, leaf

    def chosen(self, victim: Victim, variable: Tensor) -> Tensor:
        """Nearest by cosine."""
        table = F.normalize(victim.embeddings[victim.words], dim=-1)
        return victim.words[(F.normalize(variable, dim=-1) @ table.T).argmax(-1)]

    def wanted(self, victim: Victim, cases: list[Case]) -> tuple[Any, ...]:
        """The base's own reading of the prompts too."""
        with victim.unpatched():
            return *super().wanted(victim, cases), victim.conditions([case.prompt for case in cases])

    def loss(
        self, victim: Victim, wanted: tuple[Any, ...], read: Conditions, t: Tensor, draw: torch.Generator
    ) -> Tensor:
        """|| e_0(x_t, t, c) - e*(x_t, t, c') ||^2."""
        latents, plain = wanted
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        t = t.to(latents.device)
        x = add_noise(victim.pipe.scheduler, latents, noise, t)
        with victim.unpatched(), torch.no_grad():
            said = victim.eps(x, t, plain)
        return F.mse_loss(victim.eps(x, t, read), said) * len(latents)


def simplex(rows: Tensor) -> Tensor:
    """Euclidean projection of the last dimension onto {p >= 0, sum p = 1} (Duchi et al. 2008, algorithm 1)."""
    sorted_rows = rows.sort(-1, descending=True).values
    excess = sorted_rows.cumsum(-1) - 1
    rank = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    support = (sorted_rows * rank > excess).sum(-1, keepdim=True)
    return (rows - excess.gather(-1, support - 1) / support).clamp(min=0)


def prefixed(victim: Victim, ids: Tensor, case: Case) -> str:
    """The tokens as text before the prompt. What counts is the string: it may be cut into other tokens again."""
    return f"{victim.pipe.tokenizer.decode(ids.tolist()).strip()} {case.prompt}"
