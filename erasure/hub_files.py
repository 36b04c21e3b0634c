"""Files in repositories of the Hugging Face hub: their names, their copies in the cache, and readable errors."""

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

CONFIG = "erasure.json"  # in each repository: the name and the sha256 of the patch file, and what the patch holds
SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
NAME = r"[\w.-]+/[\w.-]+"
FORM = re.compile(rf"({NAME})(?:@([^/\s]+))?(?:/(.+))?")
AWAY = "is not in the cache, and the hub is out of reach (no network, or HF_HUB_OFFLINE is set)"


@dataclass(frozen=True)
class HubName:
    """The parts of a name on the hub, `owner/name[@revision][/file]`.

    Args:
        name: the repository, `owner/name`.
        revision: a branch, tag or commit; None for the default branch.
        file: a path inside the repository; None if the name has none.
    """

    name: str
    revision: str | None
    file: str | None


@dataclass(frozen=True)
class LocalFile:
    """The local path of a patch file, and the repository that it comes from.

    Args:
        path: the file on this machine.
        repository: `owner/name`, or empty for a local file or folder.
        revision: the commit that the file belongs to, or empty.
        sha256: the hash that the repository records for the file, or None.
    """

    path: Path
    repository: str = ""
    revision: str = ""
    sha256: str | None = None


def place(source: str) -> HubName | None:
    """Split a name of the form `owner/name[@revision][/file]` into its parts; return None for any other form."""
    match = FORM.fullmatch(source)
    return HubName(*match.groups()) if match else None


def patch_on_hub(source: object) -> HubName | None:
    """Return the parts of a patch's name on the hub, or None if `source` is not such a name.

    Local files take precedence: an existing path, or any path into an existing folder, is not a name on the hub.
    """
    if not isinstance(source, str) or source.startswith((".", "~")) or Path(source).exists():
        return None
    parts = place(source)
    if parts is None or Path(parts.name.split("/")[0]).is_dir():
        return None
    if parts.file is None and parts.revision is None and source.endswith((SUFFIX, *PICKLES)):
        return None
    return parts


def located(source: str | os.PathLike[str]) -> LocalFile:
    """Return the local path of a patch, downloading it to the hub's cache if its name is one on the hub.

    A local path is returned whether or not it exists.

    Raises:
        ErasureError: as for `find_patch`.
    """
    if patch_on_hub(source) is None:
        return LocalFile(Path(source))
    try:
        return find_patch(os.fspath(source))
    except ErasureError as fault:
        raise ErasureError(f"{source}: there is no such local file, and on the hub: {fault}") from None


def find_patch(source: str) -> LocalFile:
    """Return the cached copy of a patch on the hub, downloading it unless the cache has it.

    Args:
        source: `owner/name[@revision][/file.safetensors]`. Without a file, it is the one that the repository's
            erasure.json names, or else its only safetensors file.

    Raises:
        ErasureError: the name is malformed, the repository or the file does not exist, the file is a pickle, access
            is denied, or the hub cannot be reached.
    """
    import huggingface_hub as hub

    parts = place(source)
    if parts is None:
        raise ErasureError(
            f"{source!r} is neither a local file nor a name on the hub, which would be owner/name, "
            f"owner/name/file{SUFFIX} or owner/name@revision"
        )
    refuse_pickles(source, parts.file)
    hint = "" if parts.file else f"; name its file as well, owner/name/file{SUFFIX}, to read it from the cache"
    with plainly(source, "repository", parts.name, parts.file, parts.revision, AWAY + hint):
        config, revision, offline = _config(hub, parts)
        file = parts.file or config.get("file")
        if file is None:
            file = only(source, hub.list_repo_files(parts.name, revision=revision))
        path = Path(hub.hf_hub_download(parts.name, file, revision=revision, local_files_only=offline))
    sha256 = config.get("sha256") if config.get("file") == file else None
    return LocalFile(path, parts.name, commit(path), sha256)


def find_in_folder(folder: Path) -> LocalFile:
    """Return the path of the patch in a local folder that is laid out like a repository.

    Raises:
        ErasureError: the folder holds no patch, several, or only pickles.
    """
    config = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    file = config.get("file") or only(str(folder), sorted(path.name for path in folder.iterdir()))
    return LocalFile(folder / file, sha256=config.get("sha256"))


def _config(hub: Any, parts: HubName) -> tuple[dict[str, str], str | None, bool]:
    """Return the repository's erasure.json, the revision that it was read at, and whether the hub is out of reach.

    The patch is then read from the same revision, and only from the cache where the hub is out of reach.
    """
    try:
        path = Path(hub.hf_hub_download(parts.name, CONFIG, revision=parts.revision))
    except hub.errors.LocalEntryNotFoundError:
        if parts.file is None:
            raise
        return {}, parts.revision, True
    except hub.errors.EntryNotFoundError:
        return {}, parts.revision, False
    return _read(path), commit(path) or parts.revision, False


def _read(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        file, sha256 = data["file"], data.get("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ErasureError(f"{path} does not list the contents of the repository ({fault})") from None
    if not isinstance(file, str) or not file.endswith(SUFFIX) or os.path.basename(file) != file:
        raise ErasureError(f"{path} names {file!r}, which is not a {SUFFIX} file in the same folder")
    if sha256 is not None and not isinstance(sha256, str):
        raise ErasureError(f"{path}: its sha256 must be a string")
    return {"file": file} | ({"sha256": sha256} if sha256 else {})


def only(source: str, files: list[str], suffixes: tuple[str, ...] = (SUFFIX,)) -> str:
    """Return the only file with one of the suffixes.

    Args:
        source: the name of the repository or folder, for the messages.
        files: the names of its files.
        suffixes: the allowed suffixes, in lower case.

    Raises:
        ErasureError: no file or several files have such a suffix; if there are only pickles, the message says so.
    """
    candidates = [file for file in files if file.lower().endswith(suffixes)]
    if len(candidates) == 1:
        return candidates[0]
    refuse_pickles(source, *([] if candidates else files))
    if not candidates:
        raise ErasureError(f"{source!r} holds no {' or '.join(suffixes)} file")
    raise ErasureError(
        f"{source!r} holds several files, {', '.join(candidates)}; name one file, as in {source}/{candidates[0]}"
    )


def refuse_pickles(source: str, *files: str | None) -> None:
    """Refuse files that can run code when they are opened.

    Raises:
        ErasureError: one of the files is a pickle, by its suffix.
    """
    for file in files:
        if file and file.lower().endswith(PICKLES):
            raise ErasureError(
                f"{source!r}: {file} is a pickle; pickles can run code, so they are never downloaded or opened"
            )


def commit(path: Path) -> str:
    """Return the commit of a file in the hub's cache, read from its path; empty for any other path."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


@contextmanager
def plainly(
    source: str, noun: str, name: str, file: str | None = None, revision: str | None = None, away: str = AWAY
) -> Iterator[None]:
    """Turn errors of huggingface_hub inside the context into ErasureErrors with readable messages.

    Args:
        source: the name as the user wrote it.
        noun: what `name` is, such as `data set`.
        name: the repository, `owner/name`.
        file: the file that is requested, if any.
        revision: the revision that is requested, if any.
        away: the message, after `source`, for a hub that is out of reach.

    Raises:
        ErasureError: the repository, revision or file does not exist, access is denied, or the hub is out of reach.
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
        raise ErasureError(
            f"{source!r}: the {noun} {name} is gated; accept its terms on the hub, then log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ErasureError(
            f"{source!r}: the hub has no {noun} {name}, or it is private; if so, log in (hf auth login)"
        ) from None
    except errors.HFValidationError as fault:
        raise ErasureError(f"{source!r}: {fault}") from None
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as fault:
        if getattr(getattr(fault, "response", None), "status_code", 401) in (401, 403):
            raise ErasureError(
                f"{source!r}: the hub denied access; log in with a token that has access (hf auth login)"
            ) from None
        raise ErasureError(f"{source!r}: the hub did not answer: {fault}") from None
    except (OSError, errors.HTTPError) as fault:
        raise ErasureError(f"{source!r}: the hub did not answer: {fault}") from None
