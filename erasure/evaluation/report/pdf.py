"""A page as PDF, printed by a Chromium that is installed on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from erasure.errors import ErasureError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
SECONDS = 300  # the start of a browser on a busy machine


def browser() -> str | None:
    """Return the path of an installed Chromium, Chrome or Edge, or None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def print_pdf(page: Path, target: Path) -> bool:
    """Print a page into a PDF file, under a temporary name that is then renamed.

    Args:
        page: the HTML file.
        target: the PDF file.

    Returns:
        Whether it was printed; False where no browser is installed.

    Raises:
        ErasureError: a browser is installed and fails.
    """
    program = browser()
    if program is None:
        return False
    rooted = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "page.pdf"
        command = [
            *(program, "--headless=new", *rooted, "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", f"--user-data-dir={folder}/profile", "--no-pdf-header-footer"),
            *(f"--print-to-pdf={printed}", page.resolve().as_uri()),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, encoding="utf-8")
        except (OSError, subprocess.TimeoutExpired) as fault:
            raise ErasureError(f"{target}: {program} could not print it ({fault}); {page} was written") from None
        if not printed.is_file():
            raise ErasureError(f"{target}: {program} printed nothing: {done.stderr[-300:]}; {page} was written")
        temporary = target.with_suffix(".tmp")
        shutil.copyfile(printed, temporary)
        os.replace(temporary, target)
    return True
