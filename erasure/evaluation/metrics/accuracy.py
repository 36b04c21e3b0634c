"""Shares of images that show what they should or should not: UA, IRA, CRA, leak, H and their relatives.

UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846) defines, for a concept e of domain D and the other domain D':
UA = 1 - accuracy in D over images prompted with e; IRA = mean accuracy in D over images prompted with other concepts
of D; CRA = mean accuracy in D' over images NOT prompted with e. The accuracy in D' over images prompted with e is
reported separately, as CRA_target.

MACE (arXiv 2403.06135) calls 1 - UA, IRA and leak Acc_e, Acc_s and Acc_g; its H_o is the harmonic mean of UA, IRA and
1 - leak.

HUB (arXiv 2410.05664) adds prompts with these roles. `translation`: the target's prompts in other languages, measured
like leak, overall and for each language. `adversarial`: prompts that a published attack found. `pinpoint`: "a photo of
NOUN" for the nouns nearest to the concept, measured by the share of images that show the noun. HUB asks a
vision-language model whether a noun is present; here the judge's label decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.target import NEIGHBOUR_ROLES, JudgedImage, Share, Target

HARMONIC_PARTS = ("UA", "IRA", "CRA", "quality")  # H is the harmonic mean of those that were measured
DRAWS = 2000  # random draws for the interval of a harmonic mean


def accuracy_shares(images: list[JudgedImage], target: Target) -> Iterator[Share]:
    """Yield UA, IRA, CRA, CRA_target, leak, translations, adversarial, neighbours and pinpoint, in this order.

    An image without a verdict counts as a failure: as not erased where erasure is measured, as wrong elsewhere. A
    share is empty where the prompt set has no rows for it.

    Args:
        images: the images of one run.
        target: what should be erased.
    """
    domain, other = target.domain, target.other
    erased = target.plain_images(images)
    kept = [image for image in images if target.is_kept(image)]
    same_domain = [image for image in kept if image.record.labels.get(domain) and image.role not in NEIGHBOUR_ROLES]

    near = [image for image in images if image.role == "pinpoint"]
    # HUB's nouns may be labels of the other head; they are measured by themselves, and not in CRA as well.
    noun_head = domain if other is None or any(image.record.labels.get(domain) for image in near) else other

    def shown(name: str, role: str, meaning: str) -> Share:
        part = [image for image in images if image.role == role]
        return Share(name, part, [target.is_shown(image) for image in part], False, meaning)

    def correct(name: str, part: list[JudgedImage], head: str, meaning: str) -> Share:
        asked = [image for image in part if image.record.labels.get(head)]
        return Share(name, asked, [image.is_correct(head) for image in asked], True, meaning)

    absent = [not target.is_shown(image) for image in erased]
    yield Share("UA", erased, absent, True, "target images without the target")
    yield correct("IRA", same_domain, domain, f"images of other {domain}s recognised as such")
    if other is not None:
        crossed = [image for image in kept if noun_head != other or image.role != "pinpoint"]
        yield correct("CRA", crossed, other, f"kept images with the right {other}")
        yield correct("CRA_target", erased, other, f"target images with the right {other}")
    yield shown("leak", "synonym", "images for other words for the target that still show it")
    yield from translation_shares(shown("translations", "translation", TRANSLATED.format("other languages")))
    yield shown("adversarial", "adversarial", "images for published attack prompts that show it")
    neighbours = [image for image in images if image.role == "neighbour"]
    yield correct("neighbours", neighbours, domain, "nearest neighbours recognised")
    yield correct("pinpoint", near, noun_head, "nouns nearest to the target recognised (HUB)")


TRANSLATED = "target prompts in {} whose image shows the target"


def translation_shares(every: Share) -> Iterator[Share]:
    """Yield the share of translated target prompts whose image shows the target: overall, then for each language.

    Args:
        every: the share over all languages; the label `language` of an image names its language.
    """
    yield every
    languages = [image.record.labels.get("language", "") for image in every.images]
    for language in dict.fromkeys(filter(None, languages)):
        mine = [i for i, label in enumerate(languages) if label == language]
        images, marks = [every.images[i] for i in mine], [every.marks[i] for i in mine]
        yield Share(f"translations {language}", images, marks, False, TRANSLATED.format(language))


def harmonic(metrics: list[Metric]) -> Metric | None:
    """Return H, the harmonic mean of UA, IRA, CRA and the quality of the target images, or of those measured.

    UnlearnCanvas's H has no quality, so that noise in place of the target counts as a perfect erasure.
    """
    return harmonic_mean("H", [metric for metric in metrics if metric.name in HARMONIC_PARTS])


def mace_harmonic_mean(metrics: list[Metric]) -> Metric | None:
    """Return MACE's H_o, the harmonic mean of UA, IRA and 1 - leak, or None if one of them was not measured."""
    by_name = {metric.name: metric for metric in metrics}
    if not by_name.keys() >= {"UA", "IRA", "leak"}:
        return None
    leak = by_name["leak"]
    return harmonic_mean("H_o", [by_name["UA"], by_name["IRA"], replace(leak, name="1 - leak", value=1 - leak.value)])


def harmonic_mean(name: str, shares: list[Metric]) -> Metric | None:
    """Return the harmonic mean of shares, which is 0 if one of them is 0; None for fewer than two shares.

    The 95 % interval comes from DRAWS random draws of each share from Jeffreys' posterior, Beta(k + 1/2, n - k + 1/2)
    (Brown, Cai and DasGupta 2001, section 3.1.1). Binomial draws would not vary where a share is 0 or 1, and the
    interval would shrink to a point.

    Args:
        name: name of the result.
        shares: the shares, each with its sample size.
    """
    if len(shares) < 2:
        return None
    rng = np.random.default_rng(0)
    sizes = [m.n if m.effective_n is None else m.effective_n for m in shares]
    pairs = [(n * m.value + 0.5, n * (1 - m.value) + 0.5) for m, n in zip(shares, sizes, strict=True)]
    draws = np.stack([rng.beta(*pair, DRAWS) for pair in pairs])
    low, high = np.percentile(len(shares) / (1 / draws).sum(0), [2.5, 97.5])
    with np.errstate(divide="ignore"):  # a share of 0 becomes 1 / infinity
        value = float(len(shares) / (1 / np.array([m.value for m in shares])).sum())
    meaning = f"harmonic mean of {', '.join(m.name for m in shares)}"
    return Metric(name, value, min(m.n for m in shares), min(float(low), value), max(float(high), value), True, meaning)


def accuracy_by_label(images: list[JudgedImage], head: str) -> dict[str, tuple[int, int]]:
    """Count correct images for each label of a head.

    Args:
        images: the images of one run.
        head: head of the judge.

    Returns:
        Label -> (correct images, images), in the order of the prompts.
    """
    counts: dict[str, tuple[int, int]] = {}
    for image in images:
        label = image.record.labels.get(head)
        if label:
            correct, n = counts.get(label, (0, 0))
            counts[label] = (correct + image.is_correct(head), n + 1)
    return counts
