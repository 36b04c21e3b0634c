"""Any image classifier of transformers or timm as a judge, its classes renamed or merged to the prompts' labels.

The most probable of ALL classes decides, as in the published evaluations (ESD and UnlearnDiffAtk: top-1 of ResNet-50
over ImageNet; UnlearnCanvas, arXiv 2402.11846: top-1 of its ViT-L): classes that the map does not name stay labels
of their own. A classifier says nothing about images unlike its training set: UnlearnCanvas's do not carry over to
other base models.
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
    """A classifier with its preprocessing: an RGB image to [3, h, w], images [n, 3, h, w] to logits [n, classes]."""

    module: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    classes: list[str]
    library: str


class ClassifierJudge(LabelsOnly):
    """One head whose labels are the classes of a network, renamed or merged.

    Verdicts hold the head's probabilities (softmax, summed over merged classes) and, under `<head>_classes`, the
    probability of every class of the network.
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
        """Load the classifier.

        Args:
            source: a folder or hub id of transformers; for timm a folder with config.json and model.safetensors,
                `hf-hub:ORG/NAME`, `timm/NAME`, or with `backend="timm"` a registered name; or a .pth file.
            head: what the labels are: object, style, identity.
            labels: label -> class names or numbers: a mapping, a YAML file of one, or labels that are class names.
            closed: choose among `labels` only (probabilities divided by their sum) instead of all classes.
            backend: one of BACKENDS; auto looks at the source.
            allow_pth: read a .pth file of UnlearnCanvas's form (`model_state_dict` of a timm network) with
                torch.load(weights_only=True).
            classes: names of the outputs in order, where the checkpoint does not say: a list, names separated by
                commas, or a .txt file. UnlearnCanvas's are in alphabetical order.
            architecture: timm name of the network in a .pth file.
            device: torch device; default: the GPU if there is one.

        Raises:
            ErasureError: it cannot be loaded, lacks weights or classes, or the labels do not fit.
        """
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        kind = _kind(source, backend)
        with loading_errors(self.name, source):
            if kind == "pth":
                network = _pth(source, architecture, allow_pth)
            else:
                network = _transformers(source) if kind == "transformers" else _timm(source)
        known = read_list(classes) if classes is not None else network.classes
        if len(known) != len(network.classes):
            raise ErasureError(f"{len(known)} class names for the {len(network.classes)} outputs of {source!r}")
        self.source = source
        self.classes = unique_names(known)
        self._groups = merge_classes(self.classes, read_labels(labels), closed)
        self.heads = {head: list(self._groups)}
        self._head, self._closed, self._mapped = head, closed, labels is not None
        self._device = pick_device(device)
        self._network = network
        network.module.eval().to(self._device)

    def find(self, name: str) -> tuple[str, list[str]]:
        """A label, or a class that a label stands for.

        Raises:
            ErasureError: neither.
        """
        if name in self._groups:
            return self._head, [name]
        for label, numbers in self._groups.items():
            if any(name == self.classes[number] for number in numbers):
                return self._head, [label]
        raise unknown_label("label of the classifier", name, self._groups)

    @torch.no_grad()
    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Probabilities of the labels and of every class, for each image."""
        found: list[Verdict] = []
        for part in batches(images):
            pixels = torch.stack([self._network.prepare(image) for image in part]).to(self._device)
            out = self._network.module(pixels)
            shares = getattr(out, "logits", out).float().softmax(1).cpu()
            if not shares.isfinite().all():
                raise ErasureError(f"{self.source!r} gives probabilities that are not numbers")
            found += [self._verdict(row) for row in shares]
        return found

    def _verdict(self, row: Tensor) -> Verdict:
        merged = torch.stack([row[numbers].sum() for numbers in self._groups.values()])
        if self._closed:
            merged = merged / merged.sum()
        verdict = {self._head: dict(zip(self._groups, merged.tolist(), strict=True))}
        if self._mapped:
            verdict[f"{self._head}_classes"] = dict(zip(self.classes, row.tolist(), strict=True))
        return verdict

    def versions(self) -> dict[str, str]:
        """Source, library, hash of the weights, and how classes became labels."""
        renamed = {k: [self.classes[n] for n in v] for k, v in self._groups.items()}
        changed = {label: names for label, names in renamed.items() if names != [label]}
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
    config = Path(source) / "config.json"
    try:
        written = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{config}: cannot be read: {fault}") from None
    # timm's configs name one architecture, transformers' a list under another key.
    return "timm" if "architecture" in written else "transformers"


def _transformers(source: str) -> Network:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
    check_complete(info, source)
    if model.config.problem_type not in (None, "single_label_classification"):
        raise ErasureError(f"{source!r} is for {model.config.problem_type}; a judge needs one class an image")
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
            raise ErasureError(f"{folder}: timm needs config.json and model.safetensors there")
        source = f"local-dir:{folder}"
    elif "/" in source and not source.startswith(("hf-hub:", "local-dir:")):
        source = f"hf-hub:{source}"
    model = timm.create_model(source, pretrained=True)
    classes = list(model.pretrained_cfg.get("label_names") or ())
    if not classes:
        subset = infer_imagenet_subset(model)
        known = ImageNetInfo(subset).index_to_description if subset else str
        classes = [known(i) for i in range(model.num_classes)]
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return Network(model, transform, classes, f"timm {version('timm')}")


def _pth(source: str, architecture: str, allowed: bool) -> Network:
    """UnlearnCanvas's checkpoints; images are stretched to the input size (bilinear), mean and deviation 0.5."""
    import timm
    from torchvision import transforms

    if not allowed:
        raise ErasureError(f"{source}: a pickled checkpoint is read only with allow_pth=true (as data, no code is run)")
    state = torch.load(source, map_location="cpu", weights_only=True)
    state = state.get("model_state_dict", state)
    if "head.weight" not in state:
        raise ErasureError(f"{source}: no head.weight; expected the `model_state_dict` of a timm network")
    model = timm.create_model(architecture, pretrained=False, num_classes=len(state["head.weight"]))
    model.load_state_dict(state)
    side = model.pretrained_cfg["input_size"][1:]
    steps = [transforms.Resize(side), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    classes = [str(i) for i in range(model.num_classes)]
    return Network(model, transforms.Compose(steps), classes, f"timm {version('timm')}")
