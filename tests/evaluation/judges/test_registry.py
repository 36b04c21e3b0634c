"""Properties of every judge, and judges built from texts."""

from __future__ import annotations

import pytest

from erasure.errors import ErasureError
from erasure.evaluation.judges import registry as judges
from erasure.evaluation.judges.classifier import ClassifierJudge
from erasure.evaluation.judges.clip import ClipJudge
from erasure.evaluation.judges.nudity import NudeNetJudge
from erasure.evaluation.judges.registry import find_judge
from tests.evaluation.judging import noise, nude


def test_images_of_any_mode_are_judged_as_rgb(vit, clip):
    images = noise(2)
    for judge in (ClassifierJudge(vit), ClipJudge(clip, labels="cat,dog"), NudeNetJudge()):
        for mode in ("RGBA", "L", "P"):
            converted = [image.convert(mode) for image in images]
            assert judge.judge(converted) == judge.judge([image.convert("RGB") for image in converted])


def test_judges_from_texts(vit, clip, tmp_path):
    from erasure.glyph.judge import GlyphJudge

    assert isinstance(find_judge("glyph"), GlyphJudge)
    assert find_judge("nudenet").threshold == 0.45
    for spec in ("nudenet:threshold=0.6&preset=eval-unlearn", "nudenet?preset=eval-unlearn&threshold=0.6"):
        judge = find_judge(spec)
        assert judge.threshold == 0.6 and judge.preset == "eval-unlearn" and len(judge.labels) == 6
    (tmp_path / "map.yaml").write_text("fish: tench\ncat: [tabby, 2]\n")
    judge = find_judge(f"classifier:{vit}?labels={tmp_path / 'map.yaml'}&closed=true&head=animal")
    assert judge.heads == {"animal": ["fish", "cat"]}
    judge = find_judge(f"clip:{clip}?labels=cat,dog&template=a drawing of {{}}")
    assert judge.heads == {"object": ["cat", "dog"]} and judge.templates == ["a drawing of {}"]
    (tmp_path / "nude.yaml").write_text("none: a person in clothes\nnudity: [a nude person, nudity]\n")
    both = find_judge(f"any(nudenet:threshold=0.3 + clip:{clip}?head=nudity&labels={tmp_path / 'nude.yaml'})")
    assert both.rule == "any" and both.shared == ["nudity"] and both.members["nudenet"].threshold == 0.3
    assert list(find_judge(f"glyph+nudenet+clip:{clip}").members) == ["glyph", "nudenet", "clip"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nudenett", "did you mean 'nudenet'.*Allowed: .*classifier.*KIND"),
        ("glyph+nudenett", "unknown judge 'nudenett'"),
        ("", "unknown judge ''"),
        ("nudenet:treshold=0.6", "did you mean 'threshold'"),
        ("nudenet:threshold=high", "threshold='high': expected float"),
        ("nudenet:0.6", "expected OPTION=VALUE, not '0.6'; options: preset, threshold, labels"),
        ("glyph:x=1", "unknown option of judge glyph"),
        ("clip", "clip:SOURCE"),
        ("clip?labels=a,b", "clip:SOURCE"),
        ("classifier:x?closed=maybe", "closed='maybe': expected bool"),
        ("any(glyph)", "at least two judges"),
        ("classifier:x.pth?labels=nothing.yaml", "allow_pth=true"),
    ],
)
def test_invalid_judge_texts(spec, message):
    with pytest.raises(ErasureError, match=message):
        find_judge(spec)


def test_judges_of_other_packages(monkeypatch):
    calls = []

    def make(source="default", *, strength: float = 1.0, **more):
        calls.append((source, strength, more))
        return nude("mine", 0.5)

    class Point:
        name = "mine"

        def load(self):
            return make

    points = lambda *, group: [Point()] if group == "erasure.judges" else []  # noqa: E731
    monkeypatch.setattr(judges, "entry_points", points)
    assert find_judge("mine:place?strength=2&other=x").name == "mine" and "mine" in judges.kinds()
    assert list(find_judge("glyph + mine").members) == ["glyph", "mine"]
    assert calls == [("place", 2.0, {"other": "x"}), ("default", 1.0, {})]
    with pytest.raises(ErasureError, match="mine"):
        find_judge("mini")


def test_naming_judges_needs_no_network_library():
    import subprocess
    import sys

    libraries = ("timm", "open_clip", "nudenet")
    code = (
        f"import sys, erasure.evaluation.judges as j; j.kinds(); sys.exit(any(m in sys.modules for m in {libraries}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
