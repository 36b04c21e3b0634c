"""Text files that appear under their name only once they are complete, so that a killed run leaves no half files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from erasure.errors import ErasureError


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Args:
        path: the file.
        text: its content.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file of lines under a temporary name, then rename it.

    Args:
        path: the file.
        lines: the lines, without line breaks.

    Raises:
        ErasureError: the file cannot be written.
    """
    try:
        write_text(path, "".join(f"{line}\n" for line in lines))
    except OSError as fault:
        raise ErasureError(f"{path.parent}: {path.name} cannot be written: {fault.strerror or fault}") from None
