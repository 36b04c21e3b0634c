"""Fixtures: tiny random classifiers and CLIPs in folders, and a photograph."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.evaluation.judging import CLASSES, TOWER, write_clip


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Save a classifier of transformers to a folder."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorFast

    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    config = ViTConfig(image_size=32, patch_size=8, id2label=names, initializer_range=0.5, **TOWER)
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorFast(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Save a CLIP of transformers, with glyph's tokenizer, to a folder."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def photograph():
    """Return the portrait of Grace Hopper that matplotlib contains (U.S. Navy, public domain)."""
    from matplotlib import cbook

    with Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as image:
        return image.convert("RGB")


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """Point TORCH_HOME to an empty folder, forbid downloads, and return the folder."""

    def fetch(*arguments, **options):
        raise AssertionError(f"tried to fetch {arguments}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture
def squeeze(nothing):
    """Save a random SqueezeNet where torchvision keeps its own, and return the file."""
    import torchvision

    torch.manual_seed(0)
    path = nothing / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    return path
