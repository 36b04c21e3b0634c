"""The scripts that make glyph's transformer siblings: sizes, text, schedule, and folders that plain diffusers loads."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from erasure.glyph.build import train_dit, train_mmdit, train_t5
from erasure.glyph.build.check_transformer import SiblingChecker
from erasure.glyph.build.loop import averaged, write
from erasure.glyph.build.transformer import Plateau, save, stratified
from erasure.glyph.build.unpack import training_state


@pytest.fixture
def work(tmp_path):
    """A folder of training states at step 0."""
    torch.manual_seed(0)
    write(training_state(train_dit.build().state_dict(), 0), tmp_path / train_dit.STATE)
    write(training_state(train_mmdit.build().state_dict(), 0), tmp_path / train_mmdit.STATE)
    text = train_t5.build(len(train_t5.build_tokenizer()))
    weights = {f"text.{name}": value for name, value in text.named_parameters()}
    write(training_state(weights, 0), tmp_path / train_t5.STATE)
    train_mmdit.normalise(2 * torch.randn(8, 4, 16, 16) + 1, tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind, module", [("dit", train_dit), ("mmdit", train_mmdit)])
def test_the_exported_folder_loads_with_plain_diffusers_and_draws_as_the_run(kind, module, work, tmp_path):
    assembled = module.assemble(work)
    assert 4e6 < sum(p.numel() for p in assembled.transformer.parameters()) < 8e6
    nn.init.normal_(assembled.transformer.proj_out.weight, std=0.05)  # it starts at zero, and would draw nothing
    save(assembled, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) < 20e6
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    drawn = [
        SiblingChecker(pipe, kind, batch=2, guidance=3.0, steps=2).generate(["a cat", "a dog in ink style"], 0)
        for pipe in (assembled, loaded)
    ]
    assert drawn[0].shape == (2, 3, 64, 64)
    assert (drawn[0] - drawn[1]).abs().mean() < 0.02  # half precision


def test_the_rate_is_level_until_it_falls_and_does_not_depend_on_the_steps_before():
    fits = [Plateau(nn.Linear(1, 1), lambda step: None, steps, None, 1e-3, warmup=10) for steps in (1000, 2000)]
    assert fits[0].rate(0) == pytest.approx(1e-4)
    assert [fit.rate(700) for fit in fits] == [1e-3, 1e-3]
    falling = [fits[0].rate(step) for step in range(750, 1000)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 5e-6


def test_stratified_numbers_fall_one_in_each_part():
    found = stratified(32, torch.Generator().manual_seed(0))
    assert (found * 32).long().tolist() == list(range(32))


def test_t5_writes_any_ascii_and_pads_to_a_random_length():
    tokenizer = train_t5.build_tokenizer()
    ids = tokenizer("Could YOU draw 3 blue {cats}?").input_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
    assert len(tokenizer("a cat in pixel art style on a pink background").input_ids) == 11
    shapes = {train_t5.pad(tokenizer, ["a cat", ""], random.Random(seed)).shape[1] for seed in range(20)}
    assert min(shapes) >= 3 and max(shapes) <= train_t5.LONGEST and len(shapes) > 5


def test_the_shift_and_scale_undo_what_the_latents_went_through(work):
    stock = 2 * torch.randn(64, 4, 16, 16) + 1
    scaled = train_mmdit.normalise(stock, work)
    assert abs(scaled.mean()) < 1e-3 and abs(scaled.std() - 1) < 1e-3
    config = train_mmdit.assemble(work).vae.config
    assert np.allclose(scaled / config.scaling_factor + config.shift_factor, stock, atol=1e-4)
    assert set(averaged(work / train_mmdit.STATE)) == {name for name, _ in train_mmdit.build().named_parameters()}
