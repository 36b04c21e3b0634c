"""How strongly each gated patch acts on each prompt of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from erasure.errors import ErasureError
from erasure.patch import Patch
from erasure.pipelines.gated_lora import attached, membranes
from erasure.pipelines.gates.gate_texts import GateTexts, has_encoder
from erasure.pipelines.gates.latent import Decider, LatentGate
from erasure.pipelines.gates.text import TextGate
from erasure.pipelines.loaded import Loaded
from erasure.pipelines.torch_compile import compiled, uncompiled


class GateEvaluation:
    """The gates of the patches on one pipeline: the encoded texts, and the cached decisions of latent gates.

    Args:
        component: function from the name of a component to its module.
    """

    def __init__(self, component: Callable[[str], nn.Module]) -> None:
        self._component = component
        self._texts = GateTexts()
        self._decider: Decider | None = None

    def forget(self, texts: bool = True) -> None:
        """Discard what was computed with the networks, because they have changed.

        Args:
            texts: whether the text encoder has changed too.
        """
        self._decider = None
        if texts:
            self._texts.forget()

    def encode(self, pipe: Any, entries: Mapping[str, Loaded]) -> None:
        """Encode the texts of text gates that are not encoded yet; where that is impossible, calls will say why."""
        if texts := _texts(entries):
            with suppress(ErasureError), uncompiled(pipe):
                self._texts.encode(pipe, texts)

    def keep(self, entries: Mapping[str, Loaded]) -> None:
        """Drop what belongs to other patches than these."""
        self._texts.keep(_texts(entries))

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Take over the prompts' states from the text encoder while the pipeline encodes them in this context."""
        with self._texts.watching(pipe):
            yield

    @staticmethod
    def may_watch(pipe: Any, entries: Mapping[str, Loaded]) -> bool:
        """Return whether the pipeline's own encoding of the prompts serves the gates, too.

        A compiled text encoder cannot be watched.
        """
        return bool(_texts(entries)) and has_encoder(pipe) and not compiled(pipe)

    def strengths(self, pipe: Any, entries: Mapping[str, Loaded], prompts: list[list[str]]) -> dict[str, list[float]]:
        """Return for each gated patch its strength for each prompt, multiplied by the strength that the user has set.

        For a text gate, it is the largest over the texts of the prompt and of the gate; for a latent gate, 1 - w.

        Args:
            pipe: the pipeline.
            entries: the gated patches by name.
            prompts: the texts of each prompt.

        Raises:
            ErasureError: a gate cannot be evaluated on this pipeline.
        """
        found: dict[str, list[float]] = {}
        if texts := _texts(entries):
            self._texts.encode(pipe, texts)
            near = self._texts.similarities(pipe, [text for row in prompts for text in row])
        for name, entry in entries.items():
            gate = entry.gate
            if isinstance(gate, TextGate):
                gains = [max(_gain(gate, near[text]) for text in row) for row in prompts]
            elif isinstance(gate, LatentGate):
                self._decider = self._decider or Decider(pipe)
                key, patched = (entry.patch.payload.digest, gate), partial(self._in_patch, entry.patch)
                present = [self._decider.present(key, gate, row[0], patched) for row in prompts]
                gains = [1 - (gate.on if decision else gate.off) for decision in present]
            else:
                gains = [1.0] * len(prompts)
            found[name] = [entry.strength * gain for gain in gains]
        if self._decider:
            self._decider.settle()
        return found

    def patched(self, patch: Patch) -> Callable[[], Any]:
        """Return a function that opens a context in which the UNet has a low-rank patch at strength 1."""
        return attached(membranes([(patch.weights, torch.ones(1))], self._component, 1))

    def _in_patch(self, patch: Patch) -> Any:
        return self.patched(patch)()


def _texts(entries: Mapping[str, Loaded]) -> list[str]:
    return [text for entry in entries.values() if isinstance(entry.gate, TextGate) for text in entry.gate.texts]


def _gain(gate: TextGate, similarity: Mapping[str, float]) -> float:
    return gate.strength(max(similarity[text] for text in gate.texts))
