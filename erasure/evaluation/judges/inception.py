"""Inception's features, for KID and FID as they are published (Heusel et al. 2017, arXiv 1706.08500).

The network is torch-fidelity's port of TensorFlow's of 2015-12-05, run as torchmetrics runs it (bilinear to 299
pixels, with antialiasing), so the features are those of torchmetrics' FrechetInceptionDistance. clean-fid and older
ports resize otherwise: figures of two libraries do not compare.
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
ALSO = ("pt_inception-2015-12-05-6726825d.pth",)  # pytorch-fid's copy
INSTALL = "pip install 'erasure-diffusion[distances]'"


class InceptionJudge(LabelsOnly):
    """Features only: it knows no label, and stands beside a judge that does."""

    name = "inception"

    def __init__(self, source: str | None = None, device: str | None = None) -> None:
        """Load the network; nothing is fetched.

        Args:
            source: a file of the weights; default: the one in torch's hub folder, under either of its names.
            device: torch device; default: the GPU if there is one.

        Raises:
            Absent: torchmetrics or torch-fidelity is not installed, or there are no weights.
            ErasureError: the file cannot be read or does not fit.
        """
        self.heads: dict[str, list[str]] = {}
        path = local_weights("inception", PUBLISHED, source, ALSO)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: F401
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError:
            raise NotInstalled(f"inception: torchmetrics and torch-fidelity are not installed; {INSTALL}") from None
        # The library unpickles whatever it is given: it gets a copy of what was read as data only.
        copy: Any = io.BytesIO()
        torch.save(read_weights(path), copy)
        copy.seek(0)
        with loading_errors(self.name, str(path)):
            self._network = FrechetInceptionDistance(feature_extractor_weights_path=copy).inception
        self._facts = weights_provenance(path, PUBLISHED)
        self._device = pick_device(device)
        self._network.to(self._device)

    def find(self, name: str) -> tuple[str, list[str]]:
        """Never.

        Raises:
            ErasureError: always.
        """
        raise ErasureError(f"inception gives features, not labels: it cannot judge {name!r}; use it as --features")

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Nothing of each image."""
        return [{} for _ in images]

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> np.ndarray:  # type: ignore[override]
        """Pooled features [n, 2048]."""
        found = []
        for part in batches(images):
            same = len({image.size for image in part}) == 1
            for some in [part] if same else [[image] for image in part]:
                found.append(self._network(pixels(some).to(self._device)).cpu())
        return torch.cat(found).numpy()

    def versions(self) -> dict[str, str]:
        """Libraries, weights and their hash."""
        libraries = (f"{name} {version(name)}" for name in ("torchmetrics", "torch-fidelity"))
        return {"library": ", ".join(libraries), **self._facts}


def pixels(images: list[Image.Image]) -> Tensor:
    """Bytes [n, 3, h, w] of RGB images of one size."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)
