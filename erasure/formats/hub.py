"""Pushing patches to the Hugging Face hub, and pulling patches from it.

A repository holds the patch, README.md (the model card), erasure.json (the name of the patch's file, its sha256 and its
header) and, if `verify` has made one, grid.png. Without a network, a folder of the same layout can be used instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.evaluation.report.card import card
from erasure.hub_files import CONFIG, LocalFile, find_in_folder, find_patch, place, plainly, refuse_pickles
from erasure.patch import Patch

CARD, GRID = "README.md", "grid.png"
Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the repository and the files in it.

    Args:
        repository: name of the repository, `owner/name`.
        files: names of the files in it.
        folder: folder that the files were written to instead of being uploaded, or None.
        revision: hash of the commit; empty for a folder.
        url: address of the commit; empty for a folder.
        note: a warning for the user, or empty.
    """

    repository: str
    files: list[str]
    folder: Path | None = None
    revision: str = ""
    url: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as data that can be written as JSON."""
        return {**vars(self), "folder": None if self.folder is None else str(self.folder)}

    def text(self) -> str:
        """Return the result as text for the terminal."""
        if self.folder is None:
            target = f"pushed to {self.url or f'{self.repository} ({self.revision})'}"
        else:
            target = (
                f"written to {self.folder}; nothing was uploaded. To upload it: "
                f"hf upload {self.repository} {self.folder}"
            )
        return "\n".join([target, f"files: {', '.join(self.files)}", *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Pulled:
    """The result of a pull: the local file and where it came from.

    Args:
        patch: the local file.
        repository: name of the repository, `owner/name`; empty for a folder.
        revision: hash of the commit; empty for a folder.
        info: what `Patch.info` returns.
    """

    patch: Path
    repository: str
    revision: str
    info: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the result as data that can be written as JSON."""
        return {**vars(self), "patch": str(self.patch)}

    def text(self) -> str:
        """Return the result as text for the terminal."""
        concepts = ", ".join(self.info["concepts"])
        summary = f"{concepts} erased from {self.info['base'] or 'an unnamed base'} by {self.info['method']}"
        pin = f"\nto pull this exact version again: {self.repository}@{self.revision}" if self.revision else ""
        return f"{self.patch}: {summary}{pin}"


def push(
    file: Source,
    repository: str,
    *,
    folder: Source | None = None,
    private: bool = False,
    license: str | None = None,
    message: str | None = None,
    api: Any = None,
) -> Pushed:
    """Upload a patch with its model card to the Hugging Face hub, in one commit.

    The repository is created if it does not exist. The card reports the results that `verify` has written into the
    patch, and shows grid.png if it is in the folder of the patch.

    Args:
        file: the patch; it is read and checked completely first, and never changed.
        repository: name of the repository, `owner/name`.
        folder: write the files of the repository to this folder, and upload nothing.
        private: whether a repository that is created is visible to its owner only.
        license: license of the patch as the hub spells it, such as `openrail`.
        message: message of the commit (default: the concepts and the name of the file).
        api: a `huggingface_hub.HfApi` (default: one with the user's own token).

    Returns:
        The repository, its files and the commit.

    Raises:
        ErasureError: the file is not a patch, the name is not `owner/name`, the folder has a README.md that no push has
            written, the hub cannot be reached, or it denies access. The file is unchanged then, and nothing is
            committed on the hub.
    """
    parsed = place(repository)
    if parsed is None or parsed.revision or parsed.file:
        raise ErasureError(f"the name of a repository must be owner/name, not {repository!r}. Nothing was pushed")
    path = Path(file)
    refuse_pickles(str(path), path.name)
    patch = Patch.load(path)
    text = card(patch, path.name, repository=repository, grid=GRID if _grid(path) else "", license=license)
    note = ""
    if os.path.isabs(patch.base):
        note = f"its header names the base by a path on this machine ({patch.base}), which others will not find"
    if folder is not None:
        return Pushed(repository, _lay_out(path, patch, text, Path(folder)), Path(folder), note=note)
    with tempfile.TemporaryDirectory() as stage:
        files = _lay_out(path, patch, text, Path(stage))
        commit = _upload(Path(stage), repository, private, message or f"{', '.join(patch.names)}: {path.name}", api)
    return Pushed(repository, files, None, str(commit.oid), str(commit.commit_url), note)


def pull(source: Source, out: Source | None = None, *, overwrite: bool = False) -> Pulled:
    """Download a patch, check it and write a copy of it.

    Args:
        source: `owner/name[@revision][/file.safetensors]` on the hub, a folder of the same layout, or a file.
        out: file or folder to write to (default: the name of the file, in the current folder).
        overwrite: whether a different file at that path may be replaced.

    Returns:
        The local file, and where it came from.

    Raises:
        ErasureError: there is no such patch, the hub cannot be reached and the patch is not cached, the file is a
            pickle or not a patch, its sha256 is not the recorded one, or a different file is at `out`. Nothing is
            written then.
    """
    local = _find(source)
    patch = Patch.load(local.path)
    if local.sha256 is not None and _sha256(local.path) != local.sha256:
        raise ErasureError(
            f"{source}: {local.path.name} is not the file that was pushed, because its sha256 differs. "
            "Nothing was written"
        )
    target = Path(local.path.name) if out is None else Path(out)
    if target.is_dir():
        target /= local.path.name
    if target.exists() and not overwrite and _sha256(target) != _sha256(local.path):
        raise ErasureError(
            f"{target} already exists with different content. Choose another name with -o (out=), or replace it with "
            "--overwrite (overwrite=True)"
        )
    _copy(local.path, target)
    return Pulled(target, local.repository, local.revision, patch.info())


def _find(source: Source) -> LocalFile:
    path = Path(source)
    if path.is_dir():
        return find_in_folder(path)
    if path.is_file():
        refuse_pickles(str(path), path.name)
        return LocalFile(path)
    if isinstance(source, str):
        return find_patch(source)
    raise ErasureError(f"{source} does not exist")


def _grid(path: Path) -> Path | None:
    grid = path.parent / GRID
    return grid if grid.is_file() else None


def _lay_out(path: Path, patch: Patch, text: str, folder: Path) -> list[str]:
    """Write the files of the repository to a folder, and return their names.

    Raises:
        ErasureError: the folder cannot be written, holds the patch itself, or has a README.md that no push has written.
    """
    if folder.resolve() == path.resolve().parent:
        raise ErasureError(f"{folder} holds the patch itself. Choose another folder; nothing was written")
    if (folder / CARD).exists() and not (folder / CONFIG).exists():
        raise ErasureError(
            f"{folder} has a {CARD} that no push has written. Choose another folder; nothing was written"
        )
    config = {"file": path.name, "sha256": _sha256(path), **patch.info(), "digest": patch.payload.digest}
    texts = {CARD: text, CONFIG: json.dumps(config, indent=1) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ErasureError(f"{folder} cannot be written: {fault.strerror or fault}") from None
    grid = _grid(path)
    _copy(path, folder / path.name)
    if grid is not None:
        _copy(grid, folder / GRID)
    for name, content in texts.items():
        _write(folder / name, content)
    return sorted([path.name, *texts, *([GRID] if grid else [])])


def _upload(stage: Path, repository: str, private: bool, message: str, api: Any) -> Any:
    from huggingface_hub import HfApi

    api = api or HfApi()
    away = (
        "was not pushed, because the hub cannot be reached (no network, or HF_HUB_OFFLINE is set). "
        "The patch is unchanged; --folder DIR (folder=) writes the repository to a folder, to upload it later"
    )
    with plainly(repository, "repository", repository, away=away):
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        return api.upload_folder(repo_id=repository, folder_path=str(stage), commit_message=message)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as fault:
        raise ErasureError(f"{path} cannot be read: {fault.strerror or fault}") from None


def _copy(source: Path, target: Path) -> None:
    """Copy a file, so that the copy appears whole or not at all."""
    _replace(target, lambda temporary: shutil.copyfile(source, temporary))


def _write(target: Path, text: str) -> None:
    _replace(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(target: Path, write: Any) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, target)
    except OSError as fault:
        raise ErasureError(f"{target} cannot be written: {fault.strerror or fault}") from None
    finally:
        temporary.unlink(missing_ok=True)
