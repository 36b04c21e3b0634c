"""Round trips through every format, and the files that each must refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from erasure.errors import ErasureError
from erasure.formats import FORMATS, export_patch, import_patch, rows
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch
from erasure.pipelines import load_patch
from tests.formats.making import close, refused
from tests.patch.making import delta_patch, low_rank_patch, patch_of, same, weights
from tests.tiny import tiny_pipeline

BOTH = ("unet", "text_encoder")


def mixed(pipe) -> Patch:
    """Return a patch of weights, biases and norms of both components."""
    unet = delta_patch(pipe, part="mid_block").payload.changes["unet"]
    text = delta_patch(pipe, component="text_encoder", part="layers.1").payload.changes["text_encoder"]
    norms = delta_patch(pipe, part="conv_norm_out").payload.changes["unet"]
    return patch_of(pipe, Delta({"unet": {**unet, **norms}, "text_encoder": text}))


def written(pipe, form: str) -> Patch:
    """Return a patch that the format can hold."""
    if form == "spm":
        return low_rank_patch(pipe, part="attentions")
    if FORMATS[form].factors:
        return low_rank_patch(pipe, components=BOTH, part="")
    if form == "unet":
        return delta_patch(pipe, part="attn")
    if form == "text-encoder":
        return delta_patch(pipe, component="text_encoder", part="layers.0")
    return mixed(pipe)


@pytest.mark.parametrize("form", [row["format"] for row in rows() if row["writes"]])
def test_exported_and_imported_again(pipe, base, tmp_path, form):
    patch, before = written(pipe, form), weights(pipe)
    exported = export_patch(patch, tmp_path / "file.safetensors", form, base)
    assert exported.format == form and exported.error is None
    imported = import_patch(exported.path, "auto", base)
    assert imported.config == {"imported": "file.safetensors", "format": form}
    assert close(patch, imported)
    assert same(weights(pipe), before)
    if imported.gate["kind"] == "always":
        load_patch(tiny_pipeline(), imported)  # its fingerprint must match the base


def test_layers_of_different_ranks_and_alphas(pipe, base, tmp_path):
    layers = dict(low_rank_patch(pipe, rank=4, alpha=1.5).payload.layers["unet"])
    first = next(iter(layers))
    layers[first] = tuple(low_rank_patch(pipe, rank=1, alpha=7.0).payload.layers["unet"][first])
    patch = patch_of(pipe, LowRank({"unet": layers}))
    for form in ("peft", "kohya"):
        assert close(patch, import_patch(export_patch(patch, tmp_path / form, form).path, form, base))


def test_differences_are_approximated_at_a_rank_and_the_error_is_returned(pipe, base, tmp_path):
    exact = low_rank_patch(pipe, rank=2, part="mid_block")
    whole = patch_of(pipe, Delta({"unet": exact.deltas("unet")}))
    for form in ("kohya", "peft"):
        exported = export_patch(whole, tmp_path / form, form, rank=2)
        assert (
            exported.error < 1e-5
            and not any("ignore" in note for note in exported.notes)
            and close(exact, import_patch(exported.path, form, base), 1e-5)
        )
    # A rank above that of a layer keeps all of the layer, at the same scale.
    exported = export_patch(whole, tmp_path / "more", "kohya", rank=64)
    assert exported.error < 1e-5 and close(exact, import_patch(exported.path, "kohya", base), 1e-5)
    exported = export_patch(whole, tmp_path / "one", "kohya", rank=1)
    imported = import_patch(exported.path, "kohya", base).deltas("unet")
    lost = sum(float((imported[name] - change).square().sum()) for name, change in whole.deltas("unet").items())
    total = sum(float(change.square().sum()) for change in whole.deltas("unet").values())
    assert exported.error == pytest.approx((lost / total) ** 0.5, rel=1e-4) and 0.1 < exported.error < 1
    # The result is of rank 1 and nearer to the change than zeros are.
    name, change = next(iter(whole.deltas("unet").items()))
    assert torch.linalg.svdvals(imported[name].flatten(1))[1:].max() < 1e-4 * imported[name].abs().max()
    assert (imported[name] - change).norm() <= change.norm()


def test_what_low_rank_cannot_hold_counts_as_lost(pipe, tmp_path):
    changes = {"conv_out.bias": torch.ones(4), "conv_in.weight": torch.zeros(8, 4, 3, 3)}
    biases = patch_of(pipe, Delta({"unet": changes}))
    with pytest.raises(ErasureError, match="a LoRA cannot hold it"):
        export_patch(biases, tmp_path / "x", "kohya", rank=1)
    weight = torch.zeros(8, 4, 3, 3)
    weight[0, 0, 0, 0] = 2.0
    both = patch_of(pipe, Delta({"unet": {"conv_out.bias": torch.ones(4), "conv_in.weight": weight}}))
    assert export_patch(both, tmp_path / "x", "kohya", rank=1).error == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("kohya", {}, "kohya needs a low-rank patch, .*--rank R"),
        ("spm", {"rank": 2}, "needs a term on every layer"),
        ("diff", {"rank": 2}, "is for low-rank formats, and diff holds differences"),
        ("kohya", {"rank": 0}, "at least 1"),
        ("text-encoder", {}, "holds changes of the text_encoder alone"),
        ("unguide", {}, "can only be read: its files are pickles"),
        ("pfet", {}, "did you mean 'peft'"),
        ("unet", {}, "unknown model 'tiny'"),
        ("unet", {"model": ""}, "does not record the base"),
    ],
)
def test_exports_that_are_refused(pipe, tmp_path, form, options, message):
    with pytest.raises(ErasureError, match=message):
        export_patch(delta_patch(pipe), tmp_path / "x.safetensors", form, **options)
    assert not list(tmp_path.iterdir())


def test_weights_are_written_onto_their_own_base_unless_forced(pipe, tmp_path):
    patch, other = delta_patch(pipe), tiny_pipeline(seed=1)
    before = weights(other)
    for form in ("unet", "checkpoint"):
        with pytest.raises(ErasureError, match="was made from tiny"):
            export_patch(patch, tmp_path / form, form, other)
        assert not list(tmp_path.iterdir()) and same(weights(other), before)
    exported = export_patch(patch, tmp_path / "forced", "unet", other, force=True)
    assert close(patch, import_patch(exported.path, "unet", Base.of(other)), 1e-5)
    with pytest.raises(ErasureError, match="low rank already"):
        export_patch(low_rank_patch(pipe), tmp_path / "x", "kohya", rank=1)


def test_a_note_reports_that_the_gate_is_left_out(pipe, tmp_path):
    patch = low_rank_patch(pipe, gate={"kind": "text"}, part="attentions")
    for form in ("kohya", "peft", "diff"):
        notes = export_patch(patch, tmp_path / form, form).notes
        assert "the text gate is left out, so the patch acts on every prompt" in notes, form
    assert not any("the text gate" in note for note in export_patch(patch, tmp_path / "spm", "spm").notes)


def test_an_existing_folder_is_never_overwritten(pipe, base, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("")
    with pytest.raises(ErasureError, match="already exists"):
        export_patch(delta_patch(pipe), tmp_path / "there", "checkpoint", base)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("form", ["kohya", "peft", "diff"])
def test_damaged_and_foreign_files(pipe, base, tmp_path, form):
    """The message names the tensor at fault (half a pair, an unknown layer, another width) and counts what fits."""
    patch = low_rank_patch(pipe, part="attn2.to_k")
    tensors = load_file(export_patch(patch, tmp_path / "good.safetensors", form).path)
    count = len(patch.payload.names("unet"))
    key = next(key for key in sorted(tensors) if not key.endswith(".alpha"))
    stem = {"kohya": "lora_unet_nowhere", "peft": "unet.nowhere", "diff": "lora_unet_nowhere"}[form]
    ends = {"kohya": (".lora_down.weight", ".lora_up.weight"), "peft": (".lora_A.weight", ".lora_B.weight")}
    stranger = {stem + end: torch.ones(1, 1) for end in ends.get(form, (".diff",))}
    cases = {
        "stranger": ({**tensors, **stranger}, rf"{count} of {count + 1} layers fit .*nowhere.* matches no layer"),
        "alien": (stranger, "0 of 1 layers fit"),
        "odd": ({**tensors, "unet.bundle": torch.ones(1)}, "unet.bundle"),
        "empty": ({}, "none of|0 of 0"),
    }
    if form != "diff":
        cases["half"] = ({k: v for k, v in tensors.items() if k != key}, "lacks its")
    wide = {k: (torch.ones(v.shape[0], v.shape[1] + 1) if k == key else v) for k, v in tensors.items()}
    if form == "diff":
        cases["wide"] = (wide, rf"{count - 1} of {count} layers fit .*in the file and")
    refused(cases, tmp_path, base, form)


def test_concepts_and_methods_of_imported_files(pipe, base, tmp_path):
    patch = delta_patch(pipe)
    path = export_patch(patch, tmp_path / "esd-Van_Gogh-from-Van_Gogh-esdx.safetensors", "esd", base).path
    assert import_patch(path, model=base).names == ["Van Gogh"]
    imported = import_patch(path, "uce", base, concepts=["cat", "dog"])
    assert imported.method == "uce" and imported.names == ["cat", "dog"]
    assert import_patch(path, model=base).method == "esd"


def test_a_patch_is_not_a_published_file(pipe, base, tmp_path):
    gated = low_rank_patch(pipe, gate={"kind": "text"})
    path = gated.save(tmp_path / "p.safetensors")
    with pytest.raises(ErasureError, match="a patch already"):
        import_patch(path, model=base)
    assert import_patch(path, "kohya", base).gate == {"kind": "always"}
