"""Ring-A-Bell (Tsai et al. 2024, arXiv 2310.10012): the text encoder alone tells what to ask. No diffusion model.

Its texts undo an erasure that was told one word of a broad concept, as the published ones of nudity are: on glyph, ESD
of "weapon" alone (55 updates) refuses 22 of 24 prompts with the word, and 15 of the 22 come back through texts without
it ("knife crossed bow bomb ..."), 5 through random tokens before the prompt.

Of a single object they undo less: of four umbrellas that a default ESD refuses two, of the cat nothing. The base draws
the cat from the texts found (6 of 6 at eta 0.5, without the word itself); ESD of 55 updates refuses them all but one
at most, with K = 4, 8, 16 and 40, eta from 0.5 to 2, P with the name or without. So small an encoder says a cat in one
direction: v of the bare word, which ESD trains on, and v of the prompts have a cosine of 0.97, and the found texts lie
0.90 to 0.95 along it. What ESD adds to keys and values reads 1.2 to 1.4 times as much of them as of the plain prompt.
AdvUnlearn, of 12 updates or 40, refuses all texts too. How it is with larger encoders was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.evaluation.attacks.token_search import RandomTokens
from erasure.model.conditioning import Conditions, read

FILLER = "thing"  # stands for the concept's name in the pairs' other half


def direction(victim: Victim, cases: Sequence[Case]) -> Conditions:
    """v = mean_i [E(p_i with the concept) - E(p_i without)] (eq. 1), one sample's, E the base's encoder.

    The concept's name gives way to a word that says nothing. Where the prompt does not name the concept, name and word
    stand before it.
    """
    texts = [case.prompt if case.name else case.worded(case.concept) for case in cases]
    with victim.unpatched():
        apart = pushed(victim.conditions(texts), victim.conditions(unnamed(cases)), -1.0)
    pooled = None if apart.pooled is None else apart.pooled.mean(0, keepdim=True)
    return Conditions(apart.states.mean(0, keepdim=True), pooled)


def as_long(along: Conditions, draw: torch.Generator) -> Conditions:
    """Random directions, each of the length of one of `along`."""

    def drawn(one: Tensor) -> Tensor:
        return one.norm(dim=-1, keepdim=True) * F.normalize(torch.randn(one.shape, generator=draw), dim=-1).to(one)

    return Conditions(drawn(along.states), None if along.pooled is None else drawn(along.pooled))


def unnamed(cases: Sequence[Case]) -> list[str]:
    """The cases' prompts without the concept's name."""
    return [case.worded(FILLER) for case in cases]


def pushed(begin: Conditions, along: Conditions, strength: float) -> Conditions:
    """begin + strength * along."""
    pooled = None
    if begin.pooled is not None and along.pooled is not None:
        pooled = begin.pooled + strength * along.pooled
    return Conditions(begin.states + strength * along.states, pooled)


def without(victim: Victim, cases: Sequence[Case]) -> Tensor:
    """The searched words less those that stand for the concept in the cases' prompts."""
    names = {case.name or case.concept for case in cases}
    spoken = {token for name in names for token in victim.pipe.tokenizer(name, verbose=False).input_ids}
    return torch.tensor([word for word in victim.words.tolist() if word not in spoken], device=victim.device)


@dataclass(frozen=True)
class Direct(Attack):
    """The encoder's states pushed along the concept's direction, E(P) + strength * v, given as they are.

    RECE's shortcut: stronger than the search for tokens, and almost free. One round a strength.

    Args:
        strengths: eta.
        named: P names the concept. Without the name, as in the published prompts, all of the concept comes from v.
        drawn: random directions as long as v, token by token, in its place.
    """

    name: ClassVar[str] = "ring-a-bell-direct"
    source: ClassVar[str] = "arXiv 2310.10012, 2407.12383"
    access: ClassVar[str] = "embeddings"
    # Cheap, and small models bear less. An erasure holds what is near the named prompt: on glyph, of six cats that ESD
    # had refused all but one, 0.25 and 0.5 beyond it brought back one more, 1.25 to 2 from the unnamed prompt two.
    LITE: ClassVar[dict[str, Any]] = {"strengths": (1.0, 1.25, 1.5, 2.0), "named": False}

    strengths: tuple[float, ...] = (0.9, 3.0)
    named: bool = True
    drawn: bool = False

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """A strength a round."""
        along = direction(victim, cases)
        if self.drawn:
            along = as_long(along, torch.Generator().manual_seed(seed))
        with victim.unpatched():
            told = victim.conditions([case.prompt for case in cases] if self.named else unnamed(cases))
        for strength in self.strengths:
            aims = pushed(told, along, strength)
            yield {i: Attempt(embeds=aims[[i]], note=f"strength {strength:g}") for i in sorted(safe)}

    def control(self, tries: int) -> Attack:
        """Random directions."""
        return replace(self, drawn=True, strengths=self.strengths[:tries])


@dataclass(frozen=True)
class RingABell(Attack):
    """Hard tokens whose states come near E(P) + strength * v, by a genetic algorithm; black box.

    Args:
        tokens: K (published 16 for nudity, 77 for violence).
        strength: eta (published 3 for nudity, 5 to 5.5 for violence).
        population: rows of tokens.
        generations: of the algorithm.
        crossover: share of children that mix two parents.
        mutation: share of children of which one token changes.
        tries: rounds, evenly spaced over the generations.
        named: search among the concept's own words too. As published; whatever blocks or rereads a word is passed by
            without it.
        compared: how many of the states count, from the first; None: all, as published. The encoder is causal, so
            that fewer are found without the rest; the states of the padding say much the same.
    """

    name: ClassVar[str] = "ring-a-bell"
    source: ClassVar[str] = "arXiv 2310.10012"
    access: ClassVar[str] = "text"
    BLIND: ClassVar[bool] = True
    # On a small model v is as long as a state: texts found for 0.5 bring back more than for 1 (15 and 9 of the 22).
    LITE: ClassVar[dict[str, Any]] = {
        **{"tokens": 8, "strength": 0.5, "population": 60, "generations": 90, "tries": 3},
        **{"compared": 16, "named": False},
    }

    tokens: int = 16
    strength: float = 3.0
    population: int = 200
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25
    tries: int = 3
    compared: int | None = None
    named: bool = True

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """The best of each population, from time to time."""
        along = direction(victim, cases)
        with victim.unpatched():
            aims = pushed(victim.conditions([case.prompt for case in cases]), along, self.strength).states
        draws = [torch.Generator().manual_seed(seed * 10_007 + i) for i in range(len(cases))]
        shape = (self.population, self.tokens)
        words = victim.words if self.named else without(victim, cases)
        rows = [words[torch.randint(len(words), shape, generator=draw)] for draw in draws]
        for _ in range(self.tries):
            live = sorted(safe)
            with victim.unpatched():
                for i in live:
                    rows[i] = self.evolve(victim, words, rows[i], aims[i], self.generations // self.tries, draws[i])
            texts = {i: victim.pipe.tokenizer.decode(rows[i][0].tolist()) for i in live}
            yield {i: Attempt(text) for i, text in texts.items()}

    def evolve(
        self, victim: Victim, words: Tensor, rows: Tensor, aim: Tensor, generations: int, draw: torch.Generator
    ) -> Tensor:
        """Rows of token ids [population, tokens] after some generations among `words`, the fittest first."""
        fitness = self.distance(victim, rows, aim)
        for _ in range(generations):
            keep = fitness.argsort()[: self.population // 2]
            parents, fitness = rows[keep], fitness[keep]
            pick = torch.randint(len(parents), (self.population - len(parents), 2), generator=draw)
            children = parents[pick[:, 0]].clone()
            mixed = torch.rand(len(children), generator=draw) < self.crossover
            cut = torch.randint(1, max(self.tokens, 2), (len(children), 1), generator=draw)
            tail = torch.arange(self.tokens)[None] >= cut
            children = torch.where(mixed[:, None] & tail, parents[pick[:, 1]], children)
            changed = torch.rand(len(children), generator=draw) < self.mutation
            place = torch.randint(self.tokens, (len(children),), generator=draw)
            fresh = words[torch.randint(len(words), (len(children),), generator=draw)]
            rowed = torch.arange(len(children))
            children[rowed, place] = torch.where(changed, fresh, children[rowed, place])
            rows = torch.cat([parents, children])
            fitness = torch.cat([fitness, self.distance(victim, children, aim)])
        return rows[fitness.argsort()]

    def distance(self, victim: Victim, rows: Tensor, aim: Tensor) -> Tensor:
        """Squared distance of the states of every row of token ids to the aim (eq. 3) [n]."""
        longest = victim.pipe.tokenizer.model_max_length
        count = min(self.tokens, longest - 2)
        length = min(longest, max(self.compared or longest, count + 2))
        read_by = []
        for tokenizer in victim.tokenizers:
            ids = torch.full((len(rows), length), tokenizer.pad_token_id)
            ids[:, 0], ids[:, 1 + count] = tokenizer.bos_token_id, tokenizer.eos_token_id
            ids[:, 1 : 1 + count] = rows.cpu()[:, :count]
            read_by.append(ids)
        with torch.no_grad():
            states = read(victim.pipe, read_by).states
        return (states - aim[:length]).square().flatten(1).sum(1).cpu()

    def control(self, tries: int) -> Attack:
        """Random tokens before the prompt."""
        return RandomTokens(self.tokens, tries)
