"""Check a certificate: the signature, and whether page, patch and model are those that it was written for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.evaluation.certificate import KIND, PAGE, PDF, SCHEMA, SIGNED, STATEMENT, file_hash, model_record
from erasure.evaluation.signing import SIGNATURE, key_fingerprint, signed_by
from erasure.patch.patch import Patch

LARGEST = 64 << 20  # bytes of a statement
NO_MODEL = "none"  # the name that leaves the model out


@dataclass(frozen=True)
class CertificateCheck:
    """What a check of a certificate found.

    Args:
        same: what is as the certificate says, one phrase each.
        differs: what is not, one sentence each.
        unchecked: what was not checked, and why.
        key: the fingerprint of the key that signed it, or None.
    """

    same: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    key: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the findings as plain data; `ok` tells whether nothing differs."""
        return {"ok": not self.differs, **vars(self)}

    def text(self) -> str:
        """Return the findings as plain text for a terminal."""
        lines = [f"as certified: {text}" for text in self.same]
        lines += [f"DIFFERS: {text}" for text in self.differs]
        lines += [f"not checked: {text}" for text in self.unchecked]
        verdict = "the certificate does not hold" if self.differs else "everything that was checked is as certified"
        return "\n".join([*lines, verdict])


def read_statement(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the statement of a certificate, without checking that it is true.

    Args:
        folder: the folder of the certificate, or its file certificate.json.

    Raises:
        ErasureError: there is no certificate, or its statement has not the form of one.
    """
    return _parsed(_statement_path(folder))


def check_certificate(
    folder: str | os.PathLike[str], *, public: bytes | None = None, model: Callable[[str], Any] | None = None
) -> CertificateCheck:
    """Compare a certificate's signature, page, PDF, patch and model with what they should be.

    Args:
        folder: the folder of the certificate, or its file certificate.json.
        public: the signer's public key (`signing.public_key`), from a source that the reader trusts. None: the key that
            the certificate itself names, which shows only that nothing was changed since somebody signed it.
        model: loads the pipeline to compare, given the name in the certificate; None: the model is not checked.

    Raises:
        ErasureError: there is no certificate, or the model cannot be loaded.
    """
    path = _statement_path(folder)
    found = CertificateCheck()
    try:
        statement = _parsed(path)
    except ErasureError as fault:
        found.differs.append(str(fault))
        return found
    key = _check_signature(path, statement, public, found)
    for name, recorded in statement["pages"].items():
        _check_file(path.parent, name, recorded, found)
    _check_patch(path.parent, statement, found)
    if model is None:
        found.unchecked.append(f"the model {statement['model']['name']}: none was given")
    else:
        _check_model(statement["model"], model(statement["model"]["name"]), found)
    return CertificateCheck(found.same, found.differs, found.unchecked, key)


def _statement_path(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    path = path / STATEMENT if path.is_dir() else path
    if path.name != STATEMENT or not path.is_file():
        raise ErasureError(
            f"{folder}: there is no {STATEMENT}. Give the folder that `erasure verify FILE --certificate` wrote into; "
            "nothing was checked"
        )
    return path


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ErasureError(f"{path.name} is larger than {LARGEST:,} bytes, and cannot be a certificate")
        statement = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        if isinstance(fault, ErasureError):
            raise
        raise ErasureError(f"{path.name} cannot be read as a certificate: {fault}") from None
    if not isinstance(statement, dict) or statement.get("kind") != KIND:
        raise ErasureError(f"{path.name} is not a certificate: its kind is not {KIND!r}")
    if statement.get("schema") != SCHEMA:
        raise ErasureError(
            f"{path.name} has the schema {statement.get('schema')!r}, and this version of Erasure reads {SCHEMA}"
        )
    pages, patch, model, key = (statement.get(name) for name in ("pages", "patch", "model", "key"))
    whole = (
        isinstance(pages, dict)
        and PAGE in pages
        and pages.keys() <= {PAGE, PDF}
        and isinstance(patch, dict)
        and isinstance(patch.get("file"), str)
        and isinstance(patch.get("sha256"), str)
        and Path(patch["file"]).name == patch["file"]
        and isinstance(model, dict)
        and isinstance(model.get("name"), str)
        and isinstance(model.get("weights"), dict)
        and all(isinstance(entry, dict) and {"sha256", "dtype"} <= entry.keys() for entry in model["weights"].values())
        and (key is None or (isinstance(key, dict) and isinstance(key.get("public"), str)))
        and isinstance(statement.get("removed"), list)
    )
    if not whole:
        raise ErasureError(f"{path.name} lacks parts of a certificate, or they have another form")
    return statement


def _check_signature(
    path: Path, statement: dict[str, Any], public: bytes | None, found: CertificateCheck
) -> str | None:
    """Check the signature; return the fingerprint of the key that it was made with."""
    signature = path.parent / SIGNED
    if statement["key"] is None and not signature.is_file():
        if public is None:
            found.unchecked.append("the signature: the certificate is not signed, so anybody could have written it")
        else:
            found.differs.append(f"the certificate is not signed, and {key_fingerprint(public)} should have signed it")
        return None
    if not signature.is_file():
        found.differs.append(f"{SIGNED} is missing, although {path.name} names the key that signed it")
        return None
    named = _named_key(statement)
    used = named if public is None else public
    if used is None:
        found.differs.append(f"{path.name} names no Ed25519 key, although {SIGNED} is there: give --key")
        return None
    if signature.stat().st_size != SIGNATURE:
        found.differs.append(f"{SIGNED} has {signature.stat().st_size} bytes, and a signature has {SIGNATURE}")
        return None
    if not signed_by(used, signature.read_bytes(), path.read_bytes()):
        text = f"{path.name} was changed after it was signed, or was signed by another key than {key_fingerprint(used)}"
        other = public is not None and named is not None and named != public
        found.differs.append(f"{text}; it names {key_fingerprint(named)}" if other and named else text)
        return None
    found.same.append(f"the signature of {path.name} by the key {key_fingerprint(used)}")
    if public is None:
        found.unchecked.append(
            "whose key that is: give the signer's public key with --key, or compare the fingerprint with the signer's"
        )
    return key_fingerprint(used)


def _named_key(statement: dict[str, Any]) -> bytes | None:
    try:
        key = bytes.fromhex((statement["key"] or {}).get("public", ""))
    except ValueError:
        return None
    return key if len(key) == 32 else None


def _check_file(folder: Path, name: str, recorded: str, found: CertificateCheck) -> bool:
    """Compare the sha256 of a file with that in the certificate; tell whether they are the same."""
    path = folder / name
    if not path.is_file():
        found.differs.append(f"{name} is missing")
        return False
    actual = file_hash(path)
    if actual != recorded:
        found.differs.append(f"{name} was changed: its sha256 is {actual}, and the certificate says {recorded}")
        return False
    found.same.append(name)
    return True


def _check_patch(folder: Path, statement: dict[str, Any], found: CertificateCheck) -> None:
    """Check the patch file, and that the certificate says the same of it as its own header."""
    file = statement["patch"]["file"]
    if not _check_file(folder, file, statement["patch"]["sha256"], found):
        return
    try:
        patch = Patch.load(folder / file)
    except ErasureError as fault:
        found.differs.append(f"{file} is not a whole patch: {fault}")
        return
    names = [concept.get("name") for concept in statement["removed"] if isinstance(concept, dict)]
    if names != patch.names:
        found.differs.append(f"{STATEMENT} names {names} as removed, and {file} {patch.names}")
    if patch.results is None or statement.get("results") != dict(patch.results):
        found.differs.append(f"the figures of {STATEMENT} are not those in the header of {file}")


def _check_model(recorded: dict[str, Any], pipe: Any, found: CertificateCheck) -> None:
    """Compare the hash of each component of a model with that in the certificate."""
    actual = model_record(pipe)["weights"]
    name, certified = recorded["name"], recorded["weights"]
    before = len(found.differs)
    for component in sorted({*actual, *certified}):
        mine, theirs = actual.get(component), certified.get(component)
        if mine is None or theirs is None:
            place = "the certificate" if mine is None else "the model"
            found.differs.append(f"the model {name}: only {place} has the component {component}")
        elif mine["dtype"] != theirs["dtype"]:
            found.differs.append(
                f"the model {name}: {component} was loaded as {mine['dtype']}, and the certificate was made with "
                f"{theirs['dtype']}: load it so (--dtype)"
            )
        elif mine["sha256"] != theirs["sha256"]:
            found.differs.append(
                f"the model {name}: the weights of {component} have the sha256 {mine['sha256']}, and the certificate "
                f"says {theirs['sha256']}"
            )
    if len(found.differs) == before:
        found.same.append(f"the model {name}, {len(actual)} components")
