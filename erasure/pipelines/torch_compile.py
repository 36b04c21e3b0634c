"""Compiled networks: torch.compile does not look again at a network's hooks, so gated patches run it uncompiled.

Graphs that were compiled before a hook was there leave it out, and graphs that were compiled with one keep it: both
silently. Folded patches are ordinary weights, which a compiled graph reads anew on every call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from erasure.errors import ErasureError
from erasure.patch.module_keys import COMPONENTS


def original(module: Any) -> Any:
    """The network that `torch.compile(network)` has wrapped; any other as it is."""
    return getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else module


def compiled(pipe: Any) -> bool:
    """Whether a network that patches may touch is compiled: wrapped, in place, in its blocks, or its forward alone."""
    for name in COMPONENTS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and (
            original(module) is not module
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            or any(getattr(each, "_compiled_call_impl", None) is not None for each in module.modules())
        ):
            return True
    return False


def uncompiled(pipe: Any) -> AbstractContextManager[Any]:
    """A context in which compiled networks run as if they had not been compiled; what was compiled is kept.

    Raises:
        ErasureError: a network is compiled, and this torch (before 2.6) cannot run it uncompiled.
    """
    if not compiled(pipe):
        return nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise ErasureError(
            "a gated patch cannot act in a compiled network with this torch: fuse_patches() makes it act always, "
            "torch 2.6 or newer runs the network uncompiled while a gate is open"
        )
    return torch.compiler.set_stance("force_eager")
