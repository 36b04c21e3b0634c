"""Ed25519 keys and detached signatures (RFC 8032), by the package cryptography.

A signature is the 64 raw bytes over a file's bytes, so that OpenSSL checks it too:
`openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in certificate.json -sigfile certificate.sig`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError

EXTRA = "pip install 'erasure-diffusion[sign]'"
PASSPHRASE = "ERASURE_KEY_PASSPHRASE"  # noqa: S105 - the environment variable with the passphrase, not one
MAKE = "`openssl genpkey -algorithm ed25519 -out key.pem` makes one, `openssl pkey -in key.pem -pubout` its public key"
LARGEST = 65536  # bytes of a key file
SIGNATURE = 64  # bytes


def private_key(path: str | os.PathLike[str]) -> Any:
    """Read the private Ed25519 key to sign with, in PEM or in OpenSSH's form.

    Args:
        path: the file. The passphrase of an encrypted key is taken from the environment variable
            ERASURE_KEY_PASSPHRASE.

    Raises:
        ErasureError: the file is missing, holds no private Ed25519 key, or its passphrase is missing or wrong.
    """
    serialization, ed25519 = _cryptography()
    data = _read(path)
    if b"PUBLIC KEY" in data or data.startswith(b"ssh-ed25519 "):
        raise ErasureError(f"{path} is a public key, and signing needs the private one; nothing was signed")
    given = os.environ.get(PASSPHRASE)
    passphrase = given.encode() if given else None
    ssh = b"OPENSSH PRIVATE KEY" in data
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        key = _loaded(load, data, passphrase)
    except TypeError:  # encrypted, and no passphrase was given
        raise ErasureError(
            f"{path} is protected by a passphrase: put it into the environment variable {PASSPHRASE}; nothing was "
            "signed"
        ) from None
    except ValueError as fault:
        wrong = "is protected by another passphrase, or " if passphrase else ""
        raise ErasureError(f"{path} {wrong}is not a private key: {fault}. {MAKE}; nothing was signed") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ErasureError(
            f"{path} holds a key of the kind {_kind(key)}, and certificates are signed with Ed25519: {MAKE}; nothing "
            "was signed"
        )
    return key


def public_key(path: str | os.PathLike[str]) -> bytes:
    """Read the public Ed25519 key of a signer, in PEM or in OpenSSH's form.

    Args:
        path: the file.

    Returns:
        The 32 raw bytes of the key.

    Raises:
        ErasureError: the file is missing or holds no public Ed25519 key.
    """
    serialization, ed25519 = _cryptography()
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise ErasureError(
            f"{path} is a private key, which belongs to the signer alone; a check needs the public one "
            "(`openssl pkey -in key.pem -pubout`); nothing was checked"
        )
    load = serialization.load_ssh_public_key if data.startswith(b"ssh-") else serialization.load_pem_public_key
    try:
        key = load(data)
    except ValueError as fault:
        raise ErasureError(f"{path} is not a public key: {fault}; nothing was checked") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ErasureError(
            f"{path} holds a key of the kind {_kind(key)}, and certificates are signed with Ed25519; nothing was "
            "checked"
        )
    return bytes(key.public_bytes_raw())


def sign(key: Any, data: bytes) -> bytes:
    """Return the 64 bytes of the signature of some bytes by a private key."""
    return bytes(key.sign(data))


def signed_by(public: bytes, signature: bytes, data: bytes) -> bool:
    """Tell whether a signature of some bytes was made with the private key that belongs to a public one.

    Args:
        public: the 32 raw bytes of the public key.
        signature: the signature.
        data: the bytes that were signed.
    """
    from cryptography.exceptions import InvalidSignature

    _, ed25519 = _cryptography()
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def raw_public(key: Any) -> bytes:
    """Return the 32 raw bytes of the public key of a private one."""
    return bytes(key.public_key().public_bytes_raw())


def key_fingerprint(public: bytes) -> str:
    """Return the short name of a public key, as `ssh-keygen -l` prints it: SHA256 of its OpenSSH form in base64."""
    kind = b"ssh-ed25519"
    blob = len(kind).to_bytes(4, "big") + kind + len(public).to_bytes(4, "big") + public
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as fault:
        raise ErasureError(f"{path}: the key cannot be read: {fault.strerror or fault}") from None
    if len(data) > LARGEST:
        raise ErasureError(f"{path} is not a key: it is larger than {LARGEST:,} bytes")
    return data


def _loaded(load: Callable[..., Any], data: bytes, passphrase: bytes | None) -> Any:
    """Load a private key; a passphrase that the key does not need is left out."""
    try:
        return load(data, passphrase)
    except TypeError:
        if passphrase is None:
            raise
        return load(data, None)


def _kind(key: Any) -> str:
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").strip("_")


def _cryptography() -> tuple[Any, Any]:
    """Return the two modules of cryptography.

    Raises:
        ErasureError: it is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ErasureError(f"signatures need the package cryptography: {EXTRA}") from None
    return serialization, ed25519
