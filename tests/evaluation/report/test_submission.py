"""Results under eval-unlearn's names: which of our figures are its metrics, and what is left out with its reason."""

from __future__ import annotations

import pytest

from erasure.errors import ErasureError
from erasure.evaluation.report.submission import WITHOUT, file_name, submission


def metric(name, value, n=40, low=None, high=None):
    return {"name": name, "value": value, "n": n, "low": value if low is None else low, "high": high or value}


def report(*metrics, prompts="glyph-objects"):
    run = {"prompts": {"name": prompts}, "judge": {"name": "clip"}, "patches": {"a": 1.0, "b": 0.5}}
    run["loaded"] = {"a": {"method": "esd"}, "b": {"method": "uce"}, "off": {"method": "spm"}}
    return {"concept": ["nudity"], "rows": {"base": [], "patched": list(metrics)}, "provenance": run}


def attacked(*names, concept="nudity"):
    after = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 12}
    return {
        "concept": [concept],
        "attacks": {name: {"n": 12, "after": after, "settings": {"seed": 1}} for name in names},
    }


def test_every_metric_has_the_key_and_the_fields_that_eval_unlearn_reads():
    shares = metric("UA", 0.9, low=0.8, high=0.95), metric("IRA", 0.6, n=50), metric("adversarial", 0.4, n=20)
    scores = (
        metric("CLIP_kept", 31.5),
        metric("FID_reference", 17.0, n=30),
        metric("FID", 3.0),
        metric("CLIP_target", 9),
    )
    data = submission(
        report(*shares, *scores, prompts="suite-i2p"), [attacked("p4d", "ring-a-bell", "mma-diffusion", "uma")], 5.0
    )
    results = data["metric_results"]
    assert data["metric_names"] == list(results) and data["timestamp"] == 5.0 and len(data["run_id"]) == 8
    assert (data["technique_name"], data["erase_concept"]) == ("esd+uce", "nudity")
    assert {key: result["name"] for key, result in results.items()} == {
        "asr_i2p": "ASR",
        "asr_p4d": "ASR_P4D",
        "asr_mma_diffusion": "MMADiffusion_ASR",
        "asr_ring_a_bell": "ASR_RingABell",
        "err": "ERR",
        "fid": "FID",
        "clip_score": "CLIPScore",
        "ua_ira": "UA_IRA",
    }
    both = results["ua_ira"]
    assert both["value"] == pytest.approx(0.75)
    assert (both["details"]["ua_score"], both["details"]["ira_score"]) == (0.9, 0.6)
    counts = [both["details"][f"{part}_{end}"] for part in ("target", "retain") for end in ("correct", "total")]
    assert counts == [36, 40, 30, 50]
    # Harmonic mean of 0.9, 0.6 and the 60 % of adversarial images that do not show it.
    assert results["err"]["value"] == pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.6))
    assert results["err"]["details"]["adversarial"] == pytest.approx(0.6)
    i2p = results["asr_i2p"]
    assert i2p["value"] == pytest.approx(0.1) and i2p["details"]["unsafe_count"] == 4
    assert (i2p["details"]["low"], i2p["details"]["high"]) == (pytest.approx(0.05), pytest.approx(0.2))
    assert results["asr_p4d"]["value"] == 0.25 and results["asr_p4d"]["details"]["unsafe_count"] == 3
    assert results["clip_score"]["value"] == 31.5 and results["fid"]["value"] == 17.0
    assert set(data["not_measured"]) == {"tifa"}
    assert file_name(data) == "esd+uce_nudity_latest_report.json"


def test_what_was_not_measured_is_named_with_its_reason():
    data = submission(report(metric("UA", 1.0), metric("FID", 3.0), metric("FD_reference", 4.0)))
    assert data["metric_names"] == [] and data["not_measured"] == WITHOUT
    plain = submission(report(metric("UA", 1.0), metric("IRA", 0.5)))
    assert list(plain["metric_results"]) == ["err", "ua_ira"], "glyph's prompts are not those of I2P"
    assert plain["metric_results"]["err"]["details"]["adversarial"] is None
    assert plain["metric_results"]["err"]["value"] == pytest.approx(2 / 3)
    assert plain["run_id"] != data["run_id"]


def test_reports_of_another_kind_or_concept_are_refused():
    with pytest.raises(ErasureError, match="one of `erasure evaluate`"):
        submission(attacked("p4d"))
    with pytest.raises(ErasureError, match="those of `erasure attack`"):
        submission(report(), [report()])
    with pytest.raises(ErasureError, match="the attacks are on"):
        submission(report(), [attacked("p4d", concept="cat")])
