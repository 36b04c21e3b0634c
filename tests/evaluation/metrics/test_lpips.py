"""LPIPS compared with torchmetrics on the same random weights, without any download."""

from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from erasure.errors import ErasureError
from erasure.evaluation.judges.networks import NotInstalled
from erasure.evaluation.metrics.lpips import BACKBONES, Lpips
from tests.evaluation.judging import noise


def tensor(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def theirs(backbone, first, second):
    """Return the distances by torchmetrics' public class, image by image."""
    metric = LearnedPerceptualImagePatchSimilarity(net_type=backbone, reduction="none")
    return [float(metric(tensor([a]), tensor([b]))) for a, b in zip(first, second, strict=True)]


def test_lpips_equals_torchmetrics_with_the_file_in_torchs_folder(squeeze):
    first, second = noise(4, 96), noise(5, 96)[1:]
    net = Lpips("squeeze")
    distances = net(first, second)
    assert distances == pytest.approx(theirs("squeeze", first, second), rel=1e-4)
    assert np.std(distances) > 0.01 * np.mean(distances) > 0
    assert net(first, first) == [0.0] * 4
    versions = net.versions()
    assert versions["weights"] == squeeze.name and "not the published weights" in versions["warning"]
    assert (
        len(versions["sha256"]) == 64
        and versions["backbone"] == "squeeze"
        and versions["library"].startswith("torchmetrics")
    )


@pytest.mark.parametrize(("backbone", "builder"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, monkeypatch, backbone, builder, end):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    features = getattr(torchvision.models, builder)().features
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    path = tmp_path / f"mine{end}"
    save_file(weights, path) if end == ".safetensors" else torch.save(weights, path)
    first, second = noise(2, 70), noise(3, 70)[1:]
    distances = Lpips(f"{backbone}:{path}")(first, second)
    monkeypatch.setattr(torchvision.models, builder, lambda weights: SimpleNamespace(features=features))
    assert distances == pytest.approx(theirs(backbone, first, second), rel=1e-4)


def test_small_images_are_enlarged_and_sizes_must_agree(squeeze):
    first, second = noise(2, 16), noise(3, 16)[1:]
    distances = Lpips("squeeze")(first, second)

    def grown(images):
        both = torch.nn.functional.interpolate(tensor(images), (96, 64), mode="bilinear", align_corners=False)
        return both.clamp(-1, 1)

    metric = LearnedPerceptualImagePatchSimilarity(net_type="squeeze", reduction="none")
    assert first[0].size == (16, 24)
    assert distances == pytest.approx(metric(grown(first), grown(second)).tolist(), rel=1e-4)
    with pytest.raises(ErasureError, match="the same size"):
        Lpips("squeeze")(first, noise(2, 20))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_missing_weights_are_reported_with_their_folder_and_not_downloaded(nothing, backbone):
    name = BACKBONES[backbone].rpartition("/")[2]
    with pytest.raises(
        NotInstalled, match=rf"lpips {backbone}.*put {name} \(https://.*hub/checkpoints, or name a file"
    ):
        Lpips(backbone)


def test_a_missing_library_is_reported_with_its_installation(squeeze, monkeypatch):
    from erasure.evaluation.judges.inception import InceptionJudge

    for module in ("torchmetrics.functional.image", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotInstalled, match=r"torchmetrics is not installed; pip install .*\[distances\]"):
        Lpips("squeeze")
    with pytest.raises(NotInstalled, match=r"torch-fidelity are not installed; pip install .*\[distances\]"):
        InceptionJudge(str(squeeze))


def test_files_that_are_not_weights(nothing, tmp_path):
    with pytest.raises(ErasureError, match="did you mean 'alex'"):
        Lpips("alexx")
    with pytest.raises(ErasureError, match="no file") as fault:
        Lpips(f"alex:{tmp_path / 'none.pth'}")
    assert not isinstance(fault.value, NotInstalled)  # a name mistyped ends the run before anything is drawn
    path = tmp_path / "a.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ErasureError, match="cannot be loaded"):
        Lpips(f"squeeze:{path}")
    torch.save({"features": "text"}, path)
    with pytest.raises(ErasureError, match="tensors by name"):
        Lpips(f"squeeze:{path}")


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_runs_no_code(nothing, tmp_path):
    path, mark = tmp_path / "trap.pth", tmp_path / "mark"
    for write in (lambda x: torch.save(x, path), lambda x: path.write_bytes(pickle.dumps(x))):
        write({"features.0.weight": Trap(mark)})
        with pytest.raises(ErasureError, match="weights cannot be read"):
            Lpips(f"squeeze:{path}")
        assert not mark.exists()


def test_images_of_any_mode(squeeze):
    grey = [image.convert("L") for image in noise(2)]
    assert Lpips("squeeze")(grey, [Image.merge("RGB", [image] * 3) for image in grey]) == [0.0, 0.0]
