"""Repositories on the Hugging Face hub: parse their names, find their files, and explain their errors."""

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
class LocalFile:
    """A patch's file on this machine, and where it came from.

    Args:
        path: the path of the file.
        repository: `owner/name`, or empty for a folder.
        revision: the commit that the file belongs to, or empty.
        sha256: the hash that its repository states, or None.
    """

    path: Path
    repository: str = ""
    revision: str = ""
    sha256: str | None = None


def place(source: str) -> Place | None:
    """Parse `owner/name[@revision][/file]`; return None for a text of another form."""
    match = FORM.fullmatch(source)
    return Place(*match.groups()) if match else None


def patch_on_hub(source: object) -> Place | None:
    """Return the place on the hub that `source` names, or None where it is a local path.

    Local paths come first: an existing file, or any path into an existing folder.
    """
    if not isinstance(source, str) or source.startswith((".", "~")) or Path(source).exists():
        return None
    parsed = place(source)
    if parsed is None or Path(parsed.name.split("/")[0]).is_dir():
        return None
    if parsed.file is None and parsed.revision is None and source.endswith((SUFFIX, *PICKLES)):
        return None
    return parsed


def located(source: str | os.PathLike[str]) -> LocalFile:
    """Return the local path of a patch, fetching it into the hub's cache if necessary.

    Raises:
        ErasureError: as `find_patch`. A local path that does not exist is returned as it is.
    """
    if patch_on_hub(source) is None:
        return LocalFile(Path(source))
    try:
        return find_patch(os.fspath(source))
    except ErasureError as fault:
        raise ErasureError(f"{source}: there is no such local file, and on the hub: {fault}") from None


def find_patch(source: str) -> LocalFile:
    """Return the patch file at `owner/name[@revision][/file.safetensors]`, fetching it into the hub's cache.

    Where the name has no file, it is the one that the repository's erasure.json names, or its only safetensors file.

    Raises:
        ErasureError: a name of another form, no such repository or file, a pickle, no access, or no network.
    """
    import huggingface_hub as hub

    parsed = place(source)
    if parsed is None:
        raise ErasureError(
            f"{source!r} is no local file; a name on the hub is owner/name, owner/name/file{SUFFIX} "
            "or owner/name@revision"
        )
    refuse_pickles(source, parsed.file)
    hint = "" if parsed.file else f"; name its file as well, owner/name/file{SUFFIX}, to have it from the cache"
    with plainly(source, "repository", parsed.name, parsed.file, parsed.revision, AWAY + hint):
        config, revision, away = _config(hub, parsed)
        file = parsed.file or config.get("file")
        if file is None:
            file = only(source, hub.list_repo_files(parsed.name, revision=revision))
        path = Path(hub.hf_hub_download(parsed.name, file, revision=revision, local_files_only=away))
    sha256 = config.get("sha256") if config.get("file") == file else None
    return LocalFile(path, parsed.name, commit(path), sha256)


def find_in_folder(folder: Path) -> LocalFile:
    """Return the patch file in a folder that is laid out like a repository.

    Raises:
        ErasureError: the folder holds no patch, several patches, or a pickle.
    """
    config = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    file = config.get("file") or only(str(folder), sorted(one.name for one in folder.iterdir()))
    return LocalFile(folder / file, sha256=config.get("sha256"))


def _config(hub: Any, parsed: Place) -> tuple[dict[str, str], str | None, bool]:
    """The repository's erasure.json, the revision it was read at, and whether the hub is out of reach.

    The patch is then taken from the same revision; and a hub that is out of reach is not asked again.
    """
    try:
        path = Path(hub.hf_hub_download(parsed.name, CONFIG, revision=parsed.revision))
    except hub.errors.LocalEntryNotFoundError:
        if parsed.file is None:
            raise
        return {}, parsed.revision, True
    except hub.errors.EntryNotFoundError:
        return {}, parsed.revision, False
    return _read(path), commit(path) or parsed.revision, False


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
    """Return the only file with one of the suffixes.

    Raises:
        ErasureError: there is no such file, or there are several.
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
    """Return the commit that a file in the hub's cache belongs to; empty for any other file."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


@contextmanager
def plainly(
    source: str, noun: str, name: str, file: str | None = None, revision: str | None = None, away: str = AWAY
) -> Iterator[None]:
    """Turn the errors of huggingface_hub inside the block into ErasureErrors.

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
