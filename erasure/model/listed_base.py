"""A base for long lists: text states are read in batches and kept as Gram matrices, which a cache may hold.

A closed form needs of the kept prompts only the Gram matrix of their states, and of an edited name only the few
directions that its states vary in. So memory does not grow with the list, and a list that changed in a few names reads
these names alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from erasure.concepts.neighbors import prompt_of
from erasure.concepts.similarity import tokens
from erasure.errors import ErasureError
from erasure.model.base import Base, Block
from erasure.model.closed_form import principal_states
from erasure.model.conditioning import Conditions, read, text_encoders, token_ids
from erasure.model.text_columns import fits, last_place

BATCH = 16  # prompts in one call of the text encoder
NAMES = 32  # names whose prompts are held in memory together
DIRECTIONS = 16  # of the states of one name next to their guides; the rest is below a thousandth of their length


@dataclass
class ListedBase(Base):
    """A base whose kept words are listed, and whose results can be stored.

    Args:
        listed: the words to keep, by kind.
        asked: those of them that the user named, as pairs (kind, word); they are kept even if they are nearly a target.
        most_rank: the largest rank of a change; None: no limit.
        half: whether the kept prompts are encoded in bfloat16. Their Gram matrix hardly changes by that
            (docs/closed-forms.md), and processors that support it are twice as fast.
        stored: results by key, which a cache has read and will write.
        used: the keys that this run has asked for.
        record: what a patch's header says about the list.
        last_blocks: the states and guides of each name that were asked for last.
        held_share: the share of the change that is left after `most_rank`.
    """

    listed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asked: tuple[tuple[str, str], ...] = ()
    most_rank: int | None = None
    half: bool = False
    stored: dict[str, Tensor] = field(default_factory=dict, repr=False)
    used: set[str] = field(default_factory=set, repr=False)
    record: Mapping[str, Any] | None = None
    last_blocks: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    held_share: float = 1.0

    @classmethod
    def on(cls, base: Base, listed: Mapping[str, tuple[str, ...]], **options: Any) -> ListedBase:
        """Return such a base with the components of another one."""
        return cls(base.name, base.pipe, base.about, listed=listed, **options)

    def prompts(self) -> list[str]:
        """Return the prompts of all listed words that the text encoder reads in full, each once."""
        texts = (prompt_of(kind, word) for kind, words in self.listed.items() for word in words)
        return [text for text in dict.fromkeys(texts) if fits(self, text)]

    def blocks(self, jobs: Sequence[Block]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return for each name DIRECTIONS states that stand for all of its states, with their guides and weights."""
        keys = [f"name {_hash(job.key)}" for job in jobs]
        missing = [(key, job) for key, job in zip(keys, jobs, strict=True) if key not in self.stored]
        for start in range(0, len(missing), NAMES):
            part = missing[start : start + NAMES]
            self._prefetch(text for _, job in part for text in job.prompts)
            for key, job in part:
                states, guides, weights = job.make(self)
                pair = principal_states(states, guides, weights, DIRECTIONS)
                # Rounded before it is used, so that a stored block gives the same solution to the last bit.
                self.stored[key] = torch.stack(pair).float()
            self._texts.clear()
        self.used |= set(keys)
        self.last_blocks = [(edit, guide) for edit, guide in (self.stored[key].double() for key in keys)]
        return [(edit, guide, torch.ones(len(edit), dtype=torch.float64)) for edit, guide in self.last_blocks]

    def kept_states(self, prompts: list[str], part: str, read: Callable[..., Tensor]) -> Tensor:
        """Return d rows with the same Gram matrix as the states of the kept prompts.

        The Gram matrix of all listed prompts is stored; those of words that a run leaves out, or adds, are read anew.
        """
        listed, wanted = self.prompts(), set(prompts)
        if len(wanted & set(listed)) < len(listed) / 2:
            return root(self._gram(prompts, part, False))
        key = f"gram {part} {'half' if self.half else 'full'} {_hash(chr(0).join(sorted(listed)))}"
        if key not in self.stored:
            self.stored[key] = self._gram(sorted(listed), part, self.half)
        self.used.add(key)
        known = set(listed)
        gone, new = [text for text in listed if text not in wanted], [text for text in prompts if text not in known]
        gram = self.stored[key] - self._gram(gone, part, self.half) + self._gram(new, part, self.half)
        return root(gram)

    def end_states(self, texts: Sequence[str]) -> Tensor:
        """Return the text encoder's states at the end token of texts [n, width], read no further than that token."""
        keys = [f"end {_hash(text)}" for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.stored}
        lengths = {key: tokens(self, text) for key, text in missing.items()}
        order = sorted(missing, key=lengths.__getitem__)  # texts of about one length share a batch
        for start in range(0, len(order), 4 * BATCH):
            part = order[start : start + 4 * BATCH]
            states = self._read([missing[key] for key in part], lengths[part[-1]]).states
            for key, row in zip(part, states, strict=True):
                self.stored[key] = row[lengths[key] - 1].float().cpu().clone()
        self.used |= set(keys)
        return torch.stack([self.stored[key] for key in keys])

    def _encoded(self, prompts: list[str]) -> Conditions:
        self._prefetch(prompts)
        return Conditions.cat([self._texts[prompt] for prompt in prompts])

    def _prefetch(self, prompts: Iterable[str]) -> None:
        """Encode prompts that are not in memory, in batches."""
        missing = [text for text in dict.fromkeys(prompts) if text not in self._texts]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            conditions = self._read(part)
            self._texts |= {text: conditions[i : i + 1] for i, text in enumerate(part)}

    @torch.no_grad()
    def _read(self, prompts: Sequence[str], length: int | None = None) -> Conditions:
        """Return the conditions of prompts, cut behind `length` tokens: a causal encoder's states do not change by it.

        Raises:
            ErasureError: a prompt has more tokens than the text encoders read.
        """
        for text in prompts:
            if not fits(self, text):
                raise ErasureError(f"the prompt {text[:40]!r}... has more tokens than the text encoder reads")
        ids = [token_ids(tokenizer, prompts)[:, :length] for tokenizer, _ in text_encoders(self.pipe)]
        return read(self.pipe, ids)

    def _gram(self, prompts: Sequence[str], part: str, half: bool) -> Tensor:
        """Return the Gram matrix [d, d] of the states of prompts, in float64 on the CPU."""
        width = self._read([""], 1).states.shape[-1]
        total = torch.zeros(width, width, dtype=torch.float64)
        with halved(encoder for _, encoder in text_encoders(self.pipe)) if half and prompts else nullcontext():
            for start in range(0, len(prompts), BATCH):
                texts = prompts[start : start + BATCH]
                rows = []
                for text, states in zip(texts, self._read(texts).states, strict=True):
                    first = 0 if part == "all" else last_place(self, text)
                    rows.append(states[first : first + 1 if part == "last" else None])
                stacked = torch.cat(rows).double().cpu()
                total.addmm_(stacked.T, stacked)
        return total


@contextmanager
def halved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Compute in bfloat16 inside the block; the modules' own tensors are kept aside and put back."""
    own = [(param, param.data) for module in modules for param in module.parameters()]
    try:
        for param, data in own:
            param.data = data.to(torch.bfloat16)
        yield
    finally:
        for param, data in own:
            param.data = data


def half_is_fast() -> bool:
    """Tell whether this machine's processor multiplies matrices of bfloat16 in hardware."""
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test is not None)


def root(gram: Tensor) -> Tensor:
    """Return d rows [d, d] whose Gram matrix is the given one; eigenvalues below 0 are rounding, and count as 0."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()).T


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
