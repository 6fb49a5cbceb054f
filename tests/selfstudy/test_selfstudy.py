"""Self-study: what is asked about, what is dropped and why, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_hf, tiny_tokenizer
from helpers_store import stored_keys
from helpers_writer import Writer
from hypothesis import given, settings
from hypothesis import strategies as st

from cas.config import KINDS
from cas.data.collection import Collection, Document
from cas.errors import ConfigError, RunError
from cas.model.decoding import Generation, Prompt
from cas.model.frozen import FrozenModel, Source
from cas.selfstudy import synthesize as selfstudy
from cas.selfstudy.conversations import Conversation, Conversations, write_unit
from cas.selfstudy.planners import (
    MAX_RETRIES_PER_DOCUMENT,
    Call,
    CoveragePlanner,
    History,
    SentencePlanner,
    make_planner,
    sentence_windows,
    split_documents,
)
from cas.selfstudy.prompt_styles import INSTRUCT, READER, PromptStyle
from cas.selfstudy.seed_prompts import EXAMPLE, SEED_PROMPTS, bad_answer, bad_question, loops, normal, words
from cas.selfstudy.synthesize import SelfStudy, Teacher, synthesize
from cas.store.store import Store
from retrieval.chunk import with_title

PLACES = ("Alder", "Birch", "Cedar", "Dogwood", "Elder")
DEEDS = (
    "was dug by Tom Reed in 1911", "supplies forty gardens", "is nine metres deep", "froze in the winter of 1947", "has an oak lid",
    "was cleaned by two divers", "belongs to the parish", "lost its rope in a storm", "was painted green", "is listed",
)  # fmt: skip


def wells(*sentences: int) -> Collection:
    """Documents of so many sentences each, all of one pattern."""
    documents = [
        Document(name.lower(), f"{name} Well", " ".join(f"{name} Well {deed}." for deed in DEEDS[:count]))
        for name, count in zip(PLACES, sentences, strict=False)
    ]
    return Collection("wells", tuple(documents))


SMALL: dict[str, Any] = {"conversations": 60, "chunk_tokens": 120, "questions_per_call": 8, "top_k": 5}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def new_store(tmp_path: Path, model: FrozenModel) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(name: str = "store") -> Store:
        stores.append(Store.create(tmp_path / name, model, tokens=16))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def writer(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> Writer:
    writer = Writer(model)
    monkeypatch.setattr(selfstudy, "generate", writer)
    return writer


def plain(conversations: Conversations) -> list[list[Any]]:
    """Everything about every conversation, to compare."""
    return [
        [name, *(v.tolist() if isinstance(v, np.ndarray) else v for v in vars(c).values())]
        for name, items in conversations.by_document.items()
        for c in items
    ]


# -- the whole way ------------------------------------------------------------------------------------------------------


def test_conversations(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> None:
    store, progress = new_store(), list[tuple[int, int]]()
    documents = wells(10, 8, 9)
    found = synthesize(model, documents, store, progress=lambda *n: progress.append(n), **SMALL)
    assert list(store.rows()) == ["alder", "birch", "cedar"]  # with their cartridges
    assert len(found) >= 60 and set(found.by_document) == set(store.rows())
    assert progress[-1] == (60, 60) and progress == sorted(progress)
    stop, template = model.template.stop_ids, model.template
    for name, items in found.by_document.items():
        assert len({normal(c.question) for c in items}) == len(items)  # no question twice
        for c in items:
            assert c.document == name and c.question.endswith("?") and documents[name].title in c.question
            style = next(s.answer_suffix for s in SEED_PROMPTS if s.kind == c.kind)
            assert model.decode(c.prompt.tolist()) == (c.question + style).strip()
            assert c.answer[-1] in stop and not set(c.answer[:-1].tolist()) & stop
            assert c.top_ids.shape == c.top_logprobs.shape == (len(c.answer), 5)
            assert c.top_ids[:, 0].tolist() == c.answer.tolist()
            assert (c.prompt.dtype, c.answer.dtype, c.top_ids.dtype, c.top_logprobs.dtype) == (np.int32,) * 3 + (
                np.float32,
            )
            tokens = c.tokens(model)
            expected = [*template.footer_ids, *c.prompt, *template.suffix_ids, *c.answer]
            assert [*tokens, c.answer[-1]] == expected
    assert {c.kind for items in found.by_document.values() for c in items} == {s.kind for s in SEED_PROMPTS}


def test_what_is_dropped_is_counted_by_reason(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    found = synthesize(model, wells(10, 8, 9), new_store(), **SMALL)
    dropped = Counter(found.dropped)
    assert dropped["no named subject"] and dropped["off topic"]
    dropped["off topic"] += dropped.pop("no named subject")
    duplicates = dropped.pop("duplicate", 0)
    loops = writer.bad_questions.pop("loop") + writer.bad_answers.pop("loop")
    assert dropped.pop("loop") == loops
    good_questions, good_answers = writer.bad_questions.pop(""), writer.bad_answers.pop("")
    assert dropped == writer.bad_questions + writer.bad_answers
    questions = {"malformed question", "off topic", "unfinished question"}
    assert set(dropped) == questions | {"answer too long", "empty answer", "answer without substance"}
    assert (good_questions - duplicates, good_answers) == (writer.answered, len(found))
    assert writer.asked == len(found) + sum(found.dropped.values())


def test_answers_are_dropped_rather_than_cut(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    original, long = writer.answer, list[tuple[int, ...]]()

    def answer(prompt: Prompt, k: int) -> Generation:
        found = original(prompt, k)
        if not found.finished:
            long.append(tuple(found.ids))
        return found

    writer.answer = answer  # type: ignore[method-assign]
    found = synthesize(model, wells(10, 8), new_store(), **SMALL)
    assert len(long) == found.dropped["answer too long"] > 0
    assert all(c.answer[-1] in model.template.stop_ids for items in found.by_document.values() for c in items)


@pytest.mark.parametrize("where", ["progress", "questions", "answers"])
def test_it_goes_on_where_it_stopped(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """To the same conversations, with finished files left alone."""
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
    found = synthesize(model, documents, parts, **SMALL)
    spent = [json.loads(line) for line in (parts.folder / "seconds.jsonl").read_text().splitlines()]
    assert [entry["what"] for entry in spent] == ["self-study"] * units and all(entry["seconds"] > 0 for entry in spent)
    assert writer.calls - before == per_unit * (units - 1)
    assert plain(found) == plain(expected) and found.dropped == expected.dropped
    assert (folder / "unit-000000.parquet").read_bytes() == done["unit-000000.parquet"][0]
    assert (folder / "unit-000000.parquet").stat().st_mtime_ns == done["unit-000000.parquet"][1]
    assert len(list(folder.glob("unit-*.parquet"))) == units
    # Once more, all from the files; and without the collection, as the trainer's command reads them.
    before = writer.calls
    assert plain(synthesize(model, documents, parts, **SMALL)) == plain(expected)
    loaded = Conversations.load(folder)
    assert writer.calls == before
    assert plain(loaded) == plain(expected) and loaded.dropped == expected.dropped and len(loaded) == len(expected)


def test_stopped_after_every_unit(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> None:
    """Also when all sentences and openings were tried, and questions come again whose answers had been dropped."""
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
            found = synthesize(model, wells(1), store, progress=progress, **(SMALL | {"conversations": 40}))
            break
        except Stopped:
            stops += 1
    assert stops > 6
    assert plain(found) == plain(expected) and found.dropped == expected.dropped


def test_a_question_whose_answer_was_dropped_may_come_again(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """Only what was kept is remembered from one unit to the next: an interrupted synthesis knows no more."""
    dropped, again = set[str](), set[str]()
    original = writer.answer

    def answer(prompt: Prompt, k: int) -> Generation:
        question, found = model.decode(prompt.tokens), original(prompt, k)
        (again if question in dropped else dropped).add(question)
        return found if question in again else dataclasses.replace(found, finished=False)

    writer.answer = answer  # type: ignore[method-assign]
    found = synthesize(model, wells(4), new_store(), **(SMALL | {"conversations": 5}))
    assert again and len(found) >= 5


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
        ConfigError, match="was made with other settings, documents or model; use the same ones or give another --store"
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
        with pytest.raises(ConfigError, match="other settings, documents or model"):
            synthesize(model, other, store, **SMALL)


@pytest.mark.parametrize("kinds", [(), ("question", "gossip")])
def test_unknown_kinds_are_refused_before_anything_is_written(
    new_store: Callable[..., Store], model: FrozenModel, kinds: tuple[str, ...]
) -> None:
    store = new_store()
    with pytest.raises(ConfigError, match=r"choose from question, structuring, summarisation, use case, creative"):
        synthesize(model, wells(3), store, kinds=kinds)
    assert stored_keys(store) == {"meta"} and not (store.folder / "conversations").exists()


@pytest.mark.parametrize("kind", [s.kind for s in SEED_PROMPTS])
def test_one_kind_alone(new_store: Callable[..., Store], model: FrozenModel, writer: Writer, kind: str) -> None:
    found = synthesize(model, wells(10), new_store(), **(SMALL | {"kinds": (kind,), "conversations": 4}))
    openings = [
        o
        for s in SEED_PROMPTS
        if s.kind == kind
        for deed in DEEDS
        for o in s.openings_for(f"Alder Well {deed}.", "Alder Well")
    ]
    for c in found.by_document["alder"]:
        assert c.kind == kind and c.question.startswith(tuple(openings))


def test_a_model_that_writes_nothing_usable_is_said(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    writer.question = lambda prompt, seed: Generation(model.encode(" is it"), finished=True)  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=r"kept 0 of 3 conversations; dropped: \{'malformed question': \d+\}; use a larger model$"
    ) as caught:
        synthesize(model, wells(10), new_store(), **(SMALL | {"conversations": 3}))
    assert "\n" not in str(caught.value)


def test_every_document_is_heard_whatever_was_asked_for(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    found = synthesize(model, wells(10, 10, 10, 10, 10), new_store(), **(SMALL | {"conversations": 1}))
    assert set(found.by_document) == {name.lower() for name in PLACES}


def test_a_document_about_which_nothing_is_kept_is_left_out(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After calls of its own; and the other documents, short as they are beside a long one, are heard soon."""
    sound, asked = selfstudy.bad_question, Counter[str]()

    def refusing(question: str, title: str, text: str, check_topic: bool) -> str | None:
        asked[title] += 1
        return "off topic" if title == "Birch Well" else sound(question, title, text, check_topic)

    monkeypatch.setattr(selfstudy, "bad_question", refusing)
    store, settings = new_store(), SMALL | {"conversations": 3}
    documents = wells(60, 1, 1, 1)
    found = synthesize(model, documents, store, **settings)
    assert set(found.by_document) == {d.id for d in documents.documents} - {"birch"}
    assert found.dropped["off topic"] >= asked["Birch Well"] >= MAX_RETRIES_PER_DOCUMENT
    assert asked["Alder Well"] < 12 * 5 * 4  # not the whole long document for the sake of a short one
    assert plain(synthesize(model, documents, store, **settings)) == plain(found)  # from its files


# -- files --------------------------------------------------------------------------------------------------------------


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
    """A flipped bit is refused, or changes nothing; and a new file is the same as the lost one."""
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


# -- where the questions come from --------------------------------------------------------------------------------------


def test_documents_are_visited_in_proportion_to_their_length(model: FrozenModel) -> None:
    documents = wells(10, 2, 5, 1, 8)
    planner = CoveragePlanner(split_documents(model, documents), INSTRUCT, SelfStudy(chunk_tokens=60))
    lengths = {
        d.id: sum(len(model.encode(f"{s}.")) for s in d.text.rstrip(".").split(". ")) for d in documents.documents
    }
    calls, covered = Counter[str](), {d.id: set[str]() for d in documents.documents}
    for call in range(600):
        source, window = planner.window(call)
        document, sentences = source.document, source.sentences[window.start : window.stop]
        calls[document.id] += 1
        covered[document.id].update(sentences)
        assert " ".join(sentences) in document.text  # whole sentences, side by side
        assert len(sentences) == 1 or sum(len(model.encode(s)) for s in sentences) <= 60
        assert planner.window(call) == (source, window)
    for name, length in lengths.items():
        assert calls[name] / 600 == pytest.approx(length / sum(lengths.values()), abs=0.01)
    assert all(len(covered[d.id]) == d.text.count(".") for d in documents.documents)


def test_how_many_are_wanted(model: FrozenModel) -> None:
    """A quarter of the tokens, at least 64 a document; or what is asked for."""
    long = Document("long", "Long", " ".join(f"Alder Well number {n} was dug by Tom Reed." for n in range(60)))
    documents = Collection("two", (long, *wells(3).documents))
    sources = split_documents(model, documents)
    tokens = {source.document.id: sum(source.lengths) for source in sources}
    assert tokens["long"] > 4 * 64 > tokens["alder"]
    assert CoveragePlanner(sources, INSTRUCT, SelfStudy()).target == tokens["long"] // 4 + 64
    assert CoveragePlanner(sources, INSTRUCT, SelfStudy(conversations=7)).target == 7


def test_the_teacher_s_probabilities_are_those_of_a_plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Header, chunk, question and answer through the Hugging Face model, nothing cached or batched, expect the same."""
    model = FrozenModel(tiny_hf("qwen3"), tiny_tokenizer(), Source("folder", "tiny-qwen3"))
    # A random model never ends its turn: let a sixth of all tokens do so.
    model.template = dataclasses.replace(model.template, stop_ids=frozenset(range(2, 384, 6)))
    monkeypatch.setattr(selfstudy, "bad_question", lambda *_: None)
    monkeypatch.setattr(selfstudy, "bad_answer", lambda *_: None)
    documents = wells(4, 4)
    study = SelfStudy(questions_per_call=10, question_tokens=12, answer_tokens=12, top_k=9, calls_per_unit=4)
    calls = CoveragePlanner(split_documents(model, documents), INSTRUCT, study).plan(0, History())
    found, _ = Teacher(model, INSTRUCT, study).converse(calls, {})
    assert len(found) > 6 and {c.document for c in found} == {"alder", "birch"}
    assert max(len(c.answer) for c in found) > 3
    template = model.template
    for c in found:
        chunk = with_title(documents[c.document].title, documents[c.document].text)
        ids = [*template.header_ids, *model.encode(chunk), *c.tokens(model)]
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(c.answer) :]
        top = logits.log_softmax(-1).topk(9, dim=-1)
        assert logits.argmax(-1).tolist() == c.answer.tolist()  # greedy, the end of the turn included
        torch.testing.assert_close(torch.from_numpy(c.top_logprobs), top.values, rtol=1e-3, atol=1e-3)
        assert (torch.from_numpy(c.top_ids) == top.indices).float().mean() > 0.95  # but for ties


# -- filters ------------------------------------------------------------------------------------------------------------

TITLE = "Gannet Point"
TEXT = (
    "Gannet Point The light at Gannet Point was first lit in 1871. Its keeper, Élodie Marchant, kept bees behind the tower. "
    "The lens weighs two tonnes and was made in Lyon. Boats could see the beam from twenty miles."
)


@pytest.mark.parametrize(
    "question",
    [
        "Who was the keeper of Gannet Point?",
        "When was the light at Gannet Point first lit?",
        "Where was the lens of the tower at Gannet made?",  # a word of the title is enough
        "What did Élodie keep behind the tower?",  # a name, also one that begins with an accented letter
        "From how many miles could boats see the beam of Gannet Point?",
        "Name the keeper of Gannet Point.",
        "For my report, when was Gannet Point first lit?",
        "Riddle: what weighs two tonnes and was made in Lyon?",
        "Sum up the light of Gannet Point.",
    ],
)
def test_good_questions(question: str) -> None:
    assert bad_question(question, TITLE, TEXT) is None


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("", "malformed question"),
        ("?", "malformed question"),
        ("Gannet Point?", "malformed question"),
        ("Who was the keeper of Gannet Point", "malformed question"),
        ("Who was the keeper of Gannet Point:", "malformed question"),
        ("Who was her keeper?", "no named subject"),
        ("What was her job?", "off topic"),
        ("When was it first lit?", "no named subject"),
        ("Who was the keeper of the tower?", "no named subject"),
        ("What is the name of this?", "no named subject"),
        ("How many tonnes does the lens weigh?", "no named subject"),
        ("Who invented the telephone in Boston, Massachusetts?", "off topic"),
        ("What is the capital of France?", "off topic"),
        ("Which emperor visited Gannet Point during the Crimean war?", "off topic"),
        ("Who was the keeper of the keeper of the keeper of the keeper of Gannet Point?", "loop"),
        ("What is what is what is what is Gannet Point?", "loop"),
    ],
)
def test_bad_questions(question: str, reason: str) -> None:
    assert bad_question(question, TITLE, TEXT) == reason


def test_the_same_wording_is_a_duplicate() -> None:
    assert normal("Who kept  bees at Gannet Point?") == normal("who kept bees, at gannet point")
    assert normal("Who kept bees?") != normal("Who kept bees there?")
    assert normal("Élodie Größe?") == "élodie größe"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("In 1871.", None),
        ("Élodie Marchant kept it.", None),
        ("Two tonnes.", None),
        ("Yes.", None),
        ("No, it was not.", None),
        ("", "empty answer"),
        (" \n ", "empty answer"),
        ("The keeper of Gannet Point.", "answer without substance"),  # the question again
        ("It was them.", "answer without substance"),
        ("A telephone.", "answer without substance"),  # nothing of the text
        ("In 1999.", "answer without substance"),
    ],
)
def test_answers(answer: str, reason: str | None) -> None:
    assert bad_answer(answer, "Who was the keeper of Gannet Point?", TEXT) == reason


def test_loops() -> None:
    assert loops([1, 2, 3] * 3) and loops([9, *[4] * 5])
    assert not loops([1, 2, 3, 1, 2, 3, 1, 2]) and not loops([]) and not loops([1, 2])
    assert loops(words("The red lamp and the red lamp or the red lamp".lower()))


def test_seed_prompts_lead_by_example() -> None:
    """Five kinds; each example is a question that the filters would keep, opened in one of the kind's own ways."""
    assert tuple(s.kind for s in SEED_PROMPTS) == KINDS and len(set(KINDS)) == 5
    for seed in SEED_PROMPTS:
        for example in seed.examples:
            assert bad_question(example, "Marrow Bridge", EXAMPLE) is None, example
            assert example in seed.instruction()
        assert EXAMPLE in seed.instruction() and len(seed.openings) == len(set(seed.openings))


def test_a_question_about_our_example_is_off_topic() -> None:
    """Small models copy it."""
    assert bad_question("When was Marrow Point at Gannet lit?", TITLE, TEXT) == "off topic"
    assert (
        bad_question("When was the bridge at Gannet Point lit?", "Gannet Point", TEXT + " The bridge is new.") is None
    )


def test_no_sentence_is_asked_the_same_way_twice_before_all_were(model: FrozenModel) -> None:
    documents, settings = wells(3), SelfStudy(questions_per_call=5, kinds=("structuring",))
    seed = next(s for s in SEED_PROMPTS if s.kind == "structuring")
    sentences = [f"{sentence}." for sentence in documents["alder"].text.rstrip(".").split(". ")]
    everything = {
        (sentence, opening) for sentence in sentences for opening in seed.openings_for(sentence, "Alder Well")
    }
    planner = CoveragePlanner(split_documents(model, documents), INSTRUCT, settings)
    history, tried, number = History(), list[tuple[str, str]](), 0
    while len(tried) < len(everything):
        call = planner.call(number, history.tried)
        assert call.temperatures == (0,) and len(call.pairs) == min(5, len(everything) - len(tried))
        tried += call.text_pairs
        history.add([call], [], Counter())
        number += 1
    assert len(tried) == len(set(tried)) and set(tried) == everything
    again = planner.call(number, history.tried)
    assert again.temperatures == (0.7,) and len(again.pairs) == 5 and set(again.text_pairs) <= everything
    other, rebuilt = CoveragePlanner(split_documents(model, documents), INSTRUCT, settings), History()
    for unit in range(number // 2):
        rebuilt.add(other.plan(unit, rebuilt), [], Counter())
    if number % 2:
        rebuilt.add([other.call(number - 1, rebuilt.tried)], [], Counter())
    assert other.call(number, rebuilt.tried) == again


@pytest.mark.parametrize("style", [INSTRUCT, READER])
def test_a_plan_depends_on_nothing_but_its_arguments(model: FrozenModel, style: PromptStyle) -> None:
    """Units planned twice, in any order, ask the same; planning changes no history."""
    planner = make_planner(split_documents(model, wells(6, 4, 9)), style, SelfStudy(questions_per_call=4))
    assert isinstance(planner, SentencePlanner if style is READER else CoveragePlanner)
    history, before = History(), list[tuple[History, list[Call]]]()
    for unit in range(5):
        calls = planner.plan(unit, history)
        before.append((copy.deepcopy(history), calls))
        history.add(calls, [], Counter())
    for unit in (3, 0, 4, 2, 1):
        given, calls = before[unit]
        unchanged = copy.deepcopy(given)
        assert planner.plan(unit, given) == calls and given == unchanged


def test_retries_are_about_silent_documents_in_turn(model: FrozenModel) -> None:
    planner = CoveragePlanner(split_documents(model, wells(9, 1, 2)), INSTRUCT, SelfStudy(conversations=1))
    history = History(kept=1, questions={"alder": {"who dug alder well"}})
    asked, unit = Counter[str](), 0
    while calls := planner.plan(unit, history):
        assert all(call.is_retry for call in calls)
        asked.update(call.document.id for call in calls)
        history.add(calls, [], Counter())
        unit += 1
    assert asked == {"birch": MAX_RETRIES_PER_DOCUMENT, "cedar": MAX_RETRIES_PER_DOCUMENT}


def test_documents_without_a_word_are_left_out(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    blank = Document("zero", "Zero", "* * *")
    found = synthesize(model, Collection("some", (*wells(4).documents, blank)), new_store(), **SMALL)
    assert set(found.by_document) == {"alder"}
    assert CoveragePlanner([], INSTRUCT, SelfStudy(conversations=5)).plan(0, History()) == []


def test_openings() -> None:
    seed = dataclasses.replace(SEED_PROMPTS[0], openings=("Who", "What is the {word}"))
    assert seed.openings_for("Alder Well was dug by Tom Reed in 1911.", "Alder Well") == ["Who", "What is the dug"]
    found = seed.openings_for("The well has an oak lid and an oak rope.", "Alder Well")
    assert found == ["Who", "What is the oak", "What is the lid", "What is the rope"]
    for seed in SEED_PROMPTS:
        found = seed.openings_for(EXAMPLE, "Marrow Bridge")
        assert len(found) == len(set(found)) and not any("{" in opening for opening in found)


def test_conversations_by_document() -> None:
    def one(document: str, n: int) -> Conversation:
        values = np.array([n], np.int32)
        return Conversation(document, "question", str(n), values, values, values[None], values[None].astype(np.float32))

    found = Conversations([one("b", 1), one("a", 2), one("b", 3)], {"loop": 4})
    assert {name: [c.question for c in items] for name, items in found.by_document.items()} == {
        "b": ["1", "3"],
        "a": ["2"],
    }
    assert len(found) == 3 and found.dropped == {"loop": 4}


def test_units_are_joined_and_read_from_the_disk(tmp_path: Path) -> None:
    """What is loaded equals what was written, and follows the units that are there; the joint file is made anew."""

    def one(document: str, n: int) -> Conversation:
        answer = np.arange(n % 4 + 1, dtype=np.int32)
        top = np.stack([answer + n] * 3, axis=1)
        return Conversation(
            document, KINDS[n % 5], f"question {n}", answer[:2] + 7, answer, top, -top.astype(np.float32)
        )

    def same(a: Conversation, b: Conversation) -> bool:
        arrays = ("prompt", "answer", "top_ids", "top_logprobs")
        equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
        return equal and (a.document, a.kind, a.question) == (b.document, b.kind, b.question)

    items = [one("ab"[n % 2], n) for n in range(12)]
    for unit in range(3):
        file = tmp_path / f"unit-{unit:06d}.parquet"
        write_unit(file, items[4 * unit : 4 * unit + 4], Counter({"loop": unit}), "settings")

    def check(found: Conversations, expected: list[Conversation], dropped: int) -> None:
        assert set(found.by_document) == {"a", "b"} and len(found) == len(expected)
        for name in "ab":
            own = [c for c in expected if c.document == name]
            assert all(map(same, found.by_document[name], own)) and same(found.by_document[name][-1], own[-1])
            assert all(map(same, found.by_document[name][1:3], own[1:3]))
        assert sum(found.dropped.values()) == dropped

    check(Conversations.load(tmp_path), items, 3)
    check(Conversations.load(tmp_path, 2), items[:8], 1)
    (tmp_path / "units.arrow").write_bytes(b"damaged")
    check(Conversations.load(tmp_path), items, 3)
    (tmp_path / "unit-000002.parquet").unlink()
    check(Conversations.load(tmp_path), items[:8], 1)


def test_the_embedded_reader_is_asked_in_its_own_format(
    new_store: Callable[..., Store], model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's message names kind and sentence, the answer is the question; answered as it stands, nothing added."""
    asked: list[str] = []

    def reads(_: FrozenModel, prompts: Sequence[Prompt], kv: Any, layout: Any, **options: Any) -> list[Generation]:
        out = []
        for prompt in prompts:
            assert prompt.tokens[: len(model.template.footer_ids)] == model.template.footer_ids
            assert prompt.tokens[-len(model.template.suffix_ids) :] == model.template.suffix_ids
            ids = prompt.tokens[len(model.template.footer_ids) : -len(model.template.suffix_ids)]
            text = model.decode(ids)
            if options.get("keep_top"):
                k, stop = options["keep_top"], min(model.template.stop_ids)
                answer = [*model.encode(f"Yes, {text.rpartition(' in ')[2]}"), stop]
                top = [
                    torch.tensor([t, *(n for n in range(3, 3 + k) if n != t)][:k], dtype=torch.int32) for t in answer
                ]
                out.append(Generation(answer[:-1], True, {}, top, [torch.zeros(k)] * len(answer)))
                continue
            asked.append(text)
            kind, _, sentence = text.partition(": ")
            told = sentence.rstrip(".")
            if options["temperature"] and len(out) % 2:  # every other sampled question is a new one
                told += f", of all {len(out)}"
            out.append(Generation(model.encode(f"Quixotic zebras dance, {kind}: {told}?"), True))
        return out

    monkeypatch.setattr(selfstudy, "generate", reads)
    monkeypatch.setattr(model, "reader", True)
    documents = wells(6, 6)
    found = synthesize(model, documents, new_store(), conversations=40, questions_per_call=4, top_k=5)
    sentences = {f"{s}." for d in documents.documents for s in d.text.rstrip(".").split(". ")}
    assert {text.partition(": ")[0] for text in asked} == set(KINDS)
    assert {text.partition(": ")[2] for text in asked} <= sentences
    for name, items in found.by_document.items():
        for c in items:  # words that the text has not are no fault of this model
            assert model.decode(c.prompt.tolist()) == c.question and c.question.startswith("Quixotic zebras dance,")
            assert documents[name].title in c.question and f", {c.kind}: " in c.question

    # Without a number of conversations: every sentence in every kind, once greedily and then sampled, also after a stop.
    asked.clear()
    every = [f"{kind}: {s}" for kind in KINDS for d in documents.documents for s in d.text.rstrip(".").split(". ")]
    once = plain(synthesize(model, documents, new_store("once"), questions_per_call=4, top_k=5, wordings=1))
    assert sorted(text.rstrip(".") for text in asked) == sorted(text.rstrip(".") for text in every)
    asked.clear()
    whole = plain(synthesize(model, documents, new_store("all"), questions_per_call=4, top_k=5))
    assert sorted(text.rstrip(".") for text in asked) == sorted(text.rstrip(".") for text in every * 4)
    assert len(once) == len(every) < len(whole) < 4 * len(every)  # new wordings are kept, old ones are not
    stopped, told = new_store("stopped"), list[int]()

    def stop(done: int, wanted: int) -> None:
        assert done <= wanted == len(every)
        told.append(done)
        if len(told) in (1, 3):  # after the first unit, and after the second
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            synthesize(model, documents, stopped, progress=stop, questions_per_call=4, top_k=5)
    assert plain(synthesize(model, documents, stopped, progress=stop, questions_per_call=4, top_k=5)) == whole
    assert told[-1] == len(every) and told[3:] == sorted(told[3:])
    assert len(asked) == 2 * 4 * len(every)
    with pytest.raises(ConfigError, match="other settings"):
        synthesize(model, documents, stopped, conversations=10, questions_per_call=4, top_k=5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(20, 200))
@settings(max_examples=200, deadline=None)
def test_windows_are_for_every_sentence_once(lengths: list[int], most: int) -> None:
    windows = sentence_windows(lengths, most)
    assert [i for _, rows in windows for i in rows] == list(range(len(lengths)))
    for read, rows in windows:
        assert read.start <= rows.start and read.stop == rows.stop
        used = sum(lengths[i] for i in read)
        assert used <= most or len(read) == 1
        assert read.start == 0 or used + lengths[read.start - 1] > most  # as much before as there is room for
