"""Find judges by name, and build a judge from a text such as `nudenet:threshold=0.6`."""

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

GROUP = "erasure.judges"  # entry points of other packages: callables that take options (and a source)
KINDS = {
    "glyph": "erasure.glyph.judge:GlyphJudge",
    "classifier": "erasure.evaluation.judges.classifier:ClassifierJudge",
    "clip": "erasure.evaluation.judges.clip:ClipJudge",
    "nudenet": "erasure.evaluation.judges.nudity:NudeNetJudge",
    "inception": "erasure.evaluation.judges.inception:InceptionJudge",
}
SPEC = "KIND[:SOURCE][?OPTION=VALUE&...]; several are joined by +, or by any(A+B) or all(A+B) for votes"


def kinds() -> list[str]:
    """List every kind of judge: those of this package, and the entry points of other packages."""
    return sorted({*KINDS, *(point.name for point in entry_points(group=GROUP))})


def find_judge(spec: str) -> Judge:
    """Build a judge from a text.

    A judge is written as `KIND`, `KIND:SOURCE` or `KIND:SOURCE?OPTION=VALUE&OPTION=VALUE`; a kind that takes no source
    has its options after the colon. The options are the parameters of the kind's class. Lists are comma-separated, and
    mappings are YAML files. Judges joined by `+` form an ensemble that averages; `any(A+B)` and `all(A+B)` vote.

        glyph
        nudenet:threshold=0.6
        clip:openai/clip-vit-base-patch32?labels=cat,dog
        classifier:microsoft/resnet-50?labels=map.yaml
        any(nudenet + clip:FOLDER?head=nudity&labels=nudity.yaml)

    Args:
        spec: the text.

    Raises:
        ErasureError: the kind or an option is unknown, a value has the wrong type, or the judge cannot be loaded.
    """
    rule, members = _split_members(spec)
    judges = [_build(member) for member in members]
    if len(judges) == 1 and not rule:
        return judges[0]
    from erasure.evaluation.judges.ensemble import EnsembleJudge

    return EnsembleJudge(judges, rule or "mean")


def check_judge(spec: str) -> None:
    """Check that a text names existing kinds of judges, without loading them.

    Args:
        spec: a text as `find_judge` takes it.

    Raises:
        ErasureError: a kind is unknown.
    """
    for member in _split_members(spec)[1]:
        _split_spec(member)


def _split_members(spec: str) -> tuple[str, list[str]]:
    """Return the rule, empty if none is named, and the texts of the single judges."""
    match = re.fullmatch(r"\s*(mean|any|all)\((.*)\)\s*", spec, re.DOTALL)
    rule, text = match.groups() if match else ("", spec)
    known = "|".join(re.escape(kind) for kind in kinds())
    return rule, [part.strip() for part in re.split(rf"\+(?=\s*(?:{known})\s*(?:[:?+]|$))", text)]


def _split_spec(spec: str) -> tuple[str, str, str]:
    """Return the kind, the separator after it, and the remaining text."""
    kind, separator, text = (part.strip() for part in [*re.split(r"([:?])", spec, maxsplit=1), "", ""][:3])
    if kind not in kinds():
        first_unknown = next((part.strip() for part in kind.split("+") if part.strip() not in kinds()), kind)
        raise ErasureError(f"{unknown('judge', first_unknown, kinds())}. A judge is written as {SPEC}")
    return kind, separator, text


def _build(spec: str) -> Judge:
    kind, separator, text = _split_spec(spec)
    build = factory(kind)
    arguments: dict[str, Any] = {}
    source = inspect.signature(build).parameters.get("source")
    if source is not None:
        name, _, text = text.partition("?") if separator == ":" else ("", "", text)
        if name:
            arguments["source"] = name
        elif source.default is source.empty:
            raise ErasureError(f"judge {spec!r} needs a source: {kind}:SOURCE, with a folder or a hub id")
    return build(**arguments, **_options(kind, build, text))


def factory(kind: str) -> Callable[..., Judge]:
    """Return the callable that builds a judge of a kind: its class, or the entry point of another package.

    Args:
        kind: one of `kinds`.
    """
    for point in entry_points(group=GROUP):
        if point.name == kind and kind not in KINDS:
            return point.load()
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def _options(kind: str, build: Callable[..., Judge], text: str) -> dict[str, Any]:
    """Parse `a=1&b=x` into keyword arguments of the builder, converted to the types of its parameters."""
    try:
        signature = inspect.signature(build, eval_str=True)
    except NameError:  # a plug-in may import its types for type checkers only
        signature = inspect.signature(build)
    parameters = signature.parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = [p.name for p in parameters if p.name != "source" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    hints = {
        p.name: p.annotation for p in parameters if not isinstance(p.annotation, str) and p.annotation is not p.empty
    }
    options: dict[str, Any] = {}
    for item in filter(None, text.split("&")):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ErasureError(
                f"judge {kind}: expected OPTION=VALUE, not {item!r}; options: {', '.join(names) or 'none'}"
            )
        if key not in names and not takes_any:
            raise unknown(f"option of judge {kind}", key, names)
        hint = hints.get(key, str)
        try:
            options[key] = coerce(
                {"true": True, "false": False}.get(value.lower(), value) if hint is bool else value, hint
            )
        except (TypeError, ValueError):
            raise ErasureError(f"judge {kind}: {key}={value!r}: expected {readable(hint)}") from None
    return options
