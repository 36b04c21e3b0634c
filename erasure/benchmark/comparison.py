"""Paired comparisons of methods on the same images: McNemar's test, a bootstrap over concepts, Holm's correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from erasure.benchmark.row import Row
from erasure.evaluation.metrics.metric import format_estimate
from erasure.evaluation.metrics.statistics import ALPHA, holm, mcnemar

TESTED = ("UA", "quality", "leak", "IRA", "neighbours", "CRA")
KEPT = ("quality", "IRA", "neighbours", "CRA")  # compared with the base too; the others differ from it by design
LOWER_IS_BETTER = ("leak",)
DRAWS = 2000
BASE = "base"


@dataclass(frozen=True)
class Comparison:
    """Two methods on the images that both drew, or a method and the base model.

    Args:
        group: title of the group of concepts.
        metric: name of a share of images.
        first: name of a method.
        second: name of another method, or "base".
        concepts: number of concepts.
        n: number of images.
        only_first: images that count for the first method alone.
        only_second: images that count for the second method alone.
        difference: share of the first minus share of the second, a mean over concepts.
        low: lower end of the difference's 95 % interval (bootstrap over concepts, and over prompts within a concept).
        high: upper end.
        p: p-value of McNemar's exact test over all images.
        corrected: the p-value after Holm's correction for all comparisons of its family.
        lower_is_better: whether the lower share is the better one.
    """

    group: str
    metric: str
    first: str
    second: str
    concepts: int
    n: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float
    corrected: float = 1.0
    lower_is_better: bool = False

    @property
    def significant(self) -> bool:
        """Return whether the two differ: the corrected p-value is below ALPHA and the interval excludes 0."""
        return self.corrected < ALPHA and not self.low <= 0 <= self.high

    @property
    def better(self) -> str:
        """Return the name of the one with the better share."""
        return self.first if (self.difference > 0) != self.lower_is_better else self.second

    @property
    def worse(self) -> str:
        """Return the name of the one with the worse share."""
        return self.second if self.better == self.first else self.first


def compare(
    rows: Sequence[Row],
    prompts: Mapping[str, str],
    tested: Sequence[str] = TESTED,
    kept: Sequence[str] = KEPT,
    lower_is_better: Sequence[str] = LOWER_IS_BETTER,
) -> list[Comparison]:
    """Compare every two methods in each group of concepts, and every method with the base, on the same images.

    The comparisons between methods are one family for Holm's correction, those with the base another. Rows of concepts
    that settings were tuned on are left out.

    Args:
        rows: rows with outcomes.
        prompts: id of an image -> its prompt; images of one prompt are resampled together.
        tested: shares by which methods are compared with each other.
        kept: shares by which methods are compared with the base.
        lower_is_better: shares of which the lower one is the better.
    """
    groups: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if not row.tuned and row.outcomes:
            groups.setdefault(row.group, {}).setdefault(row.method, {})[row.concept] = row
    among = [c for group, methods in groups.items() for c in _among_methods(group, methods, prompts, tested)]
    with_base = [c for group, methods in groups.items() for c in _with_base(group, methods, prompts, kept)]
    found = [*_corrected(among), *_corrected(with_base)]
    return [replace(comparison, lower_is_better=comparison.metric in lower_is_better) for comparison in found]


def _among_methods(
    group: str, methods: Mapping[str, Mapping[str, Row]], prompts: Mapping[str, str], tested: Sequence[str]
) -> Iterator[Comparison]:
    for metric in tested:
        for first, second in combinations(methods, 2):
            shared = [concept for concept in methods[first] if concept in methods[second]]
            pairs = [
                (methods[first][concept].outcomes.get(metric, {}), methods[second][concept].outcomes.get(metric, {}))
                for concept in shared
            ]
            yield from _compare(group, metric, first, second, pairs, prompts)


def _with_base(
    group: str, methods: Mapping[str, Mapping[str, Row]], prompts: Mapping[str, str], kept: Sequence[str]
) -> Iterator[Comparison]:
    for metric in kept:
        for method, rows in methods.items():
            pairs = [(row.outcomes.get(metric, {}), row.base.get(metric, {})) for row in rows.values()]
            yield from _compare(group, metric, method, BASE, pairs, prompts)


def _compare(
    group: str,
    metric: str,
    first: str,
    second: str,
    pairs: Sequence[tuple[Mapping[str, bool], Mapping[str, bool]]],
    prompts: Mapping[str, str],
) -> Iterator[Comparison]:
    """Yield the comparison of two lists of outcomes, one pair for each concept; nothing if they share no image."""
    concepts = []
    for ours, theirs in pairs:
        ids = [key for key in ours if key in theirs]
        if ids:
            differences = np.array([int(ours[key]) - int(theirs[key]) for key in ids])
            concepts.append((differences, [prompts.get(key, key) for key in ids]))
    if not concepts:
        return
    images = np.concatenate([differences for differences, _ in concepts])
    only_first, only_second = int((images > 0).sum()), int((images < 0).sum())
    low, high = np.percentile(bootstrap_concepts(concepts), [2.5, 97.5])
    difference = float(np.mean([differences.mean() for differences, _ in concepts]))
    p = mcnemar(only_first, only_second)
    counts = (len(concepts), len(images), only_first, only_second)
    yield Comparison(group, metric, first, second, *counts, difference, float(low), float(high), p)


def bootstrap_concepts(concepts: Sequence[tuple[np.ndarray, Sequence[str]]], seed: int = 0) -> np.ndarray:
    """Return DRAWS resampled means over concepts: concepts are resampled, then the prompts of each.

    With one concept, which says nothing about others, only prompts are resampled.

    Args:
        concepts: for each concept, one value for each image and the prompt of each image.
        seed: seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    means = np.empty((len(concepts), DRAWS))
    for i, (values, texts) in enumerate(concepts):
        index = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        members = np.array([index[text] for text in texts])
        sums, sizes = np.bincount(members, values), np.bincount(members)
        picks = rng.integers(len(sums), size=(DRAWS, len(sums)))
        means[i] = sums[picks].sum(1) / sizes[picks].sum(1)
    chosen = rng.integers(len(concepts), size=(DRAWS, len(concepts)))
    columns = rng.integers(DRAWS, size=chosen.shape)
    resampled: np.ndarray = means[chosen, columns].mean(1) if len(concepts) > 1 else means[0]
    return resampled


def _corrected(family: Sequence[Comparison]) -> list[Comparison]:
    corrected = holm([comparison.p for comparison in family])
    return [replace(comparison, corrected=p) for comparison, p in zip(family, corrected, strict=True)]


def marks(comparisons: Sequence[Comparison], group: str, metric: str, method: str) -> tuple[bool, bool]:
    """Return how a cell of the table is marked.

    Returns:
        Whether no other method is significantly better while some method is significantly worse than another; and
        whether the method is significantly worse than the base.
    """
    here = [c for c in comparisons if (c.group, c.metric) == (group, metric) and c.significant]
    losers = {c.worse for c in here if BASE not in (c.first, c.second)}
    below_base = any(c.second == BASE and c.worse == method and c.first == method for c in here)
    return bool(losers) and method not in losers, below_base


def differences(comparisons: Sequence[Comparison]) -> str:
    """Return the significant differences between methods as a Markdown table, after a sentence that counts them."""
    among = [c for c in comparisons if c.second != BASE]
    found = [c for c in among if c.significant]
    against = [c for c in comparisons if c.second == BASE]
    below = [c for c in against if c.significant and c.worse == c.first]
    lines = [
        f"{len(found)} of {len(among)} differences between methods, and {len(below)} of {len(against)} losses against "
        "the base, are significant (corrected p < 0.05, and the interval excludes 0).",
        "",
        "| concepts | metric | better | worse | difference | images | only better / only worse | corrected p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in [*found, *below]:
        first_is_better = c.better == c.first
        sign = 1 if first_is_better else -1
        ends = sorted((sign * c.low, sign * c.high))
        counts = (c.only_first, c.only_second) if first_is_better else (c.only_second, c.only_first)
        cells = [
            f"{c.group} ({c.concepts})",
            c.metric,
            c.better,
            c.worse,
            format_estimate(c.metric, sign * c.difference, *ends),
            str(c.n),
            f"{counts[0]} / {counts[1]}",
            f"{c.corrected:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
