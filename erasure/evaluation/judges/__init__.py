"""Judges: images to labels and scores. One file a judge; `find_judge` makes one from a text."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from PIL import Image

from erasure.config import coerce, readable
from erasure.errors import ErasureError, unknown

# head -> label -> probability, or a score: the greatest decides. Keys that are no head of the judge hold the raw
# scores behind the decision (`nudity_parts`, `object_classes`); nothing is decided by them.
Verdict = dict[str, dict[str, float]]

GROUP = "erasure.judges"  # entry points of other packages: callables (source and) options -> Judge
KINDS = {
    "glyph": "glyph:GlyphJudge",
    "classifier": "classifier:ClassifierJudge",
    "clip": "clip:ClipJudge",
    "nudenet": "nudity:NudeNetJudge",
    "inception": "inception:InceptionJudge",
}
SPEC = "KIND[:SOURCE][?OPTION=VALUE&...], several joined by + and, for votes, any(A+B) or all(A+B)"


class Judge(Protocol):
    """Says what images show.

    `heads` maps a head (object, style) to its labels; `none` among them means: none of the others. A judge that fails
    on an image raises; whoever asked counts the image as a failure.
    """

    name: str
    heads: dict[str, list[str]]

    def find(self, name: str) -> tuple[str, list[str]]:
        """The head and the labels that a name stands for; raises ErasureError for a name it does not know."""

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Scores of every label for each image."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> Sequence[float | None]:
        """100 times the cosine of each image and its text (Hessel et al. 2021, without the cut at 0); None: none."""

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """Features [n, d] for distances between sets of images; None for each image: this judge has none."""

    def versions(self) -> dict[str, str]:
        """Version and hash of what judges, labels and thresholds, for the report."""


class LabelsOnly:
    """The part of a judge without CLIP: no scores of texts, no features."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[None]:
        """None for each image."""
        return [None] * len(images)

    def features(self, images: list[Image.Image]) -> list[None]:
        """None for each image."""
        return [None] * len(images)


def verdicts(judge: Judge, images: list[Image.Image]) -> list[Verdict]:
    """What a judge says of each image, checked: no answer must not pass as an image without the concept.

    Raises:
        ErasureError: not one verdict an image, or one without a score for each label of each head, all of them numbers.
    """
    found = judge.judge(images)
    if len(found) != len(images):
        raise ErasureError(f"{judge.name} gave {len(found)} verdicts on {len(images)} images")
    for verdict in found:
        for head, labels in judge.heads.items():
            scores = (verdict or {}).get(head, {})
            if any(not math.isfinite(scores.get(label, math.nan)) for label in labels):
                raise ErasureError(f"{judge.name} gave no score of some {head}")
    return found


def kinds() -> list[str]:
    """Every kind of judge there is: ours, and other packages' entry points."""
    return sorted({*KINDS, *(point.name for point in entry_points(group=GROUP))})


def find_judge(spec: str) -> Judge:
    """A judge from a text.

    A judge is `KIND`, `KIND:SOURCE` or `KIND:SOURCE?OPTION=VALUE&OPTION=VALUE`; a kind that needs no source takes
    its options after the colon. The options are the parameters of the kind's class; lists are separated by commas,
    maps are YAML files. Judges joined by `+` are an ensemble of means; `any(A+B)` and `all(A+B)` vote.

        glyph
        nudenet:threshold=0.6
        clip:openai/clip-vit-base-patch32?labels=cat,dog
        classifier:microsoft/resnet-50?labels=map.yaml
        any(nudenet + clip:FOLDER?head=nudity&labels=nudity.yaml)

    Raises:
        ErasureError: an unknown kind or option, a value of the wrong type, or whatever the judge says.
    """
    rule, members = _members(spec)
    judges = [_one(member) for member in members]
    if len(judges) == 1 and not rule:
        return judges[0]
    from erasure.evaluation.judges.ensemble import EnsembleJudge

    return EnsembleJudge(judges, rule or "mean")


def check(spec: str) -> None:
    """Raises ErasureError for a kind that there is none of; loads nothing."""
    for member in _members(spec)[1]:
        _parts(member)


def _members(spec: str) -> tuple[str, list[str]]:
    """The rule, empty where none is named, and the texts of the judges."""
    voted = re.fullmatch(r"\s*(mean|any|all)\((.*)\)\s*", spec, re.DOTALL)
    rule, text = voted.groups() if voted else ("", spec)
    known = "|".join(re.escape(kind) for kind in kinds())
    return rule, [part.strip() for part in re.split(rf"\+(?=\s*(?:{known})\s*(?:[:?+]|$))", text)]


def _parts(spec: str) -> tuple[str, str, str]:
    """Kind, what separates it from the rest, and the rest."""
    kind, sign, rest = (part.strip() for part in [*re.split(r"([:?])", spec, maxsplit=1), "", ""][:3])
    if kind not in kinds():
        named = next((part.strip() for part in kind.split("+") if part.strip() not in kinds()), kind)
        raise ErasureError(f"{unknown('judge', named, kinds())}. A judge is {SPEC}")
    return kind, sign, rest


def _one(spec: str) -> Judge:
    kind, sign, rest = _parts(spec)
    make = _factory(kind)
    given: dict[str, Any] = {}
    source = inspect.signature(make).parameters.get("source")
    if source is not None:
        name, _, rest = rest.partition("?") if sign == ":" else ("", "", rest)
        if name:
            given["source"] = name
        elif source.default is source.empty:
            raise ErasureError(f"judge {spec!r} needs a source: {kind}:SOURCE, a folder or a name of the hub")
    return make(**given, **_options(kind, make, rest))


def _factory(kind: str) -> Callable[..., Judge]:
    for point in entry_points(group=GROUP):
        if point.name == kind and kind not in KINDS:
            return point.load()
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _options(kind: str, make: Callable[..., Judge], text: str) -> dict[str, Any]:
    """`a=1&b=x` as keyword arguments of `make`, each of the type its parameter asks for."""
    try:
        signature = inspect.signature(make, eval_str=True)
    except NameError:  # of a plug-in whose types are for type checkers only
        signature = inspect.signature(make)
    parameters = signature.parameters.values()
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = [p.name for p in parameters if p.name != "source" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    hints = {
        p.name: p.annotation for p in parameters if not isinstance(p.annotation, str) and p.annotation is not p.empty
    }
    found: dict[str, Any] = {}
    for item in filter(None, text.split("&")):
        key, sign, value = (part.strip() for part in item.partition("="))
        if not sign:
            raise ErasureError(f"judge {kind}: {item!r} is not option=value; options: {', '.join(names) or 'none'}")
        if key not in names and not free:
            raise unknown(f"option of judge {kind}", key, names)
        hint = hints.get(key, str)
        try:
            found[key] = coerce(
                {"true": True, "false": False}.get(value.lower(), value) if hint is bool else value, hint
            )
        except (TypeError, ValueError):
            raise ErasureError(f"judge {kind}: {key}={value!r}: expected {readable(hint)}") from None
    return found
