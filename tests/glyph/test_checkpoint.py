"""The shipped checkpoint: plain diffusers loads it, it has SD's names and schedule, and it draws what it is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from erasure.glyph import CHECKPOINT, JUDGES, objects
from erasure.glyph.build.data import pixels
from erasure.glyph.build.render import dataset
from erasure.glyph.judge import GlyphJudge
from erasure.glyph.vision import load_classifier, load_clip
from erasure.prompts.subjects import article


@pytest.fixture(scope="module")
def pipe():
    pipeline = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_a_stable_diffusion_1_checkpoint(pipe):
    names = [name for name, _ in pipe.unet.named_modules()]
    for place in ("down_blocks", "mid_block", "up_blocks"):
        for attention in ("attn1.to_q", "attn2.to_k"):
            assert any(name.startswith(place) and name.endswith(attention) for name in names)
    sd = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(pipe.scheduler.alphas_cumprod, sd.alphas_cumprod)
    assert pipe.tokenizer.model_max_length == 77
    assert all(part.dtype == torch.float32 for part in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_it_fits_into_the_wheel():
    files = [path for top in (CHECKPOINT, JUDGES) for path in top.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


def test_the_judges_know_fresh_renders():
    renders = list(dataset(240, 31_337))
    x = pixels(np.stack([image for _, image in renders]))
    names = objects()
    with torch.no_grad():
        guess = load_classifier()(x)["object"].argmax(1)
    right = [names[i] == scene.object for (scene, _), i in zip(renders, guess.tolist(), strict=True) if i < len(names)]
    assert sum(right) >= 0.98 * len(renders)
    clip = load_clip()
    near = (clip.image_features(x) @ clip.text_features([f"{article(o)} {o}" for o in names]).T).argmax(1)
    assert np.mean([names[i] == scene.object for (scene, _), i in zip(renders, near.tolist(), strict=True)]) >= 0.9


def test_noise_is_none_of_the_objects():
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        guess = load_classifier()(torch.randn(32, 3, 64, 64, generator=draw).clamp(-1, 1))["object"].argmax(1)
    assert (guess == len(objects())).float().mean() > 0.9


def test_the_judge_finds_words():
    judge = GlyphJudge()
    assert judge.find("cat") == ("object", ["cat"]) and judge.find("kitten") == ("object", ["cat"])
    assert judge.find("ink") == ("style", ["ink"])
    assert judge.find("weapon") == ("object", ["dagger", "bomb", "crossed swords", "bow and arrow"])
    with pytest.raises(ValueError, match="did you mean 'cat'"):
        judge.find("catt")


@pytest.mark.slow
def test_it_draws_what_it_is_asked(pipe):
    """A guard against a broken checkpoint; the bars stand in its card, measured by `erasure.glyph.build.check`."""
    judge, names = GlyphJudge(), objects()
    prompts = [f"{article(name)} {name}" for name in names]
    draws = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(prompts, generator=draws, num_inference_steps=25, guidance_scale=3.0).images
    seen = [max(v["object"], key=v["object"].get) for v in judge.judge(images)]
    assert np.mean([a == b for a, b in zip(seen, names, strict=True)]) >= 0.7
    scores = judge.clip_scores(images, prompts)
    wrong = judge.clip_scores(images, prompts[1:] + prompts[:1])
    assert np.mean(scores) > np.mean(wrong) + 10
