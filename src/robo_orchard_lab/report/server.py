"""Server of the reports of a folder, on this machine alone: starlette application of ``view``."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from robo_orchard_lab.report.builds import Builds, Document
from robo_orchard_lab.report.page import (
    LIST_SCRIPTS,
    LIVE_SCRIPTS,
    content_policy,
    embeddable,
    to_html,
)

HOSTS = ("127.0.0.1", "localhost")

_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"


def make_app(folder: Path, token: str) -> Starlette:
    """Return the application that shows the runs in a folder, read-only.

    All addresses begin with the token. Pages: ``/TOKEN/`` and ``/TOKEN/run/PATH``; their data:
    ``/TOKEN/runs`` and ``/TOKEN/data/PATH``. Files are not served.

    Args:
        folder: folder with runs.
        token: secret of the addresses.
    """
    builds = Builds(folder)

    async def list_page(request: Request) -> Response:
        return _html("Runs", embeddable({}), LIST_SCRIPTS)

    async def list_data(request: Request) -> Response:
        return _data(request, await builds.runs())

    async def run_page(request: Request) -> Response:
        found = await builds.run(request.path_params["path"])
        return _missing() if found is None else _html(found.title, found.data, LIVE_SCRIPTS)

    async def run_data(request: Request) -> Response:
        found = await builds.run(request.path_params["path"])
        return _missing() if found is None else _data(request, found)

    async def busy(request: Request, error: Exception) -> Response:
        return PlainTextResponse("the process that reads the run died; try again\n", 503)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        builds.close()

    return Starlette(
        routes=[
            Route("/", list_page),
            Route("/runs", list_data),
            Route("/run/{path:path}", run_page),
            Route("/data/{path:path}", run_data),
        ],
        middleware=[
            Middleware(_SecurityHeaders),
            # A page of another site, whose name leads to this machine, has its own name here.
            Middleware(TrustedHostMiddleware, allowed_hosts=[*HOSTS], www_redirect=False),
            Middleware(_TokenInPath, token=token),
        ],
        exception_handlers={BrokenProcessPool: busy},
        lifespan=lifespan,
    )


def _html(title: str, document: str, scripts: tuple[str, ...]) -> Response:
    policy = f"{content_policy(scripts)}; frame-ancestors 'none'"
    return Response(
        to_html(title, document, scripts),
        headers={"content-security-policy": policy},
        media_type="text/html",
    )


def _data(request: Request, document: Document) -> Response:
    headers = {"etag": document.tag}
    if request.headers.get("if-none-match") == document.tag:
        return Response(status_code=304, headers=headers)
    return Response(document.data, headers=headers, media_type="application/json")


def _missing() -> Response:
    return PlainTextResponse("there is no run\n", 404)


class _TokenInPath:
    """Middleware that answers 404 unless the path begins with the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # the start and the end of the server
            return
        given = [*scope["path"].split("/", 2), ""][1]
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self._token):
            await PlainTextResponse("not found\n", 404)(scope, receive, send)
            return
        await self._app({**scope, "root_path": f"/{given}"}, receive, send)


class _SecurityHeaders:
    """Middleware that adds headers to each answer, also of errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("content-security-policy", _NOTHING)
            await send(message)

        with_headers: Callable[[Message], Awaitable[None]] = send_with_headers
        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
