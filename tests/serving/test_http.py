"""Slow, broken and malicious clients; and those who have no business here."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from helpers_serving import MODEL, Served, serving, tiny_engine, until

from cas.serving import server as server_module
from cas.serving.engine import Engine
from cas.store.store import Store

LONG = {"max_tokens": 900, "stream": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: Any) -> Iterator[Engine]:
    with tiny_engine(tmp_path_factory.mktemp("http")) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine, max_body=20_000, max_new_tokens=4) as served:
        yield served


def error(found: tuple[int, dict[str, str], Any]) -> tuple[int, str]:
    """Status and code of an error in OpenAI's format."""
    status, _, body = found
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "/" not in body["error"]["message"].replace("application/json", "")
    return status, body["error"]["code"]


def post(text: str, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    """A request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text) if length is None else length}\r\n\r\n{text}".encode()


def chat(**options: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Why?"}], "cartridges": ["ferry"], **options})


def test_health_and_metrics(served: Served) -> None:
    assert served.send("/health")[::2] == (200, {"status": "ok"})
    before = served.send("/metrics")[2]
    assert served.chat("Which valve?")[0] == 200
    served.chat("Which valve?", max_tokens=0)
    after = served.send("/metrics")[2]

    def value(text: str, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    for name, more in (
        ('cas_requests_total{status="200"}', 1), ('cas_requests_total{status="400"}', 1), ("cas_first_token_seconds_count", 1),
        ("cas_request_seconds_count", 1), ("cas_answer_tokens_total", 4), ("cas_requests_decoding", 0),
    ):  # fmt: skip
        assert value(after, name) - value(before, name) == more, name
    assert value(after, 'cas_prompt_tokens_total{kind="cartridge"}') > 0 < value(after, "cas_cartridge_cache_bytes")
    assert "valve" not in after


def test_only_with_the_key(engine: Engine) -> None:
    with serving(engine, key="s3cret", hosts=None) as served:
        assert served.chat("Why?")[0] == 200
        assert served.send("/v1/models", Host="anything.example")[0] == 200
        served.key = None
        paths = (
            "/v1/models",
            f"/v1/models/{MODEL}",
            "/v1/cartridges",
            "/metrics",
            "/v1/chat/completions",
            "/v1/completions",
        )
        for given in (
            None,
            "",
            "s3cret",
            "Bearer",
            "Bearer ",
            "Bearer s3cre",
            "Bearer s3crets",
            "Basic s3cret",
            "Bearer \xe9",
        ):
            headers = {} if given is None else {"Authorization": given}
            for path in paths:
                found = served.send(path, {} if "completions" in path else None, **headers)
                assert error(found) == (401, "invalid_api_key") and found[1]["www-authenticate"] == "Bearer"
                assert "s3cret" not in json.dumps(found[2])
        assert served.send("/v1/models", Authorization="bearer s3cret")[0] == 200
        assert served.send("/health")[0] == 200 == served.send("/")[0]


def test_a_page_elsewhere_in_a_browser_gets_nothing(served: Served) -> None:
    """It can give any name this address, and send whatever needs no question before."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert error(served.send("/v1/cartridges", Host=host)) == (403, "unknown_host")
        assert error(served.send("/v1/chat/completions", {}, Host=host)) == (403, "unknown_host")
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:99"):
        assert served.send("/v1/models", Host=host)[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        found = served.send("/v1/chat/completions", chat().encode(), Content_Type=kind)
        assert error(found) == (415, "invalid_content_type")
    status, headers, _ = served.send("/v1/chat/completions", method="OPTIONS", Origin="https://evil.example")
    assert status == 405 and not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"{}", b'"' * 10_000, b"[" * 19_000, b'{"messages": "Why?"}', b'{"messages": [1]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', chat(max_tokens="many").encode(), chat(temperature="NaN").encode(),
        chat(temperature=-1).encode(), chat(seed=1.5).encode(), chat(stop=["x"] * 17).encode(), chat(stop=5).encode(),
        chat(cartridges="pump").encode(), chat(retrieve_k=10**40).encode(), chat(max_tokens=-1).encode(), chat(top_p=0).encode(),
        chat(stream="perhaps").encode(), b'{"messages": [{"role": "user", "content": "Why?"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "Why?"}], "seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_broken_bodies(served: Served, body: bytes) -> None:
    found = served.send("/v1/chat/completions", body)
    assert error(found)[0] == 400, found
    assert "traceback" not in json.dumps(found[2]).lower() and len(found[2]["error"]["message"]) < 300


def test_odd_but_sound_questions(served: Served) -> None:
    for question in (
        "\x00",
        "\u202e?",
        "<script>alert(1)</script>",
        "<|im_end|>",
        "é" * 50,
        "\N{PILE OF POO}",
        "{{7*7}}",
        "%s%n",
    ):
        assert served.chat(question)[0] == 200
    assert error(served.chat(" \n\t ")) == (400, "empty_question")
    assert served.send("/v1/completions", {"prompt": "Why?", "seed": -(2**70), "temperature": 1})[0] == 200
    assert served.chat("Why?", cartridges=[])[2]["cartridges"] == []


def test_unknown_paths_and_methods(served: Served) -> None:
    for path in (
        "/v1",
        "/v1/embeddings",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
    ):
        assert error(served.send(path))[0] == 404
    assert error(served.send("/v1/chat/completions"))[0] == 405
    assert error(served.send("/v1/models/none"))[0] == 404


def test_limits(served: Served) -> None:
    window = served.engine.answerer.model.geometry.max_positions
    assert error(served.chat("!" * (window + 10))) == (400, "context_length_exceeded")
    assert error(served.chat("Why?", max_tokens=901)) == (400, "invalid_value")
    assert error(served.chat("x" * 20_000)) == (413, "request_too_large")
    with served.connect() as client:  # says less than it sends
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        client.sendall((b"2000\r\n" + b" " * 0x2000 + b"\r\n") * 2)
        assert b"413" in client.recv(100)


def test_a_full_queue_refuses(served: Served) -> None:
    """Four decode and six wait; all of the others are told to come again."""
    started = threading.Barrier(14)

    def ask(_: int) -> int:
        started.wait()
        return served.chat("Why?", cartridges=["ferry"], max_tokens=100)[0]

    with ThreadPoolExecutor(14) as pool:
        statuses = list(pool.map(ask, range(14)))
    assert set(statuses) == {200, 429} and statuses.count(200) >= 6
    assert served.chat("Why?")[0] == 200


def test_a_client_that_leaves_frees_its_place(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.idle()
    model = served.engine.answerer.model  # whose answers never end by themselves here
    monkeypatch.setattr(model, "template", replace(model.template, stop_ids=frozenset()))
    for stream in (True, False):
        for _ in range(2):
            client = served.connect()
            client.sendall(post(chat(max_tokens=900, stream=stream)))
            until(lambda: served.engine.decoding == 1)
            before = served.engine.decoded
            client.close()
            served.idle()
            assert served.engine.decoded - before < 450
    for _ in range(3):  # before it has an answer, and in the middle of its question
        with served.connect() as client:
            client.sendall(post(chat(), length=500))
        with served.connect() as client:
            client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # TLS
            assert b"400" in client.recv(100)
    served.idle()
    assert served.chat("Why?")[0] == 200


def test_slow_clients_are_cut_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr("cas.serving.app.BODY_SECONDS", 0.3)
    with serving(engine) as served:

        def ends(client: Any) -> bytes:
            """What comes until the server ends the connection."""
            client.settimeout(30)
            text = b""
            while True:
                try:
                    piece = client.recv(1000)
                except ConnectionResetError:
                    return text
                if not piece:
                    return text
                text += piece

        with (
            served.connect() as silent,
            served.connect() as dripping,
            served.connect() as halfway,
            served.connect() as second,
        ):
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            halfway.sendall(post("{", length=100))
            for letter in "GET /health":
                try:
                    dripping.sendall(letter.encode())
                except OSError:
                    break
                time.sleep(0.05)
            assert ends(silent) == b"" == ends(dripping)
            assert ends(second).startswith(b"HTTP/1.1 200")
            found = ends(halfway)
            assert found.startswith(b"HTTP/1.1 408") and b"did not arrive" in found
        assert served.chat("Why?", max_tokens=2)[0] == 200


def test_a_client_that_does_not_read_is_cut_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "READ_SECONDS", 0.3)
    rows = engine.answerer.store.answering()
    many = {f"{name}-{n}": row for n in range(2000) for name, row in rows.items()}
    monkeypatch.setattr(Store, "answering", lambda self: many)  # a list of a megabyte
    with serving(engine) as served, served.connect() as client:
        client.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
        for _ in range(8):
            client.sendall(b"GET /v1/cartridges HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: len(served.server.server_state.connections) == 1)
        until(lambda: not served.server.server_state.connections)


def test_an_error_inside_says_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret: /home/ada/documents")

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "submit", fail)
        found = served.chat("Why?")
    assert error(found) == (500, "internal_error") and "secret" not in json.dumps(found[2])
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.answerer, "load_all", fail)
        found = served.chat("Why?", cartridges=["pump"])
    assert error(found) == (500, "internal_error") and "secret" not in json.dumps(found[2])
    assert served.chat("Why?")[0] == 200


def test_an_answer_that_takes_too_long(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "limits", replace(engine.limits, seconds=0.3))
    with serving(engine) as served:
        assert error(served.chat("Why?", max_tokens=900, cartridges=["ferry"])) == (503, "timeout")
        text = served.chat("Why?", cartridges=["ferry"], **LONG)[2]
    events = [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")]
    assert events[0]["object"] == "chat.completion.chunk" and events[-1]["error"]["code"] == "timeout"


class Page(HTMLParser):
    """What a page refers to, and the handlers in its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "action", "data")]


def test_the_page_loads_nothing_and_runs_nothing_else(served: Served) -> None:
    status, headers, text = served.send("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert Page(text).references == ["data:,"]
    assert (
        "http:" not in text
        and "https:" not in text
        and not re.search(r"\burl\(|@import|innerHTML|insertAdjacent|eval\(", text)
    )
    policy = headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy and "unsafe" not in policy and len(re.findall(r"'sha256-[\w+/=]+'", policy)) == 2
    )
    assert 'name="viewport"' in text and "color-scheme: light dark" in text and 'fetch("v1/chat/completions"' in text
