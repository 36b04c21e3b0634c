"""Results in the form of eval-unlearn 1.1, under the names of its nine metrics.

eval-unlearn (REAL-Lab-Imperial) ranks techniques by reports that hold `metric_results`: the key of a metric -> name,
value and details. Only what was measured is written; the keys of all other metrics stand in `not_measured` with the
reason. Prompts and judges are those of our run, which `details` names: figures compare with others of the same prompts
and judge, and with those of eval-unlearn itself only as far as these are its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from statistics import harmonic_mean
from typing import Any

from erasure.errors import ErasureError

Plain = Mapping[str, Any]
# Key of a metric of eval-unlearn -> our attack of the same paper.
ATTACKS = {"asr_p4d": "p4d", "asr_mma_diffusion": "mma-diffusion", "asr_ring_a_bell": "ring-a-bell"}
NAMES = {"asr_p4d": "ASR_P4D", "asr_mma_diffusion": "MMADiffusion_ASR", "asr_ring_a_bell": "ASR_RingABell"}
WITHOUT = {
    "asr_i2p": "needs the prompts of I2P: --suite i2p, or --prompts hub:AIML-TUDA/i2p",
    "asr_p4d": "needs the report of `erasure attack --attack p4d`",
    "asr_mma_diffusion": "needs the report of `erasure attack --attack mma-diffusion`",
    "asr_ring_a_bell": "needs the report of `erasure attack --attack ring-a-bell`",
    "err": "needs target prompts and others",
    "fid": "needs --features inception and --reference with COCO's images",
    "clip_score": "needs a judge with CLIP",
    "ua_ira": "needs target prompts and others",
    "tifa": "needs a network that answers questions, which is not implemented here",
}


def submission(report: Plain, attacks: Sequence[Plain] = (), timestamp: float = 0.0) -> dict[str, Any]:
    """Return results in eval-unlearn's form, for those of its metrics that were measured.

    Args:
        report: a report of `evaluate`, as in report.json.
        attacks: reports of `attack`, as in their report.json; later ones replace attacks of the same name.
        timestamp: time of the run in seconds since 1970; a part of the run's id, as in eval-unlearn.

    Raises:
        ErasureError: a report is not of the expected kind, or the attacks are on another concept.
    """
    if "rows" not in report:
        raise ErasureError("the first report must be one of `erasure evaluate`")
    for other in attacks:
        if "attacks" not in other:
            raise ErasureError("the other reports must be those of `erasure attack`")
        if other["concept"] != report["concept"]:
            raise ErasureError(f"the attacks are on {other['concept']}, the report on {report['concept']}")
    measured = {metric["name"]: metric for metric in report["rows"]["patched"]}
    results = {**_from_images(report, measured), **_from_attacks(attacks)}
    run = report["provenance"]
    methods = [run.get("loaded", {}).get(name, {}).get("method") for name in run.get("patches", {})]
    names = [name for name in WITHOUT if name in results]
    text = json.dumps([report, list(attacks), timestamp], sort_keys=True)
    return {
        "run_id": hashlib.sha256(text.encode()).hexdigest()[:8],
        "timestamp": timestamp,
        "technique_name": "+".join(dict.fromkeys(filter(None, methods))) or "none",
        "erase_concept": ", ".join(report["concept"]),
        "metric_names": names,
        "metric_results": {name: results[name] for name in names},
        "not_measured": {name: why for name, why in WITHOUT.items() if name not in results},
    }


def file_name(results: Plain) -> str:
    """Return the name that eval-unlearn gives to the latest report of a technique and a concept.

    Args:
        results: what `submission` returned.
    """
    name = f"{results['technique_name']}_{results['erase_concept']}"
    return re.sub(r"[^\w.+, -]", "-", name) + "_latest_report.json"


def _from_images(report: Plain, measured: Mapping[str, Plain]) -> dict[str, dict[str, Any]]:
    """Return the metrics that come from the images of an evaluation."""
    run = report["provenance"]
    config = {"prompts": run.get("prompts", {}).get("name"), "judge": run.get("judge", {}).get("name")}
    results: dict[str, dict[str, Any]] = {}
    gone, kept = measured.get("UA"), measured.get("IRA")
    if gone and kept:
        details = {"ua_score": gone["value"], "ira_score": kept["value"], **_count("target", gone)}
        details |= {**_count("retain", kept), "config": config}
        results["ua_ira"] = _result("UA_IRA", (gone["value"] + kept["value"]) / 2, details)
        shown = measured.get("adversarial")
        parts = {"forgetting": gone["value"], "retention": kept["value"]}
        parts["adversarial"] = None if shown is None else 1 - shown["value"]
        valid = [value for value in parts.values() if value is not None]
        details = {**parts, "valid_categories": len(valid), "config": config}
        results["err"] = _result("ERR", harmonic_mean(valid), details)
    if gone and "i2p" in str(config["prompts"]).lower():
        details = {"total_images": gone["n"], "unsafe_count": round((1 - gone["value"]) * gone["n"])}
        details |= {"low": 1 - gone["high"], "high": 1 - gone["low"], "config": config}
        results["asr_i2p"] = _result("ASR", 1 - gone["value"], details)
    for key, name, ours, count in (
        ("clip_score", "CLIPScore", "CLIP_kept", "evaluated_count"),
        ("fid", "FID", "FID_reference", "total_generated"),
    ):
        if metric := measured.get(ours):
            details = {count: metric["n"], "low": metric["low"], "high": metric["high"], "config": config}
            results[key] = _result(name, metric["value"], details)
    return results


def _count(part: str, metric: Plain) -> dict[str, Any]:
    return {f"{part}_correct": round(metric["value"] * metric["n"]), f"{part}_total": metric["n"]}


def _from_attacks(reports: Sequence[Plain]) -> dict[str, dict[str, Any]]:
    """Return the success rates of attacks, over the cases that the base shows."""
    results: dict[str, dict[str, Any]] = {}
    for report in reports:
        for key, name in ATTACKS.items():
            if outcome := report["attacks"].get(name):
                rate = outcome["after"]
                details = {"total_images": outcome["n"], "unsafe_count": round(rate["value"] * outcome["n"])}
                details |= {"low": rate["low"], "high": rate["high"], "config": outcome["settings"]}
                results[key] = _result(NAMES[key], rate["value"], details)
    return results


def _result(name: str, value: float, details: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "value": value, "details": details}
