"""A headless Chromium, driven over a pipe in the DevTools protocol; needs no other package.

A page is loaded in a window of a given size. What a reader would not see is told: what went to the
console, exceptions, and every request but that for the page itself.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
#: The browser reads commands from descriptor 3 and writes to 4.
SHELL = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
TIMEOUT_S = 60


def find() -> str | None:
    """The path of a Chromium, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """The one tab of a browser that a process runs."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.buffer = process, b""
        self.last_id, self.session, self.events = 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """The result of a command; AssertionError where the browser reports an error."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._message()).get("id") != self.last_id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _message(self) -> dict:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            data = self.process.stdout.read1() if ready else b""
            assert data, f"chromium ended, or said nothing for {TIMEOUT_S} s"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def load(self, path: Path, width: int, height: int) -> list[str]:
        """Load a file in a window of this size; what went wrong, a line each."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events, url = [], path.resolve().as_uri()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        self.evaluate("document.fonts.ready.then(() => 0)")
        return [line for event in self.events for line in complaints(event, url)]

    def evaluate(self, script: str):
        """The value of an expression, awaited."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")


def complaints(event: dict, page: str) -> Iterator[str]:
    """What an event says against the page at this URL."""
    what = event.get("params", {})
    match event.get("method"):
        case "Runtime.consoleAPICalled" if what["type"] in ("error", "warning", "assert"):
            values = (str(value.get("value", value.get("description"))) for value in what["args"])
            yield f"console {what['type']}: {' '.join(values)}"
        case "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            yield f"exception: {details.get('exception', {}).get('description', details['text'])}"
        case "Log.entryAdded" if what["entry"]["level"] in ("error", "warning"):
            yield f"console {what['entry']['level']}: {what['entry']['text']}"
        case "Network.requestWillBeSent" if what["request"]["url"] != page:
            if not what["request"]["url"].startswith("data:"):
                yield f"request: {what['request']['url']}"
        case "Network.loadingFailed":
            yield f"failed request: {what['errorText']}"


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Tab]:
    """The tab of a new browser; `profile` is a directory of its own."""
    command = ["sh", "-c", SHELL, "sh", executable, *FLAGS, f"--user-data-dir={profile}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        try:
            tab = Tab(process)
            yield tab
            tab.session = {}  # the command is for the browser, which then takes its children along
            tab.call("Browser.close")
            process.wait(TIMEOUT_S)
        finally:
            process.kill()
