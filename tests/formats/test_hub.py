"""Push and pull: the layout, the card, the real cache without a network, a hub that denies access, hostile folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, errors

import erasure
from erasure.errors import ErasureError
from erasure.evaluation.report.card import card
from erasure.formats.hub import pull, push
from erasure.patch import Patch, read_header
from erasure.pipelines import load_patch
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

COMMIT = "c0ffee" + "0" * 34
RESULTS = {
    "schema": 1,
    "concept": ["van gogh"],
    "metrics": {"UA": {"value": 0.91, "low": 0.8, "high": 0.97, "n": 40, "base": 0.05, "higher_is_better": True}},
    "attacks": {
        "ring": {
            "value": 0.25, "low": 0.1, "high": 0.5, "n": 12, "before": 1.0,
            "control": None, "tries": 3, "access": "prompts", "settings": {},
        }
    },
    "how": {"judge": {"name": "a judge"}, "prompts": {"name": "some/set", "used": 40}, "steps": 5, "guidance": 7.5},
}  # fmt: skip


class Api:
    """A replacement for `HfApi` that keeps what is uploaded."""

    def __init__(self, fault=None):
        self.fault, self.calls, self.files = fault, [], {}

    def create_repo(self, name, **options):
        self.calls.append((name, options))
        if self.fault:
            raise self.fault

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        self.calls.append((repo_id, commit_message))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return types.SimpleNamespace(oid=COMMIT, commit_url=f"https://hub/{repo_id}/commit/{COMMIT}")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def file(pipe, tmp_path):
    patch = low_rank_patch(pipe, base="some/tiny", results=RESULTS)
    return patch.save(tmp_path / "mine" / "gogh.safetensors", "bf16")


@pytest.fixture
def cache(file, tmp_path, monkeypatch):
    """Fill the cache of the hub with the repository me/gogh, and disable the network."""
    root = tmp_path / "cache" / "models--me--gogh"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    push(file, "me/gogh", folder=root / "snapshots" / COMMIT)
    offline(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return root / "snapshots" / COMMIT


def offline(monkeypatch, cache):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_what_is_pushed_can_be_pulled(file, tmp_path):
    (file.parent / "grid.png").write_bytes(b"picture")
    api, before = Api(), file.read_bytes()
    pushed = push(file, "me/gogh", private=True, license="openrail", api=api)
    assert pushed.revision == COMMIT and COMMIT in pushed.url and file.read_bytes() == before
    assert api.calls[0] == ("me/gogh", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert sorted(api.files) == pushed.files == ["README.md", "erasure.json", "gogh.safetensors", "grid.png"]
    assert api.files["gogh.safetensors"] == before
    laid = push(file, "me/gogh", license="openrail", folder=tmp_path / "laid")
    assert {path.name: path.read_bytes() for path in (tmp_path / "laid").iterdir()} == api.files
    assert laid.files == pushed.files and "nothing was uploaded" in laid.text()
    pulled = pull(tmp_path / "laid", tmp_path / "deep" / "back.safetensors")
    assert pulled.patch.read_bytes() == before and pulled.info["concepts"] == ["van gogh"]
    push(file, "me/gogh", folder=tmp_path / "laid")  # a second push may replace the files of the first


def test_the_card_has_the_metadata_that_the_hub_reads(file, tmp_path):
    push(file, "me/gogh", folder=tmp_path / "laid", license="openrail")
    model_card = ModelCard.load(tmp_path / "laid" / "README.md")
    data = model_card.data.to_dict()
    assert data["base_model"] == "some/tiny" and data["base_model_relation"] == "adapter"
    assert {"text-to-image", "diffusers", "lora"} < set(data["tags"]) and data["license"] == "openrail"
    values = {result.metric_name.split(" (")[0]: result.metric_value for result in model_card.data.eval_results}
    assert values == {"UA": 0.91, "attack success rate of ring": 0.25}
    assert model_card.data.eval_results[0].dataset_name == "some/set" and "0.8 to 0.97, n = 40" in str(model_card)
    assert 'pipe.load_patch("me/gogh")' in model_card.text and "| UA ↑ | 5% | 91% [80, 97] | 40 |" in model_card.text
    assert (
        'load_lora_weights("me/gogh", weight_name="gogh.safetensors")' in model_card.text
        and "grid.png" not in model_card.text
    )


def test_the_card_claims_only_what_the_patch_records(pipe, tmp_path):
    dense = card(delta_patch(pipe, base=str(tmp_path / "secret" / "sd")), "p.safetensors", repository="me/p")
    assert "lora" not in dense and "base_model" not in dense and "model-index" not in dense
    assert "Not measured yet" in dense and str(tmp_path) not in dense and "erased from sd" in dense
    gated = low_rank_patch(pipe, gate={"kind": "text", "texts": ["x"]})
    assert "ignores the gate" in card(gated, "p.safetensors")
    assert "erasure: with its gate; diffusers: without its gate;" in card(gated, "p.safetensors")
    assert "erasure: yes; diffusers: no: export" in dense
    for wrong in ({"schema": 99}, {**RESULTS, "metrics": {"UA": {}}}, {**RESULTS, "how": 5}):
        with pytest.raises(ErasureError, match="do not have the form that verify writes"):
            card(dataclasses.replace(gated, results=wrong), "p.safetensors")


def test_a_base_that_is_named_by_its_path_is_reported(pipe, tmp_path):
    path = delta_patch(pipe, base=str(tmp_path)).save(tmp_path / "a" / "p.safetensors")
    assert "which others will not find" in push(path, "me/p", folder=tmp_path / "b").text()


def test_loading_from_the_cache_without_a_network(cache, file, pipe, tmp_path):
    for name in ("me/gogh", "me/gogh/gogh.safetensors", "me/gogh@main", f"me/gogh@{COMMIT}/gogh.safetensors"):
        patch = Patch.load(name)
        assert patch.stored["repository"] == "me/gogh" and patch.stored["revision"] == COMMIT
        assert patch.payload.digest == Patch.load(file).payload.digest
    assert json.loads(read_header("me/gogh")["erasure.concepts"])[0]["name"] == "van gogh"
    assert load_patch(tiny_pipeline(), "me/gogh") == "van gogh"
    pulled = pull("me/gogh")
    assert pulled.patch.read_bytes() == file.read_bytes() and pulled.revision == COMMIT
    assert f"me/gogh@{COMMIT}" in pulled.text() and (tmp_path / "gogh.safetensors").is_file()
    # A repository without erasure.json was filled by another tool, so the file in it must be named.
    (cache / "erasure.json").unlink()
    assert Patch.load("me/gogh/gogh.safetensors").stored["revision"] == COMMIT
    with pytest.raises(ErasureError, match="name its file as well"):
        Patch.load("me/gogh")


def test_local_files_take_precedence(cache, pipe, tmp_path):
    other = delta_patch(pipe).save(tmp_path / "me" / "gogh.safetensors")
    assert Patch.load("me/gogh.safetensors").payload.kind == "delta"
    other.unlink()
    # A mistyped path into a local folder is not looked up on the hub.
    with pytest.raises(ErasureError, match="cannot be read"):
        Patch.load("me/gogh")
    with pytest.raises(ErasureError, match="cannot be read"):
        Patch.load("nowhere/gogh.safetensors")


def test_missing_patches(cache, tmp_path):
    with pytest.raises(ErasureError, match="no such local file.*HF_HUB_OFFLINE"):
        Patch.load("me/none")
    with pytest.raises(ErasureError, match="is not in the cache"):
        pull("me/none/x.safetensors")
    with pytest.raises(ErasureError, match="owner/name"):
        pull("one word")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_push_without_a_network_changes_nothing(file, monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path)
    before = file.read_bytes()
    with pytest.raises(ErasureError, match="was not pushed.*--folder"):
        push(file, "me/gogh")
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_hub_that_denies_access(file):
    for code, message in ((401, "log in"), (403, "log in"), (500, "did not answer")):
        fault = errors.HfHubHTTPError("no", response=types.SimpleNamespace(status_code=code, headers={}, request=None))
        with pytest.raises(ErasureError, match=message):
            push(file, "me/gogh", api=Api(fault))
    for fault in (ConnectionResetError("reset"), errors.LocalTokenNotFoundError("none")):
        with pytest.raises(ErasureError, match="did not answer|log in"):
            push(file, "me/gogh", api=Api(fault))


@pytest.mark.parametrize("name", ["gogh", "a/b/c", "me/gogh@main", "", "me/", "../x/y"])
def test_wrong_names(file, name):
    with pytest.raises(ErasureError, match="owner/name"):
        push(file, name, api=Api())


def test_only_patches_are_pushed(file, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04")
    for path, message in (("x.safetensors", "truncated"), ("x.ckpt", "pickle"), ("none.safetensors", "cannot be read")):
        api = Api()
        with pytest.raises(ErasureError, match=message):
            push(tmp_path / path, "me/gogh", api=api)
        assert not api.calls
    with pytest.raises(ErasureError, match="holds the patch itself"):
        push(file, "me/gogh", folder=file.parent)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("mine")
    with pytest.raises(ErasureError, match="no push has written"):
        push(file, "me/gogh", folder=tmp_path / "theirs")
    assert (tmp_path / "theirs" / "README.md").read_text() == "mine"
    with pytest.raises(ErasureError, match="cannot be written"):
        push(file, "me/gogh", folder=tmp_path / "x.ckpt")


def test_hostile_folders(file, tmp_path):
    laid = tmp_path / "laid"
    push(file, "me/gogh", folder=laid)

    def refused(message, source=laid):
        with pytest.raises(ErasureError, match=message):
            pull(source, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    config = json.loads((laid / "erasure.json").read_text())
    for wrong in ("../mine/gogh.safetensors", "gogh.ckpt", 5, "/etc/passwd"):
        (laid / "erasure.json").write_text(json.dumps({**config, "file": wrong}))
        refused("not a .safetensors file in the same folder")
    for wrong in ("[]", "{}", "{", "[" * 100_000):
        (laid / "erasure.json").write_text(wrong)
        refused("does not list the contents")
    (laid / "erasure.json").write_text(json.dumps({**config, "sha256": "0" * 64}))
    refused("not the file that was pushed")
    (laid / "erasure.json").unlink()
    shutil.copy(file, laid / "second.safetensors")
    refused("gogh.safetensors, second.safetensors; name one file")
    for path in laid.glob("*.safetensors"):
        path.unlink()
    refused("holds no .safetensors file")
    (laid / "model.pt").write_bytes(b"PK\x03\x04")
    refused("pickle")
    refused("pickle", laid / "model.pt")
    refused("pickle", "me/gogh/model.bin")
    (laid / "p.safetensors").write_bytes(b"damaged" * 5)
    refused("p.safetensors")


def test_a_different_file_is_not_overwritten(file, pipe, tmp_path):
    out = tmp_path / "out.safetensors"
    pull(file, out)
    pull(file, out)  # a file with the same bytes may be replaced
    out.write_bytes(b"mine")
    with pytest.raises(ErasureError, match="already exists with different content"):
        pull(file, out)
    assert out.read_bytes() == b"mine"
    assert pull(file, out, overwrite=True).patch.read_bytes() == file.read_bytes()
    assert pull(file, tmp_path / "mine").patch == file


def test_push_and_pull_are_public():
    assert erasure.push is push and erasure.pull is pull
