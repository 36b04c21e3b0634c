"""Images to learn from: drawn by the base, or read."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.training.image_latents import drawn, read_folder
from tests.tiny import tiny_pipeline


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def test_drawn_images_are_those_of_the_pipeline(base):
    images = drawn(base, ["a cat"], 1, seed=0, steps=3, guidance=4.0)
    pipe = base.pipe
    pipe.scheduler = base.sampler("ddim")
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        "a cat",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert torch.allclose(images.mean, latents, atol=1e-4)


def test_they_do_not_depend_on_the_batch_and_are_kept(base, tmp_path, monkeypatch):
    one = drawn(base, ["cat", "dog"], 3, seed=4, steps=2, guidance=3.0, batch=1)
    costs = Counts()
    with counting(base.unet, costs):
        two = drawn(base, ["cat", "dog"], 3, seed=4, steps=2, guidance=3.0, batch=3, path=tmp_path / "i.safetensors")
        assert costs.forward == 3 * 2 * 2
        monkeypatch.setattr(base.unet, "forward", None)  # the images are read
        three = drawn(base, ["cat", "dog"], 3, seed=4, steps=2, guidance=3.0, path=tmp_path / "i.safetensors")
    assert costs.forward == 24 and one.prompts == ["cat", "dog", "cat"]
    assert torch.allclose(one.mean, two.mean, atol=1e-5) and torch.equal(two.mean, three.mean)


def test_a_folder_is_read_with_its_posteriors(base, tmp_path):
    (tmp_path / "a dog").mkdir()
    Image.new("RGB", (50, 20), (250, 10, 10)).save(tmp_path / "top.png")
    Image.new("L", (16, 16), 90).save(tmp_path / "a dog" / "grey.jpg")
    images = read_folder(base, tmp_path, "a cat")
    assert sorted(images.prompts) == ["a cat", "a dog"] and images.mean.shape == (2, *base.latent_shape())
    draw = torch.Generator().manual_seed(0)
    many = torch.stack([images.sample(torch.tensor([0]), draw)[0] for _ in range(200)])
    assert torch.allclose(many.std(0).mean(), images.std[0].mean(), rtol=0.1)


def test_folders_that_hold_nothing(base, tmp_path):
    with pytest.raises(ErasureError, match="is not a folder"):
        read_folder(base, tmp_path / "nowhere")
    with pytest.raises(ErasureError, match="holds no images"):
        read_folder(base, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ErasureError, match="cannot be read as an image"):
        read_folder(base, tmp_path)


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_half_precision_works_in_fp32(base, tmp_path, upcast):
    Image.new("RGB", (16, 16), (250, 10, 10)).save(tmp_path / "a.png")
    vae = base.pipe.vae.half()
    vae.register_to_config(force_upcast=upcast)
    with torch.no_grad():  # 16 bits end at 65504; the layer behind takes the size out again
        vae.encoder.conv_in.weight.mul_(300_000)
    assert bool(torch.isfinite(read_folder(base, tmp_path).mean).all()) is upcast
    assert vae.dtype == torch.float16
