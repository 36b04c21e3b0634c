"""Support for compiled networks, which run uncompiled while a gated patch is attached to them.

torch.compile does not notice hooks that are registered or removed after compilation: a graph that was compiled without
a hook ignores it, and a graph that was compiled with one keeps it, both silently. Folded patches are ordinary weights,
which a compiled graph reads anew on every call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from erasure.errors import ErasureError
from erasure.patch.module_keys import COMPONENTS


def original(module: Any) -> Any:
    """Return the network that `torch.compile(network)` has wrapped, or the argument itself if it is not wrapped.

    Args:
        module: a network, or None for a component that a pipeline lacks.
    """
    return getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else module


def compiled(pipe: Any) -> bool:
    """Return whether a network that patches may change is compiled in any way.

    The ways are: `torch.compile(network)`, `network.compile()`, `compile()` on some of its blocks, and a compiled
    `forward`.

    Args:
        pipe: a diffusers pipeline.
    """
    for name in COMPONENTS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and (
            original(module) is not module
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            or any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules())
        ):
            return True
    return False


def uncompiled(pipe: Any) -> AbstractContextManager[Any]:
    """Return a context in which compiled networks run uncompiled; the compiled graphs are kept for later.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        ErasureError: a network is compiled, and this version of torch (before 2.6) cannot run it uncompiled.
    """
    if not compiled(pipe):
        return nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise ErasureError(
            f"a gated patch cannot act in a compiled network with torch {torch.__version__}. Update to torch 2.6 or "
            "newer, which runs the network uncompiled while the patch acts, or let the patch act on every prompt with "
            "fuse_patches()"
        )
    return torch.compiler.set_stance("force_eager")
