"""Forms of sparsity: each against its formula on small tensors, and in runs of methods that train."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods import configure
from erasure.training.adapters import LowRankTerm, Weights
from erasure.training.sparsity import Sparsity, held_bytes, nuclear_gradient, shrunk
from tests.conformance.quick import changes, left_at_a_checkpoint, same, small, weights
from tests.tiny import tiny_pipeline

TINY_RUN = {**small("esd"), "learning_rate": 1e-2}


def settings(form, **more):
    own = {"l1": 0.5, "share": 0.25, "turn": 0.5, "rank": 0.0, **more}
    return SimpleNamespace(iterations=4, sparsity=form, **{f"sparsity_{key}": value for key, value in own.items()})


@pytest.fixture
def net() -> nn.Module:
    """Two layers with 24 and 16 weights of many sizes and both signs."""
    net = nn.ModuleDict({"a": nn.Linear(6, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale, param in zip((1.0, 0.3), net.parameters(), strict=True):
            param.copy_(scale * torch.randn(param.shape, generator=draw))
    return net


def whole(net) -> Weights:
    return Weights(net, dict(net.items()))


def stirred(adapter, seed=1, scale=0.3):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in adapter.parameters().values():
            param.add_(scale * torch.randn(param.shape, generator=draw))
            param.grad = torch.randn(param.shape, generator=draw)
    return {name: param.detach().clone() for name, param in adapter.parameters().items()}


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_the_soft_threshold_is_the_proximal_step_of_the_l1_norm():
    values, grid = torch.tensor([-2.0, -0.4, 0.0, 0.3, 0.9]), torch.linspace(-3, 3, 6001)
    for value, found in zip(values, shrunk(values, 0.5), strict=True):
        best = grid[((grid - value) ** 2 / 2 + 0.5 * grid.abs()).argmin()]
        assert abs(float(best - found)) < 2e-3
    assert torch.allclose(shrunk(values, 0.5), torch.tensor([-1.5, 0.0, 0.0, 0.0, 0.4]))


def test_l1_draws_weights_to_the_base_and_factors_to_zero(net):
    adapter = whole(net)
    start = {name: param.detach().clone() for name, param in adapter.parameters().items()}
    after = stirred(adapter)
    Sparsity(settings("l1"), adapter).settle(0.4)
    for name, param in adapter.parameters().items():
        assert torch.allclose(param, start[name] + shrunk(after[name] - start[name], 0.4 * 0.5))
    assert 0 < sum(int((param == start[name]).sum()) for name, param in adapter.parameters().items()) < 40
    adapter.remove()
    term = LowRankTerm(net, dict(net.items()), rank=2, generator=torch.Generator().manual_seed(0))
    after = stirred(term)
    Sparsity(settings("l1"), term).settle(0.4)
    assert all(torch.allclose(param, shrunk(after[name], 0.2)) for name, param in term.parameters().items())


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_gradient_of_the_nuclear_norm_is_that_of_autograd(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    torch.linalg.matrix_norm(matrix, ord="nuc").backward()
    assert torch.allclose(nuclear_gradient(matrix.detach()), matrix.grad, atol=1e-5)
    assert not torch.allclose(nuclear_gradient(matrix.detach()), matrix.detach().sign(), atol=0.1)


def test_the_nuclear_norm_of_a_matrix_without_full_rank_has_no_gradient_beyond_its_rank():
    one = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0]))
    assert torch.allclose(nuclear_gradient(one), one / 10, atol=1e-6)
    assert torch.equal(nuclear_gradient(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_sara_trains_the_smallest_weights_of_the_base_in_one_ranking(net):
    adapter = whole(net)
    sizes = flat(adapter.parameters()).detach().abs()
    form = Sparsity(settings("sara"), adapter)
    small_ones = sizes <= sizes.sort().values[9]
    assert torch.equal(flat(form.masks), small_ones) and int(small_ones.sum()) == 10  # a quarter of 40
    stirred(adapter)
    before = flat({name: param.grad.clone() for name, param in adapter.parameters().items()})
    form.gradients(0)
    found = flat({name: param.grad for name, param in adapter.parameters().items()})
    assert torch.equal(found, before * small_ones)


def test_sara_adds_the_nuclear_gradient_of_what_trains_in_one_matrix_and_scales_it_with_the_loss(net):
    adapter = whole(net)
    form = Sparsity(settings("sara", rank=0.7, share=0.6), adapter, seed=5)
    seen = set()
    for step in range(6):
        after = stirred(adapter, seed=step, scale=0.0)
        grads = {name: param.grad.clone() for name, param in adapter.parameters().items()}
        form.gradients(step, scale=8.0)
        moved = [n for n, p in adapter.parameters().items() if not torch.equal(p.grad, grads[n] * form.masks[n])]
        assert len(moved) == 1
        name, mask = moved[0], form.masks[moved[0]]
        matrix = (after[name] * mask).requires_grad_(True)
        (gradient,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, ord="nuc"), matrix)
        expected = (grads[name] + 8.0 * 0.7 * gradient) * mask
        assert torch.allclose(adapter.parameters()[name].grad, expected, atol=1e-4)
        seen.add(name)
    assert len(seen) == 2


def test_sara_freezes_what_has_grown_beyond_the_largest_that_trained(net):
    adapter = whole(net)
    start = flat(adapter.parameters()).detach().clone()
    form = Sparsity(settings("sara"), adapter)
    trained, bound = flat(form.masks), float(start.abs()[flat(form.masks)].max())
    after = flat(stirred(adapter))
    assert [form.begin(step) for step in (0, 1, 2, 3)] == [False, False, True, False]  # 2 of 4 updates
    assert torch.equal(flat(form.masks), trained & (after.abs() <= bound))
    assert 0 < int(flat(form.masks).sum()) < int(trained.sum())
    assert torch.equal(flat(adapter.parameters()).detach(), after)  # frozen as they are


def test_prune_keeps_the_largest_changes_of_all_tensors_and_puts_the_others_back(net):
    adapter = whole(net)
    start = flat(adapter.parameters()).detach().clone()
    after = flat(stirred(adapter))
    form = Sparsity(settings("prune"), adapter)
    assert not form.masks and [form.begin(step) for step in (0, 1)] == [False, False]
    assert form.begin(2) and not form.begin(3)
    change = (after - start).abs()
    kept = change >= change.sort(descending=True).values[9]
    assert torch.equal(flat(form.masks), kept)
    assert torch.equal(flat(adapter.parameters()).detach(), torch.where(kept, after, start))
    form.gradients(2)
    assert torch.equal(flat({n: p.grad for n, p in adapter.parameters().items()}) != 0, kept)


def test_masks_survive_a_checkpoint(net):
    adapter = whole(net)
    stirred(adapter)
    form = Sparsity(settings("prune"), adapter)
    form.begin(2)
    other = Sparsity(settings("prune"), adapter)
    other.restore(form.tensors())
    assert torch.equal(flat(other.masks), flat(form.masks)) and other.masks["a.weight"].dtype == torch.bool


@pytest.mark.parametrize("form", ["l1", "prune", "sara"])
@pytest.mark.parametrize("turn", [0.25, 0.5])
def test_a_run_of_esd_changes_what_the_form_allows_and_resumes_as_itself(form, turn, tmp_path, monkeypatch):
    """The interruption comes after two of four updates: after the choice, or right before it."""
    pipe, own = tiny_pipeline(), {**TINY_RUN, "sparsity": form, "sparsity_turn": turn, "sparsity_l1": 0.5}
    before = weights(pipe)
    patch = erase(pipe, "cat", "esd", progress=False, **own)
    assert same(before, weights(pipe))
    plain = erase(pipe, "cat", "esd", progress=False, **TINY_RUN)
    change, whole_change = flat(changes(patch)), flat(changes(plain))
    density = float((change != 0).float().mean())
    if form == "l1":
        assert 0.1 < density < 0.99 and float(change.norm()) < float(whole_change.norm())
    else:
        assert 0.02 < density <= 0.1
    if form == "sara":
        base = flat({name: before[name].abs() for name in changes(patch)})
        assert float(base[change != 0].max()) <= float(base.sort().values[int(0.1 * len(base))])
    assert {key: patch.config[key] for key in ("sparsity", "sparsity_turn")} == {
        "sparsity": form,
        "sparsity_turn": turn,
    }
    assert patch.costs["F"] == plain.costs["F"] and patch.costs["B"] == plain.costs["B"]
    out = tmp_path / "p.safetensors"
    left_at_a_checkpoint(monkeypatch, lambda: erase(tiny_pipeline(), "cat", "esd", out=out, progress=False, **own))
    resumed = erase(tiny_pipeline(), "cat", "esd", out=out, progress=False, **own)
    assert same(changes(patch), changes(resumed))


@pytest.mark.parametrize(
    ("method", "form"), [("salun", "sara"), ("doco", "prune"), ("advunlearn", "sara"), ("spm", "l1"), ("gem", "l1")]
)
def test_methods_with_weights_or_factors_take_it(method, form):
    own = {**small(method), "iterations": 2}
    patch = erase(tiny_pipeline(), "cat", method, progress=False, sparsity=form, **own)
    plain = erase(tiny_pipeline(), "cat", method, progress=False, **own)
    assert not same(changes(patch), changes(plain))
    if form != "l1":
        assert 0 < float((flat(changes(patch)) != 0).float().mean()) <= 0.1


def test_the_forecast_holds_the_masks():
    plain = plan(tiny_pipeline(), "cat", "esd", **TINY_RUN)
    for form, bytes_each in (("l1", 0), ("prune", 5)):
        found = plan(tiny_pipeline(), "cat", "esd", sparsity=form, **TINY_RUN)
        assert found.training_bytes - plain.training_bytes == bytes_each * plain.weights
        assert (found.F, found.B) == (plain.F, plain.B)
    params = {"a": nn.Parameter(torch.zeros(6, 4)), "b": nn.Parameter(torch.zeros(9))}
    # Masks; the matrix and its gradient, U [6, 4], S [4] and V [4, 4].
    assert held_bytes("sara", params) == 33 + 4 * (2 * 24 + 24 + 4 + 16)
    assert held_bytes("none", params) == held_bytes("l1", params) == 0


@pytest.mark.parametrize(
    ("method", "setting", "says"),
    [
        ("esd", {"sparsity": "sara", "rank": 4}, "esd: sparsity=sara has no meaning here: low-rank factors.*l1 works"),
        ("gem", {"sparsity": "prune"}, "gem: sparsity=prune has no meaning here: low-rank factors"),
        ("esd", {"sparsity": "l1", "weight_rounding": "bf16"}, "weight_rounding rounds all weights"),
        ("doco", {"sparsity": "prune", "weight_decay": 0.1}, "weight_decay draws all weights to 0"),
        ("esd", {"sparsity": "prune", "stop": "auto"}, "stop=auto may go back"),
        ("esd", {"sparsity": "l1", "parity": True}, "the published script has no such option"),
        ("mace", {"sparsity": "l1"}, "mace: sparsity=l1 has no meaning here: its terms are fused"),
        ("negmerge", {"sparsity": "sara"}, "negmerge: sparsity=sara has no meaning here: its fine-tunes start anew"),
        ("esd", {"sparsity": "most"}, "none, l1, prune, sara"),
        ("esd", {"sparsity_share": 1.0}, "sparsity_share=1.0: must be above 0 and below 1"),
        ("uce", {"sparsity": "l1"}, "unknown config key 'sparsity'"),
    ],
)
def test_what_has_no_meaning_is_refused_before_the_model_is_loaded(method, setting, says):
    with pytest.raises(ErasureError, match=says):
        erase("no such model", "cat", method, **setting)


def test_l1_may_end_by_its_measurements():
    assert configure("esd", "object", {"sparsity": "l1", "stop": "auto"}).stop == "auto"


def test_an_adapter_of_another_kind_is_refused(net):
    with pytest.raises(ErasureError, match="sparsity=sara works with whole weights, and here a LowRankTerm trains"):
        Sparsity(settings("sara"), LowRankTerm(net, dict(net.items()), rank=2, generator=torch.Generator()))
