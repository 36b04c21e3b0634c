"""Scorers: what they are given, what is averaged, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erasure.errors import ErasureError
from erasure.evaluation import evaluate
from erasure.evaluation.judges.clip import ClipJudge
from erasure.evaluation.judges.networks import NotInstalled
from erasure.evaluation.metrics.scorers import AestheticScorer, find_scorer
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.standin import BrightnessJudge
from tests.tiny import tiny_pipeline

IMAGES = [Image.new("RGB", (16, 16), (value, 40, 90)) for value in (0, 120, 250)]
ROWS = PromptSet(
    "tiny",
    [
        Prompt(f"r{i}", f"{'small ' * i}{label}", i, None, {"object": label, "style": "flat"})
        for i, label in enumerate(["cat", "cat", "dog", "dog"])
    ],
)


class Length:
    """Rates an image by the length of its prompt."""

    name = "length"

    def score(self, images, prompts):
        return [len(prompt) for prompt in prompts]

    def versions(self):
        return {"length": "1"}


def measured(folder, scorer):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    options = {"prompts": ROWS, "whole": True, "steps": 2, "progress": False}
    return evaluate(pipe, "cat", folder=folder, judge=BrightnessJudge(), scorer=scorer, **options)


def test_target_and_kept_images_are_rated_with_their_prompts(tmp_path):
    report = measured(tmp_path, Length())
    target, kept = report.metric("SCORE_target"), report.metric("SCORE_kept")
    assert (target.value, target.n) == ((3 + 9) / 2, 2) and (kept.value, kept.n) == ((15 + 21) / 2, 2)
    assert report.metric("SCORE_target", "base").value == 6 and target.higher_is_better
    assert report.provenance["distances"]["scorer"] == {"name": "length", "length": "1"}
    assert "length's score of target images" in target.meaning and "6.00" in report.text()


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")]])
def test_a_bad_answer_is_missing_and_the_rest_is_measured(tmp_path, scores):
    scorer = Length()
    scorer.score = lambda images, prompts: scores
    report = measured(tmp_path, scorer)
    assert report.metric("SCORE_target") is None and report.metric("UA") is not None
    assert len(report.missing) == 1 and "one finite number each is needed" in report.missing[0]


def test_the_aesthetic_layers_follow_each_other(clip, tmp_path):
    features = np.asarray(ClipJudge(str(clip)).features(IMAGES))
    d = features.shape[1]
    draw = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (5, d), "layers.2": (3, 5), "layers.10": (1, 3)}  # 10 comes after 2
    layers = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    layers |= {f"{name}.bias": torch.randn(shape[0], generator=draw) for name, shape in shapes.items()}
    save_file(layers, tmp_path / "head.safetensors")
    scorer = find_scorer(f"aesthetic:{tmp_path / 'head.safetensors'}?clip={clip}")
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    for name in shapes:
        expected = expected @ layers[f"{name}.weight"].numpy().T + layers[f"{name}.bias"].numpy()
    assert scorer.score(IMAGES, [""] * 3) == pytest.approx(expected[:, 0].tolist(), rel=1e-4)
    assert len(set(scorer.score(IMAGES, [""] * 3))) == 3


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(2, 8), "bias": torch.ones(2)},
        {"0.weight": torch.ones(4, 8), "0.bias": torch.ones(4), "1.weight": torch.ones(1, 5), "1.bias": torch.ones(1)},
        {"weight": torch.ones(1, 8)},
        {"other": torch.ones(3)},
    ],
)
def test_other_tensors_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ErasureError, match=r"must hold linear layers .* it has .*\["):
        AestheticScorer(str(tmp_path / "head.safetensors"))


def test_unknown_scorers_and_absent_files_are_told(tmp_path):
    with pytest.raises(ErasureError, match="unknown scorer 'aesthetics': did you mean 'aesthetic'"):
        find_scorer("aesthetics:x")
    with pytest.raises(NotInstalled, match="absent.safetensors with the predictor's layers is not on this machine"):
        find_scorer(f"aesthetic:{tmp_path / 'absent.safetensors'}")
    with pytest.raises(ErasureError, match=r"expected \?clip=CLIP after the file"):
        find_scorer("aesthetic:x?size=3")
    report = measured(tmp_path, f"aesthetic:{tmp_path / 'absent.safetensors'}")
    assert report.missing and report.metric("UA") is not None
