"""The abstract attack, what it works on, and the list of attacks. One family per file; `run.py` counts successes.

An attack tries to make the erased model show the concept again: by another prompt, by other text embeddings, from an
image, or by changed weights. It yields rounds with one attempt per case. Whether an attempt succeeds is decided by a
judge of images, never by the attack itself.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from erasure.config import build, check_settings
from erasure.errors import ErasureError, unknown

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from erasure.model.conditioning import Conditions
    from erasure.model.soft_prompt import Slots

MODULES = {  # name of an attack -> the file that holds it; `erasure attack all` runs them in this order
    "encoder": "embeddings",
    "rece": "embeddings",
    "ring-a-bell-direct": "ring_a_bell",
    "ring-a-bell": "ring_a_bell",
    "mma-diffusion": "mma",
    "unlearndiffatk": "token_search",
    "p4d": "token_search",
    "p4d-prefix": "token_search",
    "uma": "embeddings",
    "inversion": "embeddings",
    "img2img": "img2img",
    "inpainting": "probes",
    "completion": "probes",
    "noise-scale": "probes",
    "relearning": "relearning",
    "random": "token_search",
}


@dataclass(frozen=True)
class Case:
    """One prompt for which the base model shows the concept.

    Args:
        id: id of the prompt's row in the prompt set.
        prompt: the prompt as the prompt set has it.
        seed: seed of the initial noise, the same for every attempt on this case.
        concept: the concept that the image shows, as the prompt set labels it.
        latents: latents of the base's image [c, h, w], scaled as the UNet takes them.
        before: the part of the prompt before the concept's name.
        after: the part of the prompt after the concept's name; the whole prompt if the name does not occur.
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
        """Return the concept's name as the prompt spells it, or an empty string if it does not occur."""
        if self.after == self.prompt:
            return ""
        return self.prompt[len(self.before) : len(self.prompt) - len(self.after)].strip()

    def worded(self, word: str) -> str:
        """Return the prompt with `word` in place of the concept's name, or before the prompt if it has no name."""
        return f"{self.before} {word} {self.after}".strip()


@dataclass(frozen=True)
class Sampling(ABC):
    """A way to sample images other than from noise with the pipeline's own scheduler; its settings are its fields."""

    @abstractmethod
    def draw(
        self, victim: Victim, cases: Sequence[Case], texts: list[str], options: dict[str, Any]
    ) -> list[Image.Image]:
        """Return one image for each case.

        Args:
            victim: the erased pipeline.
            cases: the cases of one batch.
            texts: the prompt of each case's attempt.
            options: `num_inference_steps`, `guidance_scale`, and `generator`, a list with one generator per case.
        """


@dataclass(frozen=True)
class Attempt:
    """The input that replaces a case's prompt in one round of an attack.

    Args:
        prompt: a text; gates read it as they read any prompt.
        embeds: text conditions of one sample, used instead of a text.
        sampling: how the image is sampled; None samples as usual.
        note: what characterises the attempt besides its prompt, for the record.
    """

    prompt: str | None = None
    embeds: Conditions | None = None
    sampling: Sampling | None = None
    note: str = ""

    def described(self) -> str:
        """Return the prompt, the note, or both."""
        return f"{self.prompt} [{self.note}]" if self.prompt and self.note else self.prompt or self.note


@dataclass(frozen=True)
class Attack(ABC):
    """The settings of an attack: field defaults are the published budget, `LITE` adapts some of them to a CPU.

    `configs/attacks.yaml` lists the published values with their sources.

    Class attributes: `name` of the attack on the command line; `source`, the paper; `access`, what the attacker needs
    (text, embeddings, image or weights); `CURVE`, true if every case is attempted in every round, so that success is
    reported as a curve over rounds; `BLIND`, true if the attack never queries the erased model. For a blind attack the
    base is given the same prompts, which bounds what can be recovered; `EMBEDS`, true if it passes embeddings and no
    text; `UNDOES`, true if all it does is to undo a change of weights.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    access: ClassVar[str]
    LITE: ClassVar[dict[str, Any]] = {}
    CURVE: ClassVar[bool] = False
    BLIND: ClassVar[bool] = False
    EMBEDS: ClassVar[bool] = False
    UNDOES: ClassVar[bool] = False

    def adapted(self) -> dict[str, Any]:
        """Return setting -> value of the full budget, for the settings that differ from it."""
        full = type(self)()
        return {
            field.name: getattr(full, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(full, field.name)
        }

    @abstractmethod
    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield the attempts of each round, keyed by the index of their case.

        The generator restores whatever it changes in the model when it is closed.

        Args:
            victim: the erased pipeline under attack.
            cases: the prompts to attack.
            safe: indices of the cases not recovered so far; the caller removes indices between rounds.
            seed: seed of the attack's own random numbers.
        """

    def control(self, tries: int) -> Attack | None:
        """Return the attack without its search, limited to `tries` rounds, or None if it is a control itself.

        The default is random tokens before the prompt, for attacks without a closer control.
        """
        return make("random", tries=tries)

    def on_base(self, tries: int) -> Attack | None:
        """Return the attack to run on the base as well, limited to `tries` rounds; None for most attacks."""
        return None


def names() -> list[str]:
    """Return the names of all attacks, in the order in which `all` runs them."""
    return list(MODULES)


def find(name: str) -> type[Attack]:
    """Return the class of the attack called `name`.

    Raises:
        ErasureError: there is no attack of that name.
    """
    if name not in MODULES:
        raise unknown("attack", name, names())
    module = importlib.import_module(f"erasure.evaluation.attacks.{MODULES[name]}")
    return next(
        value for value in vars(module).values() if isinstance(value, type) and getattr(value, "name", None) == name
    )


def make(name: str, budget: str = "lite", **settings: Any) -> Attack:
    """Return an attack with the settings of a budget, some of them overridden.

    Args:
        name: name of the attack.
        budget: `full` (the published settings) or `lite` (adapted to a CPU).
        settings: values that override the budget's.

    Raises:
        ErasureError: an unknown attack, budget or setting, or a value of the wrong type.
    """
    cls = find(name)
    if budget not in ("lite", "full"):
        raise unknown("budget", budget, ("lite", "full"))
    attack = build(cls, cls.LITE if budget == "lite" else {}, settings)
    check_settings(attack)
    return attack


def check_unet(pipe: Any) -> None:
    """Refuse a pipeline that attacks cannot reach into.

    Raises:
        ErasureError: it has no UNet.
    """
    if getattr(pipe, "unet", None) is None:
        raise ErasureError(
            f"attacks and white-box measurements reach into a UNet, which this {type(pipe).__name__} does not have"
        )


class Victim:
    """The erased pipeline as an attacker with access to its weights sees it.

    Gates decide only inside a call of the pipeline. A search runs outside it and therefore faces gated patches at
    full strength, folded into the weights, and guards as they act in a first step, whatever their gates. The two text
    encoders of Stable Diffusion XL read the same tokens; the vector of a token is the concatenation of its two
    embeddings.

    Args:
        pipe: an erased pipeline with its patches loaded.
        switched_off: returns a context in which all patches of a pipeline have strength 0.

    Raises:
        ErasureError: there is no UNet, a text encoder is missing, or the tokenizers differ.
    """

    def __init__(self, pipe: Any, switched_off: Callable[[Any], Any]) -> None:
        from erasure.model.conditioning import text_encoders

        check_unet(pipe)
        self.pipe, self._off = pipe, switched_off
        self._guarded = False
        self._prompts: list[list[str]] | None = None
        self.device = pipe.unet.device
        pairs = text_encoders(pipe)
        self.tokenizers = [tokenizer for tokenizer, _ in pairs]
        self.encoders = [encoder for _, encoder in pairs]
        vocabularies = [(tokenizer.get_vocab(), tokenizer.model_max_length) for tokenizer in self.tokenizers]
        if any(vocabulary != vocabularies[0] for vocabulary in vocabularies):
            raise ErasureError(
                f"the tokenizers of this {type(pipe).__name__} differ in vocabulary or length, but attacks pass the "
                "same tokens to both text encoders; nothing was attacked"
            )

    @contextmanager
    def unpatched(self) -> Iterator[None]:
        """Run the body of the `with` on the base model, with every patch at strength 0."""
        with self._off(self.pipe):
            yield

    @contextmanager
    def folded(self, guards: bool = True) -> Iterator[None]:
        """Run the body of the `with` with every patch fused into the weights, so that gates do not decide.

        Args:
            guards: let guards act on the predictions of `eps` too.
        """
        with ExitStack() as scope:
            if getattr(self.pipe, "get_list_patches", dict)():
                self.pipe.fuse_patches()
                scope.callback(self.pipe.unfuse_patches)
                self._guarded = guards
                scope.callback(setattr, self, "_guarded", False)
            yield

    @contextmanager
    def reading(self, texts: list[str]) -> Iterator[None]:
        """Let guards that read words take these texts for the prompts of the samples of `eps` inside the `with`."""
        self._prompts = [[text] for text in texts]
        yield
        self._prompts = None

    def conditions(self, texts: Sequence[str]) -> Conditions:
        """Encode texts with the current text encoders; nothing is cached, because patches may change the result."""
        import torch

        from erasure.model.conditioning import read, token_ids

        with torch.no_grad():
            return read(self.pipe, [token_ids(tokenizer, texts) for tokenizer in self.tokenizers])

    def slots(self, around: Sequence[tuple[str, str]], count: int) -> list[Slots]:
        """Reserve `count` token positions between the two texts of every pair, for each text encoder.

        Args:
            around: for each prompt, the text before and the text after the reserved positions.
            count: number of vectors, at least 1.

        Raises:
            ErasureError: the prompt is too long for that many vectors, or `count` is below 1.
        """
        from erasure.model.soft_prompt import word_slots

        return word_slots(self.pipe, around, count)

    def encode(self, places: Sequence[Slots], vectors: Tensor) -> Conditions:
        """Encode prompts with vectors in their reserved positions; gradients flow to the vectors.

        Args:
            places: one `Slots` per text encoder, as `slots` returns them.
            vectors: [n, k, width], or [k, width] for all prompts alike.
        """
        from erasure.model.soft_prompt import encode_word

        return encode_word(self.pipe, places, vectors)

    def base_latents(
        self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, steps: int, guidance: float
    ) -> Tensor:
        """Generate with the base and return the final latents [n, c, h, w], scaled as the UNet takes them.

        Args:
            prompts: n prompts.
            seeds: one seed per prompt, so that an image does not depend on its batch.
            batch_size: number of prompts per call of the pipeline.
            steps: number of sampling steps.
            guidance: guidance scale.
        """
        import torch

        batches = []
        with self.unpatched():
            for start in range(0, len(prompts), batch_size):
                latents = self.pipe(
                    list(prompts[start : start + batch_size]),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]],
                    output_type="latent",
                ).images
                batches.append(latents.float())
        return torch.cat(batches)

    def decoded(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents [n, c, h, w], scaled as the UNet takes them, to images."""
        import torch

        from erasure.model.diffusion import wide

        with torch.no_grad(), wide(self.pipe.vae):
            unscaled = latents.to(self.device, self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
            return self.pipe.image_processor.postprocess(self.pipe.vae.decode(unscaled).sample)

    def eps(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the noise in noisy latents x [n, c, h, w] at timesteps t [n]; v-prediction is converted."""
        from erasure.model.conditioning import predict
        from erasure.model.diffusion import to_eps
        from erasure.pipelines.guarding import guarding

        with guarding(self.pipe, len(x), self._prompts) if self._guarded else nullcontext():
            return to_eps(self.pipe.scheduler, predict(self.pipe, x, t, conditions).float(), x, t)

    @cached_property
    def embeddings(self) -> Tensor:
        """Return the table of token embeddings [vocabulary, width], of both encoders side by side on XL."""
        from erasure.model.soft_prompt import token_table

        return token_table(self.pipe)

    @cached_property
    def spread(self) -> float:
        """Return the standard deviation of the token embeddings, the unit of the attacks' learning rates."""
        return float(self.embeddings.std())

    @cached_property
    def words(self) -> Tensor:
        """Return the ids [n] of the tokens that survive being decoded to text and tokenised again.

        Special tokens, parts of characters and beginnings of words are left out: a prompt found with them would
        change when it is written down.
        """
        import torch

        tokenizer = self.pipe.tokenizer
        special = set(tokenizer.all_special_ids)
        ids = [i for i in range(len(self.embeddings)) if i not in special]
        texts = [tokenizer.decode([i]) for i in ids]
        rows = zip(ids, texts, tokenizer(texts, verbose=False).input_ids, strict=True)
        kept = [i for i, text, row in rows if row[1:-1] == [i] and text.isprintable()]
        return torch.tensor(kept, device=self.device)
