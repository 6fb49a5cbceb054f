"""``cas serve``: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS, tiny_model
from helpers_commands import call
from helpers_serving import Served, until
from helpers_store import make_store
from helpers_writer import prepare

from cas.__main__ import main
from cas.data.collection import Collection, Document
from cas.serving import server
from cas.serving.config import ServeConfig
from cas.serving.server import PACKAGES, bind, model_name
from cas.store.store import Store


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAS_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere: set $CAS_API_KEY"),
        (["--host", "::"], "--host :: can be reached from elsewhere: set $CAS_API_KEY"),
        (["--host", ""], "--host : "),
        (["--host", "0.0.0.0", "--api-key", " "], "--api-key: it is empty"),
        (["--api-key", "x", "--no-api-key"], "--no-api-key, but there is a key"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        (["--port", "70000"], "--port 70000: from 0 to 65535"),
        (["--queue", "0"], "--queue 0: at least 1"),
        (["--timeout", "0"], "--timeout 0.0: more than 0"),
        (["--cartridge-cache", "much"], "--cartridge-cache much: give bytes as 6GiB, 500MB or a number"),
        (["--max-new-tokens", "2000"], "--max-new-tokens 2000: more than --max-tokens 1024"),
        (["--retrieve-k", "40"], "--retrieve-k 40: more than --max-cartridges 32"),
    ],
)
def test_mistakes_are_one_line(words: list[str], reason: str) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    status, out, err = call(main, "serve", "--store", "nowhere", *words)
    assert (status, out) == (2, "") and err.startswith("cas: ") and err.count("\n") == 1
    assert reason in err


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    status, _, err = call(main, "serve")
    assert (status, err.count("\n")) == (2, 1) and "pip install 'cas-cartridges[serve]'" in err


def test_who_may_listen_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        bind(ServeConfig(host=host, port=0)).close()
    bind(ServeConfig(host="0.0.0.0", port=0, no_api_key=True)).close()
    bind(ServeConfig(host="0.0.0.0", port=0, api_key="s3cret")).close()
    monkeypatch.setenv("CAS_API_KEY", "s3cret")
    bind(ServeConfig(host="0.0.0.0", port=0)).close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, err = call(main, "serve", "--store", "nowhere", "--port", str(taken.getsockname()[1]))
    assert status == 2 and err.count("\n") == 1 and re.search("--port .* in use; choose another", err)


def test_the_name_of_a_model_is_no_path(tmp_path: Path) -> None:
    assert model_name("package:reader") == "reader" and model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert model_name(str(tmp_path / "secret" / "qwen")) == "qwen" == model_name("./secret/qwen")
    assert model_name(str(tmp_path)) == tmp_path.name


def test_a_store_without_cartridges(tmp_path: Path) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    with Store.create(tmp_path / "s", tiny_model("llama"), tokens=16):
        pass
    status, _, err = call(main, "serve", "--store", str(tmp_path / "s"), "--port", "0")
    assert status == 2 and err.endswith("has no cartridges yet; go on with its training\n")


def serve_elsewhere(words: list[str]) -> int:
    """The command in a process of its own, with a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        model = tiny_model("llama")  # whose answers never end by themselves here
        patch.setattr(model, "template", replace(model.template, stop_ids=frozenset()))
        return main(["serve", *words])


def test_a_signal_ends_it_when_what_decodes_is_finished(tmp_path: Path) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    documents = Collection("tiny", tuple(Document(id, id.title(), text) for id, text in TEXTS.items()))
    with make_store(tmp_path / "s", tiny_model("llama"), documents):
        pass
    code = "import sys, test_command; sys.exit(test_command.serve_elsewhere(sys.argv[1:]))"
    words = ["--store", str(tmp_path / "s"), "--port", "0", "--batch", "1", "--max-tokens", "900"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CAS_API_KEY": "s3cret"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE
    )
    try:
        assert process.stderr is not None and process.stdout is not None
        line = process.stderr.readline()
        found = re.fullmatch(r".*/s: 5 cartridges, tiny-llama, on http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line + process.stderr.read()
        served = Served(None, int(found[1]), None, "s3cret")  # type: ignore[arg-type]
        body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 150, "cartridges": ["ferry"]}

        def ask() -> Any:
            client, text = served.connect(), json.dumps({**body, "stream": True}).encode()
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nConnection: close\r\n"
            )
            client.sendall(
                f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text
            )
            return client

        def waiting() -> bool:
            return "cas_requests_waiting 1.0" in served.send("/metrics")[2]

        first = ask()
        text = first.recv(100_000)
        assert b"200 OK" in text
        second = ask()
        until(waiting)
        process.send_signal(signal.SIGTERM)
        refused = b""
        while piece := second.recv(10_000):
            refused += piece
        assert b" 503 " in refused and b"shutting_down" in refused
        while piece := first.recv(100_000):
            text += piece
        assert text.count(b'"content"') > 75 and b"data: [DONE]" in text
        assert process.wait(180) == 0
        assert process.stderr.read() == "stopped\n" and process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()


def test_sizes_are_read_as_everywhere() -> None:
    config = ServeConfig(cartridge_cache="2MiB", max_body="1kB")
    assert (config.cache_bytes, config.body_bytes) == (2 << 20, 1000)
