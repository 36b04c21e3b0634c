"""LPIPS, the learned distance of two pictures (Zhang et al. 2018, arXiv 1801.03924), by torchmetrics.

torchmetrics carries the linear weights; those of the backbone are torchvision's and must lie on the machine. ESD's
tables resize both pictures to 64 pixels first; here they stay as they were drawn.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any, cast

import torch
from PIL import Image
from torch.nn.functional import interpolate

from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.inception import INSTALL, pixels
from erasure.evaluation.judges.networks import (
    NotInstalled,
    loading_errors,
    local_weights,
    pick_device,
    read_weights,
    weights_provenance,
)

BACKBONES = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
LEAST = 64  # pixels a side; the backbones' poolings leave nothing of much smaller pictures


class Lpips:
    """The distance of pairs of pictures."""

    def __init__(self, spec: str = "alex", device: str | None = None) -> None:
        """Load the network; nothing is fetched.

        Args:
            spec: a backbone, or BACKBONE:FILE with its weights; default: the file in torch's hub folder.
            device: torch device; default: the GPU if there is one.

        Raises:
            Absent: torchmetrics is not installed, or there are no weights.
            ErasureError: no such backbone, or a file that cannot be read or does not fit.
        """
        self.backbone, _, given = spec.partition(":")
        if self.backbone not in BACKBONES:
            raise unknown("backbone of LPIPS", self.backbone, BACKBONES)
        what, published = f"lpips {self.backbone}", BACKBONES[self.backbone]
        path = local_weights(what, published, given or None)
        try:
            from torchmetrics.functional.image import lpips as library
        except ImportError:
            raise NotInstalled(f"{what}: torchmetrics is not installed; {INSTALL}") from None
        # torchmetrics' public class lets torchvision fetch and unpickle the backbone; this one begins at random.
        weights = read_weights(path)
        with loading_errors(what, str(path)):
            self._network = library._LPIPS(net=cast(Any, self.backbone), pnet_rand=True)
            names = {name: re.sub(r"^slices?\.?\d+", "features", name) for name in self._network.net.state_dict()}
            self._network.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
        self._facts = weights_provenance(path, published)
        self._device = pick_device(device)
        self._network.to(self._device)

    @torch.no_grad()
    def __call__(self, first: list[Image.Image], second: list[Image.Image]) -> list[float]:
        """The distance of each picture of `first` and its partner in `second`, all of one size; 0: they are equal.

        Raises:
            ErasureError: pictures of several sizes.
        """
        if len({image.size for image in (*first, *second)}) != 1:
            raise ErasureError("LPIPS compares pictures of one size")
        pairs = [pixels(images).to(self._device).float() / 127.5 - 1 for images in (first, second)]
        height, width = pairs[0].shape[-2:]
        if min(height, width) < LEAST:
            grown = [max(LEAST, round(side * LEAST / min(height, width))) for side in (height, width)]
            pairs = [interpolate(each, grown, mode="bilinear", align_corners=False) for each in pairs]
        return self._network(*pairs).flatten().tolist()

    def versions(self) -> dict[str, str]:
        """Library, backbone, its weights and their hash."""
        return {"library": f"torchmetrics {version('torchmetrics')}", "backbone": self.backbone, **self._facts}
