"""Inception's features, compared with torchmetrics' distances on random weights."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from erasure.errors import ErasureError
from erasure.evaluation.judges.inception import ALSO, PUBLISHED, to_bytes
from erasure.evaluation.judges.networks import NotInstalled, local_weights
from erasure.evaluation.judges.registry import find_judge
from erasure.evaluation.metrics.kid_fid import kid
from tests.evaluation.judging import noise


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Save random weights of Inception, and return the file."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    torch.manual_seed(0)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        network = extractor("random", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # as wide as it needs to be for features that tell pictures apart
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "mine.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kid_equals_torchmetrics(weights, nothing):
    from torchmetrics.image.fid import NoTrainInceptionV3
    from torchmetrics.image.kid import KernelInceptionDistance

    first, second = noise(6, 64), noise(12, 64)[6:]
    judge = find_judge(f"inception:{weights}")
    features, other_features = judge.features(first), judge.features(second)
    assert features.shape == (6, 2048) and features.std(0).max() > 1e-3
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    theirs = KernelInceptionDistance(network, subsets=1, subset_size=6)
    theirs.update(to_bytes(first), real=False)
    theirs.update(to_bytes(second), real=True)
    assert kid(features, other_features) == pytest.approx(float(theirs.compute()[0]), rel=1e-3, abs=1e-9)
    mixed = [first[0], second[0].resize((40, 40)), first[1]]
    assert np.allclose(judge.features(mixed)[[0, 2]], features[:2], rtol=1e-3, atol=1e-5)


def test_weights_are_found_in_torchs_folder(weights, nothing):
    name, folder = PUBLISHED.rpartition("/")[2], nothing / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ALSO[0]).symlink_to(weights)
    assert local_weights("x", PUBLISHED, None, ALSO).name == ALSO[0]
    (folder / name).symlink_to(weights)
    judge = find_judge("inception")
    versions = judge.versions()
    assert versions["weights"] == name and "6726825d" in versions["warning"] and "torch-fidelity" in versions["library"]
    assert judge.heads == {} and judge.judge(noise(2)) == [{}, {}] and judge.clip_scores(noise(1), ["a"]) == [None]
    with pytest.raises(ErasureError, match="features, not labels"):
        judge.find("cat")


def test_missing_weights_are_reported_and_not_downloaded(nothing):
    with pytest.raises(NotInstalled, match=r"inception: .*put .*6726825d\.pth \(https.*hub/checkpoints"):
        find_judge("inception")
    with pytest.raises(ErasureError, match="no file"):
        find_judge("inception:nothing.pth")


def test_a_file_of_something_else(nothing, tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ErasureError, match="inception judge: .*cannot be loaded"):
        find_judge(f"inception:{tmp_path / 'x.pth'}")
