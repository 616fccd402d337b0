"""A headless Chromium, spoken to through a pipe in its DevTools protocol: what a page shows and complained of."""

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

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip


class Chromium:
    """with Chromium() as browser: browser.open(path, width); browser.value("document.title"); browser.screenshot(png)

    complaints: console errors, exceptions and security violations of the pages opened.
    asked: every address they asked for.
    """

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        (its_end, self.to), (self.come, our_end) = os.pipe(), os.pipe()

        def pipes_to_3_and_4():
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_end, our_end)]
            for fd, number in zip(high, (3, 4)):
                os.dup2(fd, number)

        self.process = subprocess.Popen(
            [PROGRAM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            preexec_fn=pipes_to_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(its_end)
        os.close(our_end)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", None
        self.events, self.complaints, self.asked = [], [], []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.to)  # Chromium ends with its pipe
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.come)
        shutil.rmtree(self.profile, ignore_errors=True)

    def __call__(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        message = {
            "id": number,
            "method": method,
            "params": parameters,
            **({"sessionId": self.session} if self.session else {}),
        }
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file in a window of this size (a phone's when narrow) and wait until it and its images are there."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.events.clear()
        self("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._next()

    def value(self, expression: str):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def dark(self, on: bool) -> None:
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if on else "light"}],
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
        )

    def _next(self, seconds: float = 60) -> dict:
        """The next message; what pages complain of and ask for is noted on the way."""
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.come], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {seconds} s")
            part = os.read(self.come, 1 << 20)
            assert part, f"Chromium ended with status {self.process.wait()}"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        method, parameters = message.get("method"), message.get("params", {})
        self.events.append(method)
        if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert", "warning"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        return message
