"""What a request is to its handler, and the routes that find handlers; a route is a pattern of the raw path."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from .access import Access, User, check_named, check_namespace, check_visible
from .errors import HubError, no_revision
from .store import HEADS, Repo, Store

STALLS = ("in-lfs", "before-ref", "after-ref")
# ids, revisions and paths are quoted by the client: a slash inside of them is %2F, which is why routes look at the raw
# path
_PARTS = {"kind": "models|datasets|spaces", "repo": "[^/]+/[^/]+", "prefix": "(?:datasets/|spaces/)?", "rest": ".+"}


class Hub:
    """What all requests share."""

    def __init__(self, root: Path, tokens: Iterable[str], orgs: Iterable[str], stall: str | None) -> None:
        self.store = Store(root)
        self.store.prepare()
        self.access = Access(self.store, tokens, orgs)
        self.locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self.port = 0
        self._stall = stall
        self._log = (root / "requests.jsonl").open("a", encoding="utf-8")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where contents are kept: the same server, but another origin, to which a client must not send its token."""
        return f"http://localhost:{self.port}/lfs"

    def lock(self, kind: str, repo_id: str) -> asyncio.Lock:
        """Who changes a repository holds this."""
        return self.locks[kind, repo_id.lower()]

    async def stall(self, point: str) -> None:
        """Wait to be killed, if this is the point where a test wants it."""
        if point == self._stall:
            (self.store.root / "stalled").write_text(point, "utf-8")
            await asyncio.Event().wait()

    def log(self, request: web.Request, status: int) -> None:
        entry = {
            "method": request.method,
            "path": unquote(request.rel_url.raw_path),
            "status": status,
            "host": request.host,
        }
        entry |= {
            "authorized": "Authorization" in request.headers,
            "range": request.headers.get("Range"),
            "time": time.time(),
        }
        entry["content"] = request.get("content")
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()


@dataclass
class Call:
    """One request, with what its path says and who makes it."""

    hub: Hub
    request: web.Request
    parts: dict[str, str]
    user: User | None = None
    kind: str = "models"
    _repo: Repo | None = field(default=None, repr=False)

    @property
    def repo(self) -> Repo:
        assert self._repo is not None, "the route has no repository"
        return self._repo

    @property
    def store(self) -> Store:
        return self.hub.store

    def writer(self) -> User:
        """The user, who has the right to write; else a refusal."""
        return check_namespace(self.user, self.repo.namespace)

    def reader(self) -> User:
        """The user, who must have a name; else a refusal."""
        return check_named(self.user)

    @asynccontextmanager
    async def lock(self) -> AsyncIterator[None]:
        """Alone with the repository, which may have gone while others had it."""
        async with self.hub.lock(self.kind, self.repo.id):
            self.find()
            yield

    def flag(self, name: str) -> bool:
        return self.request.query.get(name, "").lower() in ("1", "true")

    async def json(self) -> dict[str, Any]:
        try:
            body = json.loads(await self.request.read() or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise HubError(400, "The body must be a JSON object")
        return body

    def find(self) -> None:
        """Look up the repository that the path names; one that has moved answers with its new address."""
        repo_id = self.parts["repo"]
        self._repo = self.store.find(self.kind, repo_id)
        if self._repo is None and (there := self.store.moved(self.kind, repo_id)):
            here = self.request.rel_url.raw_path_qs
            raise web.HTTPTemporaryRedirect(self.hub.endpoint + here.replace(f"/{repo_id}", f"/{there}", 1))
        check_visible(self.user, self._repo)


Handler = Callable[[Call], Awaitable[web.StreamResponse]]
ROUTES: list[tuple[frozenset[str], re.Pattern[str], Handler]] = []


def route(methods: str, template: str) -> Callable[[Handler], Handler]:
    """Register a handler. In the template "{kind}", "{prefix}", "{repo}" and "{rest}" mean the obvious, other names one
    segment.
    """
    pattern = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{_PARTS.get(match[1], '[^/]+')})", template)

    def register(handler: Handler) -> Handler:
        ROUTES.append((frozenset(methods.split()), re.compile(pattern), handler))
        return handler

    return register


def branch_of(repo: Repo, revision: str) -> str:
    """The full name of a branch that is there, or of the ref of a pull request; what commits can go to."""
    ref = repo.ref_of(revision)
    if ref is None or not ref.startswith((HEADS, "refs/pr/")):
        raise no_revision(revision)
    return ref
