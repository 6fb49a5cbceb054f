"""Rows that decode together say what each would say alone, whenever they join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_store import make_store

from cas.answering.answerer import Answerer
from cas.answering.prompts import cartridges as cartridge_prompt
from cas.data.collection import Collection
from cas.model.decoding import Generation, generate
from cas.model.frozen import FrozenModel
from cas.serving.batch import Row, RunningBatch
from cas.serving.requests import Finished, Request, RequestError, Ticket
from retrieval import HashEmbedder

ROOM = 16  # instead of more: tests that take less time
LOADED = (("pump",), (), ("tide", "lamp"), ("crane", "ferry", "pump", "tide"), ("pump",), ("ferry",), ("lamp", "tide"))
QUESTIONS = ("Which valve is red?", "Why?", "When is high water, and where does the table hang?", "How much?", "And?")


@contextmanager
def answering(folder: Path, model: FrozenModel, collection: Collection, **settings: Any) -> Iterator[Answerer]:
    """An answerer over the tiny collection's initial cartridges, of different sizes."""
    settings = {"tokens": None, "ratio": 2} | settings
    with make_store(folder, model, collection, **settings) as store:
        yield Answerer(model, store, HashEmbedder())


def make_row(answerer: Answerer, number: int, **options: Any) -> Row:
    """A question over some cartridges; different ones for different numbers."""
    question = QUESTIONS[number % len(QUESTIONS)]
    tokens = answerer.model.question_tokens(question)
    names = LOADED[number % len(LOADED)]
    ticket = Ticket(Request(question, tokens, cartridges=names, **options), 60)
    most = ticket.request.max_tokens
    scores = dict.fromkeys(names)
    return Row(ticket, scores, answerer.load_all(names), most, answerer.model.stream(), {})


def alone(answerer: Answerer, row: Row, max_new_tokens: int) -> Generation:
    """What the one-at-a-time decoder makes of the same prompt."""
    prompt = cartridge_prompt(answerer.model, row.ticket.request.question, list(row.loaded))
    kv = {name: found.kv for name, found in row.loaded.items()}
    return generate(answerer.model, [prompt], kv, answerer.store.layout, max_new_tokens=max_new_tokens, watch=True)[0]


@pytest.mark.parametrize(("kind", "policy"), [("llama", "fixed"), ("gemma3", "sequential"), ("mistral", "offset")])
@torch.no_grad()
def test_greedy_rows_that_join_at_any_step(
    kind: str,
    policy: str,
    tmp_path: Path,
    tiny: Callable[..., FrozenModel],
    collection: Collection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers longer than the room of the cache, others that are short; rows that come while others are at different places."""
    monkeypatch.setattr("cas.serving.batch.ROOM", ROOM)
    with answering(tmp_path / "s", tiny(kind), collection, positions=policy) as answerer:
        batch = RunningBatch(answerer, rows=32)
        lengths = [5, ROOM + 10, 1, 12, 9, 2 * ROOM + 3, 7, 3, 18, 6]
        rows = [make_row(answerer, n, max_tokens=most) for n, most in enumerate(lengths)]
        joins = {0: rows[:2], 3: rows[2:3], 4: rows[3:7], ROOM - 1: rows[7:8], ROOM + 5: rows[8:]}
        step, most = 0, 0
        while step <= max(joins) or batch.rows:
            batch.step(joins.get(step, []))
            most, step = max(most, len(batch)), step + 1
        assert most > 4 and not batch._cartridges
        assert len({row.prompt.cartridges for row in rows}) == 5
        for row, length in zip(rows, lengths, strict=True):
            truth = alone(answerer, row, length)
            found = row.ticket.result()
            assert row.ids == truth.ids
            assert found.reason == ("stop" if truth.finished else "length")
            assert found.answer.text == answerer.model.answer_text(truth.ids) == row.visible.text
            assert {c.id: c.attention for c in found.answer.cartridges} == pytest.approx(
                {name: truth.attention.get(name, 0.0) for name in row.loaded}, abs=1e-5
            )
        assert sum(lengths) >= batch.decoded == sum(len(row.ids) for row in rows)


def test_sampled_rows_depend_on_their_seed_alone(
    tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    with answering(tmp_path / "s", tiny("llama"), collection) as answerer, torch.no_grad():

        def decoded(*numbers: int, **options: Any) -> list[list[int]]:
            rows = [make_row(answerer, n, max_tokens=12, **options) for n in numbers]
            batch = RunningBatch(answerer, rows=32)
            batch.step(rows)
            while batch.rows:
                batch.step([])
            return [row.ids for row in rows]

        warm: dict[str, Any] = {"temperature": 1.0, "seed": 3}
        both = decoded(0, 2, **warm)
        assert both == [*decoded(0, **warm), *decoded(2, **warm)]
        assert both != decoded(0, 2, temperature=1.0, seed=4)
        greedy = decoded(0, 2)
        assert both != greedy == decoded(0, 2, temperature=1e-30)
        assert decoded(0, 2, top_p=1e-9, **warm) == greedy  # the likeliest alone is left


def test_top_p_cuts_the_unlikely_off(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    with answering(tmp_path / "s", tiny("llama"), collection) as answerer:
        logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
            row = make_row(answerer, 0, temperature=1.0, top_p=top_p)
            drawn = [row.choose(logits, 0) for _ in range(400)]
            assert set(drawn) == kept
            assert abs(drawn.count(0) / 400 - 0.5 / sum(logits.exp()[list(kept)])) < 0.1


def test_how_many_fit(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    with answering(tmp_path / "s", tiny("llama"), collection) as answerer:
        waiting = [make_row(answerer, n) for n in range(6)]
        assert RunningBatch(answerer, rows=4).admit(waiting) == 4
        assert RunningBatch(answerer, rows=4, positions=1).admit(waiting) == 1  # alone, everything goes
        batch = RunningBatch(answerer, rows=4)
        with torch.no_grad():
            batch.step(waiting[:3])
        assert len(batch) == 3 and batch.admit(waiting[3:]) == 1
        batch.most_positions = 1
        assert batch.admit(waiting[3:]) == 0


@torch.no_grad()
def test_rows_that_nobody_waits_for_leave(
    tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    with answering(tmp_path / "s", tiny("llama"), collection) as answerer:
        batch, rows = RunningBatch(answerer, rows=8), [make_row(answerer, n, max_tokens=20) for n in range(3)]
        batch.step(rows)
        rows[1].ticket.cancel()
        rows[2].ticket._deadline = 0.0
        batch.step([])
        assert [*batch.rows.values()] == rows[:1] and len(rows[1].ids) == len(rows[2].ids) == 2
        assert set(batch._cartridges) == set(rows[0].prompt.cartridges)
        while batch.rows:
            batch.step([])
        assert rows[0].ids == alone(answerer, rows[0], 20).ids
        with pytest.raises(RequestError, match="took too long") as error:
            rows[2].ticket.result()
        assert error.value.status == 503


@torch.no_grad()
def test_stop_strings_end_an_answer(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    with answering(tmp_path / "s", tiny("llama"), collection) as answerer:

        def ask(**options: Any) -> tuple[Row, list[str]]:
            row, pieces = make_row(answerer, 2, max_tokens=40, **options), list[str]()
            batch = RunningBatch(answerer, rows=8)
            batch.step([row])
            while batch.rows:
                batch.step([])
            pieces += row.ticket
            return row, pieces

        whole, pieces = ask()
        text = whole.visible.text
        assert "".join(pieces) == text and len(text) > 10
        stop = text[7:10]
        row, pieces = ask(stop=("never there", stop))
        assert row.visible.text == "".join(pieces) == text[: text.index(stop)].rstrip()
        assert 0 < len(row.ids) < len(whole.ids)
        assert isinstance(row.ticket._result, Finished) and row.ticket._result.reason == "stop"
