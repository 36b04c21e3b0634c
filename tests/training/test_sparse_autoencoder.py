"""The sparse autoencoder against numbers computed one by one, and a training that is killed."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from erasure.training import sparse_autoencoder
from erasure.training.activations import Recorded, Recording
from erasure.training.sparse_autoencoder import (
    AutoencoderSettings,
    SparseAutoencoder,
    batches,
    held_out,
    quality,
    share_of_variance,
    top,
    train_autoencoder,
)

SETTINGS = AutoencoderSettings(
    expansion=2, active=2, epochs=30, batch_size=64, learning_rate=1e-2, dead_after=2_000, aux_weight=1 / 32
)


def recorded(folder, words: int = 4, width: int = 8) -> Recorded:
    """Outputs that are sums of two of twelve directions around a centre, with little noise."""
    draw = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(12, width, generator=draw), dim=1)
    prompts = tuple((f"word {word}",) * 2 for word in range(words))
    found = Recorded(folder, prompts, 0, Recording("block", 3, 1.0))
    for word in range(words):
        chosen = torch.stack([torch.randperm(12, generator=draw)[:2] for _ in range(3 * 2 * 16)])
        sizes = 1 + torch.rand(*chosen.shape, 1, generator=draw)
        outputs = (directions[chosen] * sizes).sum(1) + 0.5 + 0.01 * torch.randn(len(chosen), width, generator=draw)
        save_file({"outputs": (4 * outputs).view(3, 2, 16, width).half()}, found.path(word))
    return found


def test_the_greatest_entries_of_the_whole_batch_are_kept():
    z = torch.tensor([[5.0, 1.0, 4.0], [0.5, 3.0, 0.0]])
    assert torch.equal(top(z, 2), torch.tensor([[5.0, 0, 4.0], [0, 0, 0]]))
    assert torch.equal(top(z, 3), torch.tensor([[5.0, 0, 4.0], [0, 3.0, 0]]))
    assert torch.equal(top(z, 99), z)


def test_the_loss_number_by_number():
    model = SparseAutoencoder(4, 6, torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    for param in model.parameters():
        param.data += 0.3 * torch.randn(param.shape, generator=draw)
    x = torch.randn(5, 4, generator=draw)
    dead = torch.tensor([False, True, False, True, True, False])
    found, fired = model.loss(x, 2, dead, 0.25)
    e, d, b, c = (value.tolist() for value in (model.encoder, model.decoder, model.bias, model.centre))
    rows = x.tolist()

    def inner(u, v):
        return sum(p * q for p, q in zip(u, v, strict=True))

    z = [[max(0.0, inner([p - q for p, q in zip(r, c, strict=True)], e[i]) + b[i]) for i in range(6)] for r in rows]
    cut = sorted(itertools.chain(*z), reverse=True)[: 2 * 5][-1]
    kept = [[value if value >= cut else 0.0 for value in row] for row in z]
    rest = [
        [r[j] - c[j] - sum(k[i] * d[i][j] for i in range(6)) for j in range(4)] for r, k in zip(rows, kept, strict=True)
    ]

    def share(values, of):
        mean = [sum(column) / len(of) for column in zip(*of, strict=True)]
        below = sum((v - m) ** 2 for row in of for v, m in zip(row, mean, strict=True))
        return sum(v * v for row in values for v in row) / below

    asleep = [i for i in range(6) if dead[i]]
    order = sorted(((z[n][i], n, i) for n in range(5) for i in asleep), reverse=True)[: 2 * 5]
    waking = [[0.0] * 4 for _ in rows]
    for value, n, i in order:
        waking[n] = [w + value * d[i][j] for j, w in enumerate(waking[n])]
    left = [[p - q for p, q in zip(r, w, strict=True)] for r, w in zip(rest, waking, strict=True)]
    wanted = share(rest, rows) + 0.25 * share(left, rest)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert fired.tolist() == [any(row[i] > 0 for row in kept) for i in range(6)]
    plain, _ = model.loss(x, 2, torch.zeros(6, dtype=torch.bool), 0.25)
    assert plain.item() == pytest.approx(share(rest, rows), rel=1e-5)
    found.backward()  # dead features learn, though none is among the kept
    assert model.encoder.grad[dead].abs().max() > 0


def test_the_threshold_leaves_so_many_active_and_the_units_are_the_networks():
    model = SparseAutoencoder(8, 16, torch.Generator().manual_seed(0))
    outputs = 3 + 5 * torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    model.requires_grad_(False).fit_scale(outputs)
    spread = outputs * model.scale - model.centre
    assert float(spread.norm(dim=1).mean()) == pytest.approx(8**0.5, rel=1e-4)
    assert float(spread.mean(0).abs().max()) < 1e-4
    model.fit_threshold(outputs, 3)
    found = quality(model, outputs)
    assert found["active"] == 3.0
    x = outputs * model.scale
    rest = x - model.decode(model.features(outputs))
    assert found["explained_variance"] == pytest.approx(1 - float(rest.square().sum() / (x - x.mean(0)).square().sum()))
    assert float(share_of_variance(x, x - x.mean(0))) > 1


def test_it_learns_to_rebuild_what_it_has_not_seen(tmp_path):
    model, found = train_autoencoder(recorded(tmp_path), SETTINGS, 0, None)
    assert found["explained_variance"] > 0.8 and 1.9 < found["active"] < 2.1
    assert torch.allclose(model.decoder.norm(dim=1), torch.ones(16), atol=1e-5) and model.threshold > 0
    assert not any(param.requires_grad for param in model.parameters())


def test_the_outputs_in_an_epoch_are_those_not_held_out_once_each(tmp_path, monkeypatch):
    made = recorded(tmp_path)
    monkeypatch.setattr(sparse_autoencoder, "IN_MEMORY", 2 * made.read(0).numel())  # two words at a time
    found = list(batches(made, 2, 30, seed=1))
    assert [step for step, _ in found] == list(range(len(found))) and len(found) == 2 * 2 * (180 // 30)
    held = {tuple(row) for row in held_out(made).tolist()}
    seen = [tuple(row) for _, batch in found[: len(found) // 2] for row in batch.tolist()]
    assert len(set(seen)) == len(seen) == 4 * 90 and not held & set(seen) and len(held) == 4 * 6
    later = list(batches(made, 2, 30, seed=1, first=8))
    assert [step for step, _ in later] == list(range(8, len(found)))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(later, found[8:], strict=True))
    assert not torch.equal(found[0][1], found[len(found) // 2][1])


def test_a_training_that_is_killed_goes_on_as_itself(tmp_path, monkeypatch):
    made, state = recorded(tmp_path), tmp_path / "state.safetensors"
    monkeypatch.setattr(sparse_autoencoder, "CHECKPOINT_EVERY", 4)
    straight, _ = train_autoencoder(made, SETTINGS, 3, None)

    def killed(steps):
        for step, batch in steps:
            if step == 10:
                raise KeyboardInterrupt
            yield step, batch

    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(made, SETTINGS, 3, state, killed)
    begun = []

    def noted(steps):
        for step, batch in steps:
            begun.append(step)
            yield step, batch

    resumed, _ = train_autoencoder(made, SETTINGS, 3, state, noted)
    assert begun[0] == 8
    for (name, one), (_, two) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert straight.threshold == resumed.threshold
