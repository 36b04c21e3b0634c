"""The dictionary of a base: its words and prompts, its means, and the cache that concepts share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import counting
from erasure.training.activations import Recording
from erasure.training.feature_dictionary import (
    Dictionary,
    DictionarySettings,
    base_key,
    dictionary_of,
    mean_features,
    spread_words,
    trajectory_prompts,
)
from erasure.training.run import Run
from erasure.training.sparse_autoencoder import AutoencoderSettings, SparseAutoencoder
from tests.tiny import tiny_pipeline

SETTINGS = DictionarySettings(
    Recording("up_blocks.0.attentions.1", 2, 3.0),
    AutoencoderSettings(expansion=2, active=3, epochs=1, batch_size=32),
    most_words=2,
    trajectories=1,
)


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


@pytest.fixture
def run() -> Run:
    return Run(seed=1, progress=False)


def test_the_prompts_of_a_word():
    listed = (("object", "cat"), ("identity", "clown"), ("style", "ink"), ("style", "noto"), ("", ""))
    found = trajectory_prompts(listed, 3, lambda text: "clown" not in text or "in" not in text)
    assert found == (
        ("cat", "a cat in noto style", "a cat in ink style"),
        ("clown", "clown", "clown"),
        ("ink style", "a clown in ink style", "ink style"),
        ("noto style", "noto style", "a clown in noto style"),
        ("", "", ""),
    ) or found[0] == ("cat", "a cat in noto style", "a cat in ink style")
    assert {len(prompts) for prompts in found} == {3} and found[-1] == ("", "", "")
    assert all(prompts[0] in ("cat", "clown", "ink style", "noto style", "") for prompts in found)


def test_words_are_spread_over_the_kinds(base):
    found = spread_words(base, 8)
    assert found[-1] == ("", "") and len(found) <= 9 and len(set(found)) == len(found)
    assert {kind for kind, _ in found} >= {"object", "style"}
    assert len(spread_words(base, 10_000)) > len(found)


def test_the_means_number_by_number():
    model = SparseAutoencoder(4, 6, torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    model.scale, model.threshold = 2.0, 0.3
    outputs = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    found = mean_features(model, outputs)
    for step in range(3):
        for i in range(6):
            values = []
            for x in outputs[step].flatten(0, 1).tolist():
                z = sum(2.0 * a * b for a, b in zip(x, model.encoder[i].tolist(), strict=True))
                values.append(z if z > 0.3 else 0.0)
            assert float(found[step, i]) == pytest.approx(sum(values) / 10, abs=1e-5)


def test_a_file_gives_the_same_dictionary_and_a_damaged_one_is_noticed(base, run, tmp_path):
    made = dictionary_of(base, SETTINGS, run, cached=False)
    assert len(made.means) == len(made.words) == 4 and made.means.shape[1:] == (2, 32)
    assert made.timesteps == (501.0, 1.0)
    assert set(made.quality) == {"explained_variance", "active", "dead"}
    made.save(tmp_path / "d.safetensors", {})
    read = Dictionary.load(tmp_path / "d.safetensors")
    assert read.words == made.words and read.quality == made.quality and torch.equal(read.means, made.means)
    x = torch.randn(7, 16)
    assert torch.equal(read.model.features(x), made.model.features(x))
    data = bytearray((tmp_path / "d.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "d.safetensors").write_bytes(data)
    with pytest.raises(ErasureError, match="do not match its digest"):
        Dictionary.load(tmp_path / "d.safetensors")


def test_the_cache_gives_the_same_dictionary_without_a_call(base, run, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    with counting(base.network) as first:
        made = dictionary_of(base, SETTINGS, run, cached=True)
    assert first.forward == 3 * 2 * 2 + 2  # a word of each kind with guidance, the empty prompt without
    (file,) = tmp_path.glob("features-*.safetensors")
    with counting(base.network) as second:
        read = dictionary_of(base, SETTINGS, run, cached=True)
    assert second.forward == 0 and torch.equal(read.means, made.means)
    file.write_bytes(file.read_bytes()[:-8])
    with counting(base.network) as third:
        again = dictionary_of(base, SETTINGS, run, cached=True)
    assert third.forward == first.forward and torch.equal(again.means, made.means) and "is damaged" in caplog.text
    for other in (
        lambda: dictionary_of(base, SETTINGS, Run(seed=2, progress=False), cached=True),
        lambda: dictionary_of(base, dataclasses.replace(SETTINGS, most_words=1), run, cached=True),
        lambda: dictionary_of(Base("tiny", tiny_pipeline(seed=3)), SETTINGS, run, cached=True),
    ):
        before = len(list(tmp_path.glob("features-*")))
        other()
        assert len(list(tmp_path.glob("features-*"))) == before + 1


def test_the_key_of_a_base_is_of_its_weights_and_schedule(base):
    assert base_key(base) == base_key(Base("other name", tiny_pipeline()))
    keys = {base_key(base)}
    for part in ("unet", "text_encoder"):
        pipe = tiny_pipeline()
        next(getattr(pipe, part).parameters()).data += 1e-3
        keys.add(base_key(Base("tiny", pipe)))
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(beta_end=0.013)
    keys.add(base_key(Base("tiny", pipe)))
    assert len(keys) == 4


def test_a_killed_run_finds_what_it_has_recorded(base, tmp_path):
    run = Run(seed=1, folder=tmp_path, progress=False)
    with counting(base.network) as first:
        made = dictionary_of(base, SETTINGS, run, cached=False)
    (tmp_path / "dictionary.safetensors").unlink()  # as if it had been killed while the autoencoder was trained
    (tmp_path / "words-0001.safetensors").unlink()
    with counting(base.network) as second:
        again = dictionary_of(base, SETTINGS, run, cached=False)
    with counting(base.network) as third:
        read = dictionary_of(base, SETTINGS, run, cached=False)
    assert first.forward == second.forward == third.forward
    assert torch.equal(again.means, made.means) and torch.equal(read.means, made.means)
