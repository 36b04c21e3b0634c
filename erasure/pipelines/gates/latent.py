"""The latent gate: decides from partially denoised latents whether a patch acts on a prompt.

For a prompt p, N noises and the sampler's state x after some steps with the base (UnGuide, Polowczyk et al. 2025,
arXiv 2508.05755), the effect of the patch is

    d(p) = mean || e_L(x, p) - e_0(x, p) ||_2

with e_L the UNet with the patch and e_0 the UNet without. Where d(p) > ratio * d(""), the prompt names the erased
concept. The paper's ratio is 1; a checkpoint on which the patch affects every other prompt more than the empty one
needs a higher ratio. With `measure: guidance`, d is the multiple of p's own guidance that the patch takes back
(`trajectories.shifts`), and the limit is `ratio` itself. Then every output of the UNet becomes w e_0 + (1 - w) e_L,
with w = `on` for prompts that name the concept and w = `off` for the others. The same UNet computes both terms.

The noises of p and "" are the same, so their differences are paired. With `early`, no more noises are drawn once the
mean difference is more than CLEAR standard errors from zero. A decision depends on the prompt and the patches alone,
not on the rest of the batch, and is cached until the patches change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown
from erasure.model.architectures import architecture_of
from erasure.model.base import Base
from erasure.model.conditioning import text_encoders
from erasure.model.trajectories import MEASURES, shifts
from erasure.pipelines.replaced_forward import ReplacedForward, pick, prediction, split, with_prediction

FIRST = 3  # noises before the first test of whether the decision is clear
CLEAR = 4.0  # standard errors


@dataclass(frozen=True)
class LatentGate:
    """The settings of a latent gate: how it decides, and the weights of the base's and the patch's predictions.

    Args:
        on: w for prompts that name the concept; 0 is the patch alone, -1 extrapolates beyond it, away from the base.
        off: w for all other prompts; 1 is the base alone.
        after: number of sampling steps before the decision.
        steps: total number of steps of the sampler that is used for the decision.
        guidance: guidance scale of that sampler.
        repeats: largest number of noises.
        early: whether to stop before `repeats` once the decision is clear.
        ratio: limit of the decision. By `norm`, how many times more than the empty prompt the patch must affect a
            prompt; by `guidance`, the multiple of the prompt's own guidance that it must take back.
        measure: measure of the effect, `norm` or `guidance`.
        late: whether the outputs are those at a timestep higher than that of the latents, as in the published code
            (`trajectories.shifts`).

    Raises:
        ErasureError: a value is of the wrong type or out of range.
    """

    on: float = -1.0
    off: float = 1.0
    after: int = 10
    steps: int = 50
    guidance: float = 7.5
    repeats: int = 10
    early: bool = True
    ratio: float = 1.0
    measure: str = "norm"
    late: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "measure":
                if value not in MEASURES:
                    raise unknown("measure of a latent gate", value, MEASURES)
                continue
            if field.name in ("early", "late"):
                if not isinstance(value, bool):
                    raise ErasureError(f"{field.name} of a latent gate must be true or false, not {value!r}")
            elif type(value) not in (int, float) or not math.isfinite(value):
                raise ErasureError(f"{field.name} of a latent gate must be a finite number, not {value!r}")
        if self.ratio <= 0:
            raise ErasureError(f"ratio of a latent gate must be above 0, not {self.ratio}")
        if not 0 < self.after < self.steps or self.repeats < 1 or type(self.after * self.steps * self.repeats) is float:
            raise ErasureError(
                f"a latent gate needs whole numbers with 0 < after < steps and repeats of at least 1, not after "
                f"{self.after}, steps {self.steps}, repeats {self.repeats}"
            )


class Decider:
    """The decisions of latent gates on one pipeline with its current weights, cached by patch and prompt."""

    def __init__(self, pipe: Any) -> None:
        self.check(pipe)
        self._base = Base("", pipe)
        self._empty_effects: dict[tuple[Any, int], float] = {}
        self._decisions: dict[tuple[Any, str], bool] = {}
        self._made: dict[Any, Any] = {}  # the base's part of decisions, which patches with the same settings share
        self._schedule: tuple[Any, str] = (None, "")

    @staticmethod
    def check(pipe: Any) -> None:
        """Check that latent gates can decide on a pipeline.

        Args:
            pipe: a diffusers pipeline.

        Raises:
            ErasureError: its prompts cannot be encoded, or its UNet needs more than latents.
        """
        architecture = architecture_of(pipe)
        if architecture.component != "unet":
            architecture.check(pipe)
            return
        text_encoders(pipe)  # raises if the prompts cannot be encoded
        config = pipe.unet.config
        if config.in_channels != config.out_channels:
            raise ErasureError(
                f"a latent gate decides from latents alone, but the UNet of this {type(pipe).__name__} takes "
                f"{config.in_channels} channels and returns {config.out_channels}. Use a text gate, or fuse_patches() "
                "on a text-to-image pipeline"
            )

    def present(self, key: Any, gate: LatentGate, prompt: str, patched: Callable[[], Any]) -> bool:
        """Return whether a prompt names the concept that a patch was made for.

        Args:
            key: identifies the patch and its gate in the cache.
            gate: the settings of the decision.
            prompt: the prompt.
            patched: opens a context in which the UNet has the patch.

        Raises:
            ErasureError: the UNet needs an image too (IP-Adapter), or the patch does not affect the empty prompt.
        """
        if getattr(self._base.network.config, "encoder_hid_dim_type", None) is not None:
            raise ErasureError(
                "a latent gate decides by the prompt alone, but this UNet also needs an image (IP-Adapter). Call "
                "unload_ip_adapter() or fuse_patches(), or disable the patch with set_patches()"
            )
        key = key, self._noise_schedule()  # another one can change the decision
        if (key, prompt) not in self._decisions:
            differences: list[float] = []
            while len(differences) < gate.repeats:
                drawn = len(differences)
                seeds = range(drawn, min(drawn + (FIRST if gate.early else gate.repeats), gate.repeats))
                effects = self._effects(gate, prompt, seeds, patched)
                by_norm = gate.measure == "norm"
                units = self._effects_on_empty(key, gate, seeds, patched) if by_norm else [1.0] * len(effects)
                differences += [effect - gate.ratio * unit for effect, unit in zip(effects, units, strict=True)]
                if clear(differences):
                    break
            self._decisions[key, prompt] = sum(differences) > 0
        return self._decisions[key, prompt]

    def settle(self) -> None:
        """Discard what only the patches of one call share."""
        self._made = {}

    def _noise_schedule(self) -> str:
        config = self._base.scheduler.config
        if self._schedule[0] is not config:
            self._schedule = config, str(self._base.sampler().config)
        return self._schedule[1]

    def _effects_on_empty(
        self, key: Any, gate: LatentGate, seeds: Sequence[int], patched: Callable[[], Any]
    ) -> list[float]:
        missing = [seed for seed in seeds if (key, seed) not in self._empty_effects]
        if missing:
            effects = self._effects(gate, "", missing, patched)
            if not all(effects):
                raise ErasureError(
                    "the patch does not affect the empty prompt, so the measure `norm` has nothing to compare with "
                    "(the empty prompt of XL is all zeros, which the keys and values of cross-attention leave zero). "
                    "Use the measure `guidance`"
                )
            self._empty_effects |= {(key, seed): effect for seed, effect in zip(missing, effects, strict=True)}
        return [self._empty_effects[key, seed] for seed in seeds]

    def _effects(self, gate: LatentGate, prompt: str, seeds: Sequence[int], patched: Callable[[], Any]) -> list[float]:
        names = ("after", "steps", "guidance", "measure", "late")
        settings = {name: getattr(gate, name) for name in names}
        return shifts(self._base, prompt, seeds, patched, **settings, made=self._made)


def clear(differences: list[float]) -> bool:
    """Return whether the mean of paired differences is more than CLEAR standard errors from zero.

    Args:
        differences: paired differences; fewer than FIRST are never clear.
    """
    n = len(differences)
    if n < FIRST:
        return False
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    return abs(mean) > CLEAR * math.sqrt(variance / n)


class Combination(ReplacedForward):
    """A replacement for the network's forward during one call: e_0 + sum over patches of (1 - w_i) (e_i - e_0).

    Args:
        network: the network.
        component: its name in the pipeline, `unet` or `transformer`.
        parts: for each patch, 1 - w for each row [rows], and a function that opens a context in which the UNet has the
            patch.
        whole: whether to run every row through every patch, because other hooks expect full batches.
    """

    def __init__(
        self, network: nn.Module, component: str, parts: list[tuple[Tensor, Callable[[], Any]]], whole: bool
    ) -> None:
        super().__init__(network, component)
        self._parts, self._whole = parts, whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with and without the patches, and return the combined output in the network's own type.

        Args:
            args: positional arguments of the network, noisy latents [rows, ...] first.
            kwargs: named ones, among them the latents if none are positional.

        Raises:
            ErasureError: the number of rows is not a multiple of the number that the gates were opened for.
        """
        self.calls += 1
        sample, _, _ = split(args, kwargs)
        rows = sample.shape[0]
        moves = []
        for weights, patched in self._parts:
            if rows % len(weights):
                raise ErasureError(
                    f"a gated patch was opened for {len(weights)} rows, but the UNet was called with a batch of "
                    f"{rows}, which is not a multiple of {len(weights)}"
                )
            weight = weights.repeat(rows // len(weights)).to(sample.device)
            chosen = torch.ones_like(weight, dtype=torch.bool) if self._whole else weight != 0
            with patched():
                output = self._forward(*pick(args, chosen, rows), **pick(kwargs, chosen, rows))
            patch = prediction(output)
            moves.append((weight[chosen].view(-1, *[1] * (patch.dim() - 1)), chosen, patch))
        if len(moves) == 1 and bool((moves[0][0] == 1).all()) and bool(moves[0][1].all()):
            return output  # the patch alone, on every row
        plain = self._forward(*args, **kwargs)
        base = prediction(plain)
        combined = base.clone()
        for weight, chosen, patch in moves:
            combined[chosen] += (weight * (patch.float() - base[chosen].float())).to(combined.dtype)
        return with_prediction(plain, combined)
