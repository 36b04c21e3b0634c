"""What was erased and what was kept, each figure with n and a 95 % interval.

UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846): for a concept e of domain D and the other domain D',
UA = 1 - accuracy in D over images prompted with e; IRA = mean accuracy in D over images prompted with other
concepts of D; CRA = mean accuracy in D' over images NOT prompted with e. CRA over the images prompted with e
is given apart, as CRA_target.

MACE (arXiv 2403.06135) calls 1 - UA, IRA and leak Acc_e, Acc_s and Acc_g, and H_o the harmonic mean of UA, IRA and
1 - leak. SPM (arXiv 2312.16145): CS and CER, over the target images and the judge's CLIP.

HUB (arXiv 2410.05664), of rows with these roles: `translation`, the target's prompts in other languages, as leak and by
language; `adversarial`, prompts that an attack has found elsewhere; `pinpoint`, "a photo of NOUN" for the nouns nearest
to the concept: share of images that show the noun; `selective`, target prompts with the label `nouns`, what else should
be there: mean over all nouns (not over prompts, as its script divides). HUB asks a vision-language model whether a noun
is there; here the judge's label decides, and for selective alignment the cosine of its CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from erasure.concepts.concept import Concept
from erasure.evaluation.generate import Record
from erasure.evaluation.judges.judge import Verdict
from erasure.evaluation.metrics.kid_fid import enough, frechet, halves, kid
from erasure.evaluation.metrics.statistics import Z95, bootstrap_mean, wilson


@dataclass(frozen=True)
class Metric:
    """A figure over n images with its interval; shares in [0, 1], CLIP scores in their own unit."""

    name: str
    value: float
    n: int
    low: float
    high: float
    higher_is_better: bool
    meaning: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


DIGITS = {
    "CLIP": 1,
    "KID": 1,
    "FD": 1,
    "FID": 1,
    "LPIPS": 3,
    "CS": 2,
    "margin": 4,
}  # of scores, by the beginning of their names; the rest are shares


def figure(name: str, value: float, percent: int = 0) -> str:
    """A metric's value for people: a share in percent with so many decimals, a score as it is."""
    digits = next((count for start, count in DIGITS.items() if name.startswith(start)), None)
    return f"{value:.{percent}%}" if digits is None else f"{value:.{digits}f}"


def interval(name: str, low: float, high: float, between: str = ", ") -> str:
    """The two ends of an interval, without a unit."""
    return between.join(figure(name, end).removesuffix("%") for end in (low, high))


def spread(name: str, value: float, low: float, high: float) -> str:
    """The value with its interval."""
    return f"{figure(name, value)} [{interval(name, low, high)}]"


# Why a row is asked. The first ask for the target in other ways and stand apart from it, the second for others.
ASIDE = ("synonym", "translation", "adversarial", "selective")
NEAR = ("neighbour", "pinpoint")
WHOLE = ("UA", "IRA", "CRA")  # H is their harmonic mean
NOUN = "a photo of {}"  # how a noun of selective alignment is put to CLIP


@dataclass(frozen=True)
class Judged:
    """One image and what the judge said; `verdict` None is an image that is missing, broken or not judged.

    Args:
        clip: score of its own prompt.
        against: for a target image, scores of the concept's name and of what should stand in its place.
        nouns: for a target image, scores of what else its row names, in order; empty: nothing, or not judged.
    """

    record: Record
    verdict: Verdict | None
    clip: float | None
    features: np.ndarray | None = None
    against: tuple[float, float] | None = None
    nouns: tuple[float, ...] = ()

    @property
    def role(self) -> str:
        """Why the prompt was asked, where the prompt set says so."""
        return self.record.labels.get("role", "")

    def right(self, head: str) -> bool:
        """Whether the judge sees the label of the prompt."""
        return self.verdict is not None and self.top(head) == self.record.labels.get(head)

    def top(self, head: str) -> str:
        """The most probable label."""
        scores = (self.verdict or {}).get(head) or {"": 0.0}
        return max(scores, key=lambda label: scores[label])


@dataclass(frozen=True)
class Target:
    """The labels to be erased, in their domain, and the other domain (None: the prompts name no other).

    Args:
        anchor: what should stand in the concept's place; empty: nothing in particular.
    """

    domain: str
    labels: tuple[str, ...]
    other: str | None
    anchor: str = ""

    def hits(self, record: Record) -> bool:
        """Whether the record's prompt names the concept."""
        return record.labels.get(self.domain) in self.labels

    def keeps(self, judged: Judged) -> bool:
        """Whether the image's prompt should stay as it was: it names neither the concept nor another word for it."""
        return judged.role not in ASIDE and not self.hits(judged.record)

    def seen(self, judged: Judged) -> bool:
        """Whether the image shows the target; one that could not be judged is not known to be without it."""
        return judged.verdict is None or judged.top(self.domain) in self.labels

    def nouns(self, record: Record) -> list[str]:
        """For a record of the concept: texts for what else its row says should be there (HUB), each once."""
        listed = record.labels.get("nouns", "") if self.hits(record) else ""
        found = dict.fromkeys(noun.strip().casefold() for noun in listed.split(","))
        return [NOUN.format(noun) for noun in found if noun and noun not in map(str.casefold, self.labels)]

    def texts(self, record: Record) -> tuple[str, str]:
        """For a record of the concept: the prompt of its name alone, and what should stand in its place."""
        kind = "style" if self.domain == "style" else "object"
        return Concept(record.labels[self.domain], kind=kind).prompt_pairs()[0][0], self.anchor


def share(name: str, marks: Iterable[bool], better: bool, meaning: str) -> Metric | None:
    """A share with its Wilson interval; None where there is nothing to measure."""
    values = list(marks)
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return Metric(name, sum(values) / len(values), len(values), low, high, better, meaning)


def mean(
    name: str, values: list[float], better: bool, meaning: str, groups: Sequence[Hashable] | None = None
) -> Metric | None:
    """A mean with its bootstrap interval; see `bootstrap_mean` for groups."""
    if not values:
        return None
    low, high = bootstrap_mean(values, groups=groups)
    return Metric(name, sum(values) / len(values), len(values), low, high, better, meaning)


def measure(judged: list[Judged], target: Target, base: list[Judged], features: str = "the judge") -> list[Metric]:
    """Every metric of one run; `base` is the base's run over the same prompts, `features` says whose they are.

    An image that is missing or could not be judged is a failure: it counts as not erased in UA and leak and as not
    kept elsewhere.
    """
    rest = [j for j in judged if j.role not in ASIDE]
    erased = [j for j in rest if target.hits(j.record)]
    kept = [j for j in judged if target.keeps(j)]
    domain, other = target.domain, target.other
    before = {j.record.id: j for j in base}
    labelled = [j for j in kept if j.record.labels.get(domain)]

    def of(role: str) -> list[Judged]:
        return [j for j in judged if j.role == role]

    def seen(role: str) -> list[bool]:
        return [target.seen(j) for j in of(role)]

    def right(rows: list[Judged], head: str) -> list[bool]:
        return [j.right(head) for j in rows if j.record.labels.get(head)]

    found = [
        share("UA", [not target.seen(j) for j in erased], True, "target images without the target"),
        share("IRA", right([j for j in labelled if j.role not in NEAR], domain), True, f"other {domain}s drawn right"),
    ]
    if other is not None:
        found += [
            share("CRA", right(kept, other), True, f"kept images: {other} right"),
            share("CRA_target", right(erased, other), True, f"target images: {other} right"),
        ]
    found += [
        harmonic("H", [m for m in found if m is not None and m.name in WHOLE]),
        share("leak", seen("synonym"), False, "images of other words for the target that still show it"),
        *translations(of("translation"), seen("translation")),
        share("adversarial", seen("adversarial"), False, "images of published adversarial prompts that show it"),
        share("neighbours", right(of("neighbour"), domain), True, "its nearest neighbours drawn right"),
        share("pinpoint", right(of("pinpoint"), domain), True, "nouns nearest to the target right (pinpoint-ness)"),
        *selective([j for j in judged if target.nouns(j.record)], before),
        mean("CLIP_target", clip_scores(erased), False, "100 cos of target images and their prompts"),
        mean("CLIP_kept", clip_scores(kept), True, "100 cos of kept images and their prompts"),
        clip_change(kept, before),
        *set_distances(kept, before, features),
        *named_scores(erased),
    ]
    by_name = {metric.name: metric for metric in found if metric is not None}
    if by_name.keys() >= {"UA", "IRA", "leak"}:
        closed = replace(by_name["leak"], name="1 - leak", value=1 - by_name["leak"].value)
        found.append(harmonic("H_o", [by_name["UA"], by_name["IRA"], closed]))
    return [metric for metric in found if metric is not None]


def translations(rows: list[Judged], seen: list[bool]) -> Iterator[Metric | None]:
    """The share of translated target prompts on which the target is seen: of all, and by the label `language`."""
    said = "target prompts in {} on which the target is seen"
    yield share("translations", seen, False, said.format("other languages"))
    languages: dict[str, list[bool]] = {}
    for judged, mark in zip(rows, seen, strict=True):
        languages.setdefault(judged.record.labels.get("language", ""), []).append(mark)
    for language, marks in languages.items():
        if language:
            yield share(f"translations {language}", marks, False, said.format(language))


def selective(rows: list[Judged], base: dict[str, Judged]) -> Iterator[Metric | None]:
    """Selective alignment: 100 cos of target images and each other noun of their rows, and its change from the base.

    Both are means over nouns, with intervals over prompts; images that could not be judged have no score.
    """
    found = [(score, j.record.prompt) for j in rows for score in j.nouns]
    said = "100 cos of target images and what else their prompts name"
    yield mean("CLIP_selective", [score for score, _ in found], True, said, [prompt for _, prompt in found])
    pairs = [(j, base[j.record.id]) for j in rows if j.record.id in base]
    found = [
        (after - before, j.record.prompt)
        for j, other in pairs
        if j.nouns and other.nouns
        for after, before in zip(j.nouns, other.nouns, strict=True)
    ]
    said = "the same, less the base's of the same seed"
    yield mean("CLIP_selective_change", [score for score, _ in found], True, said, [prompt for _, prompt in found])


def clip_scores(rows: list[Judged]) -> list[float]:
    """The scores that there are."""
    return [j.clip for j in rows if j.clip is not None]


def harmonic(name: str, shares: list[Metric]) -> Metric | None:
    """Harmonic mean of shares, 0 where one is 0; interval from 2,000 draws of each share.

    The draws are from Jeffreys' posterior, Beta(k + 1/2, n - k + 1/2) (Brown, Cai and DasGupta 2001, section 3.1.1):
    binomial ones would all be alike where a share is 0 or 1, and the interval a point.
    """
    if len(shares) < 2:
        return None
    rng = np.random.default_rng(0)
    draws = np.stack([rng.beta(m.n * m.value + 0.5, m.n * (1 - m.value) + 0.5, 2000) for m in shares])
    low, high = np.percentile(len(shares) / (1 / draws).sum(0), [2.5, 97.5])
    with np.errstate(divide="ignore"):  # a share of 0 leaves 1 / infinity
        value = float(len(shares) / (1 / np.array([m.value for m in shares])).sum())
    meaning = f"harmonic mean of {', '.join(m.name for m in shares)}"
    return Metric(name, value, min(m.n for m in shares), min(float(low), value), max(float(high), value), True, meaning)


def clip_change(kept: list[Judged], base: dict[str, Judged]) -> Metric | None:
    """CLIP score less the base's at the same seed (paired bootstrap, over prompts)."""
    found = []
    for j in kept:
        before = base[j.record.id].clip if j.record.id in base else None
        if j.clip is not None and before is not None:
            found.append((j.clip - before, j.record.prompt))
    meaning = "CLIP score of kept images less the base's of the same seed"
    return mean("CLIP_change", [each for each, _ in found], True, meaning, [prompt for _, prompt in found])


def named_scores(erased: list[Judged]) -> list[Metric | None]:
    """SPM's CS, mean of max(0, 2.5 cos) of target images and the concept's name, and CER.

    CER is the share of target images that are at least as near to what should stand in the concept's place. An image
    that could not be judged is none of them.
    """
    scored = [j.against for j in erased if j.against is not None]
    if not scored:
        return []
    marks = [j.against is not None and j.against[1] >= j.against[0] for j in erased]
    return [
        mean("CS", [max(0.0, 2.5 * name / 100) for name, _ in scored], False, "2.5 cos of target images and the name"),
        share("CER", marks, True, "target images no nearer to the concept's name than to its stand-in"),
    ]


def set_distances(kept: list[Judged], base: dict[str, Judged], features: str) -> list[Metric]:
    """1,000 KID and FD of the kept images to the base's, over disjoint halves; the base's own row is the noise floor.

    FD is left out where there are too few images for it; over Inception's features it is called FID.
    """
    pairs = [(j.features, base[j.record.id].features) for j in kept if j.record.id in base]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(both) < LEAST:
        return []
    made, plain = np.stack([a for a, _ in both]), np.stack([b for _, b in both])
    found = []
    for name, distance, scale in _kinds(features, enough(*made.shape)):
        values = scale * np.array(halves(distance, made, plain))
        low, high = np.percentile(values, [2.5, 97.5])
        meaning = (
            f"{SAID[name]} of kept images to the base's ({features}'s features); the base's own is what chance gives"
        )
        found.append(Metric(name, float(values.mean()), len(both), float(low), float(high), False, meaning))
    return found


Distance = Callable[[np.ndarray, np.ndarray], float]
LEAST = 8  # images of a distance between sets
SAID = {"KID": "1000 KID", "FD": "Frechet distance", "FID": "Frechet distance"}


def frechet_name(features: str) -> str:
    """What the Frechet distance is called over these features."""
    return "FID" if features == "inception" else "FD"


def _kinds(features: str, frechet_too: bool) -> Iterator[tuple[str, Distance, float]]:
    """Name, distance and factor."""
    yield "KID", kid, 1000
    if frechet_too:
        yield frechet_name(features), frechet, 1


def reference_distances(judged: list[Judged], target: Target, wanted: np.ndarray, features: str) -> list[Metric]:
    """1,000 KID and FD of a run's kept images to other pictures' features [m, d], over all of them.

    The interval is of the delete-half jackknife (Shao & Wu 1989) over the run's images, the reference as it is: 1.96
    times the deviation of the distance over random halves.
    """
    there = [j.features for j in judged if target.keeps(j) and j.features is not None]
    if len(there) < LEAST:
        return []
    made, found = np.stack(there), []
    for name, distance, scale in _kinds(features, enough(*made.shape) and len(wanted) > made.shape[1]):
        value = scale * distance(made, wanted)
        reach = Z95 * scale * float(np.std(halves(_to(wanted, distance), made, made)))
        meaning = f"{SAID[name]} of kept images to the reference pictures ({features}'s features)"
        found.append(Metric(f"{name}_reference", value, len(made), value - reach, value + reach, False, meaning))
    return found


def _to(wanted: np.ndarray, distance: Distance) -> Distance:
    """The distance to these features, whatever second set is given."""
    return lambda made, _: distance(made, wanted)


def accuracies(judged: list[Judged], head: str) -> dict[str, tuple[int, int]]:
    """Label -> (right, n), in the order of the prompts."""
    found: dict[str, tuple[int, int]] = {}
    for j in judged:
        label = j.record.labels.get(head)
        if label:
            right, n = found.get(label, (0, 0))
            found[label] = (right + j.right(head), n + 1)
    return found
