"""Reports with LPIPS, features of another network, reference images, and missing networks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

import erasure
from erasure.errors import ErasureError
from erasure.evaluation import evaluate
from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.kid_fid import frechet, kid
from erasure.evaluation.metrics.lpips import Lpips
from erasure.evaluation.metrics.set_distances import distances_to_reference
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.judging import Fixed, noise
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

SCHEMA = json.loads((Path(erasure.__file__).parent / "evaluation" / "report" / "report.schema.json").read_text())
ASKED = [("cat", "")] * 2 + [("cat", "synonym")] + [("dog", "")] * 9
ROWS = PromptSet(
    "tiny",
    [Prompt(f"r{i}", f"a {o}", i, None, {"object": o, "role": role}) for i, (o, role) in enumerate(ASKED)],
)
QUICK = {"prompts": ROWS, "judge": BrightnessJudge(), "whole": True, "steps": 1, "progress": False}


class Halves(Fixed):
    """A judge whose features are the brightness of the upper and of the lower half."""

    def features(self, images):
        pixels = np.stack([np.asarray(image.convert("L"), np.float64) / 255 for image in images])
        half = pixels.shape[1] // 2
        return np.stack([pixels[:, :half].mean((1, 2)), pixels[:, half:].mean((1, 2))], 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return a pipeline with a patch and the folder of its images, so that later runs only judge."""
    pipe, folder = tiny_pipeline(ErasedStableDiffusionPipeline), tmp_path_factory.mktemp("drawn")
    pipe.load_patch(delta_patch(pipe, size=0.5), name="p")
    evaluate(pipe, "cat", folder=folder, **QUICK)
    return pipe, folder


def pictures(folder, records):
    images = []
    for i in records:
        with Image.open(folder / "images" / f"r{i}.png") as image:
            images.append(image.convert("RGB"))
    return images


def test_lpips_is_in_the_report(drawn, squeeze):
    pipe, folder = drawn
    report = evaluate(pipe, "cat", folder=folder, lpips="squeeze", **QUICK)
    net = Lpips("squeeze")
    for name, records, better in (("kept", range(3, 12), False), ("target", range(2), True)):
        metric = report.metric(f"LPIPS_{name}")
        distances = net(pictures(folder / "patched", records), pictures(folder / "base", records))
        assert metric.value == pytest.approx(np.mean(distances), rel=1e-4) and metric.n == len(distances)
        assert metric.low <= metric.value <= metric.high and metric.value > 0
        assert metric.higher_is_better is better and "squeeze" in metric.meaning
        assert report.metric(f"LPIPS_{name}", "base").value == 0
    # What another seed alone changes, from the base's own pictures of "a dog".
    floor = report.metric("LPIPS_seeds")
    dogs = pictures(folder / "base", range(3, 12))
    assert floor.value == pytest.approx(np.mean(net(dogs[:-1], dogs[1:])), rel=1e-3) and floor.n == 8
    assert floor == report.metric("LPIPS_seeds", "base") and floor.value > 0
    assert not report.missing and "LPIPS_kept" in report.text()
    lines = [json.loads(line) for line in (folder / "patched" / "lpips.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {f"r{i}" for i in (0, 1, *range(3, 12))}
    kept = [line["lpips"] for line in lines if line["id"] not in ("r0", "r1")]
    assert report.metric("LPIPS_kept").value == pytest.approx(np.mean(kept))
    data = json.loads((folder / "report.json").read_text())
    assert data["provenance"]["distances"]["LPIPS"]["backbone"] == "squeeze"
    jsonschema.validate(data, SCHEMA)


def test_without_a_patch_lpips_is_0(squeeze, tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    metric = evaluate(pipe, "cat", folder=tmp_path, lpips="squeeze", **QUICK).metric("LPIPS_kept")
    assert (metric.value, metric.low, metric.high) == (0, 0, 0)


def test_missing_networks_are_reported_and_the_rest_is_measured(drawn, nothing):
    pipe, folder = drawn
    plain = evaluate(pipe, "cat", folder=folder, **QUICK)
    report = evaluate(pipe, "cat", folder=folder, lpips="alex", features="inception", **QUICK)
    dropped = {metric.name for metric in plain.rows["patched"]} - {metric.name for metric in report.rows["patched"]}
    # No other features take inception's place under the same name.
    assert dropped == {"KID"} and report.metric("UA") == plain.metric("UA")
    assert sorted(text.partition(":")[0] for text in report.missing) == ["inception", "lpips alex"]
    data = json.loads((folder / "report.json").read_text())
    jsonschema.validate(data, SCHEMA)
    assert data["missing"] == report.missing and data["provenance"]["distances"]["features"] == "none"
    page = (folder / "report.html").read_text()
    for name in ("alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05-6726825d.pth"):
        assert f"put {name}" in page and f"put {name}" in report.text()


def test_features_of_another_judge(drawn):
    pipe, folder = drawn
    report = evaluate(pipe, "cat", folder=folder, features=Halves("halves"), **QUICK)
    metric = report.metric("KID")
    assert "halves's features" in metric.meaning and metric.n == 9 and metric.meaning in report.text()
    plain = evaluate(pipe, "cat", folder=folder, **QUICK).metric("KID")
    assert metric.value != plain.value and "brightness's features" in plain.meaning
    assert report.metric("UA") is not None and report.provenance["judge"]["name"] == "brightness"
    assert report.provenance["distances"]["features"] == {"name": "halves", "version": "1"}
    assert report.metric("FD") is not None and not report.missing  # 2 features, 9 images


def test_too_few_images_for_the_frechet_distance_are_reported(drawn):
    pipe, folder = drawn
    report = evaluate(pipe, "cat", folder=folder, features=BrightnessJudge(), **QUICK)
    assert report.metric("FD") is None
    assert report.missing == ["FD over 16 features needs 34 kept images; this run has 9, so only KID is reported"]
    assert not evaluate(pipe, "cat", folder=folder, **QUICK).missing


def test_distances_to_reference_images(drawn, tmp_path):
    pipe, folder = drawn
    real = noise(11, 16)
    for i, image in enumerate(real):
        image.save(tmp_path / f"{i:02d}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    lender = Halves("halves")
    report = evaluate(pipe, "cat", folder=folder, features=lender, reference=tmp_path, **QUICK)
    for row in ("base", "patched"):
        features = lender.features(pictures(folder / row, range(3, 12)))
        for name, expected in (
            ("KID", 1000 * kid(features, lender.features(real))),
            ("FD", frechet(features, lender.features(real))),
        ):
            metric = report.metric(f"{name}_reference", row)
            assert metric.value == pytest.approx(expected) and metric.n == 9 and metric.low < expected < metric.high
    facts = report.provenance["distances"]["reference"]
    data = b"".join((tmp_path / f"{i:02d}.png").read_bytes() for i in range(11))
    assert facts == {"folder": tmp_path.name, "images": 11, "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "zz.png").write_bytes(b"half a picture")
    without_reference = evaluate(pipe, "cat", folder=folder, reference=tmp_path, **QUICK)
    assert (
        f"distances to {tmp_path.name}: zz.png cannot be read" in without_reference.missing[0]
        and without_reference.metric("UA") is not None
    )
    with pytest.raises(ErasureError, match="0 images .*at least 8"):
        evaluate(pipe, "cat", folder=folder, reference=tmp_path / "nowhere", **QUICK)


def test_the_interval_to_a_reference_has_the_right_width():
    draw = np.random.default_rng(4)
    wanted, target = draw.normal(size=(150, 6)), Target("object", ("cat",), None)
    record = Record("r", "a dog", 0, 1, 1.0, "", {"object": "dog"})

    def measured():
        rows = [JudgedImage(record, {}, None, features) for features in draw.normal(0.3, 1, size=(120, 6))]
        return distances_to_reference(rows, target, wanted, "some")

    runs = [measured() for _ in range(30)]
    for metrics in zip(*runs, strict=True):
        reach = np.mean([metric.high - metric.value for metric in metrics])
        assert reach == pytest.approx(1.96 * np.std([metric.value for metric in metrics], ddof=1), rel=0.4)
        assert [metric.name for metric in metrics[:1]] in (["KID_reference"], ["FD_reference"])


def test_misspelled_names_stop_the_run_before_drawing(tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    for options, message in (({"lpips": "alx"}, "did you mean 'alex'"), ({"features": "incption"}, "'inception'")):
        with pytest.raises(ErasureError, match=message):
            evaluate(pipe, "cat", folder=tmp_path / "out", **options, **QUICK)
    assert not (tmp_path / "out").exists()
