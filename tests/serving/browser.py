"""One page in headless Chromium, by its debugging protocol."""

from __future__ import annotations

import base64
import itertools
import json
import re
import subprocess
import tempfile
import time
from contextlib import ExitStack
from typing import Any

from websockets.sync.client import ClientConnection, connect


class Browser:
    """A page that is open while a `with` block runs.

    Args:
        chromium: the program.
        url: of the page.
    """

    def __init__(self, chromium: str, url: str) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars",
            "--remote-allow-origins=*", "--window-size=800,1000", f"--user-data-dir={self._folder.name}", "about:blank",
        ]  # fmt: skip
        self._command, self._stack = command, ExitStack()
        self._ids, self.url, self.problems = itertools.count(1), url, []

    def __enter__(self) -> Browser:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        self._stack.callback(self._end)
        assert self._process.stderr is not None
        while not (found := re.search(r"ws://\S+", line := self._process.stderr.readline())):
            assert line, "Chromium ended"
        self._socket: ClientConnection = self._stack.enter_context(connect(found[0], max_size=1 << 26))
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        self._ask("Page.navigate", {"url": self.url})
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(self.url)})")

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)
        self._folder.cleanup()

    def run(self, code: str) -> Any:
        """The value of an expression."""
        found = self._ask("Runtime.evaluate", {"expression": code, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

    def screenshot(self) -> bytes:
        """PNG of the whole page."""
        return base64.b64decode(self._ask("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])

    def _ask(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters or {}}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(answer["params"]))  # refusals of the content policy among them
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
