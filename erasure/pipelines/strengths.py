"""A context that changes the strengths of the patches on a pipeline for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def switched_off(pipe: Any) -> Iterator[None]:
    """Set all patches of a pipeline to strength 0 inside a context, and restore their strengths at its end.

    Args:
        pipe: any pipeline; one without patches is left unchanged.
    """
    if not hasattr(pipe, "get_list_patches") or not pipe.get_list_patches():
        yield
        return
    before = {name: entry["strength"] for name, entry in pipe.get_list_patches().items()}
    pipe.set_patches({})
    try:
        yield
    finally:
        pipe.set_patches(before)
