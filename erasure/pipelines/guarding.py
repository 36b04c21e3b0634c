"""Guards and features on calls of the network from outside the pipeline, such as those of a search for prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from erasure.errors import ErasureError
from erasure.pipelines.acting import attach
from erasure.pipelines.loaded import named
from erasure.pipelines.stack import patch_stack
from erasure.pipelines.torch_compile import uncompiled


@contextmanager
def guarding(pipe: Any, rows: int, prompts: list[list[str]] | None = None) -> Iterator[None]:
    """Let guards and features act inside a context on calls of the network, at full strength whatever their gates.

    Each call counts as the first step of its trajectory.

    Args:
        pipe: the pipeline; without active guards and features nothing happens.
        rows: number of samples in such a call.
        prompts: the texts of each sample, or None if only embeddings are known.

    Raises:
        ErasureError: a guard reads the words of the prompt, and there are none.
    """
    stack = patch_stack(pipe)
    acting = {name: entry for name, entry in stack.gated.items() if entry.runtime}
    if stack.readers and prompts is None:
        raise ErasureError(f"{named(map(repr, stack.readers))}: reads the words of the prompt, and there are none")
    strengths = {name: [entry.strength] * rows for name, entry in acting.items()}
    with ExitStack() as scope:
        if acting:
            scope.enter_context(stack.bypass_warning.decided())
            scope.enter_context(uncompiled(pipe))
            attach(pipe, stack.component, lambda patch: nullcontext, acting, strengths, prompts, 1, scope)
        yield
