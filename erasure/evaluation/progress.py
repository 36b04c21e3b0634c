"""Progress of drawing images: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

MIN_INTERVAL = 10.0  # seconds between two lines, so that short runs leave no line in a log


@contextmanager
def meter(total: int, noun: str, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show the progress of a run while the block runs.

    On a terminal this is a bar with the rate and the time left, which disappears at the end. Elsewhere, such as in the
    log of a cluster job, it is a line after the first MIN_INTERVAL seconds and then after about every tenth of the
    images.

    Args:
        total: number of images to draw.
        noun: what is being done, as the beginning of the bar and the lines.
        shown: whether to show anything.

    Yields:
        A function to call with the number of images that were just drawn.
    """
    if not shown or not total:
        yield lambda count: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=noun, unit="image", leave=False) as bar:
            yield bar.update
    else:
        yield _ProgressLines(total, noun)


class _ProgressLines:
    """Writes progress lines to standard error."""

    def __init__(self, total: int, noun: str) -> None:
        self.total, self.noun = total, noun
        self.count = self.count_at_last_line = 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.count += count
        now = time.monotonic()
        first, finished = self.count_at_last_line == 0, self.count == self.total
        is_due = first or finished or self.count - self.count_at_last_line >= self.total / 10
        if now - self.last < MIN_INTERVAL or not is_due:
            return
        self.count_at_last_line, self.last = self.count, now
        seconds = (now - self.start) / self.count
        left = timedelta(seconds=round(seconds * (self.total - self.count)))
        share = f"{self.count} of {self.total} images ({100 * self.count // self.total} %)"
        sys.stderr.write(f"{self.noun}: {share}, {seconds:.3g} s/image, {left} left\n")
        sys.stderr.flush()
