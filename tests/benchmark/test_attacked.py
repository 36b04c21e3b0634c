"""The table of attacked patches: what counts as recovered, tries, pooling over concepts, and comparisons in pairs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from erasure.benchmark.attacked import AttackTable, recovered
from erasure.errors import ErasureError
from erasure.evaluation.attacks.report import AttackReport, Outcome


def report(concept: str, won: dict[int, int], plain: tuple[int, ...] = (), control: dict[int, int] | None = None, n=24):
    """An attack on n cases named after the concept; `won` and `control` have the number of the case -> the try."""
    named = [{f"{concept}-{i}": k for i, k in one.items()} for one in (won, control or {})]
    costs = {"F": 10, "B": 5, "seconds": 1}
    outcome = Outcome("p4d", "text", "", {}, n, len(plain), named[0], 3, None, named[1], None, {}, costs)
    prompts = {f"{concept}-{i}": f"a {concept} {i}" for i in range(n)}
    ids = tuple(f"{concept}-{i}" for i in plain)
    return AttackReport((concept,), "object", n, n, len(plain), [outcome], {}, prompts=prompts, plain_ids=ids)


def table(**methods: dict[str, AttackReport]) -> AttackTable:
    return AttackTable(
        {(name, concept): one for name, some in methods.items() for concept, one in some.items()}, "lite"
    )


def test_what_the_plain_prompt_shows_counts_before_the_attack_and_after_it():
    one = report("dog", {1: 1, 2: 3}, plain=(0,), control={5: 1})
    found = {which: recovered(one, one.outcomes[0], which) for which in ("before", "after", "control")}
    marks = {which: {key for key, hit in hits.items() if hit} for which, hits in found.items()}
    assert marks == {"before": {"dog-0"}, "after": {"dog-0", "dog-1", "dog-2"}, "control": {"dog-0", "dog-5"}}


def test_rates_pool_the_prompts_of_all_concepts_and_do_not_fall_with_the_tries():
    full = table(esd={"dog": report("dog", {0: 1, 1: 2, 2: 3}, plain=(9,)), "owl": report("owl", {0: 3}, n=12)})
    rates = [full.rate("esd", "p4d", tries=k) for k in (1, 2, 3)]
    assert [round(rate["value"] * 36) for rate in rates] == [2, 3, 5] and rates[0]["n"] == 36
    assert rates[2]["value"] == full.rate("esd", "p4d")["value"]
    assert all(rate["low"] <= rate["value"] <= rate["high"] for rate in rates)
    assert full.rate("esd", "other") == {} and full.rate("spm", "p4d") == {}


def test_methods_are_compared_on_the_same_prompts_and_the_lower_rate_is_better():
    concepts = ("dog", "owl", "castle")
    full = table(
        weak={name: report(name, {i: 1 for i in range(20)}) for name in concepts},
        hard={name: report(name, {0: 1}) for name in concepts},
    )
    (found,) = full.comparisons
    assert (found.metric, found.better, found.worse, found.n) == ("p4d", "hard", "weak", 72) and found.significant
    assert (found.only_first, found.only_second) == (57, 0)


def test_no_attack_without_a_control_has_a_rate_of_it():
    one = report("dog", {0: 1})
    full = table(esd={"dog": replace(one, outcomes=[replace(one.outcomes[0], control=None)])})
    assert full.rate("esd", "p4d", "control") == {}
    assert "| esd | p4d | 1 | 24 | 0% [0, 14] | 4% [1, 20] |  |" in full.markdown()


def test_the_written_table_says_its_budget_and_holds_every_report():
    full = table(esd={"dog": report("dog", {0: 1, 1: 3}, control={})})
    assert "budget lite, adapted to a CPU" in full.markdown()
    assert "| esd | p4d | 4% | 4% | 8% |" in full.markdown()
    data = json.loads(json.dumps(full.to_json()))
    assert list(data["reports"]) == ["esd/dog"] and [rate["tries"] for rate in data["rates"]] == [1, 2, 3]
    assert [rate["value"] for rate in data["rates"]] == pytest.approx([1 / 24, 1 / 24, 2 / 24])
    assert "as published" in AttackTable(full.reports, "full").markdown()


def test_a_written_table_is_read_again_with_every_outcome(tmp_path):
    one = replace(report("dog", {0: 1, 1: 3}, plain=(7, 9), control={4: 2}), tried=31, faults=["a"], notes=["b"])
    full = table(esd={"dog": one, "pixel art": report("pixel art", {2: 2})})
    path = tmp_path / "attack.json"
    path.write_text(json.dumps(full.to_json()))
    read = AttackTable.from_json(path, "lite")
    assert read.reports == full.reports and read.markdown() == full.markdown()


def test_a_table_of_another_budget_or_kind_is_refused(tmp_path):
    path = tmp_path / "attack.json"
    path.write_text(json.dumps(table(esd={"dog": report("dog", {0: 1})}).to_json()))
    with pytest.raises(ErasureError, match="budget lite, not full"):
        AttackTable.from_json(path, "full")
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ErasureError, match="not a table of bench/attack.py"):
        AttackTable.from_json(path, "lite")
    with pytest.raises(ErasureError, match="not a table of bench/attack.py"):
        AttackTable.from_json(tmp_path / "missing.json", "lite")
