"""A real browser for tests of pages: headless Chromium, spoken to over its debugging pipe, without any package.

    with Chromium() as browser:
        page = browser.open("file:///.../index.html", width=1280, height=800)
        page.evaluate("document.title")
        page.screenshot(path)

Nothing leaves the machine: background networking is off and every host name but loopback resolves to nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT = 60.0  # s, for one answer
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--no-first-run", "--mute-audio",
    "--autoplay-policy=no-user-gesture-required", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, "
    "EXCLUDE 127.0.0.1", "--remote-debugging-pipe",
)  # fmt: skip


def find() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser process with a profile of its own; both are gone after the `with` block."""

    def __init__(self) -> None:
        self.answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self._number, self._buffer = 0, b""

    def __enter__(self) -> Chromium:
        path = find()
        assert path is not None, "no Chromium here"
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads from 3 and writes to 4, whatever numbers the pipes have here.
        high = [os.dup(fd) for fd in (to_browser, from_browser)]

        def numbered() -> None:
            spare = [os.dup(os.dup(fd)) for fd in high]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self._process = subprocess.Popen(
            [path, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            preexec_fn=numbered, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_browser, from_browser, *high):
            os.close(fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            self.send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number, deadline = self._number, time.monotonic() + LIMIT
        while number not in self.answers:
            self._receive(deadline, method)
        answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self, deadline: float, what: str) -> None:
        ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{what}: no answer within {LIMIT} s")
        block = os.read(self._read, 1 << 20)
        if not block:
            raise RuntimeError(f"{what}: the browser is gone")
        *messages, self._buffer = (self._buffer + block).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self.answers[message["id"]] = message
            else:
                self.events.append(message)

    def open(self, url: str, width: int = 1280, height: int = 900, phone: bool = False) -> Page:
        """A page of this size, loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        page.send("Page.navigate", url=url)
        page.evaluate(
            f"new Promise(done => {{ const look = () => location.href.startsWith({json.dumps(url[:20])}) && "
            "document.readyState === 'complete' ? done(true) : setTimeout(look, 20); look(); })"
        )
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol to this tab."""
        return self._browser.send(method, self._session, **parameters)

    def evaluate(self, script: str) -> Any:
        """The value of an expression; a promise is awaited, again where a navigation took its page away."""
        for _ in range(5):
            try:
                found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
                break
            except RuntimeError as error:
                if "navigated" not in str(error) and "destroyed" not in str(error) and "collected" not in str(error):
                    raise
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def errors(self) -> list[str]:
        """What the page wrote to the console as an error, and exceptions that nothing caught."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        events = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the whole page, or of what is seen."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
