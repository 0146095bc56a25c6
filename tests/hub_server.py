"""A server on this machine in the place of the Hugging Face Hub: it sends files, and records what is pushed."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from functools import partial
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_this_test"
FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
# What the Hub answers for repositories of these names; `private` only without a token.
REFUSED = {
    "private": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "forbidden": (403, ""),
    "missing": (404, "RepoNotFound"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does, for a folder of repositories OWNER/NAME."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._send_file()

    def do_GET(self):
        self._send_file()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.posted.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif self.path == "/api/repos/create":
            self._answer(200, json.dumps({"url": f"{self.server.address}/me/{json.loads(body)['name']}"}).encode())
        elif self.path == "/api/validate-yaml":
            self._answer(200, b'{"errors": [], "warnings": []}')
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            url = f"{self.server.address}/me/pets/commit/{COMMIT}"
            self._answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT, "success": True}).encode())
        else:
            self._answer(404)

    def _send_file(self):
        match = FILE.fullmatch(self.path)
        if not match:
            return self._answer(404)
        repository = match["repository"]
        self.server.asked.append(f"{self.command} {match['repository']}@{match['revision']} {match['file']}")
        name = repository.partition("/")[2]
        if name in REFUSED and not (name == "private" and self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return self._refuse(*REFUSED[name])
        if match["revision"] not in ("main", COMMIT, "v1"):
            return self._refuse(404, "RevisionNotFound")
        path = Path(self.server.folder) / repository / match["file"]
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        if path.suffix == ".json":  # A small file, which Git stores.
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        elif name == "damaged":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _refuse(self, status, code):
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "refused"})

    def _answer(self, status, content=b"", headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

    def log_message(self, *_):
        pass


def files_in_commit(body):
    """{path: content} of the files in the body of a commit."""
    lines = [json.loads(line) for line in body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


@contextlib.contextmanager
def hub(folder):
    """Serve a folder of repositories within the block; `address`, `asked` and `posted` say what happened."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder, server.asked, server.posted = folder, [], []
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.daemon_threads = True
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
