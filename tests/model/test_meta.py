"""The modules and weights that variants train, counted on the real architectures without weights."""

from __future__ import annotations

import pytest
from torch import nn

from erasure.errors import ErasureError
from erasure.model.meta import counts, load_meta
from tests.tiny import write_tiny

# Measured in the published code (ESD, SPM and UnGuide): modules, millions of weights, numbers of rank-1 terms.
PUBLISHED = [
    ("sd1", "x", 64, 43.96, None),
    ("sd2", "x", 64, 50.35, None),
    ("sdxl", "x", 280, 545.67, None),
    ("sd1", "x-strict", 32, 19.17, 49_536),  # UnGuide's objects
    ("sd2", "x-strict", 32, 25.56, None),
    ("sdxl", "x-strict", 140, 340.79, None),
    ("sd1", "selfattn", 64, 49.57, None),
    ("sd1", "u", None, 815.36, None),
    ("sd1", "linear", 118, None, 322_880),  # UnGuide's content
    ("sd1", "transformer", 192, None, 423_936),  # SPM
    ("sd2", "transformer", 192, None, 432_128),
    ("sdxl", "transformer", 722, None, 2_659_840),
]
TOTALS = {"sd1": 859.52, "sd2": 865.91, "sd2-v": 865.91, "sdxl": 2567.46}


@pytest.fixture(scope="module")
def bases():
    return {kind: load_meta(kind) for kind in TOTALS}


@pytest.fixture(scope="module")
def counted(bases):
    return {kind: counts(base) for kind, base in bases.items()}


@pytest.mark.parametrize(("kind", "variant", "modules", "millions", "rank_1"), PUBLISHED)
def test_counts_are_the_published_ones(counted, kind, variant, modules, millions, rank_1):
    row = counted[kind][variant]
    assert modules in (None, row["modules"])
    assert millions in (None, round(row["weights"] / 1e6, 2))
    assert rank_1 in (None, row["rank_1"])


def test_the_unets_are_the_real_ones(bases):
    for kind, millions in TOTALS.items():
        assert round(sum(p.numel() for p in bases[kind].unet.parameters()) / 1e6, 2) == millions
    one, two = bases["sd2"].unet, bases["sd2-v"].unet
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in two.named_parameters()}
    assert (one.config.sample_size, two.config.sample_size) == (64, 96)


def test_where_our_variants_differ_from_the_published(bases):
    """Record the differences, so that nobody assumes that the numbers agree.

    Old ESD's `noxattn` also trains norms and leaves out the time embedding and the last layers; ours (as the newer
    script on Stable Diffusion 1) trains Linear and Conv2d alone, these included. On XL the newer script trains only
    modules whose name has `block` and not `emb`; ours has no such rule.
    """
    old = [
        p.numel()
        for name, p in bases["sd1"].unet.named_parameters()
        if "attn2" not in name and not name.startswith(("time_embedding", "conv_out", "conv_norm_out"))
    ]
    assert round(sum(old) / 1e6, 2) == 813.50
    ours = bases["sdxl"].targets("u")
    theirs = {path for path in ours if "block" in path and "emb" not in path}
    extra = {path.split(".")[0] for path in set(ours) - theirs if not path.endswith("time_emb_proj")}
    assert extra == {"conv_in", "conv_out", "time_embedding", "add_embedding"}
    assert sum(path.endswith("time_emb_proj") for path in ours) == 17 and len(ours) - len(theirs) == 17 + 6


def test_no_norm_and_no_embedding_is_ever_a_target(bases):
    for base in bases.values():
        modules = base.targets("full")
        assert all(isinstance(module, nn.Linear | nn.Conv2d) for module in modules.values())
        assert not any("norm" in path for path in modules)


def test_folders_and_unknown_models(tmp_path):
    folder = write_tiny(tmp_path / "tiny")
    assert counts(load_meta(folder))["x"]["modules"] == 16
    (folder / "unet" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ErasureError, match="FluxTransformer2DModel"):
        load_meta(folder)
    with pytest.raises(ErasureError, match="unknown model 'sd9'"):
        load_meta("sd9")
