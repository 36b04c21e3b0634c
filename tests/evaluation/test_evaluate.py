"""Generation and evaluation with a tiny real pipeline and a judge that depends on brightness."""

from __future__ import annotations

import importlib
import json
import re
import weakref
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation import evaluate, score
from erasure.evaluation.generate import Record, generate
from erasure.evaluation.metrics.accuracy import harmonic_mean
from erasure.evaluation.metrics.kid_fid import kid, paired_kid
from erasure.evaluation.metrics.measure import measure
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

ROWS = PromptSet(
    "tiny",
    [Prompt(f"r{i}", f"a {o}", i, None, {"object": o, "style": "flat"}) for i, o in enumerate(["cat", "dog"] * 4)],
)
QUICK = {"steps": 2, "batch_size": 4, "progress": False}


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def pictures(folder):
    images = {}
    for path in sorted((folder / "images").glob("*.png")):
        with Image.open(path) as image:
            images[path.stem] = np.asarray(image).astype(int)
    return images


def test_an_image_does_not_depend_on_the_batch_size(pipe, tmp_path):
    for size in (1, 3):
        generate(pipe, ROWS, tmp_path / str(size), steps=2, batch_size=size, progress=False)
    singly, by_threes = pictures(tmp_path / "1"), pictures(tmp_path / "3")
    assert singly.keys() == by_threes.keys() and len(singly) == 8
    assert all((singly[key] == by_threes[key]).all() for key in singly)
    assert np.abs(singly["r0"] - singly["r2"]).max() > 1


def test_a_killed_run_draws_only_the_missing_images(pipe, tmp_path):
    drawn = []

    class Killed(type(pipe)):
        def __call__(self, *args, **kwargs):
            drawn.append(len(kwargs["prompt"]))
            if len(drawn) == 3:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    killed = tiny_pipeline(Killed)
    rows = PromptSet("twelve", [*ROWS.rows, *(Prompt(f"s{i}", "a cat", i) for i in range(4))])
    with pytest.raises(KeyboardInterrupt):
        generate(killed, rows, tmp_path, steps=2, progress=False)
    (tmp_path / "images" / "r1.png").write_bytes(b"half")  # and one picture is half-written
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"id": "r7", "pro')
    assert len(generate(killed, rows, tmp_path, steps=2, progress=False)) == 12
    assert drawn[3:] == [4, 4]  # r1 and the last four, filled up
    drawn.clear()
    generate(killed, rows, tmp_path, steps=2, progress=False)
    assert not drawn


def test_images_of_other_settings_are_not_mixed(pipe, tmp_path):
    generate(pipe, ROWS, tmp_path, steps=2, progress=False)
    with pytest.raises(ErasureError, match="steps differ"):
        generate(pipe, ROWS, tmp_path, steps=3, progress=False)
    pipe.load_patch(delta_patch(pipe), name="p")
    with pytest.raises(ErasureError, match="other settings"):
        generate(pipe, ROWS, tmp_path, steps=2, progress=False)


def test_without_patches_base_and_patched_results_are_equal(pipe, tmp_path):
    report = evaluate(pipe, "cat", folder=tmp_path, prompts=ROWS, judge=BrightnessJudge(), **QUICK)
    assert report.rows["base"] == report.rows["patched"]
    assert all(pair["only_base"] == pair["only_patched"] == 0 for pair in report.paired.values())


def test_patches_are_switched_off_for_the_base_and_restored(pipe, tmp_path):
    generate(pipe, ROWS, tmp_path / "clean", steps=2, progress=False)
    pipe.load_patch(delta_patch(pipe), name="p", strength=0.7)
    evaluate(pipe, "cat", folder=tmp_path / "r", prompts=ROWS, judge=BrightnessJudge(), **QUICK)
    assert pipe.get_list_patches()["p"]["strength"] == 0.7
    clean, base, patched = (pictures(tmp_path / name) for name in ("clean", "r/base", "r/patched"))
    assert all(np.abs(clean[key] - base[key]).max() <= 1 for key in clean)
    assert any(np.abs(clean[key] - patched[key]).max() > 1 for key in clean)


def judged(labels, tops, style=None):
    images = []
    for i, (label, top) in enumerate(zip(labels, tops, strict=True)):
        record = Record(str(i), "", i, 1, 1.0, "", {"object": label, "style": "flat"})
        verdict = None if top is None else {"object": {top: 1.0}, "style": {(style or ["flat"] * 99)[i]: 1.0}}
        images.append(JudgedImage(record, verdict, 20.0 + i))
    return images


def test_metrics_by_hand():
    rows = judged(
        ["cat", "cat", "cat", "cat", "dog", "dog", "dog", "cow"],
        ["dog", "none", "cat", "dog", "dog", "cat", "dog", "cow"],
        ["flat", "flat", "flat", "round", "flat", "round", "flat", "flat"],
    )
    metrics = {m.name: (m.value, m.n) for m in measure(rows, Target("object", ("cat",), "style"), rows)}
    assert metrics["UA"] == (0.75, 4) and metrics["IRA"] == (0.75, 4)
    assert metrics["CRA"] == (0.75, 4) and metrics["CRA_target"] == (0.75, 4)
    assert metrics["CLIP_target"] == (21.5, 4) and metrics["CLIP_kept"] == (25.5, 4)


def test_synonyms_and_neighbours_are_measured_separately():
    rows = judged(["cat", "cat", "cat", "dog", "dog", "cow"], ["dog", "cat", "none", "dog", "cat", "cow"])
    roles = ["", "synonym", "synonym", "neighbour", "neighbour", ""]
    for row, role in zip(rows, roles, strict=True):
        row.record.labels["role"] = role
    metrics = {m.name: (m.value, m.n) for m in measure(rows, Target("object", ("cat",), "style"), rows)}
    assert metrics["UA"] == (1.0, 1) and metrics["leak"] == (0.5, 2)
    assert metrics["IRA"] == (1.0, 1) and metrics["neighbours"] == (0.5, 2) and metrics["CRA"] == (1.0, 3)
    assert metrics["H"] == (1.0, 1)


def test_the_harmonic_mean_by_hand():
    shares = [Metric(name, value, 100, 0, 1, True, "") for name, value in (("UA", 1.0), ("IRA", 0.5))]
    mean = harmonic_mean("H", shares)
    assert mean.value == pytest.approx(2 / 3) and mean.low < 2 / 3 < mean.high
    assert harmonic_mean("H", [Metric("UA", 0.0, 9, 0, 1, True, ""), shares[0]]).value == 0


def test_the_kernel_distance_by_hand():
    a, b = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
    # k(x, y) = (x.y / 2 + 1)^3; within a: k(0) = 1, within b: k(0) = 1; across: k = 1.5^3, 1.5^3, 1.5^3, 0.5^3
    assert kid(a, b) == pytest.approx(1 + 1 - 2 * (3 * 1.5**3 + 0.5**3) / 4)


def test_the_distance_of_pairs_is_the_mean_over_all_disjoint_halves():
    draw = np.random.default_rng(0)
    base = draw.normal(size=(6, 4))
    patched = base + draw.normal(size=(6, 4))
    halves = list(combinations(range(6), 3))
    rest = [[i for i in range(6) if i not in half] for half in halves]
    every = [kid(patched[list(half)], base[other]) for half, other in zip(halves, rest, strict=True)]
    value, low, high = paired_kid(patched, base)
    assert value == pytest.approx(np.mean(every)) and low <= value <= high
    assert paired_kid(base, base) == (0.0, 0.0, 0.0)  # the base is no distance from itself
    assert paired_kid(patched, base) == (value, low, high)


def test_the_interval_of_the_distance_of_pairs_covers_in_simulation():
    draw = np.random.default_rng(1)

    def sample(n):
        base = draw.normal(size=(n, 4))
        return base * 0.9 + 0.5 + 0.3 * draw.normal(size=(n, 4)), base

    truth = np.mean([paired_kid(*sample(2000))[0] for _ in range(4)])
    covered = [low <= truth <= high for _, low, high in (paired_kid(*sample(60)) for _ in range(100))]
    assert 0.87 <= np.mean(covered) <= 1


def test_an_image_that_cannot_be_judged_is_a_failure_of_the_erasure():
    rows = judged(["cat", "cat", "dog", "dog"], ["none", None, "dog", None])
    values = {m.name: m.value for m in measure(rows, Target("object", ("cat",), "style"), rows)}
    assert values == {**values, "UA": 0.5, "IRA": 0.5, "CRA": 0.5, "CRA_target": 0.5}


def test_a_failing_judge_and_a_missing_image_are_counted_and_reported(pipe, tmp_path):
    report = evaluate(pipe, "cat", folder=tmp_path, prompts=ROWS, judge=BrightnessJudge(fail_above=-1), **QUICK)
    assert report.metric("UA").value == 0 and report.metric("IRA").value == 0
    assert len(report.faults) == 2 * len(pictures(tmp_path / "patched")) and "too bright" in report.faults[0]


@pytest.mark.parametrize(
    "answer",
    [
        lambda verdict: {},
        lambda verdict: None,
        lambda verdict: {**verdict, "object": {"none": 1.0}},
        lambda verdict: {**verdict, "object": dict.fromkeys(verdict["object"], float("nan"))},
    ],
    ids=["empty", "nothing", "a label short", "nan"],
)
def test_a_missing_answer_does_not_count_as_absence(pipe, tmp_path, answer):
    """A plug-in that returns nothing for two of eight images, or too few verdicts, has not found them clean."""

    class Vague(BrightnessJudge):
        def judge(self, images):
            # Which images these are must not depend on who else is in the batch.
            verdicts = super().judge(images)
            dark = {np.asarray(image).mean() for image in seen}
            return [answer(x) if np.asarray(i).mean() in dark else x for i, x in zip(images, verdicts, strict=True)]

    generate(pipe, ROWS, tmp_path / "patched", steps=2, progress=False)
    seen = [Image.fromarray(p.astype(np.uint8)) for p in list(pictures(tmp_path / "patched").values())[:2]]
    report = evaluate(pipe, "cat", folder=tmp_path, prompts=ROWS, judge=Vague(), whole=True, **QUICK)
    assert sorted(fault.partition(":")[0] for fault in report.faults) == ["r0", "r0", "r1", "r1"]
    assert report.metric("UA").n == 4 and not report.metric("UA").value == 1

    class Short(BrightnessJudge):
        def judge(self, images):
            return super().judge(images)[1:]

    report = evaluate(pipe, "cat", folder=tmp_path, prompts=ROWS, judge=Short(), whole=True, **QUICK)
    assert (report.metric("UA").value, len(report.faults)) == (0, 16) and "0 verdicts for 1 images" in report.faults[0]


def test_images_broken_after_drawing_count_as_failures(pipe, tmp_path, monkeypatch):
    module = importlib.import_module("erasure.evaluation.evaluate")  # the package has a function of that name
    draw = module.generate

    def spoil(pipe, rows, folder, **options):
        records = draw(pipe, rows, folder, **options)
        half = (folder / "images" / "r0.png").read_bytes()[:200]
        (folder / "images" / "r0.png").write_bytes(half)
        (folder / "images" / "r2.png").unlink()
        return records

    monkeypatch.setattr(module, "generate", spoil)
    options = {**QUICK, "prompts": ROWS, "judge": BrightnessJudge(), "whole": True}
    report = evaluate(pipe, "cat", folder=tmp_path, **options)
    wanted = ["r0: the image is missing or broken", "r2: the image is missing or broken"]
    assert report.faults == wanted * 2 and report.metric("UA").n == 4 and report.metric("UA").value <= 0.5
    assert (tmp_path / "report.html").read_text().count("missing</span>") == 8  # in the strip, and below


def test_images_are_not_kept_in_memory_while_they_are_judged(tmp_path, monkeypatch):
    alive, most = [], []

    def read(folder, record):
        image = Image.new("RGB", (8, 8))
        alive.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in alive))
        return image

    monkeypatch.setattr(score, "read_image", read)
    records = [Record(str(i), "a cat", i, 1, 1.0, "", {"object": "cat"}) for i in range(200)]
    images = score.judge_run(BrightnessJudge(), tmp_path, records, Target("object", ("cat",), None), [])
    assert len(images) == 200 and max(most) <= 2 * score.BATCH


def test_the_page_is_one_file_and_escapes_prompts(pipe, tmp_path):
    rows = PromptSet("x", [*ROWS.rows, Prompt("evil", "<script>alert(1)</script> a cat", 9, None, {"object": "cat"})])
    evaluate(pipe, "cat", folder=tmp_path, prompts=rows, judge=BrightnessJudge(), **QUICK)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http:" not in page and "https:" not in page
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["schema"] == 1 and {m["name"] for m in data["rows"]["base"]} >= {"UA", "IRA", "CRA", "CLIP_kept"}
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 500
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_limit_spreads_the_prompts_and_shares_the_base_images(pipe, tmp_path):
    base = tmp_path / "base"
    for concept in ("cat", "dog"):
        options = {**QUICK, "limit": 6, "base_folder": base, "judge": BrightnessJudge()}
        report = evaluate(pipe, concept, folder=tmp_path / concept, prompts=ROWS, **options)
        assert report.metric("UA").n == 2 and report.metric("IRA").n == 4
    assert len(pictures(base)) <= 8


def test_targets_are_repeated_from_other_seeds(pipe, tmp_path):
    report = evaluate(pipe, "cat", folder=tmp_path, prompts=ROWS, judge=BrightnessJudge(), **QUICK)
    assert report.metric("UA").n == 36 and report.metric("IRA").n == 4
    alone = evaluate(pipe, "cat", folder=tmp_path, prompts=ROWS, judge=BrightnessJudge(), whole=True, **QUICK)
    assert alone.metric("UA").n + alone.metric("IRA").n == len(ROWS.rows)


@pytest.mark.parametrize(
    ("concept", "message"),
    [("catt", "did you mean 'cat'"), (["cat", "flat"], "one domain"), ("round", "has no prompt for")],
)
def test_concepts_that_cannot_be_measured(pipe, tmp_path, concept, message):
    with pytest.raises(ErasureError, match=message):
        evaluate(pipe, concept, folder=tmp_path, prompts=ROWS, judge=BrightnessJudge(), **QUICK)


def test_labels_unknown_to_the_judge_are_refused_before_drawing(pipe, tmp_path):
    """Otherwise their images would count as wrong, in the base's results too."""
    rows = PromptSet("farm", [*ROWS.rows, Prompt("cow", "a cow", 9, None, {"object": "cow", "style": "flat"})])
    options = {**QUICK, "judge": BrightnessJudge(), "whole": True}
    with pytest.raises(ErasureError, match="'farm' asks for cow, but brightness has no such object.*--where"):
        evaluate(pipe, "cat", folder=tmp_path / "x", prompts=rows, **options)
    assert not (tmp_path / "x").exists()
    evaluate(pipe, "cat", folder=tmp_path / "x", prompts=rows.where("object!=cow"), **options)


def test_a_published_list_without_labels_gets_a_label(pipe, tmp_path):
    (tmp_path / "church.csv").write_text("case_number,prompt,evaluation_seed\n0,an old cat,3\n1,a kitten,4\n")
    rows, options = PromptSet.read(tmp_path / "church.csv"), {**QUICK, "judge": BrightnessJudge(), "whole": True}
    with pytest.raises(ErasureError, match="no column 'object'.*--label object=cat"):
        evaluate(pipe, "cat", folder=tmp_path / "x", prompts=rows, **options)
    labelled = rows.labelled("object = cat")
    assert [row.labels for row in labelled.rows] == [{"object": "cat"}] * 2 and labelled.labelled(
        "object=cat"
    ) == labelled
    report = evaluate(pipe, "cat", folder=tmp_path / "x", prompts=labelled, **options)
    assert report.metric("UA").n == 2 and report.metric("IRA") is None and "absent from" in report.summary()
    for bad, message in (("cat", "HEAD=VALUE"), ("=cat", "HEAD=VALUE"), ("seed=4", "HEAD=VALUE"), ("object=", "HEAD")):
        with pytest.raises(ErasureError, match=message):
            rows.labelled(bad)
    with pytest.raises(ErasureError, match="row 'r1' of tiny already has object=dog"):
        ROWS.labelled("object=cat")


def test_bad_folders_ids_and_limits(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ErasureError, match="cannot be written"):
        generate(pipe, ROWS, tmp_path / "file", steps=2, progress=False)
    with pytest.raises(ErasureError, match="cannot be used as a file name"):
        generate(pipe, PromptSet("x", [Prompt("../up", "a", 1)]), tmp_path / "x", steps=2, progress=False)
    with pytest.raises(ErasureError, match="at least 6"):
        evaluate(pipe, "cat", folder=tmp_path / "y", prompts=ROWS, judge=BrightnessJudge(), **{**QUICK, "limit": 2})
