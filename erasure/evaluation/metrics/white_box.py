"""White-box metrics: what the weights reveal without a judge, from the UNet's and the text encoder's own outputs.

Symbols: e_0 is the base's noise prediction and e* the erased model's; c_0 and c* are the text states of the two models;
x_t are latents of the base's own images with noise eps. With L(c) = E_{t, eps} || eps - e(x_t, t, c) ||^2:

    drift    E_t || e*(x_t, t, c*) - e_0(x_t, t, c_0) ||^2 / || e_0(x_t, t, c_0) ||^2
    margin   L(anchor) - L(concept) on images of the concept. This is the diffusion classifier (Li et al. 2023, arXiv
             2303.16203) as UnlearnDiffAtk uses it (arXiv 2310.11868), without its search. Above 0, the model still
             classifies the images as the concept.
    closed-form leak   || W c*_word - W c*_anchor || / || W0 c_0,word - W0 c_0,anchor ||  for other words for the
             concept, over all keys and values of the cross-attention layers: 1 means untouched, 0 means that the word
             has become the anchor.

Gates take effect only inside a pipeline's call. Here gated patches are fused into the weights, so that the drift of
kept prompts is what they would suffer if the gate were open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Victim
from erasure.evaluation.metrics.metric import Metric, mean_metric
from erasure.model import presets
from erasure.model.closed_form import readers
from erasure.model.diffusion import Counts, add_noise, counting
from erasure.model.loading import name_of, sampling_of, words_of
from erasure.patch import RUNTIME
from erasure.pipelines.strengths import switched_off

BINS = 4  # equal intervals of timesteps; each image gets one timestep in each of them


@dataclass(frozen=True)
class WhiteBox:
    """White-box metrics by name, each over n images (or n words, for the closed-form leak) with a bootstrap interval.

    Args:
        metrics: drift_target and drift_kept, both also by interval of timesteps ("drift_kept 0-249"), margin,
            margin_base, closed_leak.
        costs: the cost of all measurements, including the base's images.
        folded: names of gated patches, which are measured as if their gates were open.
    """

    metrics: dict[str, Metric]
    costs: Counts
    folded: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return metrics, costs and names as plain data."""
        return {
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "costs": self.costs.to_json(),
            "folded": list(self.folded),
        }

    def rows(self) -> tuple[list[Metric], list[Metric]]:
        """Return the base's metrics and the erased model's, for a report; the base's drift is 0 and its leak is 1."""
        base, erased = [], []
        for name, metric in self.metrics.items():
            if name == "margin_base":
                continue
            if name == "margin":
                base.append(replace(self.metrics["margin_base"], name=name))
            else:
                value = 1.0 if name == "closed_leak" else 0.0
                base.append(replace(metric, value=value, low=value, high=value))
            erased.append(metric)
        return base, erased


@dataclass(frozen=True)
class NoisePredictions:
    """How the noise predictions of the erased model and the base differ, for n images at BINS timesteps each.

    Args:
        drift: || e* - e_0 ||^2 / || e_0 ||^2 under each image's own prompt [n, BINS].
        margin: L(anchor) - L(prompt) under the erased model and under the base, each [n, BINS]; None without anchors.
    """

    drift: Tensor
    margin: tuple[Tensor, Tensor] | None


def measure_white_box(
    pipe: Any,
    concept: str | Concept,
    kept: Sequence[str],
    *,
    words: Sequence[str] | None = None,
    images: int = 12,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> WhiteBox:
    """Measure the loaded patches from the model's weights; afterwards the pipeline is as before, bit for bit.

    The target prompts are the concept's `prompt_pairs`. All random numbers depend on `seed` alone, and all models see
    the same noise.

    Args:
        pipe: a pipeline with patches loaded.
        concept: what was erased.
        kept: prompts that should be unaffected.
        words: other words for the concept; None: those in the checkpoint's vocabulary. Without any, the closed-form
            leak is not measured.
        images: number of images for the target prompts, and again for the kept prompts. Prompts are repeated with
            other seeds if there are fewer; if there are more, the first ones are used.
        steps: sampling steps of the base's images; None: what suits the checkpoint.
        guidance: guidance scale of the base's images; None: what suits the checkpoint.
        batch_size: images per batch.
        seed: seed of all random numbers.

    Raises:
        ErasureError: there are no kept prompts, fewer than 2 images, or only guards and features act.
    """
    if isinstance(kept, str) or not kept:
        raise ErasureError("kept: expected a list of at least one prompt that should be unaffected")
    if images < 2:
        raise ErasureError(f"images={images}: an interval needs at least 2")
    loaded: Any = getattr(pipe, "get_list_patches", dict)()
    kinds = {entry.get("kind") for entry in loaded.values() if entry["strength"]}
    if kinds and kinds <= set(RUNTIME):
        raise ErasureError(
            "white-box measurements compare the weights with the base's, and guards change none, nor do features: "
            "they would show nothing. Leave --inside out"
        )
    vocabulary = presets.vocabulary(name_of(pipe))
    sampling = sampling_of(pipe, steps, guidance)
    victim, concept, counts = Victim(pipe, switched_off), Concept.of(concept, words_of(pipe)), Counts()
    generator = torch.Generator().manual_seed(seed)
    pairs = _repeat(concept.prompt_pairs(), images)
    prompts, anchors = [prompt for prompt, _ in pairs], [anchor for _, anchor in pairs]
    kept_prompts = _repeat(list(kept), images)
    with torch.no_grad(), counting(pipe.unet, counts):
        latents = victim.base_latents(
            [*prompts, *kept_prompts],
            range(seed, seed + 2 * images),
            batch_size,
            sampling.steps,
            sampling.guidance,
        )
        target = compare_predictions(victim, latents[:images], prompts, anchors, generator, batch_size)
        others = compare_predictions(victim, latents[images:], kept_prompts, None, generator, batch_size)
        ratios = closed_form_leak(victim, concept, other_words(concept, vocabulary) if words is None else words)
    metrics = [
        *_drift_metrics("target", target.drift, pipe),
        *_drift_metrics("kept", others.drift, pipe, kept_prompts),
        *_margin_metrics(target.margin),
    ]
    meaning = "distance of other words for the target from its anchor, in keys and values, relative to the base's"
    metrics.append(mean_metric("closed_leak", ratios, False, meaning))
    folded = tuple(name for name, entry in loaded.items() if entry["strength"] and entry["gate"] != "always")
    return WhiteBox({metric.name: metric for metric in metrics if metric is not None}, counts, folded)


def _repeat(values: list[Any], count: int) -> list[Any]:
    """Return `count` values, starting again at the first one when they run out."""
    return [values[i % len(values)] for i in range(count)]


def compare_predictions(
    victim: Victim,
    latents: Tensor,
    prompts: Sequence[str],
    anchors: Sequence[str] | None,
    generator: torch.Generator,
    batch_size: int,
) -> NoisePredictions:
    """Compare the noise predictions of the base and the erased model on noisy images.

    Each image gets one random timestep in each of BINS intervals, and is predicted under its prompt and its anchor.

    Args:
        victim: the erased pipeline.
        latents: latents of images [n, c, h, w].
        prompts: prompt of each image.
        anchors: text that should replace the prompt, for each image; None: no margin is measured.
        generator: source of the timesteps and the noise.
        batch_size: latents per batch.
    """
    scheduler, n = victim.pipe.scheduler, len(latents)
    edges = _bin_edges(scheduler)
    t = (edges[:-1] + (torch.rand(n, BINS, generator=generator) * edges.diff()).long()).to(victim.device)
    noise = torch.randn((n, BINS, *latents.shape[1:]), generator=generator).to(latents)
    rows = torch.arange(n, device=latents.device).repeat_interleave(BINS)
    x = add_noise(scheduler, latents[rows], noise.flatten(0, 1), t.flatten())

    def predict(texts: Sequence[str]) -> Tensor:
        conditions = victim.conditions(texts)
        batches = zip(*(tensor.split(batch_size) for tensor in (x, t.flatten(), rows)), strict=True)
        parts = [victim.eps(x, t, conditions[row]) for x, t, row in batches]
        return torch.cat(parts).unflatten(0, (n, BINS)).flatten(2)

    text_lists = [prompts] if anchors is None else [prompts, anchors]
    with victim.unpatched():
        before = [predict(texts) for texts in text_lists]
    with victim.folded(guards=False):
        after = [predict(texts) for texts in text_lists]
    drift = (after[0] - before[0]).square().sum(-1) / before[0].square().sum(-1)
    if anchors is None:
        return NoisePredictions(drift, None)
    true = noise.flatten(2)
    margins = [
        (of_anchor - true).square().mean(-1) - (of_prompt - true).square().mean(-1)
        for of_prompt, of_anchor in (after, before)
    ]
    return NoisePredictions(drift, (margins[0], margins[1]))


def _bin_edges(scheduler: Any) -> Tensor:
    """Return the first timestep of each interval, and the end of the last one [BINS + 1]."""
    return torch.linspace(0, len(scheduler.alphas_cumprod), BINS + 1).round().long()


def _drift_metrics(role: str, drift: Tensor, pipe: Any, groups: Sequence[str] | None = None) -> Iterator[Metric | None]:
    """Yield the drift over all timesteps, then for each interval of timesteps."""
    meaning, better = (
        f"relative squared change of the predicted noise from the base's, on {role} prompts",
        role == "target",
    )
    yield mean_metric(f"drift_{role}", drift.mean(1).tolist(), better, meaning, groups)
    edges = _bin_edges(pipe.scheduler).tolist()
    for i, values in enumerate(drift.T):
        span = f"{edges[i]}-{edges[i + 1] - 1}"
        name = f"drift_{role} {span}"
        yield mean_metric(name, values.tolist(), better, f"drift_{role} at timesteps {span}", groups)


def _margin_metrics(margins: tuple[Tensor, Tensor] | None) -> Iterator[Metric | None]:
    """Yield the margin of the erased model and of the base."""
    if margins is None:
        return
    meaning = "loss under the anchor minus loss under the concept, on the base's target images, for the"
    for name, values, model in zip(("margin", "margin_base"), margins, ("erased model", "base"), strict=True):
        yield mean_metric(name, values.mean(1).tolist(), False, f"{meaning} {model}")


def closed_form_leak(victim: Victim, concept: Concept, words: Sequence[str]) -> list[float]:
    """Return || W c*_word - W c*_anchor || / || W0 c_0,word - W0 c_0,anchor || for each word.

    Words that the base's text encoder does not distinguish from the anchor are left out.

    Args:
        victim: the erased pipeline.
        concept: what was erased, with its anchor.
        words: other words for the concept.
    """
    concepts = [Concept(word, anchor=concept.anchor, kind=concept.kind) for word in words]
    texts = [text for synonym in concepts for text in synonym.prompt_pairs()[0]]
    if not texts:
        return []

    def distance(model: Callable[[], Any]) -> Tensor:
        with model():
            states = victim.conditions(texts).states.double()
            return ((states[::2] - states[1::2]) @ readers(victim.pipe.unet).T).flatten(1).norm(dim=1)

    after, before = distance(victim.folded), distance(victim.unpatched)
    return (after / before)[before > 0].tolist()


def other_words(concept: Concept, vocabulary: Vocabulary | None) -> tuple[str, ...]:
    """Return the other words for a concept in the checkpoint's vocabulary, without the concept's own names.

    Args:
        concept: what was erased.
        vocabulary: the checkpoint's words, or None if they are not known.
    """
    synonyms = [] if vocabulary is None else vocabulary.synonyms(concept.name)
    return tuple(word for word in synonyms if word not in (*concept.names, concept.anchor))
