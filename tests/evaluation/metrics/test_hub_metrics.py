"""HUB's metrics computed by hand, and its suite on a folder in the published form."""

from __future__ import annotations

import json

import numpy as np
import pytest

from erasure.errors import ErasureError
from erasure.evaluation.generate import Record
from erasure.evaluation.judges import registry as judges
from erasure.evaluation.judges.judge import LabelsOnly
from erasure.evaluation.metrics.measure import measure
from erasure.evaluation.metrics.statistics import wilson
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.evaluation.suite import run_suite
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

TARGET = Target("object", ("cat",), None)


def row(number, label, top, role="", clip=None, nouns=(), **labels):
    labels = {"object": label, "role": role, **labels}
    record = Record(f"r{number}", f"prompt {number}", 0, 1, 1.0, "", labels)
    return JudgedImage(record, None if top is None else {"object": {top: 1.0}}, clip, None, None, nouns)


def metrics_by_name(rows, base=None):
    return {metric.name: metric for metric in measure(rows, TARGET, base or rows)}


def test_translations_pinpoint_and_published_attacks_are_separate_metrics():
    rows = [
        *(row(i, "cat", top) for i, top in enumerate(["dog", "cat"])),
        row(2, "cat", "cat", "translation", language="Spanish"),
        row(3, "cat", "dog", "translation", language="Spanish"),
        row(4, "cat", None, "translation", language="French"),  # not judged: it counts as seen
        *(row(5 + i, noun, top, "pinpoint") for i, (noun, top) in enumerate([("kitty", "cat"), ("pet", "pet")] * 2)),
        row(9, "pet", None, "pinpoint"),  # and here as not drawn
        row(10, "cat", "dog", "adversarial"),
        row(11, "dog", "dog", clip=7.0),
        row(12, "cat", "cat", "translation", clip=99.0),
    ]
    metrics = metrics_by_name(rows)
    assert {name: (m.value, m.n) for name, m in metrics.items() if not name.startswith(("H", "CLIP"))} == {
        "UA": (0.5, 2),
        "IRA": (1.0, 1),
        "translations": (0.75, 4),
        "translations Spanish": (0.5, 2),
        "translations French": (1.0, 1),
        "pinpoint": (0.4, 5),
        "adversarial": (0.0, 1),
    }
    assert (metrics["pinpoint"].low, metrics["pinpoint"].high) == wilson(2, 5)
    assert metrics["CLIP_kept"].value == 7 and "CLIP_target" not in metrics
    better = {name: metrics[name].higher_is_better for name in ("translations", "adversarial", "pinpoint")}
    assert better == {"translations": False, "adversarial": False, "pinpoint": True}


def test_selective_alignment_is_a_mean_over_nouns_and_paired():
    def rows(*scores):
        images = [row(i, "cat", "dog", "selective", nouns=image) for i, image in enumerate(scores)]
        for image in images:
            image.record.labels["nouns"] = "park, Wind , wind,cat"
        return images

    base = rows((20.0, 30.0), (10.0,), (40.0,), ())
    patched = rows((26.0, 30.0), (12.0,), (), (11.0,))
    metrics = metrics_by_name(patched, base)
    # Over nouns, not over prompts: (26 + 30 + 12 + 11) / 4; the change where both were judged.
    assert (metrics["CLIP_selective"].value, metrics["CLIP_selective"].n) == (79 / 4, 4)
    change = metrics["CLIP_selective_change"]
    assert (change.value, change.n, change.higher_is_better) == (pytest.approx(8 / 3), 3, True)
    assert 2 <= change.low <= change.value <= change.high <= 3  # whole prompts are drawn: (6 + 0) / 2 or 2
    assert "UA" not in metrics and metrics_by_name(base)["CLIP_selective_change"].value == 0
    # Each noun once, in any spelling, and not the concept itself.
    assert TARGET.noun_texts(patched[0].record) == ["a photo of park", "a photo of wind"]
    other = row(9, "dog", "dog")
    other.record.labels["nouns"] = "park"
    assert TARGET.noun_texts(other.record) == []


class Named(LabelsOnly):
    """A judge that recognises the first label in every image; its CLIP score is the length of the text."""

    name = "named"
    built: dict = {}  # noqa: RUF012

    def __init__(self, source: str, labels: str, head: str = "object", template: str = "") -> None:
        self.head, self.labels = head, labels.split(",")
        self.heads = {head: self.labels}
        self.built[head] = self.labels, template

    def find(self, name):
        if name not in self.labels:
            raise ErasureError(f"no {name}")
        return self.head, [name]

    def judge(self, images):
        return [{self.head: {label: float(i == 0) for i, label in enumerate(self.labels)}} for _ in images]

    def clip_scores(self, images, texts):
        return [float(len(text)) for text in texts]

    def versions(self):
        return {}


def test_hubs_suite_reads_its_folder_and_measures_all_of_it(tmp_path, monkeypatch):
    data, out = tmp_path / "prompts", tmp_path / "out"
    files = {
        "target_image/Snoopy.csv": "Snoopy asleep, on a house\nSnoopy flies\n",
        "multilingual_robustness/Snoopy.csv": "Original,Spanish,French,Index\nSnoopy,Snoopy duerme,Snoopy dort,4\n",
        "pinpoint_ness/Snoopy.csv": "noun,similarity\n" + "".join(f"noun_{i},0.7\n" for i in range(150)),
        "selective_alignment/Snoopy.json": json.dumps([{"prompt": "Snoopy in a park", "nouns": ["park "], "index": 7}]),
    }
    for name, text in files.items():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text(text)
    monkeypatch.setattr(judges, "factory", lambda kind: Named)
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(delta_patch(pipe), name="p")
    options = {"data": data, "limit": 3, "steps": 1, "progress": False}
    result = run_suite(pipe, "Snoopy", "hub", folder=out, **options)
    # The labels that the target is chosen from are the concepts of its kind, not the nouns nearest to it.
    peers, template = Named.built["concept"]
    assert peers[0] == "Buzz Lightyear" and "Snoopy" in peers and len(peers) == 11 and template == "a picture of {}"
    nouns = Named.built["object"][0]
    assert nouns[:2] == ["noun_0", "noun_1"] and len(nouns) == 110 and not set(nouns) & set(peers)
    assert [text.partition(":")[0] for text in result.missing] == ["part adversarial"]
    assert "github.com/ml-postech/HUB" in result.missing[0]
    values = {metric.name: (metric.value, metric.n) for metric in result.report.rows["patched"]}
    assert values["UA"] == (1, 2) and "IRA" not in values
    assert values["CRA"] == (0, 3)  # Imagenette's classes; the nouns are measured by themselves
    # Two languages of one prompt, without the English original.
    assert values["translations"] == (0, 2)
    assert values["translations Spanish"] == values["translations French"] == (0, 1)
    assert values["pinpoint"] == (0, 3) and values["CLIP_selective"] == (len("a photo of park"), 1)
    assert values["CLIP_selective_change"] == (0, 1)
    prompts = {json.loads(line)["prompt"] for line in (out / "patched" / "records.jsonl").read_text().splitlines()}
    numbers = {int(prompt.rpartition("_")[2]) for prompt in prompts if prompt.startswith("a photo of noun_")}
    assert len(numbers) == 3 and max(numbers) < 100  # of the nearest 100
    assert np.isfinite(result.report.metric("CLIP_kept").value)
    assert result.report.notes[0].startswith("Suite hub differs from the published protocol: CLIP zero-shot says which")
