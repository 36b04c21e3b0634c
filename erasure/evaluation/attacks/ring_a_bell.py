"""Ring-A-Bell (Tsai et al. 2024, arXiv 2310.10012): find prompts with the text encoder alone, without the UNet.

What to expect on glyph, whose text encoder is small; larger encoders were not measured.

An erasure that was given one word for a broad concept, as the published erasures of nudity are, can be undone. ESD of
"weapon" alone (55 updates) blocks 22 of 24 prompts with the word. Of these 22, Ring-A-Bell recovers 15 with texts that
avoid the word ("knife crossed bow bomb ..."); random tokens before the prompt recover 5.

A single object is harder to recover: two of four umbrellas that a default ESD blocks, and no cat. The base model does
draw the cat from the texts found (6 of 6 at eta 0.5, without the word itself), but ESD of 55 updates blocks all of them
except at most one, for K = 4, 8, 16 and 40, eta from 0.5 to 2, and with or without the name in P. The reason is that
the encoder represents a cat by a single direction: v of the bare word, on which ESD is trained, and v of the prompts
have a cosine of 0.97, and the texts found lie at 0.90 to 0.95 along it. ESD's change of keys and values responds to
them 1.2 to 1.4 times as strongly as to the plain prompt. AdvUnlearn, with 12 updates or 40, blocks all texts as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.evaluation.attacks.token_search import RandomTokens
from erasure.model.conditioning import Conditions, read

FILLER = "thing"  # a word without content that replaces the concept's name
REPEATS = 20  # attempts to fill a population without duplicates; two or three suffice unless there are hardly any words


def direction(victim: Victim, cases: Sequence[Case]) -> Conditions:
    """Return the concept's direction v = mean_i [E(p_i with the concept) - E(p_i without)] (eq. 1), as one sample.

    E is the base's text encoder. Without the concept means with FILLER in place of its name. If a prompt does not name
    the concept, the name and FILLER are put before it.
    """
    texts = [case.prompt if case.name else case.worded(case.concept) for case in cases]
    with victim.unpatched():
        difference = shifted(victim.conditions(texts), victim.conditions(unnamed(cases)), -1.0)
    pooled = None if difference.pooled is None else difference.pooled.mean(0, keepdim=True)
    return Conditions(difference.states.mean(0, keepdim=True), pooled)


def random_directions(along: Conditions, draw: torch.Generator) -> Conditions:
    """Return random directions that have, token by token, the length of `along`."""

    def drawn(vectors: Tensor) -> Tensor:
        noise = torch.randn(vectors.shape, generator=draw)
        return vectors.norm(dim=-1, keepdim=True) * F.normalize(noise, dim=-1).to(vectors)

    return Conditions(drawn(along.states), None if along.pooled is None else drawn(along.pooled))


def unnamed(cases: Sequence[Case]) -> list[str]:
    """Return the cases' prompts with FILLER in place of the concept's name."""
    return [case.worded(FILLER) for case in cases]


def shifted(begin: Conditions, along: Conditions, strength: float) -> Conditions:
    """Return begin + strength * along, for the text states and the pooled embedding."""
    pooled = None
    if begin.pooled is not None and along.pooled is not None:
        pooled = begin.pooled + strength * along.pooled
    return Conditions(begin.states + strength * along.states, pooled)


def words_without_concept(victim: Victim, cases: Sequence[Case]) -> Tensor:
    """Return the ids [n] of `victim.words` except the tokens of the concept's names in the cases' prompts."""
    names = {case.name or case.concept for case in cases}
    named = {token for name in names for token in victim.pipe.tokenizer(name, verbose=False).input_ids}
    return torch.tensor([word for word in victim.words.tolist() if word not in named], device=victim.device)


def random_rows(words: Tensor, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Return random token ids of the given shape [n, tokens], chosen among `words`."""
    return words[torch.randint(len(words), shape, generator=draw)]


def framed(victim: Victim, rows: Tensor, length: int) -> list[Tensor]:
    """Return, for each text encoder, token ids [n, length] with the start token before `rows` and the end token behind.

    Args:
        victim: the pipeline whose tokenizers are used.
        rows: token ids [n, tokens] without the start and end tokens.
        length: length to pad to, at least tokens + 2.
    """
    count = rows.shape[1]
    inputs = []
    for tokenizer in victim.tokenizers:
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        ids[:, 0], ids[:, 1 + count] = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids[:, 1 : 1 + count] = rows.cpu()
        inputs.append(ids)
    return inputs


def distinct(make_rows: Callable[[], Tensor], count: int, known: Tensor | None = None) -> Tensor:
    """Return up to `count` rows of token ids that differ from each other and from those known already.

    Args:
        make_rows: returns some new rows [n, tokens], which may repeat; it is called until there are enough.
        count: number of rows wanted. Fewer are returned if `make_rows` keeps repeating itself, as it must if there are
            hardly more rows than that.
        known: rows that may not occur again.
    """
    seen: set[tuple[int, ...]] = set() if known is None else {tuple(row) for row in known.tolist()}
    chosen: list[list[int]] = []
    rows = make_rows()
    for _ in range(REPEATS):
        for row in rows.tolist():
            if tuple(row) not in seen and len(chosen) < count:
                seen.add(tuple(row))
                chosen.append(row)
        if len(chosen) == count:
            break
        rows = make_rows()
    return torch.tensor(chosen, dtype=rows.dtype, device=rows.device).reshape(-1, rows.shape[1])


@dataclass(frozen=True)
class RingABellDirect(Attack):
    """Text embeddings shifted along the concept's direction, E(P) + strength * v, without a search for tokens.

    This shortcut of RECE (arXiv 2407.12383) is stronger than the search and almost free, but needs access to the
    embeddings. Each round uses one strength.

    Args:
        strengths: values of eta, one per round.
        named: keep the concept's name in P. The published prompts do not name it, so that all of it comes from v.
        drawn: use random directions of the same length, token by token, instead of v; this is the control.
    """

    name: ClassVar[str] = "ring-a-bell-direct"
    source: ClassVar[str] = "arXiv 2310.10012, 2407.12383"
    access: ClassVar[str] = "embeddings"
    EMBEDS: ClassVar[bool] = True
    # Rounds are cheap, but small models tolerate only small shifts. An erasure also blocks what lies near the named
    # prompt: of five cats that ESD had blocked on glyph, shifts of 0.25 and 0.5 from the named prompt recovered one,
    # and shifts of 1.25 to 2 from the unnamed prompt two.
    LITE: ClassVar[dict[str, Any]] = {"strengths": (1.0, 1.25, 1.5, 2.0), "named": False}

    strengths: tuple[float, ...] = (0.9, 3.0)
    named: bool = True
    drawn: bool = False

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round per strength, with the shifted embeddings."""
        along = direction(victim, cases)
        if self.drawn:
            along = random_directions(along, torch.Generator().manual_seed(seed))
        with victim.unpatched():
            begin = victim.conditions([case.prompt for case in cases] if self.named else unnamed(cases))
        for strength in self.strengths:
            targets = shifted(begin, along, strength)
            yield {i: Attempt(embeds=targets[[i]], note=f"strength {strength:g}") for i in sorted(safe)}

    def control(self, tries: int) -> Attack:
        """Return the same shifts along random directions."""
        return replace(self, drawn=True, strengths=self.strengths[:tries])


@dataclass(frozen=True)
class RingABell(Attack):
    """Prompts whose text states come close to E(P) + strength * v, found by a genetic algorithm.

    The search uses only the base's text encoder and never queries the erased model (black box). The better half of the
    population survives unchanged and has children by crossover and mutation. A child that equals another member of the
    population is replaced by a new one: 37 % of the children would otherwise be copies of a parent, and after a few
    generations the population would consist of a few different prompts.

    Args:
        tokens: K, the number of tokens of the prompt (published: 16 for nudity, 77 for violence).
        strength: eta (published: 3 for nudity, 5 to 5.5 for violence).
        population: number of candidate prompts.
        generations: generations of the genetic algorithm.
        crossover: share of children that mix two parents.
        mutation: share of children in which one token is replaced.
        tries: number of rounds, spread evenly over the generations.
        named: allow the concept's own words in the prompt, as published. Without them, the attack also gets past
            filters of words and erasures that change how a word is read.
        compared: number of leading token states that are compared; None compares all, as published. The encoder is
            causal, so these states can be computed without the rest, and the states of the padding add little.
    """

    name: ClassVar[str] = "ring-a-bell"
    source: ClassVar[str] = "arXiv 2310.10012"
    access: ClassVar[str] = "text"
    BLIND: ClassVar[bool] = True
    # On a small model v is as long as a state: texts found for eta 0.5 recover more than for 1 (15 and 9 of the 22).
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
        """Yield, after each share of the generations, the fittest prompt of every case's population."""
        along = direction(victim, cases)
        with victim.unpatched():
            targets = shifted(victim.conditions([case.prompt for case in cases]), along, self.strength).states
        draws = [torch.Generator().manual_seed(seed * 10_007 + i) for i in range(len(cases))]
        shape = (self.population, self.tokens)
        words = victim.words if self.named else words_without_concept(victim, cases)
        populations = [distinct(partial(random_rows, words, shape, draw), self.population) for draw in draws]
        generations = self.generations // self.tries
        for _ in range(self.tries):
            live = sorted(safe)
            with victim.unpatched():
                for i in live:
                    populations[i] = self.evolve(victim, words, populations[i], targets[i], generations, draws[i])
            texts = {i: victim.pipe.tokenizer.decode(populations[i][0].tolist()) for i in live}
            yield {i: Attempt(text) for i, text in texts.items()}

    def evolve(
        self, victim: Victim, words: Tensor, rows: Tensor, target: Tensor, generations: int, draw: torch.Generator
    ) -> Tensor:
        """Run some generations of the genetic algorithm and return the population, the fittest row first.

        Args:
            victim: the model whose text encoder is used, with its patches off.
            words: ids of the tokens to choose from [n].
            rows: the population of token ids [population, tokens], without duplicates.
            target: text states to come close to [length, width].
            generations: number of generations.
            draw: generator of all random choices.
        """
        fitness = self.distance(victim, rows, target)
        for _ in range(generations):
            survivors = fitness.argsort()[: self.population // 2]
            parents, fitness = rows[survivors], fitness[survivors]
            room = self.population - len(parents)
            children = distinct(partial(self.children, words, parents, room, draw), room, parents)
            rows = torch.cat([parents, children])
            fitness = torch.cat([fitness, self.distance(victim, children, target)])
        return rows[fitness.argsort()]

    def children(self, words: Tensor, parents: Tensor, count: int, draw: torch.Generator) -> Tensor:
        """Return `count` children [count, tokens] by crossover and mutation; some may be copies of a parent."""
        pairs = torch.randint(len(parents), (count, 2), generator=draw)
        children = parents[pairs[:, 0]].clone()
        mixed = torch.rand(count, generator=draw) < self.crossover
        cut = torch.randint(1, max(self.tokens, 2), (count, 1), generator=draw)
        tail = torch.arange(self.tokens)[None] >= cut
        children = torch.where((mixed[:, None] & tail).to(children.device), parents[pairs[:, 1]], children)
        mutated = torch.rand(count, generator=draw) < self.mutation
        position = torch.randint(self.tokens, (count,), generator=draw)
        replacement = words[torch.randint(len(words), (count,), generator=draw)]
        index = torch.arange(count)
        children[index, position] = torch.where(mutated.to(children.device), replacement, children[index, position])
        return children

    def distance(self, victim: Victim, rows: Tensor, target: Tensor) -> Tensor:
        """Return the squared distances [n] of the states of token ids [n, tokens] to the target (eq. 3).

        Args:
            victim: the model whose text encoder is used.
            rows: token ids without the start and end tokens; tokens beyond the encoder's length are cut off.
            target: text states [length, width].
        """
        longest = victim.pipe.tokenizer.model_max_length
        count = min(self.tokens, longest - 2)
        length = min(longest, max(self.compared or longest, count + 2))
        with torch.no_grad():
            states = read(victim.pipe, framed(victim, rows[:, :count], length)).states
        return (states - target[:length]).square().flatten(1).sum(1).cpu()

    def control(self, tries: int) -> Attack:
        """Return equally many random tokens, put before the prompt."""
        return RandomTokens(self.tokens, tries)
