"""SLUG: single layer unlearning gradient (Cai, Tan & Asif 2025, arXiv 2407.11867).

One step along one gradient changes one layer of the text encoder T. With the image tower I of the CLIP that T comes
from, on pictures x_i of the concept with its name c, and on other pictures with their prompts,

    L_f = mean_i 1 - cos(I(x_i), T(c))        L_r = CLIP's contrastive loss

are differentiated once, at the base's weights. For each weight matrix w of T's layers,

    importance  || grad_w L_f || / || w ||        alignment  | cos(grad_w L_f, grad_w L_r) |

Of the matrices that no other one beats in both (the Pareto front: large importance, small alignment) the deepest is
changed, with those that act together with it (queries, keys and values; both matrices of an MLP):

    w <- w + s grad_w L_f

s starts at a tenth of || w || / || grad_w L_f ||, doubles until no picture is taken for the concept any more, and is
then bisected to the smallest such s. A picture is taken for the concept if its name fits better than every other word:
cos(I(x), T(c)) > max_w cos(I(x), T(w)). Where no step suffices, the next matrix is tried. Several concepts get a layer
and a step each, all found at the base's weights.

Cost: 2F for each step of each picture that the base draws; the gradients and the search need none. B = 0.

Deviations from the published code: gradients are those of the whole sets, each taken by itself (published: never set to
zero, neither between batches nor between L_f and L_r, so that the alignment compares g_f with g_f + g_r); pictures come
from the base (published: photographs of LAION, or generated ones); the search looks at CLIP's margin (published: at a
classifier's answers to six drawn pictures, 6,000 to 12,000F); the joint step of several concepts is their sum, as
published, without a search for the sum. As published, the edited encoder also encodes the empty prompt of guidance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import prompt_of, retain_prompts, retained
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import Method
from erasure.model.base import Base
from erasure.model.clip_towers import ClipTowers, contrastive, load_towers
from erasure.model.conditioning import text_encoders
from erasure.model.diffusion import counting
from erasure.patch import Delta
from erasure.training.compute import Computing
from erasure.training.dry_run import Forecast, forecast_runtime
from erasure.training.encoder_parts import (
    MATRIX,
    Gradients,
    alignment,
    depth,
    fronts,
    gradients,
    length,
    moved,
    part_of,
)
from erasure.training.image_latents import Images, decoded, drawn
from erasure.training.run import FitResult, Run

LOG = logging.getLogger("erasure")
DOUBLINGS = 6  # of the first step: from a tenth of the weights' length to three times it


@dataclass(frozen=True)
class Slug(Method):
    """The settings of SLUG, with the values tuned on glyph as defaults.

    Defaults that are not the published values:

    - prefer, beyond: published the deepest part and the smallest sufficient step. On glyph CLIP then no longer knows
      the concept, but the pictures still show it (docs/results.md): CLIP reads one state, at the end token, and the
      UNet all of them. Ours is the shallowest part on the front, and four times that step.
    - forget_count, retain_count: published 10 to 500 pictures that the base draws and 7,900 photographs of LAION; ours
      24 and 48 pictures of the base.

    Args:
        prefer: which part on the Pareto front is changed: the deepest, as published, or the shallowest.
        layer: the part of the text encoder to change, such as layers.3.mlp; None: chosen by the front. Parts are qkv
            (queries, keys and values), out_proj and mlp.
        step: s as a share of || w || / || grad ||, without a search; None: the smallest that suffices.
        first_step: the first s of the search, as such a share.
        bisections: halvings of the interval that holds the smallest sufficient s.
        beyond: factor on the s that was found.
        margin: how much worse than the best other word the concept's name must fit every picture, in cosines.
        clip: a folder or the hub id of the CLIP that the text encoder comes from; None: the one that the preset names.
        forget_count: pictures that the base draws of each concept.
        retain_count: pictures that it draws of everything else.
        batch_size: pictures that the contrastive loss compares with each other.
        sample_steps: sampling steps of the pictures.
        sample_guidance: their guidance scale.
    """

    method: ClassVar[str] = "slug"

    prefer: Literal["deepest", "shallowest"] = "shallowest"
    layer: str | None = None
    step: float | None = setting(None, above=0)
    first_step: float = setting(0.1, above=0)
    bisections: int = setting(10, at_least=0)
    beyond: float = setting(4.0, above=0)
    margin: float = setting(0.0, at_least=0, at_most=2)
    clip: str | None = None
    forget_count: int = setting(24, at_least=1)
    retain_count: int = setting(48, at_least=2)
    batch_size: int = setting(16, at_least=2)
    sample_steps: int = setting(15, at_least=1)
    sample_guidance: float = 3.0

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Draw the pictures, choose a layer and a step for each concept, and return the change.

        Raises:
            ErasureError: the checkpoint has two text encoders or its CLIP is not there, CLIP does not recognise the
                concept, there is nothing to retain, or there are more concepts than parts of the encoder.
        """
        towers, rivals = self.opened(base, concepts)
        with counting(base.network, run.costs):
            forget, retain = self.pictures(base, concepts, run)
            encoder = base.pipe.text_encoder
            with matrices(towers, encoder) as weights:
                texts = Texts(base, towers, rivals)
                kept = towers.images(decoded(base, retain))
                against = self.retain_gradients(texts, weights, kept, retain.prompts)
                changes: dict[str, Tensor] = {}
                for concept, pictures in zip(concepts, forget, strict=True):
                    seen = Seen(towers.images(decoded(base, pictures)), names_of(concept))
                    changes |= self.changes(texts, weights, seen, against, taken={part_of(name) for name in changes})
        return FitResult(Delta({"text_encoder": changes}))

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Draw the pictures with a UNet that answers at once, and count its calls; time one real call."""
        check_one_encoder(base)
        return forecast_runtime(_Drawing(self), base, concepts, computing, seed, processes)

    def opened(self, base: Base, concepts: list[Concept]) -> tuple[ClipTowers, list[str]]:
        """Return CLIP's towers, of which the text tower reads the encoder's own weights, and the other words."""
        check_one_encoder(base)
        rivals = [
            prompt_of(kind, word)
            for kind, word in retained(base, concepts)
            if (kind == "style") in {concept.kind == "style" for concept in concepts}
        ]
        if not rivals:
            raise ErasureError(
                "there is no other word that pictures could be taken for instead. Name words to keep with `keep` "
                "(--keep); nothing was changed"
            )
        return load_towers(base, self.clip), rivals

    def pictures(self, base: Base, concepts: list[Concept], run: Run) -> tuple[list[Images], Images]:
        """Draw pictures of each concept, and of everything else."""
        options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.sample_guidance}
        forget = []
        for i, concept in enumerate(concepts):
            prompts = [prompt for prompt, _ in concept.prompt_pairs()]
            path = run.path(f"forget-{i}.safetensors")
            forget.append(drawn(base, prompts, self.forget_count, seed=2 * run.seed, path=path, **options))
        texts = retain_prompts(base, concepts, self.retain_count, seed=run.seed)
        path = run.path("retain.safetensors")
        return forget, drawn(base, texts, self.retain_count, seed=2 * run.seed + 1, path=path, **options)

    def retain_gradients(
        self, texts: Texts, weights: Mapping[str, nn.Parameter], seen: Tensor, prompts: Sequence[str]
    ) -> Gradients:
        """Return the gradient of the contrastive loss, averaged over the batches.

        Args:
            texts: reads texts.
            weights: what the gradient is taken of.
            seen: vectors [n, d] of the pictures.
            prompts: what each of them shows.
        """
        batches = [part for part in torch.arange(len(prompts)).split(self.batch_size) if len(part) > 1]

        def loss(part: Tensor) -> Tensor:
            read = texts.read([prompts[int(i)] for i in part])
            return contrastive(seen[part], read, texts.towers.scale) / len(batches)

        return gradients([partial(loss, part) for part in batches], weights)

    def changes(
        self,
        texts: Texts,
        weights: Mapping[str, nn.Parameter],
        seen: Seen,
        against: Gradients,
        taken: set[str],
    ) -> dict[str, Tensor]:
        """Return the change for one concept, by the name of the weight.

        Args:
            texts: reads texts.
            weights: the matrices that can be changed.
            seen: the concept's pictures and names.
            against: the retain gradient.
            taken: parts of the encoder that other concepts change.
        """
        label, before = repr(seen.names[0]), texts.margins(seen)
        if self.step is None and not (before > 0).any():
            raise ErasureError(
                f"{texts.towers.source} does not recognise {label} on any of the {len(before)} pictures that the base "
                "drew of it, so that no step can be searched by it. Give step (--set step=0.1) or another name, or use "
                "another method; nothing was changed"
            )
        found = gradients([lambda: forget_loss(seen.images, texts.read(seen.captions()))], weights)
        tried = []
        for part in self.choices(weights, found, against, taken):
            group = {name: found[name] for name in weights if part_of(name) == part}
            unit = length(weights[name] for name in group) / length(group.values())
            share = self.step if self.step is not None else self.searched(texts, weights, seen, group, unit)
            if share is not None:
                break
            tried.append(part)
        else:
            raise ErasureError(
                f"{label}: CLIP still takes pictures for it after the step was doubled {DOUBLINGS} times, in "
                f"{', '.join(tried) or 'no part, because other concepts change all of them'}. Erase fewer concepts at "
                "once, or give step (--set step=0.4) or a smaller margin; nothing was changed"
            )
        s = share * unit
        with moved(weights, group, s):
            after = texts.margins(seen)
        LOG.info(
            "%s: %s of the text encoder changes, by %.1f %% of its length; CLIP takes %d of %d pictures for it, before "
            "%d",
            label,
            part,
            100 * share,
            int((after > 0).sum()),
            len(after),
            int((before > 0).sum()),
        )
        return {name: (s * gradient).cpu() for name, gradient in group.items()}

    def searched(
        self, texts: Texts, weights: Mapping[str, nn.Parameter], seen: Seen, group: Gradients, unit: float
    ) -> float | None:
        """Return the step of a part as a share of its weights, or None if no step suffices there."""

        def gone(share: float) -> bool:
            with moved(weights, group, share * unit):
                return bool((texts.margins(seen) <= -self.margin).all())

        found = smallest(gone, self.first_step, self.bisections)
        return None if found is None else self.beyond * found

    def choices(
        self, weights: Mapping[str, nn.Parameter], found: Gradients, against: Gradients, taken: set[str]
    ) -> list[str]:
        """Return the parts of the encoder that are free, in the order in which they are tried.

        That is `layer` alone, or front by front, each from the preferred end.

        Raises:
            ErasureError: the encoder has no such part as `layer`.
        """
        parts = list(dict.fromkeys(part_of(name) for name in weights))
        if self.layer is not None and self.layer not in parts:
            raise ErasureError(f"layer={self.layer!r}: must be one of {', '.join(parts)}; nothing was changed")
        if self.layer is not None and self.layer not in taken:
            return [self.layer]
        scores = {
            name: (length([found[name]]) / length([weight]), alignment(found[name], against[name]))
            for name, weight in weights.items()
        }
        ordered = [
            part_of(name)
            for front in fronts(scores)
            for name in sorted(front, key=depth, reverse=self.prefer == "deepest")
        ]
        return [part for part in dict.fromkeys(ordered) if part not in taken]


@dataclass
class Seen:
    """The pictures of a concept.

    Args:
        images: their vectors [n, d].
        names: the prompts that name the concept.
    """

    images: Tensor
    names: list[str]

    def captions(self) -> list[str]:
        """Return one of the names for each picture, in turn."""
        return [self.names[i % len(self.names)] for i in range(len(self.images))]


@dataclass
class Texts:
    """The texts that pictures are compared with.

    Args:
        base: the checkpoint.
        towers: of its CLIP.
        rivals: the words that a picture may be taken for besides the concept's names.
    """

    base: Base
    towers: ClipTowers
    rivals: list[str]

    def read(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, d] of texts, each of which is read once."""
        different = list(dict.fromkeys(texts))
        vectors = self.towers.texts(self.base.pipe, different)
        return vectors[[different.index(text) for text in texts]]

    @torch.no_grad()
    def margins(self, seen: Seen) -> Tensor:
        """Return how much better a name of the concept fits each picture than the best other word [n], in cosines."""
        texts = self.read([*seen.names, *self.rivals])
        fits = seen.images.to(texts.device) @ texts.T
        own = len(seen.names)
        return fits[:, :own].amax(1) - fits[:, own:].amax(1)


class _Drawing:
    """The part of a run that calls the UNet, for a forecast."""

    def __init__(self, method: Slug) -> None:
        self.method = method

    def collect(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Draw the pictures; the weights are the largest that the concepts could change."""
        self.method.pictures(base, concepts, run)
        named = {name: p for name, p in base.pipe.text_encoder.named_parameters() if MATRIX.search(name)}
        sizes: dict[str, dict[str, Tensor]] = {}
        for name, param in named.items():
            sizes.setdefault(part_of(name), {})[name] = torch.zeros(param.shape)
        largest = sorted(sizes.values(), key=lambda part: sum(w.numel() for w in part.values()), reverse=True)
        return FitResult(Delta({"text_encoder": {k: v for part in largest[: len(concepts)] for k, v in part.items()}}))


def check_one_encoder(base: Base) -> None:
    """Refuse a checkpoint with two text encoders; raises ErasureError."""
    if len(text_encoders(base.pipe)) > 1:
        raise ErasureError(
            f"slug changes the one text encoder of Stable Diffusion 1 and 2, and {base.name} reads two: after one is "
            "changed, the other still encodes the concept. Use another method; nothing was changed"
        )


def names_of(concept: Concept) -> list[str]:
    """Return the prompts that name a concept, without a subject."""
    return [prompt_of(concept.kind, name) for name in concept.names]


@contextmanager
def matrices(towers: ClipTowers, encoder: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Let the text tower read the encoder, and return the weight matrices of its layers, which then have gradients."""
    encoder.requires_grad_(False)
    weights = {name: param for name, param in towers.share(encoder).items() if MATRIX.search(name)}
    for param in weights.values():
        param.requires_grad_(True)
    try:
        yield weights
    finally:
        encoder.requires_grad_(False)


def forget_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Return the mean of 1 - cos over pairs of unit vectors [n, d]."""
    return (1 - (images.to(texts.device) * texts).sum(1)).mean()


def smallest(gone: Callable[[float], bool], first: float, bisections: int) -> float | None:
    """Return the smallest step that suffices: doubled from `first` until it does, then bisected; None if none does.

    Args:
        gone: tells whether a step suffices.
        first: the first step to try.
        bisections: halvings of the last interval.
    """
    low, high = 0.0, first
    for _ in range(DOUBLINGS):
        if gone(high):
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (low, middle) if gone(middle) else (middle, high)
    return high
