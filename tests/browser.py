"""A headless Chromium, driven over two pipes by its DevTools protocol: nothing to install.

https://chromedevtools.github.io/devtools-protocol
"""

import base64
import contextlib
import fcntl
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
WAIT_SECONDS = 60.0
"""Patience on a busy machine; a page is drawn in one to five seconds."""
SIZE = (1100, 760)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--remote-debugging-pipe",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    f"--window-size={SIZE[0]},{SIZE[1]}",
)
LAUNCH = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"
"""Chromium reads descriptor 3 and writes 4."""
DARK = "--blink-settings=preferredColorScheme=0"

Message = dict[str, Any]
"""Of the protocol: JSON of many shapes."""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; pip has none")


class Browser:
    """One tab. `problems` are errors of the page, `requests` what it asked for beside itself."""

    def __init__(self, process: subprocess.Popen[bytes], to_it: int, from_it: int) -> None:
        self._process, self._to_it, self._from_it = process, to_it, from_it
        self._numbers, self._waiting = itertools.count(1), b""
        self._session, self._opened = "", ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, page: Path) -> None:
        """Opens a page and waits until it says that it has drawn."""
        self._opened = page.resolve().as_uri()
        self._call("Page.navigate", url=self._opened)
        self.wait_for("document.body && document.body.dataset.drawn")

    def ask(self, code: str) -> object:
        """The value of an expression in the page."""
        answer = self._call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, code: str) -> None:
        """Waits until an expression is true in the page."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.ask(f"!!({code})"):
            assert time.monotonic() < deadline, f"never: {code}"
            time.sleep(0.05)

    def mouse(self, kind: Literal["Moved", "Pressed", "Released"], x: float, y: float) -> None:
        """A mouse's event, at pixels of the page."""
        button = "none" if kind == "Moved" else "left"
        self._call(
            "Input.dispatchMouseEvent",
            type=f"mouse{kind}",
            x=x,
            y=y,
            button=button,
            clickCount=int(kind != "Moved"),
        )

    def click(self, x: float, y: float) -> None:
        """Moves there, presses and releases."""
        for kind in ("Moved", "Pressed", "Released"):
            self.mouse(kind, x, y)

    def pixels(self) -> NDArray[np.uint8]:
        """What is seen: (H, W, 3)."""
        content = base64.b64decode(self._call("Page.captureScreenshot")["data"])
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))

    def end(self) -> None:
        """Asks it to end, and sees to it."""
        with contextlib.suppress(OSError, AssertionError):
            self._call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, method: str, **parameters: object) -> Message:
        number = next(self._numbers)
        message: dict[str, object] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._to_it, left) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: Message = answer["result"]
                return result
            self._record(answer)

    def _receive(self) -> Message:
        while b"\0" not in self._waiting:
            readable, _, _ = select.select([self._from_it], [], [], WAIT_SECONDS)
            assert readable, "chromium does not answer"
            part = os.read(self._from_it, 1 << 20)
            assert part, "chromium has ended"
            self._waiting += part
        text, _, self._waiting = self._waiting.partition(b"\0")
        message: Message = json.loads(text)
        return message

    def _record(self, message: Message) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(str(parameters["entry"]))
            case "Network.requestWillBeSent":
                address = parameters["request"]["url"]
                if address != self._opened and not address.startswith(("data:", "blob:")):
                    self.requests.append(address)


@contextlib.contextmanager
def browser(profile: Path, *, dark: bool = False) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    assert CHROMIUM is not None
    to_read, to_it = os.pipe()
    from_it, to_write = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]
    start = [sys.executable, "-c", LAUNCH.format(*ends), CHROMIUM, *FLAGS]
    start += [DARK] if dark else []
    process = subprocess.Popen(
        [*start, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=ends,
        stderr=subprocess.DEVNULL,
    )
    for end in (to_read, to_write, *ends):
        os.close(end)
    opened = Browser(process, to_it, from_it)
    try:
        yield opened
    finally:
        opened.end()
        os.close(to_it)
        os.close(from_it)
