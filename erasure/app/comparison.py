"""Draw a prompt before and after, from the same seeds, and read what the gates did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from erasure.app.jobs import Job
from erasure.app.models import Models, watched
from erasure.app.visits import Visit
from erasure.errors import ErasureError
from erasure.model.loading import call_of, sampling_of

LONGEST = 500  # characters of a prompt
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Reading:
    """How strongly a patch acted on a prompt.

    Args:
        name: the patch's name.
        gate: the kind of its gate; `always` for a patch without one.
        strength: what the visitor has set.
        acted: the strength with which it acted.
    """

    name: str
    gate: str
    strength: float
    acted: float


@dataclass(frozen=True)
class Comparison:
    """A prompt before and after, from the same seeds.

    Args:
        prompt: the prompt.
        before: images of the model as it is.
        after: images with the visitor's patches; empty if there are none.
        readings: what each patch's gate read.
    """

    prompt: str
    before: list[Image.Image]
    after: list[Image.Image]
    readings: list[Reading]


class Pictures:
    """Images of the models as they are, which all visitors share; the oldest are forgotten.

    Args:
        most: images that are kept.
    """

    def __init__(self, most: int = 400) -> None:
        self.most = most
        self._kept: dict[tuple[str, str, int], Image.Image] = {}

    def get(self, model: str, prompt: str, seeds: Sequence[int]) -> list[Image.Image] | None:
        """Return the images of a prompt, or None unless all of them are here."""
        keys = [(model, prompt, seed) for seed in seeds]
        return [self._kept[key] for key in keys] if all(key in self._kept for key in keys) else None

    def put(self, model: str, prompt: str, seeds: Sequence[int], images: Sequence[Image.Image]) -> None:
        """Keep the images of a prompt."""
        for seed, image in zip(seeds, images, strict=True):
            self._kept[model, prompt, seed] = image
        while len(self._kept) > self.most:
            del self._kept[next(iter(self._kept))]


def compare(models: Models, visit: Visit, job: Job, prompt: str, pictures: Pictures) -> Comparison:
    """Draw a prompt without and with the visitor's patches, from the same seeds.

    Raises:
        ErasureError: the prompt is empty or too long.
    """
    prompt = prompt.strip()
    if not prompt or len(prompt) > LONGEST:
        raise ErasureError(f"Type a prompt of 1 to {LONGEST} characters, such as: a cat")
    seeds = list(SEEDS)
    before = pictures.get(visit.model, prompt, seeds)
    if before is None:
        with models.patched(visit.model, {}) as pipe:
            before = _draw(pipe, job, f"Drawing “{prompt}” before", prompt, seeds)
        pictures.put(visit.model, prompt, seeds, before)
    held = visit.patches()
    if not held:
        return Comparison(prompt, before, [], [])
    with models.patched(visit.model, visit.stack()) as pipe:
        after = _draw(pipe, job, f"Drawing “{prompt}” after", prompt, seeds)
        acted = pipe.gate_log[0]
    readings = [Reading(name, one.patch.gate["kind"], one.strength, acted[name]) for name, one in held.items()]
    return Comparison(prompt, before, after, readings)


def _draw(pipe: Any, job: Job, stage: str, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
    own = sampling_of(pipe)
    count = len(seeds)
    guided = 2 if own.guidance > 1 else 1  # samples of a step: with the prompt, and without it
    job.enter(stage, own.steps * count * guided)
    with job.watching(*watched(pipe)):
        drawn = pipe(
            prompt=[prompt] * count,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=own.steps,
            **call_of(pipe, count, own.guidance),
        )
    return list(drawn.images)
