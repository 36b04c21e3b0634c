"""The stack of patches on one diffusers pipeline."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from erasure.concepts.similarity import similarities
from erasure.errors import ErasureError, unknown
from erasure.patch import Patch
from erasure.patch.module_keys import COMPONENTS, find_module
from erasure.patch.ops.conflicts import warn_of_overlap
from erasure.patch.payload import LowRank
from erasure.pipelines.bypass_warning import BypassWarning
from erasure.pipelines.compatibility import check_base, check_shapes
from erasure.pipelines.fused_weights import FoldedWeights, Share
from erasure.pipelines.gated_lora import Membrane
from erasure.pipelines.gates.latent import Combination, Decider, LatentGate
from erasure.pipelines.gates.text import TextGate, parse_gate
from erasure.pipelines.torch_compile import original, uncompiled

ATTRIBUTE = "_erasure_stack"
Acting = Membrane | Combination  # what acts during a call, with its count of calls
# Which stack has changed a module's weights: pipelines may share components.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PatchStack]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Loaded:
    """A patch on the stack; `gate` is None where it acts on every prompt alike."""

    patch: Patch
    strength: float
    gate: TextGate | LatentGate | None


def patch_stack(pipe: Any) -> PatchStack:
    """The one stack of a diffusers pipeline, made on first use.

    Patches belong to the networks: a pipeline without patches over the components of another (`from_pipe`,
    `AutoPipelineForImage2Image.from_pipe`, `cls(**pipe.components)`) has the other's stack.

    Raises:
        ErasureError: `pipe` is no pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ErasureError(f"patches go onto a diffusers pipeline, not onto {type(pipe).__name__}")
    stack = vars(pipe).get(ATTRIBUTE)
    if stack is None or not stack.loaded:
        kept = stack if stack is not None and stack.serves(pipe) else None
        stack = _shared(pipe) or kept or PatchStack(pipe)
        setattr(pipe, ATTRIBUTE, stack)
        if not hasattr(type(stack.pipe), "gate_log"):
            stack.pipe = pipe  # an erased pipeline over a plain one's components can run gates
    return stack


def _shared(pipe: Any) -> PatchStack | None:
    """The stack of another pipeline whose patched networks are all this one's too."""
    for name in COMPONENTS:
        module = original(getattr(pipe, name, None))
        owner = _OWNERS.get(module) if isinstance(module, nn.Module) else None
        stack = owner() if owner is not None else None
        if stack is not None and stack.loaded and not stack.strange(pipe):
            return stack
    return None


class PatchStack:
    """Patches by name, on one pipeline.

    Patches that act on every prompt alike are folded into the weights; those with a gate become membranes for the
    time of a call. `gate_log` tells for each prompt of the last call how strongly each patch acted.
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
        """The pipeline's component, seen through `torch.compile`.

        Raises:
            ErasureError: there is none, or it was replaced while patches were loaded.
        """
        module = original(getattr(self.pipe, name, None))
        if not isinstance(module, nn.Module):
            raise ErasureError(f"the patch touches {name}, and {type(self.pipe).__name__} has none")
        if self._modules.get(name, module) is not module:
            raise ErasureError(f"{name} was replaced while patches were loaded; unload them before you replace it")
        return module

    @property
    def loaded(self) -> bool:
        """Whether any patch is loaded."""
        return bool(self._loaded)

    def serves(self, pipe: Any) -> bool:
        """Whether `pipe` has the networks of the pipeline that the stack was made on."""
        return all(getattr(pipe, name, None) is getattr(self.pipe, name, None) for name in COMPONENTS)

    def strange(self, pipe: Any) -> list[str]:
        """The patched components that `pipe` has not, or has others of."""
        return [name for name, module in self._modules.items() if original(getattr(pipe, name, None)) is not module]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copy owns the copied networks
        self._claim()

    def _claim(self) -> None:
        for module in self._modules.values():
            _OWNERS[module] = weakref.ref(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context with the base's own weights, for changes to them; folded patches come back on top of these."""
        self._weights.fold([])
        try:
            yield
        finally:
            self._weights.fold(self._shares(self._loaded, self._fused))
            self.forget()

    def forget(self) -> None:
        """Let latent gates decide anew: the networks answer differently now."""
        self._decider = None

    def load(self, patch: Patch, name: str | None = None, strength: float = 1.0, force: bool = False) -> str:
        """Check `patch` against the pipeline and put it on the stack; returns its name.

        Args:
            patch: the patch.
            name: what to call it; by default its concept, with a number where that is taken.
            strength: factor on its change.
            force: load also onto another base than it was made from, where all shapes fit.

        Raises:
            ErasureError: taken name, wrong base, shapes that do not fit, a gate that this pipeline cannot run. Nothing
                is changed then.
        """
        name = self._name(patch, name)
        strength = _number(strength)
        gate = parse_gate(patch)
        if gate is not None and not hasattr(type(self.pipe), "gate_log"):
            kind = type(self.pipe).__name__
            raise ErasureError(
                f"{name!r} has a {patch.gate['kind']} gate: {kind} does not show it the prompts. Make an erased "
                f"pipeline of it: Erased{kind}.from_pipe(pipe), or, if there is none, class Mine(PatchMixin, {kind})"
            )
        if isinstance(gate, LatentGate):
            Decider.check(self.pipe)
        for component in patch.components:
            self._check_owner(component)
            check_shapes(name, patch, component, self.component(component))
        if not force:
            check_base(name, patch, self.pipe, self._weights.base)
        warn_of_overlap(name, patch, {known: one.patch for known, one in self._loaded.items()})
        self._change({**self._loaded, name: Loaded(patch, strength, gate)})
        return name

    def set_patches(self, patches: Mapping[str, float] | Iterable[str] | str) -> None:
        """Let exactly these patches act: `{name: strength}`, or a name or names for strength 1. All others get 0.

        Raises:
            ErasureError: a name that is not loaded, a strength that is no finite number. Nothing is changed then.
        """
        if isinstance(patches, Mapping):
            wanted = {name: _number(strength) for name, strength in patches.items()}
        else:
            wanted = dict.fromkeys([patches] if isinstance(patches, str) else patches, 1.0)
        self._known(wanted)
        self._change({name: replace(one, strength=wanted.get(name, 0.0)) for name, one in self._loaded.items()})

    def get_list_patches(self) -> dict[str, dict[str, Any]]:
        """Name -> strength, method, concepts, gate, kind, components, costs and file size of each patch, as loaded."""
        return {
            name: {
                "strength": one.strength,
                "method": one.patch.method,
                "concepts": one.patch.names,
                "gate": one.patch.gate["kind"],
                "kind": one.patch.payload.kind,
                "components": one.patch.components,
                "costs": dict(one.patch.costs),
                "bytes": one.patch.stored.get("bytes"),  # of its file, if it came from one
            }
            for name, one in self._loaded.items()
        }

    def delete_patches(self, names: Iterable[str] | str) -> None:
        """Take patches off; weights that no other patch touches are the base's again, bit for bit.

        Raises:
            ErasureError: a name that is not loaded. Nothing is changed then.
        """
        gone = [names] if isinstance(names, str) else list(names)
        self._known(gone)
        self._change({name: one for name, one in self._loaded.items() if name not in gone})

    def unload_patches(self) -> None:
        """Take all patches off: every weight is the base's again, bit for bit."""
        self._change({})
        self._fused = False

    def fuse_patches(self) -> None:
        """Fold gated patches into the weights too: they act on every prompt, and a call runs no extra layers."""
        self._change(self._loaded, fused=True)

    def unfuse_patches(self) -> None:
        """Undo `fuse_patches`."""
        self._change(self._loaded, fused=False)

    @property
    def gated(self) -> dict[str, Loaded]:
        """The patches whose strength depends on the prompt now."""
        return {name: one for name, one in self._loaded.items() if one.gate and one.strength and not self._fused}

    def open(
        self, prompts: list[list[str]] | None, rows: int, images: int, scope: ExitStack, encoded: bool = False
    ) -> list[Acting]:
        """Let the gated patches act for one call, and write the gate log.

        Args:
            prompts: for each row, the texts that it is asked for (two on XL); None where only embeddings are known.
            rows: number of prompts.
            images: images per prompt.
            scope: what ends the call; closing it takes everything off again.
            encoded: the prompts come as embeddings: text encoders do not run.

        Raises:
            ErasureError: embeddings without a prompt and a gated patch, or embeddings and a gated patch of an encoder.
        """
        gated = self.gated
        scope.enter_context(self._bypass_warning.decided())
        if gated and prompts is None:
            raise ErasureError(
                f"{', '.join(map(repr, gated))}: gated by the prompt, and only prompt_embeds were given. Say what they "
                "ask for with erasure_prompts=[...], switch the gate off with fuse_patches(), or the patch with "
                "set_patches()"
            )
        strengths = {name: [one.strength] * rows for name, one in self._loaded.items()}
        with uncompiled(self.pipe) if gated else nullcontext():
            strengths |= {name: self._gate(one, prompts or []) for name, one in gated.items()}
        self.gate_log = [{name: values[row] for name, values in strengths.items()} for row in range(rows)]
        acting = {name: one for name, one in gated.items() if any(strengths[name])}
        bypassed = [name for name, one in acting.items() if encoded and one.patch.components != ["unet"]]
        if bypassed:
            raise ErasureError(
                f"{', '.join(map(repr, bypassed))}: changes the text encoder, which prompt_embeds bypass. Give the "
                "prompt, or fuse_patches() before you encode it"
            )
        if acting:
            scope.enter_context(uncompiled(self.pipe))
        membranes: list[Acting] = []
        parts: list[tuple[torch.Tensor, Callable[[], Any]]] = []
        # In order of content, as in the weights: the order of loading changes no bit.
        for name, one in sorted(acting.items(), key=lambda item: (item[1].patch.payload.digest, item[1].strength)):
            shares = torch.tensor(strengths[name])
            if isinstance(one.gate, LatentGate):
                parts.append((shares.repeat_interleave(images), self._patched(one.patch)))
                continue
            for membrane, module in self._membranes(one.patch, shares, images):
                scope.callback(membrane.attach(module).remove)
                membranes.append(membrane)
        if not parts:
            return membranes
        combination = Combination(self.component("unet"), parts, whole=bool(membranes))
        scope.callback(combination.remove)
        return [*membranes, combination]

    def _gate(self, one: Loaded, prompts: list[list[str]]) -> list[float]:
        """Strength of one gated patch for each prompt: the largest over the prompt's texts and the gate's.

        For a latent gate it is 1 - w, times the patch's strength.
        """
        if isinstance(one.gate, TextGate):
            flat = [text for texts in prompts for text in texts]
            best = dict(zip(flat, map(max, similarities(self.pipe, flat, list(one.gate.texts))), strict=True))
            return [one.strength * max(one.gate.strength(best[text]) for text in texts) for texts in prompts]
        if not isinstance(one.gate, LatentGate):
            return [one.strength] * len(prompts)
        gate, patched = one.gate, self._patched(one.patch)
        self._decider = self._decider or Decider(self.pipe)
        key = (one.patch.payload.digest, gate)
        there = [self._decider.present(key, gate, texts[0], patched) for texts in prompts]
        return [one.strength * (1 - (gate.on if each else gate.off)) for each in there]

    def _patched(self, patch: Patch) -> Callable[[], AbstractContextManager[None]]:
        """What opens a context in which the UNet has a low-rank patch at strength 1."""
        found = self._membranes(patch, torch.ones(1), 1)  # once: factors stay where the network has brought them

        @contextmanager
        def patched() -> Iterator[None]:
            handles = [membrane.attach(module) for membrane, module in found]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

        return patched

    def _membranes(self, patch: Patch, strengths: torch.Tensor, images: int) -> list[tuple[Membrane, nn.Module]]:
        found: list[tuple[Membrane, nn.Module]] = []
        layers = patch.payload.layers if isinstance(patch.payload, LowRank) else {}
        for component, factors in layers.items():
            # Text encoders see a row per prompt, the UNet one per image.
            rows = strengths.repeat_interleave(images) if component == "unet" else strengths
            for path, (down, up, alpha) in factors.items():
                module = find_module(self.component(component), path)
                if module is None:
                    raise ErasureError(f"{component} has lost its layer {path} while patches were loaded")
                found.append((Membrane(down, up, alpha / down.shape[0], rows), module))
        return found

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
            component: self.component(component) for one in loaded.values() for component in one.patch.components
        }
        self._claim()
        touched = {component for one in self.gated.values() for component in one.patch.components}
        self._bypass_warning.over(self.gated, [self._modules[component] for component in sorted(touched)])

    def _shares(self, loaded: dict[str, Loaded], fused: bool) -> list[Share]:
        return [
            Share(one.patch.payload, one.strength)
            for one in loaded.values()
            if one.strength and (one.gate is None or fused)
        ]

    def _check_owner(self, component: str) -> None:
        owner = _OWNERS.get(self.component(component))
        stack = owner() if owner is not None else None
        if stack is not None and stack is not self and component in stack._modules:
            raise ErasureError(
                f"{component} is shared with another pipeline, which has patches on it: "
                f"{', '.join(stack._loaded)}. Unload them there first"
            )

    def _name(self, patch: Patch, name: str | None) -> str:
        if name is None:
            stem = "+".join(patch.names)
            tries = [stem, *(f"{stem}-{number}" for number in range(2, len(self._loaded) + 2))]
            return next(each for each in tries if each not in self._loaded)
        if not isinstance(name, str) or not name:
            raise ErasureError(f"a patch's name is a word, not {name!r}")
        if name in self._loaded:
            raise ErasureError(f"the name {name!r} is taken. Loaded: {', '.join(self._loaded)}")
        return name

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._loaded:
                raise unknown("patch", name, self._loaded)


def _number(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ErasureError(f"a strength is a finite number, not {strength!r}")
    return float(strength)
