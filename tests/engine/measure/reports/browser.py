"""A headless Chromium driven over a pipe: opens a page, hears what it asks for, and answers questions about it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # what is asked of the network fails, and is heard as a request
    "--remote-debugging-pipe",
)
Json = dict[str, Any]


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events` are all that it told since the page was opened."""

    def __init__(self, out: int, answers: int) -> None:
        self._out, self._in, self._rest, self._last = out, answers, b"", 0
        self.events: list[Json] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **parameters: object) -> Json:
        """What the browser answers to `method`."""
        self._last += 1
        message: Json = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda told: told.get("id") == message["id"])["result"]  # type: ignore[no-any-return]

    def _until(self, found: Any, seconds: float = 60) -> Json:
        end = time.monotonic() + seconds
        while True:
            while b"\0" not in self._rest:
                ready, _, _ = select.select([self._in], [], [], max(end - time.monotonic(), 0))
                part = os.read(self._in, 1 << 20) if ready else b""
                assert part, "Chromium went silent"
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\0")
            told = json.loads(line)
            assert "error" not in told, told
            self.events.append(told)
            if found(told):
                return told  # type: ignore[no-any-return]

    def open(self, path: Path, *, width: int, dark: bool) -> None:
        """Load a file on a screen of `width` pixels, and wait for it."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        sent = (event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [request["request"]["url"] for request in sent]

    def complaints(self) -> list[Json]:
        """Console messages, uncaught exceptions and entries of the log."""
        methods = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event for event in self.events if event.get("method") in methods]


@contextlib.contextmanager
def browser(path: str, profile: Path) -> Iterator[Browser]:
    """A started Chromium with its own empty profile; it is gone when the block ends."""
    near_in, far_out = os.pipe()
    far_in, near_out = os.pipe()
    far_in, far_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (far_in, far_out))
    moves = [(os.POSIX_SPAWN_DUP2, far_in, 3), (os.POSIX_SPAWN_DUP2, far_out, 4)]
    moves.append((os.POSIX_SPAWN_OPEN, 2, str(profile.parent / "chromium.log"), os.O_WRONLY | os.O_CREAT, 0o600))
    arguments = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = os.posix_spawn(path, arguments, os.environ, file_actions=moves, setsid=True)
    try:
        yield Browser(near_out, near_in)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for end in (near_in, near_out, far_in, far_out):
            os.close(end)
