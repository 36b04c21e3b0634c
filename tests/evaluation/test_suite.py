"""Suites: their prompts, their runs, and the report of what is missing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from erasure.errors import ErasureError
from erasure.evaluation.judges import registry as judges
from erasure.evaluation.suite import Suite, names, run_suite
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.judging import Fixed
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

QUICK = {"steps": 2, "guidance": 2.0, "progress": False}
SMALL = """
about: a test
source: none
judge: brightness
parts:
  asked:
    template: "a {object} in {style}"
    seeds: ["1", "2"]
    fill: {object: [cat, dog], style: [flat]}
  words:
    template: "the {word}"
    put: {object: "{concept}"}
    role: synonym
    fill: {word: [tree, church]}
  away:
    prompts: "{data}/none.csv"
    get: the moon
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    monkeypatch.setitem(judges.KINDS, "brightness", "x")
    monkeypatch.setattr(judges, "factory", lambda kind: BrightnessJudge)
    return path


def test_the_suites_of_the_package():
    assert names() == ["esd-styles", "glyph-full", "glyph-quick", "hub", "i2p", "mace-objects", "unlearncanvas"]
    for name in names():
        suite = Suite.read(name)
        assert suite.about and suite.source and (suite.base == "glyph") == name.startswith("glyph")
        assert suite.differs or suite.base == "glyph"


def test_the_parts_form_one_prompt_set(small):
    rows, missing = Suite.read(small).rows(["cat"])
    assert [row.prompt for row in rows.rows] == ["a cat in flat"] * 2 + ["a dog in flat"] * 2 + [
        "the tree",
        "the church",
    ]
    assert [row.seed for row in rows.rows][:4] == [1, 2, 1, 2]
    assert rows.rows[0].labels == {"object": "cat", "style": "flat"}
    assert rows.rows[-1].labels == {"word": "church", "object": "cat", "role": "synonym"}
    assert missing == ["part away: {data}/none.csv needs a data folder: give one with --data; the moon"]


def test_published_sizes():
    rows, _ = Suite.read("unlearncanvas").rows(["Van Gogh"])
    assert len(rows.rows) == 5100 and rows.rows[0].prompt == "A Architectures image in Abstractionism style."
    assert len(rows.label_values("style")) == 51 and "Van Gogh" in rows.label_values("style")
    rows, missing = Suite.read("mace-objects").rows(["ship"])
    assert {row.prompt for row in rows.rows if row.labels.get("role")} == {
        f"a photo of the {word}" for word in ("vessel", "boat", "watercraft")
    }
    assert not missing  # the other classes' words are not asked
    classes = rows.label_values("object")
    for name in classes:
        synonyms = [row for row in Suite.read("mace-objects").rows([name])[0].rows if row.labels.get("role")]
        assert len(synonyms) == 21 and len({row.prompt for row in synonyms}) == 3
        assert {row.labels["object"] for row in synonyms} == {name} and not {row.labels["word"] for row in synonyms} & {
            name
        }
    assert len(classes) == 10


def test_maces_judge_uses_the_template_of_its_script(monkeypatch, tmp_path):
    options = {}

    class Told(BrightnessJudge):
        def __init__(self, source: str, labels: str, template: str) -> None:
            super().__init__()
            options.update(source=source, labels=labels, template=template)

    monkeypatch.setattr(judges, "factory", lambda kind: Told)
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    with pytest.raises(ErasureError, match="has no such object"):  # the stand-in has two of the ten
        run_suite(pipe, "cat", "mace-objects", folder=tmp_path, limit=2, **QUICK)
    assert options["template"] == "a photo of the {}" and len(options["labels"].split(",")) == 10


def test_a_suite_runs_and_reports_what_is_missing(small, tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(delta_patch(pipe), name="p")
    result = run_suite(pipe, "cat", str(small), folder=tmp_path / "out", **QUICK)
    assert result.report.metric("UA").n == 2 and result.report.metric("leak").n == 2
    assert result.attacks is None and len(result.missing) == 1
    assert json.loads((tmp_path / "out" / "suite.json").read_text())["missing"] == result.missing
    assert "missing: part away" in result.text() and (tmp_path / "out" / "report.html").is_file()


def test_a_suite_measures_lpips_by_its_own_setting_or_an_option(small, squeeze, tmp_path):
    pipe, place = tiny_pipeline(ErasedStableDiffusionPipeline), tmp_path / "out"
    small.write_text(SMALL + "lpips: alex\n")
    without_weights = run_suite(pipe, "cat", str(small), folder=place, measures={"lpips": None}, **QUICK).report
    assert "lpips alex" in without_weights.missing[0] and without_weights.metric("LPIPS_kept") is None
    report = run_suite(pipe, "cat", str(small), folder=place, measures={"lpips": "squeeze"}, **QUICK).report
    assert (report.metric("LPIPS_kept").value, report.metric("LPIPS_kept").n, report.missing) == (0, 2, [])
    assert Suite.read("esd-styles").lpips == "alex"


class Obliging(Fixed):
    """A judge that knows all labels it is given and recognises the first one in every image."""

    def __init__(self, source="", labels="", classes="", head="object", **options):
        known = (labels or classes).split(",") if source else ["none", "nudity"]
        scores = {label: float(label == known[0]) for label in known}
        super().__init__(f"obliging-{head}", **{head if source else "nudity": scores})
        self.source, self.options = source, options

    def versions(self):
        return {"source": self.source}


@pytest.mark.parametrize(
    ("name", "concept", "count", "figures"),
    [
        ("esd-styles", "Vincent van Gogh", 20, {"UA": (0, 1)}),
        ("mace-objects", "airplane", 10, {"UA": (0, 2), "IRA": (0, 18), "leak": (1, 20)}),
        ("unlearncanvas", "Abstractionism", 51, {"UA": (0, 2), "IRA": (0, 100), "CRA": (0.04, 100)}),
        ("i2p", "nudity", 2, {"UA": (1, 2), "IRA": (1, 2)}),
    ],
)
def test_published_suites_run_through_to_a_report(name, concept, count, figures, nothing, monkeypatch, tmp_path):
    """Only the judge is a substitute; the tiny pipeline draws."""
    from erasure.prompts import hub_sets

    i2p = tmp_path / "i2p_benchmark.csv"
    i2p.write_text(
        ",prompt,categories,nudity_percentage,sd_seed,sd_guidance_scale\n"
        '0,a nude,"sexual, shocking",60,5,7\n1,a knife,violence,0,6,7.5\n2,more,sexual,10,7,9\n'
    )
    monkeypatch.setattr(hub_sets, "fetch", {"hub:AIML-TUDA/i2p": i2p}.__getitem__)
    built = []

    def make(source: str = "", labels: str = "", classes: str = "", **options):
        built.append(Obliging(source, labels, classes, **options))
        return built[-1]

    monkeypatch.setattr(judges, "factory", lambda kind: make)
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    limit = {"unlearncanvas": 102, "esd-styles": 20}.get(name, 2 if name == "i2p" else 20)
    options = {"data": tmp_path, "limit": limit, "steps": 1, "progress": False, "measures": {"lpips": None}}
    result = run_suite(pipe, concept, name, folder=tmp_path / "out", **options)
    assert [text[:10] for text in result.missing] == ["lpips alex"] * (name == "esd-styles")
    assert len(next(iter(built[0].heads.values()))) == count
    values = {metric.name: (metric.value, metric.n) for metric in result.report.rows["patched"]}
    assert {key: values.get(key) for key in figures} == figures
    if name == "unlearncanvas":
        assert [entry.source for entry in built] == [str(tmp_path / f"style50{end}.pth") for end in ("", "_cls")]
        assert built[1].heads["object"][0] == "Architectures" and built[1].options == {"allow_pth": "true"}
    if name == "i2p":
        drawn = [json.loads(line) for line in (tmp_path / "out/patched/records.jsonl").read_text().splitlines()]
        assert {(entry["prompt"], entry["seed"], entry["guidance"]) for entry in drawn} >= {
            ("a nude", 5, 7.0),
            ("more", 7, 9.0),
        }


def test_the_error_names_the_missing_part_of_the_target(tmp_path, monkeypatch):
    """I2P is on the hub, so that offline no prompt asks for the concept."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    with pytest.raises(
        ErasureError, match=r"has no prompt for nudity.*Missing: part sexual: .*AIML-TUDA/i2p.*--label nudity"
    ):
        run_suite(pipe, "nudity", "i2p", folder=tmp_path / "out", limit=2, **QUICK)
    assert not (tmp_path / "out").exists()


def test_the_command_names_the_file_that_was_written(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    from erasure.cli.main import main

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    options = ["--limit", "1", "--steps", "1", "--judge", "clip:nowhere?labels=ship,truck", "-o", str(out)]
    assert main(["evaluate", "ship", "--suite", "mace-objects", *options]) == 1
    output = " ".join(capsys.readouterr().out.split())  # however long the path is, and so where lines break
    assert "missing: judge clip:nowhere" in output and output.endswith(f"Written: {out / 'suite.json'}")
    assert (out / "suite.json").is_file() and not (out / "report.html").exists()


def test_a_limit_leaves_every_theme_object_and_seed_of_unlearncanvas():
    suite = Suite.read("unlearncanvas")
    limited = replace(suite, parts={name: replace(part, limit=102) for name, part in suite.parts.items()})
    rows = limited.rows(["Van Gogh"])[0].rows
    assert rows == limited.rows(["Van Gogh"])[0].rows and len(rows) == 102
    for value, count in (("style", 51), ("object", 20)):
        found = Counter(row.labels[value] for row in rows)
        assert len(found) == count and max(found.values()) - min(found.values()) <= 1
    assert set(Counter(row.seed for row in rows).values()) <= {20, 21}
    alone = replace(suite, parts={name: replace(part, limit=1) for name, part in suite.parts.items()})
    assert alone.rows(["Van Gogh"])[0].rows[0].labels["style"] == "Van Gogh"  # the concept comes first


def test_suites_for_stable_diffusion_name_their_sampling():
    for name in names():
        suite = Suite.read(name)
        assert suite.base == "glyph" or (suite.steps, suite.guidance) == {"unlearncanvas": (100, 9)}.get(
            name, (50, 7.5)
        )


@pytest.mark.parametrize(
    ("concept", "others", "template"),
    [
        ("Picasso", ["Andy Warhol", "Van Gogh", "another artist"], "style"),
        ("Emma Watson", ["Tom Cruise", "another person"], "photo"),
        ("Nudity", ["Nudity", "Violent", "Disturbing", "harmless"], "content"),
    ],
)
def test_hubs_judge_chooses_among_the_concepts_of_the_kind(concept, others, template):
    suite = Suite.read("hub")
    fields = suite.judge_fields(concept, PromptSet("x", [Prompt("a", "a dog", 1, None, {"object": "dog"})]))
    labels = fields["peers"].split(",")
    assert concept in labels and set(others) <= set(labels) and "dog" not in labels and fields["objects"] == "dog"
    assert template in fields["peers_template"] and len(labels) == {"Nudity": 4}.get(concept, 11)
    assert sum(len(peers.concepts) for peers in suite.peers.values()) == 33
    with pytest.raises(ErasureError, match="did you mean 'Snoopy'"):
        suite.judge_fields("snoopy", PromptSet("x", [Prompt("a", "a dog", 1)]))


ATTACKED = "attacks: [random, encoder]\ncases: 2\n"


def run_command(monkeypatch, capsys, pipe, *words):
    """Run `erasure evaluate cat` on a pipeline, and return the exit code and what it printed, on one line."""
    from erasure.cli import evaluate
    from erasure.cli.main import main

    monkeypatch.setattr(evaluate, "pipeline", lambda args: pipe)
    code = main(["evaluate", "cat", "--steps", "1", *words])
    return code, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("change", "code", "listed"),
    [
        (lambda text: text[: text.index("  away:")], 0, []),
        (lambda text: text, 1, ["part away: "]),
        (lambda text: text[: text.index("  away:")].replace("brightness", "nobody"), 1, ["judge nobody: "]),
        (lambda text: text[: text.index("  away:")] + "lpips: alex\n", 1, ["lpips alex"]),
        (
            lambda text: text.replace("brightness", "nobody") + ATTACKED,
            1,
            ["part away: ", "judge nobody: ", "attacks random, encoder: not run, for they need the judge"],
        ),
    ],
)
def test_the_exit_code_says_whether_the_suite_was_complete(
    small, nothing, change, code, listed, tmp_path, monkeypatch, capsys
):
    small.write_text(change(SMALL))
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    out = str(tmp_path / "out")
    found, output = run_command(monkeypatch, capsys, pipe, "--suite", str(small), "-o", out)
    missing = json.loads((tmp_path / "out" / "suite.json").read_text())["missing"]
    assert found == code and [text[: len(start)] for text, start in zip(missing, listed, strict=True)] == listed
    assert all(f"missing: {start}" in output for start in listed)


def test_attacks_that_cannot_run_are_listed_and_the_report_is_kept(small, tmp_path, monkeypatch):
    """The base of this judge never shows the target, so that there is nothing to attack."""
    monkeypatch.setattr(judges, "factory", lambda kind: NeverCat)
    small.write_text(SMALL[: SMALL.index("  away:")] + ATTACKED)
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    result = run_suite(pipe, "cat", str(small), folder=tmp_path / "out", **QUICK)
    assert result.report.metric("UA").value == 1 and result.attacks is None
    assert len(result.missing) == 1 and result.missing[0].startswith(
        "attacks random, encoder: the base model shows cat"
    )


class NeverCat(BrightnessJudge):
    """A judge that sees a dog in every image."""

    def judge(self, images):
        return [{"object": {"cat": 0.0, "dog": 1.0, "none": 0.0}, "style": {"flat": 1.0, "round": 0.0}} for _ in images]


def test_the_judge_keeps_all_labels_under_a_limit(small, tmp_path, monkeypatch):
    """Among the labels of the few rows that are drawn, it would be correct more often."""
    label_lists = []

    class Told(BrightnessJudge):
        def __init__(self, labels: str) -> None:
            super().__init__()
            label_lists.append(labels)

    monkeypatch.setattr(judges, "factory", lambda kind: Told)
    small.write_text(SMALL.replace("judge: brightness", 'judge: "brightness:labels={objects}"'))
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    run_suite(pipe, "cat", str(small), folder=tmp_path / "out", limit=1, **QUICK)
    assert label_lists == ["cat,dog"] and len(list((tmp_path / "out" / "patched" / "images").glob("*.png"))) == 2


def test_images_are_drawn_without_a_judge(small, tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    path = tmp_path / "other.yaml"
    path.write_text(SMALL.replace("judge: brightness", "judge: classifier:{data}/nowhere?labels={objects}"))
    result = run_suite(pipe, "cat", str(path), folder=tmp_path / "out", judge="nobody", **QUICK)
    assert result.report is None and "nobody" in result.missing[-1]
    assert len(list((tmp_path / "out" / "patched" / "images").glob("*.png"))) == 6
    assert len(list((tmp_path / "out" / "base" / "images").glob("*.png"))) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL.replace("about: a test\n", ""), "missing: about"),
        (SMALL + "colour: red\n", "colour"),
        (SMALL.replace("role: synonym", "role: cousin"), "synonym"),
        (SMALL.replace("    seeds:", "    prompts: x\n    seeds:"), "either prompts or a template"),
        ("about: a\nsource: b\nparts: [1]\n", "expected `parts` to map"),
        ("about: a\nsource: b\nparts: {x: {template: 'a {y}'}}\n", "there are no prompts"),
        ("about: [", "YAML"),
    ],
)
def test_bad_suites(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ErasureError, match=message):
        Suite.read(path).rows(["cat"])


def test_an_unknown_suite_lists_the_known_ones():
    with pytest.raises(ErasureError, match="glyph-quick"):
        Suite.read("glyph-quik")
