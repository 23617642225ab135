"""The Hub over HTTP: requests find their handlers, answers are logged."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from urllib.parse import unquote

from aiohttp import web

from . import commits, discussions, files, listings, repos  # noqa: F401 - they register their routes
from .calls import ROUTES, Call, Handler, Hub
from .errors import HubError, no_repository


async def _dispatch(hub: Hub, request: web.Request) -> web.StreamResponse:
    path = request.rel_url.raw_path
    for methods, pattern, handler in ROUTES:
        match = pattern.fullmatch(path)
        if match and request.method in methods:
            parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
            call = Call(hub, request, parts, kind=parts.get("kind") or parts.get("prefix", "").strip("/") or "models")
            if not path.startswith("/lfs/"):  # addresses there are signed, and nobody needs a name
                call.user = hub.access.user(request.headers.get("Authorization"))
            if "repo" in parts:
                call.find()
            return await handler(call)
    if re.fullmatch(r"/api/(models|datasets|spaces)/.+|/[^/]+/resolve/.+", path) and not _names_a_repo(hub, path):
        raise no_repository(401 if request.headers.get("Authorization") is None else 404)
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def _names_a_repo(hub: Hub, path: str) -> bool:
    """Whether an unknown call is about a repository that is there; ids without a namespace are nowhere."""
    api, kind, *rest = path.strip("/").split("/")
    return api == "api" and len(rest) > 1 and hub.store.find(kind, "/".join(rest[:2])) is not None


@web.middleware
async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log before the answer goes out: whoever has the answer can read the log."""
    hub = request.app[HUB]
    status = 500
    try:
        response = await _dispatch(hub, request)
        status = response.status
        return response
    except HubError as error:
        status = error.status
        return web.json_response(
            {"error": error.message}, status=status, headers={"X-Request-Id": "test", **error.headers}
        )
    except web.HTTPException as redirect:
        status = redirect.status
        raise
    finally:
        hub.log(request, status)


HUB = web.AppKey("hub", Hub)


async def serve(hub: Hub, port: int, ready: Callable[[], None], *, attached: bool) -> None:
    """Listen until killed, or if `attached` until whoever started the process is gone and the standard input ends."""
    application = web.Application(middlewares=[_answer], client_max_size=1 << 30)
    application[HUB] = hub
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    hub.port = runner.addresses[0][1]
    ended = asyncio.Event()
    if attached:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    ready()
    await ended.wait()
