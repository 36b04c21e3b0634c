"""White-box metrics compared with explicit formulas, for patches that change known parts; nothing is left changed."""

from __future__ import annotations

import json

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Victim
from erasure.evaluation.evaluate import evaluate
from erasure.evaluation.metrics.white_box import closed_form_leak, compare_predictions, measure_white_box, other_words
from erasure.model import presets
from erasure.model.conditioning import Conditions
from erasure.patch import Delta
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch, low_rank_patch, patch_of, same, weights
from tests.tiny import SIDE, tiny_pipeline

KEPT = ["a dog", "a tree in blue", "a car"]
QUICK = {"images": 4, "steps": 2, "words": ["dog", "tree"]}


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def test_without_patches_nothing_differs_from_the_base(pipe):
    metrics = measure_white_box(pipe, "cat", KEPT, **QUICK).metrics
    assert metrics["drift_target"].value == metrics["drift_kept"].value == 0
    assert metrics["margin"].value == metrics["margin_base"].value != 0
    assert (metrics["closed_leak"].value, metrics["closed_leak"].n) == (1, 2)


@pytest.mark.parametrize("gate", [None, {"kind": "text"}], ids=["always", "gated"])
def test_weights_gates_and_gradient_flags_are_restored(pipe, gate):
    clean = weights(pipe)
    if gate:
        pipe.load_patch(low_rank_patch(pipe, part="", size=1.0, gate=gate), name="p", strength=0.7)
    else:
        pipe.load_patch(delta_patch(pipe, size=0.5), name="p", strength=0.7)
    before, switches = weights(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    white_box = measure_white_box(pipe, "cat", KEPT, **QUICK)
    assert same(before, weights(pipe)) and switches == [p.requires_grad for p in pipe.unet.parameters()]
    assert pipe.get_list_patches()["p"]["strength"] == 0.7
    assert white_box.folded == (("p",) if gate else ())
    assert white_box.metrics["drift_kept"].value > 0 and white_box.metrics["drift_target"].n == 4
    repeated = measure_white_box(pipe, "cat", KEPT, **QUICK)
    assert repeated.metrics == white_box.metrics
    pipe.unload_patches()
    assert same(clean, weights(pipe))


def test_the_cost_counts_every_forward(pipe):
    pipe.load_patch(delta_patch(pipe), name="p")
    costs = measure_white_box(pipe, "cat", KEPT, **QUICK).costs
    # 8 pictures of 2 guided steps; 4 timesteps: the target's under 2 prompts of 2 models, the kept under 1 of 2.
    assert (costs.forward, costs.backward) == (8 * 2 * 2 + 4 * 4 * 4 + 4 * 4 * 2, 0)


def test_the_batch_size_changes_rounding_only(pipe):
    pipe.load_patch(delta_patch(pipe, size=0.5), name="p")
    small, large = (measure_white_box(pipe, "cat", KEPT, batch_size=size, **QUICK).metrics for size in (3, 16))
    for name, metric in small.items():
        assert large[name].value == pytest.approx(metric.value, rel=1e-3, abs=1e-6)


def test_drift_and_margin_against_known_answers(pipe, monkeypatch):
    """A UNet that predicts k x: k is 1 for the prompt and 2 for the anchor, and three times as much when erased."""
    victim = Victim(pipe, switched_off)
    pipe.load_patch(delta_patch(pipe), name="p")
    prompts = ["a cat", "a dog", "a car"]
    drawn = torch.randn(3, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    calls = []

    def states(texts):
        return Conditions(torch.tensor([1.0 if text in prompts else 2.0 for text in texts]))

    def eps(x, t, k):
        erased = pipe.get_list_patches()["p"]["strength"]
        calls.append((t, erased))
        return x * (k.states * (3 if erased else 1)).view(-1, 1, 1, 1)

    monkeypatch.setattr(victim, "conditions", states)
    monkeypatch.setattr(victim, "eps", eps)
    predictions = compare_predictions(victim, drawn, prompts, ["a", "a", "a"], torch.Generator().manual_seed(0), 5)
    assert torch.allclose(predictions.drift, torch.full((3, 4), 4.0))  # (3 - 1)^2
    erased, base = predictions.margin
    # || e - k' x ||^2 - || e - k x ||^2 = (k'^2 - k^2) x.x - 2 (k' - k) e.x, so with base (1, 2), erased (3, 6):
    # base = 3 xx - 2 ex, erased = 27 xx - 6 ex; and x at the lowest noise is the picture, of known length.
    xx = (erased - 3 * base) / 18
    assert (xx > 0).all()
    t = torch.cat([t for t, _ in calls])[:12].view(3, 4)
    signal = pipe.scheduler.alphas_cumprod[t]
    noise = (3 * xx - base) / 2  # mean of e x = sqrt(a) e.x0 + sqrt(1 - a) e.e
    expected = signal * drawn.square().mean((1, 2, 3))[:, None] + (1 - signal)  # in expectation
    assert torch.allclose(xx, expected, rtol=0.35)
    assert torch.allclose(noise, (1 - signal).sqrt(), atol=0.35)
    assert ((t // 250) == torch.arange(4)).all()  # one timestep in each quarter


def readers_of(pipe):
    return {p: m for p, m in pipe.unet.named_modules() if p.endswith(("attn2.to_k", "attn2.to_v"))}


def load_readers(pipe, change):
    changes = {f"{path}.weight": change(module.weight.detach()) for path, module in readers_of(pipe).items()}
    pipe.load_patch(patch_of(pipe, Delta({"unet": changes})), name="p")


def test_the_closed_form_leak_of_scaled_and_random_changes(pipe):
    concept, victim = Concept("cat", anchor="a dog"), Victim(pipe, switched_off)
    load_readers(pipe, lambda weight: -0.75 * weight)
    assert closed_form_leak(victim, concept, ["tree", "van gogh"]) == pytest.approx([0.25, 0.25], rel=1e-4)
    assert closed_form_leak(victim, concept, []) == []
    pipe.unload_patches()
    with torch.no_grad():
        states = victim.conditions(["tree", "a dog"]).states

        def length():
            return sum((m(states[0]) - m(states[1])).square().sum() for m in readers_of(pipe).values()).sqrt()

        before = length()
        pipe.load_patch(delta_patch(pipe, part="attn2.to_", size=0.5), name="p")
        expected = float(length() / before)
        assert closed_form_leak(victim, concept, ["tree"]) == pytest.approx([expected], rel=1e-4) and expected > 1.1


def test_a_word_mapped_to_the_anchor_leaks_nothing(pipe):
    concept, victim = Concept("cat", anchor="a dog"), Victim(pipe, switched_off)
    with torch.no_grad():
        states = victim.conditions(["tree", "a dog"]).states.double()
    apart = states[0] - states[1]
    onto = (torch.linalg.pinv(apart) @ apart).float()  # onto the span of the differences
    load_readers(pipe, lambda weight: -weight @ onto)
    tree, church = closed_form_leak(victim, concept, ["tree", "church"])
    assert tree == pytest.approx(0, abs=1e-4) and church > 0.01


def test_a_text_encoder_patch_changes_drift_and_leak(pipe):
    pipe.load_patch(delta_patch(pipe, part="layers", component="text_encoder", size=0.5), name="p")
    metrics = measure_white_box(pipe, "cat", KEPT, **QUICK).metrics
    assert metrics["closed_leak"].value != pytest.approx(1, abs=1e-3) and metrics["drift_target"].value > 0


def test_a_report_contains_the_white_box_metrics_of_base_and_patch(pipe, tmp_path):
    pipe.load_patch(delta_patch(pipe, size=0.5), name="p")
    before = weights(pipe)
    words = [(f"r{i}", f"a {o}", o) for i, o in enumerate(["cat", "dog"] * 3)]
    rows = PromptSet("tiny", [Prompt(key, text, 0, None, {"object": o, "style": "flat"}) for key, text, o in words])
    options = {"prompts": rows, "steps": 2, "progress": False, "judge": BrightnessJudge()}
    report = evaluate(pipe, "cat", folder=tmp_path, within=True, **options)
    assert same(before, weights(pipe))
    metrics = {name: report.metric(name) for name in ("drift_target", "drift_kept", "margin")}
    assert report.metric("drift_kept", "base").value == 0 < metrics["drift_kept"].low <= metrics["drift_kept"].value
    assert report.metric("margin", "base").value != metrics["margin"].value and metrics["margin"].n == 12
    data = json.loads((tmp_path / "report.json").read_text())
    assert {row["name"] for row in data["rows"]["base"]} >= set(metrics) and data["provenance"]["inside"]["costs"]["F"]
    page = (tmp_path / "report.html").read_text()
    assert all(name in page and name in report.text() for name in metrics)
    plain = evaluate(pipe, "cat", folder=tmp_path / "plain", **options)
    assert plain.metric("margin") is None


def test_words_of_the_vocabulary():
    words = presets.vocabulary("glyph")
    assert other_words(Concept.of("cat"), words) == ("kitten", "feline")
    assert other_words(Concept("cat", aliases=("kitten",), anchor="feline"), words) == ()
    assert "silhouette" in other_words(Concept.of("ink"), words) and other_words(Concept("zebra"), words) == ()
    assert other_words(Concept.of("cat"), None) == ()


def test_base_latents_do_not_depend_on_patches(pipe):
    victim, arguments = Victim(pipe, switched_off), (KEPT, [5, 6, 9], 2, 2, 3.0)
    expected = victim.base_latents(*arguments)
    pipe.load_patch(delta_patch(pipe, size=1.0), name="p")
    assert torch.equal(victim.base_latents(*arguments), expected) and len(expected) == 3


@pytest.mark.parametrize(
    ("change", "message"), [({"kept": []}, "at least one"), ({"kept": "a dog"}, "list"), ({"images": 1}, "at least 2")]
)
def test_bad_input(pipe, change, message):
    with pytest.raises(ErasureError, match=message):
        measure_white_box(pipe, "cat", **{"kept": KEPT, **QUICK, **change})
