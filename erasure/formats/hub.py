"""Patches to the Hugging Face hub and from it.

A repository holds the patch, README.md (the model card), erasure.json (which file it is, its sha256, what it holds)
and, where `verify` drew it, grid.png. A folder of the same layout serves where there is no network.
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
from erasure.hub_files import CONFIG, Found, find_in_folder, find_patch, place, plainly, refuse_pickles
from erasure.patch import Patch

CARD, GRID = "README.md", "grid.png"
Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Pushed:
    """Where a patch went.

    Args:
        repository: `owner/name`.
        files: names of the files there.
        folder: where they were laid out instead of being uploaded, or None.
        revision: the commit; empty for a folder.
        url: of the commit; empty for a folder.
        note: what to see to, or empty.
    """

    repository: str
    files: list[str]
    folder: Path | None = None
    revision: str = ""
    url: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "folder": None if self.folder is None else str(self.folder)}

    def text(self) -> str:
        """For people."""
        where = self.url or f"{self.repository} ({self.revision})"
        if self.folder is not None:
            where = f"{self.folder}: nothing was uploaded; `hf upload {self.repository} {self.folder}` does it"
        return "\n".join([where, f"files: {', '.join(self.files)}", *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Pulled:
    """What came from a repository.

    Args:
        patch: the file here.
        repository: where it came from: `owner/name`, or empty for a folder.
        revision: the commit it is of; empty for a folder.
        info: as `Patch.info`.
    """

    patch: Path
    repository: str
    revision: str
    info: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "patch": str(self.patch)}

    def text(self) -> str:
        """For people."""
        what = f"{', '.join(self.info['concepts'])} erased from {self.info['base'] or '?'} by {self.info['method']}"
        again = f"\n{self.repository}@{self.revision} names this very state" if self.revision else ""
        return f"{self.patch}: {what}{again}"


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
    """Upload a patch with its model card to the Hugging Face hub, in one commit; the repository is made if need be.

    Results that `verify` wrote into the patch go into the card, and grid.png if it lies beside the file.

    Args:
        file: the patch; it is read whole and checked first, and never changed.
        repository: `owner/name`.
        folder: lay the repository out here and upload nothing.
        private: whether a repository that is made can be seen by its owner alone.
        license: of the patch, as the hub calls it, such as `openrail`.
        message: of the commit.
        api: a `huggingface_hub.HfApi`; None: one with the user's own token.

    Raises:
        ErasureError: a file that is no patch, a name of another form, a folder with a README.md of somebody else, no
            network, no right to write. The file is untouched then, and on the hub nothing is half done.
    """
    found = place(repository)
    if found is None or found.revision or found.file:
        raise ErasureError(f"{repository!r}: a repository is called owner/name")
    path = Path(file)
    refuse_pickles(str(path), path.name)
    patch = Patch.load(path)
    text = card(patch, path.name, repository=repository, grid=GRID if _grid(path) else "", license=license)
    note = ""
    if os.path.isabs(patch.base):
        note = f"its header names the base by a path of this machine, {patch.base}: others will not find it"
    if folder is not None:
        return Pushed(repository, _lay_out(path, patch, text, Path(folder)), Path(folder), note=note)
    with tempfile.TemporaryDirectory() as stage:
        files = _lay_out(path, patch, text, Path(stage))
        done = _upload(Path(stage), repository, private, message or f"{', '.join(patch.names)}: {path.name}", api)
    return Pushed(repository, files, None, str(done.oid), str(done.commit_url), note)


def pull(source: Source, out: Source | None = None, *, overwrite: bool = False) -> Pulled:
    """Fetch a patch, check it and put a copy of it here.

    Args:
        source: `owner/name[@revision][/file.safetensors]` on the hub, or a folder of that layout, or a file.
        out: where to write; None: under its own name in the current folder.
        overwrite: whether another file there may be replaced.

    Raises:
        ErasureError: nothing there, no network and not in the cache, a pickle, no patch, other bytes than the
            repository says, another file at `out`. Nothing is written then.
    """
    found = _find(source)
    patch = Patch.load(found.path)
    if found.sha256 is not None and _sha256(found.path) != found.sha256:
        raise ErasureError(f"{source}: {found.path.name} is not the file that was pushed: its sha256 is another")
    target = Path(found.path.name) if out is None else Path(out)
    if target.is_dir():
        target /= found.path.name
    if target.exists() and not overwrite and _sha256(target) != _sha256(found.path):
        raise ErasureError(f"{target}: another file is there; give -o another name, or --overwrite (overwrite=True)")
    _copy(found.path, target)
    return Pulled(target, found.repository, found.revision, patch.info())


def _find(source: Source) -> Found:
    path = Path(source)
    if path.is_dir():
        return find_in_folder(path)
    if path.is_file():
        refuse_pickles(str(path), path.name)
        return Found(path)
    if isinstance(source, str):
        return find_patch(source)
    raise ErasureError(f"{source}: no such folder")


def _grid(path: Path) -> Path | None:
    grid = path.parent / GRID
    return grid if grid.is_file() else None


def _lay_out(path: Path, patch: Patch, text: str, folder: Path) -> list[str]:
    """Write the repository's files into `folder`; returns their names.

    Raises:
        ErasureError: the folder cannot be written, or holds files that are not of an earlier push.
    """
    if folder.resolve() == path.resolve().parent:
        raise ErasureError(f"{folder} holds the patch itself: give another folder")
    if (folder / CARD).exists() and not (folder / CONFIG).exists():
        raise ErasureError(f"{folder} has a {CARD} that no push has written: give another folder")
    config = {"file": path.name, "sha256": _sha256(path), **patch.info(), "digest": patch.payload.digest}
    texts = {CARD: text, CONFIG: json.dumps(config, indent=1) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ErasureError(f"{folder}: cannot be written: {fault.strerror or fault}") from None
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
        "was not pushed: the hub is out of reach (no network, or HF_HUB_OFFLINE is set). "
        "The patch is untouched; --folder DIR lays the repository out here, for later"
    )
    with plainly(repository, "repository", repository, away=away):
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        return api.upload_folder(repo_id=repository, folder_path=str(stage), commit_message=message)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as fault:
        raise ErasureError(f"{path}: cannot be read: {fault.strerror or fault}") from None


def _copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    _replace(target, lambda temporary: shutil.copyfile(source, temporary))


def _write(target: Path, text: str) -> None:
    _replace(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(target: Path, make: Any) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        make(temporary)
        os.replace(temporary, target)
    except OSError as fault:
        raise ErasureError(f"{target}: cannot be written: {fault.strerror or fault}") from None
    finally:
        temporary.unlink(missing_ok=True)
