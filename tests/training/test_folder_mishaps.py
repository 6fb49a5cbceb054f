"""What happens to a folder beside editing: other encodings, file systems that are not there, another folder of its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers_commands import TRAIN, call
from test_rounds import PRUNE, interrupted, state

from cas import train
from cas.model.frozen import FrozenModel
from cas.store.store import Store
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


def test_a_path_that_leads_nowhere_is_no_missing_document(manuals: FrozenModel) -> None:
    """Such as a link to a disk that is not mounted: ``--prune`` drops what is gone, not what cannot be read now."""
    below = Path("manuals/more")
    below.mkdir()
    (below / "winch.md").write_text("# The winch\n\nThe winch lifts two tonnes over the quay.\n")
    assert call(train.main, *TRAIN)[0] == 0
    before = state()
    Path("manuals/pump.md").unlink()
    Path("manuals/pump.md").symlink_to("/nowhere/pump.md")
    valve = Path("manuals/lamp.md").read_bytes()
    Path("manuals/lamp.md").unlink()
    os.mkfifo("manuals/lamp.md")
    below.rename("more")
    below.symlink_to(Path("more").resolve())
    status, out, err = call(train.main, *PRUNE)
    assert status == 0 and "not read    3 (" in out and "gone" not in out + err and state() == before
    Path("manuals/lamp.md").unlink()
    Path("manuals/lamp.md").write_bytes(valve)
    status, out, _ = call(train.main, *PRUNE)
    assert status == 0 and "not read    2 (" in out and state() == before


def test_unreadable_files_of_the_same_names_are_not_the_collection(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before, other = state(), Path("elsewhere")
    other.mkdir()
    for page in Path("manuals").glob("*.md"):
        (other / page.name).write_bytes(b"")
    (other / "crane.md").write_text("# The crane\n\nAnother project's crane lifts two tonnes.\n")
    words = [w if w != "manuals" else str(other) for w in TRAIN]
    status, _, err = call(train.main, *words, "--store", "runs/manuals")
    assert status == 2 and "another --collection" in err and str(Path("manuals").resolve()) in err and state() == before
    assert call(train.main, *TRAIN)[0] == 0 and state() == before


@pytest.mark.parametrize(
    "texts", [["The office is closed on Fridays."], ["The office is closed on Fridays.", "🙂🙂 🎉"]]
)
def test_a_sentence_or_no_word_at_all_is_trained_as_far_as_it_goes(manuals: FrozenModel, texts: list[str]) -> None:
    folder = Path("office")
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    words = [w if w != "manuals" else "office" for w in TRAIN]
    status, _, err = call(train.main, *words, "--store", "runs/manuals")
    assert status == 0, err
    with Store.open("runs/manuals") as store:
        assert set(store.rows()) == {str(number) for number in range(len(texts))}
    before = state()
    status, out, err = call(train.main, *words, "--store", "runs/manuals")
    assert status == 0 and state() == before and "not trained yet" not in out + err
