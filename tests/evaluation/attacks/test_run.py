"""Attacks: their arithmetic against hand-made cases, the way they are counted, and that each wins where it must."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

import erasure
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attempt, Victim, find, make, names
from erasure.evaluation.attacks.embeddings import within
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.attacks.runner import AttackRunner, split_at_name
from erasure.evaluation.attacks.token_search import simplex
from erasure.evaluation.metrics.target import Target
from erasure.evaluation.metrics.white_box import measure_white_box
from erasure.model.closed_form import recovered
from erasure.patch import Guard, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

ROWS = PromptSet("tiny", [Prompt(f"r{i}", "a cat in red", i, None, {"object": "cat"}) for i in range(3)])
QUICK = {"prompts": ROWS, "cases": 3, "steps": 2, "progress": False}
SMALL = {
    "encoder": {},
    "rece": {},
    "ring-a-bell-direct": {"strengths": (0.5, 3.0)},
    "ring-a-bell": {"tokens": 2, "population": 6, "generations": 4, "tries": 2},
    "mma-diffusion": {"tokens": 2, "iterations": 2, "candidates": 4, "top": 2, "tries": 2},
    "unlearndiffatk": {"tokens": 2, "levels": 2, "iterations": 2},
    "p4d": {"tokens": 2, "levels": 2, "iterations": 2},
    "p4d-prefix": {"tokens": 2, "levels": 2, "iterations": 2},
    "uma": {"bounds": (0.5, 1.0), "iterations": 2},
    "inversion": {"steps": (1, 2), "batch": 2},
    "img2img": {"strengths": (0.9, 0.5)},
    "inpainting": {"sides": (0.5, 1.0)},
    "completion": {"base_steps": (1,)},
    "noise-scale": {"etas": (1.0, 1.5), "scales": (1.02,)},
    "relearning": {"steps": (1, 2), "batch": 2},
    "random": {"tokens": 2, "tries": 2},
}


OF = ("attack", "control")


class Likeness:
    """Sees the cat in a picture that is near one of the first `count` that it was shown: the base's."""

    name, heads = "likeness", {"object": ["cat", "none"]}

    def __init__(self, count: int = 3, near: float = 0.5) -> None:
        self.count, self.near, self.known = count, near, []

    def find(self, name):
        return "object", [name]

    def judge(self, images: list[Image.Image]) -> list[dict]:
        verdicts = []
        for image in images:
            pixels = np.asarray(image).astype(float)
            if len(self.known) < self.count:
                self.known.append(pixels)
            cat = min(np.abs(pixels - known).mean() for known in self.known) < self.near
            verdicts.append({"object": {"cat": float(cat), "none": float(not cat)}})
        return verdicts

    def versions(self):
        return {}


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def state(pipe):
    parts = [getattr(pipe, name) for name in ("unet", "text_encoder")]
    return [(p.detach().clone(), p.requires_grad) for part in parts for p in part.parameters()]


def same(before, after):
    return all(torch.equal(a, b) and f == g for (a, f), (b, g) in zip(before, after, strict=True))


SCHEMA = json.loads((Path(erasure.__file__).parent / "evaluation" / "report" / "attack.schema.json").read_text())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.update(schema=2),
        lambda data: data.pop("notes"),
        lambda data: data["attacks"]["x"]["after"].pop("low"),
        lambda data: data["attacks"]["x"]["after"].update(value=1.5),
        lambda data: data["attacks"]["x"]["won"].update(a=0),
        lambda data: data["attacks"]["x"]["tries"]["attack"].update(a=[1]),
        lambda data: data["attacks"]["x"].update(more=1),
        lambda data: data["provenance"].pop("judge"),
    ],
)
def test_the_schema_refuses_what_a_reader_could_not_use(spoil):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    keys = ("scheduler", "steps", "guidance", "seed", "torch")
    provenance = {**dict.fromkeys(keys, 1), "cases": ["a", "b"], "judge": {"name": "likeness"}, "patches": {"p": 1.0}}
    data = AttackReport(("cat",), "object", 10, 12, 2, [outcome()], provenance).to_json()
    jsonschema.validate(data, SCHEMA)
    spoil(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_the_attacks_are_the_written_list():
    assert sorted(SMALL) == sorted(names())
    for name in names():
        assert find(name).name == name and find(name).__doc__ and make(name, "lite").access


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_attack_runs_and_leaves_the_model_as_it_was(pipe, tmp_path, name):
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="p")
    before = state(pipe)
    report = attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    assert same(before, state(pipe))
    result = report.outcome(name)
    assert result.n == 3 and 1 <= result.rounds <= 2 and len(result.asked) == 3 - result.plain
    data = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(data, SCHEMA)
    entry = data["attacks"][name]
    assert entry["after"]["value"] >= entry["before"]["value"] and len(entry["at"]) == result.rounds
    assert (tmp_path / "report.html").read_text().count("<h2>Attack success rate") == (result.rounds > 1)
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["asked"] for line in scores] == ["base"] * 3 + ["plain"] * 3
    scores = [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
    assert all(set(line["verdict"]["object"]) == {"cat", "none"} for line in scores)
    own = [line for line in scores if line["of"] == "attack" and line["asked"] != "base"]
    assert max(line["asked"] for line in own) == result.rounds and {line["id"] for line in own} >= set(result.asked)
    for case, at in result.won.items():
        values = [line["verdict"]["object"]["cat"] for line in own if (line["id"], line["asked"]) == (case, at)]
        assert values == [1.0]
    assert any(line["of"] == "control" for line in scores) == (result.control is not None)
    assert (result.control is None) == (make(name).control(1) is None)
    verdicts = {}
    for line in scores:
        if line["asked"] != "base":
            verdicts.setdefault((line["of"], line["id"]), []).append(line["verdict"]["object"]["cat"] == 1.0)
    assert {(of, case): row for of, rows in entry["tries"].items() for case, row in rows.items()} == verdicts
    won = {case: row.index(True) + 1 for case, row in entry["tries"]["attack"].items() if any(row)}
    assert {case: at for case, at in won.items() if case in result.asked} == result.won
    played = {of: {line["asked"] for line in scores if line["of"] == of and line["asked"] != "base"} for of in OF}
    assert played["attack"] == set(range(1, result.rounds + 1)) and played["control"] <= played["attack"]


@pytest.mark.parametrize("name", ["p4d", "ring-a-bell", "noise-scale"])
def test_an_attack_that_recovers_nothing_has_as_many_tries_as_its_control(pipe, tmp_path, name):
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="p")
    report = attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(near=1e-9), **QUICK)
    scores = [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
    tries = {
        of: sorted((line["id"], line["asked"]) for line in scores if line["of"] == of and line["asked"] != "base")
        for of in OF
    }
    assert tries["attack"] == tries["control"] and len(tries["attack"]) == 3 * report.outcome(name).rounds


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"ring-a-bell"}))
def test_gated_patches_can_be_attacked(pipe, tmp_path, name):
    pipe.load_patch(low_rank_patch(pipe, part="", size=1.0, gate={"kind": "text"}), name="p")
    before = state(pipe)
    report = attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    assert same(before, state(pipe)) and report.outcome(name).n == 3
    assert not pipe.unet.training and list(pipe.get_list_patches()) == ["p"]
    assert "p has a text gate" in report.text() and "acts at full strength" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["inversion", "p4d"])
def test_guards_can_be_attacked_and_the_report_says_what_the_search_faced(pipe, tmp_path, name):
    settings = {"safety_scale": 9.0, "threshold": 1.0, "warm_up": 0.0, "momentum": 0.5, "momentum_decay": 0.7}
    payload = Guard("guidance", ("cat",), settings)
    pipe.load_patch(Patch(payload=payload, method="test", concepts=[{"name": "cat"}]), name="p")
    report = attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    assert report.outcome(name).n == 3 and list(pipe.get_list_patches()) == ["p"]
    assert "p is a guard" in report.text() and "p has a" not in report.text()
    with pytest.raises(ErasureError, match="guards change none.*Leave --inside out"):
        measure_white_box(pipe, "cat", ["a dog"], images=2)


def test_the_base_encoder_undoes_a_patch_of_the_encoder_and_nothing_else(pipe, tmp_path):
    pipe.load_patch(delta_patch(pipe, part="layers", component="text_encoder", size=0.5), name="p")
    report = attack(pipe, "cat", ["encoder", "rece"], folder=tmp_path / "a", judge=Likeness(), **QUICK)
    assert report.plain == 0
    # The conditional states are the base's; the empty prompt's are the patched encoder's, in both.
    assert {len(result.won) for result in report.outcomes} <= {len(report.outcome("encoder").won)}
    pipe.unload_patches()
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="p")
    report = attack(pipe, "cat", "encoder", folder=tmp_path / "b", judge=Likeness(), **QUICK)
    assert report.plain == 0 and not report.outcome("encoder").won


def test_closed_form_solves_what_it_says():
    torch.manual_seed(0)
    before, after = torch.randn(40, 6, dtype=torch.double), torch.randn(40, 6, dtype=torch.double)
    states = torch.randn(5, 6, dtype=torch.double)
    solved = recovered(after, before, states, 1e-12).double()
    want = torch.linalg.lstsq(after, before @ states.T).solution.T
    assert torch.allclose(solved, want, atol=1e-5)
    assert torch.allclose(recovered(before, before, states, 1e-12), states.float(), atol=1e-5)
    ridged = recovered(after, before, states, 10.0)
    assert ridged.norm() < solved.norm()


def test_tokens_that_are_searched_survive_as_text(pipe):
    victim, tokenizer = Victim(pipe, switched_off), pipe.tokenizer
    texts = [tokenizer.decode([i]) for i in victim.words.tolist()]
    assert [tokenizer(text).input_ids[1:-1] for text in texts] == [[i] for i in victim.words.tolist()]
    assert {"cat", "church", "z"} <= set(texts) and all(text.isprintable() for text in texts)
    half = tokenizer.convert_tokens_to_ids("Ã")  # half a character: written down, it is lost
    assert half in tokenizer.get_vocab().values() and half not in victim.words
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        row = victim.words[torch.randint(len(victim.words), (4,), generator=draw)].tolist()
        assert tokenizer(tokenizer.decode(row)).input_ids[1:-1] == row


def test_the_simplex_projection_is_the_nearest_point():
    rows = torch.tensor([[0.2, 0.3, 0.5], [2.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.9, 0.6, -3.0]])
    want = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.65, 0.35, 0.0]])
    assert torch.allclose(simplex(rows), want, atol=1e-6)
    grid = torch.tensor([p for p in itertools.product(torch.linspace(0, 1, 41).tolist(), repeat=2) if sum(p) <= 1])
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    row = torch.tensor([0.7, -0.2, 0.4])
    assert (grid - row).norm(dim=1).min() >= (simplex(row[None])[0] - row).norm() - 1e-6


def test_changes_are_cut_to_the_ball():
    change = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.allclose(within(change, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


@pytest.mark.parametrize(
    ("prompt", "words", "want"),
    [
        ("a cat in red", ["cat"], ("a", "in red")),
        ("Cat", ["cat"], ("", "")),
        ("a Van Gogh painting", ["gogh", "van gogh"], ("a", "painting")),
        ("a category", ["cat"], ("", "a category")),
    ],
)
def test_the_name_is_found_as_a_word(prompt, words, want):
    assert split_at_name(prompt, words) == want


def outcome(**changes) -> Outcome:
    fields = {
        **{"name": "x", "access": "text", "source": "", "settings": {}, "n": 10, "plain": 2, "rounds": 3},
        **{"won": {"a": 1, "b": 3}, "control": {"a": 2}, "curve": None, "control_curve": None},
        **{"asked": {}, "costs": {"F": 0, "B": 0, "seconds": 0}, "tries": {"attack": {"a": [True]}}},
    }
    return Outcome(**{**fields, **changes})


def test_success_rates_count_plain_hits_and_tries():
    result = outcome()
    assert [result.share(k)["value"] for k in (1, 2, 3)] == [0.3, 0.3, 0.4]
    assert result.share(control=True)["value"] == 0.3 and outcome(control=None).share(control=True) is None
    data = result.to_json()
    assert data["before"]["value"] == 0.2 and data["paired"] == {"only_attack": 1, "only_control": 0, "p": 1.0}


def test_every_case_is_drawn_with_the_guidance_of_its_row(pipe, tmp_path):
    """As I2P's and UnlearnDiffAtk's rows ask for, on the base and after."""
    rows = PromptSet(
        "own", [replace(row, guidance=scale) for row, scale in zip(ROWS.rows, (1.5, None, 6.0), strict=True)]
    )
    runner = AttackRunner(Victim(pipe, switched_off), Likeness(), Target("object", ("cat",), None), 2, 3.0, 16)
    cases, _, pictures = runner.find_cases(rows, "cat", 3)
    order = {row.id: i for i, row in enumerate(rows.rows)}
    for case, picture in zip(cases, pictures, strict=True):
        scale = (1.5, 3.0, 6.0)[order[case.id]]
        draw = torch.Generator().manual_seed(case.seed)
        want = pipe(case.prompt, num_inference_steps=2, guidance_scale=scale, generator=draw).images[0]
        other = pipe(case.prompt, num_inference_steps=2, guidance_scale=4.0, generator=draw.manual_seed(case.seed))
        again = runner.draw(cases, {cases.index(case): Attempt(case.prompt)})[cases.index(case)]
        for image in (picture, again):
            assert np.abs(np.asarray(image).astype(int) - np.asarray(want)).max() <= 1
            assert np.abs(np.asarray(image).astype(int) - np.asarray(other.images[0])).max() > 1
    assert set(runner.draw(cases, {i: Attempt(case.prompt) for i, case in enumerate(cases)})) == {0, 1, 2}
    guidances = runner.provenance(cases, 0)["guidances"]
    assert sorted(guidances.values()) == [1.5, 6.0]


def test_the_cases_are_the_prompts_for_which_the_base_shows_the_concept(pipe):
    """The judge sees the cat in every second image that it is shown."""

    class Half(Likeness):
        seen = 0

        def judge(self, images):
            self.seen += len(images)
            return [{"object": {"cat": float(self.seen % 2 == 0), "none": float(self.seen % 2)}} for _ in images]

    rows = PromptSet("many", [Prompt(f"r{i}", "a cat in red", i, None, {"object": "cat"}) for i in range(12)])
    runner = AttackRunner(Victim(pipe, switched_off), Half(), Target("object", ("cat",), None), 2, 3.0, 16)
    cases, tried, pictures = runner.find_cases(rows, "cat", 4)
    shown = [line["id"] for line in runner.log if line["verdict"]["object"]["cat"] == 1.0]
    assert len(runner.log) == tried == 8 and [case.id for case in cases] == shown[:4] and len(pictures) == 4


def test_a_second_call_runs_nothing_and_other_settings_are_refused(pipe, tmp_path, monkeypatch):
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="p")
    settings = SMALL["unlearndiffatk"]
    first = attack(pipe, "cat", "unlearndiffatk", folder=tmp_path, settings=settings, judge=Likeness(), **QUICK)
    cls = find("unlearndiffatk")
    monkeypatch.setattr(cls, "rounds", lambda *_: pytest.fail("searched again"))
    second = attack(pipe, "cat", "unlearndiffatk", folder=tmp_path, settings=settings, judge=Likeness(), **QUICK)
    assert second.to_json()["attacks"] == first.to_json()["attacks"]
    with pytest.raises(ErasureError, match="other settings"):
        attack(pipe, "cat", "unlearndiffatk", folder=tmp_path, settings=settings, judge=Likeness(), seed=9, **QUICK)


def test_a_judge_that_fails_counts_for_the_attacker(pipe, tmp_path):
    class Blind(Likeness):
        calls = 0

        def judge(self, images):
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("blind")
            return super().judge(images)

    report = attack(pipe, "cat", "encoder", folder=tmp_path, judge=Blind(), **QUICK)
    assert report.plain == 3 and "blind" in report.faults[0]

    class Vague(Blind):
        def judge(self, images):
            try:
                return super().judge(images)
            except RuntimeError:
                return [{"object": {"none": float("nan"), "cat": float("nan")}}]

    report = attack(pipe, "cat", "encoder", folder=tmp_path / "vague", judge=Vague(), **QUICK)
    assert report.plain == 3 and "no finite score for some labels of object" in report.faults[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": "unlearndifatk"}, "unlearndiffatk"),
        ({"budget": "huge"}, "lite, full|lite.*full"),
        ({"cases": 1}, "at least 2"),
        ({"settings": {"tokns": 3}}, "tokens"),
        ({"settings": {"tokens": "many"}}, "expected int"),
        ({"attacks": ["p4d", "uma"], "settings": {"tokens": 3}}, "single attack"),
        ({"prompts": PromptSet("dogs", [Prompt("a", "a dog", 0, None, {"object": "dog"})])}, "has no prompt for cat"),
    ],
)
def test_bad_input(pipe, tmp_path, change, message):
    options = {"attacks": "p4d", "folder": tmp_path, "judge": Likeness(), **QUICK, **change}
    with pytest.raises(ErasureError, match=message):
        attack(pipe, "cat", **options)
    assert not list(tmp_path.iterdir())
