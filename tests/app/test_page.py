"""The page as readers meet it: in a Chromium at the width of a phone and of a desktop, and over plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from erasure.app.server import LOGIN
from erasure.config import CACHE_VARIABLE
from erasure.patch import Patch
from tests.app.chromium import PROGRAM, Browser

pytest.importorskip("gradio", reason="pip install 'erasure-diffusion[app]'")
PHONE, DESK = 390, 1280
NAME = "cat (uce)"
clicked = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium, chromium-browser or google-chrome (Debian: apt install chromium)"
)
# The command, with images of few steps.
SERVE = """
import sys
from dataclasses import replace
from erasure.app import comparison
from erasure.cli.main import main

own = comparison.sampling_of
comparison.sampling_of = lambda pipe: replace(own(pipe), steps=6)
sys.exit(main(["app", "--port", "0", "--device", "cpu", *sys.argv[1:]]))
"""


@contextmanager
def served(folder, *options, end=signal.SIGINT):
    """Serve the page in a process of its own, whose files lie in a folder."""
    environment = {key: value for key, value in os.environ.items() if key != LOGIN}
    environment |= {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", CACHE_VARIABLE: str(folder / "cache")}
    command = [sys.executable, "-c", SERVE, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("Open http://127.0.0.1:"), line
        (own,) = folder.glob("erasure-app-*")
        yield SimpleNamespace(address=line.split()[1], folder=own, cache=folder / "cache")
        process.send_signal(end)
        process.wait(60)
        assert list(folder.glob("erasure-app-*")) == []  # no files are left
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page for the tests of this file."""
    with served(tmp_path_factory.mktemp("page")) as page:
        yield page


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "browser") as browser:
        yield browser


def images(tab, place: int) -> list[str]:
    """The images before (0) or after (1), as addresses that hold their bytes."""
    return tab.run(f"[...document.querySelectorAll('#pair figure')[{place}].querySelectorAll('img')].map(i => i.src)")


def overflow(tab) -> list[str]:
    """What is wider than the window."""
    return tab.run(
        "(w => document.documentElement.scrollWidth <= w ? [] : [...document.querySelectorAll('.gradio-container *')]"
        ".filter(e => e.getBoundingClientRect().right > w + 1).map(e => `${e.tagName}.${e.className}`).slice(0, 5)"
        ".concat(`${document.documentElement.scrollWidth} px`))(document.documentElement.clientWidth)"
    )


def choose(tab, field: str, words: str) -> None:
    """Choose the option of a drop-down that begins with some words."""
    tab.click(f"{field} input")
    found = f"[...document.querySelectorAll('ul[role=listbox] li')].find(e => e.innerText.trim().includes('{words}'))"
    tab.wait(f"!!{found}")
    tab.run(f"{found}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")


@clicked
@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_stranger_erases_a_concept_by_clicks(page, browser, width):
    tab = browser.open(page.address, width)
    tab.wait("document.querySelectorAll('#pair img').length === 4")
    assert "Nothing is erased yet" in tab.read("#pair") and overflow(tab) == []
    assert not tab.run("!!document.querySelector('#which')?.getClientRects().length")
    before = images(tab, 0)
    tab.wait("document.querySelector('#forecast').innerText.includes('no training')")
    tab.click("#erase")
    tab.wait(f"document.querySelector('#status').innerText.includes('Done: {NAME}')")
    after = images(tab, 1)
    assert images(tab, 0) == before and len(after) == 4 and not set(after) & set(before)
    boxes = tab.run("[...document.querySelectorAll('#pair figure')].map(e => e.getBoundingClientRect().y)")
    assert boxes[0] == boxes[1]  # side by side, on a phone too
    assert "acts on every prompt" in tab.read("#readings") and "acted at 1.00 of 1.00" in tab.read("#readings")
    assert overflow(tab) == []

    tab.click("#strength-0 input[type=range]", across=0.0)
    tab.wait("document.querySelector('#readings').innerText.includes('of 0.00')")
    assert images(tab, 1) == before
    tab.click("#strength-0 input[type=range]", across=0.25)
    tab.wait("/acted at 0\\.[1-9]/.test(document.querySelector('#readings').innerText)")
    assert images(tab, 1) not in (before, after)

    tab.type("#prompt textarea, #prompt input", 'a dog & "<b>two</b>" cats')
    tab.wait("document.querySelector('#readings').innerText.includes('dog')")
    assert 'Gates on “a dog & "<b>two</b>" cats”' in tab.read("#readings") and images(tab, 0) != before

    tab.click("#file-0")
    (file,) = browser.downloaded(1)
    assert file.suffix == ".safetensors" and Patch.load(file).names == ["cat"]
    tab.click("#remove-0")
    tab.wait("document.querySelector('#pair').innerText.includes('Nothing is erased yet')")
    assert tab.messages() == []
    assert [one for one in tab.asked() if not one.startswith((page.address, "data:", "blob:"))] == []
    assert overflow(tab) == []


@clicked
@pytest.mark.slow
def test_people_queue_and_a_closed_tab_stops_its_run(page, browser):
    first = browser.open(page.address, DESK)
    first.wait("document.querySelectorAll('#pair img').length === 4")
    first.click("#more button")
    choose(first, "#method", "esd")
    first.wait("document.querySelector('#forecast').innerText.includes('backward passes')")
    first.click("#erase")
    first.wait("document.querySelector('#status').innerText.includes('Erasing cat with esd')")
    first.wait("document.querySelector('#live img')")  # a preview
    (state,) = page.cache.glob("app/runs/*/*.run")
    second = browser.open(page.address, PHONE)
    second.wait("document.querySelector('#status')?.innerText.includes('Waiting: 1 before you')")
    first.close()
    second.wait("document.querySelectorAll('#pair img').length === 4")
    assert state.is_dir() and not list(state.parent.glob("*.safetensors"))


@clicked
@pytest.mark.slow
def test_measure_and_attack_open_their_reports(page, browser):
    tab = browser.open(page.address, PHONE)
    tab.wait("document.querySelectorAll('#pair img').length === 4")
    tab.click("#erase")
    tab.wait(f"document.querySelector('#status').innerText.includes('Done: {NAME}')")
    tab.run("[...document.querySelectorAll('button[role=tab]')].find(e => e.innerText === 'Measure').click()")
    tab.click("#measure")
    tab.wait("document.querySelector('#measured iframe')", 400)
    assert "gone" in tab.read("#measured") and "95 % interval" in tab.read("#measured") and overflow(tab) == []
    tab.run("[...document.querySelectorAll('button[role=tab]')].find(e => e.innerText === 'Attack').click()")
    tab.click("#try-attack")
    tab.wait("document.querySelector('#attacked .era-live img')", 400)  # while it runs
    tab.wait("document.querySelector('#attacked iframe')", 400)
    assert "back under rece" in tab.read("#attacked") and overflow(tab) == []
    assert tab.messages() == []


@pytest.mark.slow
def test_the_page_keeps_its_handlers_to_itself(tmp_path):
    """No handler is offered to programs, and Gradio reports nothing to anybody."""
    code = (
        "import json\n"
        "from erasure.app.models import Models\n"
        "from erasure.app.page import build\n"
        "from erasure.app.visits import Visits\n"
        "page = build(Models(), Visits())\n"
        "print(json.dumps(page.get_config_file(), default=str))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["dependencies"] and config["analytics_enabled"] is False
    assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}


@pytest.mark.slow
def test_nothing_of_this_machine_can_be_read_or_asked_for(page, tmp_path):
    import httpx

    secret = tmp_path / "secret.txt"
    secret.write_text("what is in the file")
    with httpx.Client(base_url=page.address) as web:
        for path in (secret, "/etc/passwd", page.folder / ".." / "x"):
            answer = web.get(f"/gradio_api/file={path}")
            assert answer.status_code in (403, 404) and "what is in" not in answer.text
        answer = web.get("/")
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
        assert web.get("/", headers={"host": "evil.example"}).status_code == 421
        assert web.get("/docs").status_code == 404
        config = web.get("/config").json()
        assert config["analytics_enabled"] is False and not config.get("enable_monitoring")
        public = [one for one in config["dependencies"] if one.get("api_visibility") == "public"]
        assert public == []


@pytest.mark.slow
def test_a_login_is_asked_for_and_uploads_are_limited(tmp_path):
    import httpx

    with (
        served(tmp_path, "--login", "me:long enough", "--max-upload", "1", end=signal.SIGTERM) as page,
        httpx.Client() as web,
    ):
        for path in ("/config", "/gradio_api/queue/data?session_hash=a", "/gradio_api/info"):
            assert web.get(page.address + path).status_code == 401, path
        file = {"files": ("p.safetensors", b"x" * 1000)}
        assert web.post(f"{page.address}/gradio_api/upload", files=file).status_code == 401
        wrong = web.post(f"{page.address}/login", data={"username": "me", "password": "wrong"})
        assert wrong.status_code == 400 and web.get(f"{page.address}/config").status_code == 401
        assert web.post(f"{page.address}/login", data={"username": "me", "password": "long enough"}).status_code == 200
        assert web.get(f"{page.address}/config").status_code == 200
        assert web.post(f"{page.address}/gradio_api/upload", files=file).status_code == 200
        large = {"files": ("p.safetensors", b"x" * 2_000_000)}
        assert web.post(f"{page.address}/gradio_api/upload", files=large).status_code == 413
