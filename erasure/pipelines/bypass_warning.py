"""Gated patches act in an erased pipeline's own calls alone: a word where their networks are called past it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)


class Watch:
    """A hook in front of whole networks (none on their layers) that says once that no gate was decided for a call.

    Networks are shared: `StableDiffusionPipeline.from_pipe(erased)` has the erased one's UNet, and decides on no gate.
    In a network that is compiled while the hook is there nothing is said: a graph cannot speak.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._decided = 0
        self._told = False

    def over(self, names: Iterable[str], networks: Iterable[nn.Module]) -> None:
        """Watch these networks from now on, and no others, for the gated patches `names`."""
        for handle in self._handles:
            handle.remove()
        self._names, self._told = list(names), False
        self._handles = [network.register_forward_pre_hook(self) for network in networks]

    @contextmanager
    def decided(self) -> Iterator[None]:
        """A context in which the gates have been decided on, though it may be against the patches."""
        self._decided += 1
        try:
            yield
        finally:
            self._decided -= 1

    def __call__(self, network: nn.Module, inputs: Any) -> None:
        """In front of a call."""
        if torch.compiler.is_compiling() or self._decided or self._told:
            return
        self._told = True
        log.warning(
            "%s: gated, and this call of the %s does not come from the erased pipeline, which decides on gates: it "
            "runs without. Draw with the erased pipeline, or let the patch act on every prompt with fuse_patches(). "
            "This is said once",
            ", ".join(self._names),
            type(network).__name__,
        )
