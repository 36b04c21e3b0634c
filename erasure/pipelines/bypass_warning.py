"""A warning for gated patches that are bypassed because their network is called outside the erased pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from erasure.pipelines.loaded import named

log = logging.getLogger(__name__)


class BypassWarning:
    """A forward pre-hook on whole networks that warns, once, about calls for which no gate was evaluated.

    Networks can be shared: `StableDiffusionPipeline.from_pipe(erased)` uses the UNet of the erased pipeline but
    evaluates no gates, so gated patches silently do not act there. Only whole networks are hooked, never their layers.
    A network that is compiled while the hook is registered cannot log, so it never warns.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._evaluated = 0  # nesting depth of `decided`
        self._warned = False

    def over(self, names: Iterable[str], networks: Iterable[nn.Module]) -> None:
        """Watch these networks from now on, and stop watching all others.

        Args:
            names: names of the gated patches, for the warning.
            networks: the networks that those patches change.
        """
        for handle in self._handles:
            handle.remove()
        self._names, self._warned = list(names), False
        self._handles = [network.register_forward_pre_hook(self) for network in networks]

    @contextmanager
    def decided(self) -> Iterator[None]:
        """Suppress the warning while the gates have been evaluated, even if none of them lets its patch act."""
        self._evaluated += 1
        try:
            yield
        finally:
            self._evaluated -= 1

    def __call__(self, network: nn.Module, inputs: Any) -> None:
        """Warn if the network is called while no gate has been evaluated."""
        if torch.compiler.is_compiling() or self._evaluated or self._warned:
            return
        self._warned = True
        log.warning(
            "%s: gated, but this call of %s bypasses the erased pipeline, which evaluates the gates, so it runs "
            "without the gated patches. Generate with the erased pipeline, or make the patches act on every prompt "
            "with fuse_patches(). This warning is shown once",
            named(self._names),
            type(network).__name__,
        )
