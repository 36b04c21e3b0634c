"""MMA-Diffusion (Yang et al. 2024, arXiv 2311.17516): find free-standing prompts with the text encoder's gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.evaluation.attacks.ring_a_bell import framed, random_rows, words_without_concept
from erasure.evaluation.attacks.token_search import RandomTokens
from erasure.model.conditioning import read, token_ids


@dataclass(frozen=True)
class MMADiffusion(Attack):
    """Prompts without the concept's name whose end state points where that of the case's prompt points.

    The end state is the text state of the first end token, which has read the whole prompt. The search is greedy
    (GCG, arXiv 2307.15043): the gradient of the cosine ranks the words at each position; candidates replace one token
    of the prompt by one of the best-ranked words there; the best candidate is the next prompt, even if it is worse, and
    the best prompt of all is tried. It uses only the base's text encoder and never queries the erased model.

    The published code takes the gradient of the start token and all tokens but the last for that of the tokens, which
    moves every gradient by one position; here each token has its own. It starts from 20 letters, here from random
    words. In place of its list of sensitive words, which is for nudity, the names in the cases' prompts are left out.

    Args:
        tokens: number of tokens of the prompt.
        iterations: replacements of a token.
        candidates: number of candidates for each replacement, spread evenly over the positions.
        top: number of words at each position from which the candidates draw.
        tries: number of rounds, each a search from other words.
    """

    name: ClassVar[str] = "mma-diffusion"
    source: ClassVar[str] = "arXiv 2311.17516"
    access: ClassVar[str] = "text"
    BLIND: ClassVar[bool] = True
    LITE: ClassVar[dict[str, Any]] = {"tokens": 8, "iterations": 40, "candidates": 64, "top": 32, "tries": 3}

    tokens: int = 20
    iterations: int = 1000
    candidates: int = 512
    top: int = 256
    tries: int = 5

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round per search, with the best prompt that it found for every case."""
        draw = torch.Generator().manual_seed(seed)
        words = words_without_concept(victim, cases)
        with victim.unpatched():
            targets = self.targets(victim, cases)
        for _ in range(self.tries):
            live = sorted(safe)
            with victim.unpatched():
                rows = self.search(victim, words, targets[live], draw)
            texts = [victim.pipe.tokenizer.decode(row) for row in rows.tolist()]
            yield {i: Attempt(text) for i, text in zip(live, texts, strict=True)}

    def targets(self, victim: Victim, cases: Sequence[Case]) -> Tensor:
        """Return the end states [cases, width] of the cases' prompts."""
        texts = [case.prompt for case in cases]
        states = victim.conditions(texts).states
        ids = token_ids(victim.tokenizers[0], texts)
        ends = (ids == victim.tokenizers[0].eos_token_id).int().argmax(1)
        return states[torch.arange(len(texts)), ends.to(states.device)]

    def search(self, victim: Victim, words: Tensor, targets: Tensor, draw: torch.Generator) -> Tensor:
        """Return the token ids [n, tokens] of the prompts with the highest cosine that were seen.

        Args:
            victim: the model whose text encoder is used, with its patches off.
            words: ids of the tokens to choose from [m].
            targets: the end states to point along [n, width].
            draw: generator of all random choices.
        """
        rows = random_rows(words, (len(targets), self.tokens), draw)
        best, highest = rows, self.cosines(victim, rows[:, None], targets)[:, 0]
        for _ in range(self.iterations):
            ranked = words[self.gradient(victim, words, rows, targets).topk(min(self.top, len(words)), dim=-1).indices]
            tried = self.replaced(rows, ranked, draw)
            cosines = self.cosines(victim, tried, targets)
            cosines[(tried == rows[:, None]).all(-1)] = -2.0  # no replacement at all: below every cosine
            found, place = cosines.max(1)
            rows = tried[torch.arange(len(rows)), place]
            better = found > highest
            best, highest = torch.where(better[:, None], rows, best), torch.where(better, found, highest)
        return best

    def gradient(self, victim: Victim, words: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient [n, tokens, m] of the cosine with respect to the weight of each word at each position.

        Args:
            victim: the model whose text encoder is used.
            words: ids of the tokens to choose from [m].
            rows: token ids of the prompts [n, tokens].
            targets: the end states to point along [n, width].
        """
        vectors = victim.embeddings[rows].detach().requires_grad_(True)
        states = victim.encode(victim.slots([("", "")] * len(rows), self.tokens), vectors).states
        cosine = F.cosine_similarity(states[:, 1 + self.tokens], targets, dim=-1).sum()
        (gradient,) = torch.autograd.grad(cosine, vectors)
        return gradient @ victim.embeddings[words].T

    def replaced(self, rows: Tensor, ranked: Tensor, draw: torch.Generator) -> Tensor:
        """Return candidates [n, candidates, tokens], each with one token of its prompt replaced.

        Args:
            rows: token ids of the prompts [n, tokens].
            ranked: ids of the words to draw from at each position [n, tokens, top].
            draw: generator of the choice among them.
        """
        n, count = len(rows), self.candidates
        places = (torch.arange(count) * self.tokens // count).to(rows.device)
        picks = torch.randint(ranked.shape[-1], (n, count), generator=draw).to(rows.device)
        tried = rows[:, None].repeat(1, count, 1)
        tried[:, torch.arange(count), places] = ranked[torch.arange(n)[:, None], places[None], picks]
        return tried

    def cosines(self, victim: Victim, rows: Tensor, targets: Tensor) -> Tensor:
        """Return the cosines [n, count] of the end states of prompts to those of the targets.

        Args:
            victim: the model whose text encoder is used.
            rows: token ids [n, count, tokens].
            targets: end states [n, width].
        """
        length = self.tokens + 2  # what follows the end token cannot change its state, because the encoder is causal
        with torch.no_grad():
            ends = [read(victim.pipe, framed(victim, some, length)).states[:, length - 1] for some in rows]
        return F.cosine_similarity(torch.stack(ends), targets[:, None], dim=-1)

    def control(self, tries: int) -> Attack:
        """Return equally many random tokens in place of the prompt."""
        return RandomTokens(self.tokens, tries, alone=True)
