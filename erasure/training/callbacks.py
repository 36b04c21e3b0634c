"""What a run shows while it trains: previews as pictures, and losses in TensorBoard or W&B through accelerate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import neighbours, prompt_of
from erasure.errors import ErasureError, unknown
from erasure.model.base import Base
from erasure.model.loading import sampling_of
from erasure.training.compute import cast
from erasure.training.curves import Curves

SEEDS = 2
KEPT = 2  # neighbours in a preview
PLOT = 64  # pixels: height of the curves below a preview


class Previews:
    """Pictures of the concepts and of neighbours, drawn with the same seeds in the course of training.

    Each preview is one PNG in `folder`, with a column per prompt and a row per seed. The base is drawn first (step 0).

    Args:
        base: the checkpoint that is trained.
        concepts: what is erased; the first four are drawn.
        folder: where the pictures are written.
        every: steps between previews.

    Raises:
        ErasureError: `every` is below 1.
    """

    def __init__(self, base: Base, concepts: Sequence[Concept], folder: Path, every: int) -> None:
        if every < 1:
            raise ErasureError(f"a preview every {every} steps: must be at least 1")
        self.base, self.folder, self.every = base, folder, every
        preset = base.family().preset
        own = base.architecture.samplers[0]
        self.sampling = replace(sampling_of(base.pipe), scheduler=own) if preset is None else preset.preview
        self.prompts = [prompt_of(concept.kind, concept.name) for concept in concepts[:4]]
        self.prompts += [
            prompt_of(concepts[0].kind, word) for word in neighbours(base, concepts[0], list(concepts))[:KEPT]
        ]

    def due(self, step: int) -> bool:
        """Return whether a preview is due after `step` updates."""
        return step % self.every == 0

    @torch.no_grad()
    def draw(self, step: int, curves: Curves | None = None) -> Path:
        """Draw the prompts with the model in its present state, and return the path of the picture.

        Args:
            step: number of updates so far.
            curves: how much has been erased and kept so far, to be drawn below; None draws no curves.
        """
        from PIL import Image

        pipe, own = self.base.pipe, self.base.pipe.scheduler
        pipe.scheduler = self.base.sampler(self.sampling.scheduler)
        quiet = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        # The engine's UNet and text encoders give fp32 latents, whatever the autoencoder's own type.
        restore = cast(pipe.vae, None, torch.float32)
        try:
            rows = []
            for seed in range(SEEDS):
                noise = [torch.Generator().manual_seed(seed) for _ in self.prompts]
                options = self.base.call(len(self.prompts), self.sampling.guidance)
                rows += pipe(self.prompts, generator=noise, num_inference_steps=self.sampling.steps, **options).images
        finally:
            restore()
            pipe.scheduler = own
            pipe.set_progress_bar_config(**quiet)
        width, height = rows[0].size
        sheet = Image.new("RGB", (width * len(self.prompts), height * SEEDS))
        for i, image in enumerate(rows):
            sheet.paste(image, (i % len(self.prompts) * width, i // len(self.prompts) * height))
        if curves is not None and curves.steps:
            strip = plot(curves, sheet.width)
            taller = Image.new("RGB", (sheet.width, sheet.height + strip.height))
            taller.paste(sheet, (0, 0))
            taller.paste(strip, (0, sheet.height))
            sheet = taller
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}.png"
        temporary = path.with_suffix(".tmp")
        sheet.save(temporary, format="PNG")
        os.replace(temporary, path)
        return path


def plot(curves: Curves, width: int) -> Any:
    """Return a picture of the curves: the least erased noise level in blue, the largest drift in red, from 0 to 1."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, PLOT), "white")
    pen = ImageDraw.Draw(strip)
    lines = {"blue": [min(row) for row in curves.erased], "red": [max(row) for row in curves.drift]}
    last, bottom = curves.steps[-1], PLOT - 2
    for colour, values in lines.items():
        points = [(0.0, float(bottom))]  # the base: nothing erased, nothing drifted
        for step, value in zip(curves.steps, values, strict=True):
            points.append(((width - 1) * step / last, bottom - (PLOT - 4) * min(max(value, 0.0), 1.0)))
        pen.line(points, fill=colour, width=2)
    latest = ", ".join(f"{name} {lines[colour][-1]:.2f}" for name, colour in (("erased", "blue"), ("drift", "red")))
    pen.text((4, 2), latest, fill="black")
    return strip


def available() -> dict[str, bool]:
    """Return the known trackers, and whether each is installed."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    return {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}


class Trackers:
    """Trackers, through accelerate, that log the losses of every step.

    Args:
        names: of the trackers.
        folder: where they write their files.
        settings: of the run, which they record.

    Raises:
        ErasureError: an unknown tracker, or one that is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        from accelerate import Accelerator

        installed = available()
        for name in names:
            if name not in installed:
                raise unknown("tracker", name, installed)
            if not installed[name]:
                raise ErasureError(f"{name} is not installed: pip install {name}; nothing was started")
        self._accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        self._accelerator.init_trackers("erasure", config=plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Write everything that is still buffered."""
        for tracker in self._accelerator.trackers:  # end_training would also separate the processes of a launch
            tracker.finish()
