"""Features of Inception v3, for KID and FID as published (Heusel et al. 2017, arXiv 1706.08500).

The network is torch-fidelity's port of TensorFlow's of 2015-12-05. It runs as in torchmetrics (bilinear resizing to 299
pixels with antialiasing), so that the features are those of torchmetrics' FrechetInceptionDistance. clean-fid and older
ports resize images differently: values of two libraries do not compare.
"""

from __future__ import annotations

import io
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.errors import ErasureError
from erasure.evaluation.judges.judge import LabelsOnly, Verdict
from erasure.evaluation.judges.networks import (
    NotInstalled,
    batches,
    loading_errors,
    local_weights,
    pick_device,
    read_weights,
    weights_provenance,
)

PUBLISHED = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
ALSO = ("pt_inception-2015-12-05-6726825d.pth",)  # the name of pytorch-fid's copy
INSTALL = "pip install 'erasure-diffusion[distances]'"


class InceptionJudge(LabelsOnly):
    """A provider of image features without any labels, to be combined with a judge that has labels."""

    name = "inception"

    def __init__(self, source: str | None = None, device: str | None = None) -> None:
        """Load the network from this machine; nothing is downloaded.

        Args:
            source: a file of the weights; default: the file in torch's hub folder, under either of its names.
            device: torch device; default: the GPU if there is one.

        Raises:
            NotInstalled: torchmetrics or torch-fidelity is not installed, or the weights are not on this machine.
            ErasureError: the file cannot be read or does not fit the network.
        """
        self.heads: dict[str, list[str]] = {}
        path = local_weights("inception", PUBLISHED, source, ALSO)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: F401
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError:
            raise NotInstalled(f"inception: torchmetrics and torch-fidelity are not installed; {INSTALL}") from None
        # The library unpickles any file it is given. It gets a copy of the tensors, which were read as data only.
        copy: Any = io.BytesIO()
        torch.save(read_weights(path), copy)
        copy.seek(0)
        with loading_errors(self.name, str(path)):
            self._network = FrechetInceptionDistance(feature_extractor_weights_path=copy).inception
        self._provenance = weights_provenance(path, PUBLISHED)
        self._device = pick_device(device)
        self._network.to(self._device)

    def find(self, name: str) -> tuple[str, list[str]]:
        """Refuse every name, because the network has no labels.

        Raises:
            ErasureError: always.
        """
        raise ErasureError(f"inception gives features, not labels, and cannot judge {name!r}: use it with --features")

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Return an empty verdict for each image."""
        return [{} for _ in images]

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> np.ndarray:  # type: ignore[override]
        """Return the pooled features [n, 2048] of the images."""
        parts = []
        for batch in batches(images):
            one_size = len({image.size for image in batch}) == 1
            for group in [batch] if one_size else [[image] for image in batch]:
                parts.append(self._network(to_bytes(group).to(self._device)).cpu())
        return torch.cat(parts).numpy()

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries, and the name and hash of the weights."""
        libraries = (f"{name} {version(name)}" for name in ("torchmetrics", "torch-fidelity"))
        return {"library": ", ".join(libraries), **self._provenance}


def to_bytes(images: list[Image.Image]) -> Tensor:
    """Convert images of one size to a byte tensor [n, 3, h, w] in RGB."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)
