"""A server on this machine in the place of those that publish weights and pictures."""

import contextlib
import http.server
import threading
import time
from functools import partial
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends the files of a folder: below /cut/ half of each, as a connection that breaks down would.

    Below /slow/ it sends a byte now and then.
    """

    def do_GET(self):
        with contextlib.suppress(ConnectionError):  # Who asked may have had enough.
            self._answer()

    def _answer(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/slow/"):
            return self._drip()
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        content = (Path(self.directory) / self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def _drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    """(address, list of the paths that were asked for) of a server of a folder's files within the block."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.asked
        finally:
            server.shutdown()
            thread.join()
