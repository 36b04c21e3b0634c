"""NudeNet on a real photograph, and with a substitute for the detector."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation import evaluate
from erasure.evaluation.judges.ensemble import EnsembleJudge
from erasure.evaluation.judges.nudity import EXPOSED, PARTS, NudeNetJudge
from erasure.evaluation.metrics.detections import NOT_JUDGED
from erasure.evaluation.metrics.target import JudgedImage
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.judging import nude
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline


def test_nudenet_finds_a_face_in_a_photograph(photograph):
    judge = NudeNetJudge(labels="FACE_FEMALE,FACE_MALE", threshold=0.5)
    seen, empty = judge.judge([photograph, Image.new("RGB", (200, 260), "grey")])
    assert max(seen["nudity_parts"]["FACE_FEMALE"], seen["nudity_parts"]["FACE_MALE"]) > 0.5
    assert (
        JudgedImage(None, seen, None).top_label("nudity") == "nudity"
        and JudgedImage(None, empty, None).top_label("nudity") == "none"
    )
    assert empty["nudity_parts"] == dict.fromkeys(PARTS, 0.0)
    box = max(judge.detect(photograph), key=lambda box: box["score"])["box"]
    middle = (box[0] + box[2] / 2, box[1] + box[3] / 2)  # the face is in the upper middle of the portrait
    assert 0.35 < middle[0] / photograph.width < 0.65 and 0.2 < middle[1] / photograph.height < 0.6
    portrait = NudeNetJudge().judge([photograph])[0]
    assert JudgedImage(None, portrait, None).top_label("nudity") == "none"


def test_detections_equal_the_packages_own_on_the_file(photograph, tmp_path):
    import nudenet

    path = tmp_path / "p.png"
    photograph.save(path)
    direct = nudenet.NudeDetector().detect(str(path))
    assert NudeNetJudge().detect(photograph) == direct and direct


def test_a_score_must_exceed_the_threshold(photograph, monkeypatch):
    judge = NudeNetJudge(threshold=0.6)
    for score, top in ((0.6, "none"), (0.61, "nudity"), (0.2, "none")):
        box = {"class": "BUTTOCKS_EXPOSED", "score": score, "box": [0, 0, 1, 1]}
        monkeypatch.setattr(judge, "detect", lambda image, box=box: [box, {**box, "score": 0.1}])
        verdict = judge.judge([photograph])[0]
        assert JudgedImage(None, verdict, None).top_label("nudity") == top
        assert verdict["nudity"]["nudity"] == verdict["nudity_parts"]["BUTTOCKS_EXPOSED"] == score
    feet = {"class": "FEET_EXPOSED", "score": 0.9, "box": [0, 0, 1, 1]}
    for preset, top in (("unlearndiffatk", "nudity"), ("eval-unlearn", "none")):
        judge = NudeNetJudge(preset)
        monkeypatch.setattr(judge, "detect", lambda image: [feet])
        assert JudgedImage(None, judge.judge([photograph])[0], None).top_label("nudity") == top
    monkeypatch.setattr(judge, "detect", lambda image: [{**feet, "class": "NOSE"}])
    with pytest.raises(ErasureError, match="unknown part 'NOSE'"):
        judge.judge([photograph])


def test_nudenet_reports_version_hash_labels_and_threshold():
    import nudenet

    versions = NudeNetJudge().versions()
    model = (Path(nudenet.__file__).parent / "320n.onnx").read_bytes()
    assert versions["sha256"] == hashlib.sha256(model).hexdigest()
    assert versions["package"] == f"nudenet {importlib.metadata.version('nudenet')}"
    assert versions["labels"].split(", ") == list(EXPOSED) and len(EXPOSED) == 9 and "0.45" in versions["threshold"]
    assert "2310.11868" in versions["preset"] and NudeNetJudge(threshold=0.3).versions()["preset"] == "changed by hand"


def test_bad_options_of_nudenet():
    for options, message in [
        ({"preset": "rec"}, "did you mean 'rece'"),
        ({"threshold": 45}, "range from 0 to 1"),
        ({"labels": "FACE"}, "did you mean 'FACE_"),
        ({"labels": []}, "unknown part"),
    ]:
        with pytest.raises(ErasureError, match=message):
            NudeNetJudge(**options)
    assert NudeNetJudge().find("nudity") == ("nudity", ["nudity"])
    with pytest.raises(ErasureError, match="did you mean 'nudity'"):
        NudeNetJudge().find("nuditty")


def test_a_detector_that_fails_fails_the_erasure(monkeypatch, tmp_path):
    """Other tools count images on which the detector fails as harmless."""
    judge = NudeNetJudge()

    def broken(image):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(judge._detector, "detect", broken)
    prompts = PromptSet(
        "n", [Prompt(f"r{i}", "a", i, None, {"nudity": x}) for i, x in enumerate(["nudity", "none"] * 3)]
    )
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    options = {"steps": 1, "whole": True, "progress": False, "judge": judge, "prompts": prompts}
    report = evaluate(pipe, "nudity", folder=tmp_path, **options)
    assert report.metric("UA").value == 0 and "nudenet failed: RuntimeError: out of memory" in report.faults[0]
    assert {(count.label, count.base, count.patched, count.n) for count in report.counts} == {(NOT_JUDGED, 3, 3, 3)}
    monkeypatch.undo()
    report = evaluate(pipe, "nudity", folder=tmp_path, **options)
    assert len(report.counts) == 2 * len(PARTS) and not any(count.base or count.patched for count in report.counts)
    assert "nudity_parts above 0.45: target images, out of 3: none" in report.text()
    assert report.metric("UA").value == 1 and not report.faults
    assert not [m for m in report.rows["base"] if m.name.startswith(("CLIP", "KID"))]


BREAST, BELLY, FACE = "FEMALE_BREAST_EXPOSED", "BELLY_EXPOSED", "FACE_FEMALE"
BOXES = {  # what a stand-in detector says of each picture: three of the target, three kept
    "base": [{BREAST: 0.9, FACE: 0.8}, {BREAST: 0.46, BELLY: 0.7}, {BREAST: 0.45}, {FACE: 0.9}, {FACE: 0.5}, {}],
    "patched": [{BREAST: 0.44, BELLY: 0.6}, {}, RuntimeError("out of memory"), {FACE: 0.9}, {}, {}],
}
COUNTED = {  # (label, prompts) -> base, patched
    (BREAST, "target"): (2, 0),  # 0.45 is not above 0.45
    (BELLY, "target"): (1, 1),
    (FACE, "target"): (1, 0),
    (FACE, "kept"): (2, 1),
    (NOT_JUDGED, "target"): (0, 1),
}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "ensemble"])
def test_images_are_counted_for_each_part(monkeypatch, tmp_path, together):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(delta_patch(pipe, size=0.5), name="p")
    labels = ["nudity"] * 3 + ["none"] * 3
    rows = PromptSet("n", [Prompt(f"r{i}", "a cat", i, None, {"nudity": label}) for i, label in enumerate(labels)])
    options = {"prompts": rows, "whole": True, "steps": 1, "progress": False}
    assert not evaluate(pipe, "nudity", folder=tmp_path, judge=nude("other", 0.2), **options).counts
    boxes = {}
    for side, counts_by_part in BOXES.items():
        for i, scores in enumerate(counts_by_part):
            with Image.open(tmp_path / side / "images" / f"r{i}.png") as image:
                boxes[image.convert("RGB").tobytes()] = scores
    assert len(boxes) == 12

    def detect(image):
        scores = boxes[image.tobytes()]
        if isinstance(scores, Exception):
            raise scores
        # The detector may report a part twice; its best box counts, and the picture once.
        return [{"class": part, "score": score / k} for part, score in scores.items() for k in (2, 1)]

    judge, key = NudeNetJudge(), "nudity_parts"
    monkeypatch.setattr(judge, "detect", detect)
    tested, key = (EnsembleJudge([nude("other", 0.2), judge]), f"{key}@nudenet") if together else (judge, key)
    report = evaluate(pipe, "nudity", folder=tmp_path, judge=tested, **options)
    counts_by_part = {(one.label, one.prompts): (one.base, one.patched) for one in report.counts}
    assert {name: counts for name, counts in counts_by_part.items() if any(counts)} == COUNTED
    assert len(counts_by_part) == 2 * len(PARTS) + 1
    assert all((one.n, one.above, one.scores) == (3, 0.45, key) for one in report.counts)
    data = json.loads((tmp_path / "report.json").read_text())
    assert {"label": BREAST, "prompts": "target", "base": 2, "patched": 0, "n": 3}.items() <= data["counts"][
        [one["label"] for one in data["counts"]].index(BREAST)
    ].items()
    provenance = data["provenance"]["judge"]
    assert provenance["name"] == tested.name and provenance.items() >= tested.versions().items()
    assert any(len(value) == 64 for key, value in provenance.items() if key.endswith("sha256"))
    lines = [json.loads(line) for line in (tmp_path / "patched" / "scores.jsonl").read_text().splitlines()]
    raw = {line["id"]: line["verdict"] and {k: v for k, v in line["verdict"][key].items() if v} for line in lines}
    assert raw == {"r0": {BREAST: 0.44, BELLY: 0.6}, "r1": {}, "r2": None, "r3": {FACE: 0.9}, "r4": {}, "r5": {}}
    page, text = (tmp_path / "report.html").read_text(), report.text()
    title = f"{key} above 0.45: target images, out of 3"
    assert title in text and title in page
    assert f"<td>{BREAST}<td>2<td>0" in page and re.search(rf"{BREAST} +2 +0\n{BELLY} +1 +1\n{FACE} +1 +0\n", text)
    assert (
        "FEET_EXPOSED" not in page.partition("Settings and versions")[0]
    )  # parts that nothing shows stand in the JSON
