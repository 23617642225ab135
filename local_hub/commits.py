"""The two routes by which files get in: preupload says how each file travels, commit writes history."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from aiohttp import web

from .calls import Call, branch_of, route
from .cards import judge
from .discussions import check_may_push, open_discussion
from .errors import HubError, no_entry, no_revision
from .store import HEADS, PULLS, Commit, Entry, Repo

LARGE_FROM = 10 * 1024**2  # bytes; larger files cannot travel inside a commit
STALE = "The branch was updated since you opened this page. Please refresh and try again."
Operation = tuple[str, dict[str, Any]]


@route("POST", "/api/{kind}/{repo}/preupload/{revision}")
async def preupload(call: Call) -> web.Response:
    """Say for each file whether it goes by LFS, and what is there already, so that a client can leave out what is the
    same.
    """
    body, revision = await call.json(), call.parts["revision"]
    check_may_push(call, revision)
    commit = call.repo.commit(revision)
    large, ignored = _large_patterns(call.repo, commit), _ignored_patterns(call.repo, commit, body.get("gitIgnore"))
    answer = []
    for file in body["files"]:
        path, known = _checked_path(file["path"]), commit.files.get(file["path"])
        by_lfs = file["size"] > LARGE_FROM or _matches(path, large)
        facts = {"path": path, "uploadMode": "lfs" if by_lfs else "regular", "shouldIgnore": _matches(path, ignored)}
        answer.append(facts | ({"oid": known.etag} if known else {}))
    return web.json_response({"files": answer, "commitOid": commit.id})


def _text(repo: Repo, commit: Commit, path: str) -> str:
    entry = commit.files.get(path)
    return repo.read(entry).decode("utf-8", "replace") if entry else ""


def _large_patterns(repo: Repo, commit: Commit) -> list[str]:
    return [
        line.split()[0]
        for line in _text(repo, commit, ".gitattributes").splitlines()
        if "filter=lfs" in line.split()[1:]
    ]


def _ignored_patterns(repo: Repo, commit: Commit, sent: str | None) -> list[str]:
    lines = (sent if sent is not None else _text(repo, commit, ".gitignore")).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Git's rules as far as the tests need them: a pattern is for a name at any depth, or with a slash for a whole
    path.
    """
    names = [path, *map(str, PurePosixPath(path).parents)][:-1]
    for pattern in patterns:
        whole = "/" in pattern.rstrip("/")
        if any(fnmatch(name if whole else PurePosixPath(name).name, pattern.strip("/")) for name in names):
            return True
    return False


def _checked_path(path: str) -> str:
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(422, f"Invalid path: {path!r}")
    return path


@route("POST", "/api/{kind}/{repo}/commit/{revision}")
async def commit(call: Call) -> web.Response:
    revision, as_pull = call.parts["revision"], call.flag("create_pr")
    user = check_may_push(call, revision)
    header, operations = _parsed(await call.request.read(), call.kind)
    # before the lock: nobody waits while contents are written
    contents = await asyncio.to_thread(_kept, call, operations)
    async with call.lock():
        start = _start(call, revision, header.get("parentCommit"), as_pull=as_pull)
        files = _applied(call.repo.commit(start).files, operations, contents)
        title, message = header["summary"], header.get("description") or ""
        sha = await asyncio.to_thread(call.repo.write_commit, files, start, title, message, user.name)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{_page(call)}/commit/{sha}", "hookOutput": ""}
        await call.hub.stall("before-ref")
        if as_pull:
            number = open_discussion(
                call, user, title, message, pull=sha, base=branch_of(call.repo, revision), start=start
            )
            answer["pullRequestUrl"] = f"{_page(call)}/discussions/{number}"
        else:
            call.repo.set_ref(branch_of(call.repo, revision), sha)
        await call.hub.stall("after-ref")
    return web.json_response(answer)


def _page(call: Call) -> str:
    return f"{call.hub.endpoint}/{'' if call.kind == 'models' else call.kind + '/'}{call.repo.id}"


def _start(call: Call, revision: str, wanted: str | None, *, as_pull: bool) -> str:
    """The commit to build on: the newest of the branch, which a parent that is given must be."""
    ref = branch_of(call.repo, revision)
    if as_pull and ref.startswith(PULLS):
        raise no_revision(revision)
    head = call.repo.resolve(ref)
    if not wanted:
        return head
    if as_pull:
        return call.repo.resolve(wanted)
    if len(wanted) < 7 or not head.startswith(wanted):
        raise HubError(412, STALE)
    return head


def _parsed(body: bytes, kind: str) -> tuple[dict[str, Any], list[Operation]]:
    """The header and the operations of a body of JSON lines; regular files are decoded, cards judged."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        operations = [(line["key"], dict(line["value"])) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise HubError(400, f"The body must be JSON lines with key and value: {error}") from error
    if not operations or operations[0][0] != "header" or not operations[0][1].get("summary"):
        raise HubError(400, "The first line must be a header with a summary")
    for key, value in operations[1:]:
        if key not in ("file", "lfsFile", "deletedFile", "deletedFolder"):
            raise HubError(400, f"Unknown operation: {key}")
        _checked_path(value["path"].rstrip("/") if key.startswith("deleted") else value["path"])
        if key == "file":
            value["content"] = _decoded(value, kind)
    return operations[0][1], operations[1:]


def _decoded(value: Mapping[str, Any], kind: str) -> bytes:
    try:
        encoded = value.get("encoding") == "base64"
        content = base64.b64decode(value["content"], validate=True) if encoded else value["content"].encode()
    except (binascii.Error, KeyError, AttributeError) as error:
        raise HubError(400, f"Cannot decode {value['path']}: {error}") from error
    if len(content) > LARGE_FROM:
        raise HubError(400, f"{value['path']} is larger than 10 MiB and must be uploaded by LFS")
    if value["path"] == "README.md":
        verdict = judge(content.decode("utf-8", "replace"), kind)
        if verdict.errors:
            raise HubError(400, f"Invalid metadata in README.md.\n{verdict.lines()}")
    return content


def _kept(call: Call, operations: Iterable[Operation]) -> dict[str, Entry]:
    """The contents of new files, each of which is in the store by now."""
    found = {}
    for key, value in operations:
        if key == "file":
            found[value["path"]] = call.store.add(value["content"])
        elif key == "lfsFile":
            entry = call.store.lfs_entry(value["oid"]) if len(value["oid"]) == 64 and value["oid"].isalnum() else None
            if entry is None or value.get("size", entry.size) != entry.size:
                raise HubError(400, f"The content of {value['path']} was not uploaded: {value['oid']}")
            found[value["path"]] = entry
    return found


def _applied(
    files: Mapping[str, Entry], operations: Iterable[Operation], contents: Mapping[str, Entry]
) -> dict[str, Entry]:
    """The tree after the operations, in their order."""
    tree = dict(files)
    for key, value in operations:
        path = value["path"].rstrip("/")
        if key.startswith("deleted"):
            doomed = [name for name in tree if name == path or name.startswith(f"{path}/")]
            if not doomed:
                raise no_entry("A file with this name doesn't exist")
            for name in doomed:
                del tree[name]
        else:
            tree[path] = contents[path]
    folders = {str(folder) for path in contents for folder in PurePosixPath(path).parents}
    if clash := sorted(folders & tree.keys()):
        raise HubError(422, f"{clash[0]} is a file and cannot be a folder too")
    return tree


@route("POST", "/api/{kind}/{repo}/super-squash/{branch}")
async def squash(call: Call) -> web.Response:
    """Replace a branch's history by one commit."""
    user, body = call.writer(), await call.json()
    async with call.lock():
        ref = HEADS + call.parts["branch"]
        files = call.repo.commit(ref).files
        call.repo.set_ref(
            ref, call.repo.write_commit(files, None, body.get("message") or "Super-squash", "", user.name)
        )
    return web.json_response({})
