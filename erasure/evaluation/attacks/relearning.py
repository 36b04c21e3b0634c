"""Attack that changes the weights: fine-tune the erased model on images of the concept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim
from erasure.evaluation.attacks.ring_a_bell import unnamed
from erasure.model.diffusion import add_noise
from erasure.model.loading import sampling_of

CROSS_ATTENTION = ("attn2.to_k", "attn2.to_v")
PROJECTIONS = tuple(f"{part}.{end}" for part in ("attn1", "attn2") for end in ("to_q", "to_k", "to_v", "to_out.0"))


@dataclass(frozen=True)
class Relearning(Attack):
    """Fine-tuning of the UNet's attention on k images of the concept, by LoRA.

    The loss is that of diffusion training, || eps - e*(x_t, t, c) ||^2. Every case is attempted after each entry of
    `steps`, which gives a curve of success against training steps. The trained weights are restored at the end.

    Args:
        pictures: k, the number of images; they are the base model's own images of the first cases.
        steps: numbers of AdamW steps, counted from the start, after which the cases are attempted.
        batch: samples per step.
        rate: learning rate of AdamW.
        rank: rank of the LoRA on the query, key, value and output projections of all attentions; None trains the
            whole key and value projections of the cross-attentions instead.
        benign: train on the base's images of the same prompts without the concept's name. This is the control: it
            shows what any fine-tuning would recover.
    """

    name: ClassVar[str] = "relearning"
    source: ClassVar[str] = "LoRA fine-tuning on k images"
    access: ClassVar[str] = "weights"
    UNDOES: ClassVar[bool] = True
    CURVE: ClassVar[bool] = True
    # A small model needs, and tolerates, a larger learning rate.
    LITE: ClassVar[dict[str, Any]] = {"steps": (10, 30, 100), "batch": 4, "rate": 1e-3}

    pictures: int = 10
    steps: tuple[int, ...] = (50, 200, 500, 1000)
    batch: int = 8
    rate: float = 1e-4
    rank: int | None = 8
    benign: bool = False

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """Yield one round per entry of `steps`: the plain prompts, on the model trained so far."""
        draw = torch.Generator().manual_seed(seed)
        examples = cases[: self.pictures]
        if self.benign:
            texts = [text if case.name else "" for case, text in zip(examples, unnamed(examples), strict=True)]
            seeds, sampling = [case.seed for case in examples], sampling_of(victim.pipe)
            latents = victim.base_latents(texts, seeds, self.batch, sampling.steps, sampling.guidance)
        else:
            texts, latents = [case.prompt for case in examples], torch.stack([case.latents for case in examples])
        latents = latents.to(victim.device)
        with victim.folded():
            conditions = victim.conditions(texts)
            weights = linear_weights(victim.pipe.unet, CROSS_ATTENTION if self.rank is None else PROJECTIONS)
        update = WeightUpdate(weights, self.rank, draw)
        optimizer, done = torch.optim.AdamW(update.leaves, lr=self.rate, weight_decay=0), 0
        for steps in self.steps:
            with victim.folded(), updated_weights(weights, update) as refresh:
                for _ in range(steps - done):
                    index = torch.randint(len(examples), (self.batch,), generator=draw)
                    t = torch.randint(1000, (self.batch,), generator=draw).to(victim.device)
                    noise = torch.randn(latents[index].shape, generator=draw).to(latents)
                    x = add_noise(victim.pipe.scheduler, latents[index], noise, t)
                    with victim.reading([texts[i] for i in index.tolist()]):
                        loss = F.mse_loss(victim.eps(x, t, conditions[index]), noise)
                    optimizer.zero_grad()
                    gradients = torch.autograd.grad(loss, weights)
                    torch.autograd.backward(update(), [gradient.float() for gradient in gradients])
                    optimizer.step()
                    refresh()
            done = steps
            with updated_weights(weights, update):
                yield {i: Attempt(case.prompt, note=f"{steps} steps") for i, case in enumerate(cases)}

    def control(self, tries: int) -> Attack:
        """Return equally long fine-tuning on images without the concept."""
        return replace(self, benign=True, steps=self.steps[:tries])


def linear_weights(unet: nn.Module, suffixes: tuple[str, ...]) -> list[Tensor]:
    """Return the weights of all linear layers whose module paths end in one of the suffixes.

    Raises:
        ErasureError: the UNet has no such layer.
    """
    weights = [
        module.weight
        for path, module in unet.named_modules()
        if path.endswith(suffixes) and isinstance(module, nn.Linear)
    ]
    if not weights:
        raise ErasureError(
            f"relearning: the UNet has no linear layer named {' or '.join(suffixes)} to fine-tune; "
            "its weights were left untouched"
        )
    return weights


class WeightUpdate:
    """A trainable update of weights [out, in]: the product up @ down of a given rank, or a full matrix.

    Low-rank factors are initialised as peft initialises LoRA, with alpha equal to the rank, so the update starts at
    zero. Calling the object returns the updates; gradients flow from them to `leaves`.

    Args:
        weights: the weights to update; they are read for their shape and device only.
        rank: rank of the product, or None for full matrices.
        draw: generator for the initial values.

    Raises:
        ErasureError: the rank is below 1.
    """

    def __init__(self, weights: Sequence[Tensor], rank: int | None, draw: torch.Generator) -> None:
        if rank is not None and rank < 1:
            raise ErasureError(f"rank={rank}: must be at least 1, or none to train whole weights")
        self.leaves: list[Tensor] = []
        self.rank = rank
        for weight in weights:
            out, width = weight.shape
            if rank is None:
                parts = [torch.zeros(out, width)]
            else:
                # Kaiming's uniform distribution with a = sqrt(5) has the bound 1 / sqrt(width).
                parts = [(2 * torch.rand(rank, width, generator=draw) - 1) / width**0.5, torch.zeros(out, rank)]
            self.leaves += [part.to(weight.device).requires_grad_(True) for part in parts]

    def __call__(self) -> list[Tensor]:
        """Return the updates [out, in], one per weight."""
        if self.rank is None:
            return [leaf.clone() for leaf in self.leaves]
        return [up @ down for down, up in zip(self.leaves[::2], self.leaves[1::2], strict=True)]


@contextmanager
def updated_weights(weights: Sequence[Tensor], update: Callable[[], Sequence[Tensor]]) -> Iterator[Any]:
    """Add an update to weights for the body of the `with`, and restore them bit for bit afterwards.

    Inside, the weights require gradients. The context's value is a function that applies the current update again
    after it has changed.

    Args:
        weights: the weights to change in place.
        update: returns one tensor to add per weight.
    """
    originals = [weight.detach().clone() for weight in weights]
    flags = [weight.requires_grad for weight in weights]

    def refresh() -> None:
        with torch.no_grad():
            for weight, original, delta in zip(weights, originals, update(), strict=True):
                weight.copy_(original + delta.to(original))

    try:
        for weight in weights:
            weight.requires_grad_(True)
        refresh()
        yield refresh
    finally:
        with torch.no_grad():
            for weight, original, flag in zip(weights, originals, flags, strict=True):
                weight.copy_(original)
                weight.requires_grad_(flag)
