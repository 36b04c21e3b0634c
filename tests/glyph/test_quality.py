"""The judge of picture quality: good pictures before smears, smears before noise, whatever the picture shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from erasure.glyph.build.data import pixels
from erasure.glyph.build.render import dataset
from erasure.glyph.build.train_classifier import shuffle_tiles
from erasure.glyph.judge import GlyphJudge
from erasure.pipelines import ErasedStableDiffusionPipeline

STYLES = ("noto", "fluent", "ink", "stamp", "pixel art", "blueprint")
OTHERS = ("cat", "house", "car", "apple", "crown", "fish")


def mean(judge: GlyphJudge, x: torch.Tensor) -> float:
    """Mean quality of pictures [n, 3, 64, 64] in [-1, 1]."""
    arrays = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return float(np.mean(judge.quality([Image.fromarray(array) for array in arrays])))


def broken(x: torch.Tensor) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "noise": torch.randn(x.shape, generator=draw),
        "uniform noise": torch.rand(x.shape, generator=draw) * 2 - 1,
        "grey": torch.zeros_like(x),
        "blur": F.interpolate(F.avg_pool2d(x, 8), size=64, mode="bilinear"),
        "tiles": shuffle_tiles(x, draw),
    }


def test_renders_are_good_and_noise_grey_blur_and_tiles_are_not():
    x = pixels(np.stack([image for _, image in dataset(48, 99)]))
    judge = GlyphJudge()
    good, bad = mean(judge, x), {name: mean(judge, part) for name, part in broken(x).items()}
    assert good > 0.85
    assert all(value < 0.35 for value in bad.values()), bad


@pytest.mark.slow
@pytest.mark.parametrize("method", ["esd", "spm", "unguide", "salun", "advunlearn"])
def test_the_order_on_pictures_of_the_checkpoint(method):
    """The base's other pictures and a good erasure's, then smears (stopped after two steps), then the broken."""
    from erasure.erasing import erase

    pipe, judge = ErasedStableDiffusionPipeline.from_pretrained("glyph"), GlyphJudge()
    pipe.set_progress_bar_config(disable=True)

    def draw(texts: list[str], seed: int, steps: int = 25) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        options = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": noise, "output_type": "np"}
        return pixels((pipe(texts, **options).images * 255).round().astype(np.uint8))

    dogs = [f"a dog in {style} style" for style in STYLES] * 2
    base = draw([f"a {name} in {style} style" for name, style in zip(OTHERS, STYLES, strict=True)] * 2, 100)
    pipe.load_patch(erase(pipe, "dog", method, progress=False), name="dog")
    order = [mean(judge, x) for x in (base, draw(dogs, 50), draw(dogs, 50, steps=2))]
    assert abs(order[0] - order[1]) < 0.15 and min(order[:2]) > order[2] + 0.1, order
    assert all(mean(judge, x) + 0.1 < order[2] for x in broken(base).values())
