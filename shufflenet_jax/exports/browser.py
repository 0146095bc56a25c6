"""Headless Chromium, if there is one: it runs a page from web.py on images that we send."""

import http.server
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120.0  # Longest wait for an answer; the first one of 14 MB of WebAssembly takes long on a busy machine.
OPTIONS = (
    *("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-extensions", "--disable-quic", "--mute-audio"),
)
# In the page: it asks for images, and answers with logits, or for encoded pictures with prepared pixels.
CLIENT = """
<script type="module">
const send = (path, body) => fetch(path, {method: "POST", body});
try {
  const logits = await window.shufflenet.ready;
  for (;;) {
    const answer = await fetch("check/next");
    if (answer.status !== 200) break;
    const bytes = await answer.arrayBuffer();
    if (answer.headers.get("Content-Type") === "image/png")
      await send("check/answer", (await window.shufflenet.prepare(new Blob([bytes]))).pixels);
    else await send("check/answer", await logits(new Uint8Array(bytes)));
  }
} catch (error) { await send("check/failed", String(error.stack || error)); }
</script>
"""


class BrowserError(Exception):
    """The page fails."""


@cache
def find() -> str | None:
    """Return the path of Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def version() -> str:
    """Return Chromium's name and version."""
    words = [find() or "", "--version"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().split(" built")[0]


class Page:
    """A page that runs in Chromium until it is closed.

    Args:
      path: the page, or the folder that holds it as index.html.

    Attributes:
      requests: (content, type) of what the page has to answer.
      answers: its answers, or a str that describes an error.
      folder: of the page.
      html: path of the page.
    """

    def __init__(self, path: Path) -> None:
        self.requests: queue.Queue[tuple[bytes, str]] = queue.Queue()
        self.answers: queue.Queue[bytes | str] = queue.Queue()
        self.folder, self.html = (path, path / "index.html") if path.is_dir() else (path.parent, path)
        self._profile = tempfile.mkdtemp(prefix="shufflenet_jax.")
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        words = [find() or "", *OPTIONS, f"--user-data-dir={self._profile}"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        words += [f"http://127.0.0.1:{self._server.server_port}/"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def logits(self, images: UInt8[np.ndarray, "batch height width channels"]) -> Sequence[np.ndarray]:
        """Return [logits (B, num_classes)] of images, which it sends one after the other.

        Args:
          images: uint8 crops (B, H, W, C).

        Raises:
          BrowserError: the page gives no answer, or fails.
        """
        rows = [np.frombuffer(self._ask(image.tobytes(), "application/octet-stream"), np.float32) for image in images]
        return [np.stack(rows)]

    def prepared(self, png: bytes) -> np.ndarray:
        """Return the uint8 pixels, flat, to which the page converts an encoded picture.

        Args:
          png: the picture.

        Raises:
          BrowserError: the page gives no answer, or fails.
        """
        return np.frombuffer(self._ask(png, "image/png"), np.uint8)

    def _ask(self, content: bytes, kind: str) -> bytes:
        self.requests.put((content, kind))
        try:
            answer = self.answers.get(timeout=SECONDS)
        except queue.Empty:
            raise BrowserError(f"the page gave no answer within {SECONDS:.0f} seconds") from None
        if isinstance(answer, str):
            raise BrowserError(f"the page failed: {answer}")
        return answer

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._profile, ignore_errors=True)


def _handler(page: Page) -> type[http.server.SimpleHTTPRequestHandler]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:  # noqa: ANN401 - those of the base class.
            super().__init__(*args, directory=str(page.folder))

        def do_GET(self) -> None:
            if self.path == "/":
                html = page.html.read_text(encoding="utf-8").replace("</body>", CLIENT + "</body>")
                self._send(html.encode(), "text/html; charset=utf-8")
            elif self.path == "/check/next":
                self._send(*page.requests.get())
            else:
                super().do_GET()

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            page.answers.put(content if self.path == "/check/answer" else content.decode(errors="replace"))
            self._send(b"", "text/plain")

        def _send(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
