"""The length of prompts: one that a text encoder would cut is refused, because what is cut is not erased."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erasure.errors import ErasureError


def check_length(pipe: Any, prompt: str, lengths: Mapping[str, int | None]) -> None:
    """Refuse a prompt that an encoder would cut.

    Args:
        pipe: the diffusers pipeline.
        prompt: the prompt.
        lengths: tokens that are read, by the name of the tokenizer; None: what the tokenizer says. A tokenizer that the
            pipeline lacks is left out.

    Raises:
        ErasureError: the prompt has more tokens than are read.
    """
    for name, length in lengths.items():
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        most, count = length or tokenizer.model_max_length, len(tokenizer(prompt, truncation=False).input_ids)
        if count > most:
            raise ErasureError(f"the prompt {prompt[:40]!r}... has {count} tokens, and the text encoder reads {most}")
