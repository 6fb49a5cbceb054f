"""A server over a tiny store, in this process; and requests that no well-behaved client would send."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS, tiny_model
from helpers_store import make_store

from cas.answering.answerer import Answerer
from cas.data.collection import Collection, Document
from cas.serving.engine import Engine, Limits
from cas.serving.server import PACKAGES, make_server
from retrieval import HashEmbedder

MODEL = "tiny-llama"


@dataclass
class Served:
    """Where a server listens, and what is behind it."""

    engine: Engine
    port: int
    server: Any
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON (or text) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        if self.key is not None:
            sent["Authorization"] = f"Bearer {self.key}"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(text) if is_json else text

    def chat(self, question: str, **options: Any) -> tuple[int, dict[str, str], Any]:
        """One question."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": question}], **options}
        return self.send("/v1/chat/completions", body)

    def connect(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=180)

    def idle(self) -> None:
        """Wait until nothing decodes or waits."""
        until(lambda: self.engine.decoding == self.engine.queued == 0)


def until(condition: Any, seconds: float = 180.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@contextmanager
def tiny_engine(folder: Path, **limits: Any) -> Iterator[Engine]:
    """Over a store of the five documents."""
    documents = Collection("tiny", tuple(Document(id, id.title(), text) for id, text in TEXTS.items()))
    with make_store(folder / "s", tiny_model("llama"), documents, tokens=None, ratio=2) as store:
        answerer = Answerer(tiny_model("llama"), store, HashEmbedder())
        with Engine(answerer, Limits(**({"rows": 4, "queue": 6, "tokens": 900} | limits))) as engine:
            yield engine


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Served]:
    """A server in a thread, over an engine that the caller closes."""
    for package in PACKAGES:
        pytest.importorskip(package)
    from cas.serving.app import Settings, create_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(create_app(engine, Settings(MODEL, **settings)), engine, 60)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(engine, listener.getsockname()[1], server, settings.get("key"))
    finally:
        drain, engine.drain = engine.drain, lambda: None  # type: ignore[method-assign]
        server.should_exit = True
        thread.join(60)
        engine.drain = drain  # type: ignore[method-assign]
        assert not thread.is_alive()
