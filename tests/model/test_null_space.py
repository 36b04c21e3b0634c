"""The space that kept states leave free: its dimension, its energy, and names with nothing left in it."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.null_space import check_free, complement, energies
from erasure.model.text_columns import states_of
from tests.tiny import WIDTH, tiny_pipeline

DRAW = torch.Generator().manual_seed(0)
KEEP = torch.randn(3, 6, generator=DRAW, dtype=torch.float64)


def test_the_complement_of_a_span():
    free = complement(KEEP, 1.0)
    assert free.shape == (6, 3)
    assert (KEEP @ free).abs().max() < 1e-10
    assert torch.allclose(free.T @ free, torch.eye(3, dtype=torch.float64))
    assert complement(KEEP[:0], 1.0).shape == (6, 6)


def test_a_share_keeps_the_largest_directions():
    """Axis 0 holds 90 % of the squared lengths, axis 1 9 %, axis 2 1 %."""
    keep = torch.diag(torch.tensor([90.0, 9.0, 1.0], dtype=torch.float64).sqrt())
    for share, count in ((0.5, 1), (0.89, 1), (0.95, 2), (0.985, 2), (0.995, 3), (1.0, 3)):
        free = complement(keep, share)
        assert free.shape == (3, 3 - count), share
        assert (free[:count].abs() < 1e-12).all()


def test_the_energy_outside():
    free = torch.eye(6, dtype=torch.float64)[:, 4:]
    states = torch.tensor([[0, 0, 0, 3.0, 4, 0], [0, 0, 0, 0, 0, 2.0], [1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    assert energies(states, free).tolist() == pytest.approx([16 / 25, 1, 0])


def test_names_with_nothing_left_are_named():
    base = Base("tiny", tiny_pipeline())
    concepts = Concept.list_of(["cat", "dog", "tree"])
    kept = states_of(base, ["cat", "tree"], "last")
    kept = torch.cat([kept, kept.sum(0, keepdim=True)])
    free = complement(kept, 1.0)
    assert free.shape == (WIDTH, WIDTH - 2)
    with pytest.raises(ErasureError, match="nothing can be edited for 'cat', 'tree': .*30 of 32.*Nothing was changed"):
        check_free(base, concepts, free)
    check_free(base, concepts[1:2], free)
