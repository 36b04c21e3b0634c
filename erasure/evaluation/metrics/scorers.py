"""Scorers: networks that rate how good an image is, alone or for its prompt, such as an aesthetic predictor.

A scorer is written as `KIND:SOURCE`. `aesthetic` is built in; other packages add kinds by entry points of the group
`erasure.scorers`, callables that take the source and return a scorer. ImageReward and the like are such plug-ins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from erasure.errors import ErasureError, unknown
from erasure.evaluation.generate import read_image
from erasure.evaluation.judges.networks import NotInstalled
from erasure.evaluation.metrics.metric import Metric, mean_metric
from erasure.evaluation.metrics.target import JudgedImage, Target

GROUP = "erasure.scorers"
BATCH = 16  # images per batch
CLIP = "openai/clip-vit-large-patch14"  # the network whose features LAION's predictor was trained on


class Scorer(Protocol):
    """A network that rates images; higher is better.

    `name` appears in the report, and `versions` says what the scores depend on.
    """

    name: str

    def score(self, images: list[Image.Image], prompts: list[str]) -> Sequence[float]:
        """Return one score for each image of the prompt at the same place."""
        ...

    def versions(self) -> dict[str, str]:
        """Return names and versions or hashes of what the scores depend on."""
        ...


class AestheticScorer:
    """LAION's aesthetic predictor: a few linear layers over CLIP's normalised image features, about 1 to 10.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor and LAION-AI/aesthetic-predictor. Its
    layers have no activations between them, so that they are applied one after the other.
    """

    name = "aesthetic"

    def __init__(self, source: str) -> None:
        """Load the layers and CLIP.

        Args:
            source: `FILE` or `FILE?clip=CLIP`: a safetensors file with the layers' weights and biases, and the folder
                or hub id of the CLIP model whose features they take (default: CLIP).

        Raises:
            NotInstalled: the file or the CLIP model is not on this machine.
            ErasureError: the file holds no chain of linear layers, or it does not fit the CLIP model.
        """
        file, _, options = source.partition("?")
        key, _, clip = options.partition("=")
        if options and (key != "clip" or not clip):
            raise ErasureError(f"scorer aesthetic: expected ?clip=CLIP after the file, not {options!r}")
        path = Path(file)
        if not path.is_file():
            raise NotInstalled(
                f"aesthetic: {file or 'no file'} with the predictor's layers is not on this machine; give "
                "aesthetic:FILE.safetensors"
            )
        self._layers = _linear_layers(path)
        from erasure.evaluation.judges.clip import ClipJudge

        self._clip = ClipJudge(clip or CLIP)

    def score(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """Return the predicted rating of each image; the prompts are ignored."""
        values = torch.from_numpy(np.asarray(self._clip.features(images), dtype=np.float32))
        values = values / values.norm(dim=1, keepdim=True)
        for weight, bias in self._layers:
            if values.shape[1] != weight.shape[1]:
                raise ErasureError(
                    f"aesthetic: the layers take {weight.shape[1]} features and the CLIP model has {values.shape[1]}; "
                    "name the CLIP model that they were trained on"
                )
            values = values @ weight.T + bias
        scores: list[float] = values[:, 0].tolist()
        return scores

    def versions(self) -> dict[str, str]:
        """Return the versions of the CLIP model."""
        return {key: str(value) for key, value in self._clip.versions().items()}


def _linear_layers(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Read weights [out, in] and biases [out] of linear layers that follow each other, the last with one output."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise ErasureError(f"aesthetic: {path} cannot be read as safetensors: {fault}") from None
    numbers = {name: [int(part) for part in re.findall(r"\d+", name)] for name in tensors}
    weights = sorted((name for name in tensors if name.endswith("weight")), key=lambda name: numbers[name])
    layers = [(tensors[name].float(), tensors.get(name[: -len("weight")] + "bias")) for name in weights]
    fits = all(
        weight.ndim == 2 and bias is not None and bias.shape == weight.shape[:1] for weight, bias in layers
    ) and all(before[0].shape[0] == after[0].shape[1] for before, after in zip(layers, layers[1:], strict=False))
    if not layers or not fits or layers[-1][0].shape[0] != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ErasureError(
            f"aesthetic: {path} must hold linear layers (weight and bias) that follow each other and end in one "
            f"output; it has {shapes or 'no tensors'}"
        )
    return [(weight, bias.float()) for weight, bias in layers if bias is not None]


KINDS: dict[str, Callable[[str], Scorer]] = {"aesthetic": AestheticScorer}


def kinds() -> list[str]:
    """List every kind of scorer: `aesthetic`, and the entry points of other packages."""
    return sorted({*KINDS, *(point.name for point in entry_points(group=GROUP))})


def find_scorer(spec: str) -> Scorer:
    """Build a scorer from a text such as `aesthetic:FILE.safetensors`.

    Raises:
        NotInstalled: something that the scorer needs is not on this machine.
        ErasureError: there is no such kind, or its source is wrong.
    """
    kind, _, source = spec.partition(":")
    if kind in KINDS:
        return KINDS[kind](source)
    for point in entry_points(group=GROUP):
        if point.name == kind:
            scorer: Scorer = point.load()(source)
            return scorer
    raise ErasureError(f"{unknown('scorer', kind, kinds())}. A scorer is written as KIND:SOURCE")


def scorer_metrics(
    scorer: Scorer, runs: Mapping[str, list[JudgedImage]], folders: Mapping[str, Path], target: Target
) -> dict[str, list[Metric]]:
    """Return the mean scores of the target images and of the kept images of each run.

    Args:
        scorer: the scorer.
        runs: "base" and "patched" -> judged images.
        folders: "base" and "patched" -> folder of the run.
        target: what should be erased.

    Returns:
        "base" and "patched" -> SCORE_target and SCORE_kept, as far as there are images; an image that cannot be read
        is left out.

    Raises:
        ErasureError: the scorer returned another number of scores, or one that is not finite.
    """
    metrics: dict[str, list[Metric]] = {}
    for name, run in runs.items():
        kept = [image for image in run if target.is_kept(image)]
        parts = (("SCORE_target", target.plain_images(run), "target"), ("SCORE_kept", kept, "kept"))
        measured = []
        for metric, images, whose in parts:
            scored = [*_scores(scorer, images, folders[name])]
            values, prompts = [value for value, _ in scored], [prompt for _, prompt in scored]
            measured.append(mean_metric(metric, values, True, f"{scorer.name}'s score of {whose} images", prompts))
        metrics[name] = [metric for metric in measured if metric is not None]
    return metrics


def _scores(scorer: Scorer, images: list[JudgedImage], folder: Path) -> Iterator[tuple[float, str]]:
    """Yield the score and the prompt of every image that can be read."""
    for start in range(0, len(images), BATCH):
        pairs: list[tuple[Any, str]] = [
            (picture, image.record.prompt)
            for image in images[start : start + BATCH]
            if (picture := read_image(folder, image.record)) is not None
        ]
        if not pairs:
            continue
        prompts = [prompt for _, prompt in pairs]
        scores = list(scorer.score([picture for picture, _ in pairs], prompts))
        if len(scores) != len(pairs) or not np.isfinite(scores).all():
            raise ErasureError(f"{scorer.name} gave {scores} for {len(pairs)} images: one finite number each is needed")
        yield from zip(map(float, scores), prompts, strict=True)
