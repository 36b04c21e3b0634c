"""One piece of work in a thread of its own, which reports its progress and can be stopped between two network calls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from erasure.errors import ErasureError

ABANDONED = 30.0  # seconds without a look at a job after which nobody waits for it any more


class Stopped(BaseException):
    """The end of a job that was asked to stop.

    It is no `Exception`, so that code which carries on after a failed image or file does not carry on after this.
    """


@dataclass(frozen=True)
class Picture:
    """An image to show while a job runs.

    Args:
        image: the image.
        caption: what it shows.
        marked: whether to set it apart, because the concept is seen in it.
    """

    image: Image.Image
    caption: str = ""
    marked: bool = False


class Line:
    """The line in which jobs wait for their turn: one works at a time, because all work shares the models.

    Args:
        most: jobs that may wait or work; more are refused.
    """

    def __init__(self, most: int = 20) -> None:
        self.most = most
        self._waiting: deque[Job] = deque()
        self._moved = threading.Condition()

    def join(self, job: Job) -> None:
        """Put a job at the end of the line.

        Raises:
            ErasureError: the line is full.
        """
        with self._moved:
            if len(self._waiting) >= self.most:
                raise ErasureError(
                    f"{self.most} people are waiting already, which is the most that this page serves. Try again in a "
                    "few minutes; nothing was started"
                )
            self._waiting.append(job)

    def ahead(self, job: Job) -> int:
        """Return how many jobs are before this one, the one at work included; 0 where it is its turn."""
        with self._moved:
            return self._waiting.index(job) if job in self._waiting else 0

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """Wait until it is the turn of a job that has joined, and let the next one in afterwards.

        Raises:
            Stopped: the job was asked to stop while it waited.
        """
        try:
            with self._moved:
                while self._waiting[0] is not job:
                    job.check()
                    self._moved.wait(0.1)
            job.check()
            yield
        finally:
            with self._moved:
                self._waiting.remove(job)
                self._moved.notify_all()


class Job:
    """The progress of one piece of work, and the way to stop it.

    Args:
        line: where the job waits for its turn; None: it has a line of its own.
    """

    def __init__(self, line: Line | None = None) -> None:
        self._line = line or Line()
        self._stop = threading.Event()
        self._began = self._looked = time.monotonic()
        self.stage = ""
        self.done = 0
        self.total: int | None = None
        self.pictures: list[Picture] = []
        self.note = ""
        self.result: Any = None
        self.fault: BaseException | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds since the job was made."""
        return time.monotonic() - self._began

    @property
    def share(self) -> float | None:
        """Return how much of the present stage is done, from 0 to 0.99; None if nobody knows how long it takes."""
        return min(self.done / self.total, 0.99) if self.total else None

    @property
    def where(self) -> str:
        """Return for people what the job is doing, or how many are before it."""
        before = self._line.ahead(self)
        return f"Waiting: {before} before you" if before else self.stage

    @property
    def stopped(self) -> bool:
        """Return whether the job was asked to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask the work to stop at its next call of a network."""
        self._stop.set()

    def check(self) -> None:
        """Go on, unless the job was asked to stop or nobody has looked at it for a while.

        Raises:
            Stopped: so it is.
        """
        if self._stop.is_set() or time.monotonic() - self._looked > ABANDONED:
            raise Stopped

    def enter(self, stage: str, total: int | None = None) -> None:
        """Begin a stage of the work.

        Args:
            stage: what is being done, for people.
            total: samples that will go through the network; None if that is not known.

        Raises:
            Stopped: the job was asked to stop.
        """
        self.check()
        self.stage, self.done, self.total = stage, 0, total

    @contextmanager
    def watching(self, network: nn.Module, *others: nn.Module) -> Iterator[None]:
        """Count the samples that go through a network inside a context, and stop there if that is asked.

        Args:
            network: the network whose samples are counted.
            others: more modules at whose calls the work may stop.
        """

        def counted(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.check()
            tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor) and value.dim()]
            self.done += len(tensors[0]) if tensors else 1

        with ExitStack() as hooks:
            hooks.callback(network.register_forward_pre_hook(counted, with_kwargs=True).remove)
            for module in others:
                hooks.callback(module.register_forward_pre_hook(lambda *_: self.check()).remove)
            yield

    def run(self, work: Callable[[Job], Any], every: float = 0.3) -> Iterator[Job]:
        """Do the work in a thread, and yield this job every so often until it has ended.

        A consumer that stops iterating stops the work.

        Args:
            work: takes the job and returns its result.
            every: seconds between two looks.

        Raises:
            ErasureError: as the work raised it, the work failed in another way, or too many jobs wait.
        """
        self._line.join(self)
        thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                self._looked = time.monotonic()
                yield self
                thread.join(every)
        finally:
            if thread.is_alive():
                self.stop()
        if isinstance(self.fault, ErasureError):
            raise self.fault
        if self.fault is not None:
            raise ErasureError(f"{type(self.fault).__name__}: {self.fault}") from self.fault

    def _do(self, work: Callable[[Job], Any]) -> None:
        try:
            with self._line.turn(self):
                self.result = work(self)
        except Stopped:
            self._stop.set()
        except BaseException as fault:
            self.fault = fault
