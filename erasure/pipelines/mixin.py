"""The mixin that adds the methods for patches to a diffusers pipeline class, and `load_patch` for any pipeline."""

from __future__ import annotations

import inspect
import json
import logging
import os
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from erasure.errors import ErasureError
from erasure.model.loading import open_pipeline
from erasure.patch import Patch
from erasure.patch.module_keys import NETWORKS
from erasure.pipelines.acting import Acting
from erasure.pipelines.stack import ATTRIBUTE, patch_stack
from erasure.pipelines.user_loras import LoraMixin

log = logging.getLogger(__name__)
PatchSource = str | os.PathLike[str] | Patch


def load_patch(
    pipe: Any, path_or_patch: PatchSource, name: str | None = None, strength: float = 1.0, force: bool = False
) -> str:
    """Load a patch into any diffusers pipeline; `patch_stack(pipe)` has the other methods for patches.

    Args:
        pipe: the pipeline. A gated patch needs one of the Erased classes (a `PatchMixin`).
        path_or_patch: a patch, or where to load one from: a file, or a repository `owner/name` of the Hugging Face hub.
        name: name for the patch (default: its concepts).
        strength: factor on its change; may be negative or above 1.
        force: whether to load it also onto another base than it was made from, provided that all shapes fit.

    Returns:
        The name of the patch on the pipeline.

    Raises:
        ErasureError: the file is damaged, the name is taken, the base is another one, or a shape does not fit. Nothing
            is changed then.
    """
    patch = path_or_patch if isinstance(path_or_patch, Patch) else Patch.load(path_or_patch)
    return patch_stack(pipe).load(patch, name, strength, force)


def load_patches(
    pipe: Any,
    patches: str | os.PathLike[str] | Mapping[str, PatchSource] | Iterable[PatchSource],
    strength: float = 1.0,
    force: bool = False,
) -> list[str]:
    """Load many patches into any diffusers pipeline at once; the time grows with their number.

    Args:
        pipe: the pipeline. Gated patches need one of the Erased classes (a `PatchMixin`).
        patches: a folder, of which every `.safetensors` file is loaded in the order of their names; or a list of
            patches, files or names on the hub; or a mapping from names to them.
        strength: factor on the change of each.
        force: whether to load them also onto another base than they were made from, provided that all shapes fit.

    Returns:
        The names of the patches on the pipeline.

    Raises:
        ErasureError: the folder does not exist or holds no patch, or as for `load_patch`. No patch is loaded then.
    """
    named: Iterable[tuple[str | None, PatchSource]]
    if isinstance(patches, str | os.PathLike):
        files = sorted(path for path in Path(patches).glob("*.safetensors") if path.is_file())
        if not files:
            raise ErasureError(f"{os.fspath(patches)} is not a folder with patches (.safetensors). Nothing was loaded")
        named = [(None, path) for path in files]
    elif isinstance(patches, Mapping):
        named = patches.items()
    else:
        named = [(None, patch) for patch in patches]
    read = [(name, patch if isinstance(patch, Patch) else Patch.load(patch)) for name, patch in named]
    return patch_stack(pipe).load_all(read, strength, force)


class PatchMixin(LoraMixin):
    """Methods for patches, to be listed before a diffusers pipeline class that has `encode_prompt`.

    Gates evaluate the prompt (also prompt_2 and prompt_3, where there are any), never the negative prompt. Under
    classifier-free guidance both halves of a batch get the strength of the prompt, as if a patch of that strength were
    folded into the weights.
    """

    _erasure_scope: ExitStack | None = None  # during a call: detaches what the gates have attached
    _erasure_acting: list[Acting] = []
    _erasure_prompts: list[str] | str | None = None
    _erasure_negative_apart = False  # whether the pipeline encodes the negative prompt in a call of its own, the second
    _erasure_encoded = False

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a checkpoint as a pipeline of this class.

        Args:
            model: `glyph`, a diffusers folder, a `.safetensors` file or a hub id.
            kwargs: options of `erasure.model.loading.open_pipeline`.

        Raises:
            ErasureError: `model` does not exist, or is not of the architecture of this class.
        """
        return open_pipeline(cls, model, **kwargs)

    def load_patch(
        self, path_or_patch: PatchSource, name: str | None = None, strength: float = 1.0, force: bool = False
    ) -> str:
        """Load a patch into this pipeline; see `erasure.load_patch` for the arguments and errors."""
        return load_patch(self, path_or_patch, name, strength, force)

    def load_patches(
        self,
        patches: str | os.PathLike[str] | Mapping[str, PatchSource] | Iterable[PatchSource],
        strength: float = 1.0,
        force: bool = False,
    ) -> list[str]:
        """Load a folder or list of patches at once, as `erasure.pipelines.load_patches` does."""
        return load_patches(self, patches, strength, force)

    def set_patches(self, patches: Mapping[str, float] | Iterable[str] | str) -> None:
        """Set the strengths of all patches: those that are not named get strength 0.

        Args:
            patches: `{name: strength}`, or a name or several names for strength 1.

        Raises:
            ErasureError: a name is not loaded, or a strength is not a finite number. Nothing is changed then.
        """
        patch_stack(self).set_patches(patches)

    def get_list_patches(self) -> dict[str, dict[str, Any]]:
        """Return for each loaded patch, by name and in order of loading, its strength and what its header says.

        Returns:
            Name -> a table with `strength`, `method`, `concepts`, `anchors`, `gate`, `kind`, `components`, `costs` and
            `bytes`.
        """
        return patch_stack(self).get_list_patches()

    def delete_patches(self, names: Iterable[str] | str) -> None:
        """Unload patches, and restore the base bit for bit in weights that no other patch changes.

        Args:
            names: a name or several names.

        Raises:
            ErasureError: a name is not loaded. Nothing is changed then.
        """
        patch_stack(self).delete_patches(names)

    def unload_patches(self) -> None:
        """Unload all patches, and restore the base in every weight, bit for bit."""
        patch_stack(self).unload_patches()

    def fuse_patches(self) -> None:
        """Fold gated patches into the weights too, so that they act on every prompt and a call runs no extra layers."""
        patch_stack(self).fuse_patches()

    def unfuse_patches(self) -> None:
        """Undo `fuse_patches`, so that the gates decide again."""
        patch_stack(self).unfuse_patches()

    @property
    def gate_log(self) -> list[dict[str, float]]:
        """Return for each prompt of the last call a table from patch name to the strength with which it acted."""
        return patch_stack(self).gate_log

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode the prompts as diffusers does; during a call, evaluate the gates for them first.

        Raises:
            ErasureError: a patched component was replaced, or a gate cannot be evaluated.
        """
        encode = super().encode_prompt  # type: ignore[misc]
        if self._erasure_scope is None or (self._erasure_negative_apart and self._erasure_encoded):
            return encode(*args, **kwargs)
        self._erasure_encoded = True
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        self._erasure_scope.close()
        rows, prompts = _prompts(bound.arguments, self._erasure_prompts)
        images = bound.arguments.get("num_images_per_prompt") or 1
        stack = patch_stack(self)
        if replaced := stack.strange(self):
            raise ErasureError(
                f"{', '.join(replaced)} was replaced while patches were loaded. Unload the patches before you "
                "replace it"
            )
        encoded = bound.arguments.get("prompt_embeds") is not None
        result = None
        # Without patches, so that the gates see the same prompts as always. A scaled LoRA would change the states.
        if not encoded and bound.arguments.get("lora_scale") is None:
            with stack.watching() as watched:
                result = encode(*args, **kwargs) if watched else None
        scope, self._erasure_scope = self._erasure_scope, None  # guards may encode their texts with this method
        try:
            self._erasure_acting = stack.open(prompts, rows, images, scope, encoded)
        finally:
            self._erasure_scope = scope
        if result is None or any(hook.component not in NETWORKS for hook in self._erasure_acting):
            return encode(*args, **kwargs)
        return result

    def __call__(self, *args: Any, erasure_prompts: list[str] | str | None = None, **kwargs: Any) -> Any:
        """Generate images as the diffusers pipeline does, with the loaded patches acting.

        Args:
            args: arguments of the diffusers pipeline.
            erasure_prompts: the texts that `prompt_embeds` encode, one per row, so that gates can evaluate them.
            kwargs: arguments of the diffusers pipeline.

        Returns:
            The output of the diffusers pipeline; `gate_log` holds the strengths with which the patches acted.

        Raises:
            ErasureError: a gate needs the text of a prompt that is passed as embeddings, or a gated layer never ran.
        """
        stack = patch_stack(self)
        stack.gate_log = []
        with ExitStack() as scope:
            scope.callback(self._erasure_end)
            self._erasure_scope, self._erasure_prompts = scope.enter_context(ExitStack()), erasure_prompts
            result = super().__call__(*args, **kwargs)  # type: ignore[misc]
            idle = sum(hook.calls == 0 for hook in self._erasure_acting)
            if idle and not getattr(self, "interrupt", False):
                raise ErasureError(
                    f"{idle} of {len(self._erasure_acting)} gated layers never ran, because other layers have replaced "
                    "them (fuse_qkv_projections does). Undo that, or use fuse_patches() before you fuse projections"
                )
        return result

    def _erasure_end(self) -> None:
        self._erasure_scope, self._erasure_prompts, self._erasure_acting = None, None, []
        self._erasure_encoded = False

    def register_modules(self, **kwargs: Any) -> None:
        """Register components as diffusers does, and share the stack of patches that are loaded on them."""
        super().register_modules(**kwargs)  # type: ignore[misc]
        patch_stack(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as diffusers does, with folded patches in the weights and without gated patches.

        A warning is logged for both kinds of patches. The folder is an ordinary checkpoint, so patches that are folded
        into it cannot be unloaded any more.
        """
        stack = patch_stack(self)
        acting = [name for name, entry in stack.get_list_patches().items() if entry["strength"]]
        gated = [name for name in acting if name in stack.gated]
        if folded := [name for name in acting if name not in gated]:
            log.warning(
                "save_pretrained writes the erased weights, in which %s cannot be unloaded any more", ", ".join(folded)
            )
        if gated:
            log.warning("save_pretrained leaves out %s, because gates and guards are no weights", ", ".join(gated))
        if stack.beside:
            log.warning(
                "save_pretrained leaves out what patches do at quantised layers, because it is not in the weights"
            )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Return the config that `save_pretrained` writes.

        It names the diffusers class instead of the erased one, so that diffusers can load the folder without this
        package.
        """
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = _diffusers_class(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _diffusers_class(cls: type[Any]) -> type[Any]:
    """Return the diffusers class that an erased class derives from."""
    return next(
        parent for parent in cls.__mro__ if issubclass(parent, DiffusionPipeline) and not issubclass(parent, PatchMixin)
    )


def sibling(pipe: Any, cls: type[PatchMixin]) -> Any:
    """Create another erased pipeline that shares the components and the stack of patches of a pipeline.

    Patches that are loaded, changed or unloaded on one of the two pipelines change both.

    Args:
        pipe: a diffusers pipeline.
        cls: class of the new pipeline; its components must be those of `pipe`.
    """
    parameters = inspect.signature(cls.__init__).parameters
    options = {key: value for key, value in pipe.config.items() if key in parameters and key not in pipe.components}
    other: Any = cls(**pipe.components, **options)
    setattr(other, ATTRIBUTE, patch_stack(pipe))
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return other


def _prompts(arguments: Mapping[str, Any], declared: list[str] | str | None) -> tuple[int, list[list[str]] | None]:
    """Return the number of prompts and the texts of each (several for a pipeline with several encoders).

    Args:
        arguments: arguments of `encode_prompt`.
        declared: `erasure_prompts` of the call.

    Returns:
        The number, and the texts of each prompt; None for the texts if only embeddings are known.

    Raises:
        ErasureError: texts are declared in addition to a prompt, or not exactly one for each row of embeddings.
    """
    prompt, *others = (arguments.get(name) for name in ("prompt", "prompt_2", "prompt_3"))
    if prompt is None:
        embeds = arguments.get("prompt_embeds")
        rows = 0 if embeds is None else int(embeds.shape[0])
        texts = [declared] if isinstance(declared, str) else declared
        if texts is not None and (len(texts) != rows or not all(isinstance(text, str) for text in texts)):
            raise ErasureError(
                f"erasure_prompts must be {rows} texts, one for each row of prompt_embeds, not {reprlib.repr(texts)}"
            )
        return rows, None if texts is None else [[text] for text in texts]
    if declared is not None:
        raise ErasureError("erasure_prompts describes prompt_embeds and cannot be combined with a prompt")
    # diffusers replaces an empty prompt_2 or prompt_3 by the prompt.
    given = (prompt, *(text for text in others if text))
    columns = [[text] if isinstance(text, str) else list(text) for text in given]
    rows = len(columns[0])
    return rows, [[column[row] for column in columns if row < len(column)] for row in range(rows)]
