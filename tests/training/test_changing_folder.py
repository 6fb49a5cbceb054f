"""Any sequence of changes to a folder, and of interrupted trainings: the next command brings the store to what the folder
holds, loses nothing that was not pruned, and leaves every other cartridge as it is, bit for bit."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers_store import contents
from helpers_writer import prepare
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_pipeline import Recorder

from cas.options import TrainConfig
from cas.selfstudy.conversations import read_unit
from cas.store.index import open_index
from cas.store.store import Store
from cas.training import erase, pipeline, rounds
from retrieval import HashEmbedder

NAMES = ("alder", "birch", "cedar/one", "cedar/two")
TEXTS = tuple(f"The {word} stands at the {place}. It was built by {who} and it is {color}." for word, place, who, color in (
    ("mill", "river", "Ann", "red"), ("barn", "road", "Bert", "blue"), ("tower", "hill", "Carl", "white"),
    ("bridge", "ford", "Dora", "gray"), ("school", "church", "Emil", "yellow"), ("kiln", "wood", "Frida", "brown"),
))  # fmt: skip
PLACES = (
    "self-study", "unit", "initialize", "train_step", "checkpoint", "before commit", "after commit", "before change",
    "after change", "erase", "index",
)  # fmt: skip


class Killed(BaseException):
    """In place of a signal."""


class Folder(RuleBasedStateMachine):
    """A folder ``docs`` with a few files, and the store that is trained on it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.base = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        prepare(self.patch)
        self.docs = self.base / "docs"
        self.docs.mkdir()
        self.settled: dict[str, Any] = {}  # {text: tensors} of what was trained, when last all was done
        self.names: dict[str, str] = {}  # {text: id} of the same
        self.overwritten: set[str] = set()  # texts of documents whose file holds, or held, another one

    def teardown(self) -> None:
        self.stack.close()

    @initialize(texts=st.permutations(range(len(TEXTS))))
    def first(self, texts: list[int]) -> None:
        for name, text in zip(NAMES[:3], texts):
            self.write(name, TEXTS[text])

    # -- the folder -------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.docs / f"{name}.md"

    def write(self, name: str, text: str) -> None:
        self.overwrite(name, text)
        self.path(name).parent.mkdir(exist_ok=True)
        self.path(name).write_text(text)

    def overwrite(self, name: str, text: str) -> None:
        """A file gets another text."""
        lost = {known for known, place in self.names.items() if place == name}
        if self.path(name).is_file():
            lost.add(readable(self.path(name)))
        self.overwritten |= lost - {text}

    def held(self) -> dict[str, str]:
        """{id: text} of the folder; of equal texts the first."""
        found: dict[str, str] = {}
        for name in NAMES:
            if self.path(name).is_file() and (text := readable(self.path(name))) and text not in found.values():
                found[name] = text
        return found

    @rule(name=st.sampled_from(NAMES), text=st.sampled_from(TEXTS))
    def add_or_edit(self, name: str, text: str) -> None:
        self.write(name, text)

    @precondition(lambda self: len(self.held()) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.path(data.draw(st.sampled_from(sorted(self.held())))).unlink()

    @rule(data=st.data(), to=st.sampled_from(NAMES))
    def rename(self, data: st.DataObject, to: str) -> None:
        self.path(to).parent.mkdir(exist_ok=True)
        name = data.draw(st.sampled_from(sorted(self.held())))
        text = self.held()[name]
        self.overwrite(to, text)
        if text in self.names:
            self.names[text] = to
        self.path(name).replace(self.path(to))

    @precondition(lambda self: len(self.held()) > 1)
    @rule(data=st.data())
    def make_unreadable(self, data: st.DataObject) -> None:
        self.path(data.draw(st.sampled_from(sorted(self.held())))).write_bytes(b"\0\1\2\3" * 20)

    @precondition(lambda self: (self.docs / "cedar").is_dir() and any("/" not in name for name in self.held()))
    @rule()
    def hide(self) -> None:
        """As a folder that is not mounted; one that is hidden already is overwritten."""
        shutil.rmtree(self.base / "hidden", ignore_errors=True)
        (self.docs / "cedar").rename(self.base / "hidden")

    @precondition(lambda self: (self.base / "hidden").is_dir() and not (self.docs / "cedar").is_dir())
    @rule()
    def show(self) -> None:
        (self.base / "hidden").rename(self.docs / "cedar")

    # -- the command ------------------------------------------------------------------------------------------------

    def config(self, prune: bool = False) -> TrainConfig:
        return TrainConfig(
            collection=str(self.docs), store=str(self.base / "store"), model="tiny", tokens=8, conversations=6, steps=6,
            pool=2, targets=1, per_target=2, rotate_every=2, checkpoint_every=2, guests=1, isolation=0.5, prune=prune,
            max_distractors=2, questions_per_call=2, calls_per_unit=1, reconstruction="off", effort="quick", seed=1,
        )  # fmt: skip

    @rule(place=st.sampled_from(PLACES), after=st.integers(0, 2), prune=st.booleans())
    def interrupted(self, place: str, after: int, prune: bool) -> None:
        """The command, killed when it comes to a place, or not at all."""
        before = self.held()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, place, after)
            try:
                pipeline.run(self.config(prune), Recorder())
            except Killed:
                self.not_pruned_twice(before, prune)
                return
        self.check(prune)

    def not_pruned_twice(self, before: dict[str, str], prune: bool) -> None:
        if prune:  # it may have got to that or not
            self.settled = {text: tensors for text, tensors in self.settled.items() if text in before.values()}

    @rule(prune=st.booleans())
    def command(self, prune: bool) -> None:
        pipeline.run(self.config(prune), Recorder())
        self.check(prune)

    @invariant()
    def readers_find_a_whole_store(self) -> None:
        """Whatever was interrupted: what answers is whole, and nothing that was trained is gone."""
        if not Store.exists(self.base / "store"):
            return
        with Store.open(self.base / "store") as store:
            assert store.verify() == []
            texts = {text: name for name, _, text in store.texts()}
            for text, kv in self.settled.items():
                if text in texts:
                    assert store.cartridge(texts[text]).numpy().tobytes() == kv
            for name in store.answering():
                assert store.cartridge(name).shape[3] == 8

    def check(self, prune: bool) -> None:
        """After a command that was not interrupted."""
        held = self.held()
        with Store.open(self.base / "store", write=True) as store:
            rows = contents(store)  # and that nothing else is stored: no old versions, no withdrawn texts
            texts = {name: text for name, _, text in store.texts()}
            assert {name: texts.get(name) for name in held} == held
            left = set(rows) - set(held)
            unreadable = {name for name in NAMES if self.path(name).is_file() and name not in held}
            assert not prune or left <= unreadable
            assert all(row.initialized for row, _ in rows.values())
            assert rounds.finished(store) or not any(row.round == store.round for row, _ in rows.values())
            now = {texts[name]: tensors["kv"] for name, (_, tensors) in rows.items()}
            for text, kv in self.settled.items():
                if text in now:
                    assert now[text] == kv
                else:  # it was pruned, or another text came in its place
                    assert prune or text in self.overwritten, (text, texts)
            index = open_index(store, HashEmbedder())
            assert set(index.document_ids) == set(rows) and not store.pending()
            if prune:
                about = {c.document for file in store.folder.glob("conversations*/unit-*") for c in read_unit(file)[0]}
                assert about <= set(rows)
            self.overwritten = set()
            self.settled, self.names = now, {text: name for name, text in texts.items()}


def readable(path: Path) -> str:
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode()


def kill_at(patch: pytest.MonkeyPatch, place: str, after: int) -> None:
    """Let the command die when it has come to a place ``after`` times."""
    from cas.selfstudy import synthesize
    from cas.training import initialization, trainer

    where: dict[str, tuple[Any, str, bool]] = {
        "self-study": (synthesize.Teacher, "converse", False),
        "unit": (synthesize, "write_unit", True),
        "initialize": (initialization, "matched", False),
        "train_step": (trainer.Trainer, "train_step", True),
        "checkpoint": (trainer.Trainer, "_checkpoint", False),
        "before commit": (Store, "commit", False),
        "after commit": (Store, "commit", True),
        "before change": (Store, "change", False),
        "after change": (Store, "change", True),
        "erase": (erase, "_unit", True),
        "index": (pipeline, "index", False),
    }
    owner, name, behind = where[place]
    work, count = getattr(owner, name), 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > after and not behind:
            raise Killed
        done = work(*arguments, **options)
        if count > after:
            raise Killed
        return done

    patch.setattr(owner, name, watched)


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Folder,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_few_sequences() -> None:
    run(examples=8, steps=10)


@pytest.mark.slow
def test_many_sequences() -> None:
    run(examples=60, steps=25)
