"""Sums of patches: the identities of addition, on weights and on images, and the sums that are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch, fingerprint
from erasure.patch.ops.arithmetic import add, merge, negate, scale, subtract
from erasure.patch.ops.conflicts import NOTABLE, conflicts
from erasure.patch.ops.overlap_warning import warn_of_overlap
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch
from erasure.pipelines.stack import patch_stack
from tests.patch.making import delta_patch, gap, low_rank_patch, same, weights
from tests.tiny import latents, tiny_pipeline

BOTH = ("unet", "text_encoder")
GATE = {"kind": "text", "texts": ["van gogh"]}
MAKES = [low_rank_patch, delta_patch]


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def changes(*patches):
    """Sum all changes by component and name, in float64."""
    total = {}
    for patch, weight in patches:
        for component in patch.components:
            for name, change in patch.deltas(component).items():
                key = component, name
                total[key] = total.get(key, 0) + weight * change.double()
    return total


def close(patch, *parts, bound=1e-6):
    actual, expected = changes((patch, 1.0)), changes(*parts)
    size = max(float(change.abs().max()) for change in expected.values())
    gaps = (float((actual[key] - change).abs().max()) for key, change in expected.items())
    return actual.keys() == expected.keys() and all(gap <= bound * size for gap in gaps)


@pytest.mark.parametrize("make", MAKES)
def test_scales_add_up(pipe, make):
    patch = make(pipe)
    assert close(add(scale(patch, 2.0), scale(patch, -1.0)), (patch, 1.0))
    assert close(add(scale(patch, 2.0), negate(patch)), (patch, 1.0))
    assert close(scale(scale(patch, 0.5), 2.0), (patch, 1.0))
    assert scale(patch, 2.0).payload.kind == patch.payload.kind


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_merge_is_the_weighted_sum_even_if_ranks_alphas_and_layers_differ(pipe, one, other):
    first = [low_rank_patch(pipe, 1, 2, 3.0, "", BOTH), delta_patch(pipe, 1, "attn")][one]
    second = [low_rank_patch(pipe, 2, 3, 0.5, "attn2"), delta_patch(pipe, 2, "attn2")][other]
    merged = merge([(first, 0.7), (second, -1.5)], base=pipe)
    assert merged.payload.kind == ("delta" if one + other else "low-rank")
    assert close(merged, (first, 0.7), (second, -1.5))
    assert not close(merged, (first, 0.7), (second, 1.5))
    for component in merged.components:
        module = getattr(pipe, component)
        assert merged.base_fingerprint[component] == fingerprint(module, merged.payload.names(component))
    patch_stack(pipe).load(merged)


def test_low_rank_merges_stay_low_rank(pipe):
    merged = merge([(low_rank_patch(pipe, seed, rank), 1.0) for seed, rank in ((1, 2), (2, 3), (3, 1))])
    assert merged.payload.ranks == [6]
    assert {alpha for _, _, alpha in merged.payload.layers["unet"].values()} == {6.0}


@pytest.mark.parametrize("make", MAKES)
def test_a_merge_draws_what_the_stack_draws(pipe, make):
    one, other = make(pipe, 1), make(pipe, 2)
    pipe.load_patch(one, "one", strength=0.7)
    pipe.load_patch(other, "other", strength=-0.4)
    stacked, prompts = latents(pipe, ["a cat", "van gogh"]), ["a cat", "van gogh"]
    pipe.unload_patches()
    base = latents(pipe, prompts)
    pipe.load_patch(merge([(one, 0.7), (other, -0.4)]))
    assert gap(latents(pipe, prompts), stacked) < 1e-4 < gap(base, stacked)


def test_a_merge_of_gated_patches_draws_what_the_stack_draws(pipe):
    one, other = low_rank_patch(pipe, 1, gate=GATE), low_rank_patch(pipe, 2, gate=GATE)
    prompts = ["a cat", "van gogh"]
    pipe.load_patch(one, "one")
    pipe.load_patch(other, "other", strength=0.5)
    stacked = latents(pipe, prompts)
    pipe.unload_patches()
    merged = merge([(one, 1.0), (other, 0.5)])
    assert merged.gate == GATE
    pipe.load_patch(merged)
    assert gap(latents(pipe, prompts), stacked) < 1e-4


@pytest.mark.parametrize("make", MAKES)
def test_changes_that_cancel_leave_every_bit(pipe, make):
    patch, before = make(pipe), weights(pipe)
    base = latents(pipe, ["van gogh"])
    nothing = subtract(patch, patch)
    assert not any(change.any() for change in changes((nothing, 1.0)).values())
    pipe.load_patch(nothing)
    assert same(weights(pipe), before) and torch.equal(latents(pipe, ["van gogh"]), base)


def test_a_negated_patch_undoes_the_patch(pipe):
    patch, before = low_rank_patch(pipe), weights(pipe)
    pipe.load_patch(patch, "there")
    pipe.load_patch(negate(patch), "and back")
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in weights(pipe).items())


def test_the_header_names_the_parents(pipe, tmp_path):
    one = low_rank_patch(pipe, 1, concepts=[{"name": "cat"}], config={"lr": 0.1}, costs={"F": 3, "B": 1})
    one = dataclasses.replace(one, seed=5)
    other = low_rank_patch(pipe, 2, concepts=[{"name": "dog"}], costs={"F": 4, "B": 2}, results={"metrics": {}})
    merged = Patch.load(merge([(one, 1), (other, -0.5)]).save(tmp_path / "p.safetensors"))
    assert merged.method == "merge" and merged.names == ["cat"] and merged.base == "tiny"
    assert merged.costs == {"F": 7, "B": 3} and merged.results is None
    parents = merged.config["parents"]
    assert [entry["weight"] for entry in parents] == [1.0, -0.5]
    assert [entry["digest"] for entry in parents] == [one.payload.digest, other.payload.digest]
    assert parents[0] | {"weight": 0} == {
        "method": "random",
        "concepts": ["cat"],
        "digest": one.payload.digest,
        "weight": 0,
        "seed": 5,
        "config": {"lr": 0.1},
    }
    assert scale(other, 2.0).config["operation"] == "scale" and scale(other, 2.0).results is None
    assert add(one, other).names == ["cat", "dog"] and negate(one).names == ["cat"]


def test_different_gates_are_refused_with_a_way_out(pipe):
    gated, free = low_rank_patch(pipe, 1, gate=GATE), low_rank_patch(pipe, 2)
    with pytest.raises(ErasureError, match="the gates differ.*--drop-gate"):
        add(gated, free)
    assert add(gated, free, drop_gate=True).gate == {"kind": "always"}
    # Without texts, the gate compares prompts with the patch's own concepts.
    implicit = {"kind": "text"}
    cat, dog = (low_rank_patch(pipe, 1, gate=implicit, concepts=[{"name": name}]) for name in ("cat", "dog"))
    with pytest.raises(ErasureError, match="the gates differ"):
        add(cat, dog)
    assert add(cat, low_rank_patch(pipe, 2, gate=implicit, concepts=[{"name": "cat"}])).gate == implicit


def test_other_bases_are_refused(pipe):
    stranger = tiny_pipeline(seed=1)
    one, other = low_rank_patch(pipe, 1), low_rank_patch(stranger, 2, base="stranger")
    with pytest.raises(ErasureError, match="different bases.*tiny.*stranger.*--force"):
        add(one, other)
    assert add(one, other, force=True).base_fingerprint == one.base_fingerprint
    unknown = dataclasses.replace(other, base_fingerprint={})
    with pytest.raises(ErasureError, match="does not record"):
        add(one, unknown)
    wide = low_rank_patch(stranger, 2, part="attn")
    with pytest.raises(ErasureError, match="give base="):
        add(one, wide)
    with pytest.raises(ErasureError, match="differs from that of"):
        add(one, wide, base=pipe)
    forced = add(one, wide, base=pipe, force=True)
    load_patch(pipe, forced)
    assert add(one, wide, force=True).base_fingerprint == {}


def test_wrong_input(pipe):
    patch = low_rank_patch(pipe)
    for weight in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(ErasureError, match="finite number"):
            merge([(patch, weight)])
    with pytest.raises(ErasureError, match="at least one"):
        merge([])
    with pytest.raises(ErasureError, match="pairs"):
        merge([patch])
    with pytest.raises(ErasureError, match="scaled by a finite number"):
        scale(patch, float("nan"))
    with pytest.raises(ErasureError, match="infinity"):
        merge([(patch, 1e38), (low_rank_patch(pipe, 2, size=1e5), 1e38)])
    path = patch.payload.names("unet")[0]
    other = dataclasses.replace(patch, payload=Delta({"unet": {path: torch.ones(2, 2)}}))
    with pytest.raises(ErasureError, match="for different architectures"):
        add(patch, other)


def test_on_glyph_the_base_is_found_by_its_name():
    base = Base.load("glyph", device="cpu")
    names = [name for name, _ in base.unet.named_parameters() if name.endswith("attn2.to_k.weight")]

    def constant(chosen):
        change = {name: torch.full_like(base.unet.get_parameter(name), 0.01) for name in chosen}
        fingerprints = {"unet": fingerprint(base.unet, chosen)}
        return Patch(Delta({"unet": change}), "random", [{"name": "cat"}], "glyph", fingerprints)

    total = add(constant(names[:2]), constant(names[1:3]))
    assert total.base_fingerprint["unet"] == fingerprint(base.unet, names[:3])


def test_overlaps_in_figures(pipe):
    one, other = low_rank_patch(pipe, 1), low_rank_patch(pipe, 2)
    (row,) = conflicts({"one": one, "other": other})
    a, b = (torch.cat([d.flatten() for d in patch.deltas("unet").values()]).double() for patch in (one, other))
    assert row.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-6)
    assert (row.a, row.b, row.component, row.layers) == ("one", "other", "unet", len(one.payload.names("unet")))
    assert row.share_a == row.share_b == 1.0 and not row.notable
    dense = dataclasses.replace(other, payload=Delta({"unet": other.deltas("unet")}))
    assert conflicts([one, dense])[0].cosine == pytest.approx(row.cosine, rel=1e-5)
    wide = low_rank_patch(pipe, 3, part="attn", components=BOTH)
    (overlap,) = conflicts([one, wide])
    assert overlap.share_a == 1.0 and 0 < overlap.share_b < 1
    assert (overlap.a, overlap.b) == ("van gogh", "van gogh-2")
    elsewhere = low_rank_patch(pipe, 1, part="resnets")
    assert conflicts([one, elsewhere]) == []
    parallel = conflicts([one, scale(one, 3.0)])[0]
    assert parallel.cosine == pytest.approx(1.0) and parallel.notable and "they add up" in parallel.text()
    assert conflicts([one, negate(one)])[0].cosine == pytest.approx(-1.0)
    assert conflicts([one, subtract(one, one)])[0].cosine == 0.0
    with pytest.raises(ErasureError, match="at least two"):
        conflicts([one])


def test_an_overlap_is_logged_and_not_raised(pipe, caplog):
    one, other = low_rank_patch(pipe, 1), low_rank_patch(pipe, 2)
    assert warn_of_overlap({"new": other}, {"one": one}) == [] and not caplog.records
    near = add(one, other)
    (row,) = warn_of_overlap({"new": near}, {"one": one, "text": low_rank_patch(pipe, components=("text_encoder",))})
    assert (
        row[0] > NOTABLE
        and row[1:] == ("one", "new", "unet")
        and "one and new both change" in caplog.text
        and "cosine +0." in caplog.text
    )
    assert isinstance(near.payload, LowRank)
