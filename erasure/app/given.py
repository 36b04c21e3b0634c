"""The prompts and the judge that a visitor gives to measure or attack with, each as the command line takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.app.models import Models
from erasure.errors import ErasureError, unknown
from erasure.prompts.hub_sets import SUFFIXES
from erasure.prompts.prompt_set import PromptSet, names

LARGEST = 5_000_000  # bytes of a file of prompts
# Options of the command line that messages name, as the page calls them.
WORDS = {
    "--prompts (prompts=)": "“Prompts”",
    "a file with labels, or hub:owner/name": "a file with labels",
    "--judge (judge=)": "“Judge”",
    "--label ": "“Label of every prompt” ",
    "with --where": "of the file",
}


@dataclass(frozen=True)
class Given:
    """What stands in the fields under “Prompts and judge”; an empty one is left to what suits the model.

    Args:
        prompts: the name of a bundled prompt set.
        file: a prompt set that was uploaded instead.
        label: `HEAD=VALUE` for every row, where the file has no such column.
        judge: a judge as `find_judge` takes it.
    """

    prompts: str = ""
    file: str = ""
    label: str = ""
    judge: str = ""

    def rows(self) -> PromptSet | None:
        """Return the prompt set; None if none is given.

        Raises:
            ErasureError: both a set and a file are given, a label for neither; the file is too large or no text; or as
                `PromptSet.read` and `labelled` raise it.
        """
        if not (self.prompts or self.file):
            if self.label.strip():
                raise ErasureError("A label belongs to prompts: choose a set or add a file. Nothing was drawn")
            return None
        if self.prompts and self.file:
            raise ErasureError(f"Choose either the set {self.prompts} or a file of your own. Nothing was drawn")
        if self.prompts and self.prompts not in names():
            raise unknown("prompt set", self.prompts, names())
        found = PromptSet.read(_checked(Path(self.file)) if self.file else self.prompts)
        return found.labelled(self.label.strip()) if self.label.strip() else found

    def find_judge(self, models: Models) -> Any:
        """Return the judge; None if none is given.

        Raises:
            ErasureError: visitors may not use it, or as `find_judge` raises it.
        """
        from erasure.evaluation.judges.registry import find_judge

        text = self.judge.strip()
        return find_judge(models.check_judge(text)) if text else None


def _checked(path: Path) -> Path:
    """Return the path of an uploaded prompt set that is small enough and text by its name.

    Raises:
        ErasureError: it is not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ErasureError(f"{path.name}: prompts are read from {', '.join(SUFFIXES)} files only, and nothing was read")
    if path.is_file() and path.stat().st_size > LARGEST:
        raise ErasureError(
            f"{path.name} has {path.stat().st_size / 1e6:.1f} MB, more than the {LARGEST / 1e6:.0f} MB of a prompt "
            "set here; nothing was read"
        )
    return path


@contextmanager
def in_page_words(*paths: str) -> Iterator[None]:
    """Say in the words of the page what the library refuses in those of the command line.

    Args:
        paths: files and folders of this machine, of which visitors are told the last part of the path alone.
    """
    try:
        yield
    except ErasureError as fault:
        text = str(fault)
        for path in map(Path, filter(None, paths)):
            text = text.replace(str(path), path.name)
        for ours, theirs in WORDS.items():
            text = text.replace(ours, theirs)
        raise ErasureError(text) from None
