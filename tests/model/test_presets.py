"""Presets: the family of a checkpoint, its settings by kind of concept with their sources, and its sampling."""

from __future__ import annotations

import dataclasses
import inspect
import logging

import pytest

from erasure import config, methods
from erasure.concepts.concept import KINDS, Concept
from erasure.erasing import settle
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model import presets
from erasure.model.base import Base
from erasure.model.loading import sampling_of
from erasure.model.meta import parts_of
from erasure.model.presets import Family
from erasure.model.presets.preset import read_preset
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.tiny import tiny_pipeline

OWN = (
    "advunlearn",
    "doco",
    "eraseflow",
    "esd",
    "gem",
    "mace",
    "negmerge",
    "receler",
    "saeuron",
    "salun",
    "spm",
    "stereo",
    "unguide",
)
FAMILIES = ("sd1", "sd2", "sdxl")
BOTH_STAGES = {"stereo": 20_000}  # updates that leave some for the second stage
# What the kinds change on glyph; everything else there is the methods' default.
GLYPH = {
    ("esd", "style"): {"iterations": 200, "learning_rate": 1e-4, "trajectories": 12},
    ("unguide", "style"): {"decide_after": 2, "measure": "guidance"},
    ("advunlearn", "content"): {"layers": None, "retain_weight": 0.3},
}


def base(kind: str, name: str = "somewhere/mine") -> Base:
    return Base(name, parts_of(kind))


def of(name: str) -> Family:
    return Family(presets.find(name), "by its name")


def test_a_family_is_found_by_architecture_and_by_name():
    found = {kind: base(kind).family() for kind in ("sd1", "sd1-inpaint", "sd2", "sd2-v", "sdxl", "sdxl-v")}
    assert {kind: family.preset.name for kind, family in found.items()} == {
        "sd1": "sd1",
        "sd1-inpaint": "sd1",
        "sd2": "sd2",
        "sd2-v": "sd2",
        "sdxl": "sdxl",
        "sdxl-v": "sdxl",
    }
    assert not any(family.named for family in found.values()) and "width 768" in found["sd1"].why
    named = base("sd1", "CompVis/stable-diffusion-v1-4").family()
    assert named.preset.name == "sd1" and named.named
    assert base("sd1").family("sdxl").preset.name == "sdxl"
    assert Base("tiny", tiny_pipeline()).family().preset is None
    with pytest.raises(ErasureError, match="did you mean 'sdxl'"):
        base("sd1").family("sdxll")


def test_glyph_is_as_it_was():
    for method in OWN:
        for kind in KINDS:
            chosen = methods.choose(method, kind, {}, family=of("glyph")).method
            assert chosen == dataclasses.replace(methods.find(method)(), **GLYPH.get((method, kind), {}))
            assert chosen == methods.configure(method, kind)
    own = presets.find("glyph")
    assert (own.sampling.steps, own.sampling.guidance) == (25, 3.0) and own.counts_members
    assert (own.preview.steps, own.preview.guidance) == (20, 5.0)
    assert not any(own.wording(method, kind, "cat")[0] for method in OWN for kind in KINDS)


def test_settings_are_real_and_each_has_a_source():
    for name in presets.names():
        preset = presets.find(name)
        assert set(preset.groups) | set(preset.without) <= set(methods.names())
        for method, groups in preset.groups.items():
            for group in groups:
                config.build(methods.find(method), group.settings)
                assert len(group.source) >= 8 and set(group.kinds) <= set(KINDS)
                assert not group.prompts or all(text.count("{}") == (not group.names) for text in group.prompts)
        for method in set(OWN) - set(preset.without):
            for kind in (*KINDS, "mixed"):
                chosen = methods.choose(method, kind, {}, family=of(name))
                assert list(chosen.sources) == [field.name for field in config.fields_of(type(chosen.method))]
                assert all(chosen.sources.values())


def test_no_number_of_glyph_is_left_on_another_family():
    """Whatever is tuned on glyph is set; only switches that are off stay the methods' own."""
    for name in FAMILIES:
        for method in set(OWN) - set(presets.find(name).without):
            for kind in (*KINDS, "mixed"):
                chosen = methods.choose(method, kind, {}, family=of(name))
                own = inspect.get_annotations(
                    type(chosen.method)
                )  # not the options that every method has, switched off
                kept = {key for key, source in chosen.sources.items() if not source.startswith(f"preset {name}: ")}
                kept &= set(own)
                assert {getattr(chosen.method, key) for key in kept} <= {None, False, (), "never"}, (name, method, kept)


def test_the_kind_decides():
    def chosen(method, name):
        return settle(base("sd1"), name, method, {})

    assert chosen("esd", "Van Gogh").chosen.method.variant == "x"
    assert chosen("esd", "church").chosen.method.variant == chosen("esd", "nudity").chosen.method.variant == "u"
    spm = [chosen("spm", name).chosen.method for name in ("church", "nudity")]
    assert [(own.iterations, own.negative_guidance, own.anchor_weight) for own in spm] == [
        (3000, 1.0, 1000.0),
        (15_000, 3.0, 100.0),
    ]
    assert [chosen("advunlearn", name).chosen.method.layers for name in ("Van Gogh", "nudity")] == [1, None]
    assert [chosen("unguide", name).chosen.method.variant for name in ("cat", "nudity")] == ["x-strict", "linear"]


def test_published_numbers_on_sd1():
    esd, spm, salun, advunlearn, unguide = (
        settle(base("sd1"), "church", method, {}).chosen.method
        for method in ("esd", "spm", "salun", "advunlearn", "unguide")
    )
    assert (esd.iterations * esd.learning_rate, esd.iterations * esd.batch_size) == (0.01, 1000)
    assert (spm.learning_rate, spm.anchor_weight, spm.warm_up) == (1e-4, 1000.0, 500)
    assert salun.iterations * salun.batch_size == 5 * salun.forget_count and salun.sample_guidance == 7.5
    assert (advunlearn.learning_rate, advunlearn.attack_steps, advunlearn.iterations) == (1e-5, 30, 1000)
    assert (unguide.learning_rate, unguide.trajectory_guidance) == (3e-5, 9.0)
    assert (unguide.decide_after, unguide.decide_steps, unguide.decide_guidance) == (10, 50, 7.5)
    xl = settle(base("sdxl"), "church", "esd", {}).chosen.method
    assert (xl.variant, xl.learning_rate, xl.negative_guidance, xl.weight_rounding) == ("x-strict", 2e-4, 0.0, "bf16")


def test_what_the_user_sets_wins_and_says_so():
    layers = {"the file of --config": {"iterations": 7, "variant": "full"}, "given": {"iterations": 9}}
    chosen = settle(base("sd1"), "church", "esd", layers).chosen
    assert (chosen.method.iterations, chosen.method.variant, chosen.method.learning_rate) == (9, "full", 1e-5)
    assert chosen.sources["iterations"] == "given" and chosen.sources["variant"] == "the file of --config"
    assert chosen.sources["learning_rate"].startswith("preset sd1: paper")
    anchored = settle(base("sd1"), {"name": "cat", "anchor": "a fox", "kind": "object"}, "unguide", {})
    assert anchored.concepts[0].prompt_pairs() == [("a photo of the cat", "a fox")]


def test_a_run_tells_where_each_setting_came_from(caplog):
    settled = settle(base("sd1"), "Van Gogh", "esd", {"given": {"iterations": 9}})
    lines = settled.lines()
    text = "\n".join(lines)
    assert "esd for somewhere/mine: preset sd1 (by its architecture" in lines[0]
    assert "'Van Gogh' is erased as a style" in lines[1] and "iterations=9: given" in lines
    for key in settled.chosen.sources:
        assert f"{key}=" in text
    with caplog.at_level(logging.INFO, "erasure"):
        settled.log()
    assert [record.message for record in caplog.records if record.levelname == "INFO"] == lines
    assert any("no checkpoint that a preset names" in r.message for r in caplog.records if r.levelname == "WARNING")


def test_concepts_together_and_members():
    both = settle(base("sd1"), ["cat", "dog"], "esd", {})
    assert both.chosen.method.iterations == 2000 and both.chosen.sources["iterations"].endswith(
        "times 2 for as many concepts"
    )
    assert settle(base("sd1"), "nudity", "spm", {}).chosen.method.iterations == 15_000  # four words for one thing
    glyph = Base("glyph", tiny_pipeline())
    assert settle(glyph, "weapon", "spm", {}).chosen.method.iterations == 500  # five things


@pytest.mark.parametrize("method", methods.names(GradientMethod))
def test_each_of_several_concepts_gets_as_many_updates_as_one(method):
    one = settle(base("sd1"), ["cat"], method, {}).chosen.method.iterations
    assert settle(base("sd1"), ["cat", "dog", "cow"], method, {}).chosen.method.iterations == 3 * one
    count = BOTH_STAGES.get(method, 77)
    given = settle(base("sd1"), ["cat", "dog"], method, {"given": {"iterations": count}})
    assert given.chosen.method.iterations == count


@pytest.mark.parametrize("method", sorted(set(OWN) & set(methods.names(GradientMethod))))
def test_no_family_needs_settings_or_a_preset(method):
    tiny, count = Base("tiny", tiny_pipeline()), BOTH_STAGES.get(method, 4)
    with pytest.raises(
        ErasureError, match="no settings for this checkpoint.*--preset.*sd1.*learning_rate.*Nothing was"
    ):
        settle(tiny, "cat", method, {"given": {"iterations": count}})
    own = settle(tiny, "cat", method, {"given": {"iterations": count, "learning_rate": 1e-3}}).chosen
    assert own.sources.get("measure_every", "the method's default") == "the method's default"
    assert settle(tiny, "cat", method, {}, preset="sd1").chosen.method.learning_rate <= 1e-3
    if methods.find(method).PARITY:
        settled = settle(tiny, "cat", method, {"given": {"parity": True}})
        own = methods.find(method).PARITY
        assert all(settled.chosen.sources[key].startswith("parity") for key in own)


def test_prompts_and_anchors_of_the_published_scripts():
    def pairs(method, concept):
        return settle(base("sd1"), concept, method, {}).concepts[0].prompt_pairs()

    for method in ("esd", "spm", "advunlearn"):
        assert pairs(method, "Van Gogh") == [("Van Gogh", "")]
    assert pairs("unguide", "Cat") == [("a photo of the Cat", "a photo of the forest")]
    clothed = [("a photo of a nude person", "a photo of a person wearing clothes")]
    assert pairs("salun", "nudity") == pairs("unguide", "nudity") == clothed
    assert pairs("salun", "cat") == [("an image of a cat", "")]  # the method finds the nearest word
    assert ("esd", pairs("esd", "nudity")) == ("esd", [(word, "") for word in ("nudity", "naked", "erotic", "sexual")])


def test_a_method_that_does_not_suit_a_family_says_why():
    sources = settle(base("sdxl"), "cat", "advunlearn", {}).chosen.sources
    assert "the other would still encode" in sources["iterations"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methods: {esd: [{set: {rank: 1}}]}", "no source"),
        ("methods: {esd: [{set: {rank: 1}, source: ' '}]}", "no source"),
        ("methods: {esd: [{sett: {rank: 1}, source: paper}]}", "did you mean 'set'"),
        ("methods: {esd: [{set: {rank: 1}, names: [cat], source: paper}]}", "prompts and anchors, not settings"),
        ("method: {}", "did you mean 'methods'"),
        ("sampling: {steps: 3, guidance: 2}", "steps, guidance and source"),
        ("sampling: {steps: 3, guidance: 2, scheduler: ddim, source: paper}", "the user's choice"),
        ("like: x", "in a circle: x -> x"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, text, says):
    sampled = "{steps: 3, guidance: 2, source: paper}"
    whole = f"about: test\nsampling: {sampled}\npreview: {sampled}\n"
    kept = "\n".join(line for line in whole.splitlines() if not text.startswith(line.split(":")[0] + ":"))
    (tmp_path / "x.yaml").write_text(f"{kept}\n{text}\n")
    with pytest.raises(ErasureError, match=says):
        read_preset(tmp_path, "x")


def test_a_file_can_be_like_another(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "about: a\nsampling: {steps: 3, guidance: 2, source: paper}\npreview: {steps: 3, guidance: 2, source: paper}\n"
        "methods: {esd: [{set: {rank: 1, variant: u}, source: paper}], spm: [{set: {rank: 2}, source: script}]}\n"
    )
    (tmp_path / "b.yaml").write_text(
        "about: b\nlike: a\nwithout: {spm: too wide}\nmethods: {esd: [{set: {rank: 4}, source: derived}]}\n"
    )
    preset = read_preset(tmp_path, "b")
    assert preset.settings("esd", "style") == {"rank": (4, "derived"), "variant": ("u", "as a: paper")}
    assert not preset.settings("spm", "style") and preset.sampling.steps == 3


def test_sampling_is_the_familys():
    expected = {"sd1": (50, 7.5), "sd2": (50, 7.5), "sdxl": (50, 5.0)}
    for kind, values in expected.items():
        own = sampling_of(parts_of(kind))
        assert (own.steps, own.guidance) == values and own.source.startswith(f"preset {kind}: ")
    for cls in (None, ErasedStableDiffusionPipeline):  # of no family: what diffusers' class does
        tiny = sampling_of(tiny_pipeline(cls))
        assert (tiny.steps, tiny.guidance, tiny.source) == (50, 7.5, "defaults of StableDiffusionPipeline")
    assert (sampling_of(tiny_pipeline(), guidance=2.0).guidance, sampling_of(parts_of("sd1"), steps=3).steps) == (
        2.0,
        3,
    )
    with pytest.raises(ErasureError, match="give steps and guidance"):
        sampling_of(object())


def test_the_header_of_a_patch_gains_prompts_only_where_a_preset_sets_them():
    plain = Concept("cat")
    assert list(plain.to_json()) == ["name", "aliases", "anchor", "keep", "kind"]
    worded = dataclasses.replace(plain, prompts=("a photo of {}",))
    assert worded.to_json()["prompts"] == ["a photo of {}"] and Concept.of(worded.to_json()) == worded
