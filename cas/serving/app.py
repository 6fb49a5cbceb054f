"""The HTTP application: OpenAI's paths in front of the engine, and who may use them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from cas.serving.engine import Engine
from cas.serving.metrics import Metrics
from cas.serving.protocol import Body, ChatBody, CompletionBody, Reading, Writing, error_body, parse_body
from cas.serving.requests import Event, Finished, RequestError, Ticket

BODY_SECONDS = 20.0  # for a request's body to arrive
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
LEFT = 499  # the status under which a client that left is counted

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


@dataclass(frozen=True)
class Settings:
    """model: the name that clients know the model by. key: what they must send. hosts: names that this server may be
    called by; None for any, which only a key allows, because a page in a browser can give any name this address.
    max_body: bytes of a request. retrieve_k, max_new_tokens: where a request does not say."""

    model: str
    key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK_NAMES
    max_body: int = 256 << 10
    retrieve_k: int = 4
    max_new_tokens: int = 128


class _ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application over a running engine."""
    store, metrics = engine.answerer.store, Metrics(engine)
    reading = Reading(engine.answerer.model, settings.retrieve_k, settings.max_new_tokens)
    started = int(time.time())

    def known_host(request: HttpRequest) -> None:
        host = re.sub(r":\d*$", "", request.headers.get("host", "").lower())
        if settings.hosts is not None and host not in settings.hosts:
            raise RequestError(403, "unknown_host", "call this server by its own address, or start it with an API key")

    def authorized(request: HttpRequest) -> None:
        if settings.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Digests, so that the time says nothing about the key's length either.
        digests = (hashlib.sha256(key.strip().encode()).digest() for key in (given, settings.key))
        if not hmac.compare_digest(*digests) or scheme.lower() != "bearer":
            raise RequestError(401, "invalid_api_key", "send the API key of this server: Authorization: Bearer KEY")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(known_host)])
    private = [Depends(authorized)]

    @app.exception_handler(RequestError)
    async def refused(_: HttpRequest, error: RequestError) -> JSONResponse:
        return _refusal(error, metrics)

    @app.exception_handler(HTTPException)
    async def wrong_path(_: HttpRequest, error: HTTPException) -> JSONResponse:
        message = {404: "there is no such path", 405: "this path has another method"}.get(error.status_code, "refused")
        return JSONResponse(error_body(error.status_code, "invalid_path", message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        metrics.count(500)  # the traceback goes into this server's log
        return JSONResponse(error_body(500, "internal_error", "the server failed on this request"), 500)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics", dependencies=private)
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    about_model = {"id": settings.model, "object": "model", "created": started, "owned_by": "cas"}

    @app.get("/v1/models", dependencies=private)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about_model]}

    @app.get("/v1/models/{name:path}", dependencies=private)
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name, settings.model)
        return about_model

    @app.get("/v1/cartridges", dependencies=private)
    def cartridges() -> dict[str, Any]:
        rows = store.answering().values()
        data = [
            {
                "id": r.id,
                "object": "cartridge",
                "title": r.title,
                "positions": r.p,
                "tokens": r.tokens,
                "steps": r.steps,
            }
            for r in rows
        ]
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat(request: HttpRequest) -> Response:
        return await respond(request, ChatBody)

    @app.post("/v1/completions", dependencies=private)
    async def complete(request: HttpRequest) -> Response:
        return await respond(request, CompletionBody)

    async def respond(request: HttpRequest, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        raw = await _read(request, settings.max_body)

        def submit(listener: Callable[[Event], None]) -> tuple[Body, Ticket]:
            body = parse_body(kind, raw)
            _check_model(body.model, settings.model)
            return body, engine.submit(reading.request(body), listener)

        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        body, ticket = await run_in_threadpool(submit, listen)
        return _Answering(ticket, events, Writing(body, settings.model), bool(body.stream), metrics)

    return app


class _Answering(Response):
    """An answer, as it is decoded or whole. Where the client leaves, so does its request."""

    def __init__(
        self, ticket: Ticket, events: asyncio.Queue[Event], writing: Writing, stream: bool, metrics: Metrics
    ) -> None:
        super().__init__()
        self._ticket, self._events, self._writing, self._metrics = ticket, events, writing, metrics
        self._stream = stream

    async def __call__(self, scope: Any, receive: _Receive, send: _Send) -> None:
        left = asyncio.create_task(_left(receive))
        try:
            answer = self._next(left)
            first = await anext(answer)
            if isinstance(first, RequestError):
                await _refusal(first, self._metrics)(scope, receive, send)
                return
            self._metrics.first_token(time.perf_counter() - self._ticket.created)
            await (
                self._send_stream(first, answer, send) if self._stream else self._send_whole(first, answer, scope, send)
            )
        except _ClientLeft:
            self._metrics.count(LEFT)
        finally:
            self._ticket.cancel()
            left.cancel()

    async def _next(self, left: asyncio.Task[None]) -> AsyncIterator[Event]:
        """The engine's events. Raises: _ClientLeft."""
        while True:
            event = asyncio.ensure_future(self._events.get())
            await asyncio.wait({event, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                event.cancel()
                raise _ClientLeft
            yield event.result()

    async def _send_whole(self, first: Event, answer: AsyncIterator[Event], scope: Any, send: _Send) -> None:
        event = first
        while isinstance(event, str):
            event = await anext(answer)
        if isinstance(event, RequestError):
            response = _refusal(event, self._metrics)
        else:
            response = JSONResponse(self._writing.whole(event))
            self._count(event)
        await response(scope, _nothing, send)

    async def _send_stream(self, first: Event, answer: AsyncIterator[Event], send: _Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        event, chunks = first, self._writing.first()
        while isinstance(event, str):
            await send(_chunks([*chunks, self._writing.piece(event)]))
            event, chunks = await anext(answer), []
        if isinstance(event, RequestError):
            self._metrics.count(event.status)
            await send(_chunks([*chunks, _error(event)]))
        else:
            self._count(event)
            await send(_chunks([*chunks, *self._writing.last(event)], b"data: [DONE]\n\n"))
        await send({"type": "http.response.body", "body": b""})

    def _count(self, finished: Finished) -> None:
        self._metrics.count(200)
        self._metrics.answered(finished, time.perf_counter() - self._ticket.created)


async def _left(receive: _Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> _Message:
    return {"type": "http.disconnect"}


def _chunks(parts: list[dict[str, Any]], end: bytes = b"") -> _Message:
    """Server-sent events."""
    data = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts)
    return {"type": "http.response.body", "body": data + end, "more_body": True}


async def _read(request: HttpRequest, most: int) -> bytes:
    """A request's body. Raises: RequestError where it is not JSON, too large, or too slow."""
    # A page elsewhere in a browser can send other types here without asking; JSON it cannot.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "invalid_content_type", "send Content-Type: application/json")
    too_large = RequestError(413, "request_too_large", f"a request has at most {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(LEFT, "client_left", "the client left")
                raw += message.get("body", b"")
                if len(raw) > most:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(raw)
    except TimeoutError:
        raise RequestError(408, "request_timeout", f"the request did not arrive within {BODY_SECONDS:.0f} s") from None


def _check_model(given: str | None, ours: str) -> None:
    if given not in (None, ours):
        raise RequestError(404, "model_not_found", f"the model of this server is {ours}", "model")


def _error(error: RequestError) -> dict[str, Any]:
    return error_body(error.status, error.code, str(error), error.parameter)


def _refusal(error: RequestError, metrics: Metrics) -> JSONResponse:
    metrics.count(error.status)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    closing = {"Connection": "close"} if error.status in (408, 413) else {}  # the rest of the body is not wanted
    return JSONResponse(_error(error), error.status, headers.get(error.status, {}) | closing)


def _page_headers(page: str) -> dict[str, str]:
    """Only the page's own style and script run, and it talks to this server alone."""

    def digest(tag: str) -> str:
        inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


_PAGE = files("cas.serving").joinpath("page.html").read_text(encoding="utf-8")
_PAGE_HEADERS = _page_headers(_PAGE)
