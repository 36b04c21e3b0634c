"""CLIP as a judge: zero-shot labels, CLIP scores and features, with transformers or open_clip.

Zero-shot (Radford et al. 2021): softmax over labels of 100 cos(image, text); several texts or templates of a label
are averaged as unit vectors. CLIP score: 100 cos (Hessel et al. 2021, without the cut at 0).
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


class ClipJudge:
    """Heads of labels given as texts. Verdicts also hold 100 cos of every label, under `<head>_cosines`."""

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
            labels: of one head: label -> text or texts, or labels that are their own text; or a YAML file. Without
                any, the judge gives CLIP scores and features only.
            head: what these labels are.
            heads: several heads instead: head -> labels; or a YAML file.
            template: what each text is put into, at `{}`; several (in a string separated by `|`) are averaged.
            device: torch device; default: the GPU if there is one.

        Raises:
            ErasureError: the model cannot be loaded, a template without {}, or a head with fewer than two labels.
        """
        self.source = source
        self.templates = template.split("|") if isinstance(template, str) else list(template)
        if not self.templates or not all("{}" in text for text in self.templates):
            raise ErasureError(f"template {template!r}: each needs {{}} where the label goes")
        written = read_yaml(heads) if isinstance(heads, str) else heads
        if written and labels:
            raise ErasureError("give `labels` of one head or `heads`, not both")
        texts = {name: read_labels(value) for name, value in (written or ({head: labels} if labels else {})).items()}
        for name, found in texts.items():
            if len(found) < 2:
                raise ErasureError(
                    f"head {name!r}: {', '.join(found) or 'no label'}; a judge chooses among two or more"
                )
        with loading_errors(self.name, source):
            self._model: Any = (_OpenClip if source.startswith(OPEN_CLIP) else _Transformers)(source)
        self._model.device = pick_device(device)
        self._model.module.eval().to(self._model.device)
        self._texts = texts
        self.heads = {name: list(found) for name, found in texts.items()}
        self._embedded = {name: self._embed(found) for name, found in texts.items()}

    def find(self, name: str) -> tuple[str, list[str]]:
        """A label, or a text that a label stands for.

        Raises:
            ErasureError: neither.
        """
        for wanted in (lambda label, _: name == label, lambda _, texts: name in texts):
            for head, labels in self._texts.items():
                found = [label for label, texts in labels.items() if wanted(label, texts)]
                if found:
                    return head, found
        raise unknown_label("label of the CLIP judge", name, [x for labels in self.heads.values() for x in labels])

    @torch.no_grad()
    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Softmax of 100 cos over each head's labels, for each image."""
        found: list[Verdict] = [{} for _ in images]
        seen = self._see(images)
        for head, embedded in self._embedded.items():
            cosines = SCALE * seen @ embedded.T
            for verdict, row, shares in zip(found, cosines.tolist(), cosines.softmax(1).tolist(), strict=True):
                verdict[head] = dict(zip(self.heads[head], shares, strict=True))
                verdict[f"{head}_cosines"] = dict(zip(self.heads[head], row, strict=True))
        return found

    @torch.no_grad()
    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """100 cos of each image and its text; a text longer than the context is cut."""
        said = torch.cat([self._model.texts([text]) for text in texts]).cpu()
        return (SCALE * (self._see(images) * said).sum(1)).tolist()

    def features(self, images: list[Image.Image]) -> np.ndarray:
        """Image embeddings [n, d] of root mean square 1."""
        found = self._see(images)
        return (found * found.shape[1] ** 0.5).numpy()

    def versions(self) -> dict[str, str]:
        """Source, library, hash of the weights, templates and labels."""
        return {
            "source": self.source,
            "library": self._model.library,
            "sha256": weights_sha256(self._model.module),
            "templates": " | ".join(self.templates),
            **{f"labels.{head}": ", ".join(labels) for head, labels in self.heads.items()},
        }

    @torch.no_grad()
    def _see(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors [n, d] of images, on the CPU."""
        found = torch.cat([F.normalize(self._model.images(part).float(), dim=-1).cpu() for part in batches(images)])
        if not found.isfinite().all():
            raise ErasureError(f"{self.source!r} gives features that are not numbers")
        return found

    @torch.no_grad()
    def _embed(self, labels: dict[str, list[str]]) -> Tensor:
        """Unit vectors [labels, d]: the mean over texts and templates of each label."""
        rows = []
        for texts in labels.values():
            filled = [template.replace("{}", text) for template in self.templates for text in texts]
            rows.append(F.normalize(self._model.texts(filled).mean(0), dim=-1))
        return torch.stack(rows).cpu()


class _Transformers:
    """CLIPModel: images to [n, d], texts to unit vectors [n, d]."""

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
        out = self.module.get_image_features(pixel_values=pixels.to(self.device))
        return getattr(out, "pooler_output", out)

    def texts(self, texts: list[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": self._length, "return_tensors": "pt"}
        out = self.module.get_text_features(**self._processor(text=texts, **options).to(self.device))
        return F.normalize(getattr(out, "pooler_output", out).float(), dim=-1)


class _OpenClip:
    """A model of open_clip, as `_Transformers`."""

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
            # open_clip only warns where weights were trained with another activation than the model's.
            options["force_quick_gelu"] = bool((open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu"))
        elif name.startswith("local-dir:") and not list(Path(name.removeprefix("local-dir:")).glob("*.safetensors")):
            raise ErasureError(f"{name}: no .safetensors there")
        self.module, _, self._prepare = open_clip.create_model_and_transforms(name, pretrained=weights, **options)
        self._tokens = open_clip.get_tokenizer(name)
        self.library = f"open_clip {version('open_clip_torch')}"

    def images(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([self._prepare(image) for image in images])
        return self.module.encode_image(pixels.to(self.device))  # type: ignore[operator]

    def texts(self, texts: list[str]) -> Tensor:
        found = self.module.encode_text(self._tokens(texts).to(self.device))  # type: ignore[operator]
        return F.normalize(found.float(), dim=-1)
