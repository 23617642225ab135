"""A read-only Hub on this machine: serves folders as repositories, to the real client over real HTTP, and notes what is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40


@dataclass
class Served:
    """The endpoint, and the files that were downloaded from it, as "org/name/file"."""

    endpoint: str
    downloads: list[str] = field(default_factory=list)


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[Served]:
    """Serve folders under their Hub ids ("org/name") until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    served = Served(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = partial(_Handler, repositories, served.downloads)  # type: ignore[assignment]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, repositories: Mapping[str, Path], downloads: list[str], *args) -> None:
        self.repositories = repositories
        self.downloads = downloads
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 4 and "/".join(parts[2:4]) in self.repositories:
            repository = "/".join(parts[2:4])
            if parts[4:5] in ([], ["revision"]):
                files = [{"rfilename": path.name} for path in sorted(self.repositories[repository].iterdir())]
                return self._answer(json.dumps({"_id": "1", "id": repository, "sha": COMMIT, "siblings": files}).encode())
        if len(parts) == 5 and parts[2] == "resolve":
            folder = self.repositories.get("/".join(parts[:2]))
            if folder is None:
                return self._missing("RepoNotFound")
            file = folder / parts[4]
            if not file.is_file():
                return self._missing("EntryNotFound")
            if self.command == "GET":
                self.downloads.append("/".join([*parts[:2], parts[4]]))
            return self._answer(file.read_bytes())
        return self._missing("RepoNotFound")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
