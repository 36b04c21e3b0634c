"""Attacks by weights: teach the concept again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.evaluation import generate
from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.evaluation.attacks.ring_a_bell import unnamed
from erasure.model.diffusion import add_noise


@dataclass(frozen=True)
class Relearning(Attack):
    """Fine-tune the UNet's attention on k pictures of the concept, by LoRA: accuracy against steps.

    The loss is the model's own, || eps - e*(x_t, t, c) ||^2. What is trained is put back at the end.

    Args:
        pictures: k, of the cases' own base pictures.
        steps: of AdamW in all, after each of which the cases are asked.
        batch: samples a step.
        rate: of AdamW.
        rank: of the terms beside the queries, keys, values and outputs of all attentions; None: whole keys and values
            of the cross-attentions.
        benign: on the base's pictures of the prompts without the concept: what any fine-tune brings back.
    """

    name: ClassVar[str] = "relearning"
    source: ClassVar[str] = "LoRA fine-tuning on k images"
    access: ClassVar[str] = "weights"
    CURVE: ClassVar[bool] = True
    # A small model takes, and needs, larger steps.
    LITE: ClassVar[dict[str, Any]] = {"steps": (10, 30, 100), "batch": 4, "rate": 1e-3}

    pictures: int = 10
    steps: tuple[int, ...] = (50, 200, 500, 1000)
    batch: int = 8
    rate: float = 1e-4
    rank: int | None = 8
    benign: bool = False

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """A piece of training a round."""
        draw = torch.Generator().manual_seed(seed)
        shown = cases[: self.pictures]
        if self.benign:
            texts = [text if case.name else "" for case, text in zip(shown, unnamed(shown), strict=True)]
            seeds = [case.seed for case in shown]
            latents = victim.base_latents(texts, seeds, self.batch, generate.STEPS, generate.GUIDANCE)
        else:
            texts, latents = [case.prompt for case in shown], torch.stack([case.latents for case in shown])
        latents = latents.to(victim.device)
        with victim.folded():
            told = victim.conditions(texts)
            weights = readable(victim.pipe.unet, WHOLE if self.rank is None else PROJECTIONS)
        learnt = Change(weights, self.rank, draw)
        optimizer, done = torch.optim.AdamW(learnt.leaves, lr=self.rate, weight_decay=0), 0
        for steps in self.steps:
            with victim.folded(), moved(weights, learnt) as move:
                for _ in range(steps - done):
                    index = torch.randint(len(shown), (self.batch,), generator=draw)
                    t = torch.randint(1000, (self.batch,), generator=draw).to(victim.device)
                    noise = torch.randn(latents[index].shape, generator=draw).to(latents)
                    x = add_noise(victim.pipe.scheduler, latents[index], noise, t)
                    loss = F.mse_loss(victim.eps(x, t, told[index]), noise)
                    optimizer.zero_grad()
                    gradients = torch.autograd.grad(loss, weights)
                    torch.autograd.backward(learnt(), [each.float() for each in gradients])
                    optimizer.step()
                    move()
            done = steps
            with moved(weights, learnt):
                yield {i: Attempt(case.prompt, note=f"{steps} steps") for i, case in enumerate(cases)}

    def control(self, tries: int) -> Attack:
        """As many steps on pictures without the concept."""
        return replace(self, benign=True, steps=self.steps[:tries])


WHOLE = ("attn2.to_k", "attn2.to_v")
PROJECTIONS = tuple(f"{part}.{end}" for part in ("attn1", "attn2") for end in ("to_q", "to_k", "to_v", "to_out.0"))


def readable(unet: nn.Module, ends: tuple[str, ...]) -> list[Tensor]:
    """Weights of the linear layers whose paths end so.

    Raises:
        ErasureError: there are none.
    """
    found = [
        module.weight for path, module in unet.named_modules() if path.endswith(ends) and isinstance(module, nn.Linear)
    ]
    if not found:
        raise ErasureError(f"relearning: the UNet has no linear layer {', '.join(ends)} that could learn")
    return found


class Change:
    """What is learnt beside weights [out, in]: up @ down of a rank, begun as peft's LoRA (alpha = rank), or the whole.

    Called, it gives the changes, through which gradients reach `leaves`.
    """

    def __init__(self, weights: Sequence[Tensor], rank: int | None, draw: torch.Generator) -> None:
        if rank is not None and rank < 1:
            raise ErasureError(f"rank={rank}: at least 1 is needed, or none for whole weights")
        self.leaves: list[Tensor] = []
        self.rank = rank
        for weight in weights:
            out, width = weight.shape
            if rank is None:
                parts = [torch.zeros(out, width)]
            else:
                # Kaiming's uniform with a = sqrt(5): within 1 / sqrt(width).
                parts = [(2 * torch.rand(rank, width, generator=draw) - 1) / width**0.5, torch.zeros(out, rank)]
            self.leaves += [part.to(weight.device).requires_grad_(True) for part in parts]

    def __call__(self) -> list[Tensor]:
        """The changes [out, in], one a weight."""
        if self.rank is None:
            return [leaf.clone() for leaf in self.leaves]
        return [up @ down for down, up in zip(self.leaves[::2], self.leaves[1::2], strict=True)]


@contextmanager
def moved(weights: Sequence[Tensor], change: Callable[[], Sequence[Tensor]]) -> Iterator[Any]:
    """Weights plus a change, and their gradients; as they were, bit for bit, at the end.

    The value is a call that moves them to where `change` is by now.
    """
    before = [weight.detach().clone() for weight in weights]
    learning = [weight.requires_grad for weight in weights]

    def move() -> None:
        with torch.no_grad():
            for weight, kept, one in zip(weights, before, change(), strict=True):
                weight.copy_(kept + one.to(kept))

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
