"""SAeUron's scores, tables and change against independent derivations, and wrong twins that must differ."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods.saeuron import SAeUron, default_block, marks_of, rows, scores, tables
from erasure.patch.features import TENSORS
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.features import switched
from erasure.training.feature_dictionary import Dictionary
from erasure.training.sparse_autoencoder import SparseAutoencoder
from tests.conformance.quick import small
from tests.tiny import latents, tiny_pipeline


def test_the_scores_number_by_number():
    own, others = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
    found = scores(own, others)
    assert found[0].tolist() == pytest.approx([3 / 4 - 1 / 4, 1 / 4 - 1 / 4, 0 - 2 / 4], abs=1e-6)
    assert found[1].tolist() == pytest.approx([-0.5, 0, -0.5], abs=1e-6)


def test_the_tables_number_by_number():
    others = torch.tensor([[[1.0, 1.0, 1.0, 1.0]], [[1.0, 3.0, 1.0, 1.0]]])  # two words, one timestep
    own = torch.tensor([[8.0, 0.0, 3.0, 0.0]])
    limits, gains = tables([own], others, 1, -2.0)
    assert limits.tolist() == [pytest.approx([10 / 3, 4 / 3, 5 / 3, 2 / 3])]  # over all words, the concept included
    assert gains.tolist() == [[-2.0 * 8 - 1, 0, 0, 0]]
    _, gains = tables([own], others, 4, -2.0)
    assert gains.tolist() == [[-17.0, 0, -7.0, 0]]  # features that are no more active than for others are left alone
    second = torch.tensor([[4.0, 0.0, 0.0, 8.0]])
    _, both = tables([own, second], others, 2, -1.0)
    assert both.tolist() == [[-9.0, 0, -4.0, -9.0]]  # the lower gain of the first feature, which both choose


def dictionary() -> Dictionary:
    draw = torch.Generator().manual_seed(4)
    model = SparseAutoencoder(6, 10, draw)
    for param in (model.bias, model.centre, model.encoder):
        param.data += 0.3 * torch.randn(param.shape, generator=draw)
    model.requires_grad_(False)
    model.scale, model.threshold = 0.7, 0.2
    means = torch.rand(3, 2, 10, generator=draw)
    return Dictionary(model, (("object", "dog"), ("object", "car"), ("", "")), (501.0, 1.0), means, {"active": 2.0})


def test_the_rows_do_what_the_whole_autoencoder_would_do():
    """x + (reconstruction with the features scaled - reconstruction), with all features, as equation 5 has it."""
    found, draw = dictionary(), torch.Generator().manual_seed(5)
    own = found.means[0] + torch.rand(2, 10, generator=draw)
    limits, gains = tables([own], found.means[1:], 3, -1.5)
    index = gains.ne(0).any(0).nonzero().flatten()
    payload = rows(found, "unet", "block", {"block.weight": [1]}, index, limits, gains)
    assert payload.count == len(index) < 10 and payload.about["features"] == index.tolist()
    outputs, model = 2 * torch.randn(2, 4, 4, 6, generator=draw), found.model
    change, _ = switched(outputs, {name: getattr(payload, name) for name in TENSORS}, torch.tensor([0, 1]))
    touched = 0
    for t in range(2):
        x = outputs[t].flatten(0, 1)
        z = model.features(x)
        less = z.clone()
        for i in index.tolist():
            if gains[t, i] == 0:
                continue
            over = z[:, i] > limits[t, i]
            less[over, i] = z[over, i] * (-1.5 * own[t, i])
            touched += int(over.sum())
        wanted = x + (model.decode(less) - model.decode(z)) / model.scale
        assert torch.allclose(outputs[t] + change[t], wanted.view_as(outputs[t]), atol=1e-5)
        published = 2 * model.decode(less) / model.scale - x  # with the error's sign wrong
        assert not torch.allclose(published, wanted, atol=0.1)
    assert touched > 4


def test_a_patch_is_small_and_its_features_are_less_active_while_drawing(monkeypatch, tmp_path):
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    pipe, settings = tiny_pipeline(ErasedStableDiffusionPipeline), {**small("saeuron"), "cache": True}
    first = erase(pipe, "cat", "saeuron", progress=False, **settings)
    second = erase(pipe, "dog", "saeuron", progress=False, **settings)
    concept = settings["concept_trajectories"] * 2 * settings["sample_steps"]
    assert second.costs["F"] == concept < first.costs["F"]  # the autoencoder is the cache's
    alone = erase(pipe, "dog", "saeuron", progress=False, **small("saeuron"))
    assert alone.payload.digest == second.payload.digest and alone.costs["F"] == first.costs["F"]
    width, total = first.payload.encoder.shape[1], first.payload.about["of"]
    assert total == 4 * width and first.payload.count <= settings["features"] * settings["sample_steps"] < total
    assert first.base_fingerprint["unet"] and first.config["multiplier"] == -10.0
    base = latents(pipe, ["a cat"])
    pipe.load_patch(first, name="cat")
    pipe.load_patch(second, name="dog")
    assert not torch.equal(latents(pipe, ["a cat"]), base)
    pipe.unload_patches()
    assert torch.equal(latents(pipe, ["a cat"]), base)


def test_the_gate_reads_the_names():
    settings = {**small("saeuron"), "gate": "text", "gate_threshold": 0.999}
    patch = erase(tiny_pipeline(), {"name": "cat", "aliases": ["car"]}, "saeuron", progress=False, **settings)
    assert patch.gate == {"kind": "text", "texts": ["cat", "car"], "power": 0.0, "threshold": 0.999}


def test_what_is_erased_is_not_among_the_others(monkeypatch):
    from erasure.methods import saeuron

    seen = []
    real = saeuron.tables
    monkeypatch.setattr(saeuron, "tables", lambda own, others, *rest: seen.append(others) or real(own, others, *rest))
    made = dictionary()
    kept = [("object", "dog"), ("object", "car")]
    monkeypatch.setattr(saeuron, "dictionary_of", lambda *_: made)
    monkeypatch.setattr(saeuron, "retained", lambda base, concepts: kept[len(concepts) - 1 :])
    monkeypatch.setattr(saeuron, "mean_features", lambda model, outputs: made.means[0] + 1)
    monkeypatch.setattr(saeuron, "rows", lambda *_: None)
    from erasure.model.base import Base
    from erasure.training.run import Run

    base, method = Base("tiny", tiny_pipeline()), SAeUron(**small("saeuron"))
    for concepts in ([Concept("cat")], [Concept("cat"), Concept("dog")]):
        method.chosen(base, concepts, Run(progress=False))
    assert [len(others) for others in seen] == [3, 2] and torch.equal(seen[1], made.means[1:])
    kept.clear()
    made.means[2] = made.means[0]
    monkeypatch.setattr(saeuron, "mean_features", lambda model, outputs: 0 * made.means[0])
    with pytest.raises(ErasureError, match="no feature of .* is more active for 'cat'"):
        method.chosen(base, [Concept("cat")], Run(progress=False))


def test_the_block_of_the_paper_and_blocks_that_are_none():
    from tests.tiny import shrunk_pipeline

    unet = shrunk_pipeline().unet
    assert default_block(unet) == "up_blocks.1.attentions.1"  # the paper's, for objects
    assert marks_of(unet, default_block(unet))["up_blocks.1.attentions.1.proj_out.weight"] == [128, 128, 1, 1]
    with pytest.raises(ErasureError, match="block=up_blocks.9: this is no block"):
        erase(tiny_pipeline(), "cat", "saeuron", progress=False, **{**small("saeuron"), "block": "up_blocks.9"})
    with pytest.raises(ErasureError, match="no block with cross-attention"):
        erase(tiny_pipeline(), "cat", "saeuron", progress=False, **{**small("saeuron"), "block": "mid_block.resnets.0"})
