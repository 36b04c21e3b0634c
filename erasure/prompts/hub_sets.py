"""Prompt files from data sets on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from erasure.errors import ErasureError
from erasure.hub_files import AWAY, only, place, plainly

PREFIX = "hub:"
SUFFIXES = (".csv", ".txt", ".json")


def fetch(source: str) -> Path:
    """Return the local path of a hub file, downloading it unless the cache has it.

    With `HF_HUB_OFFLINE` set, only the cache is searched.

    Args:
        source: `hub:owner/name[@revision][/file.csv]`; without a file, the data set must contain exactly one .csv,
            .txt or .json file.

    Raises:
        ErasureError: the name is malformed, the data set or the file does not exist, access is denied, or the network
            is unavailable.
    """
    import huggingface_hub as hub

    parts = place(source.removeprefix(PREFIX))
    if parts is None:
        raise ErasureError(
            f"{source!r}: expected hub:owner/name, hub:owner/name/file.csv or hub:owner/name@revision/file.csv"
        )
    name, revision, file = parts.name, parts.revision, parts.file
    hint = "" if file else "; name its file as well, hub:owner/name/file.csv, to read it from the cache"
    with plainly(source, "data set", name, file, revision, AWAY + hint):
        file = file or only(source, hub.list_repo_files(name, repo_type="dataset", revision=revision), SUFFIXES)
        return Path(hub.hf_hub_download(name, file, repo_type="dataset", revision=revision))
