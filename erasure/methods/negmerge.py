"""NegMerge: what several fine-tunes on the concept learn alike is taken away (Kim et al. 2025, arXiv 2410.05583).

Trains the base n times on pictures of the concept, each time from the start and with another learning rate and other
captions c_k, so that it draws the concept better,

    L_k = || eps - e(z_t, c_k, t) ||^2

and subtracts what the changes tau_k of all of them have in common (`training/task_vectors.py`):

    theta = theta_0 - lambda tau,    tau = mean_k tau_k where the signs of all tau_k are equal, else 0

With one fine-tune this is task negation (Ilharco et al. 2023, arXiv 2212.04089; of Stable Diffusion: arXiv 2404.03631),
and with `consensus=none` the negation of a plain mean. The pictures are drawn with guidance g, so a fine-tune learns to
predict e_0(n) + g (e_0(c) - e_0(n)) by itself; to first order its negation moves the prediction for c towards and past
that for the empty prompt n, as ESD does.

lambda is chosen without a picture, on states that nothing trains on (`training/curves.py`): of the values on a grid at
which the largest drift of neighbours is at most `most_drift`, the one that erases most at the least erased noise level.
The header records the search and the share of weights whose signs agree. Published: the grid 0.05, 0.10, .., 1, the
lowest accuracy on what is to be forgotten among those that keep 95 % of the accuracy on a control set.

Cost: 2F per step for every image that the base draws; 1F + 1B per sample and update; the search takes the states' own
cost and, for each value, 1F for each state (for each kept state 2F).

Deviations: the paper forgets classes of classifiers and of CLIP; nothing is published for diffusion, so there is no
parity mode. Its fine-tunes differ in their augmentation (published: 10 to 30), ours in learning rate, captions and the
draw of samples. Adam starts anew with each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.noising import draw_times, noised, predicted, truth
from erasure.model.trajectories import TrajectoryPool, build_pool
from erasure.training.curves import Curves
from erasure.training.image_latents import Images, drawn, read_folder, shown
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop
from erasure.training.task_vectors import TaskVectors

LOG = logging.getLogger("erasure")
MOST_FINE_TUNES = 100  # their signs are added up in one byte


@dataclass(frozen=True)
class NegMerge(GradientMethod):
    """The settings of NegMerge, with the values tuned on glyph as defaults.

    Args:
        variant: which modules train; see `erasure list models MODEL`.
        fine_tunes: n, the number of fine-tunes; 1 is task negation.
        consensus: keep what all fine-tunes change in the same direction (`sign`), or their mean (`none`).
        scale: lambda; None: chosen on held-out states.
        most_scale: the largest lambda that is tried.
        scale_steps: the number of values that are tried: most_scale / scale_steps, 2 most_scale / scale_steps, ..
        most_drift: the largest drift that lambda may cause; see `training/curves.py`.
        templates: captions of the pictures, {} for the prompt; the fine-tunes take one each, in turn.
        rate_spread: the learning rates of the fine-tunes go from learning_rate / rate_spread to learning_rate *
            rate_spread, in equal factors.
        images: a folder of images of the concept; None: the base draws them. For several concepts, give each a
            subfolder with its name.
        image_count: number of images of the concept to draw.
        sample_steps: sampling steps of drawn images.
        sample_guidance: guidance scale of drawn images.
        iterations: number of updates of all fine-tunes together.
        batch_size: images per update.
        learning_rate: Adam's learning rate.
        stop: only `never`; see `GradientMethod`.
    """

    method: ClassVar[str] = "negmerge"
    NO_STOP: ClassVar[str] = "a fine-tune learns the concept; how much is erased shows when all of them are merged"
    NO_SPARSITY: ClassVar[str] = "its fine-tunes start anew from the base, and the consensus of their signs is sparse"
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "image_count")

    variant: str = "x"
    fine_tunes: int = setting(4, at_least=1, at_most=MOST_FINE_TUNES)
    consensus: Literal["sign", "none"] = "sign"
    scale: float | None = setting(None, above=0)
    most_scale: float = setting(4.0, above=0)
    scale_steps: int = setting(20, at_least=1)
    most_drift: float = setting(0.7, above=0)
    templates: tuple[str, ...] = ("{}", "a photo of {}", "a picture of {}", "an image of {}")
    rate_spread: float = setting(2.0, at_least=1)
    images: str | None = None
    image_count: int = setting(24, at_least=1)
    sample_steps: int = setting(15, at_least=1)
    sample_guidance: float = 3.0
    iterations: int = setting(160, at_least=1)
    batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(1e-4, above=0, below=1)
    stop: Stop = "never"

    def __post_init__(self) -> None:
        """Check every setting, the captions, and that each fine-tune has an update; raises ErasureError."""
        super().__post_init__()
        if self.iterations < self.fine_tunes:
            raise ErasureError(
                f"iterations={self.iterations}: must be at least fine_tunes={self.fine_tunes}, one update for each"
            )
        if wrong := [text for text in self.templates if "{}" not in text]:
            raise ErasureError(f"templates: {wrong[0]!r} lacks {{}}, the place of the prompt")
        if not self.templates:
            raise ErasureError("templates is empty: give at least one caption, such as '{}'")

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Draw or read the pictures, and prepare the weights.

        Raises:
            ErasureError: a folder that cannot be used, no module fits the variant, guidance of a distilled model, or no
                word to choose the scale by.
        """
        base.check_guidance(self.sample_guidance)
        targets = base.targets(self.variant)
        if self.scale is None and not around(base, concepts):
            raise ErasureError(
                "there is no word to measure on what a scale keeps. Name words to keep with `keep` (--keep), or give a "
                "scale (--set scale=1); nothing was trained"
            )
        pairs = [pair for concept in concepts for pair in concept.prompt_pairs()]
        if self.images is not None:
            images, _ = shown(read_folder(base, self.images), concepts)
        else:
            count, path = max(self.image_count, len(pairs)), run.path("images.safetensors")
            options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.sample_guidance}
            images = drawn(base, [prompt for prompt, _ in pairs], count, seed=2 * run.seed, path=path, **options)
        adapter = TaskVectors(base.network, targets, base.component, consensus=self.consensus == "sign")
        return State(base, concepts, pairs, images, adapter, run.seed)

    def fine_tune(self, step: int) -> int:
        """Return the number, from 0, of the fine-tune that a step belongs to."""
        return step * self.fine_tunes // self.iterations

    def restarts(self, step: int) -> bool:
        """Return whether a step is the first of a fine-tune, which begins without Adam's moments."""
        return step > 0 and self.fine_tune(step) != self.fine_tune(step - 1)

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate of the step's fine-tune."""
        if self.fine_tunes == 1:
            return 1.0
        return self.rate_spread ** (2 * self.fine_tune(step) / (self.fine_tunes - 1) - 1)

    def loss(self, state: State, step: int) -> Terms:
        """Begin the next fine-tune where one is due, and return its loss on one batch of noised pictures."""
        if self.restarts(step):
            state.adapter.bank()
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        index = torch.randint(len(state.images), (self.batch_size,), generator=draw)
        z = state.images.sample(index, draw).to(base.device)
        t = draw_times(base, len(z), draw)
        eps = torch.randn(z.shape, generator=draw).to(base.device)
        x = noised(base, z, eps, t)
        template = self.templates[self.fine_tune(step) % len(self.templates)]
        texts = [template.replace("{}", state.images.prompts[int(i)]) for i in index]
        output = base.predict(x, t, base.conditions(texts)).float()
        return {"learn": squared(predicted(base, output, x, t), truth(base, z, eps)).mean()}

    def held_out(self, state: State, **options: Any) -> tuple[TrajectoryPool, list[str]]:
        """Return states to measure on; their target is the prediction for the neutral prompt."""
        return build_pool(state.base, state.pairs, **options), [prompt for prompt, _ in state.pairs]

    def conclude(self, state: State, run: Run) -> None:
        """Merge the fine-tunes, and negate them by the given scale or by the one that held-out states decide."""
        state.adapter.bank()
        if self.scale is not None:
            state.adapter.negate(self.scale)
            return
        scales = [self.most_scale * (i + 1) / self.scale_steps for i in range(self.scale_steps)]
        curves = Curves.start(self, state.base, state.concepts, state, 0, state.seed)
        for place, scale in enumerate(scales):
            state.adapter.negate(scale)
            curves.measure(place)
        best = chosen(curves.erased, curves.drift, self.most_drift)
        state.adapter.negate(scales[best])
        erased, drift = min(curves.erased[best]), max(curves.drift[best])
        run.search = {
            **{key: value for key, value in curves.to_json().items() if key != "steps"},
            "scales": [round(scale, 6) for scale in scales],
            "scale": round(scales[best], 6),
            "agreement": round(state.adapter.agreement(), 4),
        }
        fits = drift <= self.most_drift
        LOG.log(
            logging.INFO if fits else logging.WARNING,
            "scale %.3g: erased %.2f at the least erased noise level, largest drift %.2f%s",
            scales[best],
            erased,
            drift,
            "" if fits else f", above most_drift={self.most_drift:g} as at every scale that was tried",
        )

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """Return what is kept of the fine-tunes that have ended."""
        return state.adapter.tensors()

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Restore what is kept of the fine-tunes that have ended."""
        state.adapter.restore(tensors)


def chosen(erased: Sequence[Sequence[float]], drift: Sequence[Sequence[float]], most: float) -> int:
    """Return the place of the scale that erases most without too much drift; where all drift, of the least drift.

    Args:
        erased: at each scale, for each noise level; the least of them counts.
        drift: at each scale, for each noise level; the largest of them counts.
        most: the largest drift that is allowed.

    >>> chosen([[0.2, 0.3], [0.5, 0.4], [0.9, 0.8]], [[0.1, 0.1], [0.2, 0.4], [0.3, 0.6]], 0.5)
    1
    """
    places = range(len(erased))
    allowed = [place for place in places if max(drift[place]) <= most]
    if not allowed:
        return min(places, key=lambda place: _or_last(max(drift[place])))
    return max(allowed, key=lambda place: min(erased[place]))


def _or_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


@dataclass
class State:
    """The state of a run of NegMerge.

    Args:
        base: the checkpoint.
        concepts: what is erased.
        pairs: (prompt of the concept, neutral prompt).
        images: pictures of the concepts.
        adapter: the weights, and what the fine-tunes that have ended learnt.
        seed: of the run.
    """

    base: Base
    concepts: list[Concept]
    pairs: list[tuple[str, str]]
    images: Images
    adapter: TaskVectors
    seed: int
