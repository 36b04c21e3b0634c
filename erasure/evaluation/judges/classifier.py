"""A judge from any image classifier of transformers or timm, with its classes renamed or merged to labels.

The most probable of ALL classes decides, as in published evaluations (ESD and UnlearnDiffAtk: top-1 of ResNet-50 over
ImageNet; UnlearnCanvas, arXiv 2402.11846: top-1 of its ViT-L). Classes that the user's labels do not name therefore
stay labels of their own. A classifier is not valid for images unlike its training set: UnlearnCanvas's classifiers
cannot be used with other base models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.judge import LabelsOnly, Verdict
from erasure.evaluation.judges.labels import merge_classes, read_labels, read_list, unique_names, unknown_label
from erasure.evaluation.judges.networks import batches, check_complete, loading_errors, pick_device, weights_sha256

BACKENDS = ("auto", "transformers", "timm", "pth")
UNLEARNCANVAS = "vit_large_patch16_224.augreg_in21k"


@dataclass(frozen=True)
class Network:
    """A classifier network with its preprocessing and its classes.

    Args:
        module: the network, which maps images [n, 3, h, w] to logits [n, classes].
        prepare: the preprocessing, which maps an RGB image to a tensor [3, h, w].
        classes: names of the outputs, in order.
        library: name and version of the library it comes from.
    """

    module: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    classes: list[str]
    library: str


class ClassifierJudge(LabelsOnly):
    """A judge with one head, whose labels are the classes of a network, renamed or merged.

    Verdicts contain the probabilities of the labels (softmax, summed over merged classes). If labels were given, they
    also contain the probability of every class of the network, under `<head>_classes`.
    """

    name = "classifier"

    def __init__(
        self,
        source: str,
        head: str = "object",
        labels: str | Sequence[str] | Mapping[str, object] | None = None,
        closed: bool = False,
        backend: str = "auto",
        allow_pth: bool = False,
        classes: str | Sequence[str] | None = None,
        architecture: str = UNLEARNCANVAS,
        device: str | None = None,
    ) -> None:
        """Load the classifier and map its classes to labels.

        Args:
            source: a folder or hub id of transformers; for timm a folder with config.json and model.safetensors,
                `hf-hub:ORG/NAME`, `timm/NAME`, or a registered name together with `backend="timm"`; or a .pth file.
            head: what the labels describe: object, style or identity.
            labels: label -> class names or numbers, as a mapping or a YAML file; or a list of labels that are class
                names themselves.
            closed: choose only among `labels` (probabilities divided by their sum) instead of among all classes.
            backend: one of BACKENDS; `auto` infers it from the source.
            allow_pth: read a .pth file in UnlearnCanvas's format (the `model_state_dict` of a timm network) with
                torch.load(weights_only=True).
            classes: names of the outputs in order, for a checkpoint that does not name them: a list, comma-separated
                names, or a .txt file. UnlearnCanvas's are in alphabetical order.
            architecture: timm's name of the network in a .pth file.
            device: torch device; default: the GPU if there is one.

        Raises:
            ErasureError: the classifier cannot be loaded or lacks weights, or the classes or labels do not fit it.
        """
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        kind = _kind(source, backend)
        with loading_errors(self.name, source):
            if kind == "pth":
                network = _pth(source, architecture, allow_pth)
            else:
                network = _transformers(source) if kind == "transformers" else _timm(source)
        names = read_list(classes) if classes is not None else network.classes
        if len(names) != len(network.classes):
            raise ErasureError(
                f"{len(names)} class names were given, but {source!r} has {len(network.classes)} outputs"
            )
        self.source = source
        self.classes = unique_names(names)
        self._groups = merge_classes(self.classes, read_labels(labels), closed)
        self.heads = {head: list(self._groups)}
        self._head, self._closed, self._relabelled = head, closed, labels is not None
        self._device = pick_device(device)
        self._network = network
        network.module.eval().to(self._device)

    def find(self, name: str) -> tuple[str, list[str]]:
        """Return the head and the label that a name stands for: a label, or a class that belongs to one.

        Raises:
            ErasureError: the name is neither a label nor a class.
        """
        if name in self._groups:
            return self._head, [name]
        for label, numbers in self._groups.items():
            if any(name == self.classes[number] for number in numbers):
                return self._head, [label]
        raise unknown_label("label of the classifier", name, self._groups)

    @torch.no_grad()
    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Return the probabilities of the labels and of the classes for each image.

        Raises:
            ErasureError: the network returns probabilities that are not finite.
        """
        verdicts: list[Verdict] = []
        for batch in batches(images):
            pixels = torch.stack([self._network.prepare(image) for image in batch]).to(self._device)
            output = self._network.module(pixels)
            probabilities = getattr(output, "logits", output).float().softmax(1).cpu()
            if not probabilities.isfinite().all():
                raise ErasureError(f"{self.source!r} returned probabilities that are not finite")
            verdicts += [self._verdict(row) for row in probabilities]
        return verdicts

    def _verdict(self, row: Tensor) -> Verdict:
        merged = torch.stack([row[numbers].sum() for numbers in self._groups.values()])
        if self._closed:
            merged = merged / merged.sum()
        verdict = {self._head: dict(zip(self._groups, merged.tolist(), strict=True))}
        if self._relabelled:
            verdict[f"{self._head}_classes"] = dict(zip(self.classes, row.tolist(), strict=True))
        return verdict

    def versions(self) -> dict[str, str]:
        """Return the source, the library, the hash of the weights, and how classes were mapped to labels."""
        groups = {label: [self.classes[number] for number in numbers] for label, numbers in self._groups.items()}
        changed = {label: names for label, names in groups.items() if names != [label]}
        return {
            "source": self.source,
            "library": self._network.library,
            "sha256": weights_sha256(self._network.module),
            "labels": f"{len(self._groups)} of {len(self.classes)} classes" + (", closed" if self._closed else ""),
            "map": json.dumps(changed),
        }


def _kind(source: str, backend: str) -> str:
    if backend != "auto":
        return backend
    if Path(source).suffix in (".pth", ".pt"):
        return "pth"
    if source.startswith(("hf-hub:", "local-dir:", "timm/")):
        return "timm"
    path = Path(source) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{path}: cannot be read: {fault}") from None
    # timm's configs name one architecture; transformers' have a list under another key.
    return "timm" if "architecture" in config else "transformers"


def _transformers(source: str) -> Network:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
    check_complete(info, source)
    if model.config.problem_type not in (None, "single_label_classification"):
        raise ErasureError(f"{source!r} is a model for {model.config.problem_type}; a judge needs one class per image")
    processor = AutoImageProcessor.from_pretrained(source)

    def prepare(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt").pixel_values[0]

    classes = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return Network(model, prepare, classes, f"transformers {version('transformers')}")


def _timm(source: str) -> Network:
    import timm
    from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

    folder = Path(source.removeprefix("local-dir:"))
    if folder.is_dir():
        if not (folder / "model.safetensors").is_file():
            raise ErasureError(f"{folder}: a timm model needs config.json and model.safetensors in its folder")
        source = f"local-dir:{folder}"
    elif "/" in source and not source.startswith(("hf-hub:", "local-dir:")):
        source = f"hf-hub:{source}"
    model = timm.create_model(source, pretrained=True)
    classes = list(model.pretrained_cfg.get("label_names") or ())
    if not classes:
        subset = infer_imagenet_subset(model)
        describe = ImageNetInfo(subset).index_to_description if subset else str
        classes = [describe(i) for i in range(model.num_classes)]
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return Network(model, transform, classes, f"timm {version('timm')}")


def _pth(source: str, architecture: str, allowed: bool) -> Network:
    """Load a checkpoint of UnlearnCanvas, whose images are stretched to the input size; mean and deviation are 0.5."""
    import timm
    from torchvision import transforms

    if not allowed:
        raise ErasureError(
            f"{source} is a pickled checkpoint, which is read only with allow_pth=true (as data; no code in it is run)"
        )
    state = torch.load(source, map_location="cpu", weights_only=True)
    state = state.get("model_state_dict", state)
    if "head.weight" not in state:
        raise ErasureError(
            f"{source} has no head.weight: expected a timm network, saved under the key `model_state_dict`"
        )
    model = timm.create_model(architecture, pretrained=False, num_classes=len(state["head.weight"]))
    model.load_state_dict(state)
    side = model.pretrained_cfg["input_size"][1:]
    steps = [transforms.Resize(side), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    classes = [str(i) for i in range(model.num_classes)]
    return Network(model, transforms.Compose(steps), classes, f"timm {version('timm')}")
