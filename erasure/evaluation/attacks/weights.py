"""Attacks by weights: teach the concept again, or take the change out of several published checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.diffusion import add_noise
from erasure.errors import ErasureError
from erasure.evaluation.attacks import Attack, Attempt, Case, Victim


@dataclass(frozen=True)
class Relearning(Attack):
    """Fine-tune keys and values of the cross-attentions on k pictures of the concept: accuracy against steps.

    The loss is the model's own, || eps - e*(x_t, t, c) ||^2. What is trained is put back at the end.

    Args:
        pictures: k, of the cases' own base pictures.
        steps: of AdamW in all, after each of which the cases are asked.
        batch: samples a step.
        rate: of AdamW.
        unnamed: by prompts without the concept's name: what the pictures alone bring back.
    """

    name: ClassVar[str] = "relearning"
    source: ClassVar[str] = "fine-tuning on k images"
    access: ClassVar[str] = "weights"
    CURVE: ClassVar[bool] = True
    LITE: ClassVar[dict[str, Any]] = {"steps": (10, 30, 100), "batch": 4}

    pictures: int = 10
    steps: tuple[int, ...] = (50, 200, 500, 1000)
    batch: int = 8
    rate: float = 1e-4
    unnamed: bool = False

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """A piece of training a round."""
        draw = torch.Generator().manual_seed(seed)
        shown = cases[: self.pictures]
        latents = torch.stack([case.latents for case in shown]).to(victim.device)
        # The control learns the same pictures, each by a prompt that does not name the concept.
        texts = [f"{c.before} {c.after}".strip() if self.unnamed else c.prompt for c in shown]
        with victim.folded():
            states = victim.states(texts)
            trained = [
                module
                for path, module in victim.pipe.unet.named_modules()
                if path.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear)
            ]
        if not trained:
            raise ErasureError("relearning: the UNet has no cross-attention whose keys and values could learn")
        weights = [module.weight for module in trained]
        delta = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=True) for weight in weights]
        optimizer, done = torch.optim.AdamW(delta, lr=self.rate, weight_decay=0), 0
        for steps in self.steps:
            with victim.folded(), moved(weights, delta) as move:
                for _ in range(steps - done):
                    index = torch.randint(len(shown), (self.batch,), generator=draw)
                    t = torch.randint(1000, (self.batch,), generator=draw).to(victim.device)
                    noise = torch.randn(latents[index].shape, generator=draw).to(latents)
                    x = add_noise(victim.pipe.scheduler, latents[index], noise, t)
                    loss = F.mse_loss(victim.eps(x, t, states[index]), noise)
                    for one, gradient in zip(delta, torch.autograd.grad(loss, weights), strict=True):
                        one.grad = gradient.float()
                    optimizer.step()
                    move()
            done = steps
            with moved(weights, delta):
                yield {i: Attempt(case.prompt, note=f"{steps} steps") for i, case in enumerate(cases)}

    def control(self, tries: int) -> Attack:
        """The same pictures, without the concept's name."""
        return replace(self, unnamed=True, steps=self.steps[:tries])


@contextmanager
def moved(weights: list[Tensor], delta: list[Tensor]) -> Iterator[Any]:
    """Weights plus what was learnt, and their gradients; as they were, bit for bit, at the end.

    The value is a call that moves them to where `delta` is by now.
    """
    before = [weight.detach().clone() for weight in weights]
    learning = [weight.requires_grad for weight in weights]

    def move() -> None:
        with torch.no_grad():
            for weight, kept, one in zip(weights, before, delta, strict=True):
                weight.copy_(kept + one.to(kept.dtype))

    try:
        for weight in weights:
            weight.requires_grad_(True)
        move()
        yield move
    finally:
        with torch.no_grad():
            for weight, kept, flag in zip(weights, before, learning, strict=True):
                weight.copy_(kept)
                weight.requires_grad_(flag)


def detune(published: Sequence[Tensor], rank: int, iterations: int = 300) -> Tensor:
    """Spectral DeTuning (Horwitz et al. 2024, arXiv 2402.10208): the base weight behind n published ones.

    Each is W_i = W* + M_i with rank(M_i) <= rank. In turn M_i = SVD_r(W_i - W*), W* = mean(W_i - M_i), from the mean,
    with the rank growing to its full value over the first half (alg. 1).

    Args:
        published: n weights [out, in] of the same layer.
        rank: of the changes.

    Raises:
        ErasureError: fewer than two, shapes that differ, or a rank below 1.
    """
    if len(published) < 2 or len({tuple(one.shape) for one in published}) != 1:
        raise ErasureError(f"{len(published)} weights: DeTuning needs two or more of one shape")
    if rank < 1:
        raise ErasureError(f"rank={rank}: at least 1 is needed")
    stack = torch.stack([one.double() for one in published])
    base = stack.mean(0)
    for step in range(iterations):
        allowed = min(rank, 1 + step * 2 * rank // iterations)
        u, s, v = torch.linalg.svd(stack - base, full_matrices=False)
        low = (u[..., :allowed] * s[:, None, :allowed]) @ v[:, :allowed]
        base = (stack - low).mean(0)
    return base
