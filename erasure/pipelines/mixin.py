"""Patches on a diffusers pipeline: the mixin that gives a class the verbs, and `load_patch` for any pipeline."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from diffusers import DiffusionPipeline

from erasure.errors import ErasureError
from erasure.model.loading import open_pipeline
from erasure.patch import Patch
from erasure.pipelines.stack import ATTRIBUTE, Acting, patch_stack
from erasure.pipelines.user_loras import LoraMixin

log = logging.getLogger(__name__)
PatchSource = str | os.PathLike[str] | Patch


def load_patch(
    pipe: Any, path_or_patch: PatchSource, name: str | None = None, strength: float = 1.0, force: bool = False
) -> str:
    """Load a patch into any diffusers pipeline; `patch_stack(pipe)` has the other verbs.

    Args:
        pipe: the pipeline. A patch gated by text needs one of the Erased classes (a `PatchMixin`).
        path_or_patch: the file, or the patch itself.
        name: what to call it; by default its concept.
        strength: factor on its change; may be negative or above 1.
        force: load also onto another base than it was made from, where all shapes fit.

    Returns:
        The name.

    Raises:
        ErasureError: a damaged file, a taken name, a wrong base, shapes that do not fit. Nothing is changed then.
    """
    patch = path_or_patch if isinstance(path_or_patch, Patch) else Patch.load(path_or_patch)
    return patch_stack(pipe).load(patch, name, strength, force)


class PatchMixin(LoraMixin):
    """Verbs for patches, in front of a diffusers pipeline class that has `encode_prompt`.

    Gates look at the prompt (on XL at prompt_2 too), never at the negative prompt. Both halves of a guided batch get
    the prompt's strength, as if a patch of that strength were folded into the weights.
    """

    _erasure_scope: ExitStack | None = None  # what ends a call, during a call
    _erasure_acting: list[Acting] = []
    _erasure_prompts: list[str] | str | None = None

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The pipeline of a checkpoint: `glyph`, a diffusers folder, a `.safetensors` file or a hub id.

        See `erasure.model.loading.open_pipeline` for the options.

        Raises:
            ErasureError: `model` names nothing that this class can load.
        """
        return open_pipeline(cls, model, **kwargs)

    def load_patch(
        self, path_or_patch: PatchSource, name: str | None = None, strength: float = 1.0, force: bool = False
    ) -> str:
        """As `erasure.load_patch`, on this pipeline."""
        return load_patch(self, path_or_patch, name, strength, force)

    def set_patches(self, patches: Mapping[str, float] | Iterable[str] | str) -> None:
        """Let exactly these patches act: `{name: strength}`, or a name or names for strength 1. All others get 0."""
        patch_stack(self).set_patches(patches)

    def get_list_patches(self) -> dict[str, dict[str, Any]]:
        """Name -> strength, method, concepts, gate, kind and components of each patch loaded."""
        return patch_stack(self).get_list_patches()

    def delete_patches(self, names: Iterable[str] | str) -> None:
        """Take patches off."""
        patch_stack(self).delete_patches(names)

    def unload_patches(self) -> None:
        """Take all patches off: every weight is the base's again, bit for bit."""
        patch_stack(self).unload_patches()

    def fuse_patches(self) -> None:
        """Fold gated patches into the weights too, so that they act on every prompt alike."""
        patch_stack(self).fuse_patches()

    def unfuse_patches(self) -> None:
        """Undo `fuse_patches`."""
        patch_stack(self).unfuse_patches()

    @property
    def gate_log(self) -> list[dict[str, float]]:
        """For each prompt of the last call, patch name -> the strength it acted with."""
        return patch_stack(self).gate_log

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; within a call, the gates see the prompts here."""
        encode = super().encode_prompt  # type: ignore[misc]
        if self._erasure_scope is not None:
            given = inspect.signature(encode).bind(*args, **kwargs)
            given.apply_defaults()
            self._erasure_scope.close()
            rows, prompts = _prompts(given.arguments, self._erasure_prompts)
            images = given.arguments.get("num_images_per_prompt") or 1
            stack = patch_stack(self)
            if strange := stack.strange(self):
                raise ErasureError(
                    f"{', '.join(strange)} was replaced while patches were loaded; unload them before you replace it"
                )
            encoded = given.arguments.get("prompt_embeds") is not None
            self._erasure_acting = stack.open(prompts, rows, images, self._erasure_scope, encoded)
        return encode(*args, **kwargs)

    def __call__(self, *args: Any, erasure_prompts: list[str] | str | None = None, **kwargs: Any) -> Any:
        """As in diffusers, with the loaded patches at work.

        Args:
            args: those of diffusers.
            erasure_prompts: what `prompt_embeds` ask for, one text a row, for the gates.
            kwargs: those of diffusers.

        Raises:
            ErasureError: a gate cannot tell what is asked for, or a gated layer never ran.
        """
        stack = patch_stack(self)
        stack.gate_log = []
        with ExitStack() as scope:
            scope.callback(self._erasure_end)
            self._erasure_scope, self._erasure_prompts = scope.enter_context(ExitStack()), erasure_prompts
            result = super().__call__(*args, **kwargs)  # type: ignore[misc]
            idle = sum(one.calls == 0 for one in self._erasure_acting)
            if idle and not getattr(self, "interrupt", False):
                raise ErasureError(
                    f"{idle} of {len(self._erasure_acting)} gated layers never ran: something has taken their place "
                    "(fuse_qkv_projections). Load patches first, or use fuse_patches()"
                )
        return result

    def _erasure_end(self) -> None:
        self._erasure_scope, self._erasure_prompts, self._erasure_acting = None, None, []

    def register_modules(self, **kwargs: Any) -> None:
        """As in diffusers; over components that have patches the pipeline gets their stack."""
        super().register_modules(**kwargs)  # type: ignore[misc]
        patch_stack(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: writes the weights as they are, with what is folded in, without gated patches.

        A log says so. The folder is an ordinary checkpoint: what was folded in cannot be unloaded from it.
        """
        stack = patch_stack(self)
        acting = [name for name, entry in stack.get_list_patches().items() if entry["strength"]]
        gated = [name for name in acting if name in stack.gated]
        if folded := [name for name in acting if name not in gated]:
            log.warning("save_pretrained writes the erased weights, with %s folded in for good", ", ".join(folded))
        if gated:
            log.warning("save_pretrained leaves out %s: a gate cannot be folded into weights", ", ".join(gated))
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The config that `save_pretrained` writes; it names the diffusers class, so that anybody can load it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = _plain(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _plain(cls: type[Any]) -> type[Any]:
    """The diffusers class behind an erased one."""
    return next(one for one in cls.__mro__ if issubclass(one, DiffusionPipeline) and not issubclass(one, PatchMixin))


def sibling(pipe: Any, cls: type[PatchMixin]) -> Any:
    """Another erased pipeline over the same components and the same stack of patches.

    What is loaded, set or unloaded on one holds for both.
    """
    known = inspect.signature(cls.__init__).parameters
    switches = {key: value for key, value in pipe.config.items() if key in known and key not in pipe.components}
    other: Any = cls(**pipe.components, **switches)
    setattr(other, ATTRIBUTE, patch_stack(pipe))
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return other


def _prompts(given: Mapping[str, Any], declared: list[str] | str | None) -> tuple[int, list[list[str]] | None]:
    """Number of prompts, and the texts of each (a pipeline with two encoders takes two).

    Raises:
        ErasureError: texts declared beside a prompt, or not one for each row of embeddings.
    """
    prompt, second = given.get("prompt"), given.get("prompt_2")
    if prompt is None:
        embeds = given.get("prompt_embeds")
        rows = 0 if embeds is None else int(embeds.shape[0])
        texts = [declared] if isinstance(declared, str) else declared
        if texts is not None and (len(texts) != rows or not all(isinstance(text, str) for text in texts)):
            raise ErasureError(f"erasure_prompts: expected {rows} texts, one for each row of prompt_embeds")
        return rows, None if texts is None else [[text] for text in texts]
    if declared is not None:
        raise ErasureError("erasure_prompts says what prompt_embeds ask for; beside a prompt it has no meaning")
    # diffusers takes an empty prompt_2 for the prompt.
    columns = [[text] if isinstance(text, str) else list(text) for text in (prompt, second) if text or text is prompt]
    rows = len(columns[0])
    return rows, [[column[row] for column in columns if row < len(column)] for row in range(rows)]
