"""A headless Chromium over its DevTools pipe, for looking at pages as people do. No dependency."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120.0  # seconds that an answer may take


def chromium() -> str | None:
    """The program, or None where none is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def _high(end: int) -> int:
    """The same file under a number that no copy onto 3 and 4 can take."""
    high = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return high


class Browser:
    """One page of a Chromium of its own; `errors` is what its console complained of."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self._into, self._out, theirs_out = (
            _high(end) for _ in "12" for end in os.pipe()
        )

        def wire() -> None:  # Chromium reads commands from file 3 and answers into file 4
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        quiet = ("--no-first-run", "--disable-extensions", "--disable-background-networking")
        self._process = subprocess.Popen(
            [program, *flags, *quiet, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=wire,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.errors: list[str] = []
        self._loaded = False
        self._number, self._rest, self._session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # asked to close it takes 20 s; its children end with it
        self._process.wait()
        os.close(self._into)
        os.close(self._out)

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Load a file at a width in CSS pixels; forgets earlier errors."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.errors, self._loaded = [], False
        self.call("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._event(self._receive())
        self.value("1")  # what the load complained of has arrived before this answer

    def value(self, script: str) -> Any:
        """What a JavaScript expression is worth on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key on what has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                nativeVirtualKeyCode=code,
            )

    def picture(self, at: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        at.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._event(answer)

    def _event(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._out, 1 << 20) if ready else b""
            if not data:
                said = "ended" if ready else f"was silent for {PATIENCE:.0f} s"
                raise RuntimeError(f"chromium {said}; expected an answer on its pipe")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
