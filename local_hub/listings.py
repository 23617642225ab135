"""Routes that say what a repository holds: facts, trees, refs, history; and those that make and delete refs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from .calls import Call, route
from .cards import metadata_of, tags_of
from .errors import HubError, no_entry, no_revision
from .store import HEADS, PULLS, TAGS, Commit, Entry, Repo

PAGE, PAGE_EXPANDED = 1000, 50


@route("GET", "/api/{kind}/{repo}")
@route("GET", "/api/{kind}/{repo}/revision/{revision}")
async def info(call: Call) -> web.Response:
    commit = call.repo.commit(call.parts.get("revision", "main"))
    facts = _facts(call.repo, commit, blobs=call.flag("blobs"))
    wanted = {name for key in ("expand", "expand[]") for name in call.request.query.getall(key, [])}
    if wanted:
        facts = {name: value for name, value in facts.items() if name in wanted | {"_id", "id"}}
    return web.json_response(facts, dumps=_dumps)


def _dumps(value: Any) -> str:
    return json.dumps(value, default=str)  # YAML has dates, JSON has none


def _facts(repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    about, card, config = repo.about, _card(repo, commit), _config(repo, commit)
    library = card.get("library_name") or ("transformers" if "model_type" in config else None)
    tags = [library, config.get("model_type"), *tags_of(card)]
    tags += [ending for ending in ("safetensors",) if any(path.endswith(f".{ending}") for path in commit.files)]
    facts = {
        "_id": about["_id"],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "lastModified": commit.date,
    }
    facts |= {"createdAt": about["createdAt"], "private": about["private"], "gated": about["gated"], "disabled": False}
    facts |= {"downloads": 0, "likes": 0, "tags": list(dict.fromkeys(tag for tag in tags if tag)), "cardData": card}
    facts["siblings"] = [{"rfilename": path} | (_blob(entry) if blobs else {}) for path, entry in commit.files.items()]
    if repo.kind == "models":
        facts |= {
            "modelId": repo.id,
            "library_name": library,
            "pipeline_tag": card.get("pipeline_tag"),
            "config": config,
        }
        facts["model-index"] = card.get("model-index")
    return {name: value for name, value in facts.items() if value is not None}


def _card(repo: Repo, commit: Commit) -> dict[str, Any]:
    entry = commit.files.get("README.md")
    return metadata_of(repo.read(entry).decode("utf-8", "replace")) if entry else {}


def _config(repo: Repo, commit: Commit) -> dict[str, Any]:
    """The part of config.json that the Hub shows."""
    entry = commit.files.get("config.json")
    try:
        config = json.loads(repo.read(entry)) if entry else {}
    except ValueError:
        return {}
    return {name: config[name] for name in ("architectures", "model_type") if name in config}


def _lfs(entry: Entry, name: str) -> dict[str, Any]:
    return {"lfs": {name: entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}} if entry.sha256 else {}


def _blob(entry: Entry) -> dict[str, Any]:
    return {"size": entry.size, "blobId": entry.oid, **_lfs(entry, "sha256")}


def _under(commit: Commit, folder: str) -> dict[str, Entry]:
    return {path: entry for path, entry in commit.files.items() if path.startswith(f"{folder}/")}


def _listed(repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any] | None:
    """A file or a folder as trees show it; None if there is no such thing."""
    if entry := commit.files.get(path):
        found = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path, **_lfs(entry, "oid")}
    elif inside := _under(commit, path):
        oid = hashlib.sha1(repr(sorted(inside.items())).encode(), usedforsecurity=False).hexdigest()
        found = {"type": "directory", "oid": oid, "size": 0, "path": path}
    else:
        return None
    if expand:
        last = _last_change(repo, commit, path)
        found["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    return found


def _last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    now, last = (commit.files.get(path), _under(commit, path)), commit
    for older in repo.history(commit.id):
        if (older.files.get(path), _under(older, path)) != now:
            break
        last = older
    return last


def _page(call: Call, items: list[Any], size: int) -> tuple[list[Any], dict[str, str]]:
    """The part that is asked for, and the link to the next."""
    start = int(call.request.query.get("cursor", 0))
    if start + size >= len(items):
        return items[start:], {}
    query = urlencode(
        [(key, value) for key, value in call.request.query.items() if key != "cursor"] + [("cursor", str(start + size))]
    )
    link = f'<{call.hub.endpoint}{call.request.rel_url.raw_path}?{query}>; rel="next"'
    return items[start : start + size], {"Link": link}


@route("GET", "/api/{kind}/{repo}/tree/{revision}")
@route("GET", "/api/{kind}/{repo}/tree/{revision}/{rest}")
async def tree(call: Call) -> web.Response:
    commit, folder = call.repo.commit(call.parts["revision"]), call.parts.get("rest", "").strip("/")
    start = f"{folder}/" if folder else ""
    inside = [path.removeprefix(start) for path in commit.files if path.startswith(start)]
    if folder and not inside:
        raise no_entry(f'{folder} does not exist on "{call.parts["revision"]}"', commit.id)
    names = {name for path in inside for name in _steps(path, recursive=call.flag("recursive"))}
    expand = call.flag("expand")
    page, headers = _page(call, sorted(names), PAGE_EXPANDED if expand else PAGE)
    return web.json_response(
        [_listed(call.repo, commit, start + name, expand=expand) for name in page], headers=headers
    )


def _steps(path: str, *, recursive: bool) -> Iterable[str]:
    """The folders on the way to a file and the file, or the first of them only."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1 if recursive else 2)]


@route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
async def paths_info(call: Call) -> web.Response:
    commit, form = call.repo.commit(call.parts["revision"]), await call.request.post()
    expand = str(form.get("expand", "")).lower() in ("1", "true")
    found = [_listed(call.repo, commit, str(path), expand=expand) for path in form.getall("paths", [])]
    return web.json_response([each for each in found if each])


@route("GET", "/api/{kind}/{repo}/refs")
async def refs(call: Call) -> web.Response:
    def listed(prefix: str) -> list[dict[str, str]]:
        found = call.repo.refs(prefix).items()
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

    answer = {"branches": listed(HEADS), "tags": listed(TAGS), "converts": []}
    return web.json_response(answer | ({"pullRequests": listed(PULLS)} if call.flag("include_prs") else {}))


@route("GET", "/api/{kind}/{repo}/commits/{revision}")
async def history(call: Call) -> web.Response:
    commits, headers = _page(call, list(call.repo.history(call.repo.resolve(call.parts["revision"]))), PAGE_EXPANDED)
    return web.json_response([_commit(each) for each in commits], headers=headers)


def _commit(commit: Commit) -> dict[str, Any]:
    shown = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
    return shown | {
        "authors": [{"user": commit.author}],
        "formatted": {"title": commit.title, "message": commit.message},
    }


def _check_name(name: str) -> None:
    if not name or name.startswith(("refs/", "/", ".")) or name.endswith("/") or ".." in name or " " in name:
        raise HubError(400, f"Invalid reference for a branch or tag: {name}")


async def _make_ref(call: Call, ref: str, start: str) -> web.Response:
    call.writer()
    async with call.lock():
        if call.repo.ref_of(ref):
            raise HubError(409, f"Reference already exists: {ref}")
        call.repo.set_ref(ref, call.repo.resolve(start))
    return web.json_response({})


async def _delete_ref(call: Call, ref: str) -> web.Response:
    call.writer()
    if ref == f"{HEADS}main":
        raise HubError(403, "Cannot delete refs/heads/main")
    async with call.lock():
        if not call.repo.ref_of(ref):
            raise no_revision(ref)
        call.repo.delete_ref(ref)
    return web.json_response({})


@route("POST", "/api/{kind}/{repo}/branch/{name}")
async def make_branch(call: Call) -> web.Response:
    body = await call.json()
    _check_name(call.parts["name"])
    return await _make_ref(call, HEADS + call.parts["name"], body.get("startingPoint") or "main")


@route("DELETE", "/api/{kind}/{repo}/branch/{name}")
async def delete_branch(call: Call) -> web.Response:
    return await _delete_ref(call, HEADS + call.parts["name"])


@route("POST", "/api/{kind}/{repo}/tag/{revision}")
async def make_tag(call: Call) -> web.Response:
    body = await call.json()
    _check_name(body.get("tag", ""))
    return await _make_ref(call, TAGS + body["tag"], call.parts["revision"])


@route("DELETE", "/api/{kind}/{repo}/tag/{name}")
async def delete_tag(call: Call) -> web.Response:
    return await _delete_ref(call, TAGS + call.parts["name"])
