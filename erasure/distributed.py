"""Runs on several processes, as accelerate or torchrun start them; without a launcher, a group of one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from erasure.errors import ErasureError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
DIED = "another process of this run has died; finished work is kept: repeat the same call to resume"
PATIENCE = timedelta(days=30)  # processes may finish hours apart; a process that dies is noticed at once even so


@dataclass(frozen=True)
class ProcessGroup:
    """The group of processes that share one call, as one of its processes sees it.

    Args:
        index: the number of this process, from 0; process 0 is the main process.
        count: the number of processes in the group.
        group: the torch.distributed group for objects and CPU tensors; None for a single process.
    """

    index: int = 0
    count: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Tell whether this is the main process, which prints messages and merges results."""
        return self.index == 0

    def share(self, rows: Sequence[T]) -> list[T]:
        """Return the rows that this process works on: every `count`-th row, starting at its index."""
        return list(rows[self.index :: self.count])

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in every process, wait for all of them, and return all results.

        Results travel between the processes as pickled Python objects, so they should be plain data.

        Returns:
            The result of each process, in the order of the processes.

        Raises:
            ErasureError: `work` failed in a process (raised in every process, after all have finished), or a process
                has died.
        """
        if self.count == 1:
            return [work()]
        import torch.distributed as dist

        answers: list[Any] = [None] * self.count
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as fault:
            error = fault
            sys.stderr.write(f"process {self.index + 1} of {self.count}: {fault}\n")
        message = None if error is None else str(error) or type(error).__name__
        try:
            dist.all_gather_object(answers, (result, message), group=self.group)
        except RuntimeError as fault:
            if error is None:
                raise ErasureError(DIED) from fault
        if error is not None:
            raise error
        faults = list(dict.fromkeys(message for _, message in answers if message))
        if faults:
            raise ErasureError("; ".join(faults))
        return [result for result, _ in answers]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process only, and return its result in every process.

        Raises:
            ErasureError: `work` failed, or a process has died.
        """
        results: list[Any] = self.each(lambda: work() if self.main else None)  # type: ignore[arg-type,return-value]
        return results[0]

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all processes, in the order of the processes.

        Args:
            tensor: this process's tensor [n, ...]; the shape must be the same in every process.

        Returns:
            The concatenation [count x n, ...], the same in every process.

        Raises:
            ErasureError: a process has died.
        """
        if self.count == 1:
            return tensor
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with _detecting_death():
            dist.all_gather(parts, tensor.contiguous(), group=self._group(tensor))
        return torch.cat(parts)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of the tensors of all processes, which is the same in every process.

        Args:
            tensor: this process's tensor; the shape must be the same in every process.

        Raises:
            ErasureError: a process has died.
        """
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        with _detecting_death():
            dist.all_reduce(total, group=self._group(tensor))
        return total / self.count

    def _group(self, tensor: Tensor) -> Any:
        """Return the torch.distributed group for a tensor: our own on the CPU, the launcher's (None) on a GPU."""
        return None if tensor.is_cuda else self.group


@contextmanager
def _detecting_death() -> Iterator[None]:
    try:
        yield
    except RuntimeError as fault:
        raise ErasureError(DIED) from fault


def launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        return True
    # A notebook launcher sets no variable. It uses torch, so without torch in memory there is none.
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def speaks() -> bool:
    """Tell whether this process prints the results of its run: it is the main process, or the only one."""
    return not launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(cpu: bool) -> Iterator[ProcessGroup]:
    """Join the processes that a launcher started, inside the context; without a launcher, form a group of one.

    Args:
        cpu: whether the work is on the CPU; accelerate then does not look for accelerators.

    Raises:
        ErasureError: the processes cannot find each other, or one of them has died.
    """
    if not launched():
        yield ProcessGroup()
        return
    import torch.distributed as dist
    from accelerate import PartialState

    try:
        state = PartialState(cpu=cpu)
        # PartialState is a singleton that may have been made for another device; torch knows the number of processes.
        index, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        group = None
        if count > 1:
            state.wait_for_everyone()
            # The default group times out within minutes, which is less than a slow process may need for its share.
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as fault:
        raise ErasureError(f"the processes of this run cannot find each other: {fault}") from fault
    try:
        yield ProcessGroup(index, count, group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)
