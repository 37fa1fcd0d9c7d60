"""Build the site, open every page in headless Chromium on a desktop and a phone, and say what does not fit or fails.

    python -m benchmarks.pages

Of each page: whether it is wider than the screen, tables and code that are cut off, scripts that fail, and files of
the site that are missing. Needs Chromium in the PATH; nothing outside this machine is asked for.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desktop": 1280, "phone": 390}
_SECONDS = 300

# First in every page: scripts that fail, and files that are missing, before anything can.
_LISTENER = """<script>
window.problems = [];
addEventListener("error", event => {
  const file = event.target.src || event.target.href;
  if (!file || new URL(file).origin === location.origin) problems.push(file ? `no ${file}` : event.message);
}, true);
addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
const said = console.error;
console.error = (...words) => { problems.push(words.join(" ")); said(...words); };
</script>"""
# Opens page after page in a frame; a table that scrolls by itself is not cut off.
_OPENER = """<!DOCTYPE html><title>pages</title><iframe id="frame" style="border:0; height:900px"></iframe><script>
const wanted = %s, frame = document.getElementById("frame"), found = [];
const settled = () => new Promise(done => setTimeout(done, 150));
function cut(element, view) {
  const right = element.getBoundingClientRect().right;
  for (let outer = element; outer !== null; outer = outer.parentElement) {
    const overflow = view.getComputedStyle(outer).overflowX;
    if (overflow === "auto" || overflow === "scroll") return false;
    if (outer === element ? outer.scrollWidth > outer.clientWidth + 1 && overflow !== "visible"
        : overflow !== "visible" && right > outer.getBoundingClientRect().right + 1) return true;
  }
  return right > view.innerWidth + 1;
}
(async () => {
  for (const [screen, width, page] of wanted) {
    frame.style.width = `${width}px`;
    await new Promise(done => { frame.onload = done; frame.src = page; });
    await settled();
    const view = frame.contentWindow, root = view.document.documentElement, problems = [...view.problems];
    if (root.scrollWidth > view.innerWidth) problems.push(`is ${root.scrollWidth} wide on ${width}`);
    for (const element of view.document.querySelectorAll("article table, article pre, article img"))
      if (cut(element, view)) problems.push(`cuts off ${element.tagName}: ${element.textContent.trim().slice(0, 60)}`);
    for (const problem of problems) found.push(`${page} (${screen}) ${problem}`);
  }
  await fetch("/found", { method: "POST", body: JSON.stringify({ opened: wanted.length, found }) });
})();
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves a site with the listener in each page, and the opener; takes what was found."""

    def __init__(self, *args: object, opener: str, answers: queue.Queue[bytes], directory: str) -> None:
        self.opener, self.answers = opener, answers
        super().__init__(*args, directory=directory)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        file = file / "index.html" if file.is_dir() else file
        if self.path == "/opener.html":
            self._send(self.opener.encode())
        elif file.suffix == ".html" and file.exists():
            self._send(file.read_text().replace("<head>", f"<head>{_LISTENER}", 1).encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(b"")

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def pages(site: Path) -> list[str]:
    """Addresses of all pages of a built site."""
    return sorted("/" + path.parent.relative_to(site).as_posix().strip(".") + "/" for path in site.rglob("index.html"))


def build(site: Path) -> None:
    """The documentation as a site; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)


def check(site: Path) -> tuple[int, list[str]]:
    """How often pages were opened, and what was found, in words."""
    wanted = [(screen, width, page.replace("//", "/")) for screen, width in WIDTHS.items() for page in pages(site)]
    answers: queue.Queue[bytes] = queue.Queue()
    handler = partial(_Handler, opener=_OPENER % json.dumps(wanted), answers=answers, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1400,1000"]
        options += ["--remote-debugging-port=0"]  # stays open after the first page
        command = [str(CHROMIUM), *options, f"http://127.0.0.1:{server.server_port}/opener.html"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            answer = json.loads(answers.get(timeout=_SECONDS))
        finally:
            browser.terminate()
            browser.wait(timeout=30)
            server.shutdown()
            server.server_close()
    return answer["opened"], answer["found"]


def main() -> None:
    """Build, open, print."""
    if CHROMIUM is None:
        raise SystemExit("Needs Chromium in the PATH, such as of `apt-get install chromium`.")
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        build(site)
        opened, found = check(site)
    print(*found, f"{opened} pages opened, {len(found)} problems", sep="\n")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
