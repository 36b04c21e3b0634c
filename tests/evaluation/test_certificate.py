"""Certificates: what is written, and that a check notices every change to page, PDF, patch, model and statement."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from erasure.cli.main import main
from erasure.errors import ErasureError
from erasure.evaluation import certificate
from erasure.evaluation.certificate import certify, file_hash, model_record
from erasure.evaluation.certificate_check import check_certificate, read_statement
from erasure.evaluation.signing import key_fingerprint, private_key, public_key
from erasure.evaluation.verify import verify
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.evaluation.test_signing import write_keys
from tests.evaluation.test_verify import QUICK, Judge
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

DATE = datetime.date(2026, 1, 2)


def pipeline():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def printed(page: Path, target: Path) -> bool:
    """Stand in for the browser."""
    target.write_bytes(b"%PDF " + page.read_bytes()[:20])
    return True


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A verification of a tiny patch, and the keys of a signer."""
    folder = tmp_path_factory.mktemp("verified")
    pipe = pipeline()
    patch = delta_patch(
        pipe, part="resnets", size=0.5, concepts=[{"name": "cat", "aliases": ["kitty <b>"]}], base="tiny"
    )
    source = patch.save(folder / "cat.safetensors")
    return verify(pipe, source, folder=folder / "out", attacks=["encoder"], judge=Judge(), **QUICK), folder


@pytest.fixture
def signed(verified, tmp_path, monkeypatch):
    """A signed certificate in a folder of its own, and the public key's path."""
    monkeypatch.setattr(certificate, "print_pdf", printed)
    verification, _ = verified
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(verification.patch, folder)
    moved = dataclasses.replace(verification, patch=folder / verification.patch.name)
    private, public = write_keys(tmp_path)
    certify(moved, pipeline(), key=private_key(private), date=DATE)
    return folder, public, moved


def check(folder, public=None, pipe=None):
    return check_certificate(folder, public=public and public_key(public), model=lambda name: pipe or pipeline())


def test_the_certificate_holds(signed):
    folder, public, _ = signed
    found = check(folder, public)
    assert not found.differs and not found.unchecked and found.key == key_fingerprint(public_key(public))
    parts = ["the signature of certificate.json", "certificate.html", "certificate.pdf", "cat.safetensors", "the model"]
    assert [text[: len(part)] for text, part in zip(found.same, parts, strict=True)] == parts
    assert found.text().endswith("everything that was checked is as certified") and found.to_json()["ok"]
    own = check(folder / "certificate.json")
    assert not own.differs and "whose key that is" in own.unchecked[0]
    blind = check_certificate(folder, public=public_key(public))
    assert not blind.differs and len(blind.unchecked) == 1 and "the model" in blind.unchecked[0]


def test_the_statement_says_everything(signed, verified):
    folder, public, verification = signed
    statement = read_statement(folder)
    assert statement["issued"] == "2026-01-02" and statement["removed"][0]["name"] == "cat"
    assert statement["results"] == verification.results and statement["before"].keys() >= {"UA", "IRA"}
    assert statement["patch"]["sha256"] == file_hash(folder / "cat.safetensors")
    assert statement["model"] == model_record(pipeline())
    page = (folder / "certificate.html").read_text()
    for text in (statement["model"]["sha256"], statement["patch"]["sha256"], statement["key"]["fingerprint"]):
        assert text in page
    assert "kitty &lt;b&gt;" in page and "<b>”" not in page
    assert statement["repeat"][0].startswith("pip install 'erasure-diffusion[sign]==")
    assert statement["repeat"][1].startswith("erasure verify cat.safetensors --model tiny --judge likeness")


TAMPERING = {
    "certificate.html": "certificate.html was changed",
    "certificate.pdf": "certificate.pdf was changed",
    "cat.safetensors": "cat.safetensors was changed",
    "certificate.json": "certificate.json was changed after it was signed",
    "certificate.sig": "certificate.json was changed after it was signed",
}


@pytest.mark.parametrize("name", TAMPERING)
def test_one_changed_byte(name, signed):
    folder, public, _ = signed
    path = folder / name
    data = bytearray(path.read_bytes())
    place = data.index(b"2026-01-02") + 9 if b"2026-01-02" in data else len(data) - 1
    data[place] ^= 1
    path.write_bytes(bytes(data))
    found = check(folder, public)
    assert [text for text in found.differs if text.startswith(TAMPERING[name])] and len(found.differs) == 1
    assert "does not hold" in found.text() and not found.to_json()["ok"]


@pytest.mark.parametrize("name", TAMPERING)
def test_a_missing_file(name, signed):
    folder, public, _ = signed
    (folder / name).unlink()
    if name == "certificate.json":
        with pytest.raises(ErasureError, match="there is no certificate.json"):
            check(folder, public)
    else:
        assert any(name in text and "is missing" in text for text in check(folder, public).differs)


def test_another_model(signed):
    folder, public, _ = signed
    pipe = pipeline()
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 1
    (fault,) = check(folder, public, pipe).differs
    assert "the weights of vae have the sha256" in fault
    (*_, fault) = check(folder, public, pipeline().to(torch.float16)).differs
    assert "loaded as float16" in fault and "--dtype" in fault


def forge(folder, change):
    """Change the statement and leave it unsigned."""
    statement = json.loads((folder / "certificate.json").read_text())
    change(statement)
    (folder / "certificate.json").write_text(json.dumps(statement))
    (folder / "certificate.sig").unlink()
    return folder


def test_a_stripped_signature_shows(signed):
    folder, public, _ = signed
    forge(folder, lambda statement: statement.update(key=None))
    assert "the certificate is not signed" in check(folder, public).differs[0]
    assert not (found := check(folder)).differs and "anybody could have written it" in found.unchecked[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s["results"]["metrics"]["UA"].update(value=1.0, low=0.99), "the figures of certificate.json"),
        (lambda s: s["removed"][0].update(name="dog"), "names ['dog'] as removed"),
        (lambda s: s["patch"].update(file="../cat.safetensors"), "lacks parts of a certificate"),
        (lambda s: s.update(pages={}), "lacks parts of a certificate"),
        (lambda s: s.update(schema=2), "has the schema 2"),
        (lambda s: s.update(kind="else"), "is not a certificate"),
    ],
)
def test_a_forged_statement_differs_from_the_patch(change, fault, signed):
    folder, _, _ = signed
    forge(folder, lambda statement: (statement.update(key=None), change(statement)))
    assert any(fault in text for text in check(folder).differs)


def test_another_key(signed, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ed25519

    folder, _, moved = signed
    (tmp_path / "b").mkdir()
    private, other = write_keys(tmp_path / "b", ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)))
    (fault,) = check(folder, other).differs
    assert "signed by another key than" in fault and "it names SHA256:" in fault
    certify(moved, pipeline(), date=DATE)  # not signed: the old signature goes
    assert not (folder / "certificate.sig").exists() and "not signed" in check(folder, other).differs[0]


def test_patches_and_offloaded_weights_are_refused(verified):
    pipe = pipeline()
    pipe.load_patch(verified[0].patch, name="p")
    with pytest.raises(ErasureError, match="has patches loaded"):
        model_record(pipe)
    pipe.unload_patches()
    pipe.vae.to("meta")
    with pytest.raises(ErasureError, match="is offloaded"):
        model_record(pipe)


def test_the_command(signed, capsys, monkeypatch):
    folder, public, _ = signed
    monkeypatch.setattr("erasure.cli.attack.model", lambda args: pipeline())
    line = ["verify", str(folder), "--check", "--key", str(public)]
    assert main(line) == 2 and "--model none" in capsys.readouterr().err
    assert main([*line, "--model", "none"]) == 0 and "not checked: the model" in capsys.readouterr().out
    assert main([*line, "--model", "my/tiny", "--json"]) == 0 and json.loads(capsys.readouterr().out)["ok"]
    (folder / "certificate.html").write_text("<p>another page")
    assert main([*line, "--model", "my/tiny"]) == 1 and "DIFFERS: certificate.html" in capsys.readouterr().out
    bad = [["--certificate"], ["--sign", "k"]]
    for words in bad:
        assert main([*line, *words]) == 2 and "give one of them" in capsys.readouterr().err
    assert main(["verify", "p", "--sign", "k"]) == 2 and "--certificate, too" in capsys.readouterr().err
    assert main(["verify", "p", "--key", "k"]) == 2 and "--check" in capsys.readouterr().err
    missing = str(folder / "none.pem")
    assert main(["verify", "p", "--certificate", "--sign", missing]) == 2 and "none.pem" in capsys.readouterr().err


def test_the_page_counts_what_the_header_says(signed):
    folder, _, verification = signed
    page = (folder / "certificate.html").read_text()
    gone = verification.results["metrics"]["UA"]
    attacked = verification.results["attacks"]["encoder"]
    assert f"{round(gone['value'] * 4)} of 4 pictures that asked for “cat” do not show it" in page
    assert f"came back for <b>{round(attacked['value'] * 2)} of 2 requests (likely between" in page
    before = verification.before["UA"]
    assert f"Before the removal: {round(before['value'] * 4)} of 4 (likely" in page
    assert Patch.load(verification.patch).names == re.findall("<h1>“(.*?)” was removed", page)
