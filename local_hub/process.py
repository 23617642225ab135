"""The Hub as a process of its own, which a test can kill and start again, and whose disk it can read."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .store import Commit, Repo, Store

PROJECT = Path(__file__).parents[1]
# what would lead a client elsewhere, or give it another token or cache than the test means
_FOREIGN = (
    "HF_ASSETS_CACHE",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_XET_CACHE",
)
_FOREIGN += ("HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


class HubServer:
    """A context manager: `python -m local_hub` while it's open.

    Args:
        root: the server's folder, and that of the clients' caches. The same root again has everything again.
        port: 0 takes one that is free, and keeps it for restarts.
        tokens: "NAME=TOKEN" or "NAME=TOKEN:read".
        orgs: "ORG=NAME", once for each member.
        stall: "in-lfs", "before-ref" or "after-ref": where the server is to wait for its death.
    """

    def __init__(
        self, root: Path, port: int = 0, tokens: Iterable[str] = (), orgs: Iterable[str] = (), stall: str | None = None
    ) -> None:
        self.root, self.endpoint = root, ""
        self.store = Store(root)
        self._port, self._tokens, self._orgs, self._stall = port, tuple(tokens), tuple(orgs), stall
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> HubServer:
        self._start(self._stall)
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()  # there is nothing that a polite end would save

    def _start(self, stall: str | None) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "stalled").unlink(missing_ok=True)
        command = [sys.executable, "-m", "local_hub", "--attached", "--root", str(self.root), "--port", str(self._port)]
        command += [f"--token={token}" for token in self._tokens] + [f"--org={org}" for org in self._orgs]
        command += [f"--stall={stall}"] if stall else []
        # the old port may be lent to somebody's connection for a moment
        self.wait_until(lambda: self._listens(command), seconds=10 if self._port else 0)

    def _listens(self, command: list[str]) -> bool:
        with (self.root / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=PROJECT
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.kill()
            return False
        self.endpoint = json.loads(line)["endpoint"]
        self._port = int(self.endpoint.rpartition(":")[2])
        return True

    def kill(self) -> None:
        """As by a power cut: SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None

    def restart(self, *, stall: str | None = None) -> None:
        """Kill it if it lives, and start it on the same port and root."""
        self.kill()
        self._start(stall)

    def wait_until_stalled(self) -> None:
        self.wait_until((self.root / "stalled").is_file)

    @staticmethod
    def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, "what was waited for did not happen; see server.log in the Hub's root"
            time.sleep(0.01)

    def environment(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """For a client's process: this Hub, one token or none, and a home (cache) that is the token's unless given."""
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        told = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home or self.root / "homes" / (token or "nobody"))}
        told |= {
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return kept | told | ({"HF_TOKEN": token} if token else {})

    def ask(
        self, method: str, url: str, body: bytes | None = None, token: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One raw request, for what the real client never does. Returns status, headers in lower case, and body."""
        there = urlsplit(url if url.startswith("http") else self.endpoint + url)
        connection = http.client.HTTPConnection(there.netloc, timeout=30)
        told = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, f"{there.path}?{there.query}", body, headers | told)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def requests(self) -> list[dict[str, Any]]:
        """Everything that was asked so far: method, path, status, host, range, the file that was sent, and whether a
        token came.
        """
        return [json.loads(line) for line in (self.root / "requests.jsonl").read_text("utf-8").splitlines()]

    def downloads(self) -> list[str]:
        """The files whose contents were sent, in order: "org/name/path", for datasets "datasets/org/name/path"."""
        return [each["content"] for each in self.requests() if each["content"]]

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        """A repository on disk, whoever may see it."""
        repo = self.store.find(kind, repo_id)
        assert repo is not None, f"no repository {repo_id} among the {kind}"
        return repo

    def head(self, repo_id: str, revision: str = "main", kind: str = "models") -> str:
        return self.repo(repo_id, kind).resolve(revision)

    def commits(self, repo_id: str, revision: str = "main", kind: str = "models") -> list[Commit]:
        """Newest first."""
        repo = self.repo(repo_id, kind)
        return list(repo.history(repo.resolve(revision)))

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        repo = self.repo(repo_id, kind)
        return {path: repo.read(entry) for path, entry in repo.commit(revision).files.items()}
