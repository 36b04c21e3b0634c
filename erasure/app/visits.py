"""What the page remembers of each open tab: the model, the patches with their strengths, and a folder for files."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from erasure.app import runs
from erasure.app.jobs import Job
from erasure.app.runs import Runs
from erasure.errors import ErasureError
from erasure.patch import Patch

MOST_PATCHES = 5  # on one model in one tab
IDLE = 3600.0  # seconds after which the files of a closed or forgotten tab are deleted


@dataclass
class Held:
    """A patch of a visitor.

    Args:
        patch: the patch.
        path: its file.
        model: the model that it belongs to.
        strength: the factor on its change.
    """

    patch: Patch
    path: Path
    model: str
    strength: float = 1.0


@dataclass
class Visit:
    """One open tab of the page.

    Args:
        folder: where its files are written.
        runs: where the state of unfinished runs lies, which all tabs share.
        model: the model that is chosen.
        held: its patches by name, those of all models.
        jobs: the work that it waits for.
        seen: when the tab was last heard of, in seconds of the monotonic clock.
    """

    folder: Path
    runs: Runs
    model: str = "glyph"
    held: dict[str, Held] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)

    def patches(self) -> dict[str, Held]:
        """Return the patches on the chosen model, by name."""
        return {name: held for name, held in self.held.items() if held.model == self.model}

    def stack(self) -> dict[str, tuple[Patch, float]]:
        """Return the patches on the chosen model with their strengths, by name."""
        return {name: (held.patch, held.strength) for name, held in self.patches().items()}

    def check_room(self) -> None:
        """Refuse another patch where there is no room for one.

        Raises:
            ErasureError: the model has as many patches as the page shows.
        """
        if len(self.patches()) >= MOST_PATCHES:
            raise ErasureError(
                f"{MOST_PATCHES} patches are on the model already, which is the most that this page stacks. Remove one "
                "first; nothing was changed"
            )

    def add(self, patch: Patch, path: Path) -> str:
        """Put a patch on the chosen model at full strength, and return the name that it is shown under.

        Raises:
            ErasureError: there is no room.
        """
        self.check_room()
        name = stem = f"{' + '.join(patch.names)[:60]} ({patch.method})"
        number = 2
        while name in self.held:
            name, number = f"{stem} {number}", number + 1
        self.held[name] = Held(patch, path, self.model)
        return name

    def new_file(self, stem: str, ending: str) -> Path:
        """Return a path in the folder that no file has yet, made of a name that people gave.

        Args:
            stem: any text.
            ending: what the file's name ends with, such as `.safetensors`.
        """
        plain = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:60] or "patch"
        path, number = self.folder / f"{plain}{ending}", 2
        while path.exists():
            path, number = self.folder / f"{plain}-{number}{ending}", number + 1
        return path

    def stop(self) -> None:
        """Stop all work that the tab waits for."""
        for job in list(self.jobs):
            job.stop()


class Visits:
    """All tabs by the key that the browser sends; their files lie in one folder, which `close` deletes.

    Args:
        model: the model that a new tab begins with.
        lasting: whether the state of unfinished runs outlasts these visits, for a page that starts later.
    """

    def __init__(self, model: str = "glyph", *, lasting: bool = False) -> None:
        self.model = model
        self.folder = Path(tempfile.mkdtemp(prefix="erasure-app-"))
        own = self.folder / "runs"
        self.runs = runs.lasting(own) if lasting else runs.Runs(own)
        self._visits: dict[str, Visit] = {}
        self._lock = threading.Lock()

    def of(self, key: str) -> Visit:
        """Return the visit of a key; a new one gets a folder, and forgotten ones are deleted."""
        with self._lock:
            self._sweep()
            if key not in self._visits:
                self._visits[key] = Visit(Path(tempfile.mkdtemp(dir=self.folder)), self.runs, self.model)
            self._visits[key].seen = time.monotonic()
            return self._visits[key]

    def left(self, key: str) -> None:
        """Stop the work of a tab; its files stay for a while, because the connection of a closed one may come back."""
        if (visit := self._visits.get(key)) is not None:
            visit.stop()

    def close(self) -> None:
        """Stop all work and delete all files, except for the state of unfinished runs where that lasts."""
        for visit in self._visits.values():
            visit.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.runs.close()

    def _sweep(self) -> None:
        now = time.monotonic()
        for key, visit in list(self._visits.items()):
            if now - visit.seen > IDLE and not visit.jobs:
                shutil.rmtree(visit.folder, ignore_errors=True)
                del self._visits[key]
