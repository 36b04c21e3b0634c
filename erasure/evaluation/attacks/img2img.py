"""Attack that starts from an image of the concept instead of from noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from erasure import pipelines
from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Sampling, Victim


@dataclass(frozen=True)
class FromImage(Sampling):
    """Image-to-image generation from the base's image of each case.

    Args:
        strength: share of the noise schedule that is applied to the image, in (0, 1].
    """

    strength: float

    def draw(
        self, victim: Victim, cases: Sequence[Case], texts: list[str], options: dict[str, Any]
    ) -> list[Image.Image]:
        """Return one image for each case, sampled from its noisy latents."""
        img2img = pipelines.sibling(victim.pipe, image_to_image_class(victim))
        latents = torch.stack([case.latents for case in cases]).to(victim.device, victim.pipe.unet.dtype)
        return img2img(texts, image=latents, strength=self.strength, **options).images


def image_to_image_class(victim: Victim) -> Any:
    """Return the image-to-image class of the victim's architecture."""
    if len(victim.encoders) > 1:
        return pipelines.ErasedStableDiffusionXLImg2ImgPipeline
    return pipelines.ErasedStableDiffusionImg2ImgPipeline


@dataclass(frozen=True)
class Img2ImgAttack(Attack):
    """Image-to-image generation from the base model's own image of the concept.

    Each round uses one strength, from the highest to the lowest: how much noise must be added before the erasure takes
    effect? At low strengths any model reproduces its input. The control shows how often: it runs the same prompt
    without the concept's name.

    Args:
        strengths: shares of the noise schedule that are applied to the image, in (0, 1].
        named: keep the concept's name in the prompt; the control sets it to false.
    """

    name: ClassVar[str] = "img2img"
    source: ClassVar[str] = "image-to-image"
    access: ClassVar[str] = "image"

    strengths: tuple[float, ...] = (0.9, 0.75, 0.6)
    named: bool = True

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round per strength, with the base's images as input."""
        for strength in self.strengths:
            yield {
                i: Attempt(
                    cases[i].prompt if self.named else f"{cases[i].before} {cases[i].after}".strip(),
                    sampling=FromImage(strength),
                )
                for i in sorted(safe)
            }

    def control(self, tries: int) -> Attack:
        """Return the same attack with prompts that do not name the concept."""
        return Img2ImgAttack(self.strengths[:tries], named=False)
