"""The latent gate: whether a patch acts on a prompt is decided from partially denoised latents.

For a prompt p, N noises and the sampler's state x after some steps with the base (UnGuide, Polowczyk et al. 2025)

    d(p) = mean || e_L(x, p) - e_0(x, p) ||_2

with e_L the UNet with the patch. Where d(p) > ratio * d("") the prompt names what the patch was made for (the paper:
ratio 1; a checkpoint on which the patch moves every named prompt more than the empty one needs a higher one). With
`measure: guidance`, d is how many times p's own guidance the patch takes back (`trajectories.shifts`), and the limit is
`ratio` itself. Then every answer of the UNet becomes w e_0 + (1 - w) e_L, with w = `on` there and w = `off` elsewhere.
One UNet answers both times.

The noises of p and "" are the same, so their differences are paired: with `early`, repeats stop when the mean
difference is more than CLEAR standard errors from zero. A decision depends on the prompt and the patches alone, not on
the batch around it, and is kept until the patches change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown
from erasure.model.base import Base
from erasure.model.conditioning import text_encoders
from erasure.model.trajectories import MEASURES, shifts

FIRST = 3  # repeats before the first look
CLEAR = 4.0  # standard errors


@dataclass(frozen=True)
class LatentGate:
    """How to decide, and with which weights to combine.

    Args:
        on: w where the concept is there; 0 is the patch alone, -1 leads away from it.
        off: w elsewhere; 1 is the base alone.
        after: steps until the decision.
        steps: of the deciding sampler.
        guidance: of the deciding sampler.
        repeats: noises, at most.
        early: stop when the decision is clear.
        ratio: how many times more than the empty prompt the patch must move a prompt; by `guidance`, how many times
            the prompt's own guidance it must take back.
        measure: of a move: norm, or guidance.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "measure":
                if value not in MEASURES:
                    raise unknown("measure of a latent gate", value, MEASURES)
                continue
            right = isinstance(value, bool) if field.name == "early" else type(value) in (int, float)
            if not right or not math.isfinite(value):
                raise ErasureError(f"a latent gate's {field.name} is {value!r}")
        if self.ratio <= 0:
            raise ErasureError(f"a latent gate's ratio is above 0, not {self.ratio}")
        if not 0 < self.after < self.steps or self.repeats < 1 or type(self.after * self.steps * self.repeats) is float:
            raise ErasureError(
                f"a latent gate decides after {self.after} of {self.steps} steps, {self.repeats} times: "
                "expected whole numbers, 0 < after < steps, at least once"
            )


Answers = Callable[[Tensor, Tensor, Tensor], Tensor]


class Decider:
    """Decides for one pipeline, as its weights now are; what it found is kept."""

    def __init__(self, pipe: Any) -> None:
        self.check(pipe)
        self._base = Base("", pipe)
        self._empty: dict[tuple[Any, int], float] = {}
        self._found: dict[tuple[Any, str], bool] = {}

    @staticmethod
    def check(pipe: Any) -> None:
        """Refuse pipelines that it cannot decide on.

        Raises:
            ErasureError: saying why not.
        """
        kind = type(pipe).__name__
        text_encoders(pipe)  # refuses pipelines whose prompts it cannot encode
        config = pipe.unet.config
        if config.in_channels != config.out_channels:
            raise ErasureError(
                f"a latent gate decides from latents alone, and this {kind}'s UNet takes {config.in_channels} channels "
                f"for {config.out_channels}; use a text gate, or fuse_patches() on a text-to-image pipeline"
            )

    def present(self, key: Any, gate: LatentGate, prompt: str, patched: Callable[[], Any]) -> bool:
        """Whether the prompt names what the patch was made for.

        Args:
            key: of the patch, for what is kept.
            gate: how to decide.
            prompt: the prompt.
            patched: opens a context in which the UNet has the patch.
        """
        if self._base.unet.config.encoder_hid_dim_type is not None:
            raise ErasureError(
                "a latent gate decides by the prompt alone, and this UNet wants an image too (IP-Adapter): "
                "unload_ip_adapter(), fuse_patches(), or set_patches() without the patch"
            )
        key = key, str(self._base.sampler("ddim").config)  # another scheduler's noise, another decision
        if (key, prompt) not in self._found:
            differences: list[float] = []
            while len(differences) < gate.repeats:
                done = len(differences)
                seeds = range(done, min(done + (FIRST if gate.early else gate.repeats), gate.repeats))
                named = self._distances(gate, prompt, seeds, patched)
                by_norm = gate.measure == "norm"
                units = self._plain(key, gate, seeds, patched) if by_norm else [1.0] * len(named)
                differences += [a - gate.ratio * b for a, b in zip(named, units, strict=True)]
                if clear(differences):
                    break
            self._found[key, prompt] = sum(differences) > 0
        return self._found[key, prompt]

    def _plain(self, key: Any, gate: LatentGate, seeds: Sequence[int], patched: Callable[[], Any]) -> list[float]:
        new = [seed for seed in seeds if (key, seed) not in self._empty]
        if new:
            found = self._distances(gate, "", new, patched)
            if not all(found):
                raise ErasureError(
                    "the patch does not move the empty prompt, so `norm` has no unit to decide by (XL's empty prompt "
                    "is all zeros, and keys and values of cross-attention do nothing there); measure `guidance` has one"
                )
            self._empty |= {(key, seed): value for seed, value in zip(new, found, strict=True)}
        return [self._empty[key, seed] for seed in seeds]

    def _distances(
        self, gate: LatentGate, prompt: str, seeds: Sequence[int], patched: Callable[[], Any]
    ) -> list[float]:
        ways = ("after", "steps", "guidance", "measure")
        return shifts(self._base, prompt, seeds, patched, **{name: getattr(gate, name) for name in ways})


def clear(differences: list[float]) -> bool:
    """Whether the mean of paired differences lies more than CLEAR standard errors from zero."""
    n = len(differences)
    if n < FIRST:
        return False
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    return abs(mean) > CLEAR * math.sqrt(variance / n)


class Combination:
    """Stands for the UNet's forward during a call: e_0 + sum over patches of (1 - w_i) (e_i - e_0).

    Args:
        unet: the UNet.
        parts: for each patch, 1 - w for each row [rows], and what opens a context in which the UNet has the patch.
        whole: run every row through every patch, because other hooks expect full batches.
    """

    def __init__(self, unet: nn.Module, parts: list[tuple[Tensor, Callable[[], Any]]], whole: bool) -> None:
        self._unet, self._parts, self._whole = unet, parts, whole
        self._forward = unet.forward
        self._own = "forward" in vars(unet)
        self.calls = 0
        unet.forward = self

    def remove(self) -> None:
        """Give the UNet its own forward back."""
        # Offloading hooks come and go at the end of a call: where they have put their own back, it stays.
        if vars(self._unet).get("forward") is self:
            if self._own:
                self._unet.forward = self._forward
            else:
                del self._unet.forward

    def __call__(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the UNet's forward."""
        self.calls += 1
        n, plain = sample.shape[0], None
        moves = []
        for shares, patched in self._parts:
            if n % len(shares):
                raise ErasureError(f"a gated patch expects batches of {len(shares)} rows or a multiple, and met {n}")
            share = shares.repeat(n // len(shares)).to(sample.device)
            rows = torch.ones_like(share, dtype=torch.bool) if self._whole else share != 0
            with patched():
                made = self._forward(*pick((sample, *args), rows, n), **pick(kwargs, rows, n))
            moves.append((share[rows].view(-1, 1, 1, 1), rows, made[0] if isinstance(made, tuple) else made.sample))
        if len(moves) == 1 and bool((moves[0][0] == 1).all()) and bool(moves[0][1].all()):
            return made  # the patch alone, on every row
        plain = self._forward(sample, *args, **kwargs)
        base = plain[0] if isinstance(plain, tuple) else plain.sample
        out = base.clone()
        for share, rows, answer in moves:
            out[rows] += (share * (answer.float() - base[rows].float())).to(out.dtype)
        if isinstance(plain, tuple):
            return (out, *plain[1:])
        plain.sample = out
        return plain


def pick(value: Any, rows: Tensor, n: int) -> Any:
    """The rows of every tensor of n rows in nested arguments; anything else as it is."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() and value.shape[0] == n else value
    if isinstance(value, dict):
        return {key: pick(one, rows, n) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pick(one, rows, n) for one in value)
    return value
