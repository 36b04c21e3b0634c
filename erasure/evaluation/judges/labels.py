"""Labels as users write them, and a model's classes renamed or merged to them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from erasure.config import read_yaml
from erasure.errors import ErasureError, unknown

Labels = str | Sequence[str] | Mapping[str, object] | None
FEW = 40  # names that an error lists; a model may have 1,000 classes


def read_labels(given: Labels) -> dict[str, list[str]]:
    """Label -> texts or classes it stands for.

    Args:
        given: a mapping label -> one or several names; a list of labels that stand for themselves; such a list as
            text, separated by commas; or the path of a YAML file (.yaml, .yml) with such a mapping.

    Raises:
        ErasureError: the file cannot be read, or a label stands twice or for nothing.
    """
    if isinstance(given, str):
        if given.endswith((".yaml", ".yml")):
            given = read_yaml(given)
        else:
            given = [part.strip() for part in given.split(",")]
    if not isinstance(given, Mapping):
        labels = [str(label) for label in given or ()]
        if len(set(labels)) < len(labels):
            raise ErasureError(f"labels {', '.join(labels)}: one stands twice")
        given = dict(zip(labels, labels, strict=True))
    found = {str(label): _listed(names) for label, names in given.items()}
    empty = [repr(label) for label, names in found.items() if not label or not all(names) or not names]
    if empty:
        raise ErasureError(f"label {', '.join(empty)} stands for nothing")
    return found


def read_list(given: str | Sequence[str]) -> list[str]:
    """Names in order, from a list, from text separated by commas, or from a text file with one a line."""
    if not isinstance(given, str):
        return [str(name) for name in given]
    if not given.endswith(".txt"):
        return [part.strip() for part in given.split(",")]
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise ErasureError(f"{given}: cannot be read: {fault}") from None
    return [line.strip() for line in lines if line.strip()]


def _listed(names: object) -> list[str]:
    return [str(name) for name in names] if isinstance(names, list | tuple) else [str(names)]


def unknown_label(noun: str, given: str, allowed: Iterable[str]) -> ErasureError:
    """As `unknown`, with the nearest names only where there are many."""
    names = list(allowed)
    if len(names) <= FEW:
        return unknown(noun, given, names)
    near = difflib.get_close_matches(given, names, n=5, cutoff=0.4)
    return unknown(noun, given, [*near, *[name for name in names if name not in near][: FEW // 4], "..."])


def unique_names(classes: Iterable[str]) -> list[str]:
    """Names of a model's classes, told apart by their number where two are the same (ImageNet has two cranes)."""
    names = [str(name) for name in classes]
    times = Counter(names)
    return [f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names)]


def class_number(wanted: str, classes: list[str]) -> int:
    """The number of a class given by name, by one of its words ("tench" of "tench, Tinca tinca") or by number.

    Raises:
        ErasureError: there is none, or several share the word.
    """
    if wanted in classes:
        return classes.index(wanted)
    words = [
        i
        for i, name in enumerate(classes)
        if wanted.lower() in [word.strip().lower() for word in name.split(",")] or name == f"{wanted} ({i})"
    ]
    if len(words) == 1:
        return words[0]
    if words:
        raise ErasureError(f"class {wanted!r} is ambiguous: {', '.join(f'{i} ({classes[i]})' for i in words)}")
    if wanted.isdigit() and int(wanted) < len(classes):
        return int(wanted)
    raise unknown_label(f"class (or number up to {len(classes) - 1})", wanted, classes)


def merge_classes(classes: list[str], labels: Mapping[str, list[str]], closed: bool) -> dict[str, list[int]]:
    """Label -> numbers of the classes it stands for.

    Classes that no label names keep their own name, so that the most probable one still decides over all classes;
    with `closed` they are left out and the labels share everything.

    Raises:
        ErasureError: a class that the model lacks, one under two labels, or fewer than two labels left.
    """
    groups: dict[str, list[int]] = {}
    owner: dict[int, str] = {}
    for label, wanted in labels.items():
        for name in wanted:
            number = class_number(name, classes)
            if owner.setdefault(number, label) != label:
                raise ErasureError(f"class {classes[number]!r} stands under {owner[number]!r} and {label!r}")
        groups[label] = [number for number, by in owner.items() if by == label]
    if not closed:
        for number, name in enumerate(classes):
            if number in owner:
                continue
            if name in groups:
                raise ErasureError(f"label {name!r} leaves out the class {name!r}: name it, or rename the label")
            groups[name] = [number]
    if len(groups) < 2:
        raise ErasureError(f"{', '.join(groups) or 'no label'}: a judge chooses among two labels or more")
    return groups
