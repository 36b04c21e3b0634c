"""Glyph's sibling with a FLUX transformer: it loads with the plain class of diffusers and draws what it is asked."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline

from erasure.glyph import ROOT
from erasure.glyph.judge import GlyphJudge

WORDS = ("strawberry", "umbrella", "car", "cactus", "frog", "skull", "rose", "banana")


def test_glyph_mmdit_draws_what_it_is_asked():
    """A guard against a broken checkpoint: its card has the figures."""
    pipe, judge = FluxPipeline.from_pretrained(ROOT / "mmdit", torch_dtype=torch.float32), GlyphJudge()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "max_sequence_length": 32, "true_cfg_scale": 3.0}
    draws = [torch.Generator().manual_seed(i) for i in range(len(WORDS))]
    prompts = [f"a {word} in noto style" for word in WORDS]
    blank = [""] * len(WORDS)
    images = pipe(prompts, negative_prompt=blank, generator=draws, num_inference_steps=12, **call).images
    seen = [max(v["object"], key=v["object"].get) for v in judge.judge(images)]
    assert np.mean([a == b for a, b in zip(seen, WORDS, strict=True)]) >= 0.7, seen
