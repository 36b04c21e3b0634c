"""Labels as users write them, and the classes of a model renamed or merged to them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from erasure.config import read_yaml
from erasure.errors import ErasureError, unknown

Labels = str | Sequence[str] | Mapping[str, object] | None
MAX_LISTED = 40  # names that an error message lists in full; a model may have 1,000 classes


def read_labels(source: Labels) -> dict[str, list[str]]:
    """Return a mapping from each label to the texts or classes that it stands for.

    Args:
        source: a mapping from each label to one or several names; a list of labels that stand for themselves; such a
            list as comma-separated text; or the path of a YAML file (.yaml, .yml) with such a mapping.

    Raises:
        ErasureError: the file cannot be read, a label occurs twice, or a label stands for nothing.
    """
    if isinstance(source, str):
        if source.endswith((".yaml", ".yml")):
            source = read_yaml(source)
        else:
            source = [part.strip() for part in source.split(",")]
    if not isinstance(source, Mapping):
        labels = [str(label) for label in source or ()]
        if len(set(labels)) < len(labels):
            raise ErasureError(f"labels {', '.join(labels)}: a label occurs twice")
        source = dict(zip(labels, labels, strict=True))
    groups = {str(label): _as_list(names) for label, names in source.items()}
    empty = [repr(label) for label, names in groups.items() if not label or not all(names) or not names]
    if empty:
        raise ErasureError(f"label {', '.join(empty)} stands for nothing: give it at least one text or class")
    return groups


def read_list(source: str | Sequence[str]) -> list[str]:
    """Return names in order, from a list, from comma-separated text, or from a .txt file with one name per line.

    Raises:
        ErasureError: the file cannot be read.
    """
    if not isinstance(source, str):
        return [str(name) for name in source]
    if not source.endswith(".txt"):
        return [part.strip() for part in source.split(",")]
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise ErasureError(f"{source}: cannot be read: {fault}") from None
    return [line.strip() for line in lines if line.strip()]


def _as_list(names: object) -> list[str]:
    return [str(name) for name in names] if isinstance(names, list | tuple) else [str(names)]


def unknown_label(noun: str, name: str, allowed: Iterable[str]) -> ErasureError:
    """Return the error of `unknown`, which lists only the closest names if there are many.

    Args:
        noun: what the name should have been, such as `label of the classifier`.
        name: the unknown name.
        allowed: the known names.
    """
    names = list(allowed)
    if len(names) <= MAX_LISTED:
        return unknown(noun, name, names)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    others = [other for other in names if other not in close][: MAX_LISTED // 4]
    return unknown(noun, name, [*close, *others, "..."])


def unique_names(classes: Iterable[str]) -> list[str]:
    """Return the names of a model's classes, with the class number appended to names that occur twice.

    ImageNet, for example, has two classes called crane.
    """
    names = [str(name) for name in classes]
    times = Counter(names)
    return [f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names)]


def class_number(name: str, classes: list[str]) -> int:
    """Return the number of a class.

    Args:
        name: the class's name, one of its synonyms ("tench" of "tench, Tinca tinca"), or its number.
        classes: names of all classes, in order.

    Raises:
        ErasureError: there is no such class, or several classes share the synonym.
    """
    if name in classes:
        return classes.index(name)
    matches = [
        i
        for i, listed in enumerate(classes)
        if name.lower() in [word.strip().lower() for word in listed.split(",")] or listed == f"{name} ({i})"
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ErasureError(f"class {name!r} is ambiguous: {', '.join(f'{i} ({classes[i]})' for i in matches)}")
    if name.isdigit() and int(name) < len(classes):
        return int(name)
    raise unknown_label(f"class (or number up to {len(classes) - 1})", name, classes)


def merge_classes(classes: list[str], labels: Mapping[str, list[str]], closed: bool) -> dict[str, list[int]]:
    """Return a mapping from each label to the numbers of its classes.

    Args:
        classes: names of all classes of the model, in order.
        labels: label -> classes that it stands for.
        closed: leave out the classes that no label names. Otherwise they stay labels of their own, so that the most
            probable of all classes decides.

    Raises:
        ErasureError: the model has no such class, two labels claim the same class, or fewer than two labels are left.
    """
    groups: dict[str, list[int]] = {}
    owner: dict[int, str] = {}
    for label, names in labels.items():
        for name in names:
            number = class_number(name, classes)
            if owner.setdefault(number, label) != label:
                raise ErasureError(f"the labels {owner[number]!r} and {label!r} both claim class {classes[number]!r}")
        groups[label] = [number for number, claimed_by in owner.items() if claimed_by == label]
    if not closed:
        for number, name in enumerate(classes):
            if number in owner:
                continue
            if name in groups:
                raise ErasureError(
                    f"label {name!r} does not include the class {name!r}: add the class to it, or rename the label"
                )
            groups[name] = [number]
    if len(groups) < 2:
        raise ErasureError(f"{', '.join(groups) or 'no label'}: a judge needs at least two labels to choose from")
    return groups
