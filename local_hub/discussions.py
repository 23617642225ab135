"""Discussions and pull requests. A pull request is a discussion with a ref, refs/pr/N, to which commits can go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from .access import User
from .calls import Call, route
from .errors import HubError
from .store import HEADS, PULLS, Entry, now


def check_may_push(call: Call, revision: str) -> User:
    """Anyone with a name may propose; on a pull request its author may go on; else it takes the right to write."""
    if call.flag("create_pr"):
        return call.reader()
    if revision.startswith(PULLS) and call.user:
        number = revision.removeprefix(PULLS)
        if any(
            str(each["num"]) == number and each["author"]["name"] == call.user.name for each in call.repo.discussions()
        ):
            return call.user
    return call.writer()


def open_discussion(
    call: Call, user: User, title: str, text: str, *, pull: str | None = None, base: str = "", start: str = ""
) -> int:
    """Open one; the caller holds the repository's lock.

    Args:
        pull: the commit that a pull request proposes.
        base: the branch that it is for.
        start: the commit of that branch on which it builds.
    """
    number = max([each["num"] for each in call.repo.discussions()], default=0) + 1
    comment = {"edited": False, "hidden": False, "latest": {"raw": text}}
    discussion = {"num": number, "title": title, "author": {"name": user.name}, "createdAt": now()}
    discussion |= {
        "status": "draft" if pull == start and pull else "open",
        "isPullRequest": pull is not None,
        "events": [],
    }
    discussion |= {"repo": {"name": call.repo.id, "type": call.kind[:-1]}, "filesWithConflicts": []}
    discussion |= {"changes": {"base": base, "start": start} if pull else None}
    discussion["events"].append(_event(discussion, user, "comment", comment))
    if pull:
        call.repo.set_ref(f"{PULLS}{number}", pull)
    call.repo.write_discussion(discussion)
    return number


def _event(discussion: Mapping[str, Any], user: User, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Something that happened, as the client reads it."""
    name = f"{discussion['num']}-{len(discussion['events'])}"
    return {"id": name, "type": kind, "createdAt": now(), "author": {"name": user.name}, "data": data}


@route("POST", "/api/{kind}/{repo}/discussions")
async def create(call: Call) -> web.Response:
    user, body = call.reader(), await call.json()
    async with call.lock():
        head = call.repo.resolve("main") if body.get("pullRequest") else None
        number = open_discussion(
            call, user, body["title"], body.get("description") or "", pull=head, base=f"{HEADS}main", start=head or ""
        )
    return web.json_response({"num": number, "pullRequest": head is not None})


@route("GET", "/api/{kind}/{repo}/discussions")
async def listed(call: Call) -> web.Response:
    found = call.repo.discussions()
    wanted = {"all": None, "pull_request": True, "discussion": False}.get(call.request.query.get("type", "all"))
    found = [each for each in found if wanted is None or each["isPullRequest"] is wanted]
    return web.json_response(
        {"discussions": found if call.request.query.get("p", "0") == "0" else [], "count": len(found), "start": 0}
    )


def _found(call: Call) -> dict[str, Any]:
    for each in call.repo.discussions():
        if str(each["num"]) == call.parts["number"]:
            return each
    raise HubError(404, "No such discussion")


@route("GET", "/api/{kind}/{repo}/discussions/{number}")
async def details(call: Call) -> web.Response:
    return web.json_response(_found(call))


def _happened(call: Call, discussion: dict[str, Any], user: User, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    event = _event(discussion, user, kind, data)
    discussion["events"].append(event)
    call.repo.write_discussion(discussion)
    return event


@route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
async def merge(call: Call) -> web.Response:
    """Bring what a pull request changed onto its branch, as one commit."""
    user = call.writer()
    async with call.lock():
        pull = _found(call)
        if not pull["isPullRequest"] or pull["status"] not in ("open", "draft"):
            raise HubError(409, "Only an open pull request can be merged")
        base, start = pull["changes"]["base"], call.repo.commit(pull["changes"]["start"])
        head, proposed = call.repo.commit(base), call.repo.commit(f"{PULLS}{pull['num']}")
        files = _merged(start.files, head.files, proposed.files)
        sha = call.repo.write_commit(files, head.id, f"{pull['title']} (#{pull['num']})", "", user.name)
        call.repo.set_ref(base, sha)
        pull |= {"status": "merged", "changes": pull["changes"] | {"mergeCommitId": sha}}
        _happened(call, pull, user, "status-change", {"status": "merged"})
    return web.json_response({})


def _merged(start: Mapping[str, Entry], ours: Mapping[str, Entry], theirs: Mapping[str, Entry]) -> dict[str, Entry]:
    """File by file; what both sides changed differently is a conflict."""
    merged = dict(ours)
    for path in start.keys() | theirs.keys():
        if start.get(path) == theirs.get(path) or ours.get(path) == theirs.get(path):
            continue
        if ours.get(path) != start.get(path):
            raise HubError(409, f"Both sides changed {path}")
        if path in theirs:
            merged[path] = theirs[path]
        else:
            del merged[path]
    return merged
