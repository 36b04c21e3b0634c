"""Press buttons of a page over HTTP with Gradio's own client, without a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gradio_client import Client


class Caller:
    """A tab without a browser.

    The page offers its handlers to its own script alone. The client believes that and refuses to call them, so it is
    told otherwise.

    Args:
        address: where the page is.
    """

    def __init__(self, address: str) -> None:
        self._client = Client(address, verbose=False, download_files=False)
        self._ids = {
            one["props"]["elem_id"]: one["id"]
            for one in self._client.config["components"]
            if one["props"].get("elem_id")
        }

    def load(self, model: str = "glyph") -> None:
        """Open the page, which is then told what can be chosen on it."""
        list(self._call(lambda one: one["targets"] and one["targets"][0][1] == "load", model))

    def press(self, button: str, *values: Any) -> Iterator[str]:
        """Click a button, and yield everything that the page shows from then on, as text.

        Args:
            button: its `elem_id`.
            values: of the fields that the click sends.
        """
        pressed = [[self._ids[button], "click"]]
        yield from self._call(lambda one: list(map(list, one["targets"])) == pressed, *values)

    def _call(self, found: Callable[[dict[str, Any]], bool], *values: Any) -> Iterator[str]:
        (number,) = (one["id"] for one in self._client.config["dependencies"] if one["inputs"] and found(one))
        self._client.endpoints[number].is_valid = True
        for shown in self._client.submit(*values, fn_index=number):
            yield str(shown)

    def close(self) -> None:
        """Close the tab."""
        self._client.close()
