"""A real headless Chromium, spoken to through the DevTools protocol on two pipes: no port, no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LIMIT_S = 120.0


def find_browser() -> str | None:
    """CRAB_TEST_BROWSER, or the first Chromium on the PATH."""
    named = os.environ.get("CRAB_TEST_BROWSER")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One page in one browser. Use as a context manager.

    `requests` are the URLs that the page asked for, `complaints` what it wrote to the console and the exceptions of its
    scripts; both since the last `open`.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        self._home = tempfile.mkdtemp(prefix="crab-browser-")
        # Chromium reads commands from descriptor 3 and writes answers to 4; ours must not have these numbers.
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (*os.pipe(), *os.pipe())]
        theirs_in, self._out, self._in, theirs_out = pipes

        def place() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            [
                self._program,
                "--headless=new",
                "--no-sandbox",  # as root, in containers
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--mute-audio",
                "--hide-scrollbars",
                f"--user-data-dir={self._home}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            pass_fds=(3, 4),
            preexec_fn=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = ""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._home, ignore_errors=True)

    def look(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The size of the window, and what the reader prefers."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        wish = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[wish])

    def open(self, page: Path) -> None:
        """Loads a file and waits until it and what it names at once are there."""
        self.requests.clear()
        self.complaints.clear()
        self._events.clear()
        self._ask("Page.navigate", url=page.absolute().as_uri())
        deadline = time.monotonic() + LIMIT_S
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read(deadline)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        found = self._ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, or of the part that is in the window."""
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + LIMIT_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            assert left > 0, f"the browser said nothing for {LIMIT_S:g} s"
            if select.select([self._in], [], [], left)[0]:
                part = os.read(self._in, 1 << 20)
                assert part, "the browser has ended"
                self._buffer += part
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self._note(message)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        params = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(params["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console.{params['type']}")
            case "Log.entryAdded":
                self.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")
