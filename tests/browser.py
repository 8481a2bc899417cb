"""Chromium without a screen, spoken to over a pair of pipes: what a page measures, says and looks like. No package is needed.

What Chromium is asked is its devtools protocol, JSON ended by a zero byte, on its file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)

# Every element that has text of its own, or is drawn: where it is. What sticks out to the right, and which texts cross.
MEASURE = """
(() => {
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    if (!node.data.trim()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) {
      if (r.width && r.height) boxes.push({text: node.data.trim().slice(0, 40), x: r.x, y: r.y, r: r.right, b: r.bottom});
    }
  }
  const crossing = [];
  for (const [i, a] of boxes.entries()) for (const c of boxes.slice(i + 1)) {
    const w = Math.min(a.r, c.r) - Math.max(a.x, c.x), h = Math.min(a.b, c.b) - Math.max(a.y, c.y);
    if (w > 1 && h > 3) crossing.push(a.text + " | " + c.text);
  }
  for (const bar of document.querySelectorAll("svg rect")) {
    const r = bar.getBoundingClientRect();
    for (const t of boxes) {
      if (Math.min(r.right, t.r) - Math.max(r.x, t.x) > 1 && Math.min(r.bottom, t.b) - Math.max(r.y, t.y) > 3) {
        crossing.push("a bar | " + t.text);
      }
    }
  }
  const wide = document.documentElement.clientWidth;
  return {
    width: wide, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    texts: boxes.length, crossing,
    out: boxes.filter((b) => b.r > wide + 0.5 || b.x < -0.5).map((b) => b.text),
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
  };
})()
"""


def program() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def missing() -> str | None:
    """Why no page can be looked at here; None if one can."""
    return None if program() else f"none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)"


class Browser:
    """`with Browser() as b: b.open(path, 400); b.measure()`.

    said: everything on the page's console. fetched: what the page asked for beside itself.
    """

    def __enter__(self) -> Browser:
        self.profile = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()

        def three_and_four() -> None:
            # first out of the way: one of the two could be 3 or 4 itself
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(a, 3), os.dup2(b, 4)

        flags = (*FLAGS, f"--user-data-dir={self.profile.name}", "about:blank")
        self.process = subprocess.Popen(
            [str(program()), *flags],
            preexec_fn=three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.number, self.kept = 0, b""
        self.said, self.fetched = list[str](), list[str]()
        self.session = ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.to), os.close(self.back)
        self.profile.cleanup()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.kept:
            part = os.read(self.back, 1 << 20)
            if not part:
                raise RuntimeError(f"{program()} ended with {self.process.wait()}")
            self.kept += part
        one, _, self.kept = self.kept.partition(b"\0")
        event: dict[str, Any] = json.loads(one)
        about = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.said.append(about["entry"]["text"])
        if event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(json.dumps(about))
        if event.get("method") == "Network.requestWillBeSent" and about["type"] != "Document":
            self.fetched.append(about["request"]["url"])
        return event

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, width: int, dark: bool = False, media: str = "") -> None:
        """Shows the file at that width, and waits for it."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def measure(self) -> Any:
        return self.value(MEASURE)

    def screenshot(self, path: Path, until: str = "body") -> None:
        """The page as PNG, down to the end of the element that the selector `until` finds first."""
        bottom = self.value(f"document.querySelector({until!r}).getBoundingClientRect().bottom + scrollY")
        clip = {"x": 0, "y": 0, "width": self.value("document.documentElement.clientWidth"), "height": bottom + 1, "scale": 1}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
