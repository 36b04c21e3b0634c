"""The texts of all text gates of a pipeline: encoded once, and compared with each prompt of a call in one product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from erasure.concepts.similarity import TextStates, gammas, gate_encoder, measured, text_states
from erasure.concepts.token_states import Reference
from erasure.errors import ErasureError

BATCH = 64  # texts that the text encoder reads at a time


class GateTexts:
    """The encoded texts of the loaded text gates.

    They are kept in fp32 on the CPU, and encoded again when the text encoder has changed: see `_stamp`.
    """

    def __init__(self) -> None:
        self._parts: list[TextStates] = []
        self._rows: dict[str, int] = {}
        self._encoder: tuple[Any, ...] = ()
        self._seen: dict[tuple[int, ...], Tensor] = {}
        self._measure: Reference | None = None

    def forget(self) -> None:
        """Discard the states, because the text encoder has changed."""
        self._parts, self._rows, self._encoder, self._seen, self._measure = [], {}, (), {}, None

    def keep(self, texts: Iterable[str]) -> None:
        """Drop all texts but these, because their patches were unloaded."""
        wanted = set(texts)
        kept = [text for text in self._rows if text in wanted]
        if len(kept) < len(self._rows):
            self._parts = [TextStates.join(self._parts).take([self._rows[text] for text in kept])] if kept else []
            self._rows = {text: row for row, text in enumerate(kept)}

    def encode(self, pipe: Any, texts: Iterable[str]) -> None:
        """Encode the texts that are not known yet; if the text encoder has changed, all of them.

        Args:
            pipe: a diffusers pipeline.
            texts: texts of gates.

        Raises:
            ErasureError: the pipeline has no pair of tokenizer and text encoder.
        """
        if self._encoder != (stamp := _stamp(pipe)):
            self.forget()
            self._encoder, self._measure = stamp, measured(pipe, torch.float32)
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for start in range(0, len(new), BATCH):
            part = text_states(pipe, new[start : start + BATCH], torch.float32, measure=self._measure)
            self._parts.append(part)
            self._rows |= {text: len(self._rows) + row for row, text in enumerate(part.texts)}

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Take over the states that the text encoder computes inside a context, so that `nearest` need not."""

        def take(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            states = getattr(output, "last_hidden_state", None)
            if isinstance(ids, Tensor) and isinstance(states, Tensor) and kwargs.get("attention_mask") is None:
                self._seen |= {tuple(row): state for row, state in zip(ids.tolist(), states.detach(), strict=True)}

        self._seen = {}
        handle = gate_encoder(pipe)[1].register_forward_hook(take, with_kwargs=True)
        try:
            yield
        except BaseException:
            self._seen = {}  # the next call may have other weights
            raise
        finally:
            handle.remove()

    def similarities(self, pipe: Any, prompts: list[str]) -> dict[str, dict[str, float]]:
        """Return prompt -> text of a gate -> their gamma, from one product a prompt.

        Prompts whose states were taken over while `watching` are not encoded again.

        Args:
            pipe: a diffusers pipeline.
            prompts: prompts of one call.

        Raises:
            ErasureError: the pipeline has no pair of tokenizer and text encoder.
        """
        self._parts = [TextStates.join(self._parts)]
        texts, distinct = self._parts[0], list(dict.fromkeys(prompts))
        seen, self._seen = self._seen, {}
        states = text_states(pipe, distinct, torch.float32, seen, self._measure)
        rows = gammas(states, texts)
        return {prompt: dict(zip(texts.texts, row, strict=True)) for prompt, row in zip(distinct, rows, strict=True)}


def _stamp(pipe: Any) -> tuple[Any, ...]:
    """Return what differs after the gate's text encoder was replaced, cast, extended or written to.

    Writes through `parameter.data` do not show; the pipeline's own methods that do so call `GateTexts.forget`.
    """
    tokenizer, encoder = gate_encoder(pipe)
    versions = ((p.dtype, 0 if p.is_inference() else p._version) for p in encoder.parameters())
    return id(encoder), id(tokenizer), len(tokenizer), *versions


def has_encoder(pipe: Any) -> bool:
    """Return whether a pipeline has a text encoder that text gates can use."""
    try:
        gate_encoder(pipe)
    except ErasureError:
        return False
    return True
