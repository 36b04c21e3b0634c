"""Latent re-attention: features that a filtered prompt makes louder at low frequencies than the prompt itself does.

SAFREE (Yoon et al. 2024, arXiv 2410.12761) adds it to the filter of `tokens.py`. In the decoder of a UNet, with F the
Fourier transform of the features that skip the middle, channel by channel, for the filtered prompt and F_0 for the
prompt as it is,

    F <- scale F  where |F| > |F_0| and both frequencies are at most LOW, else F

The widest features of the decoder have a scale of their own, the second widest another, and the rest is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LOW = 1  # periods over the height or width of a feature map


def quieter(features: Tensor, original: Tensor, scale: float) -> Tensor:
    """Return features [n, c, h, w] whose low frequencies are scaled where they are louder than the original's.

    Args:
        features: for the filtered prompt.
        original: for the prompt as it is.
        scale: factor on their Fourier coefficients.
    """
    spectrum, reference = torch.fft.fft2(features.float()), torch.fft.fft2(original.float())
    height, width = ((torch.fft.fftfreq(n) * n).round().abs() <= LOW for n in features.shape[-2:])
    low = (height[:, None] & width).to(features.device)
    louder = low & (spectrum.abs() > reference.abs())
    return torch.fft.ifft2(torch.where(louder, scale * spectrum, spectrum)).real.to(features.dtype)


def decoder(unet: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return the decoder's residual blocks, each with the number of channels before those that skip the middle."""
    network: Any = unet
    previous = network.mid_block.resnets[-1].out_channels
    found = []
    for block in network.up_blocks:
        for resnet in block.resnets:
            found.append((resnet, previous))
            previous = resnet.out_channels
    return found


class SkippedFeatures:
    """The features that skip the middle of a UNet, kept in one pass and compared with in another.

    Args:
        unet: the network.
        scales: factor for the widest features of the decoder, and for the second widest.
    """

    def __init__(self, unet: nn.Module, scales: tuple[float, float]) -> None:
        blocks = decoder(unet)
        widths = sorted({width for _, width in blocks}, reverse=True)
        factors = dict(zip(widths, scales, strict=False))
        self._blocks = [(resnet, width, factors[width]) for resnet, width in blocks if width in factors]
        self._kept: list[Tensor] = []

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the features of the network's pass inside the context."""
        self._kept = []

        def keep(number: int, skipped: Tensor) -> None:
            self._kept.append(skipped.clone())

        with self._hooked(keep):
            yield

    @contextmanager
    def compared(self, batch: int, rows: Tensor, kept: Tensor) -> Iterator[None]:
        """Change the features of rows of the network's pass inside the context, by comparison with those kept.

        Args:
            batch: number of rows of that pass; passes of other sizes, such as other hooks make, are left alone.
            rows: the numbers of the rows in the batch.
            kept: the numbers of the same rows in the pass that was kept.
        """
        seen: set[int] = set()

        def change(number: int, skipped: Tensor) -> Tensor | None:
            if len(skipped) != batch or number in seen:
                return None
            seen.add(number)
            result = skipped.clone()
            at, other = rows.to(skipped.device), kept.to(skipped.device)
            result[at] = quieter(skipped[at], self._kept[number][other], self._blocks[number][2])
            return result

        with self._hooked(change):
            yield

    @contextmanager
    def _hooked(self, act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Let a function of a block's number and its skipped features see them, and replace them if it returns some."""

        def hook(number: int, width: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
            def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                features = args[0]
                changed = act(number, features[:, width:])
                return None if changed is None else (torch.cat([features[:, :width], changed], 1), *args[1:])

            return before

        entries = enumerate(self._blocks)
        handles = [block.register_forward_pre_hook(hook(n, width)) for n, (block, width, _) in entries]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
