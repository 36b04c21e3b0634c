"""Change the strengths of a pipeline's patches for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def switched_off(pipe: Any) -> Iterator[None]:
    """The pipeline with every patch at strength 0; the strengths are put back whatever happens."""
    if not hasattr(pipe, "get_list_patches") or not pipe.get_list_patches():
        yield
        return
    before = {name: entry["strength"] for name, entry in pipe.get_list_patches().items()}
    pipe.set_patches({})
    try:
        yield
    finally:
        pipe.set_patches(before)
