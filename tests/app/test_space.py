"""The folder `space/` is a Space as Hugging Face reads it: a card with its settings, requirements, and the page."""

from __future__ import annotations

import os
import runpy
import shutil
import socket
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from erasure.app import server
from tests.building import copied, listed, run, wheel_of

SPACE = Path(__file__).resolve().parents[2] / "space"


def test_the_card_names_the_file_that_serves_the_page(monkeypatch):
    settings = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert settings["sdk"] == "gradio" and str(settings["sdk_version"]).startswith("6.")
    assert len(settings["short_description"]) <= 60  # the hub's limit
    asked: dict = {}
    monkeypatch.setattr(server, "serve_public", lambda **options: asked.update(options))
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    runpy.run_path(str(SPACE / settings["app_file"]))
    assert asked == {"port": 7999}


def test_the_requirements_are_the_extra():
    assert (SPACE / "requirements.txt").read_text().split() == ["erasure-diffusion[app]"]


def test_the_host_installs_a_gradio_that_the_extra_takes():
    settings = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    needed = [Requirement(text) for text in requires("erasure-diffusion") or []]
    (gradio,) = (one for one in needed if one.name == "gradio" and one.marker.evaluate({"extra": "app"}))
    assert gradio.specifier.contains(str(settings["sdk_version"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the client, which runs in threads
def test_the_folder_runs_as_its_host_runs_it(tmp_path):
    """With the folder's files alone, and the requirements resolved against a wheel of this checkout."""
    pytest.importorskip("gradio", reason="pip install 'erasure-diffusion[app]'")
    import httpx

    from tests.app.calling import Caller

    source = copied([name for name in listed() if name.startswith("erasure/") or "/" not in name], tmp_path / "source")
    site, space = str(tmp_path / "site"), tmp_path / "space"
    offline = ("--quiet", "--no-index", "--find-links", str(wheel_of(source, tmp_path).parent))
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        *offline,
        "--no-deps",
        "--target",
        site,
        "erasure-diffusion",
        folder=tmp_path,
    )
    shutil.copytree(SPACE, space)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": site, "TMPDIR": str(tmp_path), "GRADIO_SERVER_PORT": str(port)}
    options = {"cwd": space, "env": environment, "stdout": subprocess.PIPE, "text": True}
    resolve = [sys.executable, "-m", "pip", "install", *offline, "--dry-run", "-r", "requirements.txt"]
    assert subprocess.run(resolve, check=False, **options).returncode == 0  # what the wheel and its extra need is there
    where = subprocess.run([sys.executable, "-c", "import erasure; print(erasure.__file__)"], check=True, **options)
    assert where.stdout.startswith(site)
    process = subprocess.Popen([sys.executable, "app.py"], **options)
    try:
        assert process.stdout.readline() == f"http://0.0.0.0:{port}\n"
        page = httpx.get(f"http://127.0.0.1:{port}/", headers={"host": "somebody-erasure.hf.space"})
        assert page.status_code == 200 and "Erasure" in page.text
        tab = Caller(f"http://127.0.0.1:{port}")
        shown = list(tab.press("erase", "cat", "uce", "", ""))
        assert "Done: cat (uce)" in shown[-1] and any("acted at 1.00 of 1.00" in text for text in shown)
        tab.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
