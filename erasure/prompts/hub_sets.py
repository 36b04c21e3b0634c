"""Prompt files of data sets on the Hugging Face hub, by name."""

from __future__ import annotations

from pathlib import Path

from erasure.errors import ErasureError
from erasure.hub_files import AWAY, only, place, plainly

PREFIX = "hub:"
SUFFIXES = (".csv", ".txt", ".json")


def fetch(source: str) -> Path:
    """The file behind `hub:owner/name[@revision][/file.csv]`, from the cache where it lies there.

    Without a file, the data set must hold exactly one .csv, .txt or .json. `HF_HUB_OFFLINE` is honoured: then
    only the cache is asked.

    Raises:
        ErasureError: a malformed name, no such data set or file, no access, no network.
    """
    import huggingface_hub as hub

    found = place(source.removeprefix(PREFIX))
    if found is None:
        raise ErasureError(f"{source!r}: hub:owner/name, hub:owner/name/file.csv or hub:owner/name@revision/file.csv")
    name, revision, file = found.name, found.revision, found.file
    hint = "" if file else "; name its file as well, hub:owner/name/file.csv, to have it from the cache"
    with plainly(source, "data set", name, file, revision, AWAY + hint):
        file = file or only(source, hub.list_repo_files(name, repo_type="dataset", revision=revision), SUFFIXES)
        return Path(hub.hf_hub_download(name, file, repo_type="dataset", revision=revision))
