"""Gates in the header of a patch: which are read, and which are refused when the patch is loaded."""

from __future__ import annotations

import pytest

from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch
from erasure.pipelines.gates.latent import LatentGate
from erasure.pipelines.gates.parse import parse_gate
from erasure.pipelines.gates.text import TextGate
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

TEXT = {"kind": "text"}


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def test_each_kind_is_read_with_its_settings(pipe):
    concepts = [{"name": "cat", "aliases": ["kitten"]}, {"name": "dog"}]
    gates = [
        ({"kind": "always"}, None),
        (TEXT, TextGate(("cat", "kitten", "dog"))),
        ({**TEXT, "texts": ["tree"], "power": 2, "threshold": 0.5}, TextGate(("tree",), 2, 0.5)),
        ({**TEXT, "texts": ["tree"], "scale": 4.0}, TextGate(("tree",), scale=4.0)),
        ({"kind": "latent", "late": True}, LatentGate(late=True)),
        ({"kind": "latent", "after": 3, "early": False}, LatentGate(after=3, early=False)),
    ]
    for settings, gate in gates:
        assert parse_gate(low_rank_patch(pipe, gate=settings, concepts=concepts)) == gate


def test_gates_that_cannot_run_are_refused_at_loading(pipe):
    gates = [
        ({"kind": "latnt"}, "unknown gate 'latnt'.*did you mean 'latent'"),
        ({"kind": "latent", "after": 60}, "0 < after < steps"),
        ({"kind": "latent", "repeats": 1.5}, "whole numbers"),
        ({"kind": "latent", "early": 1}, "early of a latent gate must be true or false, not 1"),
        ({"kind": "latent", "on": "x"}, "on of a latent gate must be a finite number, not 'x'"),
        ({"kind": "latent", "offf": 1}, "did you mean 'off'"),
        ({"kind": "always", "power": 1}, "unknown key of a gate of kind always 'power'"),
        ({**TEXT, "powr": 1}, "did you mean 'power'"),
        ({**TEXT, "power": -1}, "power of a text gate must be a number"),
        ({**TEXT, "power": "1"}, "power of a text gate must be a number"),
        ({**TEXT, "scale": -4}, "scale of a text gate must be a number"),
        ({"kind": "latent", "late": 1}, "late of a latent gate must be true or false, not 1"),
        ({**TEXT, "threshold": True}, "threshold of a text gate must be a number"),
        ({**TEXT, "texts": "cat"}, "texts of a text gate must be a list"),
        ({"kind": "latent", "ratio": 0}, "ratio of a latent gate must be above 0"),
        ({"kind": "latent", "measure": "nrom"}, "did you mean 'norm'"),
        ({**TEXT, "texts": []}, "at least one text"),
        ({**TEXT, "texts": [3]}, "at least one text"),
    ]
    for gate, message in gates:
        with pytest.raises(ErasureError, match=message):
            pipe.load_patch(low_rank_patch(pipe, gate=gate))
    with pytest.raises(ErasureError, match="low-rank payload"):
        pipe.load_patch(delta_patch(pipe, gate=TEXT))
    with pytest.raises(ErasureError, match="at least one text"):
        pipe.load_patch(low_rank_patch(pipe, gate=TEXT, concepts=[{}]))
    with pytest.raises(ErasureError, match="aliases of a concept must be a list"):
        pipe.load_patch(low_rank_patch(pipe, gate=TEXT, concepts=[{"name": "cat", "aliases": "kitten"}]))
    with pytest.raises(
        ErasureError, match="changes the unet or the transformer alone, but this one changes text_encoder"
    ):
        pipe.load_patch(low_rank_patch(pipe, components=("text_encoder",), gate={"kind": "latent"}))
    plain = tiny_pipeline()
    with pytest.raises(ErasureError, match=r"ErasedStableDiffusionPipeline.from_pipe\(pipe\)"):
        load_patch(plain, low_rank_patch(plain, gate=TEXT))
    assert pipe.get_list_patches() == {}
