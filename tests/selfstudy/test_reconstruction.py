"""Conversations whose answers are the text itself: what is asked, what the teacher says of it, and when they stand alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from helpers_writer import SMALL, Writer, plain, wells

from cas.data.collection import Collection, Document
from cas.errors import ConfigError, RunError
from cas.model.decoding import Generation
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy import reconstruction
from cas.selfstudy import synthesize as selfstudy
from cas.selfstudy.conversations import Conversations, recorded_settings
from cas.selfstudy.reconstruction import KIND, Passage, passages, reconstruct
from cas.selfstudy.synthesize import synthesize
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.trainer import Trainer

ALONE: dict[str, Any] = {"writer": "none", "chunk_tokens": 120, "top_k": 5}
STRANGE = {
    "english": ("Alder Well", " ".join(f"The well number {i} was dug in {1800 + i}.\n" for i in range(60))),
    "line": ("Log", " ".join(f"w{i * i}f" for i in range(900))),
    "chinese": ("水库", "".join(f"{chr(0x6C34 + 7 * i)}库闸门" for i in range(250))),
    "json": ("Data", json.dumps({f"key{i}": i * i for i in range(300)}, separators=(",", ":"))),
    "short": ("Open", "The office is closed."),
    "stars": ("Stars", "* * *"),
    "emoji": ("Smile", "🙂"),
}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


def strange(*names: str) -> Collection:
    chosen = {name: STRANGE[name] for name in names or STRANGE}
    return Collection("strange", tuple(Document(name, *text) for name, text in chosen.items()))


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("limits", [(64, 96), (200, 40), (12, 9)])
def test_the_answers_cover_the_whole_text(model: FrozenModel, name: str, limits: tuple[int, int]) -> None:
    document = strange(name)[name]
    settings = SelfStudy(question_tokens=limits[0], answer_tokens=limits[1], chunk_tokens=200)
    asked = passages(model, strange(name), settings)
    assert asked == passages(model, strange(name), settings)
    rest = squeezed(document.text)
    for passage in asked:
        assert passage.document == name and passage.text in passage.chunk
        assert model.count_tokens(passage.text) < limits[1]
        assert model.count_tokens(passage.message) <= limits[0] + 2  # joined parts may be a little longer than each
        if rest.startswith(squeezed(passage.text)):
            rest = rest.removeprefix(squeezed(passage.text))
    assert not rest
    used = max(model.count_tokens(p.chunk) for p in asked) + model.layout_header + sum(limits)
    assert used + len(model.question_tokens("")) < model.geometry.max_positions


def test_messages_name_the_document_and_are_in_its_language(model: FrozenModel) -> None:
    settings = SelfStudy(question_tokens=200)
    for name, (title, text) in STRANGE.items():
        asked = passages(model, strange(name), settings)
        assert all(title in p.message for p in asked)
        if name == "english":
            requests = [p for p in asked if p.message.startswith("Repeat the passage of")]
            assert all(p.text.startswith(p.message.rpartition("begins with: ")[2]) for p in requests)
            begun = [p for p in asked if p not in requests]
            assert len(begun) == 60 > len(requests) > 10
            for p in begun:  # message and answer together are a sentence
                assert squeezed(p.message.removeprefix("Alder Well: ") + p.text) in squeezed(text)
        if name == "chinese":
            assert not any(letter.isascii() and letter.isalpha() for p in asked for letter in p.message)


def test_probabilities_are_those_of_a_plain_pass(model: FrozenModel) -> None:
    documents = strange("english", "short", "stars")
    asked = passages(model, documents, SelfStudy(chunk_tokens=120))
    made = reconstruct(model, asked, 7)
    assert len(made) == len(asked) > 20
    for passage, c in zip(asked, made, strict=True):
        assert (c.document, c.kind, c.question) == (passage.document, KIND, passage.message)
        assert model.decode(c.answer[:-1].tolist()) == passage.text and c.answer[-1] in model.template.stop_ids
        assert (c.prompt.dtype, c.answer.dtype, c.top_ids.dtype, c.top_logprobs.dtype) == (np.int32,) * 3 + (
            np.float32,
        )
        ids = [*model.template.header_ids, *model.encode(passage.chunk), *c.tokens(model)]
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(c.answer) :]
        top = logits.log_softmax(-1).topk(7, dim=-1)
        torch.testing.assert_close(torch.from_numpy(c.top_logprobs.copy()), top.values, rtol=1e-4, atol=1e-4)
        assert (c.top_ids == top.indices.numpy()).mean() > 0.9  # equal but for ties


def test_every_document_has_conversations_without_a_writer(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    store, progress = new_store(), list[tuple[int, int]]()
    conversations = synthesize(model, strange(), store, progress=lambda *n: progress.append(n), **ALONE)
    assert set(conversations.by_document) == set(STRANGE) and writer.calls == 0
    assert {c.kind for items in conversations.by_document.values() for c in items} == {KIND}
    assert progress[-1] == (len(conversations),) * 2 and not (store.folder / "without_conversations.json").exists()
    assert initialize_cartridges(model, store, conversations)
    assert Trainer(model, store, conversations, steps=3, targets=2, per_target=2).run()


def test_questions_come_beside_reconstruction(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """The questions are those that are asked without it, and an exhausted or strange document has its text."""
    settings = SMALL | {"reconstruction": "on"}
    blank = Document("zero", "Zero", "* * *")
    documents = Collection("some", (*wells(10, 8).documents, blank))
    both = synthesize(model, documents, new_store(), **settings)
    written = synthesize(model, documents, new_store("off"), **SMALL)
    alone = synthesize(model, documents, new_store("alone"), **ALONE)
    assert set(both.by_document) == {"alder", "birch", "zero"} and set(written.by_document) == {"alder", "birch"}
    rows = [row for row in plain(both) if row[2] != KIND]
    assert rows == plain(written) and [row for row in plain(both) if row[2] == KIND] == plain(alone)
    assert len(alone) < len(written) / 2


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    new_store: Callable[..., Store],
    model: FrozenModel,
    writer: Writer,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    monkeypatch.setattr(selfstudy, "PASSAGES_PER_UNIT", 10)
    settings, documents = SMALL | {"reconstruction": "on"}, wells(10, 8)
    whole, parts, seen = new_store("whole"), new_store("parts"), 0
    synthesize(model, documents, whole, **settings)

    def progress(*_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(model, documents, parts, progress=progress, **settings)
    assert len(list(parts.conversations.glob("unit-*"))) == stop
    synthesize(model, documents, parts, **settings)
    files = [{f.name: f.read_bytes() for f in s.conversations.glob("unit-*")} for s in (whole, parts)]
    assert files[0] == files[1] and len(files[0]) > 5


def test_where_nothing_can_be_written_the_advice_works(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """In the same store, whose finished units stay as they are."""
    writer.question = lambda prompt, seed: Generation(model.encode(" is it"), finished=True)  # type: ignore[method-assign]
    store, settings = new_store(), {"chunk_tokens": 120, "top_k": 5}
    with pytest.raises(RunError, match=r"use a larger model, or go on without a writer: --writer none \(from recon"):
        synthesize(model, wells(10), store, **settings)
    before = {file: file.read_bytes() for file in store.conversations.glob("unit-*")}
    conversations = synthesize(model, wells(10), store, **ALONE)
    assert {c.kind for c in conversations.by_document["alder"]} == {KIND}
    assert {file: file.read_bytes() for file in store.conversations.glob("unit-*")} == before and len(before) > 1
    assert len(synthesize(model, wells(10), store, keep_going=True, **settings)) == len(conversations)  # exhausted


def test_without_a_writer_what_was_written_stays(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """Also where the number of conversations is given."""
    store, settings = new_store(), {"chunk_tokens": 120, "top_k": 5, "conversations": 60}
    before = synthesize(model, wells(10), store, **settings)
    assert {c.kind for c in chain(*before.by_document.values())} > {KIND}
    assert plain(synthesize(model, wells(10), store, **settings, writer="none")) == plain(before)


def test_stores_of_earlier_versions_go_on_without(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    store, on = new_store(), SMALL | {"reconstruction": "on"}
    synthesize(model, wells(10), store, **(SMALL | {"conversations": 10}))
    assert "reconstruction" not in recorded_settings(store.conversations)
    more = synthesize(model, wells(10), store, **on)
    assert plain(more) == plain(synthesize(model, wells(10), new_store("off"), **SMALL))
    with pytest.raises(ConfigError, match=r"--writer none: .* was begun without reconstruction; give a new --store"):
        synthesize(model, wells(10), store, **ALONE)
    with_it = new_store("with")
    synthesize(model, wells(10), with_it, **on)
    with pytest.raises(ConfigError, match="was made with another"):
        synthesize(model, wells(10), with_it, **SMALL)


def test_a_trained_store_keeps_what_it_was_trained_on(
    new_store: Callable[..., Store], model: FrozenModel, writer: Writer
) -> None:
    """Also when a writer, which would ask more, is allowed again."""
    store, settings = new_store(), {"chunk_tokens": 120, "top_k": 5}
    before = synthesize(model, wells(3), store, **ALONE)
    assert Trainer(model, store, before, steps=1, targets=1, per_target=1).run()
    assert plain(synthesize(model, wells(3), store, **settings)) == plain(before)
    with pytest.raises(ConfigError, match=r"is trained on .* conversations; ask for no more"):
        synthesize(model, wells(3), store, conversations=5000, **settings)


def test_options_that_leave_nothing_are_refused(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"writer": "none", "reconstruction": "off"}, "leaves no conversations"),
        ({"writer": "none", "writer_url": "http://localhost:1/v1"}, "leave out --writer none"),
        ({"reconstruction": "maybe"}, "choose on or off"),
    ):
        with pytest.raises(ConfigError, match=message):
            SelfStudy(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the model reads 1024 tokens, too few"):
        passages(model, wells(2), SelfStudy(answer_tokens=980))


def test_a_model_s_rows_do_not_depend_on_the_batch(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Passage("a", f"Text {i % 2}. It is so.", f"Text {i}:", "It is so.") for i in range(9)]
    together = reconstruct(model, asked, 5)
    monkeypatch.setattr(reconstruction, "ROWS", 2)
    for one, other in zip(together, reconstruct(model, asked, 5), strict=True):
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=1e-4)
        assert one.answer.tolist() == other.answer.tolist()


def test_units_are_read_as_others(new_store: Callable[..., Store], model: FrozenModel) -> None:
    store = new_store()
    made = synthesize(model, wells(4), store, **ALONE)
    assert plain(Conversations.load(store.conversations)) == plain(made)
