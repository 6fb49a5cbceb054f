"""An interrupted synthesis continues to the same conversations, from undamaged files and with the same settings
only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_writer import SMALL, Writer, plain, wells

from cas.data.collection import Collection
from cas.errors import ConfigError, RunError
from cas.model.decoding import Generation, Prompt
from cas.model.frozen import FrozenModel
from cas.selfstudy import synthesize as selfstudy
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.synthesize import synthesize
from cas.store.store import Store


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.mark.parametrize("where", ["progress", "questions", "answers"])
def test_it_goes_on_where_it_stopped(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """To the same conversations, without touching finished files."""
    documents, whole, parts = wells(10, 8, 9), new_store("whole"), new_store("parts")
    expected = synthesize(model, documents, whole, **SMALL)
    per_unit = 3  # two calls for questions, one for answers
    units, calls = writer.calls // per_unit, writer.calls
    assert units > 4

    class Killed(BaseException):
        pass

    def interrupted(*arguments: Any, **options: Any) -> list[Generation]:
        if writer.calls - calls == per_unit + {"questions": 1, "answers": 2}[where]:
            raise Killed
        return writer(*arguments, **options)

    def progress(*_: int) -> None:
        if where == "progress":
            raise Killed

    with monkeypatch.context() as patch:
        if where != "progress":
            patch.setattr(selfstudy, "generate", interrupted)
        with pytest.raises(Killed):
            synthesize(model, documents, parts, progress=progress, **SMALL)
    folder = parts.folder / "conversations"
    done = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert list(done) == ["unit-000000.parquet"]
    (folder / "unit-000001.partial").write_bytes(b"torn")
    before = writer.calls
    conversations = synthesize(model, documents, parts, **SMALL)
    spent = [json.loads(line) for line in (parts.folder / "seconds.jsonl").read_text().splitlines()]
    assert [entry["what"] for entry in spent] == ["self-study"] * units and all(entry["seconds"] > 0 for entry in spent)
    assert writer.calls - before == per_unit * (units - 1)
    assert plain(conversations) == plain(expected) and conversations.dropped == expected.dropped
    assert (folder / "unit-000000.parquet").read_bytes() == done["unit-000000.parquet"][0]
    assert (folder / "unit-000000.parquet").stat().st_mtime_ns == done["unit-000000.parquet"][1]
    assert len(list(folder.glob("unit-*.parquet"))) == units
    # Again, all from files; and without the collection, as the training command reads them.
    before = writer.calls
    assert plain(synthesize(model, documents, parts, **SMALL)) == plain(expected)
    loaded = Conversations.load(folder)
    assert writer.calls == before
    assert plain(loaded) == plain(expected) and loaded.dropped == expected.dropped and len(loaded) == len(expected)


def test_stopped_after_every_unit(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> None:
    """Also after all sentences and openings were tried, when questions whose answers were dropped are asked again."""
    expected = synthesize(model, wells(1), new_store("whole"), **(SMALL | {"conversations": 40}))
    assert expected.dropped["duplicate"] and expected.dropped["empty answer"]
    store, stops = new_store("parts"), 0

    class Stopped(BaseException):
        pass

    def progress(kept: int, wanted: int) -> None:
        if len(list((store.folder / "conversations").iterdir())) > stops:
            raise Stopped

    while True:
        try:
            conversations = synthesize(model, wells(1), store, progress=progress, **(SMALL | {"conversations": 40}))
            break
        except Stopped:
            stops += 1
    assert stops > 6
    assert plain(conversations) == plain(expected) and conversations.dropped == expected.dropped


def test_a_question_whose_answer_was_dropped_may_come_again(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """Only kept questions are remembered from unit to unit: an interrupted synthesis knows no others."""
    dropped, again = set[str](), set[str]()
    original = writer.answer

    def answer(prompt: Prompt, k: int) -> Generation:
        question, generation = model.decode(prompt.tokens), original(prompt, k)
        (again if question in dropped else dropped).add(question)
        return generation if question in again else dataclasses.replace(generation, finished=False)

    writer.answer = answer  # type: ignore[method-assign]
    conversations = synthesize(model, wells(4), new_store(), keep_going=True, **(SMALL | {"conversations": 5}))
    assert again and len(conversations) >= 5


def test_more_may_be_asked_for_later(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> None:
    store, whole = new_store(), new_store("whole")
    documents = wells(10, 8, 9)
    few = synthesize(model, documents, store, **(SMALL | {"conversations": 20}))
    more = synthesize(model, documents, store, **SMALL)
    assert len(few) < len(more)
    assert plain(more) == plain(synthesize(model, documents, whole, **SMALL))


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"top_k": 6}, {"chunk_tokens": 90}, {"kinds": ("question",)}, {"answer_tokens": 20}],
    ids=str,
)
def test_other_settings_are_refused(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, changed: dict[str, Any]
) -> None:
    store = new_store()
    synthesize(model, wells(10, 8), store, **(SMALL | {"conversations": 20}))
    files = {file: file.read_bytes() for file in (store.folder / "conversations").iterdir()}
    with pytest.raises(
        ConfigError, match=f"was made with another {next(iter(changed))}; use the same one or give another --store"
    ) as caught:
        synthesize(model, wells(10, 8), store, **(SMALL | changed))
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in (store.folder / "conversations").iterdir()} == files


def test_other_documents_are_refused(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> None:
    """More of them, or the same texts under other ids."""
    store, documents = new_store(), wells(10, 8)
    synthesize(model, documents, store, **SMALL)
    renamed = Collection("wells", tuple(dataclasses.replace(d, id=f"new-{d.id}") for d in documents.documents))
    assert renamed.hash == documents.hash
    for other in (wells(10, 8, 9), renamed):
        with pytest.raises(ConfigError, match="made with another documents"):
            synthesize(model, other, store, **SMALL)


@pytest.fixture
def unit(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> tuple[Store, Path]:
    store = new_store()
    synthesize(model, wells(10), store, **(SMALL | {"conversations": 10}))
    return store, store.folder / "conversations" / "unit-000000.parquet"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 50])
def test_a_file_that_is_no_parquet_is_named(unit: tuple[Store, Path], model: FrozenModel, content: bytes) -> None:
    store, file = unit
    file.write_bytes(content)
    for read in (lambda: Conversations.load(file.parent), lambda: synthesize(model, wells(10), store, **SMALL)):
        with pytest.raises(
            RunError, match=r"unit-000000\.parquet is damaged; delete it and run the same command again"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_damage_is_found_wherever_it_is(unit: tuple[Store, Path], model: FrozenModel, writer: Writer) -> None:
    """A flipped bit is refused or changes nothing; a deleted file is written again with the same bytes."""
    store, file = unit
    whole, before = file.read_bytes(), plain(Conversations.load(file.parent))
    refused = 0
    for position in range(4, len(whole) - 8, max(1, len(whole) // 60)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            found = plain(synthesize(model, wells(10), store, **(SMALL | {"conversations": 1})))
        except (RunError, ConfigError):
            refused += 1
        else:
            assert found == before[: len(found)], position
    assert refused > 20
    for cut in (len(whole) // 3, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(RunError, match="unit-000000"):
            Conversations.load(file.parent)
    file.unlink()
    assert plain(synthesize(model, wells(10), store, **(SMALL | {"conversations": 10}))) == before
    assert file.read_bytes() == whole
