"""Write the certificate of a verified patch: a page for people who read no tables, its data, and a signature.

`certificate.json` is the statement. It records the sha256 of the page, of its PDF, of the patch and of the model's
weights, and everything the page says. The signature covers its bytes, so that one signature vouches for all of them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from erasure.errors import ErasureError
from erasure.evaluation.report.card import base_name, repeat_command
from erasure.evaluation.report.certificate_page import certificate_page
from erasure.evaluation.report.pdf import print_pdf
from erasure.evaluation.signing import key_fingerprint, raw_public, sign
from erasure.evaluation.text_files import write_text
from erasure.model.loading import name_of
from erasure.patch.fingerprint import weights_hash
from erasure.patch.patch import Patch
from erasure.version import __version__

if TYPE_CHECKING:
    from erasure.evaluation.verify import Verification

KIND, SCHEMA = "erasure take-down certificate", 1
STATEMENT, SIGNED, PAGE, PDF = "certificate.json", "certificate.sig", "certificate.html", "certificate.pdf"
WATCHERS = ("safety_checker", "image_encoder")  # modules of a pipeline that draw nothing


@dataclass(frozen=True)
class Certificate:
    """The files of a certificate.

    Args:
        page: the page, `certificate.html`.
        pdf: the same as PDF; None where no Chromium is installed.
        statement: `certificate.json`, which records the hashes of everything.
        signature: `certificate.sig`; None for a certificate that is not signed.
        key: the fingerprint of the signer's public key, or None.
    """

    page: Path
    pdf: Path | None
    statement: Path
    signature: Path | None
    key: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the paths of the files and the fingerprint of the key as plain data."""
        return {name: None if value is None else str(value) for name, value in vars(self).items()}

    def text(self) -> str:
        """Return what was written as plain text for a terminal."""
        lines = [f"{self.page}: the certificate, one page for people who read no tables"]
        lines.append(
            "no PDF: no Chromium or Chrome is installed" if self.pdf is None else f"{self.pdf}: the same as PDF"
        )
        lines.append(f"{self.statement}: its data, with the hashes of the page, the patch and the model")
        lines.append(
            "not signed: --sign KEY signs it"
            if self.signature is None
            else f"{self.signature}: its signature by the key {self.key}"
        )
        lines.append(f"`erasure verify {self.page.parent} --check` checks all of them")
        return "\n".join(lines)


def model_record(pipe: Any) -> dict[str, Any]:
    """Return the name of a pipeline's checkpoint and the sha256 of its weights, by component and in all.

    Args:
        pipe: the pipeline, without patches.

    Raises:
        ErasureError: a patch is loaded, or weights are offloaded.
    """
    loaded: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    if loaded:
        raise ErasureError(f"the model has patches loaded ({', '.join(loaded)}): call unload_patches() first")
    modules = {
        name: module
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and name not in WATCHERS
    }
    weights = {}
    for name in sorted(modules):
        digest, dtype = weights_hash(modules[name])
        weights[name] = {"sha256": digest, "dtype": dtype}
    total = hashlib.sha256("".join(f"{name}\0{entry['sha256']}\0" for name, entry in weights.items()).encode())
    return {"name": base_name(name_of(pipe)), "sha256": total.hexdigest(), "weights": weights}


def file_hash(path: Path) -> str:
    """Return the sha256 of a file in 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def certify(
    verification: Verification, pipe: Any, *, key: Any | None = None, date: datetime.date | None = None
) -> Certificate:
    """Write the certificate of a verified patch into the folder of the verification.

    Args:
        verification: what `verify` returned.
        pipe: the pipeline that was verified, without patches.
        key: the private key to sign with (`signing.private_key`); None: no signature.
        date: the date on the certificate; None: today's, in UTC.

    Raises:
        ErasureError: the pipeline has patches, the folder cannot be written, or the browser fails.
    """
    folder = verification.patch.parent
    patch = Patch.load(verification.patch)
    statement = _statement(verification, patch, pipe, key, date or datetime.datetime.now(datetime.UTC).date())
    try:
        for name in (SIGNED, STATEMENT, PDF):  # of an earlier call: they would contradict the new page
            (folder / name).unlink(missing_ok=True)
        write_text(folder / PAGE, certificate_page(statement, verification.shots))
        printed = print_pdf(folder / PAGE, folder / PDF)
        statement["pages"] = {name: file_hash(folder / name) for name in (PAGE, *([PDF] if printed else []))}
        write_text(folder / STATEMENT, json.dumps(statement, indent=1, ensure_ascii=False) + "\n")
        if key is not None:
            (folder / "signature.tmp").write_bytes(sign(key, (folder / STATEMENT).read_bytes()))
            os.replace(folder / "signature.tmp", folder / SIGNED)
    except OSError as fault:
        raise ErasureError(f"{folder}: cannot be written: {fault.strerror or fault}") from None
    return Certificate(
        folder / PAGE,
        folder / PDF if printed else None,
        folder / STATEMENT,
        None if key is None else folder / SIGNED,
        None if key is None else statement["key"]["fingerprint"],
    )


def _statement(
    verification: Verification, patch: Patch, pipe: Any, key: Any | None, date: datetime.date
) -> dict[str, Any]:
    """Return everything that the page says, as plain data."""
    file = verification.patch.name
    info = patch.info()
    public = None if key is None else raw_public(key)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "erasure": __version__,
        "issued": date.isoformat(),
        "removed": [_removed(concept) for concept in patch.concepts],
        "model": model_record(pipe),
        "patch": {
            "file": file,
            "sha256": file_hash(verification.patch),
            "base": base_name(patch.base),
            **{name: info[name] for name in ("method", "gate", "parameters", "components", "seed")},
        },
        "before": verification.before,
        "results": verification.results,
        "repeat": [_install(signed=key is not None), repeat_command(patch, file)],
        "key": None
        if public is None
        else {"algorithm": "Ed25519", "public": public.hex(), "fingerprint": key_fingerprint(public)},
    }


def _install(signed: bool) -> str:
    """Return the command that installs this version, with what the check of a signature needs."""
    return (
        f"pip install 'erasure-diffusion[sign]=={__version__}'"
        if signed
        else f"pip install erasure-diffusion=={__version__}"
    )


def _removed(concept: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": str(concept.get("name", "?")),
        "aliases": [str(alias) for alias in concept.get("aliases", ())],
        "kind": str(concept.get("kind", "object")),
    }
