"""A headless Chromium that clicks and types, driven by its DevTools protocol through a pipe.

No package is needed: Chromium reads commands from file descriptor 3 and writes answers and events to 4, as JSON with a
NUL at the end of each (`--remote-debugging-pipe`, https://chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT = 120.0  # seconds for anything that the page should show; a busy machine is slow


class Browser:
    """A Chromium with a profile of its own.

    Args:
        folder: where the profile and downloads go.
    """

    def __init__(self, folder: Path) -> None:
        assert PROGRAM, "no Chromium"
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        read_ours, write_theirs = os.pipe()
        read_theirs, write_ours = os.pipe()
        flags = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--mute-audio"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"),
        ]
        # The shell puts the two pipes where Chromium looks for them.
        command = f'exec "$@" 3<&{read_theirs} 4>&{write_theirs}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", PROGRAM, *flags],
            pass_fds=(read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._read, self._write = read_ours, write_ours
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *fault: object) -> None:
        os.close(self._write)  # Chromium ends with its pipe
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def send(self, method: str, session: str | None = None, limit: float = LIMIT, **values: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": values}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit
        while time.monotonic() < end:
            for answer in self.receive(end - time.monotonic()):
                if answer.get("id") == number:
                    assert "error" not in answer, f"{method}: {answer['error']}"
                    return answer["result"]
        raise TimeoutError(f"{method}: no answer in {limit:.0f} s")

    def receive(self, limit: float = 0.0) -> list[dict[str, Any]]:
        """Return the answers that have come, after keeping the events among them."""
        if select.select([self._read], [], [], max(limit, 0))[0]:
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        *whole, self._rest = self._rest.split(b"\0")
        messages = [json.loads(part) for part in whole]
        self.events += [message for message in messages if "method" in message]
        return [message for message in messages if "id" in message]

    def downloaded(self, count: int, limit: float = LIMIT) -> list[Path]:
        """Return the files that were downloaded, once there are so many."""
        end = time.monotonic() + limit
        while True:
            self.receive(0.2)
            states = [event["params"]["state"] for event in self.events if event["method"].endswith("downloadProgress")]
            if states.count("completed") >= count:
                return sorted((self.folder / "downloads").iterdir())
            assert time.monotonic() < end, f"{states.count('completed')} of {count} downloads"

    def open(self, address: str, width: int, height: int = 900) -> Tab:
        """Open an address in a new tab of a size."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.send(f"{domain}.enable")
        tab.resize(width, height)
        downloads = str(self.folder / "downloads")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=downloads, eventsEnabled=True)
        tab.send("Page.navigate", url=address)
        return tab


class Tab:
    """One tab of a browser."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser, self.target, self.session = browser, target, session

    def send(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command to this tab, and return its result."""
        return self.browser.send(method, self.session, **values)

    def close(self) -> None:
        """Close the tab, as a reader does."""
        self.browser.send("Target.closeTarget", targetId=self.target)

    def resize(self, width: int, height: int) -> None:
        """Give the window a size in pixels."""
        mobile = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def run(self, script: str) -> Any:
        """Return the value of an expression on the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, limit: float = LIMIT) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + limit
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, f"not in {limit:.0f} s: {script}\n{self.text()[-1500:]}"
            time.sleep(0.2)

    def text(self) -> str:
        """Return the text that a reader sees."""
        return self.run("document.body ? document.body.innerText : ''") or ""

    def read(self, selector: str) -> str:
        """Return the text of an element."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''") or ""

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click an element, once it can be seen, with the mouse.

        Args:
            selector: of the element.
            across: where in the element, from 0 at its left to 1 at its right.
        """
        found = json.dumps(selector)
        self.wait(f"(e => e && e.getClientRects().length && !e.disabled)(document.querySelector({found}))")
        self.run(f"document.querySelector({found}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(f"(r => [r.x, r.y, r.width, r.height])(document.querySelector({found}).getBoundingClientRect())")
        place = {"x": box[0] + box[2] * across, "y": box[1] + box[3] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **place)

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field in place of what it holds, and press Enter."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def picture(self, path: Path, whole: bool = False) -> Path:
        """Write a picture of the window, or of the whole page, as PNG."""
        options: dict[str, Any] = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            options = {"captureBeyondViewport": True, "clip": {**size, "x": 0, "y": 0, "scale": 1}}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **options)["data"]))
        return path

    def messages(self) -> list[str]:
        """Return the errors in the console and the failures of scripts."""
        self.browser.receive()
        found = []
        for event in self.browser.events:
            values = event.get("params", {})
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(values["exceptionDetails"])[:500])
            if event["method"] == "Runtime.consoleAPICalled" and values["type"] == "error":
                found.append(str([part.get("value", part.get("description")) for part in values["args"]])[:500])
            if event["method"] == "Log.entryAdded" and values["entry"]["level"] == "error":
                found.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
        return found

    def asked(self) -> list[str]:
        """Return every address that the tab has asked for."""
        self.browser.receive()
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event["method"] == "Network.requestWillBeSent" and event.get("sessionId") == self.session
        ]
