"""The engine: many callers, one thread of forward passes, and a store that changes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS
from helpers_store import make_store

from cas.answering.answerer import Answer, Answerer
from cas.data.collection import Collection, Document
from cas.data.worlds import world
from cas.errors import StoreError
from cas.model.frozen import FrozenModel
from cas.serving.engine import Engine, Limits
from cas.serving.requests import Event, Finished, Request, RequestError
from cas.store.changes import Change
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from retrieval import HashEmbedder

QUESTIONS = [
    *(TEXTS[name][:40] + "?" for name in TEXTS), "Which valve?", "How many cars does the ferry carry, and when?", "Why?",
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> Iterator[Store]:
    with make_store(tmp_path / "s", tiny("llama"), collection, tokens=None, ratio=2) as store:
        yield store


@pytest.fixture
def engine(store: Store, tiny: Callable[..., FrozenModel]) -> Iterator[Engine]:
    with Engine(Answerer(tiny("llama"), store, HashEmbedder()), Limits(rows=4, queue=100)) as engine:
        yield engine


def same(one: Answer, other: Answer) -> None:
    """Equal but for timings and the last bits of shares and scores."""
    assert (one.question, one.answer, one.tokens, one.bytes) == (
        other.question,
        other.answer,
        other.tokens,
        other.bytes,
    )
    assert [(c.id, c.title) for c in one.cartridges] == [(c.id, c.title) for c in other.cartridges]
    for a, b in zip(one.cartridges, other.cartridges, strict=True):
        assert (a.score, a.attention) == pytest.approx((b.score, b.attention), abs=1e-5)


def together(engine: Engine, asked: list[dict[str, Any]]) -> list[Answer]:
    """All of them from threads of their own."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda options: engine.ask(**options), asked))


def test_many_threads_get_what_one_alone_would(engine: Engine) -> None:
    asked: list[dict[str, Any]] = []
    for n, question in enumerate(QUESTIONS * 2):
        chosen = {"cartridges": ("tide", "pump", "tide")} if n % 5 == 4 else {"k": 1 + n % 3}
        asked.append({"question": question, "max_tokens": (3, 12, 30)[n % 3], **chosen})
    answers = together(engine, asked)
    for options, answer in zip(asked, answers, strict=True):
        truth = engine.answerer.ask(
            options["question"], options.get("k", 4), options.get("cartridges"), options["max_tokens"]
        )
        same(answer, truth)
    assert len({answer.answer for answer in answers}) > 9
    assert engine.decoding == engine.queued == 0 and engine.decoded == sum(a.tokens["answer"] for a in answers)
    assert engine.answerer.cartridges.hits > engine.answerer.cartridges.misses == len(TEXTS)


def test_the_reader_answers_as_it_does_alone(tmp_path: Path) -> None:
    """A model that means what it says: most of its answers are one to four words."""
    documents = world(0, 6)
    model = FrozenModel.from_pretrained("reader")
    with make_store(tmp_path / "s", model, documents, tokens=None, ratio=4) as store:
        answerer = Answerer(model, store, HashEmbedder())
        asked = [
            {"question": q.question, "k": 1 + n % 3, "max_tokens": 24} for n, q in enumerate(documents.questions[:10])
        ]
        with Engine(answerer, Limits(rows=6)) as engine:
            answers = together(engine, asked)
        for options, answer in zip(asked, answers, strict=True):
            same(answer, answerer.ask(str(options["question"]), int(options["k"]), max_new_tokens=24))
        assert len({answer.answer for answer in answers}) > 5


def test_pieces_come_while_the_answer_is_decoded(engine: Engine) -> None:
    events, seen = list[Event](), threading.Event()

    def listen(event: Event) -> None:
        events.append(event)
        if len(events) == 5:  # another one joins in the middle
            engine.submit(Request("Why?", tokens, cartridges=("pump",), max_tokens=2), others.append)
        if isinstance(event, Finished):
            seen.set()

    tokens, others = engine.answerer.model.question_tokens("Which valve?"), list[Event]()
    engine.submit(Request("Which valve?", tokens, k=3, max_tokens=90), listen)
    assert seen.wait(60)
    truth = engine.answerer.ask("Which valve?", 3, max_new_tokens=90)
    *pieces, last = events
    assert len(pieces) > 20 and all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(map(str, pieces)) == truth.answer and isinstance(last, Finished)
    same(last.answer, truth)
    assert isinstance(others[-1], Finished) and len(others) <= 3


def test_what_makes_no_sense_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.answerer.model
    window = model.geometry.max_positions
    assert model.count_tokens("!" * (window - 54)) == window - 54  # fits behind the header, but not behind cartridges
    for options, status, code, words in (
        ({"question": " "}, 400, "empty_question", "empty"),
        ({"k": 0}, 400, "invalid_value", "retrieve_k: from 1 to 32"),
        ({"k": 33}, 400, "invalid_value", "retrieve_k: from 1 to 32"),
        ({"cartridges": ("pump",) * 33}, 400, "invalid_value", "cartridges: at most 32"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens: from 1 to 1024"),
        ({"max_tokens": 1025}, 400, "invalid_value", "max_tokens: from 1 to 1024"),
        ({"question": "valve " * window}, 400, "context_length_exceeded", r"takes \d+ tokens, and there is room for"),
        ({"question": "!" * (window - 54), "cartridges": tuple(TEXTS)}, 400, "context_length_exceeded", "fewer"),
        ({"cartridges": ("pump", "../secret")}, 404, "no_such_cartridge", "no cartridge has one of these ids"),
    ):
        with pytest.raises(RequestError, match=words) as error:
            engine.ask(**({"question": "Which valve?"} | options))  # type: ignore[arg-type]
        assert (error.value.status, error.value.code) == (status, code)
    assert engine.ask("Which valve?", max_tokens=2).answer


def test_one_that_cannot_be_prepared_spoils_no_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cartridge, hold = Store.cartridge, threading.Event()

    def damaged(self: Store, document: str) -> object:
        hold.wait(60)
        if document == "tide":
            raise StoreError("/secret/place: kv of 'tide' fails its checksum")
        return cartridge(self, document)

    monkeypatch.setattr(Store, "cartridge", damaged)
    tokens = engine.answerer.model.question_tokens("Why?")
    names = ("lamp", "pump", "tide", "ferry")
    tickets = [engine.submit(Request("Why?", tokens, cartridges=(name,), max_tokens=3)) for name in names]
    hold.set()
    for name, ticket in zip(names, tickets, strict=True):
        if name == "tide":
            with pytest.raises(RequestError, match=r"^the cartridges could not be loaded$"):
                ticket.result()
        else:
            same(ticket.result().answer, engine.answerer.ask("Why?", documents=[name], max_new_tokens=3))


def test_a_step_that_fails_ends_those_that_decode_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FrozenModel.forward

    def failing(self: FrozenModel, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "cas-decode":
            raise RuntimeError("out of memory at /secret/place")
        return forward(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(RequestError, match=r"^the model failed on this") as error:
        patch.setattr(FrozenModel, "forward", failing)
        engine.ask("Which valve?")
    assert error.value.status == 500 and not engine._batch.rows and not engine._batch._cartridges
    same(engine.ask("Which valve?", max_tokens=5), engine.answerer.ask("Which valve?", max_new_tokens=5))


def test_a_listener_that_fails_harms_itself_alone(engine: Engine) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("broken")

    request = Request("Why?", engine.answerer.model.question_tokens("Why?"), k=2, max_tokens=400)
    broken = engine.submit(request, fail)
    same(engine.ask("Which valve?", max_tokens=5), engine.answerer.ask("Which valve?", max_new_tokens=5))
    assert broken.cancelled and engine.alive


def test_the_queue_has_an_end_and_a_cancelled_request_leaves_it(
    store: Store, tiny: Callable[..., FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer, hold = Answerer(tiny("llama"), store, HashEmbedder()), threading.Event()
    load_all = answerer.load_all
    monkeypatch.setattr(answerer, "load_all", lambda names: (hold.wait(60), load_all(names))[1])
    request = Request("Why?", answerer.model.question_tokens("Why?"), cartridges=("pump",), max_tokens=3)
    with Engine(answerer, Limits(rows=1, queue=3)) as engine:
        tickets = [engine.submit(request) for _ in range(3)]
        with pytest.raises(RequestError, match="3 requests are waiting already") as error:
            engine.submit(request)
        assert (error.value.status, error.value.code, engine.queued) == (429, "queue_full", 3)
        tickets[1].cancel()
        hold.set()
        assert tickets[0].result().answer == replace(
            tickets[2].result().answer, timings=tickets[0]._result.answer.timings
        )
        with pytest.raises(RequestError):
            tickets[1].result()


def test_draining_ends_what_decodes_and_refuses_the_rest(engine: Engine) -> None:
    begun = threading.Event()
    request = Request("Why?", engine.answerer.model.question_tokens("Why?"), cartridges=("pump",), max_tokens=300)
    events = [list[Event]() for _ in range(7)]

    def listen(number: int) -> Callable[[Event], None]:
        def listener(event: Event) -> None:
            events[number].append(event)
            if number == 0 and len(events[0]) == 2:
                begun.set()

        return listener

    for number in range(7):
        engine.submit(request, listen(number))
    assert begun.wait(60)
    engine.close()
    ends = [found[-1] for found in events]
    assert sum(isinstance(end, Finished) for end in ends) >= 1
    assert all(isinstance(end, Finished) or (isinstance(end, RequestError) and end.status == 503) for end in ends)
    with pytest.raises(RequestError, match="shutting down"):
        engine.submit(request)


def test_the_cache_of_cartridges_has_a_size(store: Store, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    sizes = {name: store.cartridge(name).nbytes for name in TEXTS}
    limit = sizes["crane"] + sizes["pump"]
    answerer = Answerer(model, store, HashEmbedder(), cache_bytes=limit)
    cache = answerer.cartridges
    for name in ("crane", "pump", "crane"):
        answerer.load(name)
    assert (cache.hits, cache.misses, cache.bytes) == (1, 2, limit)
    answerer.load("tide")  # pump was used longest ago
    assert cache.bytes == sizes["crane"] + sizes["tide"] or cache.bytes == sizes["tide"]
    assert cache.bytes <= limit
    small = Answerer(model, store, HashEmbedder(), cache_bytes=10)
    with Engine(small) as engine:
        same(engine.ask("Which valve?", max_tokens=4), answerer.ask("Which valve?", max_new_tokens=4))
    assert small.cartridges.bytes == 0 == len(small.cartridges)


def test_it_follows_its_store(engine: Engine, store: Store) -> None:
    """New documents, new checkpoints and dropped documents, while it runs."""
    answerer, model = engine.answerer, engine.answerer.model

    def ids() -> set[str]:
        return {c.id for c in engine.ask("Which bell is rung in fog?", k=9, max_tokens=1).cartridges}

    assert ids() == set(TEXTS)
    text = "Which bell is rung in fog? The brass bell is rung in fog."
    store.add_documents(Collection("more", (Document("bell", "Bell", text),)), model.count_tokens)
    assert ids() == set(TEXTS)  # it has no cartridge yet
    initialize_cartridges(model, store)
    assert ids() == {*TEXTS, "bell"}
    before = engine.ask("Which valve?", cartridges=("pump",), max_tokens=20)
    changed = store.cartridge("pump").flip(0).contiguous()
    store.write_tensors("pump", {"kv": changed})
    store.commit(store.rows(), None)
    after = engine.ask("Which valve?", cartridges=("pump",), max_tokens=20)
    assert after.answer != before.answer
    same(after, Answerer(model, store, HashEmbedder()).ask("Which valve?", documents=["pump"], max_new_tokens=20))
    assert "pump" in answerer.cartridges._held
    with store.training():
        store.change(Change(drop=("pump",)))
    assert ids() == {*TEXTS, "bell"} - {"pump"}
    assert "pump" not in answerer.cartridges._held
    with pytest.raises(RequestError, match="no cartridge has"):
        engine.ask("Which valve?", cartridges=("pump",))
