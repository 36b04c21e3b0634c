"""Attacks: what somebody gets back who wants the concept again. One family a file; run.py counts.

An attack looks for something else to ask, or to do, so that the erased model shows the concept. It yields rounds of
attempts, one a case; whether an attempt succeeds is for a judge of images to say, never for the attack.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from erasure.config import build
from erasure.errors import ErasureError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from erasure.model.conditioning import Conditions
    from erasure.model.soft_prompt import Slots

WHERE = {  # name -> file; the order of `erasure attack all`
    "encoder": "embeddings",
    "rece": "embeddings",
    "ring-a-bell-direct": "ring_a_bell",
    "ring-a-bell": "ring_a_bell",
    "unlearndiffatk": "token_search",
    "p4d": "token_search",
    "uma": "embeddings",
    "inversion": "embeddings",
    "img2img": "img2img",
    "relearning": "relearning",
    "random": "token_search",
}


@dataclass(frozen=True)
class Case:
    """One prompt that shows the concept on the base.

    Args:
        concept: what the picture shows, as the prompt set labels it.
        latents: of the base's picture, [c, h, w], scaled as the UNet takes them.
        before: what stands before the concept's name in the prompt.
        after: what stands behind it; the whole prompt, where the name does not occur.
    """

    id: str
    prompt: str
    seed: int
    concept: str
    latents: Tensor
    before: str
    after: str

    @property
    def name(self) -> str:
        """The concept's name as the prompt writes it; empty where it does not occur."""
        if self.after == self.prompt:
            return ""
        return self.prompt[len(self.before) : len(self.prompt) - len(self.after)].strip()

    def worded(self, word: str) -> str:
        """The prompt with another word where the concept's name stands, or before it where none does."""
        return f"{self.before} {word} {self.after}".strip()


@dataclass(frozen=True)
class Attempt:
    """What is asked instead of a case's prompt.

    Args:
        prompt: a text, which gates see too.
        embeds: one sample's conditions in place of a text.
        strength: begin from the base's picture, with this share of the noise (img2img).
        note: what to call it in the record, where there is no prompt.
    """

    prompt: str | None = None
    embeds: Conditions | None = None
    strength: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Attack(ABC):
    """Settings of an attack: the fields' defaults are the published ones, LITE a budget for a CPU."""

    name: ClassVar[str]
    source: ClassVar[str]
    access: ClassVar[str]  # what the attacker has: text, embeddings, weights
    LITE: ClassVar[dict[str, Any]] = {}
    CURVE: ClassVar[bool] = False  # every case is asked in every round: what counts is how it grows
    BLIND: ClassVar[bool] = False  # never looks at the victim: the base, asked the same, shows what can come back

    @abstractmethod
    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield attempts by the number of their case, round by round.

        `safe` holds the cases that have withstood so far; it shrinks between rounds. What the attack changes in the
        model it takes back when it is closed.
        """

    def control(self, tries: int) -> Attack | None:
        """As many rounds without what makes the attack one: random tokens, where an attack has nothing nearer."""
        return make("random", tries=tries)


LEAST = 2  # cases that say anything


def enough(cases: int) -> None:
    """Raises ErasureError for fewer cases than say anything."""
    if cases < LEAST:
        raise ErasureError(f"cases={cases}: at least {LEAST} are needed to measure anything; nothing was attacked")


def names() -> list[str]:
    """The attacks there are."""
    return list(WHERE)


def find(name: str) -> type[Attack]:
    """An attack by its name.

    Raises:
        ErasureError: no such attack.
    """
    if name not in WHERE:
        raise unknown("attack", name, names())
    module = importlib.import_module(f"erasure.evaluation.attacks.{WHERE[name]}")
    return next(
        each for each in vars(module).values() if isinstance(each, type) and getattr(each, "name", None) == name
    )


def make(name: str, budget: str = "lite", **settings: Any) -> Attack:
    """An attack with its budget, `lite` or `full` (the published one), and single settings.

    Raises:
        ErasureError: an unknown attack, budget or setting, or a value of the wrong type.
    """
    cls = find(name)
    if budget not in ("lite", "full"):
        raise unknown("budget", budget, ("lite", "full"))
    return build(cls, cls.LITE if budget == "lite" else {}, settings)


class Victim:
    """The erased pipeline as an attacker with its weights sees it.

    Outside a pipeline's call gates cannot decide, so a search meets gated patches folded in: acting on everything.

    XL's two text encoders read the same tokens; a token's vector is here the two encoders' own, side by side.

    Raises:
        ErasureError: text encoders that are missing, or three of them, or two that cut texts into other tokens.
    """

    def __init__(self, pipe: Any, switched_off: Callable[[Any], Any]) -> None:
        from erasure.model.conditioning import text_encoders

        self.pipe, self._off = pipe, switched_off
        self.device = pipe.unet.device
        pairs = text_encoders(pipe)
        self.tokenizers = [tokenizer for tokenizer, _ in pairs]
        self.encoders = [encoder for _, encoder in pairs]
        known = [(one.get_vocab(), one.model_max_length) for one in self.tokenizers]
        if any(one != known[0] for one in known):
            raise ErasureError(
                f"the tokenizers of this {type(pipe).__name__} differ in vocabulary or length: attacks give both text "
                "encoders the same tokens; nothing was attacked"
            )

    @contextmanager
    def unpatched(self) -> Iterator[None]:
        """The base: every patch at strength 0."""
        with self._off(self.pipe):
            yield

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Gated patches act on everything."""
        if not getattr(self.pipe, "get_list_patches", dict)():
            yield
            return
        self.pipe.fuse_patches()
        try:
            yield
        finally:
            self.pipe.unfuse_patches()

    def conditions(self, texts: Sequence[str]) -> Conditions:
        """What the text encoders say now; nothing is kept, for patches may change it."""
        import torch

        from erasure.model.conditioning import read, token_ids

        with torch.no_grad():
            return read(self.pipe, [token_ids(tokenizer, texts) for tokenizer in self.tokenizers])

    def slots(self, around: Sequence[tuple[str, str]], count: int) -> list[Slots]:
        """Room for `count` vectors between two pieces of text, of each pair, for every text encoder.

        Raises:
            ErasureError: no room, or a count below 1.
        """
        from erasure.model.soft_prompt import between, join

        found = []
        for tokenizer in self.tokenizers:
            where = join([between(tokenizer, before, after, count) for before, after in around])
            # The second encoder's pooled text is its state at the first end token: none may stand in for a vector.
            where.ids.scatter_(1, where.at, int(self.words[0]))
            found.append(where)
        return found

    def encode(self, places: Sequence[Slots], vectors: Tensor) -> Conditions:
        """Conditions of prompts with vectors [n, k, width], or [k, width] for all, in their slots; gradients flow."""
        from erasure.model.conditioning import read
        from erasure.model.soft_prompt import placing

        widths = [encoder.get_input_embeddings().embedding_dim for encoder in self.encoders]
        with ExitStack() as scope:
            for encoder, where, part in zip(self.encoders, places, vectors.split(widths, -1), strict=True):
                scope.enter_context(placing(encoder, where, part))
            return read(self.pipe, [where.ids for where in places])

    def base_latents(
        self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, steps: int, guidance: float
    ) -> Tensor:
        """Latents of the base's pictures [n, c, h, w], scaled as the UNet takes them; each from its seed."""
        import torch

        found = []
        with self.unpatched():
            for at in range(0, len(prompts), batch_size):
                made = self.pipe(
                    list(prompts[at : at + batch_size]),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[at : at + batch_size]],
                    output_type="latent",
                ).images
                found.append(made.float())
        return torch.cat(found)

    def eps(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The noise that the UNet sees in x [n, c, h, w] at t [n]."""
        from erasure.model.conditioning import predict
        from erasure.model.diffusion import to_eps

        return to_eps(self.pipe.scheduler, predict(self.pipe, x, t, conditions).float(), x, t)

    @cached_property
    def embeddings(self) -> Tensor:
        """The table of token embeddings [vocabulary, width]."""
        import torch

        return torch.cat([one.get_input_embeddings().weight.detach().float() for one in self.encoders], -1)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the token embeddings: the unit of a step."""
        return float(self.embeddings.std())

    @cached_property
    def words(self) -> Tensor:
        """Ids of the tokens that a text can hold [n]: written alone they are read as themselves.

        Half characters and beginnings of words are not among them: what is found with those is lost when it is
        written down as a prompt.
        """
        import torch

        tokenizer = self.pipe.tokenizer
        special = set(tokenizer.all_special_ids)
        ids = [i for i in range(len(self.embeddings)) if i not in special]
        texts = [tokenizer.decode([i]) for i in ids]
        read = zip(ids, texts, tokenizer(texts, verbose=False).input_ids, strict=True)
        kept = [i for i, text, row in read if row[1:-1] == [i] and text.isprintable()]
        return torch.tensor(kept, device=self.device)
