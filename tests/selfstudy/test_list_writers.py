"""Self-study with lists of questions that the frozen model writes, and who writes lists."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from conftest import tiny_hf, tiny_tokenizer
from helpers_lists import LISTS, ListWriterDouble
from helpers_writer import SMALL, Writer, plain, wells

from cas.data.collection import Collection, Document
from cas.errors import ConfigError, RunError
from cas.model.decoding import Generation
from cas.model.frozen import FrozenModel, Source
from cas.options import KINDS
from cas.selfstudy import list_writers, prompt_styles
from cas.selfstudy import synthesize as selfstudy
from cas.selfstudy.conversations import read_unit
from cas.selfstudy.list_writers import ModelWriter
from cas.selfstudy.planners import Call, CoveragePlanner, History, fit_window, make_planner, split_documents
from cas.selfstudy.prompt_styles import ENDPOINT, INSTRUCT, LIST, READER, prompt_style
from cas.selfstudy.subjects import Subjects
from cas.selfstudy.synthesize import SelfStudy, Teacher, synthesize
from cas.store.store import Store


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    """Its window has room for a long list in tokens of a letter or two."""
    return FrozenModel(tiny_hf("llama", max_position_embeddings=4096), tiny_tokenizer(), Source("folder", "tiny"))


@pytest.fixture
def double(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> ListWriterDouble:
    double = ListWriterDouble(model)
    monkeypatch.setattr(selfstudy, "generate", double)
    monkeypatch.setattr(list_writers, "generate", double)
    return double


def made_with(store: Store) -> dict[str, Any]:
    return json.loads(read_unit(store.conversations / "unit-000000.parquet")[2])


def test_a_call_asks_for_one_list_about_its_chunk(model: FrozenModel) -> None:
    """All kinds, whole sentences, in proportion to length as before; the same calls whatever came before."""
    sources = split_documents(model, wells(10, 2, 5))
    planner = make_planner(sources, LIST, SelfStudy(chunk_tokens=60))
    assert isinstance(planner, CoveragePlanner) and not planner.every_sentence
    calls = planner.plan(0, History())
    assert len(calls) == 8
    assert calls == planner.plan(0, History(asked=9, kept=1, questions={"alder": {"a"}}, dropped=Counter(x=1)))
    history, later = History(), list[Call]()
    for unit in range(5):
        unchanged = copy.deepcopy(history)
        later += planner.plan(unit, history)
        assert history == unchanged
        history.add(later[-8:], [], Counter())
    assert {call.seed_prompt.kind for call in later} == set(KINDS)
    assert all((call.pairs, call.temperatures, call.listed) == ((), (0.7,), 20) for call in later)
    assert {call.document.id for call in later} == {"alder", "birch", "cedar"}
    assert planner.plan(3, History()) == later[24:32]


def test_conversations(new_store: Callable[..., Store], model: FrozenModel, double: ListWriterDouble) -> None:
    store, documents = new_store(), wells(10, 8, 9)
    conversations = synthesize(model, documents, store, **LISTS)
    assert len(conversations) >= 60 and set(conversations.by_document) == set(store.rows())
    for name, items in conversations.by_document.items():
        assert all(documents[name].title in c.question and c.question.startswith("Is it so that") for c in items)
        assert len({c.question for c in items}) == len(items)
        assert all(c.top_ids.shape == (len(c.answer), 5) for c in items)
    assert {c.kind for items in conversations.by_document.values() for c in items} == set(KINDS)
    for text in double.prompts:
        assert text.endswith("1.") and " 8 " in text and "in the language of the text" in text
    settings = made_with(store)
    assert settings["writer"] == "list" and settings["questions_per_call"] == 8
    assert set(settings) & {"writer_url", "writer_model", "writer_concurrency"} == set()


def test_every_line_is_counted(new_store: Callable[..., Store], model: FrozenModel, double: ListWriterDouble) -> None:
    double.cut = True
    conversations = synthesize(model, wells(10, 8, 9), new_store(), **(LISTS))
    dropped = conversations.dropped
    lists = len(double.prompts)
    assert dropped["unfinished question"] == lists  # the last line of each
    assert double.answered + dropped.get("duplicate", 0) == 7 * lists
    answers = sum(n for reason, n in dropped.items() if "answer" in reason) + dropped.get("loop", 0)
    assert len(conversations) + answers == double.answered
    double.cut = False
    few = synthesize(
        model, wells(10, 8, 9), new_store("short"), **(LISTS | {"question_tokens": 45, "conversations": 9})
    )
    assert few.dropped["question too long"] > 0
    assert all(len(model.encode(c.question)) <= 45 for items in few.by_document.values() for c in items)


def test_a_stopped_synthesis_goes_on_to_the_same_conversations(
    new_store: Callable[..., Store], model: FrozenModel, double: ListWriterDouble
) -> None:
    documents, parts = wells(10, 8, 9), new_store("parts")
    expected = synthesize(model, documents, new_store(), **LISTS)
    written = len(double.prompts)

    class Killed(BaseException):
        pass

    def progress(*_: int) -> None:
        raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            synthesize(model, documents, parts, progress=progress, **LISTS)
        assert len(list(parts.conversations.glob("unit-*"))) == 1
    conversations = synthesize(model, documents, parts, **LISTS)
    assert plain(conversations) == plain(expected) and conversations.dropped == expected.dropped
    assert len(double.prompts) == 2 * written


def test_the_models_own_lists(tiny: Callable[..., FrozenModel]) -> None:
    """A random model writes the same nonsense for the same seed, as long as its window allows."""
    model, study = tiny("llama"), SelfStudy(writer="list", question_tokens=5, questions_per_call=3)
    calls = make_planner(split_documents(model, wells(1, 2)), LIST, study).plan(0, History())[:3]
    teacher = Teacher(model, LIST, study, writer=ModelWriter(model, 5))
    chunks = {call.chunk: teacher.chunk_kv(call.chunk) for call in calls}
    replies = ModelWriter(model, 5).write(calls, chunks)
    assert len(replies) == 3 and len({text for text, _ in replies}) == 3
    assert all(text.startswith("1.") and len(model.encode(text)) > 5 for text, _ in replies)
    assert replies == ModelWriter(model, 5).write(calls, chunks)
    assert replies != ModelWriter(model, 5, seed=1).write(calls, chunks)
    window = model.geometry.max_positions
    for text, _ in ModelWriter(model, window).write(calls, chunks):
        assert len(model.encode(text)) < window
    conversations, dropped = teacher.converse(calls, {})
    assert not conversations and dropped


def test_a_small_window_gets_smaller_chunks(tiny: Callable[..., FrozenModel], model: FrozenModel) -> None:
    """For the model's own lists; an endpoint has a window of its own."""
    study = SelfStudy(question_tokens=40, answer_tokens=48, questions_per_call=10)
    for style in (LIST, ENDPOINT):
        assert fit_window(model, style, study, wells(9))[0].chunk_tokens == 512
    assert fit_window(tiny("llama"), ENDPOINT, study, wells(9))[0].chunk_tokens == 512
    assert 16 < fit_window(tiny("llama"), LIST, study, wells(9))[0].chunk_tokens < 400
    with pytest.raises(ConfigError, match="too few for self-study"):
        fit_window(tiny("llama"), LIST, SelfStudy(questions_per_call=200), wells(9))


def test_a_model_that_writes_no_list_is_an_error(
    new_store: Callable[..., Store], model: FrozenModel, double: ListWriterDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatter(_: Any, prompts: Any, *__: Any, **options: Any) -> list[Generation]:
        return [Generation(model.encode(" "), True) for _ in prompts]

    monkeypatch.setattr(list_writers, "generate", chatter)
    with pytest.raises(
        RunError, match=r"kept 0 of the first \d+ .*\d malformed reply.*, or --writer sentence, or"
    ) as caught:
        synthesize(model, wells(10), new_store(), **(LISTS | {"conversations": 3}))
    assert "\n" not in str(caught.value)


# -- who writes --------------------------------------------------------------------------------------------------------


def test_small_models_and_base_models_are_asked_sentence_by_sentence(
    model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def style(**options: Any) -> Any:
        return prompt_style(model, SelfStudy(**options))

    assert prompt_style(model) is style() is style(writer="sentence") is INSTRUCT
    assert style(writer="list") is LIST and style(writer_url="http://localhost:8000/v1") is ENDPOINT
    monkeypatch.setattr(prompt_styles, "LIST_PARAMETERS", model.hf.num_parameters())
    assert style() is LIST and style(writer="sentence") is INSTRUCT
    assert prompt_style(model, SelfStudy(), before="sentence") is INSTRUCT  # goes on as it began
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert style() is INSTRUCT and prompt_style(model, SelfStudy(), before="list") is LIST


@pytest.mark.parametrize("options", [{"writer": "list"}, {"writer_url": "http://localhost:8000/v1"}])
def test_the_embedded_reader_writes_sentence_by_sentence(
    model: FrozenModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(model, "reader", True)
    assert prompt_style(model, SelfStudy(writer="sentence")) is prompt_style(model, SelfStudy()) is READER
    with pytest.raises(ConfigError, match=r"--writer.*embedded reader answers only questions that it wrote") as caught:
        prompt_style(model, SelfStudy(**options))
    assert "\n" not in str(caught.value)


def test_units_of_earlier_versions_are_used_again(
    new_store: Callable[..., Store], model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored with a unit of one question a sentence is what it was, and auto goes on with such units, without
    reconstruction."""
    monkeypatch.setattr(selfstudy, "generate", Writer(model))
    store, settings = new_store(), {"conversations": 20, "chunk_tokens": 120, "top_k": 5, "question_tokens": 40}
    settings["answer_tokens"] = 48
    synthesize(model, wells(10, 8), store, reconstruction="off", **settings)
    stored = made_with(store)
    assert stored.pop("model") == model.fingerprint and stored.pop("system") == model.system
    assert len(stored.pop("documents")) == 64
    assert json.dumps(stored) == (
        '{"answer_tokens": 48, "calls_per_unit": 2, "chunk_tokens": 120, "kinds": ["question", "structuring", '
        '"summarisation", "use case", "creative"], "once": false, "question_tokens": 40, "questions_per_call": 32, '
        '"seed": 0, "top_k": 5, "wordings": 4}'
    )
    monkeypatch.setattr(prompt_styles, "LIST_PARAMETERS", 0)
    again = synthesize(model, wells(10, 8), store, **settings)
    assert plain(again) == plain(synthesize(model, wells(10, 8), store, writer="sentence", **settings))
    with pytest.raises(ConfigError, match="was made with another"):
        synthesize(model, wells(10, 8), store, writer="list", **settings)


def test_auto_goes_on_with_lists(new_store: Callable[..., Store], model: FrozenModel, double: ListWriterDouble) -> None:
    store = new_store()
    lists = synthesize(model, wells(10, 8), store, **(LISTS | {"conversations": 20}))
    more = synthesize(model, wells(10, 8), store, **(LISTS | {"writer": "auto"}))
    assert len(more) > len(lists) and all("Write" in text for text in double.prompts)
    with pytest.raises(ConfigError, match="was made with another"):
        synthesize(model, wells(10, 8), store, **SMALL, writer="sentence")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"writer": "poem"}, "--writer poem: choose auto, sentence, list or none"),
        ({"writer_model": "m"}, "--writer-model is the model of an endpoint; give its --writer-url"),
        ({"writer_url": "http://h/v1", "writer": "sentence"}, "--writer-url: an endpoint writes lists"),
        ({"writer_url": "http://h/v1", "writer_concurrency": 0}, "--writer-concurrency 0: at least 1"),
        ({"writer_url": "http://h:99999/v1"}, "--writer-url: give an address such as"),
        ({"writer_url": "http://me:secret@h/v1"}, "--writer-url: give the address alone; its key belongs in"),
        ({"writer_url": "https://h/v1?key=secret"}, "--writer-url: give the address alone; its key belongs in"),
        ({"writer_url": "localhost:8000/v1"}, "--writer-url: give an address such as http://localhost:8000/v1"),
        ({"writer_url": "ftp://h/v1"}, "--writer-url: give an address such as"),
        ({"writer_url": "http:///v1"}, "--writer-url: give an address such as"),
        ({"writer_url": "http://h/v1 x"}, "--writer-url: give an address such as"),
        ({"writer_url": ""}, "--writer-url: give an address such as"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        SelfStudy(**options)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example.com/v1/", "http://10.0.0.3"])
def test_addresses(url: str) -> None:
    assert SelfStudy(writer_url=url).writer_url == url


@pytest.mark.parametrize(
    ("title", "text", "reply"),
    [
        ("红色阀门", "红色阀门由李明于1911年安装。水泵每天供应四十座花园。",
         "1、红色阀门由谁安装？\n2、红色阀门是哪一年安装的？\n3、水泵每天供应多少座花园？"),
        ("赤いバルブ", "赤いバルブは1911年に田中さんが取り付けました。",
         "１．赤いバルブは誰が取り付けましたか？\n２．赤いバルブは何年に取り付けられましたか？"),
        ("الصمام الأحمر", "ركب أحمد الصمام الأحمر عام 1911 في المحطة القديمة.",
         "١. من ركب الصمام الأحمر؟\n٢. في أي عام ركب الصمام الأحمر؟"),
        ("लाल वाल्व", "लाल वाल्व मोहन ने 1911 में लगाया था।", "१. लाल वाल्व किसने लगाया था?\n२. लाल वाल्व कब लगाया था?"),
        ("вентиль", "Красный вентиль установил Иван Петров в 1911 году.",
         "1) Кто установил красный вентиль?\n2) Когда установили красный вентиль?"),
        ("Ventil", "Das rote Ventil wurde 1911 von Tom Reed eingebaut.",
         "1. Wer hat das rote Ventil eingebaut?\n2. Wann wurde das rote Ventil eingebaut?"),
    ],
)  # fmt: skip
def test_lists_in_the_language_of_the_text(model: FrozenModel, title: str, text: str, reply: str) -> None:
    """All questions of a good list are worth an answer."""

    class Speaker:
        def write(self, calls: list[Call], chunks: Any) -> list[tuple[str, bool]]:
            return [(reply, True) for _ in calls]

    documents = Collection("one", (Document("one", title, text),))
    calls = make_planner(split_documents(model, documents), LIST, SelfStudy()).plan(0, History())[:1]
    teacher = Teacher(model, LIST, SelfStudy(question_tokens=200), Subjects(documents.documents), Speaker())
    dropped = Counter[str]()
    written = teacher.ask_for_lists(calls, {}, dropped)[0]
    questions = teacher.filter(calls[0], written, set(), dropped)
    assert len(questions) == len(reply.splitlines()) and not dropped
