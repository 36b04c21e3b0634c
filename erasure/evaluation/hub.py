"""Prompt files of data sets on the Hugging Face hub, by name."""

from __future__ import annotations

import re
from pathlib import Path

from erasure.errors import ErasureError

PREFIX = "hub:"
FORM = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^/\s]+))?(?:/(.+))?")
SUFFIXES = (".csv", ".txt", ".json")


def fetch(source: str) -> Path:
    """The file behind `hub:owner/name[@revision][/file.csv]`, from the cache where it lies there.

    Without a file, the data set must hold exactly one .csv, .txt or .json. `HF_HUB_OFFLINE` is honoured: then
    only the cache is asked.

    Raises:
        ErasureError: a malformed name, no such data set or file, no access, no network.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    match = FORM.fullmatch(source.removeprefix(PREFIX))
    if not match:
        raise ErasureError(f"{source!r}: hub:owner/name, hub:owner/name/file.csv or hub:owner/name@revision/file.csv")
    name, revision, file = match.groups()
    try:
        file = file or _only(source, hub.list_repo_files(name, repo_type="dataset", revision=revision))
        return Path(hub.hf_hub_download(name, file, repo_type="dataset", revision=revision))
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        hint = "" if file else "; name its file as well, hub:owner/name/file.csv, to have it from the cache"
        raise ErasureError(
            f"{source!r} is not in the cache, and the hub is out of reach (no network, or HF_HUB_OFFLINE is set){hint}"
        ) from None
    except errors.EntryNotFoundError:
        raise ErasureError(f"{source!r}: the data set {name} has no file {file!r}") from None
    except errors.RevisionNotFoundError:
        raise ErasureError(f"{source!r}: the data set {name} has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise ErasureError(f"{source!r}: accept the terms of the data set {name} on the hub, then log in") from None
    except errors.RepositoryNotFoundError:
        raise ErasureError(f"{source!r}: no data set {name} on the hub, or it is private: log in") from None
    except errors.HFValidationError as fault:
        raise ErasureError(f"{source!r}: {fault}") from None
    except (OSError, errors.HTTPError) as fault:
        raise ErasureError(f"{source!r}: the hub did not answer: {fault}") from None


def _only(source: str, files: list[str]) -> str:
    able = [file for file in files if file.lower().endswith(SUFFIXES)]
    if len(able) != 1:
        raise ErasureError(f"{source!r}: name one file, as in hub:owner/name/file.csv; it has {', '.join(able) or '-'}")
    return able[0]
