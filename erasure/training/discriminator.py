"""A discriminator of latents, patch by patch (PatchGAN, Isola et al. 2017, arXiv 1611.07004), that is told the time.

DoCo trains one to tell what is predicted for a concept from what is predicted for its anchor (arXiv 2405.15304). Clean
latents predicted at different noise levels differ in blur more than in what they show, so that a discriminator which
does not know t looks at the blur. Here t scales and shifts the normalised features of every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (64, 128, 256, 512)
LEAST_SIDE = 8  # layers halve the latents while their side is at least this
GROUPS = 8
FREQUENCIES = 32
SLOPE = 0.2
BETAS = (0.5, 0.999)


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2, each with a norm and a leaky ReLU, then one number for each patch.

    Args:
        channels: of the latents.
        side: of the latents; sides of 64 give the published four layers.
        timed: condition on t, with group norms; otherwise as published: batch norms, none after the first layer, and
            no t.
        seed: of the weights.
    """

    def __init__(self, channels: int, side: int, *, timed: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.timed = timed
        widths = [channels]
        while side >= LEAST_SIDE and len(widths) <= len(CHANNELS):
            widths.append(CHANNELS[len(widths) - 1])
            side //= 2
        if len(widths) == 1:
            widths.append(CHANNELS[0])
            side //= 2
        pairs = list(zip(widths, widths[1:], strict=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairs)
            if timed:
                self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, b, affine=False) for _, b in pairs)
                self.shifts = nn.ModuleList(nn.Linear(2 * FREQUENCIES, 2 * b) for _, b in pairs)
            else:
                self.norms = nn.ModuleList(nn.BatchNorm2d(b) if i else nn.Identity() for i, (_, b) in enumerate(pairs))
            self.head = nn.Conv2d(widths[-1], 1, 4, 1, 2 if side < 3 else 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return a logit for every patch: positive for a concept's latents, negative for an anchor's.

        Args:
            x: latents [n, c, h, w].
            t: timesteps [n] of the predictions.
        """
        time = embedding(t.to(x)) if self.timed else None
        for i, layer in enumerate(self.layers):
            x = self.norms[i](layer(x))
            if time is not None:
                scale, shift = self.shifts[i](time)[:, :, None, None].chunk(2, 1)
                x = x * (1 + scale) + shift
            x = F.leaky_relu(x, SLOPE)
        return self.head(x)  # type: ignore[no-any-return]


def embedding(t: Tensor) -> Tensor:
    """Return sines and cosines of timesteps [n] as [n, 2 FREQUENCIES]."""
    rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES, device=t.device) / FREQUENCIES)
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Adversary:
    """A discriminator with the Adam that trains it.

    Args:
        net: the discriminator.
        rate: its learning rate.
    """

    def __init__(self, net: PatchDiscriminator, rate: float) -> None:
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=BETAS)

    def learn(self, concept: Tensor, anchor: Tensor, t: Tensor) -> float:
        """Take one step towards telling both apart, and return the loss before it; gradients stop at the latents.

        Args:
            concept: latents [n, c, h, w] predicted for the concept, whose logits are to be positive.
            anchor: latents [n, c, h, w] predicted for the anchor, whose logits are to be negative.
            t: timesteps [n] of both.
        """
        with torch.enable_grad():
            logits = [self.net(latents.detach(), t) for latents in (concept, anchor)]
            loss = towards(logits[0], 1.0).mean() + towards(logits[1], 0.0).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        return loss.item()

    def judged_anchor(self, latents: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each sample [n] if it is to pass for the anchor's; gradients reach the latents alone."""
        self.net.requires_grad_(False)
        try:
            return towards(self.net(latents, t), 0.0)
        finally:
            self.net.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and the optimizer's moments, for a checkpoint."""
        state = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return state

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        own = {key.removeprefix("net."): value for key, value in tensors.items() if key.startswith("net.")}
        self.net.load_state_dict(own)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def towards(logits: Tensor, label: float) -> Tensor:
    """Return the binary cross-entropy of logits [n, 1, h, w] with one label, as a mean over the patches [n]."""
    return (
        F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none").flatten(1).mean(1)
    )
