"""Task vectors: what several fine-tunes merge to, and its negation."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.training.task_vectors import TaskVectors

# The changes of three fine-tunes: all up, all down, one against the others, one that does not move, none that moves.
CHANGES = torch.tensor([[1.0, -2.0, 3.0, 4.0, 0.0], [2.0, -2.0, 3.0, 2.0, 0.0], [3.0, -5.0, -3.0, 0.0, 0.0]])
MEAN = torch.tensor([2.0, -3.0, 1.0, 2.0, 0.0])
AGREED = torch.tensor([2.0, -3.0, 0.0, 0.0, 0.0])


@pytest.fixture
def layer() -> torch.nn.Module:
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 1, bias=False)})
    torch.nn.init.constant_(net["a"].weight, 0.5)
    return net


def tuned(net, changes, consensus=True) -> TaskVectors:
    """Each change is made to the weights that are there, so that it is one from the base only if these are put back."""
    adapter = TaskVectors(net, {"a": net["a"]}, consensus=consensus)
    for change in changes:
        with torch.no_grad():
            adapter.parameters()["a.weight"].add_(change)
        adapter.bank()
    return adapter


def test_sign_consensus_keeps_the_mean_where_all_signs_are_equal_and_nothing_else(layer):
    adapter = tuned(layer, CHANGES)
    assert torch.allclose(adapter.merged()["a.weight"], AGREED) and adapter.agreement() == 2 / 5
    assert torch.allclose(tuned(layer, CHANGES, consensus=False).merged()["a.weight"], MEAN)


def test_one_fine_tune_is_task_negation_whatever_the_consensus(layer):
    for consensus in (True, False):
        adapter = tuned(layer, CHANGES[:1], consensus)
        adapter.negate(0.5)
        assert torch.allclose(adapter.payload().change("unet", "a.weight"), -0.5 * CHANGES[0])
        adapter.remove()


def test_negation_starts_from_the_base_each_time_and_the_payload_is_exact(layer):
    adapter = tuned(layer, CHANGES)
    for scale in (3.0, 0.7):
        adapter.negate(scale)
        assert torch.allclose(layer["a"].weight, 0.5 - scale * AGREED)
        with adapter.off():
            assert torch.equal(layer["a"].weight, torch.full((1, 5), 0.5))
    change = adapter.payload().change("unet", "a.weight")[0]
    assert torch.allclose(change, -0.7 * AGREED) and torch.equal(change[2:].abs(), torch.zeros(3))
    adapter.remove()
    assert torch.equal(layer["a"].weight, torch.full((1, 5), 0.5))


def test_what_has_ended_survives_a_checkpoint(layer):
    adapter = tuned(layer, CHANGES[:2])
    kept = {key: value.clone() for key, value in adapter.tensors().items()}
    adapter.remove()
    other = TaskVectors(layer, {"a": layer["a"]}, consensus=True)
    assert not other.tensors()
    other.restore(kept)
    with torch.no_grad():
        other.parameters()["a.weight"].add_(CHANGES[2])
    other.bank()
    assert torch.allclose(other.merged()["a.weight"], AGREED) and other.count == 3


def test_no_agreement_is_an_error_that_says_what_helps(layer):
    adapter = tuned(layer, [torch.ones(5), -torch.ones(5)])
    adapter.negate(1.0)
    with pytest.raises(ErasureError, match="by all 2 fine-tunes.*consensus=none; no patch was written"):
        adapter.payload()
