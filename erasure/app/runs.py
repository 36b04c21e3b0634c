"""Where the state of unfinished runs lies, so that a run goes on after its tab was closed or the page was killed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import IO

from erasure.config import default_cache

KEPT = 24 * 3600.0  # seconds after which an unfinished run is deleted
MOST_RUNS = 8  # unfinished runs that are kept; the oldest are deleted


def lasting(own: Path) -> Runs:
    """Return the runs in the user's cache, which a page that starts later finds again.

    Only one page at a time may have them: two would write into one state. Any other has runs of its own.

    Args:
        own: the folder for runs of its own, which nobody finds again; also where the cache cannot be written to.
    """
    folder = default_cache() / "app"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = _locked(folder / "lock")
    except OSError:
        lock = None
    return Runs(own) if lock is None else Runs(folder / "runs", lock)


def _locked(path: Path) -> IO[bytes] | None:
    """Return an open file that this process alone has locked, until it ends; None if another has, or none can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class Runs:
    """The folders of unfinished runs, each known by all that decides its result.

    Args:
        folder: where they lie.
        lock: the locked file that keeps other pages out; closed by `close`.
    """

    def __init__(self, folder: Path, lock: IO[bytes] | None = None) -> None:
        self.folder, self._lock = folder, lock

    def open(self, key: str) -> Path:
        """Return the folder of a run, new or as it was left; runs that are too old or too many are deleted.

        Args:
            key: name of the folder, which the same run gets again and no other one.
        """
        own = self.folder / key
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        own.touch()
        others = sorted((path for path in self.folder.iterdir() if path != own), key=_changed, reverse=True)
        for place, path in enumerate(others, 1):
            if place >= MOST_RUNS or time.time() - _changed(path) > KEPT:
                shutil.rmtree(path, ignore_errors=True)
        return own

    def finished(self, folder: Path) -> None:
        """Delete the folder of a run that has ended."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Leave the runs to the next page."""
        if self._lock is not None:
            self._lock.close()


def _changed(folder: Path) -> float:
    """Return when a run was last asked for, in seconds of the clock on the wall."""
    return folder.stat().st_mtime
