"""Judges: images to labels and scores. One file a judge; `find_judge` makes one from a text."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from erasure.config import coerce, readable
from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.judge import Judge

GROUP = "erasure.judges"  # entry points of other packages: callables (source and) options -> Judge
KINDS = {
    "glyph": "erasure.glyph.judge:GlyphJudge",
    "classifier": "erasure.evaluation.judges.classifier:ClassifierJudge",
    "clip": "erasure.evaluation.judges.clip:ClipJudge",
    "nudenet": "erasure.evaluation.judges.nudity:NudeNetJudge",
    "inception": "erasure.evaluation.judges.inception:InceptionJudge",
}
SPEC = "KIND[:SOURCE][?OPTION=VALUE&...], several joined by + and, for votes, any(A+B) or all(A+B)"


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


def check_judge(spec: str) -> None:
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
    make = factory(kind)
    given: dict[str, Any] = {}
    source = inspect.signature(make).parameters.get("source")
    if source is not None:
        name, _, rest = rest.partition("?") if sign == ":" else ("", "", rest)
        if name:
            given["source"] = name
        elif source.default is source.empty:
            raise ErasureError(f"judge {spec!r} needs a source: {kind}:SOURCE, a folder or a name of the hub")
    return make(**given, **_options(kind, make, rest))


def factory(kind: str) -> Callable[..., Judge]:
    """Return what makes a judge of a kind: a class, or a plug-in's callable."""
    for point in entry_points(group=GROUP):
        if point.name == kind and kind not in KINDS:
            return point.load()
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


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
