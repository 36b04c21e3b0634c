"""What changes on the page when something is pressed, without a page: the handlers yield it."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from erasure.app.events import Events
from erasure.app.parts import Parts
from erasure.app.visits import MOST_PATCHES
from erasure.formats.single_file import save_single_file
from tests.tiny import shrunk_pipeline

CAT = ("cat", "uce", None, None)


@pytest.fixture
def events(models, visits, hurried):
    """The handlers of a page whose components are their names."""
    lists = {"chips": 3, "files": 3, "rows": MOST_PATCHES, "sliders": MOST_PATCHES, "removes": MOST_PATCHES}
    names = {
        one.name: [f"{one.name}-{number}" for number in range(lists[one.name])] if one.name in lists else one.name
        for one in fields(Parts)
    }
    return Events(SimpleNamespace(update=lambda **values: values), Parts(**names), models, visits, [])


def after(steps) -> dict:
    """What the page shows at the end; of each component the last change."""
    page: dict = {}
    for updates in steps:
        page |= updates
    return page


def test_opening_the_page_shows_what_the_model_draws(events, visit):
    page = after(events.choose_model(visit, "glyph"))
    assert page["concept"]["value"] == "cat" and "ink" in page["concept"]["choices"]
    assert page["method"]["value"] == "uce" and page["later"]["visible"] is False
    assert page["prompt"] == "a cat" and page["pair"].count("<img") == 2 and "no training" in page["forecast"]
    assert [page[f"chips-{number}"]["visible"] for number in range(3)] == [True] * 3
    assert page["erase"]["interactive"] and not page["stop"]["visible"] and page["status"] == ""


def test_erasing_shows_progress_and_then_both_sides(events, visit):
    steps = list(events.erase(visit, *CAT))
    assert any("era-progress" in updates.get("status", "") for updates in steps)
    assert any(updates.get("erase") == {"interactive": False} for updates in steps)
    page = after(steps)
    assert page["pair"].count("<img") == 4 and "Done: cat (uce)" in page["status"]
    assert page["rows-0"]["visible"] and not page["rows-1"]["visible"]
    assert page["sliders-0"] == {"label": "Strength of cat (uce)", "value": 1.0}
    assert page["which"] == {"choices": ["cat (uce)"], "value": "cat (uce)"} and page["later"]["visible"]
    assert all(page[f"files-{number}"]["visible"] for number in range(3))
    assert page["erase"]["interactive"] and not page["stop"]["visible"] and visit.jobs == []


def test_strengths_and_removal_redraw(events, visit):
    full = after(events.erase(visit, *CAT))
    half = after(events.strength(0, visit, 0.5, "a cat"))
    assert half["pair"] != full["pair"] and "acted at 0.50 of 0.50" in half["readings"]
    after(events.strength(3, visit, 0.1, "a cat"))  # no such patch
    gone = after(events.remove(0, visit, "a cat"))
    assert "Nothing is erased yet" in gone["pair"] and gone["later"]["visible"] is False and gone["readings"] == ""
    assert visit.patches() == {} and after(events.remove(0, visit, "a cat"))["pair"] == gone["pair"]


def test_faults_are_shown_and_the_button_works_again(events, visit):
    page = after(events.erase(visit, "cat", "no-method", None, None))
    assert "unknown method" in page["status"] and "era-fault" in page["status"]
    assert page["erase"]["interactive"] and not page["stop"]["visible"]
    assert "1 to 500 characters" in after(events.draw(visit, ""))["readings"]
    assert "Erase something first" in after(events.measure(visit, None, 12))["measured"]  # near the button


def test_a_model_that_cannot_be_opened_leaves_the_old_one(events, visit, tmp_path):
    page = after(events.choose_model(visit, str(tmp_path)))
    assert "no model_index.json" in page["status"] and visit.model == "glyph" and "concept" not in page


def test_stopping_says_how_to_go_on(events, visit):
    steps = events.erase(visit, "cat", "esd", None, None)
    for updates in steps:
        if "Erasing cat with esd" in updates.get("status", ""):
            visit.stop()
            break
    page = after(steps)
    assert "Stopped" in page["status"] and visit.patches() == {} and page["erase"]["interactive"]


def test_a_patch_of_another_model_is_refused_and_leaves_the_stack(events, visits, visit, tmp_path):
    after(events.erase(visit, *CAT))
    (held,) = visit.held.values()
    other = tmp_path / "other.safetensors"
    replace(held.patch, base_fingerprint={"unet": "0" * 64}, stored={}).save(other)
    page = after(events.add(visit, str(other), "a cat"))
    assert "era-fault" in page["readings"] and len(visit.patches()) == 1
    good = after(events.add(visits.of("b"), str(held.path), "a cat"))
    assert good["rows-0"]["visible"] and good["pair"].count("<img") == 4


def test_a_model_in_one_file_is_opened_erased_from_and_named_in_the_patch(events, visit, tmp_path):
    path = str(tmp_path / "own.safetensors")
    save_single_file(shrunk_pipeline(), tmp_path / "own.safetensors")
    page = after(events.choose_model(visit, path))
    assert visit.model == path and ("own.safetensors", path) in page["model"]["choices"]
    assert page["concept"] == {"choices": [], "value": None} and page["picker"]["visible"] is False
    assert page["erase"]["value"] == "Erase" and page["forecast"] == page["prompt"] == page["readings"] == ""
    assert "<img" not in page["pair"] and not page["chips-0"]["visible"] and page["given"] == {"open": True}
    assert "has to be given" in page["given_note"] and page["try_attack"] == {"interactive": True}
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,object\na cat,cat\n")
    refused = after(events.attack(visit, None, "rece", 2, None, str(file), None, None))
    assert "Erase something first" in refused["attacked"]
    assert "choose the kind" in after(events.erase(visit, "cxbz", "uce", None, None))["status"]
    page = after(events.erase(visit, "Van Gogh", "uce", None, None))
    assert page["pair"].count("<img") == 4 and page["prompt"] == "a dog in Van Gogh style"
    (held,) = visit.patches().values()
    assert held.patch.base == path
    assert str(tmp_path) not in (visit.folder / f"{held.path.stem}-card.md").read_text()
