"""The folder `space/` is a Space as Hugging Face reads it: a card with its settings, requirements, and the page."""

from __future__ import annotations

import runpy
from pathlib import Path

import yaml

from erasure.app import server

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
