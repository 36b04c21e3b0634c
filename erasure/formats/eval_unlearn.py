"""Patches as a technique of eval-unlearn 1.1: `technique: {name: erasure, config: {...}}` in its configurations.

eval-unlearn finds the class below by the entry point `eval_unlearn.techniques`, passes the configuration as keywords,
and calls `generate`. Nothing of eval-unlearn is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError, unknown

if TYPE_CHECKING:
    from PIL import Image

FIELDS = (
    *("erase_concept", "model_id", "patches", "method", "settings", "strength"),
    *("device", "num_inference_steps", "guidance_scale"),
)


class ErasureTechnique:
    """A checkpoint with patches, which draws prompts.

    Args:
        config: `erase_concept` (a name); `model_id` (what `erasure erase --model` takes; default: glyph); either
            `patches` (a file or a list of files) or `method` with `settings` (a mapping), which erases the concept
            first; `strength` (1.0), `device`, `num_inference_steps` and `guidance_scale` (default: the checkpoint's).

    Raises:
        ErasureError: a key is unknown, the concept is missing, both or neither of patches and method are given, or the
            model or a patch cannot be loaded.
    """

    def __init__(self, **config: Any) -> None:
        from erasure.model.loading import sampling_of
        from erasure.pipelines import load_pipeline

        for key in config:
            if key not in FIELDS:
                raise unknown("key of the technique erasure", key, FIELDS)
        concept = config.get("erase_concept")
        if not isinstance(concept, str) or not concept.strip():
            raise ErasureError("the technique erasure needs `erase_concept`, the name of the concept")
        if bool(config.get("patches")) == bool(config.get("method")):
            raise ErasureError("the technique erasure needs either `patches` or `method`")
        model = config.get("model_id") or "glyph"
        patches = _patches(config, model, concept)
        self.pipe = load_pipeline(model, device=config.get("device"))
        self.pipe.set_progress_bar_config(disable=True)
        for patch in patches:
            self.pipe.load_patch(patch, strength=float(config.get("strength", 1.0)))
        own = sampling_of(self.pipe, config.get("num_inference_steps"), config.get("guidance_scale"))
        self.steps, self.guidance = own.steps, own.guidance

    def generate(self, prompts: list[str], seed: int | None = None, **more: Any) -> list[Image.Image]:
        """Draw one image for each prompt.

        Args:
            prompts: the prompts.
            seed: image i gets the noise of `seed` + i; None: noise that differs from call to call.
            more: `num_inference_steps` and `guidance_scale` of this call, and other arguments of the pipeline.
        """
        import torch

        from erasure.model.loading import call_of

        steps, guidance = more.pop("num_inference_steps", self.steps), more.pop("guidance_scale", self.guidance)
        images = []
        for number, prompt in enumerate(prompts):
            noise = None if seed is None else torch.Generator("cpu").manual_seed(seed + number)
            options = {**call_of(self.pipe, 1, guidance), "num_inference_steps": steps, **more}
            images += self.pipe(prompt=prompt, generator=noise, **options).images
        return images


def _patches(config: Mapping[str, Any], model: str, concept: str) -> Sequence[Any]:
    """Return the files of patches, or one patch that is made now."""
    files = config.get("patches")
    if files:
        return [files] if isinstance(files, str) else list(files)
    from erasure.erasing import erase

    return [erase(model, concept, config["method"], progress=False, **dict(config.get("settings") or {}))]
