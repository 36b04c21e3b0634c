"""Pages in a headless browser, as wide as a phone and a desktop: nothing overflows, fails or is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erasure.benchmark.row import Cell, Row
from erasure.benchmark.run import write
from erasure.benchmark.table import Table
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.detections import DetectionCount
from erasure.evaluation.metrics.gate_activity import GateActivity
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.report.certificate_page import certificate_page
from erasure.evaluation.report.html import Shot
from erasure.evaluation.report.pdf import print_pdf
from erasure.evaluation.report.report import Report
from erasure.evaluation.report.verification_page import verification_page
from erasure.evaluation.report.writer import write_attack_report, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WINDOWS = {"phone": (390, 844), "desk": (1280, 800)}
LIMIT = 300  # seconds; the start of a browser on a busy machine
LONG = "a very long prompt about a cat in the style of somebody whosenameisonewordwithoutanyplacewhereitmightbreak"

METRICS = ("UA", "IRA", "CRA", "CLIP_target", "quality", "leak", "neighbours", "H")

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome (Debian: apt install chromium)"
)

# Runs in the frame around the page, never in the page: what a reader would see there.
MEASURE = """
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, first = page.querySelector("p");
  const images = [...page.images], over = () => page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const inView = (element) => {
    const box = element.getBoundingClientRect();
    return box.bottom > box.top && box.top >= 0 && box.bottom <= view.innerHeight && box.right <= view.innerWidth;
  };
  const frameStyle = view.getComputedStyle(page.body), box = page.body.getBoundingClientRect();
  const right = box.right - parseFloat(frameStyle.paddingRight) + 1;
  const scrolls = (element) =>
    !element.closest("details:not([open])") &&
    (element.scrollWidth > element.clientWidth + 1 || element.getBoundingClientRect().right > right);
  const name = (element) => `${element.tagName}.${element.className} ${element.textContent.slice(0, 40)}`;
  const before = over(), inner = [...page.body.querySelectorAll("div, table, section")].filter(scrolls).map(name);
  const tiles = [...page.querySelectorAll(".tile strong")].filter(inView).length;
  const covered = [...page.querySelectorAll(".tile *")].filter((element) => {
    const next = element.nextElementSibling;
    return next && next.getBoundingClientRect().top < element.getBoundingClientRect().bottom - 1;
  });
  const picture = images.length > 0 && inView(images[0]);
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  return {
    over: Math.max(before, over()),
    inner: inner,
    tiles: tiles,
    covered: covered.map(name),
    picture: picture,
    width: view.innerWidth,
    room: page.documentElement.clientWidth,
    images: images.length,
    broken: images.filter(image => !(image.complete && image.naturalWidth > 0)).length,
    summary: first ? first.textContent : "",
  };
}
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) found[frame.id] = look(frame);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def look(page: Path, folder: Path) -> tuple[dict[str, dict], list[str]]:
    """Return what each window shows of a page, and the messages of the console."""
    folder.mkdir(parents=True, exist_ok=True)
    text = escape(page.read_text(encoding="utf-8"))
    frames = [
        f'<iframe id="{name}" width="{width}" height="{height}" srcdoc="{text}"></iframe>'
        for name, (width, height) in WINDOWS.items()
    ]
    around = folder / "around.html"
    around.write_text(
        f'<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>{MEASURE}</script>{"".join(frames)}',
        encoding="utf-8",
    )
    command = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *(
            "--no-first-run",
            "--disable-background-networking",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
        ),
        *("--virtual-time-budget=20000", "--dump-dom", around.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, encoding="utf-8")
    match = re.search(r'<pre id="found">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert match, f"the browser gave no answer: {done.stderr[-2000:]}"
    messages = [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
    return json.loads(unescape(match[1])), messages


def check(page: Path, folder: Path, images: int, summary: str, tiles: int = 3) -> None:
    windows, messages = look(page, folder)
    assert not messages
    for name, (width, _) in WINDOWS.items():
        window = windows[name]
        assert window["width"] == window["room"] == width, name
        assert window["over"] <= 0, f"{name}: {window['over']} px too wide"
        assert window["inner"] == [], f"{name}: these parts scroll sideways"
        assert window["covered"] == [], f"{name}: lines of a tile lie on each other"
        assert window["images"] == images and window["broken"] == 0, name
        assert summary in window["summary"] and window["tiles"] == tiles, name
        assert window["picture"], f"{name}: the first image is below the fold"


def test_the_page_of_an_evaluation(tmp_path):
    def metric(name, value):
        return Metric(name, value, 36, value - 0.05, value + 0.05, True, "target prompts on which it is not seen")

    labels = ["cat", "crossed swords", "a label that is rather long for its place", *(f"object {i}" for i in range(30))]
    report = Report(
        concept=("cat",),
        domain="object",
        rows={row: [metric(name, 0.9) for name in METRICS] for row in ("base", "patched")},
        accuracies={row: {"object": {label: (2, 3) for label in labels}} for row in ("base", "patched")},
        paired={key: {"only_base": 3, "only_patched": 12, "p": 1.2e-17} for key in ("target", "object", "quality")},
        provenance={
            "prompts": {"name": "tiny", "sha256": "0" * 64},
            "patches": {"p": 1.0},
            "loaded": {"p": {"method": "any", "gate": "text", "strength": 1.0}},
        },
        faults=["r1: the image is missing or broken"],
        missing=[
            "lpips alex: put alexnet-owt-7be5be79.pth (https://download.pytorch.org/models/alexnet-owt-7be5be79.pth)"
        ],
        counts=[DetectionCount("nudity_parts@nudenet", "FEMALE_GENITALIA_EXPOSED", "target", 0.45, 100, 1, 142)],
        gates=[
            GateActivity("a-patch-with-a-long-name", "text", which, 20, 36, 0.5, 0, 1.5) for which in ("target", "kept")
        ],
    )
    pairs = []
    for i in range(6):
        record = Record(f"r{i}", LONG if i % 2 else "a cat", i, 2, 1.0, "", {"object": "cat"}, {"p": i / 5})
        for folder in (tmp_path / "base", tmp_path / "patched"):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            if i:  # the first is missing
                noise(i).save(folder / "images" / f"r{i}.png")
        pairs.append((record, i < 3))
    write_report(report, tmp_path, pairs, tmp_path / "base")
    check(tmp_path / "report.html", tmp_path / "look", 20, "absent from 90% of 36 target images")


def test_the_page_of_attacks(tmp_path):
    cases = [f"case-{i}" for i in range(10)]
    outcomes = [
        Outcome(
            name,
            "weights",
            "somewhere",
            {},
            10,
            1,
            {"case-1": 1},
            4,
            None,
            {},
            None,
            {case: f"{LONG} {LONG}" for case in cases},
            {"F": 1e5, "B": 5e4},
        )  # fmt: skip
        for name in ("random", "an-attack-with-a-long-name")
    ]
    report = AttackReport(("cat",), "object", 10, 12, 1, outcomes, {"cases": cases, "sha256": "0" * 64})
    for attacked in outcomes:
        (tmp_path / attacked.name).mkdir()
        for i, case in enumerate(cases):
            noise(i).save(tmp_path / attacked.name / f"{case}.png")
    write_attack_report(report, tmp_path, {"base": [noise(i) for i in range(10)]})
    # Eight columns of the base and an attack, and ten images of each attack.
    check(tmp_path / "report.html", tmp_path / "look", 36, "for 1 of 10 prompts")


def test_the_page_of_a_verification(tmp_path):
    cell = {"value": 0.9, "low": 0.85, "high": 0.95, "n": 36, "base": 0.5, "higher_is_better": True, "meaning": LONG}
    attacked = {**cell, "before": 0.0, "control": 0.1, "access": "weights", "tries": 3}
    results = {
        "concept": ["cat", "a label that is rather long for its place"],
        "metrics": {name: cell for name in METRICS},
        "attacks": {"random": attacked, "an-attack-with-a-long-name": {**attacked, "value": 1.0, "control": None}},
    }
    shots = {
        "Prompts for cat, the least erased": [Shot({"base": noise(1), "patched": None}, LONG, "seen: cat")] * 4,
        "Back under attack": [Shot({"attacked": noise(2)}, LONG, "at try 1", frozenset({"attacked"}))] * 2,
        "Other prompts": [],
    }
    page = tmp_path / "report.html"
    page.write_text(verification_page(results, shots), encoding="utf-8")
    # One image of each target pair is missing.
    check(page, tmp_path / "look", 6, "What is left: all images and figures · What came back", tiles=4)


def test_a_certificate(tmp_path):
    name = "Somebody whose name is rather long, and " + LONG
    cell = {"value": 0.9, "low": 0.85, "high": 0.95, "n": 36}
    attacked = {**cell, "before": 0.0, "control": 0.1, "access": "weights", "adapted": {"tries": 9}}
    statement = {
        "issued": "2026-01-02",
        "removed": [{"name": name, "aliases": [LONG], "kind": "object"}],
        "model": {"name": "owner/a-model-with-a-long-name-" + "x" * 60, "sha256": "0" * 64},
        "patch": {
            **{"file": f"{'p' * 60}.safetensors", "sha256": "0" * 64, "base": "b", "method": "m", "gate": "text"},
            **{"parameters": 10**9, "components": {"unet": 1, "text_encoder": 1}},
        },
        "before": {"UA": cell},
        "results": {
            "metrics": dict.fromkeys(METRICS, cell),
            "attacks": dict.fromkeys(("unlearndiffatk", "inversion", "an-attack-with-a-long-name"), attacked),
            "how": {"prompts": {"used": 100}, "judge": {"name": "a-judge"}},
        },
        "repeat": ["pip install erasure-diffusion", f"erasure verify {'p' * 60}.safetensors --attack {'a' * 80}"],
        "key": {"fingerprint": "SHA256:" + "x" * 43},
    }
    shots = {
        "target": [Shot({"base": noise(1), "patched": None}, LONG, "seen: cat")] * 4,
        "other": [Shot({"base": noise(3), "patched": noise(4)}, LONG, "seen: cat")] * 4,
        "back": [Shot({"attacked": noise(2)}, LONG, "at try 1", frozenset({"attacked"}))] * 2,
    }
    page = tmp_path / "certificate.html"
    page.write_text(certificate_page(statement, shots), encoding="utf-8")
    windows, messages = look(page, tmp_path / "look")
    assert not messages
    for name in WINDOWS:
        assert windows[name]["over"] <= 0 and windows[name]["inner"] == [], name
        assert windows[name]["images"] == 4 + 8 + 2 and windows[name]["broken"] == 0
    pdf = tmp_path / "certificate.pdf"
    assert print_pdf(page, pdf) and pdf.read_bytes().startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page[^s]", pdf.read_bytes())) <= 2


def draw(*places: Path | str) -> None:
    """Leave the images of two prompts in two folders, and their records in the first."""
    *folders, name = places
    for folder in folders:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for identity in ("t", "k"):
            noise(1).save(folder / "images" / f"{identity}.png")
    records = [{"id": "t", "labels": {"object": name}}, {"id": "k", "labels": {"object": "cow"}}]
    (folders[0] / "records.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_the_page_of_the_benchmark(tmp_path):
    rows = []
    names = ["dog", "santa claus", "an object with a rather long name", *(f"object {i}" for i in range(25)), "dog+cat"]
    labels = {label: [2, 3] for name in names for label in name.split("+")}
    report = {
        "domain": "object",
        "accuracies": {"base": {"object": labels}, "patched": {"object": {key: [1, 3] for key in labels}}},
        "provenance": {"judge": {"name": "glyph", "classifier": "0" * 64}},
        "gates": [GateActivity("p", "text", which, 20, 36, 0.5, 0, 1.5).to_json() for which in ("target", "kept")],
        "paired": {key: {"only_base": 3, "only_patched": 9, "p": 0.1} for key in ("target", "object", "quality")},
    }
    for method in ("first", "second", "a-method-with-a-long-name"):
        for i, name in enumerate(names):
            cells = {
                key: Cell(0.5 + i / 60, 0.4, 1.0, 16, 0.1)
                for key in ("UA", "quality", "leak", "IRA", "CRA", "H", "CLIP_kept")
            }
            rows.append(Row(method, name, "object", i == 0, cells, {"F": 5000, "B": 3000, "seconds": 70}, 30_000_000))
            place = tmp_path / method / name.replace(" ", "-")
            place.mkdir(parents=True)
            (place / "report.json").write_text(json.dumps({**report, "concept": name.split("+")}))
            if i == 1:
                draw(place / "patched", tmp_path / "base", name)
    write(Table(rows, {"limit": None}), tmp_path)
    # A target prompt and a kept one by the base and by three methods, and all images side by side.
    check(tmp_path / "bench.html", tmp_path / "look", 9, "3 methods, 29 concepts, 87 runs")


def test_a_bad_page_is_recognised(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><div style="height:900px;width:600px">too wide for a phone</div><p>late</p>'
        '<div style="overflow-x:auto"><p style="width:500px">scrolls</p></div>'
        '<img src="data:image/png;base64,AAAA"><script>console.error("trouble")</script>'
    )
    windows, messages = look(page, tmp_path / "look")
    assert windows["phone"]["over"] > 200 and windows["desk"]["over"] <= 0
    assert windows["phone"]["broken"] == 1 and not windows["phone"]["picture"] and windows["phone"]["tiles"] == 0
    assert [part[:4] for part in windows["phone"]["inner"]] == ["DIV.", "DIV."] and not windows["desk"]["inner"]
    assert any("trouble" in line for line in messages)
