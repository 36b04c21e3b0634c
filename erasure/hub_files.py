"""Repositories of the Hugging Face hub: their names, their files from the cache, and their faults in plain words."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError

CONFIG = "erasure.json"  # beside a patch: which file it is, its sha256, and what it holds
SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
NAME = r"[\w.-]+/[\w.-]+"
FORM = re.compile(rf"({NAME})(?:@([^/\s]+))?(?:/(.+))?")
AWAY = "is not in the cache, and the hub is out of reach (no network, or HF_HUB_OFFLINE is set)"


@dataclass(frozen=True)
class Place:
    """A file of a repository: `owner/name[@revision][/file]`."""

    name: str
    revision: str | None
    file: str | None


@dataclass(frozen=True)
class Found:
    """A patch's file on this machine.

    Args:
        path: where it lies.
        repository: `owner/name`, or empty for a folder.
        revision: the commit it is of, or empty.
        sha256: what its repository says of it, or None.
    """

    path: Path
    repository: str = ""
    revision: str = ""
    sha256: str | None = None


def place(source: str) -> Place | None:
    """What a name of that form means; None if it is of another."""
    match = FORM.fullmatch(source)
    return Place(*match.groups()) if match else None


def patch_on_hub(source: object) -> Place | None:
    """The place on the hub that `source` names, if it is a text that names one and nothing here.

    What lies here goes first: a file, or any path into a folder that is here.
    """
    if not isinstance(source, str) or source.startswith((".", "~")) or Path(source).exists():
        return None
    found = place(source)
    if found is None or Path(found.name.split("/")[0]).is_dir():
        return None
    if found.file is None and found.revision is None and source.endswith((SUFFIX, *PICKLES)):
        return None
    return found


def located(source: str | os.PathLike[str]) -> Found:
    """Where a patch lies: at a path here, or in the hub's cache, fetched there if need be.

    Raises:
        ErasureError: as `find_patch`. A path that is not here is not looked into.
    """
    if patch_on_hub(source) is None:
        return Found(Path(source))
    try:
        return find_patch(os.fspath(source))
    except ErasureError as fault:
        raise ErasureError(f"{source}: no such file here, and as a name on the hub: {fault}") from None


def find_patch(source: str) -> Found:
    """The file of the patch at `owner/name[@revision][/file.safetensors]`, fetched into the hub's cache if need be.

    Without a file it is the one that the repository's erasure.json names, or the one safetensors file there is.

    Raises:
        ErasureError: another form of name, no such repository or file, pickles, no access, no network.
    """
    import huggingface_hub as hub

    given = place(source)
    if given is None:
        raise ErasureError(
            f"{source!r} is nothing here, and on the hub it would be owner/name, owner/name/file{SUFFIX} "
            "or owner/name@revision"
        )
    refuse_pickles(source, given.file)
    hint = "" if given.file else f"; name its file as well, owner/name/file{SUFFIX}, to have it from the cache"
    with plainly(source, "repository", given.name, given.file, given.revision, AWAY + hint):
        config, revision, away = _config(hub, given)
        file = given.file or config.get("file")
        if file is None:
            file = only(source, hub.list_repo_files(given.name, revision=revision))
        path = Path(hub.hf_hub_download(given.name, file, revision=revision, local_files_only=away))
    sha256 = config.get("sha256") if config.get("file") == file else None
    return Found(path, given.name, commit(path), sha256)


def find_in_folder(folder: Path) -> Found:
    """The file of the patch in a folder that is laid out like a repository.

    Raises:
        ErasureError: no patch, several, pickles.
    """
    config = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    file = config.get("file") or only(str(folder), sorted(one.name for one in folder.iterdir()))
    return Found(folder / file, sha256=config.get("sha256"))


def _config(hub: Any, given: Place) -> tuple[dict[str, str], str | None, bool]:
    """The repository's erasure.json, the revision it was read at, and whether the hub is out of reach.

    The patch is then taken from the same revision; and a hub that is out of reach is not asked again.
    """
    try:
        path = Path(hub.hf_hub_download(given.name, CONFIG, revision=given.revision))
    except hub.errors.LocalEntryNotFoundError:
        if given.file is None:
            raise
        return {}, given.revision, True
    except hub.errors.EntryNotFoundError:
        return {}, given.revision, False
    return _read(path), commit(path) or given.revision, False


def _read(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        file, sha256 = data["file"], data.get("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ErasureError(f"{path}: no list of what the repository holds ({fault})") from None
    if not isinstance(file, str) or not file.endswith(SUFFIX) or os.path.basename(file) != file:
        raise ErasureError(f"{path}: names {file!r}, not a {SUFFIX} file beside it")
    if sha256 is not None and not isinstance(sha256, str):
        raise ErasureError(f"{path}: its sha256 is no text")
    return {"file": file} | ({"sha256": sha256} if sha256 else {})


def only(source: str, files: list[str], suffixes: tuple[str, ...] = (SUFFIX,)) -> str:
    """The one file with such a suffix.

    Raises:
        ErasureError: there are none or several.
    """
    able = [file for file in files if file.lower().endswith(suffixes)]
    if len(able) == 1:
        return able[0]
    refuse_pickles(source, *([] if able else files))
    raise ErasureError(f"{source!r}: name one file, as in {source}/file{suffixes[0]}; it has {', '.join(able) or '-'}")


def refuse_pickles(source: str, *files: str | None) -> None:
    """Raise an ErasureError at a file that can run code when it is opened."""
    for file in files:
        if file and file.lower().endswith(PICKLES):
            raise ErasureError(f"{source!r}: {file} is a pickle; pickles can run code and are never fetched or opened")


def commit(path: Path) -> str:
    """The commit that a file in the hub's cache is of; empty elsewhere."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


@contextmanager
def plainly(
    source: str, noun: str, name: str, file: str | None = None, revision: str | None = None, away: str = AWAY
) -> Iterator[None]:
    """Turn the faults of huggingface_hub inside the block into ErasureErrors.

    Args:
        source: as the user wrote it.
        noun: what `name` is, such as `data set`.
        name: the repository.
        file: the file that was asked for.
        revision: the revision that was asked for.
        away: what to say when the hub is out of reach.
    """
    from huggingface_hub import errors

    try:
        yield
    except ErasureError:
        raise
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise ErasureError(f"{source!r} {away}") from None
    except errors.EntryNotFoundError:
        raise ErasureError(f"{source!r}: the {noun} {name} has no file {file!r}") from None
    except errors.RevisionNotFoundError:
        raise ErasureError(f"{source!r}: the {noun} {name} has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise ErasureError(f"{source!r}: accept the terms of the {noun} {name} on the hub, then log in") from None
    except errors.RepositoryNotFoundError:
        raise ErasureError(f"{source!r}: no {noun} {name} on the hub, or it is private: log in") from None
    except errors.HFValidationError as fault:
        raise ErasureError(f"{source!r}: {fault}") from None
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as fault:
        if getattr(getattr(fault, "response", None), "status_code", 401) in (401, 403):
            raise ErasureError(f"{source!r}: the hub refuses; log in with a token that may (hf auth login)") from None
        raise ErasureError(f"{source!r}: the hub did not answer: {fault}") from None
    except (OSError, errors.HTTPError) as fault:
        raise ErasureError(f"{source!r}: the hub did not answer: {fault}") from None
