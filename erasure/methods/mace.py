"""MACE: Mass Concept Erasure (Lu et al. 2024, arXiv 2403.06135).

Three stages on the keys and values of cross-attention:

1. Refinement, in closed form (eq. 3): the words around the concept carry what is left of it, the padding most of all.
   In prompts with the concept each state but those of the name's own tokens is answered like the same word's state
   where another name stands instead; what is kept is answered as before.
2. A rank-1 term D_i for each concept, trained on the refined weights so that no pixel of the object looks at the name
   (eq. 7): L = sum over layers of || A[mask, tokens of the name] ||_F, with A the attention probabilities on noised
   latents of the concept's pictures. Timesteps have p(t) ~ s(0.05 (t - 200)) - s(0.05 (t - 400)), s the sigmoid:
   earlier ones decide on the composition, which other concepts share (eq. 8).
3. Fusion, in closed form (eq. 9; `model/fusion.py`): one weight that answers each concept's prompts like its own term,
   and what is kept like the base. Terms that are added up would act on each other's prompts.

Cost for each concept: 2 F for each step of each picture, 3 F a picture for its mask, 1 F + 1 B for each sample of an
update. Stages 1 and 3 call the UNet never.

Deviations from the published code, whose numbers `parity=true` sets: the masks come from the base's own attention to
the name instead of Grounding DINO and SAM, and a CLIPSeg cannot be plugged in yet; pictures stay latents; what is kept
are the words of the vocabulary, where the code has a cache of COCO's captions (its prior) and one of the concept's
domain; the concept is answered like the nearest other name of its kind unless it has an anchor; the prompts around the
concept are those of `contexts` and `templates`, where the code asks a language model for 30. lambda cannot be 0.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import all_anchored, retained
from erasure.config import setting
from erasure.method import GradientMethod
from erasure.model.attention_maps import AttentionMaps, attended, masks
from erasure.model.base import Base
from erasure.model.closed_form import Columns, Edit, StateMap
from erasure.model.concept_columns import MOST_CONTEXTS, Choice, Keep, kept_prompts, kept_states
from erasure.model.diffusion import add_noise, counting
from erasure.model.fusion import Fusion
from erasure.model.text_columns import Pair, checked_names, fits, places_of_name, states_beside_name
from erasure.model.trajectories import in_turn, walk
from erasure.patch import LowRank
from erasure.training.concept_terms import ConceptTerms
from erasure.training.loop import train
from erasure.training.run import FitResult, Run
from erasure.training.stopping import Stop

LOOKED_AT = (0.2, 0.3, 0.4)  # shares of the noise schedule at which the masks are read: where the timesteps mostly lie
SLOPE, EARLY, LATE = 0.05, 0.2, 0.4  # of eq. 8; the ends are shares of the noise schedule


@dataclass(frozen=True)
class MACE(GradientMethod):
    """The settings of MACE. Those of the refinement are UCE's, tuned on glyph; those of the training are not tuned.

    Defaults that are not the published values: learning_rate (published 1e-4 and 1e-5; ours 1e-2), batch_size (1; 4),
    sample_steps (50; 25). They were tried once, on cat, and spoil the target's pictures on other concepts
    (docs/closed-forms.md).

    Args:
        guide: what a concept without an anchor is answered like: the `nearest` other name of its kind, the `empty`
            prompt, or the published `script`'s word, "art" for styles.
        contexts: refine the concept also together with others; see `uce`.
        templates: more prompts to refine, with {x} in the place of the name.
        keep: what is kept: the `vocabulary`, the concepts' `neighbours`, or only words `listed` to be kept.
        keep_weight: weight of each kept state, in the refinement and in the fusion.
        ridge: lambda of the refinement; greater values keep the weights nearer to where they were.
        fusion_ridge: lambda of the fusion; greater values leave the trained terms out.
        rank: the largest rank of the refinement, for each name; null: the number of edited states, at most the width.
        mask: train on the pixels of the object that the base's `attention` shows, or on all of them (`none`).
        mask_threshold: from which share of the largest attention on a pixel belongs to the object.
        focal: draw timesteps by eq. 8; otherwise uniformly.
        images: pictures that the base draws of each concept.
        sample_steps: steps of each picture.
        sample_guidance: its classifier-free guidance scale.
        iterations: number of updates, each of one concept in turn.
        batch_size: pictures per update.
        learning_rate: Adam's learning rate.
        stop: only `never`; see `GradientMethod`.
        parity: the published settings, for the kind of concept.
    """

    method: ClassVar[str] = "mace"
    NO_STOP: ClassVar[str] = "its loss is about attention maps, which the curves do not measure"
    NO_SPARSITY: ClassVar[str] = "its terms are fused into other factors, which are not sparse"
    PARITY: ClassVar[dict[str, Any]] = {
        "guide": "script",
        "contexts": False,
        "keep_weight": 8.0,  # train_preserve_scale 1e-4 times preserve_weight 8e4
        "ridge": 1e-4,  # 0
        "rank": None,
        "sample_steps": 50,
        "sample_guidance": 7.5,
        "batch_size": 1,
        "learning_rate": 1e-4,
    }
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        "object": {"learning_rate": 1e-5, "ridge": 100.0, "keep": "listed"},
        "content": {"learning_rate": 1e-5, "iterations": 120, "focal": False, "keep": "listed"},
    }
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "rank")

    guide: Literal["nearest", "empty", "script"] = "nearest"
    contexts: bool = True
    templates: tuple[str, ...] = ()
    keep: Keep = "vocabulary"
    keep_weight: float = setting(1.0, above=0)
    ridge: float = setting(5.0, above=0)
    fusion_ridge: float = setting(1e-3, above=0)
    rank: int | None = setting(8, at_least=1)
    mask: Literal["attention", "none"] = "attention"
    mask_threshold: float = setting(0.4, at_least=0, at_most=1)
    focal: bool = True
    images: int = setting(8, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    sample_guidance: float = 3.0
    iterations: int = setting(50, at_least=1)
    batch_size: int = setting(4, at_least=1)
    learning_rate: float = setting(1e-2, above=0, below=1)
    stop: Stop = "never"
    parity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice()

    def _choice(self) -> Choice:
        return Choice("tail", "ends", self.guide, contexts=self.contexts, templates=self.templates)

    def prompts(self, base: Base, concepts: list[Concept]) -> list[list[Pair]]:
        """Return for each concept the prompts that name it with those in their stead, each name alone first.

        Raises:
            ErasureError: names that `checked_names` refuses, or no other name to be the nearest.
        """
        choice = self._choice()
        styles = [word for kind, word in retained(base, concepts) if kind == "style"] if self.contexts else []
        named = [name for _, name in checked_names(base, concepts)]
        led = all_anchored(base, concepts) if self.guide == "nearest" else concepts
        found = []
        for concept in led:
            pairs = [choice.pairs(concept, name, styles[:MOST_CONTEXTS]) for name in concept.names if name in named]
            found.append([pair for own in pairs for pair in own[:1]] + [pair for own in pairs for pair in own[1:]])
        return [[pair for pair in pairs if fits(base, pair.prompt)] for pairs in found]

    def refined(self, base: Base, prompts: list[list[Pair]], kept: Tensor) -> StateMap:
        """Return the refinement: what all layers share of the change."""
        states, guides, weights = [], [], []
        for pairs in prompts:
            for pair, share in zip(pairs, shares(pairs), strict=True):
                edit, guide = states_beside_name(base, pair)
                states.append(edit)
                guides.append(guide)
                weights.append(torch.full((len(edit),), share, dtype=torch.float64))
        edits, answers, counted = torch.cat(states), torch.cat(guides), torch.cat(weights)
        columns = Columns(edits, answers, kept, counted, self.keep_weight, self.ridge)
        return Edit(columns if self.rank is None else columns.principal(self.rank))

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Refine, draw pictures of each concept, find the object on them, and put the terms in place.

        Raises:
            ErasureError: anything that `prompts` and `Columns` refuse.
        """
        prompts = self.prompts(base, concepts)
        kept = kept_states(base, kept_prompts(base, concepts, self.keep), "tail").double().cpu()
        refined = self.refined(base, prompts, kept)
        spans = [spanned(base, pairs) for pairs in prompts]
        fusion = Fusion(refined, spans, self.keep_weight * kept.T @ kept, self.fusion_ridge)
        subjects = [self._drawn(base, pairs, run.seed, place) for place, pairs in enumerate(prompts)]
        if self.mask == "attention":
            for place, subject in enumerate(subjects):
                draw = torch.Generator().manual_seed(run.seed * 1_003 + place)
                subject.where = found_on(base, subject, self.mask_threshold, draw)
        with ExitStack() as closing:
            # Recorded until the end: checkpointed layers are computed again in the backward pass, with the same hooks.
            maps = closing.enter_context(AttentionMaps(base.unet))
            adapter = ConceptTerms(base, refined, len(concepts), run.seed, closing.pop_all())
        return State(base, subjects, fusion, maps, adapter, run)

    def _drawn(self, base: Base, pairs: list[Pair], seed: int, place: int) -> Subject:
        """Return the pictures of one concept, with the object anywhere on them."""
        named = list({pair.name: pair for pair in reversed(pairs)}.values())[::-1]  # each name alone
        shown = [named[i % len(named)] for i in range(self.images)]
        seeds = [seed * 10_007 + place * 1_009 + i for i in range(self.images)]
        texts = [(pair.prompt, "") for pair in shown]
        options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.sample_guidance}
        latents = walk(base, texts, seeds=seeds, stop=self.sample_steps, judged=False, **options).x
        return Subject(shown, latents, torch.ones(self.images, *latents.shape[2:], dtype=torch.bool))

    def loss(self, state: State, step: int) -> dict[str, Tensor]:
        """Return how much the object of one concept still looks at the concept's name."""
        base, (turn, own) = state.base, divmod(step, len(state.subjects))
        subject, draw = state.subjects[own], torch.Generator().manual_seed(state.run.seed * 1_000_003 + step)
        index = in_turn(len(subject.shown), self.batch_size, turn, state.run.seed + own)
        length = base.scheduler.config.num_train_timesteps
        law = focal(length) if self.focal else torch.ones(length)
        times = torch.multinomial(law, self.batch_size, replacement=True, generator=draw)
        noise = torch.randn(subject.latents[index].shape, generator=draw)
        x = add_noise(base.scheduler, subject.latents[index], noise, times).to(base.device)
        texts = base.conditions([subject.shown[int(i)].prompt for i in index])
        state.maps.layers.clear()
        with state.alone(), state.adapter.only(own):
            output = base.predict(x, times.to(base.device), texts)
        found = list(state.maps.layers.values())
        total = output.float().sum() * 0  # so that the backward pass is one of the UNet's, and counted
        for row, i in enumerate(index.tolist()):
            places = places_of_name(base, subject.shown[i])
            where = subject.where[i : i + 1].to(base.device)
            total = total + attended([layer[row : row + 1] for layer in found], *places, where) / len(index)
        return {"attention": total}

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Refine, train the terms, and fuse them."""
        state = train(self, base, concepts, run)
        try:
            with counting(base.network, run.costs):
                layers = {
                    path: state.fusion.factors(module.get_parameter("weight"), state.adapter.trained(path))
                    for path, module in base.targets("x-strict").items()
                }
            return FitResult(LowRank({base.component: layers}))
        finally:
            state.adapter.remove()


def shares(pairs: list[Pair]) -> list[float]:
    """Return the weight of each prompt of a concept: a name alone counts as much as all its other prompts together."""
    firsts = {pair.name: pair for pair in reversed(pairs)}
    others = {name: sum(pair.name == name for pair in pairs) - 1 for name in firsts}
    return [1.0 if pair is firsts[pair.name] else 1 / others[pair.name] for pair in pairs]


def spanned(base: Base, pairs: list[Pair]) -> Tensor:
    """Return sum_k s_k k k^T over the states of a concept's prompts from the name on [d, d], in float64."""
    total: Tensor | None = None
    for pair, share in zip(pairs, shares(pairs), strict=True):
        states = base.encode([pair.prompt])[0].double().cpu()[places_of_name(base, pair)[0] :]
        total = share * states.T @ states if total is None else total + share * states.T @ states
    return total if total is not None else torch.empty(0, 0)


def focal(length: int) -> Tensor:
    """Return p(t) of eq. 8 for the timesteps 0, .., length - 1, up to a factor."""
    t = torch.arange(length, dtype=torch.float64) * (1000 / length)
    return torch.sigmoid(SLOPE * (t - 1000 * EARLY)) - torch.sigmoid(SLOPE * (t - 1000 * LATE))


@torch.no_grad()
def found_on(base: Base, subject: Subject, threshold: float, draw: torch.Generator) -> Tensor:
    """Return where the base's attention to the name lies on each picture [n, h, w]; anywhere, if there are no maps."""
    rows = []
    length = base.scheduler.config.num_train_timesteps
    for i, pair in enumerate(subject.shown):
        latents = subject.latents[i : i + 1]
        found: list[Tensor] = []
        for share in LOOKED_AT:
            t = torch.tensor([int(share * length)])
            x = add_noise(base.scheduler, latents, torch.randn(latents.shape, generator=draw), t).to(base.device)
            with AttentionMaps(base.unet) as maps:
                base.predict(x, t.to(base.device), base.conditions([pair.prompt]))
                found += [layer.cpu() for layer in maps.layers.values()]
        size = (latents.shape[2], latents.shape[3])
        own = masks(found, *places_of_name(base, pair), size, threshold) if found else subject.where[i : i + 1]
        rows.append(own)
    return torch.cat(rows)


@dataclass
class Subject:
    """The pictures of one concept.

    Args:
        shown: the prompt of each picture.
        latents: clean [n, c, h, w].
        where: true on the object [n, h, w].
    """

    shown: list[Pair]
    latents: Tensor
    where: Tensor


@dataclass
class State:
    """The state of a run of MACE.

    Args:
        base: the checkpoint.
        subjects: the pictures of each concept.
        fusion: what makes one weight of the terms.
        maps: the attention of the last call.
        adapter: the terms.
        run: the run.
    """

    base: Base
    subjects: list[Subject]
    fusion: Fusion
    maps: AttentionMaps
    adapter: ConceptTerms
    run: Run

    def alone(self) -> Any:
        """Return a context in which this process computes all rows: maps are not shared between processes."""
        return self.run.engine.alone() if self.run.engine is not None else ExitStack()
