"""What is asked about, what is dropped and why."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_hf, tiny_tokenizer
from helpers_store import stored_keys
from helpers_writer import DEEDS, PLACES, SMALL, Writer, plain, wells

from cas.data.collection import Collection, Document
from cas.errors import ConfigError, RunError
from cas.model.decoding import Generation, Prompt
from cas.model.frozen import FrozenModel, Source
from cas.options import KINDS
from cas.selfstudy import prompt_styles
from cas.selfstudy import synthesize as selfstudy
from cas.selfstudy.planners import (
    MAX_RETRIES_PER_DOCUMENT,
    CoveragePlanner,
    History,
    fit_window,
    split_documents,
)
from cas.selfstudy.prompt_styles import INSTRUCT, token_limits, with_limits
from cas.selfstudy.seed_prompts import SEED_PROMPTS, normal
from cas.selfstudy.share import KeptShare
from cas.selfstudy.synthesize import SelfStudy, Teacher, synthesize
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.rounds import begin_round, end_untrained, plan_round
from retrieval.chunk import with_title


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


def test_conversations(new_store: Callable[..., Store], model: FrozenModel, writer: Writer) -> None:
    store, progress = new_store(), list[tuple[int, int]]()
    documents = wells(10, 8, 9)
    conversations = synthesize(model, documents, store, progress=lambda *n: progress.append(n), **SMALL)
    assert list(store.rows()) == ["alder", "birch", "cedar"]  # with their cartridges
    assert len(conversations) >= 60 and set(conversations.by_document) == set(store.rows())
    assert progress[-1] == (60, 60) and progress == sorted(progress)
    stop, template = model.template.stop_ids, model.template
    for name, items in conversations.by_document.items():
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
    assert {c.kind for items in conversations.by_document.values() for c in items} == {s.kind for s in SEED_PROMPTS}


def test_documents_that_share_a_title_are_called_by_their_ids(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """Seven pages called "Overview": what is asked, and what is repeated, says which one is meant. An eighth that comes
    in a later round is told apart from those that are there."""
    rooms = ("boiler", "crane", "dock", "engine", "forge", "galley", "hold")
    pages = tuple(
        Document(f"{room}/README", "Overview", " ".join(f"The {room} {deed}." for deed in DEEDS[n : n + 3]))
        for n, room in enumerate(rooms)
    )
    plan = Document("plan", "The plan", "The plan hangs in the hall. It was drawn in 1950 by two sisters.")
    documents, store = Collection("rooms", (*pages, plan)), new_store()

    def question(prompt: Prompt, seed: int) -> Generation:
        sentence = model.tokenizer.decode(list(prompt.tokens)).split("Sentence: ")[1].split(".")[0]
        return Generation(model.encode(f" {sentence.split()[-1]} of it, {seed % 7}?"), True)

    writer.question = question  # type: ignore[method-assign]
    settings = SMALL | {"reconstruction": "on", "keep_going": True}
    conversations = synthesize(model, documents, store, **settings)
    for name, items in conversations.by_document.items():
        asked = [c.question for c in items]
        assert {c.kind for c in items} > {"reconstruction"}, conversations.dropped
        assert all(name in question for question in asked if "Overview" in question)
        assert ("Overview" in " ".join(asked)) == (name != "plan")
    assert {row.title for row in store.rows().values()} == {"Overview", "The plan"}  # as they are called themselves
    initialize_cartridges(model, store, conversations)
    end_untrained(store)
    later = Collection("later", (Document("hall/README", "Overview", "The hall has four doors and a clock."),))
    begin_round(store, plan_round(store, Collection("all", (*documents.documents, *later.documents))))
    questions = [c.question for c in synthesize(model, later, store, **settings).by_document["hall/README"]]
    assert questions and all("hall/README (Overview)" in q for q in questions if "Overview" in q)
    assert any("Overview" in q for q in questions)


def test_what_is_dropped_is_counted_by_reason(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    conversations = synthesize(model, wells(10, 8, 9), new_store(), **SMALL)
    dropped = Counter(conversations.dropped)
    duplicates = dropped.pop("duplicate", 0)
    loops = writer.bad_questions.pop("loop") + writer.bad_answers.pop("loop")
    assert dropped.pop("loop") == loops
    good_questions, good_answers = writer.bad_questions.pop(""), writer.bad_answers.pop("")
    assert dropped == writer.bad_questions + writer.bad_answers
    questions = {"malformed question", "off topic", "unfinished question"}
    assert set(dropped) == questions | {"answer too long", "empty answer", "answer without substance"}
    assert (good_questions - duplicates, good_answers) == (writer.answered, len(conversations))
    assert writer.asked == len(conversations) + sum(conversations.dropped.values())


def test_answers_are_dropped_rather_than_cut(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    original, long = writer.answer, list[tuple[int, ...]]()

    def answer(prompt: Prompt, k: int) -> Generation:
        generation = original(prompt, k)
        if not generation.finished:
            long.append(tuple(generation.ids))
        return generation

    writer.answer = answer  # type: ignore[method-assign]
    conversations = synthesize(model, wells(10, 8), new_store(), **SMALL)
    assert len(long) == conversations.dropped["answer too long"] > 0
    assert all(c.answer[-1] in model.template.stop_ids for items in conversations.by_document.values() for c in items)


@pytest.mark.parametrize("kinds", [(), ("question", "gossip")])
def test_unknown_kinds_are_refused_before_anything_is_written(
    new_store: Callable[..., Store], model: FrozenModel, kinds: tuple[str, ...]
) -> None:
    store = new_store()
    with pytest.raises(ConfigError, match=r"choose from question, structuring, summarization, use case, creative"):
        synthesize(model, wells(3), store, kinds=kinds)
    assert stored_keys(store) == {"meta"} and not (store.folder / "conversations").exists()


@pytest.mark.parametrize("kind", [s.kind for s in SEED_PROMPTS])
def test_one_kind_alone(new_store: Callable[..., Store], model: FrozenModel, writer: Writer, kind: str) -> None:
    conversations = synthesize(model, wells(10), new_store(), **(SMALL | {"kinds": (kind,), "conversations": 4}))
    openings = [
        o
        for s in SEED_PROMPTS
        if s.kind == kind
        for deed in DEEDS
        for o in s.openings_for(f"Alder Well {deed}.", "Alder Well")
    ]
    for c in conversations.by_document["alder"]:
        assert c.kind == kind and c.question.startswith(tuple(openings))


def test_a_model_that_writes_nothing_usable_is_an_error(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    writer.question = lambda prompt, seed: Generation(model.encode(" is it"), finished=True)  # type: ignore[method-assign]
    store = new_store()
    with pytest.raises(
        RunError, match=r"kept 0 of the first 112 questions \(0%; dropped: 112 malformed.* --keep-going"
    ) as early:
        synthesize(model, wells(10), store, **(SMALL | {"conversations": 3}))
    with pytest.raises(
        RunError,
        match=r"kept none of \d+ questions about 1 documents; dropped: \d+ malformed question; use a larger model, or go on without",
    ) as late:
        synthesize(model, wells(10), store, keep_going=True, **(SMALL | {"conversations": 3}))
    assert "\n" not in str(early.value) + str(late.value)
    units, asked = sorted(store.conversations.glob("unit-*")), writer.asked
    with pytest.raises(RunError, match="kept none of"):  # from its files
        synthesize(model, wells(10), store, keep_going=True, **(SMALL | {"conversations": 3}))
    assert sorted(store.conversations.glob("unit-*")) == units and writer.asked == asked


@pytest.mark.parametrize("good", [True, False])
def test_the_share_kept_of_the_first_hundred_questions(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, good: bool
) -> None:
    """It is said once; below a quarter self-study stops, with everything kept, until it is told to go on."""
    original = writer.question

    def question(prompt: Prompt, seed: int) -> Generation:
        return original(prompt, seed) if good or writer.asked % 6 == 0 else Generation([], finished=True)

    writer.question = question  # type: ignore[method-assign]
    settings, lines, store = SMALL | {"conversations": 90, "questions_per_call": 9}, list[str](), new_store()
    if good:
        synthesize(model, wells(10, 8, 9), store, say=lines.append, **settings)
        assert len(lines) == 1 and "questions" in lines[0] and lines[0].endswith("to go")
        return
    with pytest.raises(
        RunError,
        match=r"everything kept; use a larger model, or go on without a writer: --writer none .*, or go on with --keep-going",
    ):
        synthesize(model, wells(10, 8, 9), store, say=lines.append, **settings)
    units = {file: file.read_bytes() for file in store.conversations.glob("unit-*")}
    assert units and not lines
    conversations = synthesize(model, wells(10, 8, 9), store, say=lines.append, keep_going=True, **settings)
    assert len(lines) == 1 and all(file.read_bytes() == units[file] for file in units)
    assert conversations


def test_the_share_said_is_the_one_that_is_judged() -> None:
    """Duplicates aside: 30 of 100, though 170 were written."""
    lines = list[str]()
    share = KeptShare(lines.append, "", keep_going=False)
    share.add(30, Counter({"duplicate": 70, "off topic": 70}))
    share.check(10_000, 10_000)
    assert lines[0].startswith("self-study  kept 30 of the first 170 questions (30% without duplicates; dropped: 70 ")


def test_a_short_text_ends_when_it_is_exhausted(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """With what it allows, and the same again from its files."""
    documents, store, progress = wells(1), new_store(), list[tuple[int, int]]()
    settings = {**SMALL, "conversations": None}
    conversations = synthesize(model, documents, store, progress=lambda *n: progress.append(n), **settings)
    assert 0 < len(conversations) < 64 and progress[-1] == (len(conversations),) * 2
    assert writer.asked < 24 * 5 + 2 * 8
    asked = writer.asked
    assert plain(synthesize(model, documents, store, **settings)) == plain(conversations) and writer.asked == asked


def test_limits_follow_model_and_first_unit(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given wins, then what the first unit was made with, then what suits the model."""
    assert token_limits(model, SelfStudy()) == (64, 96)
    assert token_limits(model, SelfStudy(answer_tokens=7)) == (64, 7)
    store = new_store()
    synthesize(model, wells(4), store, question_tokens=40, answer_tokens=48, **SMALL)
    before = plain(synthesize(model, wells(4), store, **SMALL))  # an older default, not given again
    assert before and with_limits(model, SelfStudy(), store.conversations).answer_tokens == 48
    with pytest.raises(ConfigError, match="was made with another"):
        synthesize(model, wells(4), store, answer_tokens=96, **SMALL)
    monkeypatch.setattr(model, "reader", True)
    assert token_limits(model, SelfStudy()) == (40, 48)


def test_no_text_is_longer_than_the_model_reads(model: FrozenModel) -> None:
    """Long sentences are cut, and windows leave room for request and reply."""
    long = Document("long", "Log", "x1f " * 900 + "。" + "水库闸门" * 400)
    settings, sources = fit_window(model, INSTRUCT, SelfStudy(), Collection("one", (long,)))
    assert "".join("".join(sources[0].sentences).split()) == "".join(long.text.split())
    planner, history = CoveragePlanner(sources, INSTRUCT, settings), History()
    for unit in range(4):
        calls = planner.plan(unit, history)
        history.add(calls, [], Counter())
        for call in calls:
            shared, requests = INSTRUCT.request_tokens(model, call.seed_prompt, "Log", call.text_pairs)
            used = model.layout_header + len(model.encode(call.chunk)) + len(shared) + max(map(len, requests))
            assert used + 64 <= model.geometry.max_positions


def test_documents_about_which_nothing_is_kept_are_recorded(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    blank = Document("zero", "Zero", "* * *")
    store = new_store()
    synthesize(model, Collection("some", (*wells(4).documents, blank)), store, **SMALL)
    assert json.loads((store.folder / "without_conversations.json").read_text()) == {"zero": blank.hash}
    with pytest.raises(RunError, match="kept none of 0 questions about 1 documents"):
        synthesize(model, Collection("none", (blank,)), new_store("blank"), **SMALL)


def test_every_document_gets_conversations_however_few_are_asked_for(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    conversations = synthesize(model, wells(10, 10, 10, 10, 10), new_store(), **(SMALL | {"conversations": 1}))
    assert set(conversations.by_document) == {name.lower() for name in PLACES}


def test_a_document_about_which_nothing_is_kept_is_left_out(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After retries of its own; the other documents get conversations soon, although they are short beside a long
    one."""
    sound, asked = selfstudy.bad_question, Counter[str]()

    def refusing(question: str, title: str, text: str, check_topic: bool) -> str | None:
        asked[title] += 1
        return "off topic" if title == "Birch Well" else sound(question, title, text, check_topic)

    monkeypatch.setattr(selfstudy, "bad_question", refusing)
    store, settings = new_store(), SMALL | {"conversations": 3}
    documents = wells(60, 1, 1, 1)
    conversations = synthesize(model, documents, store, **settings)
    assert set(conversations.by_document) == {d.id for d in documents.documents} - {"birch"}
    assert conversations.dropped["off topic"] >= asked["Birch Well"] >= MAX_RETRIES_PER_DOCUMENT
    assert asked["Alder Well"] < 12 * 5 * 4  # not the whole long document for the sake of a short one
    assert plain(synthesize(model, documents, store, **settings)) == plain(conversations)  # from its files


def test_documents_without_a_word_are_left_out(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    blank = Document("zero", "Zero", "* * *")
    conversations = synthesize(model, Collection("some", (*wells(4).documents, blank)), new_store(), **SMALL)
    assert set(conversations.by_document) == {"alder"}
    assert CoveragePlanner([], INSTRUCT, SelfStudy(conversations=5)).plan(0, History()) == []


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
    conversations, _ = Teacher(model, INSTRUCT, study).converse(calls, {})
    assert len(conversations) > 6 and {c.document for c in conversations} == {"alder", "birch"}
    assert max(len(c.answer) for c in conversations) > 3
    template = model.template
    for c in conversations:
        chunk = with_title(documents[c.document].title, documents[c.document].text)
        ids = [*template.header_ids, *model.encode(chunk), *c.tokens(model)]
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(c.answer) :]
        top = logits.log_softmax(-1).topk(9, dim=-1)
        assert logits.argmax(-1).tolist() == c.answer.tolist()  # greedy, the end of the turn included
        torch.testing.assert_close(torch.from_numpy(c.top_logprobs), top.values, rtol=1e-3, atol=1e-3)
        assert (torch.from_numpy(c.top_ids) == top.indices).float().mean() > 0.95  # but for ties


def test_the_embedded_reader_is_asked_in_its_own_format(
    new_store: Callable[..., Store], model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's message is kind and sentence, the reply is the question; nothing is appended when it is answered."""
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
            fact = sentence.rstrip(".")
            if options["temperature"][len(out)] and len(out) % 2:  # every other sampled question is a new one
                fact += f", of all {len(out)}"
            out.append(Generation(model.encode(f"Quixotic zebras dance, {kind}: {fact}?"), True))
        return out

    monkeypatch.setattr(selfstudy, "generate", reads)
    monkeypatch.setattr(model, "reader", True)
    documents = wells(6, 6)
    conversations = synthesize(model, documents, new_store(), conversations=40, questions_per_call=4, top_k=5)
    sentences = {f"{s}." for d in documents.documents for s in d.text.rstrip(".").split(". ")}
    assert {text.partition(": ")[0] for text in asked} == set(KINDS)
    assert {text.partition(": ")[2] for text in asked} <= sentences
    for name, items in conversations.by_document.items():
        for c in items:  # words that the text does not contain are allowed for this model
            assert model.decode(c.prompt.tolist()) == c.question and c.question.startswith("Quixotic zebras dance,")
            assert documents[name].title in c.question and f", {c.kind}: " in c.question

    # Without a number of conversations, in a store that was begun with samples: every sentence in every kind, greedily and
    # sampled, also after a stop.
    monkeypatch.setattr(prompt_styles, "READER", prompt_styles.READER_SAMPLING)
    asked.clear()
    every = [f"{kind}: {s}" for kind in KINDS for d in documents.documents for s in d.text.rstrip(".").split(". ")]
    once = plain(synthesize(model, documents, new_store("once"), questions_per_call=4, top_k=5, wordings=1))
    assert sorted(text.rstrip(".") for text in asked) == sorted(text.rstrip(".") for text in every)
    asked.clear()
    whole = plain(synthesize(model, documents, new_store("all"), questions_per_call=4, top_k=5))
    assert sorted(text.rstrip(".") for text in asked) == sorted(text.rstrip(".") for text in every * 4)
    assert len(once) == len(every) < len(whole) < 4 * len(every)  # new wordings are kept, old ones are not
    stopped, progress = new_store("stopped"), list[int]()

    def stop(done: int, wanted: int) -> None:
        assert done <= wanted == len(every)
        progress.append(done)
        if len(progress) in (1, 3):  # after the first unit, and after the second
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            synthesize(model, documents, stopped, progress=stop, questions_per_call=4, top_k=5)
    assert plain(synthesize(model, documents, stopped, progress=stop, questions_per_call=4, top_k=5)) == whole
    assert progress[-1] == len(every) and progress[3:] == sorted(progress[3:])
    assert len(asked) == 2 * 4 * len(every)
    with pytest.raises(ConfigError, match="was made with another"):
        synthesize(model, documents, stopped, conversations=10, questions_per_call=4, top_k=5)
