"""Questions that an endpoint writes: a server of the tests' own on 127.0.0.1."""

from __future__ import annotations

import email.utils
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_commands import TRAIN, call
from helpers_lists import LISTS, Answer, ListWriterDouble, Served, completion, failure, serving
from helpers_writer import plain, wells

from cas import train
from cas.errors import ConfigError, RunError
from cas.model.frozen import FrozenModel
from cas.selfstudy import endpoint as endpoints
from cas.selfstudy import synthesize as selfstudy
from cas.selfstudy.conversations import Conversations, read_unit
from cas.selfstudy.endpoint import Endpoint, EndpointWriter, open_endpoint
from cas.selfstudy.planners import History, make_planner, split_documents
from cas.selfstudy.prompt_styles import ENDPOINT
from cas.selfstudy.synthesize import SelfStudy, synthesize
from cas.store.store import Store

SECRET = "sk-a-very-secret-key-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*endpoints.KEYS, "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def teacher(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> ListWriterDouble:
    """Our model answers; it must not be asked for questions."""
    double = ListWriterDouble(model)
    monkeypatch.setattr(selfstudy, "generate", double)
    return double


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that each failed attempt waits; none is waited for."""
    waits: list[float] = []

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        if timeout is None or type(threading.current_thread()).__name__ == "TMonitor":  # of a progress bar
            return original(self, timeout)
        waits.append(timeout)
        return False

    original = threading.Event.wait
    monkeypatch.setattr(endpoints.threading.Event, "wait", wait)
    return waits


def options(served: Served, **more: Any) -> dict[str, Any]:
    return LISTS | {"writer": "auto", "writer_url": served.url, "calls_per_unit": 4} | more


def ask(served: Served, **fields: Any) -> tuple[str, bool]:
    endpoint = Endpoint(served.url, "writer-70b", **({"timeout": 5.0} | fields))
    return endpoint.complete("Tell me.", 100, 0.7, threading.Event())


def join_writers() -> None:
    """Wait for requests that an interrupted run left behind."""
    for thread in threading.enumerate():
        if thread.name == endpoints.THREAD:
            thread.join(30)


# -- one request -------------------------------------------------------------------------------------------------------


def test_a_request(served: Served) -> None:
    served.script = [
        completion("1. Who?"),
        completion("1. Wh", finish="length"),
        completion(None),
        completion("1. Who \ud83d?"),
    ]
    assert [ask(served) for _ in range(4)] == [("1. Who?", True), ("1. Wh", False), ("", True), ("1. Who ??", True)]
    assert served.requests[0] == {
        "model": "writer-70b",
        "messages": [{"role": "user", "content": "Tell me."}],
        "max_tokens": 100,
        "temperature": 0.7,
    }


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_address_may_be_written_in_several_ways(served: Served, ending: str) -> None:
    endpoint = Endpoint(served.url + ending, "writer-70b")
    assert endpoint.complete("Hi", 5, 0.7, threading.Event()) == ("OK", True)


@pytest.mark.parametrize(
    "failed",
    [
        failure(500),
        failure(503),
        failure(529),
        failure(429, "slow down"),
        failure(408),
        (200, {}, b"{broken"),
        (200, {}, b"<html>\xff</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[]"),
        (200, {}, b"null"),
        (200, {}, b"[" * 100_000),
        (200, {}, b'{"choices": [{"message": {"content": 7}}]}'),
        (502, {}, b"<html>Bad Gateway</html>"),
    ],
    ids=str,
)
def test_failures_that_may_pass_are_repeated(served: Served, waits: list[float], failed: Answer) -> None:
    """With waits that double."""
    served.script = [failed, failed, failed]
    assert ask(served) == ("OK", True) and len(served.requests) == 4
    assert len(waits) == 3 and all(0.8 * 2**n <= w <= 1.2 * 2**n for n, w in enumerate(waits))


def test_retry_after_is_honored(served: Served, waits: list[float]) -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    served.script = [failure(429, Retry_After=t) for t in ("7", "0", soon, "86400", "soon")]
    assert ask(served) == ("OK", True)
    assert waits[:2] == [7, 0] and 27 < waits[2] <= 30
    assert waits[3] == endpoints.LONGEST_WAIT and 12 < waits[4] < 20  # a day is too long; "soon" is no number


def test_waits_are_real(served: Served) -> None:
    served.script = [failure(429, Retry_After="0.4"), failure(500)]
    started = time.monotonic()
    assert ask(served, first_wait=0.05) == ("OK", True)
    assert 0.4 < time.monotonic() - started < 20
    assert served.times[1] - served.times[0] > 0.4


def test_a_slow_reply_is_asked_for_again(served: Served, waits: list[float]) -> None:
    served.seconds = 3.0

    def quicker() -> None:
        if len(served.requests) > 1:
            served.seconds = 0

    served.on_request = quicker
    assert ask(served, timeout=1.0) == ("OK", True) and waits


def test_all_attempts_failed(served: Served, waits: list[float]) -> None:
    served.script = [failure(503, "over\nloaded \x1b[2J")] * 99
    with pytest.raises(
        RunError, match=r"6 attempts failed, .* HTTP 503, over loaded .*; run the same command again"
    ) as caught:
        ask(served)
    assert len(served.requests) == 6 and len(waits) == 5 and "\n" not in str(caught.value)


def test_nobody_is_there(waits: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunError, match="Connection refused"):
        Endpoint(url, "m").complete("Hi", 5, 0.7, threading.Event())
    with pytest.raises(ConfigError, match=r"Connection refused; is the server running\?"):
        open_endpoint(SelfStudy(writer_url=url))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failure(401, SECRET), r"HTTP 401, the key was refused; set \$CAS_WRITER_KEY"),
        (failure(403, SECRET), r"HTTP 403, the key was refused; set \$CAS_WRITER_KEY"),
        (failure(404, SECRET), r"HTTP 404, no such address or no model 'writer-70b'; the address mostly ends in /v1"),
        (failure(402, f"pay {SECRET} first"), r"HTTP 402, pay \*\*\* first"),
        (failure(400, "bad request"), "HTTP 400, bad request"),
        ((405, {}, b""), "HTTP 405, Method Not Allowed"),
        (failure(302, "elsewhere", Location="http://127.0.0.1:1/"), "HTTP 302, elsewhere"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_refused_request_ends_at_once(served: Served, answer: Answer, message: str) -> None:
    served.script = [answer] * 9
    with pytest.raises(ConfigError, match=message) as caught:
        ask(served, key=SECRET)
    assert len(served.requests) == 1
    assert "\n" not in str(caught.value) and SECRET not in repr(caught.value) and caught.value.__cause__ is None


def test_options_that_the_endpoint_refuses_are_left_out(served: Served) -> None:
    served.script = [failure(400, "Unsupported parameter: 'max_tokens'"), failure(422, "temperature must be 1")]
    endpoint = Endpoint(served.url, "writer-70b")
    assert endpoint.complete("Hi", 5, 0.7, threading.Event()) == ("OK", True)
    assert endpoint.complete("Hi", 5, 0.7, threading.Event()) == ("OK", True)
    assert [sorted(body) for body in served.requests] == [
        ["max_tokens", "messages", "model", "temperature"],
        ["messages", "model", "temperature"],
        ["messages", "model"],
        ["messages", "model"],
    ]
    served.script = [failure(400, "content management policy")]  # this text alone: others were fine
    assert endpoint.complete("Hi", 5, 0.7, threading.Event()) == ("", True)


# -- the key and the model's name --------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.key, settings = SECRET, SelfStudy(writer_url=served.url)
    with pytest.raises(ConfigError, match=r"HTTP 401, a key is needed; set \$CAS_WRITER_KEY"):
        open_endpoint(settings)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "\n")
    endpoint = open_endpoint(settings)
    assert endpoint.model == "writer-70b" and SECRET not in repr(endpoint)
    endpoint.check()
    monkeypatch.setenv("CAS_WRITER_KEY", "another")
    with pytest.raises(ConfigError, match="the key was refused") as caught:
        open_endpoint(settings)
    assert "another" not in str(caught.value)
    for key in ("two words", "schlüssel", "a\nb"):
        monkeypatch.setenv("CAS_WRITER_KEY", key)
        with pytest.raises(ConfigError, match="characters that no key has") as caught:
            open_endpoint(settings)
        assert key not in str(caught.value)


def test_the_name_of_the_model(served: Served, waits: list[float]) -> None:
    settings = SelfStudy(writer_url=served.url)
    assert open_endpoint(settings).model == "writer-70b"
    served.models = ["a", "b"]
    with pytest.raises(ConfigError, match=r"give --writer-model \(one of a, b\)"):
        open_endpoint(settings)
    endpoint = open_endpoint(SelfStudy(writer_url=served.url, writer_model="b"))
    endpoint.check()
    assert served.requests[-1]["model"] == "b"
    with pytest.raises(ConfigError, match="no model 'c'"):
        open_endpoint(SelfStudy(writer_url=served.url, writer_model="c")).check()
    other = served.url.removesuffix("/v1")
    with pytest.raises(ConfigError, match=r"give --writer-model \(the endpoint does not list its models\)"):
        open_endpoint(SelfStudy(writer_url=other))
    with pytest.raises(ConfigError, match="the address mostly ends in /v1"):
        open_endpoint(SelfStudy(writer_url=other, writer_model="b")).check()


# -- self-study --------------------------------------------------------------------------------------------------------


def test_the_endpoint_asks_and_our_model_answers(
    new_store: Callable[..., Store], model: FrozenModel, teacher: ListWriterDouble, served: Served
) -> None:
    store, documents = new_store(), wells(10, 8, 9)
    conversations = synthesize(model, documents, store, **options(served))
    assert len(conversations) >= 60 and set(conversations.by_document) == {"alder", "birch", "cedar"}
    assert teacher.prompts == [] and teacher.answered > 60
    for items in conversations.by_document.values():
        for c in items:
            assert c.question.startswith("Is it so that") and c.top_ids.shape == (len(c.answer), 5)
    assert conversations.dropped["malformed line"] == len(served.requests)  # "Here is the list:"
    for body in served.requests:
        content = body["messages"][0]["content"]
        assert "in the language of the text" in content
        assert content.startswith(tuple(f"Text:\n\n{d.title}" for d in documents.documents))
        assert body["temperature"] == 0.7 and body["max_tokens"] == 4 * 8 * 60
    made_with = json.loads(read_unit(store.conversations / "unit-000000.parquet")[2])
    assert made_with["writer"] == "list" and made_with["writer_model"] == "writer-70b"
    assert "127.0.0.1" not in json.dumps(made_with) and "writer_url" not in made_with


def test_malformed_replies_are_counted(
    new_store: Callable[..., Store], model: FrozenModel, teacher: ListWriterDouble, served: Served
) -> None:
    served.script = [
        completion("I'd rather not."),
        completion(None),
        completion("1. Is it so that Alder Well is l", "length"),
    ]
    conversations = synthesize(model, wells(10, 8), new_store(), **options(served, conversations=20))
    assert conversations.dropped["malformed reply"] == 3 and conversations.dropped["unfinished question"] == 1


def test_replies_that_are_of_no_use_end_the_synthesis(
    new_store: Callable[..., Store], model: FrozenModel, teacher: ListWriterDouble, served: Served
) -> None:
    served.script = [completion("I'd rather not.")] * 5000
    with pytest.raises(RunError, match=r"kept none of \d+ questions .*\d malformed reply.*endpoint's model") as caught:
        synthesize(model, wells(4), new_store(), **options(served, conversations=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (20, 6)])
def test_concurrency(model: FrozenModel, served: Served, concurrency: int, most: int) -> None:
    """As many requests at a time as allowed; replies stand in the order of the calls."""
    settings = SelfStudy(writer_url=served.url, writer_concurrency=concurrency, calls_per_unit=6)
    calls = make_planner(split_documents(model, wells(10, 8, 9)), ENDPOINT, settings).plan(0, History())
    together = threading.Barrier(most)
    served.on_request = lambda: together.wait(30) and None
    replies = EndpointWriter(Endpoint(served.url, "writer-70b"), 5, settings.writer_concurrency).write(calls, {})
    assert served.most_at_once == most and len(served.requests) == 6
    assert all(finished and call.document.title in text for call, (text, finished) in zip(calls, replies, strict=True))


def test_one_failed_request_stops_the_others(model: FrozenModel, served: Served) -> None:
    settings = SelfStudy(writer_url=served.url, writer_concurrency=2, calls_per_unit=40)
    calls = make_planner(split_documents(model, wells(10, 8, 9)), ENDPOINT, settings).plan(0, History())
    served.script, served.seconds = [completion("1. Who?"), failure(404)], 0.05
    with pytest.raises(ConfigError, match="HTTP 404"):
        EndpointWriter(Endpoint(served.url, "writer-70b"), 5, settings.writer_concurrency).write(calls, {})
    join_writers()
    assert len(served.requests) < 8


def test_an_interrupted_run_takes_finished_units_as_they_are(
    new_store: Callable[..., Store], model: FrozenModel, teacher: ListWriterDouble, served: Served
) -> None:
    """Replies differ from time to time. A store whose units are complete does not need the endpoint."""
    store, documents = new_store(), wells(10, 8, 9)
    served.on_request = lambda: os.kill(os.getpid(), signal.SIGINT) if len(served.requests) == 6 else None
    served.seconds = 0.2
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        synthesize(model, documents, store, **options(served))
    assert time.monotonic() - started < 30
    served.on_request, served.seconds = (lambda: None), 0
    join_writers()
    units = sorted(store.conversations.glob("unit-*"))
    assert [unit.name for unit in units] == ["unit-000000.parquet"]  # of four requests
    first, before = units[0].read_bytes(), plain(Conversations.load(store.conversations))
    served.requests.clear()
    conversations = synthesize(model, documents, store, **options(served, writer_concurrency=2))
    assert units[0].read_bytes() == first
    assert [row for row in plain(conversations) if row in before] == before
    count = len(list(store.conversations.glob("unit-*")))
    assert len(served.requests) == 4 * (count - 1)
    served.requests.clear()
    elsewhere = options(served) | {"writer_url": "http://127.0.0.1:9/v1"}
    assert plain(synthesize(model, documents, store, **elsewhere)) == plain(conversations)
    assert served.requests == []
    for changed in ({"writer_model": "other"}, {"writer_url": None, "writer": "list"}, {"writer_url": None}):
        with pytest.raises(ConfigError, match="was made with another"):
            synthesize(model, documents, store, **(options(served) | changed))


def test_a_server_that_goes_away_loses_no_finished_unit(
    new_store: Callable[..., Store],
    model: FrozenModel,
    teacher: ListWriterDouble,
    served: Served,
    waits: list[float],
) -> None:
    store, documents = new_store(), wells(10, 8, 9)
    served.on_request = lambda: served.script.extend([failure(503)] * 99) if len(served.requests) == 5 else None
    with pytest.raises(RunError, match="run the same command again to go on from here"):
        synthesize(model, documents, store, **options(served))
    assert len(list(store.conversations.glob("unit-*"))) == 1
    served.on_request = lambda: None
    served.script.clear()
    assert len(synthesize(model, documents, store, **options(served))) >= 60


def test_the_training_command(manuals: FrozenModel, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder to trained cartridges. The key is neither printed nor stored; a wrong one ends it before anything
    is written."""
    served.key = SECRET
    words = [*TRAIN, "--writer-url", served.url]
    monkeypatch.setenv("CAS_WRITER_KEY", "wrong-" + SECRET)
    status, out, err = call(train.main, *words)
    assert status == 2 and err.count("\n") <= 2 and "the key was refused" in err and SECRET not in out + err
    assert not Path("runs").exists()
    assert call(train.main, *words, "--dry-run")[0] == 0 and served.requests == []
    monkeypatch.setenv("CAS_WRITER_KEY", SECRET)
    status, out, err = call(train.main, *words)
    assert status == 0, err
    assert f"questions   by the model at {served.url}" in out and "trained     4 of 4 cartridges" in out
    assert SECRET not in out + err
    files = [file for file in Path("runs").rglob("*") if file.is_file()]
    assert len(files) > 5 and all(SECRET.encode() not in file.read_bytes() for file in files)
    saved = yaml.safe_load(Path("runs/manuals/config.yaml").read_text())
    assert saved["writer_url"] == served.url
    count = len(served.requests)
    assert call(train.main, "--config", "runs/manuals/config.yaml")[0] == 0 and len(served.requests) == count


def test_a_reply_that_drips_in_has_a_limit() -> None:
    class Dripping:
        def read1(self, most: int) -> bytes:
            time.sleep(0.01)
            return b" "

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        endpoints._whole(Dripping(), started + 0.2, 1 << 20)
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("status", ["200 OK", "418 Teapot"])
def test_a_server_that_drips_holds_nobody(status: str) -> None:
    """Neither with a reply nor with the reason of a refusal."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 9999\r\n\r\n".encode())
                for _ in range(600):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", timeout=0.5)
        started = time.monotonic()
        with pytest.raises((RunError, ConfigError), match=r"no whole reply in|HTTP 418, Teapot"):
            endpoint.complete("Hi", 5, 0.7, threading.Event(), attempts=1)
        assert time.monotonic() - started < 15  # 30 seconds to the end of the drops
