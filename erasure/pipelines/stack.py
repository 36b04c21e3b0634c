"""The stack of the patches that are loaded on one diffusers pipeline."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from erasure.concepts.similarity import similarities
from erasure.errors import ErasureError, unknown
from erasure.patch import Patch
from erasure.patch.module_keys import COMPONENTS, NETWORKS
from erasure.patch.ops.conflicts import warn_of_overlap
from erasure.pipelines.bypass_warning import BypassWarning
from erasure.pipelines.compatibility import check_base, check_shapes
from erasure.pipelines.fused_weights import FoldedWeights, Share
from erasure.pipelines.gated_lora import Membrane, attached, membranes
from erasure.pipelines.gates.latent import Combination, Decider, LatentGate
from erasure.pipelines.gates.parse import parse_gate
from erasure.pipelines.gates.text import TextGate
from erasure.pipelines.torch_compile import original, uncompiled

ATTRIBUTE = "_erasure_stack"
Acting = Membrane | Combination  # what gates attach for one call; both count how often they ran
# The stack whose patches change a module: pipelines may share components.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PatchStack]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Loaded:
    """A patch on the stack with its strength and its gate.

    Args:
        patch: the patch.
        strength: factor on its change.
        gate: its gate, or None if it acts on every prompt alike.
    """

    patch: Patch
    strength: float
    gate: TextGate | LatentGate | None


def patch_stack(pipe: Any) -> PatchStack:
    """Return the stack of a diffusers pipeline, and create it on first use.

    Patches belong to the networks. A pipeline without patches that was made from the components of another one
    (`from_pipe`, `AutoPipelineForImage2Image.from_pipe`, `cls(**pipe.components)`) shares the stack of that pipeline.

    Args:
        pipe: any diffusers pipeline.

    Raises:
        ErasureError: `pipe` is not a diffusers pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ErasureError(f"patches can be loaded into a diffusers pipeline, not into a {type(pipe).__name__}")
    stack = vars(pipe).get(ATTRIBUTE)
    if stack is None or not stack.loaded:
        existing = stack if stack is not None and stack.serves(pipe) else None
        stack = _shared_stack(pipe) or existing or PatchStack(pipe)
        setattr(pipe, ATTRIBUTE, stack)
        if not hasattr(type(stack.pipe), "gate_log"):
            stack.pipe = pipe  # the stack was made on a plain pipeline; an erased one can also run gates
    return stack


def _shared_stack(pipe: Any) -> PatchStack | None:
    """Return the stack of another pipeline if this one has all the networks that are patched there."""
    for name in COMPONENTS:
        module = original(getattr(pipe, name, None))
        owner = _OWNERS.get(module) if isinstance(module, nn.Module) else None
        stack = owner() if owner is not None else None
        if stack is not None and stack.loaded and not stack.strange(pipe):
            return stack
    return None


class PatchStack:
    """The patches on one pipeline by name, with their strengths.

    Patches that act on every prompt alike are folded into the weights. Gated patches are attached to the layers for the
    duration of a call. `gate_log` holds, for each prompt of the last call, the strength with which each patch acted.

    Args:
        pipe: the diffusers pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.gate_log: list[dict[str, float]] = []
        self._loaded: dict[str, Loaded] = {}
        self._fused = False
        self._modules: dict[str, nn.Module] = {}
        self._weights = FoldedWeights(self.component)
        self._decider: Decider | None = None
        self._bypass_warning = BypassWarning()

    def component(self, name: str) -> nn.Module:
        """Return a component of the pipeline, without the wrapper of `torch.compile`.

        Args:
            name: name of the component, such as `unet`.

        Raises:
            ErasureError: the pipeline has no such component, or it was replaced while patches were loaded.
        """
        module = original(getattr(self.pipe, name, None))
        if not isinstance(module, nn.Module):
            raise ErasureError(f"the patch changes {name}, but this {type(self.pipe).__name__} has no {name}")
        if self._modules.get(name, module) is not module:
            raise ErasureError(
                f"{name} was replaced while patches were loaded. Unload the patches before you replace it"
            )
        return module

    @property
    def loaded(self) -> bool:
        """Return whether any patch is loaded."""
        return bool(self._loaded)

    def serves(self, pipe: Any) -> bool:
        """Return whether `pipe` has the same networks as the pipeline that the stack was made on."""
        return all(getattr(pipe, name, None) is getattr(self.pipe, name, None) for name in COMPONENTS)

    def strange(self, pipe: Any) -> list[str]:
        """Return the names of the patched components that `pipe` lacks or has replaced."""
        return [name for name, module in self._modules.items() if original(getattr(pipe, name, None)) is not module]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._claim()  # a copied stack owns the copied networks

    def _claim(self) -> None:
        for module in self._modules.values():
            _OWNERS[module] = weakref.ref(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Restore the base weights inside a context, so that other code can change them, then fold the patches in."""
        self._weights.fold([])
        try:
            yield
        finally:
            self._weights.fold(self._shares(self._loaded, self._fused))
            self.forget()

    def forget(self) -> None:
        """Discard the cached decisions of latent gates, because the predictions of the networks have changed."""
        self._decider = None

    def load(self, patch: Patch, name: str | None = None, strength: float = 1.0, force: bool = False) -> str:
        """Check a patch against the pipeline and load it.

        Args:
            patch: the patch.
            name: name for the patch (default: its concepts, with a number if that name is taken).
            strength: factor on its change; may be negative or above 1.
            force: whether to load it also onto another base than it was made from, provided that all shapes fit.

        Returns:
            The name of the patch on the stack.

        Raises:
            ErasureError: the name is taken, the base is another one, a shape does not fit, or this pipeline cannot run
                the gate. Nothing is changed then.
        """
        name = self._checked_name(patch, name)
        strength = _checked_strength(strength)
        gate = parse_gate(patch)
        if gate is not None and not hasattr(type(self.pipe), "gate_log"):
            kind = type(self.pipe).__name__
            raise ErasureError(
                f"patch {name!r} has a {patch.gate['kind']} gate, which {kind} cannot run. Convert the pipeline with "
                f"Erased{kind}.from_pipe(pipe); if there is no such class, define one with "
                f"class MyPipeline(PatchMixin, {kind})"
            )
        if isinstance(gate, LatentGate):
            Decider.check(self.pipe)
        for component in patch.components:
            self._check_owner(component)
            check_shapes(name, patch, component, self.component(component))
        if not force:
            check_base(name, patch, self.pipe, self._weights.base)
        warn_of_overlap(name, patch, {other: entry.patch for other, entry in self._loaded.items()})
        self._change({**self._loaded, name: Loaded(patch, strength, gate)})
        return name

    def set_patches(self, patches: Mapping[str, float] | Iterable[str] | str) -> None:
        """Set the strengths of all patches: those that are not named get strength 0.

        Args:
            patches: `{name: strength}`, or a name or several names for strength 1.

        Raises:
            ErasureError: a name is not loaded, or a strength is not a finite number. Nothing is changed then.
        """
        if isinstance(patches, Mapping):
            strengths = {name: _checked_strength(strength) for name, strength in patches.items()}
        else:
            strengths = dict.fromkeys([patches] if isinstance(patches, str) else patches, 1.0)
        self._check_loaded(strengths)
        self._change({name: replace(entry, strength=strengths.get(name, 0.0)) for name, entry in self._loaded.items()})

    def get_list_patches(self) -> dict[str, dict[str, Any]]:
        """Return for each loaded patch, by name and in order of loading, its strength and what its header says.

        Returns:
            Name -> a table with `strength`, `method`, `concepts` (names), `anchors` (by name), `gate` (its kind),
            `kind` (of the payload), `components`, `costs` and `bytes` (of its file; None if not loaded from one).
        """
        return {
            name: {
                "strength": entry.strength,
                "method": entry.patch.method,
                "concepts": entry.patch.names,
                "anchors": entry.patch.anchors,
                "gate": entry.patch.gate["kind"],
                "kind": entry.patch.payload.kind,
                "components": entry.patch.components,
                "costs": dict(entry.patch.costs),
                "bytes": entry.patch.stored.get("bytes"),
            }
            for name, entry in self._loaded.items()
        }

    def delete_patches(self, names: Iterable[str] | str) -> None:
        """Unload patches, and restore the base bit for bit in weights that no other patch changes.

        Args:
            names: a name or several names.

        Raises:
            ErasureError: a name is not loaded. Nothing is changed then.
        """
        deleted = [names] if isinstance(names, str) else list(names)
        self._check_loaded(deleted)
        self._change({name: entry for name, entry in self._loaded.items() if name not in deleted})

    def unload_patches(self) -> None:
        """Unload all patches, and restore the base in every weight, bit for bit."""
        self._change({})
        self._fused = False

    def fuse_patches(self) -> None:
        """Fold gated patches into the weights too, so that they act on every prompt and a call runs no extra layers."""
        self._change(self._loaded, fused=True)

    def unfuse_patches(self) -> None:
        """Undo `fuse_patches`, so that the gates decide again."""
        self._change(self._loaded, fused=False)

    @property
    def gated(self) -> dict[str, Loaded]:
        """Return the patches, by name, whose strength currently depends on the prompt."""
        if self._fused:
            return {}
        return {name: entry for name, entry in self._loaded.items() if entry.gate and entry.strength}

    def open(
        self, prompts: list[list[str]] | None, rows: int, images: int, scope: ExitStack, encoded: bool = False
    ) -> list[Acting]:
        """Let the gated patches act for one call, and write the gate log.

        Args:
            prompts: the texts of each prompt (two on XL), or None if only embeddings are known.
            rows: number of prompts.
            images: number of images per prompt.
            scope: receives what ends the call; closing it detaches the patches again.
            encoded: whether the prompts are passed as embeddings, so that the text encoders do not run.

        Returns:
            What was attached; the `calls` of each counts how often it ran.

        Raises:
            ErasureError: a patch is gated and only embeddings are known, or the text encoder that it changes does not
                run.
        """
        gated = self.gated
        scope.enter_context(self._bypass_warning.decided())
        if gated and prompts is None:
            raise ErasureError(
                f"{', '.join(map(repr, gated))}: gated by the prompt, but only prompt_embeds were given. Pass the "
                "texts with erasure_prompts=[...], disable the gates with fuse_patches(), or disable the patches with "
                "set_patches()"
            )
        strengths = {name: [entry.strength] * rows for name, entry in self._loaded.items()}
        with uncompiled(self.pipe) if gated else nullcontext():
            strengths |= {name: self._strengths(entry, prompts or []) for name, entry in gated.items()}
        self.gate_log = [{name: values[row] for name, values in strengths.items()} for row in range(rows)]
        acting = {name: entry for name, entry in gated.items() if any(strengths[name])}
        bypassed = [
            name for name, entry in acting.items() if encoded and not set(entry.patch.components) <= set(NETWORKS)
        ]
        if bypassed:
            raise ErasureError(
                f"{', '.join(map(repr, bypassed))}: changes the text encoder, which prompt_embeds bypass. Pass the "
                "prompt as text, or call fuse_patches() before you encode it"
            )
        if acting:
            scope.enter_context(uncompiled(self.pipe))
        hooks: list[Acting] = []
        parts: list[tuple[torch.Tensor, Callable[[], Any]]] = []
        # Sorted by content, as in the weights, so that the order of loading changes no bit.
        for name, entry in sorted(acting.items(), key=lambda item: (item[1].patch.payload.digest, item[1].strength)):
            shares = torch.tensor(strengths[name])
            if isinstance(entry.gate, LatentGate):
                parts.append((shares.repeat_interleave(images), self._patched(entry.patch)))
                continue
            for membrane, module in membranes(entry.patch.payload, self.component, shares, images):
                scope.callback(membrane.attach(module).remove)
                hooks.append(membrane)
        if not parts:
            return hooks
        combination = Combination(self.component("unet"), parts, whole=bool(hooks))
        scope.callback(combination.remove)
        return [*hooks, combination]

    def _strengths(self, entry: Loaded, prompts: list[list[str]]) -> list[float]:
        """Return the strength of one gated patch for each prompt, multiplied by the strength that the user has set.

        For a text gate, it is the largest over the texts of the prompt and of the gate; for a latent gate, 1 - w.
        """
        gate = entry.gate
        if isinstance(gate, TextGate):
            texts = [text for row in prompts for text in row]
            nearest = dict(zip(texts, map(max, similarities(self.pipe, texts, list(gate.texts))), strict=True))
            return [entry.strength * max(gate.strength(nearest[text]) for text in row) for row in prompts]
        if not isinstance(gate, LatentGate):
            return [entry.strength] * len(prompts)
        patched = self._patched(entry.patch)
        self._decider = self._decider or Decider(self.pipe)
        key = (entry.patch.payload.digest, gate)
        present = [self._decider.present(key, gate, row[0], patched) for row in prompts]
        return [entry.strength * (1 - (gate.on if decision else gate.off)) for decision in present]

    def _patched(self, patch: Patch) -> Callable[[], Any]:
        """Return a function that opens a context in which the UNet has a low-rank patch at strength 1."""
        return attached(membranes(patch.payload, self.component, torch.ones(1), 1))

    def _change(self, loaded: dict[str, Loaded], fused: bool | None = None) -> None:
        fused = self._fused if fused is None else fused
        before = self._shares(self._loaded, self._fused)
        try:
            self._weights.fold(self._shares(loaded, fused))
        except BaseException:
            self._weights.fold(before)
            raise
        self._loaded, self._fused, self._decider = loaded, fused, None
        self._modules = {
            component: self.component(component) for entry in loaded.values() for component in entry.patch.components
        }
        self._claim()
        touched = {component for entry in self.gated.values() for component in entry.patch.components}
        self._bypass_warning.over(self.gated, [self._modules[component] for component in sorted(touched)])

    def _shares(self, loaded: dict[str, Loaded], fused: bool) -> list[Share]:
        return [
            Share(entry.patch.payload, entry.strength)
            for entry in loaded.values()
            if entry.strength and (entry.gate is None or fused)
        ]

    def _check_owner(self, component: str) -> None:
        owner = _OWNERS.get(self.component(component))
        stack = owner() if owner is not None else None
        if stack is not None and stack is not self and component in stack._modules:
            raise ErasureError(
                f"{component} is shared with another pipeline that has patches on it "
                f"({', '.join(stack._loaded)}). Unload them there first"
            )

    def _checked_name(self, patch: Patch, name: str | None) -> str:
        if name is None:
            stem = "+".join(patch.names)
            candidates = [stem, *(f"{stem}-{number}" for number in range(2, len(self._loaded) + 2))]
            return next(candidate for candidate in candidates if candidate not in self._loaded)
        if not isinstance(name, str) or not name:
            raise ErasureError(f"the name of a patch must be a non-empty string, not {name!r}")
        if name in self._loaded:
            raise ErasureError(f"a patch named {name!r} is already loaded. Loaded patches: {', '.join(self._loaded)}")
        return name

    def _check_loaded(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._loaded:
                raise unknown("patch", name, self._loaded)


def _checked_strength(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ErasureError(f"a strength must be a finite number, not {strength!r}")
    return float(strength)
