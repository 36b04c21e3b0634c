"""How far drawing is and how long it takes: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

QUIET = 10.0  # seconds between two lines, at least: short runs leave no line in a log


@contextmanager
def meter(total: int, noun: str, shown: bool) -> Iterator[Callable[[int], object]]:
    """What to call with the number of images that were just made.

    On a terminal it moves a bar with rate and time left, which vanishes at the end. Elsewhere, as in the log of a
    cluster job, it writes a line after the first QUIET seconds and then at about every tenth of the way.

    Args:
        total: images to make.
        noun: what is done, in front of bar and lines.
        shown: False keeps silent.
    """
    if not shown or not total:
        yield lambda made: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=noun, unit="image", leave=False) as bar:
            yield bar.update
    else:
        yield _Lines(total, noun)


class _Lines:
    def __init__(self, total: int, noun: str) -> None:
        self.total, self.noun = total, noun
        self.made = self.told = 0
        self.start = self.last = time.monotonic()

    def __call__(self, made: int) -> None:
        self.made += made
        now = time.monotonic()
        tenth = self.told == 0 or self.made - self.told >= self.total / 10 or self.made == self.total
        if now - self.last < QUIET or not tenth:
            return
        self.told, self.last = self.made, now
        seconds = (now - self.start) / self.made
        left = timedelta(seconds=round(seconds * (self.total - self.made)))
        share = f"{self.made} of {self.total} images ({100 * self.made // self.total} %)"
        sys.stderr.write(f"{self.noun}: {share}, {seconds:.3g} s/image, {left} left\n")
        sys.stderr.flush()
