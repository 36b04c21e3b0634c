"""The nodes: load patches, apply them, encode a prompt behind the gates, read gates, erase, and judge images."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from erasure.comfyui import patching, reading
from erasure.errors import ErasureError
from erasure.evaluation.judges.judge import Judge, verdicts
from erasure.evaluation.judges.registry import find_judge
from erasure.evaluation.metrics.statistics import mcnemar, wilson
from erasure.method import ClosedFormMethod
from erasure.methods import names as method_names
from erasure.patch import Patch
from erasure.pipelines.gates.latent import LatentGate
from erasure.pipelines.gates.parse import parse_gate
from erasure.pipelines.loaded import Loaded, checked_name, checked_strength

CATEGORY = "erasure"
PATCHES, GATED = "ERASURE_PATCHES", "ERASURE_GATED"  # patches that are loaded; those that are gated, after applying
IN_FILE, ALWAYS = "as in the file", "always"
TEXT = ("STRING", {"multiline": True, "dynamicPrompts": True})
LINE = ("STRING", {"default": ""})
Entries = dict[str, Loaded]


def stacked(patch: Patch, strength: float, gate: str, patches: Entries | None) -> Entries:
    """Return patches with one more on top.

    Args:
        patch: the new patch.
        strength: factor on its change.
        gate: `as in the file`, or `always` to let the patch act on every prompt.
        patches: the patches below it.

    Raises:
        ErasureError: the gate is a latent one, which ComfyUI's sampling gives no place to, or is invalid.
    """
    below = dict(patches or {})
    chosen = None if gate == ALWAYS else parse_gate(patch)
    if isinstance(chosen, LatentGate):
        raise ErasureError(
            f"the patch of {', '.join(patch.names)} has a latent gate, which decides from the first steps of an image; "
            "these nodes evaluate text gates alone. To let it act on every prompt, set gate to always"
        )
    return {**below, checked_name(patch, None, below): Loaded(patch, checked_strength(strength), chosen)}


class LoadPatch:
    """Load a patch from the folder of LoRAs, on top of other patches."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", (PATCHES,), ("patches",)
    DESCRIPTION = "Loads a patch of Erasure from models/loras, with its gate. Chain several to stack them."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: a file of models/loras, the strength, the gate, and patches to stack it on."""
        import folder_paths

        files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
        return {
            "required": {
                "patch": (files,),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
                "gate": ([IN_FILE, ALWAYS],),
            },
            "optional": {"patches": (PATCHES,)},
        }

    @classmethod
    def IS_CHANGED(cls, patch: str, **others: Any) -> str:
        """Return what changes with the file, so that ComfyUI loads it again."""
        path = _lora_path(patch)
        return f"{path}:{os.stat(path).st_mtime_ns}"

    def load(self, patch: str, strength: float, gate: str, patches: Entries | None = None) -> tuple[Entries]:
        """Return the stack with the patch on top."""
        return (stacked(Patch.load(_lora_path(patch)), strength, gate, patches),)


def _lora_path(name: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise("loras", name))


class ApplyPatches:
    """Put patches without a gate on a model, and check that all patches fit it."""

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "CLIP", GATED), ("model", "clip", "gated")
    DESCRIPTION = (
        "Puts patches without a gate on the model and its text encoders. Patches with a gate go on to Encode Prompt, "
        "which must encode every prompt. Patches of other weights are refused unless other_base allows them."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: a model, its text encoders, the patches, and whether another base is allowed."""
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "patches": (PATCHES,),
                "other_base": (["refuse", "allow"],),
            }
        }

    def apply(self, model: Any, clip: Any, patches: Entries, other_base: str) -> tuple[Any, Any, Entries]:
        """Return the model and the text encoders with the patches that have no gate, and the patches that have one."""
        for name, entry in patches.items():
            patching.check(name, entry.patch, model, clip, other_base == "allow")
        gated = {name: entry for name, entry in patches.items() if entry.gate is not None}
        for name, entry in patches.items():
            if name not in gated and entry.strength:
                model, clip = patching.add(model, clip, entry)
        return model, clip, gated


class EncodePrompt:
    """Encode a prompt and its negative prompt, with every gated patch at the strength that its gate gives it there."""

    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "STRING")
    RETURN_NAMES = ("positive", "negative", "reading")
    DESCRIPTION = (
        "Encodes both prompts. The gates read the positive one, and each patch acts at that strength wherever these "
        "two conditionings are sampled, as in diffusers. Several of these nodes may feed Conditioning (Combine)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: text encoders, gated patches, and both prompts."""
        return {"required": {"clip": ("CLIP",), "gated": (GATED,), "positive": TEXT, "negative": TEXT}}

    def encode(self, clip: Any, gated: Entries, positive: str, negative: str) -> tuple[Any, Any, str]:
        """Return the conditionings of both prompts, and what the gates read."""
        import comfy.hooks

        strengths = reading.strengths(clip, gated, positive)
        encoders = patching.encoders_with(clip, gated, strengths)
        pair = [encoders.encode_from_tokens_scheduled(encoders.tokenize(text)) for text in (positive, negative)]
        group = patching.hooks_of(gated, strengths)
        if group is not None:  # one group for both: they share a batch, and the patch acts on both alike
            pair = [comfy.hooks.conditioning_set_values_with_hooks(part, {"hooks": group}) for part in pair]
        return pair[0], pair[1], reading_table({positive: strengths})


def reading_table(rows: dict[str, dict[str, float]]) -> str:
    """Return the strengths of patches as text, one line for each prompt and patch."""
    lines = [f"{value:6.3f}  {name}: {prompt}" for prompt, row in rows.items() for name, value in row.items()]
    return "\n".join(lines) or "no patch has a gate"


class ReadGates:
    """Show how strongly each gated patch would act on each of several prompts."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES, OUTPUT_NODE = CATEGORY, "read", ("STRING",), ("reading",), True
    DESCRIPTION = "Shows how strongly each gated patch acts on each prompt, one prompt a line."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: text encoders, gated patches, and prompts, one a line."""
        return {"required": {"clip": ("CLIP",), "gated": (GATED,), "prompts": TEXT}}

    def read(self, clip: Any, gated: Entries, prompts: str) -> dict[str, Any]:
        """Return the readings as text, which ComfyUI also shows and keeps in its history."""
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        text = reading_table({line: reading.strengths(clip, gated, line) for line in lines})
        return {"ui": {"text": [text]}, "result": (text,)}


class EraseConcept:
    """Erase a concept from a checkpoint by a closed form, and stack the patch."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "erase", (PATCHES,), ("patches",)
    DESCRIPTION = (
        "Erases a concept by a method that solves for new weights at once. The checkpoint is opened a second time, on "
        "the processor; take the one that the graph draws with. Empty fields take their defaults."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: a checkpoint file, the concept, its anchor, what to keep, the method and the strength."""
        import folder_paths

        return {
            "required": {
                "checkpoint": (folder_paths.get_filename_list("checkpoints"),),
                "concept": LINE,
                "method": (method_names(ClosedFormMethod),),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            },
            "optional": {"anchor": LINE, "keep": LINE, "patches": (PATCHES,)},
        }

    def erase(
        self,
        checkpoint: str,
        concept: str,
        method: str,
        strength: float,
        anchor: str = "",
        keep: str = "",
        patches: Entries | None = None,
    ) -> tuple[Entries]:
        """Return the stack with the new patch on top; `keep` separates names by commas."""
        import folder_paths

        from erasure.erasing import erase
        from erasure.model.base import Base

        fields: dict[str, Any] = {"name": concept}
        if anchor.strip():
            fields["anchor"] = anchor.strip()
        if kept := [name.strip() for name in keep.split(",") if name.strip()]:
            fields["keep"] = kept
        base = Base.load(folder_paths.get_full_path_or_raise("checkpoints", checkpoint), device="cpu")
        return (stacked(erase(base, fields, method, progress=False), strength, IN_FILE, patches),)


class JudgeImages:
    """Let a judge say how many images of a batch show a concept, with and without the patches."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = CATEGORY, "judge", ("FLOAT", "STRING"), True
    RETURN_NAMES = ("share", "report")
    DESCRIPTION = (
        "Says how many images of a batch show a concept. The judge is written as for erasure evaluate --judge: glyph, "
        "nudenet, clip:MODEL?labels=FILE. `without` takes the images of the same seeds without patches."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: images, a concept, a judge, and images of the same seeds without patches."""
        return {
            "required": {"images": ("IMAGE",), "concept": LINE, "judge": ("STRING", {"default": "glyph"})},
            "optional": {"without": ("IMAGE",)},
        }

    def judge(self, images: Tensor, concept: str, judge: str, without: Tensor | None = None) -> dict[str, Any]:
        """Return the share of images that show the concept, and a report with its interval."""
        looked = _judge(judge.strip())
        shown = shows(looked, concept, images)
        share = sum(shown) / len(shown)
        text = f"with patches: {_share(shown)} show {concept} (judge: {looked.name})"
        if without is not None:
            if len(without) != len(images):
                raise ErasureError(
                    f"`without` has {len(without)} images and `images` {len(images)}; they must be of the same seeds"
                )
            base = shows(looked, concept, without)
            pairs = list(zip(base, shown, strict=True))
            p_value = mcnemar(pairs.count((True, False)), pairs.count((False, True)))
            text += f"\nwithout patches: {_share(base)} show it\nMcNemar's test that both are equal: p = {p_value:.3g}"
        return {"ui": {"text": [text]}, "result": (share, text)}


@lru_cache(maxsize=2)
def _judge(spec: str) -> Judge:
    return find_judge(spec)


def shows(judge: Judge, concept: str, images: Tensor) -> list[bool]:
    """Return for each image whether the judge sees a concept in it.

    Args:
        judge: the judge.
        concept: a name that it knows.
        images: ComfyUI's images [n, height, width, 3], 0 to 1.

    Raises:
        ErasureError: the judge does not know the name, or there are no images.
    """
    from PIL import Image

    if not len(images):
        raise ErasureError("there are no images to judge")
    head, labels = judge.find(concept)
    pixels = (images[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
    scores = [verdict[head] for verdict in verdicts(judge, [Image.fromarray(image) for image in pixels])]
    return [max(score, key=lambda label: score[label]) in labels for score in scores]


def _share(shown: list[bool]) -> str:
    low, high = wilson(sum(shown), len(shown))
    return f"{sum(shown)} of {len(shown)} ({100 * low:.0f} to {100 * high:.0f} %)"


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "ErasureLoadPatch": LoadPatch,
    "ErasureApplyPatches": ApplyPatches,
    "ErasureEncodePrompt": EncodePrompt,
    "ErasureReadGates": ReadGates,
    "ErasureEraseConcept": EraseConcept,
    "ErasureJudgeImages": JudgeImages,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ErasureLoadPatch": "Erasure: Load Patch",
    "ErasureApplyPatches": "Erasure: Apply Patches",
    "ErasureEncodePrompt": "Erasure: Encode Prompt",
    "ErasureReadGates": "Erasure: Read Gates",
    "ErasureEraseConcept": "Erasure: Erase Concept",
    "ErasureJudgeImages": "Erasure: Judge Images",
}
