"""LPIPS, the learned perceptual distance between two images (Zhang et al. 2018, arXiv 1801.03924), by torchmetrics.

torchmetrics contains the linear weights; the weights of the backbone are torchvision's and must already be on this
machine. ESD's tables resize both images to 64 pixels first; here images are compared at the size they were drawn.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any, cast

import torch
from PIL import Image
from torch.nn.functional import interpolate

from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.inception import INSTALL, to_bytes
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
MIN_SIDE = 64  # pixels; the pooling layers of the backbones reduce much smaller images to nothing


class Lpips:
    """The LPIPS network with one of the backbones of torchvision."""

    def __init__(self, spec: str = "alex", device: str | None = None) -> None:
        """Load the network from this machine; nothing is downloaded.

        Args:
            spec: name of a backbone, or BACKBONE:FILE with a file of its weights; without a file, the weights in
                torch's hub folder are used.
            device: torch device; default: the GPU if there is one.

        Raises:
            NotInstalled: torchmetrics is not installed, or the weights are not on this machine.
            ErasureError: the backbone is unknown, or the file cannot be read or does not fit the backbone.
        """
        self.backbone, _, file = spec.partition(":")
        if self.backbone not in BACKBONES:
            raise unknown("backbone of LPIPS", self.backbone, BACKBONES)
        name, published = f"lpips {self.backbone}", BACKBONES[self.backbone]
        path = local_weights(name, published, file or None)
        try:
            from torchmetrics.functional.image import lpips as library
        except ImportError:
            raise NotInstalled(f"{name}: torchmetrics is not installed; {INSTALL}") from None
        # torchmetrics' public class lets torchvision download and unpickle the backbone; this class starts from random
        # weights, which are then replaced.
        weights = read_weights(path)
        with loading_errors(name, str(path)):
            self._network = library._LPIPS(net=cast(Any, self.backbone), pnet_rand=True)
            keys = {key: re.sub(r"^slices?\.?\d+", "features", key) for key in self._network.net.state_dict()}
            self._network.net.load_state_dict({key: weights[theirs] for key, theirs in keys.items()})
        self._provenance = weights_provenance(path, published)
        self._device = pick_device(device)
        self._network.to(self._device)

    @torch.no_grad()
    def __call__(self, first: list[Image.Image], second: list[Image.Image]) -> list[float]:
        """Return the distance between each image of `first` and its partner in `second`.

        Args:
            first: n images.
            second: n images of the same size.

        Returns:
            n distances; 0 means that the two images are equal.

        Raises:
            ErasureError: the images have different sizes.
        """
        if len({image.size for image in (*first, *second)}) != 1:
            raise ErasureError("LPIPS compares images of the same size only")
        pair = [to_bytes(images).to(self._device).float() / 127.5 - 1 for images in (first, second)]
        height, width = pair[0].shape[-2:]
        if min(height, width) < MIN_SIDE:
            size = [max(MIN_SIDE, round(side * MIN_SIDE / min(height, width))) for side in (height, width)]
            pair = [interpolate(images, size, mode="bilinear", align_corners=False) for images in pair]
        return self._network(*pair).flatten().tolist()

    def versions(self) -> dict[str, str]:
        """Return the library's version, the backbone, and the name and hash of its weights."""
        return {"library": f"torchmetrics {version('torchmetrics')}", "backbone": self.backbone, **self._provenance}
