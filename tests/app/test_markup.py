"""What the page shows is escaped, says what it should, and keeps scripts out of reports."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html import unescape

import pytest
from PIL import Image

from erasure.app import markup
from erasure.app.comparison import Comparison, Reading
from erasure.app.jobs import Job, Picture
from erasure.app.samples import samples
from erasure.app.tasks import Outlook
from erasure.training.dry_run import Forecast

EVIL = '<script>alert("x")</script>'
IMAGE = Image.new("RGB", (64, 64), "red")
FORECAST = Forecast(10, 5, 90.0, 10**6, 0, 0, modules=14, weights=7)


@pytest.mark.parametrize(
    "text",
    [
        markup.fault(EVIL),
        markup.note(EVIL),
        markup.gallery([Picture(IMAGE, EVIL)]),
        markup.pair(Comparison(EVIL, [IMAGE], [IMAGE], [])),
        markup.readings([Reading(EVIL, "text", 1.0, 1.0)], EVIL),
        markup.forecast(Outlook(FORECAST, [], True, [EVIL])),
    ],
)
def test_nothing_that_people_type_becomes_markup(text):
    assert "<script" not in text and "&lt;script&gt;" in text


def test_a_report_stands_in_a_frame_without_scripts(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(f"<p>Figures{EVIL}</p>")
    text = markup.report(page)
    assert 'sandbox=""' in text and "<script" not in text
    assert unescape(re.search(r'srcdoc="([^"]*)"', text)[1]) == page.read_text()
    assert base64.b64decode(re.search(r'href="data:text/html;base64,([^"]*)"', text)[1]) == page.read_bytes()


def test_the_forecast_names_time_work_and_memory():
    text = markup.forecast(Outlook(FORECAST, [], True, []))
    assert "about 90 s" in text and "10 forward and 5 backward passes" in text and "14 layers" in text
    assert "no training" in markup.forecast(Outlook(replace(FORECAST, F=0, B=0), [], False, []))
    assert "at most about 90 s" in markup.forecast(Outlook(replace(FORECAST, at_most=True), [], True, []))
    assert "not known" in markup.forecast(Outlook(replace(FORECAST, seconds=0), [], True, []))
    guard = markup.forecast(Outlook(replace(FORECAST, F=0, B=0, seconds=0, modules=0), [], False, []))
    assert "none" in guard and "no weight" in guard and "not known" not in guard


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "about 1 s"), (99, "about 99 s"), (150, "about 2 min"), (9000, "about 2.5 h")]
)
def test_durations_in_words(seconds, text):
    assert markup.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(10, "1 kB"), (148e3, "148 kB"), (63e6, "63 MB"), (1.24e9, "1.2 GB")])
def test_sizes_in_words(count, text):
    assert markup.size(count) == text


def test_gates_say_what_they_read():
    text = markup.readings([Reading("p", "text", 0.5, 0.25), Reading("q", "always", 1.0, 1.0)], "a cat")
    assert "text gate read 0.50" in text and "acted at 0.25 of 0.50" in text and "acts on every prompt" in text
    assert "because the strength is 0" in markup.readings([Reading("p", "text", 0.0, 0.0)], "a cat")
    assert markup.readings([], "a cat") == ""


def test_before_and_after_stand_side_by_side_with_words_for_every_image():
    text = markup.pair(Comparison("a cat", [IMAGE] * 2, [], []))
    assert text.count("<img") == 2 and text.count('alt="a cat, before, seed ') == 2 and "Nothing is erased yet" in text
    text = markup.pair(Comparison("a cat", [IMAGE] * 2, [IMAGE] * 2, []))
    assert text.count("<img") == 4 and text.count('alt="a cat, after, seed ') == 2 and "Nothing" not in text


def test_large_images_are_sent_compressed():
    assert markup.encoded(IMAGE).startswith("data:image/png;base64,")
    assert markup.encoded(Image.new("RGB", (512, 512))).startswith("data:image/jpeg;base64,")


def test_progress_shows_a_share_only_where_one_is_known():
    job = Job()
    job.enter("Erasing <b>", total=10)
    job.done = 5
    assert "Erasing &lt;b&gt;" in markup.progress(job) and "width:50%" in markup.progress(job)
    job.enter("Forecasting")
    assert "%" not in markup.progress(job)


def test_the_pictures_to_choose_by_are_of_what_they_say():
    """Glyph's own judge sees each of them."""
    from erasure.evaluation.judges.registry import find_judge

    shown = samples()
    verdicts = find_judge("glyph").judge([one.image.resize((64, 64)) for one in shown])
    seen = [max(verdict["object"], key=verdict["object"].get) for verdict in verdicts]
    assert sum(name == one.name for name, one in zip(seen, shown, strict=True)) >= len(shown) - 1
    assert len(shown) == 12
