"""The weights of forget samples against their formula."""

from __future__ import annotations

import math

import pytest
import torch

from erasure.training.reweighting import MEMORY, Reweighting, Samples


def samples(own: list[float], t: list[int]) -> Samples:
    return Samples(torch.zeros(len(own)), torch.tensor(own), torch.tensor(t))


def by_hand(seen: list[tuple[float, int]], batch: list[tuple[float, int]], tau: float) -> list[float]:
    """The formula with all samples of a noise level, in plain numbers."""
    weights = []
    for loss, t in batch:
        level = [value for value, other in seen if other // 100 == t // 100]
        mean = sum(level) / len(level)
        spread = math.sqrt(sum((value - mean) ** 2 for value in level) / len(level))
        z = (loss - mean) / spread if spread else 0.0
        weights.append(min(4.0, max(0.25, math.exp(-z / tau))))
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_static_weights_are_the_formula_over_everything_seen(tau):
    draw = torch.Generator().manual_seed(0)
    weighing, seen = Reweighting(tau, 1000, None), []
    for _ in range(5):
        t = torch.randint(1000, (6,), generator=draw).tolist()
        t[:3] = [250, 260, 299]
        own = (torch.rand(6, generator=draw) + torch.tensor(t) / 100).tolist()
        batch = list(zip(own, t, strict=True))
        seen += batch
        found = weighing.weights(samples(own, t))
        assert torch.allclose(found, torch.tensor(by_hand(seen, batch, tau)), rtol=1e-4)
        assert abs(float(found.mean()) - 1) < 1e-6


def test_the_hardest_samples_weigh_most_at_their_own_noise_level():
    """Large losses at one level do not make the others' hard; a smaller loss is a greater weight, not a smaller one."""
    found = Reweighting(1.0, 1000, None).weights(samples([1.0, 2.0, 3.0, 100.0, 200.0, 300.0], [50] * 3 + [850] * 3))
    assert found[0] > found[1] > found[2] and torch.allclose(found[:3], found[3:])


def test_a_level_without_any_spread_weighs_nothing_more_than_another():
    assert torch.equal(Reweighting(1.0, 1000, None).weights(samples([1.0, 7.0], [50, 850])), torch.ones(2))
    assert torch.equal(Reweighting(1.0, 1000, None).weights(samples([0.0] * 4, [50] * 4)), torch.ones(4))


def test_weights_are_bounded_before_they_are_divided_by_their_mean():
    found = Reweighting(0.01, 1000, None).weights(samples([1.0, 2.0], [50, 50]))
    assert abs(float(found[0] / found[1]) - 16) < 1e-3


def test_dynamic_statistics_forget_the_old():
    short, long = Reweighting(1.0, 1000, MEMORY), Reweighting(1.0, 1000, None)
    draw = torch.Generator().manual_seed(0)
    mean = None
    for i in range(200):
        loss = float(torch.rand((), generator=draw)) + (10 if i >= 100 else 0)
        for weighing in (short, long):
            weighing.weights(samples([loss], [50]))
        mean = loss if mean is None else mean + (loss - mean) / min(i + 1, MEMORY)
    assert abs(float(short.mean[0]) - mean) < 1e-6 and float(short.mean[0]) > 10 > float(long.mean[0])


def test_the_last_timestep_is_in_the_last_level_and_a_checkpoint_brings_everything_back():
    one = Reweighting(1.0, 1000, MEMORY)
    one.weights(samples([1.0, 2.0, 4.0], [999, 1000, 950]))
    assert one.seen.tolist() == [0] * 9 + [3]
    two = Reweighting(1.0, 1000, MEMORY)
    two.restore({name: value.clone() for name, value in one.tensors().items()})
    batch = samples([3.0, 1.5], [999, 980])
    assert torch.equal(one.weights(batch), two.weights(batch))
    assert not torch.equal(Reweighting(1.0, 1000, MEMORY).weights(batch), two.weights(batch))
