"""Choose some rows of a prompt set, spread evenly over the values of their labels."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from erasure.prompts.prompt_set import order_by_hash
from erasure.prompts.row import Prompt


def spread(
    rows: Sequence[Prompt], count: int, labels: Sequence[str], wanted: Callable[[Prompt], bool] = lambda row: False
) -> list[Prompt]:
    """Return `count` of the rows, among which every value of a label and every seed occurs about equally often.

    Each further row is the one whose values and seed were taken least often so far. The seed counts only if rows share
    it. Rows that are equal in this respect follow in an order that depends on their ids alone, so that the choice is
    the same in every run.

    Args:
        rows: the rows.
        count: number of rows to return; all of them if there are fewer.
        labels: names of the labels over which to spread; a row without one of them counts as having an empty value.
        wanted: whether a row should come before others with values as rare as its own.

    Returns:
        The chosen rows, in the order of `rows`.
    """
    if count >= len(rows):
        return list(rows)
    by_seed = len({row.seed for row in rows}) < len(rows)
    values = {
        row.id: (*((label, row.labels.get(label, "")) for label in labels), *([("seed", row.seed)] if by_seed else []))
        for row in rows
    }
    taken: Counter[tuple[str, object]] = Counter()
    # Counts only grow, so an entry whose cost has not changed since it was queued is the cheapest one.
    queue = [(0, not wanted(row), place, row.id) for place, row in enumerate(order_by_hash(list(rows)))]
    heapq.heapify(queue)
    chosen: set[str] = set()
    while len(chosen) < count:
        cost, later, place, name = heapq.heappop(queue)
        now = sum(taken[value] for value in values[name])
        if now > cost:
            heapq.heappush(queue, (now, later, place, name))
            continue
        chosen.add(name)
        taken.update(values[name])
    return [row for row in rows if row.id in chosen]
