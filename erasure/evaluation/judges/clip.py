"""CLIP as a judge: zero-shot labels, CLIP scores and image features, with transformers or open_clip.

Zero-shot classification (Radford et al. 2021) is a softmax of 100 cos(image, text) over the labels; if a label has
several texts or templates, their unit vectors are averaged. The CLIP score is 100 cos (Hessel et al. 2021, without the
cut at 0).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from erasure.config import read_yaml
from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.judge import Verdict
from erasure.evaluation.judges.labels import read_labels, unknown_label
from erasure.evaluation.judges.networks import batches, check_complete, loading_errors, pick_device, weights_sha256

SCALE = 100.0
OPEN_CLIP = "open_clip:"
# Texts for image quality: well-formed images are close to the first group, broken ones to the second.
WELL_FORMED = (
    "a photo of something",
    "a clear picture of an object",
    "a drawing of something",
    "a painting of a scene",
)
BROKEN = (
    "random noise",
    "a blurry smear of colours",
    "a blank grey image",
    "scrambled image tiles",
    "a corrupted image",
)


class ClipJudge:
    """A zero-shot judge whose heads are lists of labels written as texts.

    Verdicts contain the probabilities of the labels and, under `<head>_cosines`, 100 cos of the image and each label.
    """

    name = "clip"

    def __init__(
        self,
        source: str,
        labels: str | Sequence[str] | Mapping[str, object] | None = None,
        head: str = "object",
        heads: str | Mapping[str, Any] | None = None,
        template: str | Sequence[str] = "a photo of {}",
        device: str | None = None,
    ) -> None:
        """Load the model and embed the labels.

        Args:
            source: a folder or hub id of transformers' CLIPModel; or `open_clip:MODEL/TAG`, `open_clip:MODEL/FILE`
                (a local checkpoint), `open_clip:hf-hub:ORG/NAME`, `open_clip:local-dir:FOLDER`.
            labels: labels of a single head: label -> text or texts, labels that are their own text, or a YAML file.
                Without labels the judge gives CLIP scores and features only.
            head: what these labels describe, such as object or style.
            heads: several heads instead of one: head -> labels, or a YAML file.
            template: a text with {} in the place of each label's text; several templates (in a string, separated by
                `|`) are averaged.
            device: torch device; default: the GPU if there is one.

        Raises:
            ErasureError: the model cannot be loaded, a template has no {}, or a head has fewer than two labels.
        """
        self.source = source
        self.templates = template.split("|") if isinstance(template, str) else list(template)
        if not self.templates or not all("{}" in text for text in self.templates):
            raise ErasureError(f"template {template!r}: every template needs {{}} in the place of the label")
        by_head = read_yaml(heads) if isinstance(heads, str) else heads
        if by_head and labels:
            raise ErasureError("give either `labels` for one head or `heads` for several, not both")
        texts = {name: read_labels(value) for name, value in (by_head or ({head: labels} if labels else {})).items()}
        for name, group in texts.items():
            if len(group) < 2:
                raise ErasureError(
                    f"head {name!r} has {', '.join(group) or 'no label'}: a judge needs at least two labels to choose "
                    "from"
                )
        with loading_errors(self.name, source):
            self._model: Any = (_OpenClip if source.startswith(OPEN_CLIP) else _Transformers)(source)
        self._model.device = pick_device(device)
        self._model.module.eval().to(self._model.device)
        self._texts = texts
        self.heads = {name: list(group) for name, group in texts.items()}
        self._embedded = {name: self._embed(group) for name, group in texts.items()}

    def find(self, name: str) -> tuple[str, list[str]]:
        """Return the head and the labels that a name stands for: a label, or else a text of one or more labels.

        Raises:
            ErasureError: the name is neither a label nor a text.
        """
        for is_match in (lambda label, _: name == label, lambda _, texts: name in texts):
            for head, labels in self._texts.items():
                matches = [label for label, texts in labels.items() if is_match(label, texts)]
                if matches:
                    return head, matches
        raise unknown_label("label of the CLIP judge", name, [x for labels in self.heads.values() for x in labels])

    @torch.no_grad()
    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Return, for each image and head, the softmax of 100 cos over the labels."""
        verdicts: list[Verdict] = [{} for _ in images]
        vectors = self._embed_images(images)
        for head, embedded in self._embedded.items():
            cosines = SCALE * vectors @ embedded.T
            rows = zip(verdicts, cosines.tolist(), cosines.softmax(1).tolist(), strict=True)
            for verdict, scores, probabilities in rows:
                verdict[head] = dict(zip(self.heads[head], probabilities, strict=True))
                verdict[f"{head}_cosines"] = dict(zip(self.heads[head], scores, strict=True))
        return verdicts

    @torch.no_grad()
    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """Return 100 cos of each image and its text.

        Args:
            images: n images.
            texts: n texts; those longer than CLIP's context are truncated.
        """
        text_vectors = torch.cat([self._model.texts([text]) for text in texts]).cpu()
        return (SCALE * (self._embed_images(images) * text_vectors).sum(1)).tolist()

    @torch.no_grad()
    def quality(self, images: list[Image.Image]) -> list[float]:
        """Return, for each image, the probability of WELL_FORMED against BROKEN, from the softmax of 100 cos."""
        texts = torch.cat([self._model.texts([text]) for text in (*WELL_FORMED, *BROKEN)]).cpu()
        probabilities = (SCALE * self._embed_images(images) @ texts.T).softmax(1)
        return probabilities[:, : len(WELL_FORMED)].sum(1).clamp(0, 1).tolist()

    def features(self, images: list[Image.Image]) -> np.ndarray:
        """Return the image embeddings [n, d], scaled to a root mean square of 1."""
        vectors = self._embed_images(images)
        return (vectors * vectors.shape[1] ** 0.5).numpy()

    def versions(self) -> dict[str, str]:
        """Return the source, the library, the hash of the weights, the templates and the labels."""
        return {
            "source": self.source,
            "library": self._model.library,
            "sha256": weights_sha256(self._model.module),
            "templates": " | ".join(self.templates),
            **{f"labels.{head}": ", ".join(labels) for head, labels in self.heads.items()},
        }

    @torch.no_grad()
    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        """Return unit vectors [n, d] of the images, on the CPU."""
        parts = [F.normalize(self._model.images(batch).float(), dim=-1).cpu() for batch in batches(images)]
        vectors = torch.cat(parts)
        if not vectors.isfinite().all():
            raise ErasureError(f"{self.source!r} returned image features that are not finite")
        return vectors

    @torch.no_grad()
    def _embed(self, labels: dict[str, list[str]]) -> Tensor:
        """Return unit vectors [labels, d], each the mean over the texts and templates of a label."""
        rows = []
        for texts in labels.values():
            filled = [template.replace("{}", text) for template in self.templates for text in texts]
            rows.append(F.normalize(self._model.texts(filled).mean(0), dim=-1))
        return torch.stack(rows).cpu()


class _Transformers:
    """A CLIPModel of transformers, which maps images to vectors [n, d] and texts to unit vectors [n, d]."""

    device: torch.device

    def __init__(self, source: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.module, info = CLIPModel.from_pretrained(source, output_loading_info=True)
        check_complete(info, source)
        self._processor = CLIPProcessor.from_pretrained(source)
        self._length = self.module.config.text_config.max_position_embeddings
        self.library = f"transformers {version('transformers')}"

    def images(self, images: list[Image.Image]) -> Tensor:
        pixels = self._processor(images=images, return_tensors="pt").pixel_values
        output = self.module.get_image_features(pixel_values=pixels.to(self.device))
        return getattr(output, "pooler_output", output)

    def texts(self, texts: list[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": self._length, "return_tensors": "pt"}
        output = self.module.get_text_features(**self._processor(text=texts, **options).to(self.device))
        return F.normalize(getattr(output, "pooler_output", output).float(), dim=-1)


class _OpenClip:
    """A model of open_clip with the interface of `_Transformers`."""

    device: torch.device
    module: nn.Module

    def __init__(self, source: str) -> None:
        import open_clip

        name, weights = source.removeprefix(OPEN_CLIP), None
        options: dict[str, Any] = {}
        if not name.startswith(("hf-hub:", "local-dir:")):
            name, _, weights = name.partition("/")
            if name not in open_clip.list_models():
                raise unknown_label("model of open_clip", name, open_clip.list_models())
            tags = open_clip.list_pretrained_tags_by_model(name)
            if weights not in tags and not os.path.isfile(weights):
                raise unknown(f"weights of {name} (or a checkpoint file)", weights, tags)
            # open_clip only warns if the weights were trained with another activation than the model's.
            options["force_quick_gelu"] = bool((open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu"))
        elif name.startswith("local-dir:") and not list(Path(name.removeprefix("local-dir:")).glob("*.safetensors")):
            raise ErasureError(f"{name}: there is no .safetensors file in this folder")
        self.module, _, self._prepare = open_clip.create_model_and_transforms(name, pretrained=weights, **options)
        self._tokens = open_clip.get_tokenizer(name)
        self.library = f"open_clip {version('open_clip_torch')}"

    def images(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([self._prepare(image) for image in images])
        return self.module.encode_image(pixels.to(self.device))  # type: ignore[operator]

    def texts(self, texts: list[str]) -> Tensor:
        vectors = self.module.encode_text(self._tokens(texts).to(self.device))  # type: ignore[operator]
        return F.normalize(vectors.float(), dim=-1)
