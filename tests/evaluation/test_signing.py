"""Keys and signatures: every kind of bad key is refused with its reason."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from erasure.errors import ErasureError
from erasure.evaluation.signing import PASSPHRASE, key_fingerprint, private_key, public_key, raw_public, sign, signed_by

PEM, OPENSSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
SSH = serialization.Encoding.OpenSSH
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def write_keys(folder, key=None, passphrase=None, form=serialization.PrivateFormat.PKCS8):
    """Write key.pem and public.pem; returns their paths."""
    key = key or ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(PEM, form, locked))
    public.write_bytes(key.public_key().public_bytes(PEM, SPKI))
    return private, public


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch):
    monkeypatch.delenv(PASSPHRASE, raising=False)


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, OPENSSH], ids=["pem", "openssh"])
def test_a_signature_holds_for_its_bytes_and_key_alone(form, tmp_path):
    private, public = write_keys(tmp_path, form=form)
    key, raw = private_key(private), public_key(public)
    assert raw == raw_public(key) and len(raw) == 32
    signature = sign(key, b"text")
    assert len(signature) == 64 and signed_by(raw, signature, b"text")
    assert not signed_by(raw, signature, b"Text")
    assert not signed_by(raw, signature[:-1] + bytes([signature[-1] ^ 1]), b"text")
    assert not signed_by(bytes(32), signature, b"text") and not signed_by(b"short", signature, b"text")
    (tmp_path / "public.ssh").write_bytes(key.public_key().public_bytes(SSH, serialization.PublicFormat.OpenSSH))
    assert public_key(tmp_path / "public.ssh") == raw


def test_the_fingerprint_is_that_of_ssh_keygen():
    """`ssh-keygen -l` on the public key of RFC 8032, test 1."""
    raw = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert key_fingerprint(raw) == FINGERPRINT


FINGERPRINT = "SHA256:bbXpuKG6zhzdmnxq256TlqzFBzRl2f6OOg722cYNbU8"


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, OPENSSH], ids=["pem", "openssh"])
def test_a_passphrase(form, tmp_path, monkeypatch):
    if form is OPENSSH:
        pytest.importorskip("bcrypt")
    private, _ = write_keys(tmp_path, passphrase=b"right", form=form)
    with pytest.raises(ErasureError, match=f"protected by a passphrase.*{PASSPHRASE}"):
        private_key(private)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(ErasureError, match="protected by another passphrase"):
        private_key(private)
    monkeypatch.setenv(PASSPHRASE, "right")
    assert private_key(private)
    plain, _ = write_keys(tmp_path)
    assert private_key(plain)  # a passphrase that is not needed does not hurt


def test_bad_keys(tmp_path):
    private, public = write_keys(tmp_path)
    with pytest.raises(ErasureError, match="is a public key, and signing needs the private one"):
        private_key(public)
    with pytest.raises(ErasureError, match="is a private key, which belongs to the signer alone"):
        public_key(private)
    for read in (private_key, public_key):
        with pytest.raises(ErasureError, match="cannot be read: No such file"):
            read(tmp_path / "none")
        (tmp_path / "text").write_text("no key")
        with pytest.raises(ErasureError, match="is not a p"):
            read(tmp_path / "text")
        (tmp_path / "big").write_bytes(bytes(70000))
        with pytest.raises(ErasureError, match="larger than"):
            read(tmp_path / "big")
    private, public = write_keys(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ErasureError, match="signed with Ed25519"):
        private_key(private)
    with pytest.raises(ErasureError, match="signed with Ed25519"):
        public_key(public)
