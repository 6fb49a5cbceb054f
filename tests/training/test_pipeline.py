"""The steps of a training, run by a view that is not a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_commands import TRAIN
from helpers_store import contents

from cas.errors import StoreMismatch
from cas.model.frozen import FrozenModel
from cas.options import TrainConfig, parse
from cas.store.store import Store
from cas.training import pipeline

FOLDER = Path("runs/manuals")


class Recorder:
    """A view that records lines and titles, and stops the run when asked for the time after ``stop_after``."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.titles: list[str] = []
        self.shown: dict[str, list[int]] = {}  # under a title, how much is done
        self.asked, self.stop_after = 0, stop_after

    def line(self, text: str) -> None:
        self.lines.append(text)

    warn = line

    def show(self, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        self.shown.setdefault(self.titles[-1] if self.titles else "", []).append(done)

    say = line

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Recorder]:
        self.titles.append(title)
        yield self

    @contextlib.contextmanager
    def waiting(self, title: str) -> Iterator[Recorder]:
        yield self

    @contextlib.contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        yield self.stop

    def stop(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked > self.stop_after


def configured(*words: str) -> TrainConfig:
    return parse(TrainConfig, "train", [*TRAIN, *words])


def files() -> dict[str, bytes]:
    """Everything in the store's folder, but for the file in which LMDB registers readers."""
    return {str(f): f.read_bytes() for f in FOLDER.rglob("*") if f.is_file() and not f.name.endswith("-lock")}


def test_one_run_opens_its_store_once(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    store_open = Store.open

    def counted(folder: Path, **options: Any) -> Store:
        opened.append(options)
        return store_open(folder, **options)

    pipeline.run(configured(), Recorder())
    monkeypatch.setattr(Store, "open", counted)
    pipeline.run(configured(), Recorder())
    assert opened == [{"write": True}]
    before = files()
    pipeline.run(configured("--dry-run"), Recorder())
    assert opened[1:] == [{"write": False}] and files() == before


def test_a_refused_run_writes_nothing(manuals: FrozenModel) -> None:
    pipeline.run(configured(), Recorder())
    before = files()
    with pytest.raises(StoreMismatch, match=r"was made with tokens 16 \(now 32\)"):
        pipeline.run(configured("--tokens", "32"), Recorder())
    assert files() == before


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_is_not(manuals: FrozenModel) -> None:
    """Every time a little later: in self-study, in initialization and in training."""
    whole = Recorder()
    pipeline.run(configured(), whole)
    assert whole.titles == ["self-study", "initialize", "training", "index"]
    assert whole.shown["initialize"][0] == 0  # the first one may take minutes
    assert whole.shown[""] == [0, 1, 2, 3, 4]  # files of the folder, before the plan
    with Store.open(FOLDER) as store:
        expected = contents(store), store.run_state()
    cut = configured("--store", "runs/cut")
    stopped_in = set()
    for stop_after in range(whole.asked):
        view = Recorder(stop_after)
        with contextlib.suppress(pipeline.Stopped):
            pipeline.run(cut, view)
            break
        stopped_in.add(view.titles[-1])
    assert stopped_in == {"self-study", "initialize", "training"}
    with Store.open("runs/cut") as store:
        assert (contents(store), store.run_state()) == expected
