"""Build the package's archives from the files that git knows, without leaving anything in the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, folder: Path) -> None:
    """Run a command that has to succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def listed() -> list[str]:
    """The files of the checkout that git knows."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.fail("this test needs the git checkout")
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


def copied(files: list[str], folder: Path) -> Path:
    """Copy files of the checkout into a folder, and return it."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def wheel_of(source: Path, folder: Path) -> Path:
    """Build the wheel of an sdist or a folder into another folder, and return its path."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source), folder=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel
