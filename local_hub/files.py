"""Contents: uploads of large files by LFS, and downloads.

Large files are kept under another origin, at addresses that are signed, as on the Hub's CDN; a token has no business
there.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web

from .access import check_files
from .calls import Call, route
from .discussions import check_may_push
from .disk import move_in
from .errors import HubError, no_entry
from .store import Entry

PART = 4 * 1024**2  # bytes; larger files go up in parts of this size, if the client can
LIFETIME = 3600  # seconds that a signed address is good for
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _signed(call: Call, action: str, name: str) -> str:
    until = int(time.time()) + LIFETIME
    signature = call.hub.access.sign(action, name, until)
    return f"{call.hub.storage}/{action}/{quote(name)}?until={until}&signature={signature}"


def _check_signed(call: Call, action: str, name: str) -> None:
    query = call.request.query
    call.hub.access.check_signature(query.get("signature", ""), action, name, query.get("until", ""))
    if float(query["until"]) < time.time():
        raise HubError(403, "Request has expired")


@route("POST", "/{prefix}{repo}\\.git/info/lfs/objects/batch")
async def batch(call: Call) -> web.Response:
    """Say where each large file is to be sent; what is there already needs no sending."""
    body = await call.json()
    # without a ref this is for a pull request to be, which needs a name only
    if ref := body.get("ref"):
        check_may_push(call, ref["name"])
    call.reader()
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise HubError(422, "Only uploads of sha256 are served")
    parts = "multipart" in body.get("transfers", ()) and any(each["size"] > PART for each in body["objects"])
    objects = [_instructions(call, each["oid"], each["size"], in_parts=parts) for each in body["objects"]]
    answer = {"transfer": "multipart" if parts else "basic", "objects": objects}
    return web.json_response(answer, content_type="application/vnd.git-lfs+json")


def _instructions(call: Call, oid: str, size: int, *, in_parts: bool) -> dict[str, Any]:
    known = {"oid": oid, "size": size}
    if not _SHA256.fullmatch(oid) or size < 1:
        return known | {"error": {"code": 422, "message": "The oid must be a sha256 and the size positive"}}
    if call.store.lfs(oid).is_file():
        return known
    verify = f"{call.hub.endpoint}{call.request.rel_url.raw_path.removesuffix('/objects/batch')}/verify"
    upload: dict[str, Any] = {"href": _signed(call, "upload", f"{oid}/{size}")}
    if in_parts and size > PART:
        count = -(-size // PART)
        urls = {f"{number:05d}": _signed(call, "part", f"{oid}/{number}") for number in range(1, count + 1)}
        upload = {"href": _signed(call, "complete", f"{oid}/{size}"), "header": {"chunk_size": str(PART), **urls}}
    return known | {"actions": {"upload": upload, "verify": {"href": verify, "header": {}}}}


@route("PUT", "/lfs/upload/{oid}/{size}")
async def upload(call: Call) -> web.Response:
    oid, size = call.parts["oid"], int(call.parts["size"])
    _check_signed(call, "upload", f"{oid}/{size}")
    await _receive(call, call.store.lfs(oid), oid, size)
    return web.Response(headers={"ETag": f'"{oid}"'})


@route("PUT", "/lfs/part/{oid}/{number}")
async def part(call: Call) -> web.Response:
    oid, number = call.parts["oid"], call.parts["number"]
    _check_signed(call, "part", f"{oid}/{number}")
    etag = await _receive(call, _part(call, oid, number), None, None)
    return web.Response(headers={"ETag": f'"{etag}"'})


def _part(call: Call, oid: str, number: int | str) -> Path:
    return call.store.incoming / "parts" / oid / str(int(number))


async def _receive(call: Call, place: Path, oid: str | None, size: int | None) -> str:
    """Write a body to its place, if it is what it should be; returns its sha256."""
    draft, digest, received = call.store.incoming / uuid.uuid4().hex, hashlib.sha256(), 0
    try:
        with draft.open("wb") as file:
            async for chunk in call.request.content.iter_chunked(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                await call.hub.stall("in-lfs")
            file.flush()
            os.fsync(file.fileno())
        if oid is not None and (digest.hexdigest() != oid or received != size):
            raise HubError(400, f"Expected {size} bytes with sha256 {oid}, got {received} with {digest.hexdigest()}")
        move_in(draft, place)
    finally:
        draft.unlink(missing_ok=True)
    return digest.hexdigest()


@route("POST", "/lfs/complete/{oid}/{size}")
async def complete(call: Call) -> web.Response:
    """Put parts together; only what has the promised hash is kept."""
    oid, size = call.parts["oid"], int(call.parts["size"])
    _check_signed(call, "complete", f"{oid}/{size}")
    body, draft, digest = await call.json(), call.store.incoming / uuid.uuid4().hex, hashlib.sha256()
    try:
        with draft.open("wb") as file:
            for each in body["parts"]:
                content = _checked_part(_part(call, oid, each["partNumber"]), each["etag"])
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != oid or draft.stat().st_size != size:
            raise HubError(400, f"The parts together are not {oid}")
        move_in(draft, call.store.lfs(oid))
    finally:
        draft.unlink(missing_ok=True)
    return web.json_response({"success": True})


def _checked_part(file: Path, etag: str) -> bytes:
    content = file.read_bytes() if file.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != etag.strip('"'):
        raise HubError(400, f"Part {file.name} is not what was sent")
    return content


@route("POST", "/{prefix}{repo}\\.git/info/lfs/verify")
async def verify(call: Call) -> web.Response:
    call.reader()
    body = await call.json()
    entry = call.store.lfs_entry(body["oid"]) if _SHA256.fullmatch(body["oid"]) else None
    if entry is None or entry.size != body["size"]:
        raise no_entry(f"No such large file: {body['oid']}")
    return web.json_response({})


@route("HEAD GET", "/{prefix}{repo}/resolve/{revision}/{rest}")
async def resolve(call: Call) -> web.Response:
    """A file of a revision: its content, or for a large file the address of it."""
    commit = call.repo.commit(call.parts["revision"])
    check_files(call.user, call.repo)
    entry = commit.files.get(call.parts["rest"])
    if entry is None:
        raise no_entry(commit=commit.id)
    name = f"{'' if call.kind == 'models' else call.kind + '/'}{call.repo.id}/{call.parts['rest']}"
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if entry.sha256:
        headers |= {
            "Location": _signed(call, "content", f"{entry.sha256}/{name}"),
            "X-Linked-Etag": f'"{entry.etag}"',
            "X-Linked-Size": str(entry.size),
        }
        return web.Response(status=302, headers=headers)
    return _content(call, entry, name, headers)


@route("HEAD GET", "/lfs/content/{oid}/{rest}")
async def content(call: Call) -> web.Response:
    oid, name = call.parts["oid"], call.parts["rest"]
    _check_signed(call, "content", f"{oid}/{name}")
    entry = call.store.lfs_entry(oid)
    if entry is None:
        raise no_entry()
    return _content(call, entry, name, {"Accept-Ranges": "bytes"})


def _content(call: Call, entry: Entry, name: str, headers: dict[str, str]) -> web.Response:
    """The bytes that are asked for, all or a range; the log notes of which file."""
    if call.request.method == "GET":
        call.request["content"] = name
    try:
        wanted = call.request.http_range
    except ValueError:
        wanted = slice(None)
    headers = {**headers, "ETag": f'"{entry.etag}"', "Content-Type": "application/octet-stream"}
    start, stop, _ = wanted.indices(entry.size)
    if "Range" not in call.request.headers or wanted == slice(None):
        return web.Response(body=call.store.content(entry).read_bytes(), headers=headers)
    if start >= stop:
        return web.Response(status=416, headers={**headers, "Content-Range": f"bytes */{entry.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    with call.store.content(entry).open("rb") as file:
        file.seek(start)
        return web.Response(status=206, body=file.read(stop - start), headers=headers)
