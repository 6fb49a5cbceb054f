"""What happens to a folder beside editing: other encodings, file systems that are not there, another folder of its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_commands import TRAIN, call
from test_rounds import PRUNE, interrupted, state

from cas import train
from cas.model.frozen import FrozenModel
from cas.training.trainer import Trainer

TEXT = "# The pump\n\nDie Prüfung der Pumpe beginnt bei 5 °C, größer als zuvor, über der Brücke.\n"


def test_a_page_that_is_saved_in_another_encoding_is_the_same_page(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path("manuals/pump.md")
    page.write_text(TEXT)
    assert call(train.main, *TRAIN)[0] == 0
    before = state()
    monkeypatch.setattr(Trainer, "train_step", None)
    for data, said in (
        (TEXT.encode("latin-1"), "read as cp1252: 1 (pump.md)"),
        (TEXT.encode("utf-16"), "read as utf-16: 1 (pump.md)"),
        (TEXT.replace("\n", "\r\n").encode("utf-8-sig"), ""),
    ):
        page.write_bytes(data)
        status, _, err = call(train.main, *PRUNE)
        assert status == 0 and said in err and state() == before, (said, err)


def test_a_folder_that_is_empty_or_gone_changes_nothing(manuals: FrozenModel) -> None:
    """As one whose file system is not mounted."""
    assert call(train.main, *TRAIN)[0] == 0
    before, folder = state(), Path("manuals")
    folder.rename("away")
    for words in (TRAIN, PRUNE):
        status, _, err = call(train.main, *words)
        assert status == 2 and err.startswith("cas: manuals: no folder") and err.count("\n") == 1
    folder.mkdir()
    for words in (TRAIN, PRUNE):
        status, _, err = call(train.main, *words)
        assert status == 2 and err.startswith("cas: manuals: no document to read") and err.count("\n") == 1
    assert state() == before
    folder.rmdir()
    Path("away").rename(folder)
    assert call(train.main, *TRAIN)[0] == 0 and state() == before


def test_another_folder_of_the_same_name_is_not_taken_for_an_interrupted_training(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither trains the old one to its end with exit status 0, nor loses what it has learned."""
    assert call(train.main, *TRAIN, "--store", "runs/whole")[0] == 0
    with interrupted(monkeypatch, Trainer):
        assert call(train.main, *TRAIN)[0] == 130
    before = state()
    other = Path("elsewhere/manuals")
    other.mkdir(parents=True)
    (other / "crane.md").write_text("# The crane\n\nAnother project's crane lifts two tonnes.\n")
    words = [w if w != "manuals" else str(other) for w in TRAIN]
    status, out, err = call(train.main, *words, "--store", "runs/manuals")
    assert status == 2 and "was trained with another --collection: 4 of its documents are missing" in err, out
    assert "trained" not in out and state() == before
    shutil.rmtree(other.parent)
    assert call(train.main, *TRAIN)[0] == 0 and state() == state(Path("runs/whole"))
