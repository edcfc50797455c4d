"""A headless Chromium driven over a pipe by the DevTools protocol, with nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from tests.patience import PATIENCE

NAMES = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")

_CHILD = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""Chromium reads commands from descriptor 3 and answers on 4."""


def find_chromium() -> str | None:
    """The path in the environment variable CHROMIUM, or the first of `NAMES` on PATH."""
    named = os.environ.get("CHROMIUM")
    return named if named else next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `events` holds what the browser said unasked: requests, messages of the console."""

    def __init__(self, executable: str, profile: Path, *, timeout: float = PATIENCE) -> None:
        self.events: list[dict[str, Any]] = []
        self._timeout, self._sent, self._received, self._session = timeout, 0, b"", None
        (child_in, own_out), (own_in, child_out) = os.pipe(), os.pipe()
        # Out of the way of 3 and 4, which the child writes over.
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (child_in, child_out)]
        for descriptor in (child_in, child_out):
            os.close(descriptor)
        self._own_in, self._own_out = own_in, own_out
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"]
        # Root cannot have Chromium's sandbox, and containers are often root; the page is ours and holds no script.
        options += ["--no-sandbox"] if os.geteuid() == 0 or os.environ.get("CI") else []
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *map(str, moved), executable, *options, "about:blank"],
            pass_fds=moved,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in moved:
            os.close(descriptor)

    def __enter__(self) -> Self:
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = None
            self.ask("Browser.close")
            self._process.wait(timeout=10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._own_in)
            os.close(self._own_out)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._own_out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path) -> None:
        """The file, loaded."""
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def resize(self, width: int, height: int = 900) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )

    def prefer(self, scheme: str, medium: str = "") -> None:
        """`light` or `dark`, on the `screen` or in `print`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=medium, features=features)

    def measure(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def picture(self, path: Path, *, top: float = 0, height: float | None = None) -> None:
        """A PNG of the page, or of the part of it that begins at `top`."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout
        while b"\0" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._own_in], [], [], left)[0]:
                raise RuntimeError(f"the browser was silent for {self._timeout:.0f} s")
            read = os.read(self._own_in, 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._received += read
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)
