"""Probes: sampling from a context or along another trajectory brings back what a prompt alone does not.

Lu et al. 2025, arXiv 2505.17013. A probe searches for no prompt: the prompts are those of the cases. The erased model
is given part of the base's image (`inpainting`), begins where the base stopped (`completion`), or samples with more
noise than its scheduler adds (`noise-scale`).

Some of what a probe shows comes from the context or from the number of images, not from the erased model. Each probe is
therefore compared with two runs of equally many images: on the erased model with random prompts, which keep the context
(the control), and on the base with the same prompts, which bounds what can be recovered.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from erasure import pipelines
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Sampling, Victim
from erasure.evaluation.attacks.img2img import image_to_image_class
from erasure.evaluation.attacks.ring_a_bell import words_without_concept
from erasure.model.diffusion import signal_and_noise, to_eps, to_x0


@dataclass(frozen=True)
class Inpainted(Sampling):
    """Inpainting of a square in the middle of the base's image of each case.

    Args:
        side: side of the square as a share of the image's, in (0, 1].
    """

    side: float

    def draw(
        self, victim: Victim, cases: Sequence[Case], texts: list[str], options: dict[str, Any]
    ) -> list[Image.Image]:
        """Return one image for each case; the square starts from pure noise."""
        images = victim.decoded(torch.stack([case.latents for case in cases]))
        xl = len(victim.encoders) > 1
        cls = pipelines.ErasedStableDiffusionXLInpaintPipeline if xl else pipelines.ErasedStableDiffusionInpaintPipeline
        mask = central_square(images[0].size, self.side)
        width, height = images[0].size
        inpaint = pipelines.sibling(victim.pipe, cls)
        return inpaint(
            texts, image=images, mask_image=[mask] * len(images), strength=1.0, width=width, height=height, **options
        ).images


def central_square(size: tuple[int, int], side: float) -> Image.Image:
    """Return a mask of the given size in pixels: white in a central rectangle of `side` times both sides, else black.

    Raises:
        ErasureError: `side` is not in (0, 1].
    """
    if not 0 < side <= 1:
        raise ErasureError(f"side={side}: the share of the image to inpaint must be above 0 and at most 1")
    width, height = (max(1, round(side * length)) for length in size)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, left + width, top + height))
    return mask


@dataclass(frozen=True)
class Completed(Sampling):
    """Sampling that the base begins with the case's own prompt and the erased model completes.

    Args:
        steps: number of steps that the base takes, at least 1.
    """

    steps: int

    def draw(
        self, victim: Victim, cases: Sequence[Case], texts: list[str], options: dict[str, Any]
    ) -> list[Image.Image]:
        """Return one image for each case.

        Raises:
            ErasureError: the number of the base's steps is below 1, or leaves none to the erased model.
        """
        total = options["num_inference_steps"]
        if not 0 < self.steps < total:
            raise ErasureError(
                f"base_steps={self.steps}: must be at least 1 and below the {total} sampling steps, so that the erased "
                "model completes the image; nothing was stored for this attack"
            )
        with victim.unpatched():
            states = state_after(victim.pipe, [case.prompt for case in cases], self.steps, options)

        class Completion(image_to_image_class(victim)):  # type: ignore[misc]
            """An image-to-image pipeline that takes its input for noisy latents and adds nothing to them."""

            def prepare_latents(self, image: Tensor, *_: Any, **__: Any) -> Tensor:
                return image

        # The share of the schedule that remains; half a step more is rounded down and keeps clear of rounding errors.
        remaining = (total - self.steps + 0.5) / total
        seeds = {**options, "generator": [torch.Generator().manual_seed(case.seed) for case in cases]}
        return pipelines.sibling(victim.pipe, Completion)(texts, image=states, strength=remaining, **seeds).images


def state_after(pipe: Any, texts: list[str], steps: int, options: dict[str, Any]) -> Tensor:
    """Sample for some steps only and return the noisy latents [n, c, h, w].

    Args:
        pipe: the pipeline.
        texts: n prompts.
        steps: number of steps to take, at least 1.
        options: arguments of the pipeline, `num_inference_steps` among them.
    """
    states: list[Tensor] = []

    def stop(running: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == steps - 1:
            states.append(tensors["latents"].clone())
            running._interrupt = True  # the remaining steps are skipped
        return tensors

    pipe(texts, output_type="latent", callback_on_step_end=stop, **options)
    return states[0]


class NoisyDDIM(DDIMScheduler):
    """DDIM with more noise than belongs to it, as the probe of arXiv 2505.17013 samples.

    With a and a' the cumulative signal at this step and the next, x0 and e the predictions, z noise of unit variance:

        s^2 = eta^2 (1 - a') / (1 - a) (1 - a / a')
        x' = sqrt(a') x0 + sqrt(|1 - a' - s^2|) e + scale s z

    For eta at most 1 and scale 1 this is DDIM (arXiv 2010.02502, eq. 12). Beyond, 1 - a' - s^2 may be negative; the
    published code then takes its absolute value.
    """

    scale = 1.0  # factor of the added noise

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the latents of the next step; the arguments are those of diffusers' DDIM."""
        t = torch.as_tensor([int(timestep)], device=sample.device)
        prior = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        a = float(signal_and_noise(self, t)[0].squeeze() ** 2)
        after = float(self.alphas_cumprod[prior] if prior >= 0 else self.final_alpha_cumprod)
        x0, eps = to_x0(self, model_output, sample, t), to_eps(self, model_output, sample, t)
        variance = eta**2 * (1 - after) / (1 - a) * (1 - a / after)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        further = after**0.5 * x0 + abs(1 - after - variance) ** 0.5 * eps + self.scale * variance**0.5 * noise
        further = further.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=further, pred_original_sample=x0) if return_dict else (further, x0)


@dataclass(frozen=True)
class Noisy(Sampling):
    """Sampling by `NoisyDDIM` with one eta and one scale.

    Args:
        eta: share of DDIM's noise that is accounted for.
        scale: factor of the added noise.
        variant: number of the attempt; each starts from other noise, and number 0 from the case's own.
    """

    eta: float
    scale: float
    variant: int

    def draw(
        self, victim: Victim, cases: Sequence[Case], texts: list[str], options: dict[str, Any]
    ) -> list[Image.Image]:
        """Return one image for each case; the pipeline's scheduler is put back at the end."""
        pipe, own = victim.pipe, victim.pipe.scheduler
        seeds = [case.seed + self.variant * 1_000_003 for case in cases]
        generators = {**options, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
        pipe.scheduler = NoisyDDIM.from_config(own.config)
        pipe.scheduler.scale = self.scale
        try:
            return pipe(texts, eta=self.eta, **generators).images
        finally:
            pipe.scheduler = own


@dataclass(frozen=True)
class Probe(Attack):
    """A way of sampling instead of a search.

    Args:
        prompt: what the erased model is asked: the `case`'s prompt, as published; `none`, an empty prompt; or a
            `random` one of equally many tokens for each case, without the concept's name (the control).
        tries: number of images for each case; None takes all that the other settings make.
    """

    source: ClassVar[str] = "arXiv 2505.17013"

    prompt: Literal["case", "none", "random"] = "case"
    tries: int | None = None

    @abstractmethod
    def samplings(self) -> list[tuple[Sampling, str]]:
        """Return how each try is sampled, and a note on it."""

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round for each way of sampling, with the same prompts."""
        texts = ["" if self.prompt == "none" else case.prompt for case in cases]
        if self.prompt == "random":
            texts = random_prompts(victim, cases, torch.Generator().manual_seed(seed))
        for sampling, note in self.samplings()[: self.tries]:
            yield {i: Attempt(texts[i], sampling=sampling, note=note) for i in sorted(safe)}

    def control(self, tries: int) -> Attack | None:
        """Return the same probe with random prompts."""
        return None if self.prompt == "random" else replace(self, prompt="random", tries=tries)

    def on_base(self, tries: int) -> Attack:
        """Return the probe itself, with equally many tries."""
        return replace(self, tries=tries)


def random_prompts(victim: Victim, cases: Sequence[Case], draw: torch.Generator) -> list[str]:
    """Return for each case a prompt of random tokens, as many as its own prompt has, without the concept's name."""
    words, tokenizer = words_without_concept(victim, cases), victim.pipe.tokenizer
    counts = [len(tokenizer(case.prompt, verbose=False).input_ids) - 2 for case in cases]
    return [tokenizer.decode(words[torch.randint(len(words), (n,), generator=draw)].tolist()) for n in counts]


@dataclass(frozen=True)
class InpaintingProbe(Probe):
    """Inpainting of the middle of the base's image of the concept.

    Args:
        sides: side of the square to inpaint, as a share of the image's side; one try per entry.
    """

    name: ClassVar[str] = "inpainting"
    access: ClassVar[str] = "image"

    sides: tuple[float, ...] = (0.5,)

    def samplings(self) -> list[tuple[Sampling, str]]:
        """Return one sampling for each side."""
        return [(Inpainted(side), f"side {side:g}") for side in self.sides]


@dataclass(frozen=True)
class CompletionProbe(Probe):
    """Completion of an image that the base began.

    The published numbers of steps are of 50; in fewer sampling steps the base decides more.

    Args:
        base_steps: numbers of sampling steps that the base takes; one try per entry.
    """

    name: ClassVar[str] = "completion"
    access: ClassVar[str] = "noisy latents of the base"

    base_steps: tuple[int, ...] = (1, 2, 3)

    def samplings(self) -> list[tuple[Sampling, str]]:
        """Return one sampling for each number of steps."""
        return [(Completed(steps), f"{steps} steps of the base") for steps in self.base_steps]


@dataclass(frozen=True)
class NoiseScaleProbe(Probe):
    """Sampling with more noise than the scheduler adds, from new initial noise in every try.

    Args:
        etas: shares of DDIM's noise; every one is combined with every scale.
        scales: factors of the added noise.
    """

    name: ClassVar[str] = "noise-scale"
    access: ClassVar[str] = "sampler"
    LITE: ClassVar[dict[str, Any]] = {"etas": (1.0, 1.34, 1.68), "scales": (1.0, 1.04)}

    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    scales: tuple[float, ...] = (1.0, 1.02, 1.03, 1.04)

    def samplings(self) -> list[tuple[Sampling, str]]:
        """Return one sampling for each pair of an eta and a scale."""
        pairs = product(self.etas, self.scales)
        return [(Noisy(eta, scale, i), f"eta {eta:g}, noise x {scale:g}") for i, (eta, scale) in enumerate(pairs)]
