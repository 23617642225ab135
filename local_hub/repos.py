"""Routes of users and whole repositories: who am I, create, delete, move, settings, access, validation of cards."""

from __future__ import annotations

import re
from typing import Any

from aiohttp import web

from .access import check_files, check_namespace, check_visible
from .calls import Call, route
from .cards import judge
from .errors import HubError
from .vocabulary import LARGE

_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)
GITATTRIBUTES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in sorted(LARGE))


@route("GET", "/api/whoami-v2")
async def whoami(call: Call) -> web.Response:
    user = call.reader()
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "write"} for name in user.orgs]
    token = {"displayName": "token", "role": user.role, "createdAt": "2024-01-01T00:00:00.000Z"}
    answer = {
        "type": "user",
        "id": user.name,
        "name": user.name,
        "fullname": user.name,
        "email": f"{user.name}@localhost",
    }
    return web.json_response(answer | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


def _named(call: Call, body: dict[str, Any]) -> tuple[str, str]:
    """Type and id of the repository that a body names."""
    namespace = body.get("organization") or call.reader().name
    return f"{body.get('type') or 'model'}s", f"{namespace}/{body.get('name')}"


def _url(call: Call, kind: str, repo_id: str) -> str:
    return f"{call.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"


@route("POST", "/api/repos/create")
async def create(call: Call) -> web.Response:
    body = await call.json()
    kind, repo_id = _named(call, body)
    namespace, name = repo_id.split("/", 1)
    user = check_namespace(call.user, namespace)
    if not _NAME.fullmatch(name):
        raise HubError(400, f"Invalid repo name: {name}")
    async with call.hub.lock(kind, repo_id):
        if found := call.store.find(kind, repo_id):
            answer = {
                "error": f"A {kind[:-1]} repository called {found.id} already exists",
                "url": _url(call, kind, found.id),
            }
            return web.json_response(answer, status=409)
        first = {".gitattributes": GITATTRIBUTES.encode()}
        if kind == "spaces":
            first["README.md"] = f"---\ntitle: {name}\nsdk: {body.get('sdk', 'static')}\n---\n".encode()
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = call.store.create(kind, repo_id, user.name, first, private=private)
    return web.json_response({"url": _url(call, kind, repo.id), "name": repo.id, "id": repo.about["_id"]})


@route("DELETE", "/api/repos/delete")
async def delete(call: Call) -> web.Response:
    kind, repo_id = _named(call, await call.json())
    async with call.hub.lock(kind, repo_id):
        repo = check_visible(call.user, call.store.find(kind, repo_id))
        check_namespace(call.user, repo.namespace)
        call.store.delete(repo)
    return web.json_response({})


@route("POST", "/api/repos/move")
async def move(call: Call) -> web.Response:
    body = await call.json()
    kind, here, there = f"{body.get('type') or 'model'}s", body["fromRepo"], body["toRepo"]
    async with call.hub.lock(kind, here):
        repo = check_visible(call.user, call.store.find(kind, here))
        for namespace in (repo.namespace, there.partition("/")[0]):
            check_namespace(call.user, namespace)
        if not _NAME.fullmatch(there.partition("/")[2]) or call.store.find(kind, there):
            raise HubError(409, f"A {kind[:-1]} repository cannot be called {there}, or one already is")
        call.store.move(repo, there)
    return web.json_response({})


@route("PUT", "/api/{kind}/{repo}/settings")
async def settings(call: Call) -> web.Response:
    body, changes = await call.json(), {}
    call.writer()
    if "visibility" in body or "private" in body:
        changes["private"] = body.get("visibility", "private" if body.get("private") else "public") == "private"
    if "gated" in body:
        if body["gated"] not in ("auto", "manual", False):
            raise HubError(400, '"gated" must be one of [auto, manual, false]')
        changes["gated"] = body["gated"]
    async with call.lock():
        call.repo.change(**changes)
    return web.json_response({})


@route("POST", "/api/{kind}/{repo}/user-access-request/grant")
async def grant(call: Call) -> web.Response:
    """Let a user in to a gated repository."""
    body = await call.json()
    call.writer()
    async with call.lock():
        call.repo.change(granted=sorted({*call.repo.about.get("granted", ()), body["user"]}))
    return web.json_response({})


@route("GET", "/api/{kind}/{repo}/auth-check")
async def may_read(call: Call) -> web.Response:
    check_files(call.user, call.repo)
    return web.json_response({})


@route("GET", "/api/{kind}/{repo}/auth-check/write")
async def may_write(call: Call) -> web.Response:
    call.writer()
    return web.json_response({})


@route("POST", "/api/validate-yaml")
async def validate(call: Call) -> web.Response:
    """As JSON for those who commit, or as lines of text for those who ask about one card."""
    body = await call.json()
    if body.get("repoType") not in (None, "model", "dataset", "space"):
        raise HubError(400, '"repoType" must be one of [model, dataset, space]')
    verdict = judge(body.get("content") or "", f"{body.get('repoType') or 'model'}s")
    status = 400 if verdict.errors else 200
    if "text/plain" in call.request.headers.get("Accept", ""):
        return web.Response(text=verdict.lines(), status=status)
    answer = {name: [{"message": each} for each in getattr(verdict, name)] for name in ("errors", "warnings")}
    return web.json_response(answer, status=status)
