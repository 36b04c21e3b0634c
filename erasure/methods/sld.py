"""SLD, safe latent diffusion (Schramowski et al. 2023, arXiv 2211.05105): guidance away from the concept while drawing.

No weight changes. In every step the network also predicts the noise for the concept's name, and guidance is turned away
from it where the prompt's prediction is near it; `pipelines/guards/guidance.py` has the equations 3 to 8 and the code.
The patch holds the names and five numbers.

Cost: nothing to erase; while drawing, one more pass of the network per image and step, 1.5 times the base's under
classifier-free guidance.

A guard protects where its owner draws. Who holds the weights draws without it: see docs/guards.md.

Deviations from the published code (ml-research/safe-latent-diffusion, and diffusers' StableDiffusionPipelineSafe):
- warm_up is a share of the noise schedule and not a number of steps: 0.2 are 10 of 50 steps, with any sampler. PNDM
  calls the network 51 times in 50 steps, of which the code counts every one.
- the concept's prediction is a pass of its own and not a third row of the batch, so that pictures on which the guard
  does not act keep every bit; rounding differs in the others.
- it also acts without classifier-free guidance, by the same formula for a scale of 1; the code then switches it off.
- where the network predicts v or a velocity, the limit mu compares noises; the code compares outputs.
- the paper prints max(1, .) where its code has min(1, .); ours is the code's.
- several concepts are one text, joined by commas, as the paper's list of inappropriate terms is.
- gate=text lets the guard act on prompts near the concept's names alone; the paper has no gate.

Preset `max` of the paper is the default: SLD-Weak, -Medium and -Strong were made for a broad notion of
inappropriateness that is to weaken and not to vanish. Their settings: docs/guards.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import prompt_of
from erasure.config import setting
from erasure.guard_method import GuardMethod
from erasure.model.base import Base
from erasure.patch import Guard
from erasure.pipelines.guards.guidance import Guidance


@dataclass(frozen=True)
class SLD(GuardMethod):
    """Settings of SLD; the names of the paper in brackets.

    Args:
        safety_scale: factor on the distance of the predictions for prompt and concept before it is limited to 1 (s_S).
        threshold: difference of the predicted noises from which on the prompt counts as far from the concept (lambda).
        warm_up: share of the noise schedule at its noisy end in which guidance is left as it is (delta, of 1).
        momentum: weight of the momentum (s_m).
        momentum_decay: share of the momentum that a step keeps (beta_m).
    """

    method: ClassVar[str] = "sld"

    safety_scale: float = setting(5000.0, above=0)
    threshold: float = setting(1.0)
    warm_up: float = setting(0.0, at_least=0, below=1)
    momentum: float = setting(0.5, at_least=0)
    momentum_decay: float = setting(0.7, at_least=0, below=1)

    @classmethod
    def form(cls) -> type[Guidance]:
        """Return the form of the guards: guidance away from a text."""
        return Guidance

    def guard(self, base: Base, concepts: list[Concept]) -> Guard:
        """Return the concepts' names, with the settings of the guidance away from them."""
        texts = [prompt_of(concept.kind, name) for concept in concepts for name in concept.names]
        base.conditions([", ".join(texts)])  # refuses more tokens than the text encoder reads
        names = ("safety_scale", "threshold", "warm_up", "momentum", "momentum_decay")
        return Guard("guidance", tuple(texts), {name: getattr(self, name) for name in names})
