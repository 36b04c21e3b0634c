"""Processes that share one piece of work, as accelerate or torchrun launch them; a single process is a group of one."""

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
DIED = "another process of this run has died; what was made is kept, and the same call goes on from there"
PATIENCE = timedelta(days=30)  # shares end hours apart; a process that dies is noticed at once all the same


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that do one call together, seen from process `index` of `count`; process 0 is the main one."""

    index: int = 0
    count: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Tell whether this is the main process, which merges and prints results."""
        return self.index == 0

    def share(self, rows: Sequence[T]) -> list[T]:
        """Return this process's share of the rows: every `count`-th of them."""
        return list(rows[self.index :: self.count])

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in every process, wait for all, and return their results in the order of the processes.

        The results are sent between the processes as Python objects: keep them plain.

        Raises:
            ErasureError: `work` failed in one of them (raised in all, after all have ended), or a process has died.
        """
        if self.count == 1:
            return [work()]
        import torch.distributed as dist

        results: list[Any] = [None] * self.count
        own: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as fault:
            own = fault
            sys.stderr.write(f"process {self.index + 1} of {self.count}: {fault}\n")
        message = None if own is None else str(own) or type(own).__name__
        try:
            dist.all_gather_object(results, (value, message), group=self.group)
        except RuntimeError as fault:
            if own is None:
                raise ErasureError(DIED) from fault
        if own is not None:
            raise own
        faults = list(dict.fromkeys(message for _, message in results if message))
        if faults:
            raise ErasureError("; ".join(faults))
        return [mine for mine, _ in results]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process and return its result in every process.

        Raises:
            ErasureError: `work` failed, or a process has died.
        """
        results: list[Any] = self.each(lambda: work() if self.main else None)  # type: ignore[arg-type,return-value]
        return results[0]

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate every process's `tensor` [n, ...], all of one shape, in order [count x n, ...].

        Raises:
            ErasureError: a process has died.
        """
        if self.count == 1:
            return tensor
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with _noticing():
            dist.all_gather(parts, tensor.contiguous(), group=self._group(tensor))
        return torch.cat(parts)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of every process's `tensor`; it is the same in all of them.

        Raises:
            ErasureError: a process has died.
        """
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        with _noticing():
            dist.all_reduce(total, group=self._group(tensor))
        return total / self.count

    def _group(self, tensor: Tensor) -> Any:
        """Objects and tensors of the CPU go by the patient group, those of a GPU by the launcher's own."""
        return None if tensor.is_cuda else self.group


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as fault:
        raise ErasureError(DIED) from fault


def launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        return True
    # A notebook's launcher sets no variable; without torch in memory nobody can have called it.
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def speaks() -> bool:
    """Tell whether this process prints the results of its run, as the main or the only process."""
    return not launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(cpu: bool) -> Iterator[ProcessGroup]:
    """Join the group of processes that a launcher started; without a launcher, a group of one.

    Args:
        cpu: the work is done on the CPU, so accelerate does not look for accelerators.

    Raises:
        ErasureError: the processes cannot reach each other, or one of them has died.
    """
    if not launched():
        yield ProcessGroup()
        return
    import torch.distributed as dist
    from accelerate import PartialState

    try:
        state = PartialState(cpu=cpu)
        # The state may have been made before, for another device: torch knows how many we are.
        index, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        group = None
        if count > 1:
            state.wait_for_everyone()
            # The default group gives up after minutes, which is shorter than the last batches of a slow neighbour.
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as fault:
        raise ErasureError(f"the processes of this run cannot find each other: {fault}") from fault
    try:
        yield ProcessGroup(index, count, group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)
