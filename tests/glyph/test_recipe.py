"""The scripts that make glyph: renders, captions, tokenizer, and a training loop that resumes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from erasure.glyph import CHECKPOINT, objects, styles, vocabulary
from erasure.glyph.build.captions import caption, family
from erasure.glyph.build.loop import Fit, averaged, write
from erasure.glyph.build.render import OUTLINE, Scene, dataset, render, scenes
from erasure.glyph.build.tokenizer import build
from erasure.glyph.build.train_classifier import shuffle_tiles, without_object
from erasure.glyph.build.train_vae import reconstruction_loss
from erasure.glyph.build.unpack import training_state


def test_a_render_is_its_seed_and_shows_its_scene():
    scene = Scene("cat", "noto", "pink")
    first, same, other = (np.asarray(render(scene, seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3) and np.array_equal(first, same) and not np.array_equal(first, other)
    corner = first[:2, :2].reshape(-1, 3).mean(0)
    assert np.abs(corner - vocabulary()["backgrounds"]["pink"]).max() < 25
    blue = np.asarray(render(Scene("cat", "noto", "blue"), 1))
    assert np.abs(blue[:2, :2].reshape(-1, 3).mean(0) - corner).max() > 50


def test_held_out_pairs_are_kept_from_the_generator():
    kept = {tuple(pair) for pair in vocabulary()["held_out"]}
    assert len(kept) == 12 and kept <= {(o, s) for o in objects() for s in styles()}
    drawn = {(scene.object, scene.style) for scene, _ in dataset(600, 0, held_out=False)}
    assert not drawn & kept and len(drawn) == 240 - 12
    assert {(s.object, s.style) for s in scenes(held_out=True)} == kept


def test_captions_describe_their_scene_and_say_what_they_name():
    rng = random.Random(0)
    for scene in scenes():
        described = caption(scene, rng)
        assert described.describes(scene)
        if described.style:
            assert any(word in described.text for word in vocabulary()["styles"][described.style]["words"])
        if described.background:
            assert described.background in described.text
        wrong = next(s for s in styles() if s != scene.style)
        if described.style:
            assert not described.describes(Scene(scene.object, wrong, scene.background))
    assert family("weapon") == {"dagger", "bomb", "crossed swords", "bow and arrow"}


def test_any_text_can_be_written():
    tokenizer = build()
    assert len(tokenizer) == 514 + 480
    for text in ("a cat", "Could YOU draw 3 dögs?", "日本 \N{PILE OF POO}", "x" * 50):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        decoded = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert decoded == text.lower().replace(" ", "")
    assert len(tokenizer("a cat", padding="max_length").input_ids) == 77


def test_tiles_keep_every_pixel():
    x = torch.randn(3, 3, 64, 64)
    shuffled = shuffle_tiles(x, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, x)
    assert without_object(x.repeat(4, 1, 1, 1), torch.Generator().manual_seed(0)).shape == (12, 3, 64, 64)


def test_reconstruction_loss_by_hand():
    image = torch.zeros(1, 3, 2, 2)
    decoded = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 3, 2, 2)
    # |off| mean 0.5, off^2 mean 0.5, horizontal differences 1, vertical 0
    assert reconstruction_loss(decoded, image).item() == pytest.approx(0.5 + 0.5 + 0.5 * 1.0)


def fit(path, steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(step):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=draw)
        return (model(x) - x.sum(1, keepdim=True)).pow(2).mean(), {}

    return Fit(model, loss, steps, path, 0.05, warmup=2)


def test_a_stopped_fit_goes_on_to_the_same_weights(tmp_path):
    straight = fit(tmp_path / "a.safetensors", 60).run()
    half = fit(tmp_path / "b.safetensors", 60)
    half.run(until=0.0)  # stops after one step and saves
    resumed = fit(tmp_path / "b.safetensors", 60).run()
    assert all(torch.allclose(straight[name], resumed[name], atol=1e-7) for name in straight)
    assert torch.equal(averaged(tmp_path / "b.safetensors")["weight"], resumed["weight"])
    assert (straight["weight"] - 1).abs().max() < 0.5


def test_shipped_weights_become_a_state_that_training_goes_on_from(tmp_path):
    trained = fit(tmp_path / "a.safetensors", 60).run()
    write(training_state({name: value.half() for name, value in trained.items()}, 0), tmp_path / "b.safetensors")
    further = fit(tmp_path / "b.safetensors", 60)
    further.run()
    start = averaged(tmp_path / "a.safetensors")["weight"]
    assert (averaged(tmp_path / "b.safetensors")["weight"] - 1).abs().sum() < (start - 1).abs().sum()


def test_the_tokenizer_made_again_is_the_shipped_one():
    shipped = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert build().get_vocab() == shipped.get_vocab()


def test_pixel_art_lies_on_the_latent_grid_with_a_dark_outline():
    image = np.asarray(render(Scene("apple", "pixel art", "green"), 3)).astype(int)
    cells = image.reshape(16, 4, 16, 4, 3)
    inside = np.abs(cells - cells[:, :1, :, :1]).max((1, 3, 4))
    assert (inside <= 12).mean() > 0.95  # a cell is one colour, but for the background's grade
    dark = (np.abs(image - np.array(OUTLINE)).max(-1) < 4).mean()
    assert 0.05 < dark < 0.5
