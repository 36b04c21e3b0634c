"""Both towers of a checkpoint's CLIP: whose weights they read, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.clip_towers import load_towers
from tests.tiny import tiny_pipeline, write_tiny_clip

TEXTS = ["cat", "a dog by night"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), layers=3)


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def test_texts_and_images_are_those_of_clip_itself(base, folder):
    towers, clip = load_towers(base, str(folder)), CLIPModel.from_pretrained(folder)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    ids = base.pipe.tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        seen = clip.get_image_features(pixel_values=(pixels * 0.5 + 0.5 - mean) / std)
        read = clip.get_text_features(input_ids=ids)
        texts = towers.texts(base.pipe, TEXTS)  # padded less far, which no state at an end token sees
    images = towers.images(pixels)
    for ours, theirs in ((images, seen), (texts, read)):
        right = F.normalize(getattr(theirs, "pooler_output", theirs), dim=-1)
        assert torch.allclose(ours, right, atol=1e-5) and not torch.allclose(ours[:1], ours[1:2], atol=1e-3)
    assert towers.scale == pytest.approx(float(clip.logit_scale.detach().exp()))


def test_the_text_tower_reads_the_encoder_and_keeps_the_layers_that_it_lacks(base, folder, caplog):
    """As on Stable Diffusion 2: the encoder has two layers, CLIP three."""
    towers, encoder = load_towers(base, str(folder)), base.pipe.text_encoder
    with caplog.at_level(logging.WARNING, "erasure"):
        shared = towers.share(encoder)
    assert "the weights differ by" in caplog.text
    assert set(shared) == set(dict(encoder.named_parameters()))
    last = [p for name, p in towers.text.named_parameters() if "layers.2." in name]
    assert last and all(all(p is not own for own in shared.values()) for p in last)
    ids = base.pipe.tokenizer(TEXTS, padding=True, return_tensors="pt").input_ids
    before = towers.embed(ids)
    with torch.no_grad():
        own = shared["encoder.layers.0.mlp.fc2.weight"]
        own.mul_(-50)
        assert not torch.allclose(towers.embed(ids), before, atol=1e-3)
        own.div_(-50)
        assert torch.allclose(towers.embed(ids), before, atol=1e-5)
        for param in last:
            param.mul_(-50)
        assert not torch.allclose(towers.embed(ids), before, atol=1e-3)


def test_the_same_weights_are_no_reason_to_warn(base, folder, caplog):
    towers, encoder = load_towers(base, str(folder)), base.pipe.text_encoder
    own = dict(towers.text.named_parameters())
    for name, param in encoder.named_parameters():
        param.data = own[name if name in own else f"text_model.{name}"].detach() + 1e-6
    with caplog.at_level(logging.WARNING, "erasure"):
        towers.share(encoder)
    assert "differ" not in caplog.text


def test_a_clip_of_another_width_is_refused(base, tmp_path):
    towers = load_towers(base, str(write_tiny_clip(tmp_path, width=48)))
    with pytest.raises(ErasureError, match="another CLIP than that of the text encoder.*nothing was changed"):
        towers.share(base.pipe.text_encoder)


def test_a_clip_that_is_not_there_is_named(base, tmp_path):
    with pytest.raises(ErasureError, match="no CLIP is known whose text tower is the text encoder of tiny.*clip="):
        load_towers(base)
    with pytest.raises(ErasureError, match="image tower of CLIP is needed.*not on this machine.*Nothing was changed"):
        load_towers(base, str(tmp_path / "none"))
    named = Base("runwayml/stable-diffusion-v1-5", base.pipe)
    with pytest.raises(ErasureError, match="openai/clip-vit-large-patch14 is not on this machine"):
        load_towers(named)


def test_a_user_cannot_name_a_function(base):
    """Only presets of bundled checkpoints do."""
    with pytest.raises(ErasureError, match="is not on this machine"):
        load_towers(base, "erasure.glyph.vision:clip_towers")


def test_glyphs_towers_are_those_of_its_judge():
    from erasure.glyph.judge import GlyphJudge

    base, judge = Base.load("glyph", device="cpu"), GlyphJudge()
    towers = load_towers(base)
    shared = towers.share(base.pipe.text_encoder)
    assert len(shared) == len(dict(base.pipe.text_encoder.named_parameters()))
    from PIL import Image

    image = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 64, 64, 3).permute(0, 3, 1, 2)
    cosine = (towers.images(pixels.float() / 127.5 - 1) * towers.texts(base.pipe, ["a cat"])).sum()
    assert float(100 * cosine.detach()) == pytest.approx(judge.clip_scores([image], ["a cat"])[0], abs=1e-3)
