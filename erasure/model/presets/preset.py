"""What a preset holds, and how its YAML file is read: how to sample, settings of methods, prompts and anchors.

A file has the keys

    about         a description in one line
    like          another preset, from which everything is taken that the file does not set
    checkpoint    a diffusers folder that ships with the package, relative to the file
    vocabulary    a YAML file with the words that the checkpoint was taught
    clip          the CLIP that the text encoder was trained in: a hub id, or a function of this package
    architecture  what the family's networks have in common: text_width and text_encoders of a UNet; network (its class)
                  and text_width of a transformer
    checkpoints   names of published checkpoints of the family
    sampling      steps, guidance, scheduler (own: the checkpoint's) and the source of images that are evaluated
    preview       the same for previews
    call          arguments of the pipeline's call that belong to the checkpoints, such as max_sequence_length
    members       each, if every member of a content concept gets as many updates as a concept alone; one, if the
                  members are words for one thing
    defaults      the source of settings that the file does not set
    without       methods that do not suit the family, and why
    default       the method that is taken where none is named: a list, of which the last entry that holds wins, with
                  method, source, kinds (without it, all) and at_least (so many concepts by one patch; without it, one)
    methods       for each method a list of groups, of which later ones win

and a group of settings has the keys

    set      settings and their values
    kinds    kinds of concept that it holds for; without it, all
    names    concepts that it holds for; without it, all
    prompts  prompts to erase from, with {} for each name of the concept
    anchors  what is drawn instead, by the name of the concept
    source   where all this comes from
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from erasure.config import read_yaml
from erasure.errors import ErasureError, unknown

OWN = "own"  # the scheduler that the checkpoint comes with
KEYS = (
    "about",
    "like",
    "checkpoint",
    "vocabulary",
    "clip",
    "architecture",
    "checkpoints",
    "sampling",
    "preview",
    "call",
    "members",
    "defaults",
    "without",
    "default",
    "methods",
)


@dataclass(frozen=True)
class Sampling:
    """How the images of a checkpoint are sampled.

    Args:
        steps: number of steps.
        guidance: classifier-free guidance scale.
        scheduler: `own` for the checkpoint's own scheduler, or a name that `Base.sampler` takes.
        source: where the values come from.
    """

    steps: int
    guidance: float
    scheduler: str = OWN
    source: str = ""


@dataclass(frozen=True)
class Group:
    """Settings of one method that come from one source.

    Args:
        source: where they come from.
        settings: the settings and their values.
        kinds: kinds of concept that the group holds for; empty: all.
        names: concepts that the group holds for, in lower case; empty: all.
        prompts: prompts to erase from, with {} for each name of the concept.
        anchors: what is drawn instead, by the name of the concept in lower case.
    """

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    anchors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, entry: Any, where: str) -> Group:
        """Read a group from a mapping of a preset's file.

        Raises:
            ErasureError: no source, an unknown key, or settings for single concepts.
        """
        keys = {"set": "settings", **{name: name for name in ("source", "kinds", "names", "prompts", "anchors")}}
        if not isinstance(entry, dict):
            raise ErasureError(f"{where}: a group of settings must be a mapping, not {type(entry).__name__}")
        for key in entry:
            if key not in keys:
                raise ErasureError(f"{where}: {unknown('key', key, keys)}")
        if not str(entry.get("source") or "").strip():
            raise ErasureError(f"{where}: a group has no source; say which paper or script its values come from")
        if entry.get("names") and entry.get("set"):
            raise ErasureError(f"{where}: a group for single concepts holds prompts and anchors, not settings")
        values: dict[str, Any] = {
            keys[key]: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        return cls(**values)

    def holds(self, kind: str, name: str | None = None) -> bool:
        """Tell whether the group holds for a kind of concept, and if it is limited to some concepts, for this one."""
        named = not self.names or (name is not None and name.lower().strip() in self.names)
        return named and (not self.kinds or kind in self.kinds)


@dataclass(frozen=True)
class DefaultMethod:
    """A method that is taken where none is named, and why.

    Args:
        method: its name.
        source: where the choice comes from.
        kinds: kinds of concept that it is taken for; empty: all.
        at_least: number of concepts, erased by one patch, from which on it is taken.
    """

    method: str
    source: str
    kinds: tuple[str, ...] = ()
    at_least: int = 1

    @classmethod
    def read(cls, entry: Any, where: str) -> DefaultMethod:
        """Read an entry of a preset's file.

        Raises:
            ErasureError: no method, no source, or an unknown key.
        """
        known = ("method", "source", "kinds", "at_least")
        if not isinstance(entry, dict):
            raise ErasureError(f"{where}: an entry must be a mapping, not {type(entry).__name__}")
        for key in entry:
            if key not in known:
                raise ErasureError(f"{where}: {unknown('key', key, known)}")
        if missing := [key for key in known[:2] if not str(entry.get(key) or "").strip()]:
            raise ErasureError(f"{where}: an entry has no {' and no '.join(missing)}")
        return cls(**{**entry, "kinds": tuple(entry.get("kinds") or ())})

    def holds(self, kinds: Collection[str], count: int) -> bool:
        """Tell whether it holds for concepts of these kinds, erased by one patch: if it holds for any of the kinds."""
        return count >= self.at_least and (not self.kinds or not set(kinds).isdisjoint(self.kinds))


@dataclass(frozen=True)
class Preset:
    """What is known in advance about one checkpoint, or about a family of checkpoints.

    Args:
        name: the name that users give, as in `--model NAME` or `--preset NAME`.
        about: a description in one line.
        checkpoint: a diffusers folder that ships with the package, or None.
        words: the YAML file with the checkpoint's vocabulary, or None.
        clip: the CLIP that the text encoder was trained in (`model/clip_towers.py`), or None.
        architecture: what the networks that belong to the family have in common.
        checkpoints: names of published checkpoints of the family.
        sampling: how images are sampled that are drawn to be looked at, judged or trained on.
        preview: how the previews of a run are sampled.
        call: arguments of the pipeline's call that belong to the checkpoints.
        counts_members: whether every member of a content concept gets as many updates as a concept alone.
        defaults: the source of settings that the preset does not set.
        without: methods that do not suit the family, and why.
        default: methods that are taken where none is named; later ones win.
        groups: groups of settings, by method; later ones win.
    """

    name: str
    about: str
    checkpoint: Path | None = None
    words: Path | None = None
    clip: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    sampling: Sampling = Sampling(50, 7.5)
    preview: Sampling = Sampling(25, 7.5)
    call: Mapping[str, Any] = field(default_factory=dict)
    counts_members: bool = False
    defaults: str = ""
    without: Mapping[str, str] = field(default_factory=dict)
    default: tuple[DefaultMethod, ...] = ()
    groups: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)

    def settings(self, method: str, kind: str) -> dict[str, tuple[Any, str]]:
        """Return the settings of a method for a kind of concept: name -> (value, source)."""
        merged: dict[str, tuple[Any, str]] = {}
        for group in self.groups.get(method, ()):
            if group.holds(kind) and not group.names:
                merged |= {key: (value, group.source) for key, value in group.settings.items()}
        return merged

    def wording(self, method: str, kind: str, name: str) -> tuple[tuple[str, ...], str | None, str]:
        """Return the prompts that a method erases a concept from, its anchor (None: none is set), and their source."""
        prompts: tuple[str, ...] = ()
        anchor, source = None, ""
        for group in self.groups.get(method, ()):
            if group.holds(kind, name) and (group.prompts or name.lower() in group.anchors):
                prompts = group.prompts or prompts
                anchor = group.anchors.get(name.lower(), anchor)
                source = group.source
        return prompts, anchor, source


def read_preset(folder: Path, name: str) -> Preset:
    """Read the preset `name` from its YAML file in `folder`, with the preset that it is like.

    Raises:
        ErasureError: an unknown or missing key, a group without a source, or presets that are like each other.
    """
    return _read(folder, name, ())


def _read(folder: Path, name: str, trail: tuple[str, ...]) -> Preset:
    path = folder / f"{name}.yaml"
    if name in trail:
        raise ErasureError(f"{path}: presets are like each other in a circle: {' -> '.join((*trail, name))}")
    entry = read_yaml(path)
    for key in entry:
        if key not in KEYS:
            raise ErasureError(f"{path}: {unknown('key', key, KEYS)}")
    other = _read(folder, entry["like"], (*trail, name)) if "like" in entry else None
    if other is None and not {"about", "sampling", "preview"} <= entry.keys():
        raise ErasureError(f"{path}: a preset needs the keys about, sampling and preview")
    paths = {key: (folder / entry[key]).resolve() if key in entry else None for key in ("checkpoint", "vocabulary")}
    inherited = {} if other is None else {m: _as(other.name, groups) for m, groups in other.groups.items()}
    own = {
        m: tuple(Group.read(g, f"{path}, {m}") for g in groups) for m, groups in (entry.get("methods") or {}).items()
    }
    without = dict(entry.get("without") or {})
    groups = {m: (*inherited.get(m, ()), *own.get(m, ())) for m in (*inherited, *own) if m not in without}
    members = entry.get("members", "each" if other is not None and other.counts_members else "one")
    return Preset(
        name=name,
        about=entry["about"],
        checkpoint=paths["checkpoint"],
        words=paths["vocabulary"],
        clip=entry.get("clip"),
        architecture=entry.get("architecture") or {},
        checkpoints=tuple(entry.get("checkpoints") or ()),
        sampling=_sampling(entry, "sampling", path, other.sampling if other is not None else None),
        preview=_sampling(entry, "preview", path, other.preview if other is not None else None),
        call={**(other.call if other is not None else {}), **(entry.get("call") or {})},
        counts_members=members == "each",
        defaults=entry.get("defaults", ""),
        without=without,
        default=_default(entry, path, other),
        groups=groups,
    )


def _as(name: str, groups: Iterable[Group]) -> tuple[Group, ...]:
    """Return another preset's groups; their sources say that the values were set for that one."""
    return tuple(Group(**{**vars(group), "source": f"as {name}: {group.source}"}) for group in groups)


def _default(entry: Mapping[str, Any], path: Path, other: Preset | None) -> tuple[DefaultMethod, ...]:
    """Return the preset's own default methods, or else those of the preset that it is like."""
    if "default" in entry:
        return tuple(DefaultMethod.read(one, f"{path}, default") for one in entry["default"])
    inherited = () if other is None else other.default
    return tuple(replace(one, source=f"as {other.name}: {one.source}") for one in inherited if other is not None)


def _sampling(entry: Mapping[str, Any], key: str, path: Path, other: Sampling | None) -> Sampling:
    values = entry.get(key)
    if values is None and other is not None:
        return other
    if not isinstance(values, dict) or not {"steps", "guidance", "source"} <= values.keys():
        raise ErasureError(f"{path}: {key} needs steps, guidance and source")
    read = Sampling(**values)
    if key == "sampling" and read.scheduler != OWN:
        raise ErasureError(f"{path}: images are drawn with the pipeline's own scheduler, which is the user's choice")
    return read
