"""What gated patches, guards and features attach to the network for one call of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from erasure.model.architectures import architecture_of
from erasure.patch import Features, Guard
from erasure.pipelines import guards
from erasure.pipelines.features import FeatureHooks, Term, feature_hooks
from erasure.pipelines.gated_lora import Membrane, membranes
from erasure.pipelines.gates.latent import Combination, LatentGate
from erasure.pipelines.loaded import Loaded
from erasure.pipelines.replaced_forward import ReplacedForward

# What acts during one call; each counts how often it ran.
Acting = Membrane | ReplacedForward | FeatureHooks | guards.Attached


def attach(
    pipe: Any,
    component: Callable[[str], nn.Module],
    patched: Callable[[Any], Callable[[], Any]],
    entries: Mapping[str, Loaded],
    strengths: Mapping[str, Sequence[float]],
    prompts: list[list[str]] | None,
    images: int,
    scope: ExitStack,
) -> list[Acting]:
    """Let gated patches, guards and features act until a scope is closed.

    Args:
        pipe: the pipeline.
        component: function from the name of a component to its module.
        patched: function from a patch to one that opens a context in which the network has it.
        entries: the patches that act, by name.
        strengths: for each of them its strength for each prompt.
        prompts: the texts of each prompt, or None if only embeddings are known.
        images: number of images per prompt.
        scope: receives what detaches everything again.

    Returns:
        What was attached; the `calls` of each counts how often it ran.
    """
    terms: list[tuple[Any, Tensor]] = []
    parts: list[tuple[Tensor, Callable[[], Any]]] = []
    blocks: list[Term] = []
    acting: dict[type[guards.Form], list[guards.Acting[Any]]] = {}
    place = ""
    # Sorted by content, as in the weights, so that the order of loading changes no bit.
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].patch.payload.digest, item[1].strength)):
        shares, payload = torch.tensor(strengths[name]), entry.patch.payload
        if entry.form is not None and isinstance(payload, Guard):
            if payload.scale:
                guard = guards.Acting(entry.form, payload.texts, shares * payload.scale)
                acting.setdefault(type(entry.form), []).append(guard)
                place = entry.component
        elif isinstance(payload, Features):
            blocks.append((payload, shares))
        elif isinstance(entry.gate, LatentGate):
            parts.append((shares.repeat_interleave(images), patched(entry.patch)))
        else:
            terms.append((payload, shares))
    # Texts of guards are encoded before anything is attached, as the gates encode theirs.
    drawing = guards.Drawing(pipe, component(place), prompts, images, len(entries) > 1) if place else None
    ready = [form.prepare(drawing, acting[form]) for form in guards.FORMS.values() if form in acting and drawing]
    hooks: list[Acting] = []
    for membrane, module in membranes(terms, component, images):
        scope.callback(membrane.attach(module).remove)
        hooks.append(membrane)
    for switch_off in feature_hooks(blocks, component, images):
        feature_hook = switch_off()
        scope.callback(feature_hook.remove)
        hooks.append(feature_hook)
    if parts:
        network = architecture_of(pipe).component
        combination = Combination(component(network), network, parts, whole=bool(hooks) or bool(ready))
        scope.callback(combination.remove)
        hooks.append(combination)
    for start in ready:
        guard_hook = start()
        scope.callback(guard_hook.remove)
        hooks.append(guard_hook)
    return hooks
