"""Order of the suite: files with slow tests come first, so that two workers finish at about the same time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Keep the tests out of the user's cache."""
    os.environ["ERASURE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    heavy = {item.path for item in items if item.get_closest_marker("slow")}
    order = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}

    def place(item: pytest.Item) -> tuple[bool, int]:
        path: Path = item.path
        return path not in heavy, order[path]

    items.sort(key=place)
