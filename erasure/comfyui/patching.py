"""Patches on ComfyUI's models: which weights they change there, and how they are added, for all prompts or for one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.diff import check_diff, differences
from erasure.patch import Delta, LowRank, Patch, same_base
from erasure.patch.fingerprint import QUANTISED, fingerprint_tensors
from erasure.patch.module_keys import NETWORKS
from erasure.patch.serialization import encode, layer_keys
from erasure.pipelines.loaded import Loaded

log = logging.getLogger(__name__)
Target = str | tuple[Any, ...]  # a weight of ComfyUI's model, or a part of one


def lora_tensors(patch: Patch) -> dict[str, Tensor]:
    """Return a patch as the tensors of a LoRA file that ComfyUI reads.

    Args:
        patch: the patch; differences of whole weights become `.diff` and `.diff_b` tensors.

    Raises:
        ErasureError: the patch holds differences of a transformer, or of parameters that are no weight or bias.
    """
    if isinstance(patch.payload, LowRank):
        return encode(patch.payload, "fp32")[0]
    try:
        check_diff(patch)
    except ErasureError as fault:
        raise ErasureError(f"ComfyUI cannot take this patch: a file of differences {fault}") from None
    return differences(patch.weights)


def targets(model: Any, clip: Any) -> dict[str, Target]:
    """Map the prefixes of LoRA keys to the weights of a model and of its text encoders, as ComfyUI does.

    Args:
        model: a MODEL of ComfyUI.
        clip: a CLIP of ComfyUI.
    """
    import comfy.lora

    table: dict[str, Target] = comfy.lora.model_lora_keys_unet(model.model, {})
    return dict(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, table))


def check(name: str, patch: Patch, model: Any, clip: Any, other_base: bool) -> list[str]:
    """Check that a patch fits a model, and return the keys of layers that ComfyUI has none for.

    Args:
        name: name of the patch, for messages.
        patch: the patch.
        model: a MODEL of ComfyUI.
        clip: a CLIP of ComfyUI.
        other_base: whether the patch may have been made from other weights of the same shapes.

    Raises:
        ErasureError: no layer fits, a shape differs, or the weights are not those that the patch was made from.
    """
    table, missing = targets(model, clip), []
    found: dict[str, dict[str, Tensor | None]] = {}
    for component, parameter, prefix in _layers(patch.weights):
        if prefix not in table:
            missing.append(prefix)
            continue
        weight = _weight(model if component in NETWORKS else clip.patcher, parameter, table[prefix])
        shape = patch.payload.shape(component, parameter)
        if weight is not None and weight.numel() != _size(shape):
            raise ErasureError(
                f"patch {name!r} does not fit: {component}.{parameter} has shape {list(weight.shape)} here and "
                f"{list(shape)} in the patch. Was it made for another architecture?"
            )
        found.setdefault(component, {})[parameter] = None if weight is None else weight.reshape(shape)
    if not found:
        raise ErasureError(
            f"patch {name!r} does not fit: this model has none of its {len(missing)} layers (first: {missing[0]}). Was "
            "it made for another architecture?"
        )
    if not other_base:
        _check_base(name, patch, found)
    if missing:
        log.warning("%s: ComfyUI has no layer for %d keys (first: %s)", name, len(missing), missing[0])
    return sorted(set(missing))


def _layers(payload: LowRank | Delta) -> Iterator[tuple[str, str, str]]:
    """Yield component, parameter and key prefix of everything that a payload changes."""
    key_of = layer_keys(payload)
    for component in payload.components:
        for name in payload.names(component):
            yield component, name, key_of(component, name.rpartition(".")[0])


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _weight(patcher: Any, parameter: str, target: Target) -> Tensor | None:
    """Return the unpatched value of a parameter, or None if it is a part of one of ComfyUI's tensors."""
    if not isinstance(target, str):
        return None
    key = target if parameter.endswith(".weight") else target.removesuffix("weight") + parameter.rpartition(".")[2]
    backup = patcher.backup.get(key)  # kept by ComfyUI while other LoRAs are on the weights
    value: Tensor | None = backup.weight if backup is not None else patcher.model.state_dict().get(key)
    return value


def _check_base(name: str, patch: Patch, found: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Compare the fingerprints of all components whose weights ComfyUI keeps one by one."""
    for component, weights in found.items():
        whole = {parameter: weight for parameter, weight in weights.items() if weight is not None}
        recorded = patch.base_fingerprint.get(component)
        if recorded in (None, QUANTISED) or set(whole) != set(patch.payload.names(component)):
            continue
        actual = fingerprint_tensors(whole)
        if not same_base(recorded, actual):
            raise ErasureError(
                f"patch {name!r} was made from {patch.base or 'an unnamed base'} ({component} {recorded[:16]}), but "
                f"this model has other weights ({component} {actual[:16]}). Nothing was loaded. The shapes fit: to "
                "transfer the patch to this model, set other_base to allow"
            )


def add(model: Any, clip: Any, entry: Loaded) -> tuple[Any, Any]:
    """Return clones of a model and its text encoders to which a patch is added, for every prompt.

    Args:
        model: a MODEL of ComfyUI.
        clip: a CLIP of ComfyUI.
        entry: the patch and its strength.
    """
    import comfy.lora

    changes = comfy.lora.load_lora(lora_tensors(entry.patch), targets(model, clip), log_missing=False)
    model, clip = model.clone(), clip.clone()
    model.add_patches(changes, entry.strength)
    clip.add_patches(changes, entry.strength)
    return model, clip


def hooks_of(entries: Mapping[str, Loaded], strengths: Mapping[str, float]) -> Any:
    """Return a group of hooks that puts patches on the model while conditionings with that group are sampled.

    Args:
        entries: the patches.
        strengths: the strength of each; patches of strength 0 are left out.

    Returns:
        ComfyUI's HookGroup, or None if no patch acts.
    """
    import comfy.hooks

    group = None
    for name, strength in strengths.items():
        if strength and any(part in NETWORKS for part in entries[name].patch.components):
            group = group or comfy.hooks.HookGroup()
            for hook in comfy.hooks.create_hook_lora(lora_tensors(entries[name].patch), strength, 0.0).hooks:
                group.add(hook)
    return group


def encoders_with(clip: Any, entries: Mapping[str, Loaded], strengths: Mapping[str, float]) -> Any:
    """Return the text encoders with those patches that change them, at the strengths of one prompt.

    Args:
        clip: a CLIP of ComfyUI.
        entries: the patches.
        strengths: the strength of each.

    Returns:
        A clone, or `clip` itself if no patch acts on it.
    """
    import comfy.lora

    for name, strength in strengths.items():
        patch = entries[name].patch
        if strength and any(part not in NETWORKS for part in patch.components):
            keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
            clip = clip.clone()
            clip.add_patches(comfy.lora.load_lora(lora_tensors(patch), keys, log_missing=False), strength)
    return clip
