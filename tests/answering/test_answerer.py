"""Answers from a store: several questions at once, and documents whose cartridge is still missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TEXTS
from helpers_commands import TRAIN, call
from helpers_store import make_store
from helpers_writer import prepare

from cas import train
from cas.answering import answerer as answer
from cas.data.collection import Collection, Document
from cas.errors import CollectionError, EmbedderError, StoreMismatch, UserError
from cas.model.frozen import FrozenModel
from cas.query import ids_in
from cas.store.changes import Change
from cas.store.index import load_embedder, open_index
from cas.store.store import Store
from retrieval import EmbedderUnavailable, HashEmbedder


def test_questions_asked_together_are_answered_as_one_by_one(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    store = Store.open("runs/manuals")
    answerer = answer.Answerer(manuals, store, HashEmbedder(), keep=3)
    questions = [TEXTS[name][:60] + "?" for name in ("pump", "tide", "lamp", "ferry")]
    together = answerer.ask_many(questions, k=2, max_new_tokens=8)
    assert len({tuple(sorted(c.id for c in a.cartridges)) for a in together}) > 1
    for question, mine in zip(questions, together, strict=True):
        alone = answerer.ask(question, k=2, max_new_tokens=8)
        for name in ("question", "answer", "tokens", "bytes"):
            assert getattr(mine, name) == getattr(alone, name)
        for a, b in zip(mine.cartridges, alone.cartridges, strict=True):
            assert (a.id, a.title) == (b.id, b.title)
            assert (a.score, a.attention) == pytest.approx((b.score, b.attention), abs=1e-5)
        assert all(seconds >= 0 for seconds in mine.timings.values()) and mine.timings.keys() == alone.timings.keys()
    for wrong, k in (([*questions, " "], 2), (questions, 0)):
        with pytest.raises(UserError, match=r"empty|at least one"):
            answerer.ask_many(wrong, k=k)
    store.close()


def test_threads_share_an_answerer(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    """Each gets what it would get alone, with few cartridges kept and the index opened by whoever comes first."""
    questions = [text[:40] + "?" for text in list(TEXTS.values())[:3]]
    with make_store(tmp_path / "s", tiny("llama"), collection) as store:
        alone = answer.Answerer(tiny("llama"), store, HashEmbedder())
        truth = [alone.ask(question, k=2, max_new_tokens=8).text for question in questions]
        shared = answer.Answerer(tiny("llama"), store, HashEmbedder(), keep=2)

        def ask(start: int) -> bool:
            order = [(start + n) % len(questions) for n in range(len(questions))]
            one = [shared.ask(questions[n], k=2, max_new_tokens=8).text == truth[n] for n in order]
            many = [a.text for a in shared.ask_many([questions[n] for n in order], k=2, max_new_tokens=8)]
            return all(one) and many == [truth[n] for n in order]

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(ask, range(2)))


def test_documents_without_cartridge_are_not_retrieved(
    tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    model = tiny("llama")
    with make_store(tmp_path / "s", model, collection) as store:
        text = "Which bell is rung in fog? The brass bell is rung in fog."
        store.add_documents(Collection("more", (Document("bell", "Bell", text),)), model.count_tokens)
        answerer = answer.Answerer(model, store, HashEmbedder())
        retrieved = {c.id for c in answerer.ask("Which bell is rung in fog?", k=9, max_new_tokens=2).cartridges}
        assert retrieved == set(TEXTS)
        with pytest.raises(CollectionError, match="'bell' has no cartridge yet; go on with its training"):
            answerer.ask("Which bell?", documents=["bell"])


def test_a_long_lived_answerer_follows_its_store(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees what another process added, changed, renamed and dropped; while nothing happens it reads nothing again."""
    assert call(train.main, *TRAIN)[0] == 0
    with Store.open("runs/manuals") as store:
        answerer = answer.Answerer(manuals, store, HashEmbedder())

        def found(question: str) -> set[str]:
            one, many = (
                answerer.ask(question, k=9, max_new_tokens=2),
                answerer.ask_many([question], k=9, max_new_tokens=2),
            )
            assert [c.id for c in one.cartridges] == [c.id for c in many[0].cartridges]
            assert one.cartridges[0].title and set(answerer.index.document_ids) == {c.id for c in one.cartridges}
            return {c.id for c in one.cartridges}

        def trained(*words: str) -> None:
            code = "import sys, test_answerer; sys.exit(test_answerer.train_elsewhere(sys.argv[1:]))"
            done = subprocess.run(
                [sys.executable, "-c", code, *TRAIN, *words],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

        assert found("Which valve?") == {"lamp", "pump", "tide", "valve"}
        with monkeypatch.context() as patch:
            patch.setattr(Store, "texts", None)
            assert found("Which valve?") == {"lamp", "pump", "tide", "valve"}
        Path("manuals/crane.md").write_text(f"# The crane\n\n{TEXTS['crane']}\n")
        Path("manuals/pump.md").rename("manuals/pumps.md")
        Path("manuals/valve.txt").unlink()
        trained("--prune")
        assert found("Which valve?") == {"crane", "lamp", "pumps", "tide"}
        with pytest.raises(CollectionError, match="has no cartridge 'valve'"):
            answerer.ask("Which valve?", documents=["valve"])


def train_elsewhere(words: list[str]) -> int:
    """The command in a process of its own, as in the fixture ``manuals``."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        return train.main(words)


def test_a_document_that_is_dropped_between_ranking_and_loading(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    with Store.open("runs/manuals", write=True) as store:
        answerer = answer.Answerer(manuals, store, HashEmbedder())
        retrieve = answerer.retrieve

        def dropping(questions: list[str], k: int) -> object:
            ranked = retrieve(questions, k)
            if "valve" in store.rows():
                with store.training():
                    store.change(Change(drop=("valve",)))
            return ranked

        monkeypatch.setattr(answerer, "retrieve", dropping)
        assert {c.id for c in answerer.ask("Which valve?", k=9, max_new_tokens=2).cartridges} == {
            "lamp",
            "pump",
            "tide",
        }


def test_an_index_of_another_embedder_is_neither_used_nor_overwritten(
    tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    with make_store(tmp_path / "s", tiny("llama"), collection) as store:
        index = open_index(store, HashEmbedder(64))
        before = (store.folder / "index" / "index.faiss").read_bytes()
        with pytest.raises(
            EmbedderError, match=r"with the embedder hash-64 \(64\), not hash-32 \(32\): give that"
        ) as error:
            answer.Answerer(tiny("llama"), store, HashEmbedder(32)).ask("Which valve?")
        assert "\n" not in str(error.value)
        assert (store.folder / "index" / "index.faiss").read_bytes() == before
        progress: list[tuple[int, int]] = []
        again = open_index(store, HashEmbedder(32), lambda *done: progress.append(done), rebuild=True)
        assert again.document_ids == index.document_ids and progress == [(len(again), len(again))]
        assert open_index(store, HashEmbedder(32)).vectors.tobytes() == again.vectors.tobytes()
        answerer = answer.Answerer(tiny("llama"), store, HashEmbedder(32))
        first = answerer.retrieve(["Which valve?"], 2)
        assert (store.folder / "index" / "words").is_dir()  # BM25 is kept beside the vectors
        assert answer.Answerer(tiny("llama"), store, HashEmbedder(32)).retrieve(["Which valve?"], 2) == first


def test_another_model_is_refused(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    refused = pytest.raises(StoreMismatch, match="open it with the model it was made with")
    with make_store(tmp_path / "s", tiny("llama"), collection) as store, refused:
        answer.Answerer(tiny("llama", seed=1), store)


def test_an_embedder_that_is_not_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> HashEmbedder:
        raise EmbedderUnavailable(f"{name}: no such embedder")

    monkeypatch.setattr("retrieval.SentenceEmbedder", missing)
    with pytest.raises(EmbedderError, match=r"^none/such: no such embedder$") as caught:
        load_embedder("none/such")
    assert caught.value.exit_status == 2


def test_what_does_not_fit_into_the_window_is_refused_in_one_line(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next question is answered; an answer of any length asked for ends at the model's last position."""
    assert call(train.main, *TRAIN)[0] == 0
    with Store.open("runs/manuals") as store:
        answerer = answer.Answerer(manuals, store, HashEmbedder())
        window = manuals.geometry.max_positions
        for refused in (
            lambda: answerer.ask("valve " * window, 1),
            lambda: answerer.ask_many(["Which valve?", "valve " * window], 1),
        ):
            with pytest.raises(
                UserError, match=rf"the question takes \d+ tokens and the loaded cartridges leave room for .* {window}"
            ):
                refused()
        monkeypatch.setattr(manuals, "template", replace(manuals.template, stop_ids=frozenset()))
        found = answerer.ask("Which valve?", 1, max_new_tokens=10_000_000)
        held = store.layout.token_start([1]) + found.tokens["prompt"] + found.tokens["answer"]
        assert held == window
        [many] = answerer.ask_many(["Which valve?"], 1, max_new_tokens=10_000_000)
        assert many.answer == found.answer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("pump,valve", ["pump", "valve"]),
        (" pump , valve ,", ["pump", "valve"]),
        ("Report, 2023", ["Report, 2023"]),
        ("pump,Report, 2023,valve", ["pump", "Report, 2023", "valve"]),
        ("Report", ["Report"]),
        ("Report, 2024", ["Report", "2024"]),
        (" , ", []),
    ],
)
def test_ids_with_commas(text: str, ids: list[str]) -> None:
    assert ids_in(text, {"pump", "valve", "Report, 2023", "2023"}) == ids
