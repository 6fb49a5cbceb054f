"""What each call asks about."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from helpers_writer import wells
from hypothesis import given, settings
from hypothesis import strategies as st

from cas.data.collection import Collection, Document
from cas.model.frozen import FrozenModel
from cas.selfstudy.planners import (
    MAX_RETRIES_PER_DOCUMENT,
    Call,
    CoveragePlanner,
    History,
    SentencePlanner,
    fit_window,
    make_planner,
    sentence_windows,
    split_documents,
)
from cas.selfstudy.prompt_styles import INSTRUCT, LIST, READER, PromptStyle
from cas.selfstudy.seed_prompts import SEED_PROMPTS
from cas.selfstudy.synthesize import SelfStudy


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


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


def test_number_of_conversations(model: FrozenModel) -> None:
    """A quarter of the tokens, at least 64 a document; or what is asked for."""
    long = Document("long", "Long", " ".join(f"Alder Well number {n} was dug by Tom Reed." for n in range(60)))
    documents = Collection("two", (long, *wells(3).documents))
    sources = split_documents(model, documents)
    tokens = {source.document.id: sum(source.lengths) for source in sources}
    assert tokens["long"] > 4 * 64 > tokens["alder"]
    assert CoveragePlanner(sources, INSTRUCT, SelfStudy()).target == tokens["long"] // 4 + 64
    assert CoveragePlanner(sources, INSTRUCT, SelfStudy(conversations=7)).target == 7
    assert CoveragePlanner(sources, INSTRUCT, SelfStudy(effort="quick")).target == 24 + 24
    assert CoveragePlanner(sources, INSTRUCT, SelfStudy(effort="thorough")).target == tokens["long"] // 2 + 128


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


@pytest.mark.parametrize(
    "text",
    [
        "x1f " * 5000,
        "abcdefghij" * 2000,
        "".join(chr(0x4E00 + i) for i in range(3000)),
        json.dumps({f"key{i}": i for i in range(1500)}, separators=(",", ":")),
    ],
    ids=["line", "run", "chinese", "json"],
)
@pytest.mark.parametrize("style", [INSTRUCT, LIST, READER], ids=["sentence", "list", "reader"])
def test_no_sentence_exceeds_the_window(model: FrozenModel, text: str, style: PromptStyle) -> None:
    """Counted in the model's tokens, whatever the text looks like; no letter is lost."""
    documents = Collection("one", (Document("one", "One", text),))
    study, sources = fit_window(model, style, SelfStudy(chunk_tokens=90, questions_per_call=4), documents)
    assert "".join("".join(sources[0].sentences).split()) == "".join(text.split())
    assert max(sources[0].lengths) <= 90 and len(sources[0].sentences) > 50
    calls = make_planner(sources, style, study).plan(0, History())
    assert calls and all(model.count_tokens(call.chunk) <= 90 + model.count_tokens("One\n\n") + 4 for call in calls)


def test_a_short_document_is_exhausted_by_lists(model: FrozenModel) -> None:
    """The questions of a list count, although a list has no pairs of sentence and opening."""
    planner, history, units = CoveragePlanner(split_documents(model, wells(1)), LIST, SelfStudy()), History(), 0
    while calls := planner.plan(units, history):
        history.add(calls, [], Counter())
        units += 1
    assert units == -(-24 * 5 // (20 * 8)) and planner.progress(history) == (0, 0)
    assert planner.most_questions(history) == 0


def test_a_unit_costs_as_much_among_many_documents_as_among_few(model: FrozenModel) -> None:
    """What is counted of a document is counted again only where a unit asked about it."""
    counted = dict[int, int]()
    for copies in (2, 40):
        documents = tuple(
            Document(f"{d.id}-{n}", f"{d.title} {n}", d.text) for n in range(copies) for d in wells(5, 5).documents
        )
        planner = CoveragePlanner(split_documents(model, Collection("many", documents)), INSTRUCT, SelfStudy())
        history, events = History(), 0
        for unit in range(3):
            calls = planner.plan(unit, history)
            history.add(calls, [], Counter())
        before = len(calls)

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal events
            events += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            calls = planner.plan(3, history)
            planner.progress(history), planner.most_questions(history)
        finally:
            sys.setprofile(None)
        assert len(calls) == before
        counted[copies] = events
    assert counted[40] < 2 * counted[2]
