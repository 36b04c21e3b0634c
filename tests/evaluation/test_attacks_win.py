"""Every attack wins where it must: against a cat that an easy victim has forgotten, and more often than its control.

All of it on glyph, from fixed seeds. An attack that could not beat these would prove nothing by failing elsewhere.
"""

from __future__ import annotations

import functools

import pytest
import torch

from erasure.evaluation.attacks import names
from erasure.evaluation.attacks.ring import FILLER
from erasure.evaluation.attacks.run import attack
from erasure.methods import erase
from erasure.patch import Delta
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import made

pytestmark = pytest.mark.slow

BRIEF = {"trajectories": 4, "progress": False}


def brief(glyph):
    """ESD, three quarters of a default erasure, which refuses most plain prompts."""
    return erase(glyph, "cat", "esd", iterations=55, **BRIEF)


def encoder(glyph):
    """AdvUnlearn, a tenth of a default erasure and without its adversary: the text encoder alone is trained."""
    retain = {"retain_trajectories": 24, "retain_sample_steps": 4, "retain_batch_size": 4}
    return erase(glyph, "cat", "advunlearn", iterations=12, attack_steps=0, learning_rate=6e-4, **retain, **BRIEF)


def reader(glyph):
    """The text encoder takes the word for one that says nothing."""
    known = dict(glyph.text_encoder.named_parameters())
    table = next(name for name in known if name.endswith("token_embedding.weight"))
    cat, filler = (glyph.tokenizer(word).input_ids[1] for word in ("cat", FILLER))
    swap = torch.zeros_like(known[table])
    swap[cat] = known[table].detach()[filler] - known[table].detach()[cat]
    return made(glyph, Delta({"text_encoder": {table: swap}}))


# Attack -> its easy victim, and whether its control is one: img2img's, the same picture without the name, is an attack
# of its own, and so is relearning's: any fine-tune undoes so brief an erasure. Ring-A-Bell's texts beat neither ESD nor
# AdvUnlearn on glyph (ring.py says why), only what changes the word and not what it means.
MUST = {
    "encoder": (encoder, False),
    "rece": (brief, False),
    "ring-a-bell-direct": (brief, True),
    "ring-a-bell": (reader, True),
    "unlearndiffatk": (brief, True),
    "p4d": (brief, True),
    "uma": (brief, True),
    "inversion": (brief, True),
    "img2img": (brief, False),
    "relearning": (brief, False),
}


@pytest.fixture(scope="session")
def glyph():
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def victim_of(glyph):
    """A patch by its maker, trained once."""
    return functools.cache(lambda maker: maker(glyph))


def test_every_attack_has_its_victim():
    assert set(MUST) == set(names()) - {"random"}


@pytest.mark.parametrize("name", MUST)
def test_the_attack_wins(glyph, victim_of, tmp_path, name):
    victim, controlled = MUST[name]
    glyph.load_patch(victim_of(victim), name="victim")
    try:
        report = attack(glyph, "cat", name, folder=tmp_path, cases=6, progress=False)
    finally:
        glyph.unload_patches()
    one = report.outcome(name)
    assert one.plain < one.n / 2, report.text()
    assert len(one.won) >= 2, report.text()
    if controlled:
        assert len(one.won) > len(one.control), report.text()
    if name == "ring-a-bell":
        assert len(one.won) <= one.ceiling <= one.n and str(one.ceiling) in report.text()
