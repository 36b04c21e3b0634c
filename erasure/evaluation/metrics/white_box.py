"""What the weights tell without a judge: no picture is scored, only the UNet's and the text encoder's own answers.

Symbols: e_0 the base's noise, e* the erased model's, c_0 and c* the text states of each, x_t latents of the base's own
pictures with noise eps. With L(c) = E_{t, eps} || eps - e(x_t, t, c) ||^2:

    drift    E_t || e*(x_t, t, c*) - e_0(x_t, t, c_0) ||^2 / || e_0(x_t, t, c_0) ||^2
    margin   L(stand-in) - L(concept) on pictures of the concept, the diffusion classifier (UnlearnDiffAtk, arXiv
             2310.11868, without its search; Li et al. 2023, arXiv 2303.16203): above 0 the model takes them for it
    closed-form leak   || W c*_word - W c*_stand-in || / || W0 c_0,word - W0 c_0,stand-in ||  for other words for the
             concept, over all keys and values of the cross-attentions: 1 untouched, 0 the word says the stand-in

Gates decide only inside a pipeline's call: gated patches are folded in, so the drift of kept prompts is then what they
would suffer were the gate open.
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
from erasure.evaluation import generate
from erasure.evaluation.attacks.attack import Victim
from erasure.evaluation.metrics.metric import Metric, mean_metric
from erasure.model import presets
from erasure.model.closed_form import readers
from erasure.model.diffusion import Counts, add_noise, counting
from erasure.model.loading import name_of
from erasure.pipelines.strengths import switched_off

BINS = 4  # equal parts of the timesteps; each picture gets one timestep in each


@dataclass(frozen=True)
class WhiteBox:
    """Figures by name, each over n pictures (words for the closed-form leak) with a bootstrap interval.

    Args:
        metrics: drift_target and drift_kept, both also by bins of timesteps ("drift_kept 0-249"), margin, margin_base,
            closed_leak.
        costs: of all of it, the base's pictures included.
        folded: names of gated patches, measured as if their gates were open.
    """

    metrics: dict[str, Metric]
    costs: Counts
    folded: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "costs": self.costs.to_json(),
            "folded": list(self.folded),
        }

    def rows(self) -> tuple[list[Metric], list[Metric]]:
        """The base's metrics and the erased model's, for a report; the base has no drift, and its leak is 1."""
        base, erased = [], []
        for name, metric in self.metrics.items():
            if name == "margin_base":
                continue
            if name == "margin":
                base.append(replace(self.metrics["margin_base"], name=name))
            else:
                own = 1.0 if name == "closed_leak" else 0.0
                base.append(replace(metric, value=own, low=own, high=own))
            erased.append(metric)
        return base, erased


@dataclass(frozen=True)
class NoisePredictions:
    """What the UNet said, for n pictures at BINS timesteps each.

    Args:
        drift: || e* - e_0 ||^2 / || e_0 ||^2 under each picture's own prompt [n, BINS].
        margin: L(stand-in) - L(prompt) under the erased model, and under the base [n, BINS]; None without stand-ins.
    """

    drift: Tensor
    margin: tuple[Tensor, Tensor] | None


def measure_white_box(
    pipe: Any,
    concept: str | Concept,
    kept: Sequence[str],
    *,
    words: Sequence[str] | None = None,
    pictures: int = 12,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> WhiteBox:
    """Measure the loaded patches from within; the pipeline is left as it was, bit for bit.

    The target prompts are the concept's `prompt_pairs`. Every draw depends on `seed` alone, and all models see the same
    noise.

    Args:
        pipe: a pipeline with patches loaded.
        concept: what was erased.
        kept: prompts that should stay as they are.
        words: other words for the concept; None: those that the embedded checkpoint's vocabulary has. Without any
            there is no closed-form leak.
        pictures: of the target and of the kept prompts, each; prompts are repeated with other seeds, or the first
            ones taken.
        steps: sampling steps of the base's pictures.
        guidance: of the base's pictures.

    Raises:
        ErasureError: no kept prompts, fewer than 2 pictures.
    """
    if isinstance(kept, str) or not kept:
        raise ErasureError("kept: a list of prompts that should stay as they are is needed, at least one")
    if pictures < 2:
        raise ErasureError(f"pictures={pictures}: at least 2 are needed for an interval")
    known = presets.vocabulary(name_of(pipe))
    victim, one, counts = Victim(pipe, switched_off), Concept.of(concept, known), Counts()
    draw = torch.Generator().manual_seed(seed)
    pairs = _around(one.prompt_pairs(), pictures)
    others = _around(list(kept), pictures)
    listed: Any = getattr(pipe, "get_list_patches", dict)()
    with torch.no_grad(), counting(pipe.unet, counts):
        ask = [shown for shown, _ in pairs]
        made = victim.base_latents(
            [*ask, *others],
            range(seed, seed + len(ask) + len(others)),
            batch_size,
            generate.STEPS if steps is None else steps,
            generate.GUIDANCE if guidance is None else guidance,
        )
        target = compare_predictions(victim, made[: len(ask)], ask, [without for _, without in pairs], draw, batch_size)
        rest = compare_predictions(victim, made[len(ask) :], others, None, draw, batch_size)
        ratios = closed_form_leak(victim, one, other_words(one, known) if words is None else words)
    found = [*_drifts("target", target.drift, pipe), *_drifts("kept", rest.drift, pipe, others)]
    if target.margin is not None:
        said = "loss of the stand-in less that of the concept, on the base's target pictures, under the"
        for name, values, model in zip(("margin", "margin_base"), target.margin, ("erased model", "base"), strict=True):
            found.append(mean_metric(name, values.mean(1).tolist(), False, f"{said} {model}"))
    meaning = "how far other words for the target still stand from its stand-in, in keys and values; the base's is 1"
    found.append(mean_metric("closed_leak", ratios, False, meaning))
    folded = tuple(name for name, entry in listed.items() if entry["strength"] and entry["gate"] != "always")
    return WhiteBox({metric.name: metric for metric in found if metric is not None}, counts, folded)


def _around(values: list[Any], count: int) -> list[Any]:
    """`count` of the values, from the beginning again where they end."""
    return [values[i % len(values)] for i in range(count)]


def compare_predictions(
    victim: Victim,
    latents: Tensor,
    prompts: Sequence[str],
    instead: Sequence[str] | None,
    draw: torch.Generator,
    batch_size: int,
) -> NoisePredictions:
    """Ask base and erased model for the noise in x_t [n, c, h, w], one t a picture and bin, under each prompt.

    Args:
        instead: for each picture, what should stand in the prompt's place; gives the margin.
    """
    scheduler, n = victim.pipe.scheduler, len(latents)
    edges = _edges(scheduler)
    t = (edges[:-1] + (torch.rand(n, BINS, generator=draw) * edges.diff()).long()).to(victim.device)
    noise = torch.randn((n, BINS, *latents.shape[1:]), generator=draw).to(latents)
    rows = torch.arange(n, device=latents.device).repeat_interleave(BINS)
    x = add_noise(scheduler, latents[rows], noise.flatten(0, 1), t.flatten())

    def says(texts: Sequence[str]) -> Tensor:
        told = victim.conditions(texts)
        parts = zip(*(each.split(batch_size) for each in (x, t.flatten(), rows)), strict=True)
        return torch.cat([victim.eps(x, t, told[row]) for x, t, row in parts]).unflatten(0, (n, BINS)).flatten(2)

    asked = [prompts] if instead is None else [prompts, instead]
    with victim.unpatched():
        before = [says(texts) for texts in asked]
    with victim.folded():
        after = [says(texts) for texts in asked]
    drift = (after[0] - before[0]).square().sum(-1) / before[0].square().sum(-1)
    if instead is None:
        return NoisePredictions(drift, None)
    true = noise.flatten(2)
    margins = [(them[1] - true).square().mean(-1) - (them[0] - true).square().mean(-1) for them in (after, before)]
    return NoisePredictions(drift, (margins[0], margins[1]))


def _edges(scheduler: Any) -> Tensor:
    """Where the bins of timesteps begin, and the end of the last [BINS + 1]."""
    return torch.linspace(0, len(scheduler.alphas_cumprod), BINS + 1).round().long()


def _drifts(role: str, drift: Tensor, pipe: Any, groups: Sequence[str] | None = None) -> Iterator[Metric | None]:
    """Over all timesteps, then by bin."""
    said, better = f"squared distance of the noise from the base's, relative, on {role} prompts", role == "target"
    yield mean_metric(f"drift_{role}", drift.mean(1).tolist(), better, said, groups)
    edges = _edges(pipe.scheduler).tolist()
    for at, values in enumerate(drift.T):
        span = f"{edges[at]}-{edges[at + 1] - 1}"
        yield mean_metric(f"drift_{role} {span}", values.tolist(), better, f"drift_{role} at timesteps {span}", groups)


def closed_form_leak(victim: Victim, concept: Concept, words: Sequence[str]) -> list[float]:
    """For each word || W c*_word - W c*_stand-in || / || W0 c_0,word - W0 c_0,stand-in ||.

    Words that the base's encoder cannot tell from the stand-in are left out.
    """
    named = [Concept(word, anchor=concept.anchor, kind=concept.kind) for word in words]
    texts = [text for one in named for text in one.prompt_pairs()[0]]
    if not texts:
        return []

    def apart(model: Callable[[], Any]) -> Tensor:
        with model():
            states = victim.conditions(texts).states.double()
            return ((states[::2] - states[1::2]) @ readers(victim.pipe.unet).T).flatten(1).norm(dim=1)

    after, before = apart(victim.folded), apart(victim.unpatched)
    return (after / before)[before > 0].tolist()


def other_words(concept: Concept, vocabulary: Vocabulary | None) -> tuple[str, ...]:
    """Return other words for a concept in the checkpoint's vocabulary, without the concept's own names."""
    found = [] if vocabulary is None else vocabulary.synonyms(concept.name)
    return tuple(word for word in found if word not in (*concept.names, concept.anchor))
