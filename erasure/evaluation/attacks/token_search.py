"""Text attacks: tokens before a prompt or in its place, searched with the erased model's gradients or random."""

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
    """Random tokens before the prompt: the control of attacks that search for tokens.

    Args:
        tokens: number of random tokens.
        tries: number of rounds, each with new tokens.
        alone: give the tokens in place of the prompt instead of before it.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"
    access: ClassVar[str] = "text"
    LITE: ClassVar[dict[str, Any]] = {"tries": 5}

    tokens: int = 3
    tries: int = 50
    alone: bool = False

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield rounds of prompts with new random tokens before them, or in their place."""
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.tries):
            picks = torch.randint(len(victim.words), (len(cases), self.tokens), generator=draw)
            yield {i: Attempt(prompt_with(victim, victim.words[picks[i]], cases[i], self.alone)) for i in sorted(safe)}

    def control(self, tries: int) -> None:
        """Return None, because random tokens are a control themselves."""


@dataclass(frozen=True)
class TokenSearch(Attack):
    """Tokens for every case's prompt, found by gradient descent for all cases in one batch.

    The search has as many rounds as noise levels. After each round the current tokens are tried. Class attribute:
    `ALONE`, true if the tokens are the whole prompt instead of standing before the case's.

    Args:
        tokens: number of tokens.
        levels: number of rounds, each of which ends with a try.
        iterations: optimizer steps per round.
        lowest: timestep of the lowest noise level.
        highest: timestep of the highest noise level.
        mixed: draw a new timestep between the two, uniformly, for every case and step. Otherwise each round has one
            level, and the levels rise.
    """

    access: ClassVar[str] = "text"
    ALONE: ClassVar[bool] = False

    tokens: int = 3
    levels: int = 50
    iterations: int = 40
    lowest: int = 10
    highest: int = 990
    mixed: bool = False

    @abstractmethod
    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer of the search variable."""

    @abstractmethod
    def initial(self, victim: Victim, count: int, draw: torch.Generator) -> Tensor:
        """Return the initial search variable [cases, tokens, ...] for `count` cases."""

    @abstractmethod
    def sample(self, victim: Victim, variable: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Choose tokens for one step of the search.

        Returns:
            Token vectors [n, tokens, width] for the text encoder; the leaf tensor whose gradient stands for the
            gradient of `variable`; and the ids [n, tokens] of the tokens.
        """

    @abstractmethod
    def token_ids(self, victim: Victim, variable: Tensor) -> Tensor:
        """Return the token ids [n, tokens] that the search variable stands for."""

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one try per round: the prompts with the tokens found so far."""
        draw = torch.Generator().manual_seed(seed)
        with victim.folded():
            places = victim.slots([("", "" if self.ALONE else case.prompt) for case in cases], self.tokens)
            variable = self.initial(victim, len(cases), draw)
        optimizer = self.optimizer(victim, variable)
        for level in torch.linspace(self.lowest, self.highest, self.levels).round().long():
            live = sorted(safe)
            with victim.folded():
                targets = self.targets(victim, [cases[i] for i in live])
                live_places = [Slots(slots.ids[live], slots.at[live]) for slots in places]
                for _ in range(self.iterations):
                    t = level.repeat(len(live))
                    if self.mixed:
                        t = torch.randint(self.lowest, self.highest + 1, t.shape, generator=draw)
                    vectors, leaf, ids = self.sample(victim, variable[live], draw)
                    texts = [prompt_with(victim, row, cases[i], self.ALONE) for i, row in zip(live, ids, strict=True)]
                    with victim.reading(texts):
                        loss = self.loss(victim, targets, victim.encode(live_places, vectors), t, draw)
                    (gradient,) = torch.autograd.grad(loss, leaf)
                    variable.grad = torch.zeros_like(variable)
                    variable.grad[live] = self.clipped(gradient)
                    optimizer.step()
                    self.project(variable)
                ids = self.token_ids(victim, variable)
            yield {i: Attempt(prompt_with(victim, ids[i], cases[i], self.ALONE)) for i in live}

    def targets(self, victim: Victim, cases: list[Case]) -> tuple[Any, ...]:
        """Return what `loss` compares with: the latents of the base's images [n, c, h, w], and more in subclasses."""
        return (torch.stack([case.latents for case in cases]).to(victim.device),)

    def loss(
        self, victim: Victim, targets: tuple[Any, ...], conditions: Conditions, t: Tensor, draw: torch.Generator
    ) -> Tensor:
        """Return || eps - e*(x_t, t, c') ||^2, summed over the cases.

        This is the loss of the diffusion classifier (UnlearnDiffAtk, eq. 5).

        Args:
            victim: the erased model e*.
            targets: as `targets` returns them.
            conditions: c', the prompts with the current tokens.
            t: timesteps [n].
            draw: generator of the noise.
        """
        latents = targets[0]
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        t = t.to(latents.device)
        predicted = victim.eps(add_noise(victim.pipe.scheduler, latents, noise, t), t, conditions)
        return F.mse_loss(predicted, noise) * len(latents)

    def clipped(self, gradient: Tensor) -> Tensor:
        """Return the gradient as the optimizer gets it; unchanged unless a subclass clips it."""
        return gradient

    def project(self, variable: Tensor) -> None:
        """Move the search variable back to its allowed set, in place; by default everything is allowed."""

    def control(self, tries: int) -> Attack:
        """Return equally many random tokens in the same place."""
        return RandomTokens(self.tokens, tries, self.ALONE)


@dataclass(frozen=True)
class UnlearnDiffAtk(TokenSearch):
    """A probability distribution over the vocabulary for each token (UnlearnDiffAtk).

    Zhang et al. 2024, arXiv 2310.11868. No other model is needed: the erased model serves as its own classifier. Every
    step samples one-hot tokens; their gradient, clipped to [-1, 1], is used as the gradient of the probabilities
    (straight-through estimator), which are then projected onto the simplex. The published attack uses 5 tokens for
    nudity and 3 otherwise.

    Args:
        rate: learning rate of Adam.
        decay: weight decay of Adam, which is added to the gradient. The published value outweighs the gradient as soon
            as a token has a probability of a few per cent (0.1 x 0.03 against about 0.001), so the probabilities stay
            nearly uniform and the most probable tokens mean little. The published attack makes up for this with 51
            tries; with few tries use 0.
    """

    name: ClassVar[str] = "unlearndiffatk"
    source: ClassVar[str] = "arXiv 2310.11868"
    LITE: ClassVar[dict[str, Any]] = {
        # Each token of a small vocabulary carries less: 3 tokens recover nothing where 16, as in P4D, do.
        **{"tokens": 16, "levels": 3, "iterations": 25, "rate": 0.03, "decay": 0.0},
        **{"lowest": 200, "highest": 850, "mixed": True},  # outside, the prompt hardly affects the loss
    }

    rate: float = 0.01
    decay: float = 0.1

    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """Return Adam with the published kind of weight decay."""
        return torch.optim.Adam([variable], lr=self.rate, weight_decay=self.decay)

    def initial(self, victim: Victim, count: int, draw: torch.Generator) -> Tensor:
        """Return uniform probabilities [count, tokens, words]."""
        size = len(victim.words)
        return torch.full((count, self.tokens, size), 1 / size, device=victim.device)

    def sample(self, victim: Victim, variable: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Sample one-hot tokens; their gradient stands for that of the probabilities."""
        probabilities = variable.flatten(0, 1).cpu()
        index = torch.multinomial(probabilities, 1, generator=draw).view(variable.shape[:2]).to(victim.device)
        one_hot = F.one_hot(index, variable.shape[-1]).float().requires_grad_(True)
        return one_hot @ victim.embeddings[victim.words], one_hot, victim.words[index]

    def clipped(self, gradient: Tensor) -> Tensor:
        """Return the gradient clipped to [-1, 1]."""
        return gradient.clamp(-1, 1)

    def project(self, variable: Tensor) -> None:
        """Project the probabilities onto the simplex, in place."""
        variable.copy_(simplex(variable))

    def token_ids(self, victim: Victim, variable: Tensor) -> Tensor:
        """Return the most probable token at each position."""
        return victim.words[variable.argmax(-1)]


@dataclass(frozen=True)
class ProjectedTokens(TokenSearch):
    """Continuous vectors that the text encoder reads as their nearest tokens (PEZ, arXiv 2302.03668).

    The erased model with the new prompt is made to predict the same noise as the base model with the plain prompt.

    Args:
        rate: learning rate, in standard deviations of the token embeddings.
        decay: weight decay.
    """

    rate: float = 1.0
    decay: float = 0.1

    def initial(self, victim: Victim, count: int, draw: torch.Generator) -> Tensor:
        """Return the embeddings [count, tokens, width] of random tokens."""
        picks = torch.randint(len(victim.words), (count, self.tokens), generator=draw)
        return victim.embeddings[victim.words[picks]].clone()

    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """Return AdamW, whose weight decay is not part of the gradient."""
        return torch.optim.AdamW([variable], lr=self.rate * victim.spread, weight_decay=self.decay)

    def sample(self, victim: Victim, variable: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of the nearest tokens; their gradient stands for that of the vectors."""
        ids = self.token_ids(victim, variable)
        leaf = victim.embeddings[ids].requires_grad_(True)
        return leaf, leaf, ids

    def token_ids(self, victim: Victim, variable: Tensor) -> Tensor:
        """Return the token with the largest cosine similarity at each position."""
        table = F.normalize(victim.embeddings[victim.words], dim=-1)
        return victim.words[(F.normalize(variable, dim=-1) @ table.T).argmax(-1)]

    def targets(self, victim: Victim, cases: list[Case]) -> tuple[Any, ...]:
        """Return the latents of the base's images, and the plain prompts as the base's text encoder reads them."""
        with victim.unpatched():
            return *super().targets(victim, cases), victim.conditions([case.prompt for case in cases])

    def loss(
        self, victim: Victim, targets: tuple[Any, ...], conditions: Conditions, t: Tensor, draw: torch.Generator
    ) -> Tensor:
        """Return || e_0(x_t, t, c) - e*(x_t, t, c') ||^2, summed over the cases, with e_0 the base model."""
        latents, plain = targets
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        t = t.to(latents.device)
        x = add_noise(victim.pipe.scheduler, latents, noise, t)
        with victim.unpatched(), torch.no_grad():
            expected = victim.eps(x, t, plain)
        return F.mse_loss(victim.eps(x, t, conditions), expected) * len(latents)


@dataclass(frozen=True)
class P4D(ProjectedTokens):
    """A free-standing prompt that makes the erased model predict what the base predicts for the plain prompt (P4D).

    Chin et al. 2024, arXiv 2309.06135, in the form P4D-N. Every step draws a timestep uniformly; every 50 steps the
    prompt is tried. The published code keeps the prompt whose image is closest to the base's by CLIP and judges that
    image; here the judge sees every try. Only tokens that survive being written down are searched (`Victim.words`).

    Args:
        rate: learning rate of AdamW, in standard deviations of the token embeddings. The published 0.1 is absolute;
            CLIP-L's embeddings have a standard deviation of 0.014.
        decay: weight decay of AdamW.
    """

    name: ClassVar[str] = "p4d"
    source: ClassVar[str] = "arXiv 2309.06135"
    ALONE: ClassVar[bool] = True
    LITE: ClassVar[dict[str, Any]] = {"levels": 6, "iterations": 15}

    tokens: int = 16
    levels: int = 60
    iterations: int = 50
    lowest: int = 0
    highest: int = 999
    mixed: bool = True
    rate: float = 7.1


@dataclass(frozen=True)
class P4DPrefix(ProjectedTokens):
    """Tokens before the prompt with P4D's objective, as the authors of UnlearnDiffAtk compare P4D with their attack.

    This is the variant in the code of Zhang et al. 2024, arXiv 2310.11868: the prompt is kept, and the noise levels
    rise from one round to the next.

    Args:
        rate: learning rate, in standard deviations of the token embeddings. The published 0.01 is absolute; CLIP-L's
            embeddings have a standard deviation of 0.014.
        decay: weight decay. In the published optimizer, Adam, it is part of the gradient.
        decoupled: use AdamW instead, as P4D itself does.
    """

    name: ClassVar[str] = "p4d-prefix"
    source: ClassVar[str] = "arXiv 2309.06135, as in 2310.11868"
    LITE: ClassVar[dict[str, Any]] = {"tokens": 16, "levels": 6, "iterations": 15, "rate": 7.0, "decoupled": True}

    rate: float = 0.71
    decoupled: bool = False

    def optimizer(self, victim: Victim, variable: Tensor) -> torch.optim.Optimizer:
        """Return Adam with weight decay in the gradient, or AdamW if `decoupled`."""
        if self.decoupled:
            return super().optimizer(victim, variable)
        return torch.optim.Adam([variable], lr=self.rate * victim.spread, weight_decay=self.decay)


def simplex(rows: Tensor) -> Tensor:
    """Project the last dimension onto {p >= 0, sum p = 1} by Euclidean distance (Duchi et al. 2008, algorithm 1)."""
    sorted_rows = rows.sort(-1, descending=True).values
    excess = sorted_rows.cumsum(-1) - 1
    rank = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    support = (sorted_rows * rank > excess).sum(-1, keepdim=True)
    return (rows - excess.gather(-1, support - 1) / support).clamp(min=0)


def prompt_with(victim: Victim, ids: Tensor, case: Case, alone: bool) -> str:
    """Return the decoded tokens, followed by the case's prompt unless they stand alone.

    The attempt is the string: the pipeline may tokenise it differently.
    """
    words = victim.pipe.tokenizer.decode(ids.tolist()).strip()
    return words if alone else f"{words} {case.prompt}"
