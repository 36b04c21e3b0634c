"""Receler: mask, attack and objective against an independent derivation on the tiny checkpoint, and twins."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.receler import Receler
from erasure.model.attention_maps import outside
from erasure.model.base import Base
from erasure.training.run import Run
from tests.tiny import LENGTH, WIDTH, tiny_pipeline

SMALL = {
    "iterations": 2,
    "batch_size": 2,
    "trajectories": 2,
    "sample_steps": 3,
    "attack_steps": 2,
    "attack_rows": 3,
    "attack_rate": 0.3,
    "rank": 2,
    "mask_threshold": 0.5,
    "learning_rate": 1e-2,
}
CAT = Concept("cat", anchor="dog")


def started(concept=CAT, seed=3, moved=0.4, **settings):
    base = Base("tiny", tiny_pipeline())
    method = dataclasses.replace(Receler(), **{**SMALL, **settings})
    state = method.prepare(base, [concept], Run(seed=seed, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(moved * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    return base, method, state


def drawn(state, step):
    """The states of a step: of its prompt, drawn with replacement by the step's own generator."""
    draw = torch.Generator().manual_seed(3 * 1_000_003 + step)
    own = (state.pool.pair == 0).nonzero().flatten()
    return state.pool.take(own[torch.randint(len(own), (2,), generator=draw)])


def looked(base, x, t, states, tokens):
    """Pixels' attention to tokens, by softmax(q k / sqrt d) of what each attn2 reads, averaged over layers."""
    read = {}
    hooks = [
        module.register_forward_hook(lambda m, a, k, _, path=path: read.update({path: (m, a[0])}), with_kwargs=True)
        for path, module in base.unet.named_modules()
        if path.endswith("attn2")
    ]
    with torch.no_grad():
        base.unet(x, t, states)
        planes = []
        for module, pixels in read.values():
            q, k = (
                proj(value).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for proj, value in ((module.to_q, pixels), (module.to_k, states))
            )
            shown = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)[..., tokens].mean((1, 3))
            side = round(shown.shape[1] ** 0.5)
            plane = shown.unflatten(1, (1, side, side))
            planes.append(F.interpolate(plane, x.shape[2:], mode="bilinear")[:, 0])
    for hook in hooks:
        hook.remove()
    return torch.stack(planes).mean(0)


def by_hand(base, method, state, step):
    """Both terms, from the formulas alone; the rows found; and the mask."""
    batch, params = drawn(state, step), state.adapter.parameters()
    x, t, cat, empty = batch.x, batch.t, base.encode(["cat"]).expand(2, -1, -1), base.encode(["dog"]).expand(2, -1, -1)
    with torch.no_grad(), state.adapter.off():
        named, neutral = base.unet(x, t, cat).sample, base.unet(x, t, empty).sample
        plane = looked(base, x, t, cat, [1])
    low, high = plane.amin((1, 2), keepdim=True), plane.amax((1, 2), keepdim=True)
    where = (plane - low) / (high - low) >= method.mask_threshold
    rows = cat[0, 2:5].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=0.3 * float(base.encode(["cat"]).std()))

    def attacked():
        return torch.cat([cat[:, :2], rows.expand(2, -1, -1), cat[:, 5:]], 1)

    for _ in range(method.attack_steps):
        (rows.grad,) = torch.autograd.grad(((base.unet(x, t, attacked()).sample - named) ** 2).mean(), rows)
        optimizer.step()
    rows = rows.detach()
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, a, path=path: inputs.update({path: a[0]}))
        for path, module in base.unet.named_modules()
        if path.endswith("attn2.to_out.0")
    ]
    output = base.unet(x, t, attacked()).sample
    for hook in hooks:
        hook.remove()
    erase = ((output - (neutral - (named - neutral))) ** 2).mean()
    layers = []
    for path, read in inputs.items():
        eraser = read @ params[f"{path}.down"].T @ params[f"{path}.up"].T
        side = round(eraser.shape[1] ** 0.5)
        far = ~F.interpolate(where[:, None].float(), (side, side)).flatten(1).bool()
        means = [eraser[i, far[i]].square().mean() if far[i].any() else torch.tensor(0.0) for i in range(2)]
        layers.append(sum(means) / 2)
    return {"erase": erase, "local": 0.1 * sum(layers) / len(layers)}, rows, where


def test_both_terms_and_their_gradients_are_the_formulas():
    base, method, state = started()
    expected, rows, where = by_hand(base, method, state, 1)
    params = state.adapter.parameters()
    wanted = {name: torch.autograd.grad(expected[name], params.values(), retain_graph=True) for name in expected}
    assert 0 < where.float().mean() < 1 and expected["local"] > 1e-4
    found = method.loss(state, 1)
    assert torch.allclose(state.latest[0], rows, atol=1e-3)  # another order of sums moves the last digits
    for name, term in found.items():
        assert torch.allclose(term, expected[name], rtol=1e-4), name
        for own, other in zip(torch.autograd.grad(term, params.values(), retain_graph=True), wanted[name], strict=True):
            assert torch.allclose(own, other, rtol=1e-3, atol=1e-6), name
    assert not rows.requires_grad and list(found) == ["erase", "local"]
    state.adapter.remove()


def test_an_eraser_that_has_not_begun_changes_nothing():
    base, method, state = started(moved=0.0)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 20])
    with torch.no_grad():
        on = base.unet(x, t, base.encode(["cat", "dog"])).sample
        with state.adapter.off():
            assert torch.equal(on, base.unet(x, t, base.encode(["cat", "dog"])).sample)
    assert method.loss(state, 0)["local"] == 0
    paths = {name.rpartition(".")[0] for name in state.adapter.parameters()}
    assert paths and all(path.endswith("attn2.to_out.0") for path in paths)
    assert len(paths) == sum(path.endswith("attn2") for path, _ in base.unet.named_modules())
    state.adapter.remove()


def test_outside_is_the_mean_square_off_the_mask():
    draw = torch.Generator().manual_seed(0)
    where = torch.zeros(2, 4, 4, dtype=torch.bool)
    where[0, :2] = True
    where[1] = True
    fine, coarse = torch.randn(2, 16, 3, generator=draw), torch.randn(2, 4, 5, generator=draw)
    first = (fine[0, 8:].square().mean() + coarse[0, 2:].square().mean()) / 2
    assert torch.allclose(outside([fine, coarse], where), first / 2)  # the second sample is all object
    assert outside([fine], torch.ones_like(where)) == 0
    assert torch.allclose(outside([fine], torch.zeros_like(where)), fine.square().mean())


def test_the_attacker_comes_nearer_and_goes_on_from_what_it_found():
    base, method, state = started(attack_steps=12, attack_rate=0.05)
    own = base.encode(["cat"])[0, 2:5]
    assert torch.equal(state.latest[0], own) and state.starts == [2] and state.spans == [(1, 2)]
    assert state.unit == pytest.approx(float(base.encode(["cat"]).std()))
    batch = drawn(state, 0)

    def far(rows):
        with torch.no_grad():
            output = base.predict(batch.x, batch.t, state.attacked(0, rows, 2))
        return float((output - batch.concept).square().mean())

    before = far(own)
    method.loss(state, 0)
    first = state.latest[0].clone()
    assert far(first) < 0.9 * before
    method.loss(state, 0)
    assert not torch.equal(state.latest[0], first) and far(state.latest[0]) < far(first)
    kept = method.snapshot(state)
    method.restore(state, {"latest.0": first})
    assert torch.equal(state.latest[0], first) and not torch.equal(kept["latest.0"], first)
    state.adapter.remove()


def test_rows_stand_behind_the_prompt_and_nowhere_else():
    base, _, state = started(Concept("red", kind="style", anchor="blue"), attack_rows=50)
    number = state.pairs.index(("a dog in red style", "a dog in blue"))
    assert state.starts[number] == 6 and state.spans[number] == (4, 5)
    assert state.latest[number].shape == (LENGTH - 6, WIDTH)
    marked = torch.full((2, WIDTH), 7.0)
    states, plain = state.attacked(number, marked, 3).states, base.encode(["a dog in red style"])
    assert states.shape[0] == 3 and (states[:, 6:8] == 7).all()
    assert torch.equal(states[:, :6], plain[:, :6].expand(3, -1, -1))
    assert torch.equal(states[:, 8:], plain[:, 8:].expand(3, -1, -1))
    state.adapter.remove()


def test_without_an_attacker_it_trains_on_the_prompt_itself():
    base, method, state = started(attack_steps=0)
    batch = drawn(state, 1)
    output = base.unet(batch.x, batch.t, base.encode(["cat"] * 2)).sample
    expected = (output - (2 * batch.neutral - batch.concept)).square().mean()
    assert torch.allclose(method.loss(state, 1)["erase"], expected, rtol=1e-4)
    state.adapter.remove()


def test_concepts_and_names_take_turns():
    base = Base("tiny", tiny_pipeline())
    method = dataclasses.replace(Receler(), **SMALL)
    state = method.prepare(base, [Concept("cat", aliases=("dog",)), Concept("car")], Run(seed=3, progress=False))
    before = [rows.clone() for rows in state.latest]
    changed = []
    for step in range(3):
        method.loss(state, step)
        changed += [i for i, rows in enumerate(state.latest) if not torch.equal(rows, before[i])]
        before = [rows.clone() for rows in state.latest]
    assert sorted(changed) == [0, 1, 2] and set(state.pool.pair.tolist()) == {0, 1, 2}
    state.adapter.remove()


def test_a_run_costs_what_its_docstring_says_and_its_file_loads_in_plain_diffusers(tmp_path):
    patch = erase(tiny_pipeline(), CAT, "receler", out=tmp_path / "cat.safetensors", progress=False, **SMALL)
    # The pool walks 2 trajectories of 3 states with three prompts, for the anchor is not empty.
    assert patch.costs["F"] == 3 * 2 * 3 + 2 * 2 * (1 + 2 + 1) and patch.costs["B"] == 2 * 2 * (2 + 1)
    forecast = plan(tiny_pipeline(), CAT, "receler", **SMALL)
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"])
    plain = tiny_pipeline()
    x, t, states = torch.randn(1, 4, 8, 8), torch.tensor([700]), plain.text_encoder(torch.tensor([[3] * LENGTH]))[0]
    with torch.no_grad():
        before = plain.unet(x, t, states).sample
        plain.load_lora_weights(str(tmp_path / "cat.safetensors"))
        after = plain.unet(x, t, states).sample
        erased = tiny_pipeline()
        for name in patch.payload.names("unet"):
            erased.unet.get_parameter(name).add_(patch.payload.change("unet", name))
        assert torch.allclose(after, erased.unet(x, t, states).sample, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


def test_checkpointed_layers_give_the_same_patch():
    runs = [
        erase(tiny_pipeline(), CAT, "receler", progress=False, gradient_checkpointing=own, **SMALL)
        for own in (False, True)
    ]
    names = runs[0].payload.names("unet")
    one, two = ([run.payload.change("unet", name) for name in names] for run in runs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True)) and any(a.any() for a in one)


def test_what_is_far_from_the_concept_is_held():
    """The same run with a great weight leaves less of the erasers' outputs outside of the mask."""
    left = []
    for weight in (0.0, 100.0):
        _, method, state = started(moved=0.2, local_weight=weight)
        params = state.adapter.parameters()
        optimizer = torch.optim.Adam(params.values(), lr=2e-2)
        for step in range(8):
            optimizer.zero_grad()
            sum(method.loss(state, step).values()).backward()
            optimizer.step()
        left.append(float(dataclasses.replace(method, local_weight=1.0).loss(state, 0)["local"].detach()))
        state.adapter.remove()
    assert left[1] < 0.5 * left[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack_rate": 0.0}, "attack_rate=0.0: must be above 0"),
        ({"mask_threshold": 1.5}, "mask_threshold"),
        ({"stop": "auto"}, "receler: stop=auto has no meaning here: the measurements do not see the attacker"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ErasureError, match=message):
        erase(tiny_pipeline(), CAT, "receler", progress=False, **{**SMALL, **settings})
