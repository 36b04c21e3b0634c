"""The stack of the patches that are loaded on one diffusers pipeline."""

from __future__ import annotations

import weakref
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from erasure.errors import ErasureError, unknown
from erasure.patch import RUNTIME, Features, Guard, Patch
from erasure.patch.module_keys import COMPONENTS, NETWORKS
from erasure.patch.ops.overlap_warning import warn_of_overlap
from erasure.pipelines.acting import Acting, attach
from erasure.pipelines.bypass_warning import BypassWarning
from erasure.pipelines.compatibility import Compatibility, Fingerprints
from erasure.pipelines.fused_weights import FoldedWeights, Share
from erasure.pipelines.gates.evaluation import GateEvaluation
from erasure.pipelines.gates.latent import Decider, LatentGate
from erasure.pipelines.gates.parse import parse_gate
from erasure.pipelines.guards import FORMS, check_network, make_form
from erasure.pipelines.loaded import Loaded, checked_name, checked_strength, named, warn_of_repeated_concepts
from erasure.pipelines.torch_compile import original, uncompiled

ATTRIBUTE = "_erasure_stack"
# The stack whose patches change a module: pipelines may share components.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PatchStack]] = weakref.WeakKeyDictionary()


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

    Patches that act on every prompt alike are folded into the weights. Gated patches, guards and features are attached
    to the network for the duration of a call. `gate_log` holds, for each prompt of the last call, the strength with
    which each patch acted.

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
        self._fingerprints = Fingerprints(self._weights.base)
        self._gates = GateEvaluation(self.component)
        self.bypass_warning = BypassWarning()

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
        """Discard what the gates have computed with the networks, because these have changed."""
        self._gates.forget()

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
        return self.load_all([(name, patch)], strength, force)[0]

    def load_all(
        self, patches: Iterable[tuple[str | None, Patch]], strength: float = 1.0, force: bool = False
    ) -> list[str]:
        """Check several patches against the pipeline and load them together; the time grows with their number.

        Args:
            patches: for each patch its name, or None, and the patch.
            strength: factor on the change of each.
            force: as for `load`.

        Returns:
            The names of the patches on the stack.

        Raises:
            ErasureError: as for `load`. None of the patches is loaded then.
        """
        strength, new = checked_strength(strength), dict[str, Loaded]()
        checks = Compatibility(self.pipe, self.component, self._fingerprints)
        for given, patch in patches:
            name = checked_name(patch, given, ChainMap(new, self._loaded))
            new[name] = self._entry(name, patch, strength)
            for component in new[name].components:
                self._check_owner(component)
            checks.check(name, patch, force)
        warn_of_overlap(*({name: entry.patch for name, entry in entries.items()} for entries in (new, self._loaded)))
        warn_of_repeated_concepts(new)
        self._change({**self._loaded, **new})
        return list(new)

    def _entry(self, name: str, patch: Patch, strength: float) -> Loaded:
        """Return a patch with its gate, and of a guard its form, if this pipeline can run them."""
        gate, payload = parse_gate(patch), patch.payload
        form = make_form(payload, FORMS) if isinstance(payload, Guard) else None
        if (gate or payload.kind in RUNTIME) and not hasattr(type(self.pipe), "gate_log"):
            kind = type(self.pipe).__name__
            what = "holds features" if isinstance(payload, Features) else f"has a {patch.gate['kind']} gate"
            what = "is a guard" if form else what
            raise ErasureError(
                f"patch {name!r} {what}, which {kind} cannot run. Convert the pipeline with "
                f"Erased{kind}.from_pipe(pipe); if there is no such class, define one with "
                f"class MyPipeline(PatchMixin, {kind})"
            )
        if isinstance(gate, LatentGate):
            Decider.check(self.pipe)
        if form is None or not isinstance(payload, Guard):
            return Loaded(patch, strength, gate)
        return Loaded(patch, strength, gate, form, check_network(name, form, payload.form, self.pipe))

    def set_patches(self, patches: Mapping[str, float] | Iterable[str] | str) -> None:
        """Set the strengths of all patches: those that are not named get strength 0.

        Args:
            patches: `{name: strength}`, or a name or several names for strength 1.

        Raises:
            ErasureError: a name is not loaded, or a strength is not a finite number. Nothing is changed then.
        """
        if isinstance(patches, Mapping):
            strengths = {name: checked_strength(strength) for name, strength in patches.items()}
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
        return {name: entry.describe() for name, entry in self._loaded.items()}

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
        """Fold gated patches into the weights too, so that they act on every prompt and a call runs no extra layers.

        Guards and features have no weights to fold: they go on acting in every call, without their gates on every
        prompt.
        """
        self._change(self._loaded, fused=True)

    def unfuse_patches(self) -> None:
        """Undo `fuse_patches`, so that the gates decide again."""
        self._change(self._loaded, fused=False)

    @property
    def gated(self) -> dict[str, Loaded]:
        """Return the patches, by name, that act only while a call runs: those with a gate, guards and features."""
        return {
            name: entry
            for name, entry in self._loaded.items()
            if entry.strength and (entry.runtime or (entry.gate and not self._fused))
        }

    @property
    def readers(self) -> list[str]:
        """Return the names of the guards that act and read the words of the prompt."""
        return [name for name, entry in self.gated.items() if entry.form and entry.form.NEEDS_PROMPTS]

    @property
    def _deciding(self) -> dict[str, Loaded]:
        """Return the patches, by name, whose gates decide."""
        return {name: entry for name, entry in self.gated.items() if entry.gate and not self._fused}

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
        gated, runtime = self._deciding, self.gated
        scope.enter_context(self.bypass_warning.decided())
        if self.readers and prompts is None:
            raise ErasureError(
                f"{named(map(repr, self.readers))}: reads the words of the prompt, but only prompt_embeds were given. "
                "Pass the texts with erasure_prompts=[...], or disable the patches with set_patches()"
            )
        if gated and prompts is None:
            raise ErasureError(
                f"{named(map(repr, gated))}: gated by the prompt, but only prompt_embeds were given. Pass the "
                "texts with erasure_prompts=[...], disable the gates with fuse_patches(), or disable the patches with "
                "set_patches()"
            )
        strengths = {name: [entry.strength] * rows for name, entry in self._loaded.items()}
        with uncompiled(self.pipe) if gated else nullcontext():
            strengths |= self._gates.strengths(self.pipe, gated, prompts or [])
        self.gate_log = [{name: values[row] for name, values in strengths.items()} for row in range(rows)]
        acting = {name: entry for name, entry in runtime.items() if any(strengths[name])}
        bypassed = [
            name for name, entry in acting.items() if encoded and not set(entry.patch.components) <= set(NETWORKS)
        ]
        if bypassed:
            raise ErasureError(
                f"{named(map(repr, bypassed))}: changes the text encoder, which prompt_embeds bypass. Pass the "
                "prompt as text, or call fuse_patches() before you encode it"
            )
        if not acting:
            return []
        scope.enter_context(uncompiled(self.pipe))
        return attach(self.pipe, self.component, self._gates.patched, acting, strengths, prompts, images, scope)

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Let the gates take over the states of the prompts that the pipeline encodes inside the context.

        Yields:
            Whether they do; if not, they encode the prompts themselves.
        """
        if not self._gates.may_watch(self.pipe, self._deciding):
            yield False
            return
        with self.bypass_warning.decided(), self._gates.watching(self.pipe):
            yield True

    def _change(self, loaded: dict[str, Loaded], fused: bool | None = None) -> None:
        fused = self._fused if fused is None else fused
        before, after = self._shares(self._loaded, self._fused), self._shares(loaded, fused)
        reencode = _encoder_shares(before) != _encoder_shares(after)
        try:
            self._weights.fold(after)
            self._gates.forget(texts=reencode)
            if not fused:
                with self.bypass_warning.decided():
                    self._gates.encode(self.pipe, loaded)
        except BaseException:
            self._weights.fold(before)
            self._gates.forget()
            raise
        self._gates.keep(loaded)
        self._loaded, self._fused = loaded, fused
        components = {component for entry in loaded.values() for component in entry.components}
        self._modules = {component: self.component(component) for component in sorted(components)}
        self._claim()
        touched = {component for entry in self.gated.values() for component in entry.components}
        self.bypass_warning.over(self.gated, [self._modules[component] for component in sorted(touched)])

    @property
    def beside(self) -> bool:
        """Return whether patches act beside quantised layers, and so are not in the weights."""
        return self._weights.beside.acts

    def _shares(self, loaded: dict[str, Loaded], fused: bool) -> list[Share]:
        return [
            Share(entry.patch.weights, entry.strength)
            for entry in loaded.values()
            if entry.strength and not entry.runtime and (entry.gate is None or fused)
        ]

    def _check_owner(self, component: str) -> None:
        owner = _OWNERS.get(self.component(component))
        stack = owner() if owner is not None else None
        if stack is not None and stack is not self and component in stack._modules:
            raise ErasureError(
                f"{component} is shared with another pipeline that has patches on it "
                f"({named(stack._loaded)}). Unload them there first"
            )

    def _check_loaded(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._loaded:
                raise unknown("patch", name, self._loaded)


def _encoder_shares(shares: list[Share]) -> list[tuple[str, float]]:
    """Return what identifies the shares that change a text encoder."""
    return sorted(share.order for share in shares if not set(share.payload.components) <= set(NETWORKS))
