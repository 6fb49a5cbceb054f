"""A collection that changes: exactly what is new or changed is trained, what is missing stays until it is pruned, all
else stays bit for bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS
from helpers_commands import TRAIN, call
from helpers_store import contents
from safetensors import safe_open

from cas import __main__ as tool
from cas import console, query, train
from cas.data.collection import Collection
from cas.errors import CollectionError, ConfigError
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import read_unit
from cas.selfstudy.synthesize import Teacher
from cas.store.store import Store
from cas.training import rounds
from cas.training.trainer import Trainer
from retrieval import ChunkIndex, HashEmbedder

FOLDER = Path("runs/manuals")
PRUNE = [*TRAIN, "--prune"]


def change() -> None:
    """One document new, one changed, one gone; the lamp and the pump stay."""
    (Path("manuals") / "crane.md").write_text(f"# The crane\n\n{TEXTS['crane']}\n")
    (Path("manuals") / "tide.md").write_text(f"# The tide\n\n{TEXTS['ferry']}\n")
    (Path("manuals") / "valve.txt").unlink()


def state(folder: Path = FOLDER) -> Any:
    store = Store.open(folder)
    found = contents(store), store.run_state(), store.round
    store.close()
    return found


def test_what_changed_is_trained_and_nothing_else(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()[0]
    change()
    status, out, err = call(train.main, *PRUNE)
    assert status == 0, err
    assert "1 new, 1 changed, 1 gone; the other 2 cartridges stay as they are" in out and "documents   2" in out
    assert "2 frozen distractors" in out  # the lamp and the pump distract
    after, run, number = state()
    assert set(after) == {"crane", "lamp", "pump", "tide"} and number == 1
    assert all(after[name] == before[name] for name in ("lamp", "pump"))
    assert all(after[name][0].steps > 0 and after[name][0].round == 1 for name in ("crane", "tide"))
    assert after["tide"][0].hash != before["tide"][0].hash
    store = Store.open(FOLDER)
    assert store.verify() == [] and run["step"] == 12
    with pytest.raises(CollectionError, match="no cartridge 'valve'"):
        store.cartridge("valve")
    index = ChunkIndex.load(FOLDER / "index", HashEmbedder())
    assert set(index.document_ids) == set(after)
    assert {t for line in store.metrics.read_text().splitlines() for t in json.loads(line)["targets"]} == {
        "crane",
        "tide",
    }
    store.close()
    # The same command again has nothing to do; a question finds what is there now.
    status, out, err = call(train.main, *TRAIN)
    assert status == 0 and state() == (after, run, number) and "stay as they are" not in out
    assert call(query.main, "Which?", "--documents", "crane,lamp", "--max-new-tokens", "3")[0] == 0
    assert call(query.main, "Which?", "--documents", "valve")[0] == 2


def test_earlier_cartridges_distract_and_learn_nothing(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    change()
    seen: set[str] = set()
    step = Trainer.train_step

    def watched(self: Trainer, number: int, work: Any) -> Any:
        assert {*self.manager.trainees} <= {"crane", "tide"} and {*work.targets} <= {"crane", "tide"}
        seen.update(name for example in work.examples for name in example.visible)
        return step(self, number, work)

    monkeypatch.setattr(Trainer, "train_step", watched)
    assert call(train.main, *TRAIN)[0] == 0
    assert seen == {"crane", "tide", "lamp", "pump", "valve"}  # the valve is missing, which changes nothing


def test_what_is_missing_stays_until_it_is_pruned(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()
    (Path("manuals") / "valve.txt").unlink()
    for words in ((), ("--dry-run",), ("--dry-run", "--prune")):
        status, out, err = call(train.main, *TRAIN, *words)
        assert status == 0 and state() == before, err
        assert ("missing     1 (valve): cartridges stay; --prune drops them" in out) == ("--prune" not in words)
        assert ("pruned      1 (valve)" in out) == ("--prune" in words)
    assert call(query.main, "Which?", "--documents", "valve", "--max-new-tokens", "3")[0] == 0
    for _ in range(2):
        status, _, err = call(train.main, *PRUNE)
        assert status == 0, err
        assert state()[0] == {k: v for k, v in before[0].items() if k != "valve"}
    change_back = Path("manuals") / "valve.txt"
    change_back.write_text(TEXTS["ferry"])
    assert call(train.main, *TRAIN)[0] == 0 and set(state()[0]) == set(before[0])


def test_what_cannot_be_read_stays_even_if_pruned(manuals: FrozenModel) -> None:
    Path("manuals/more").mkdir()
    Path("manuals/more/crane.md").write_text(TEXTS["crane"])
    assert call(train.main, *TRAIN)[0] == 0
    before = state()
    Path("manuals/valve.txt").write_bytes(b"\0\1\2\3" * 50)
    Path("manuals/tide.md").write_text(" ")
    Path("manuals/more").rename("elsewhere")
    link = Path("manuals/more")
    link.symlink_to(Path("elsewhere").resolve())  # a folder that is not entered
    for words in (TRAIN, PRUNE):
        status, out, err = call(train.main, *words)
        assert status == 0 and state() == before, err
        assert "not read    3 (more/crane, tide, valve): cartridges stay" in out and "missing" not in out
    link.unlink()
    status, out, err = call(train.main, *PRUNE, "--exclude", "nothing")
    assert status == 2 and state() == before
    status, out, err = call(train.main, *TRAIN)
    assert status == 0 and state() == before, err
    assert "not read    2 (tide, valve): cartridges stay" in out and "missing     1 (more/crane)" in out
    assert call(train.main, *PRUNE)[0] == 0
    assert state()[0] == {k: v for k, v in before[0].items() if k != "more/crane"}


def test_what_is_pruned_is_nowhere(manuals: FrozenModel) -> None:
    Path("manuals/secret.md").write_text("# The zanzibar vault\n\nThe vault opens with a brass zanzibar key at night.")
    assert call(train.main, *TRAIN)[0] == 0
    assert call(query.main, "Which zanzibar?", "--max-new-tokens", "3")[0] == 0  # makes the index of words
    assert _files_with(b"secret", "secret") and _files_with(b"zanzibar", "zanzibar")
    Path("manuals/secret.md").unlink()
    assert call(train.main, *PRUNE)[0] == 0
    status, out, _ = call(tool.main, "compact", str(FOLDER))
    assert status == 0 and "runs/manuals: " in out
    assert _files_with(b"secret", "secret") == _files_with(b"zanzibar", "zanzibar") == []
    with Store.open(FOLDER) as store:
        assert store.verify() == [] and set(store.rows()) == {"lamp", "pump", "tide", "valve"}
    assert call(query.main, "Which zanzibar?", "--max-new-tokens", "3")[0] == 0
    assert call(train.main, *TRAIN)[0] == 0


def _files_with(word: bytes, text: str) -> list[str]:
    """Files of the store with a word, as bytes or in a table of conversations."""
    found = []
    for file in sorted(FOLDER.rglob("*")):
        if file.suffix == ".parquet":
            items = read_unit(file)[0]
            hit = any(text in c.document or text in c.question for c in items)
        else:
            hit = file.is_file() and word in file.read_bytes()
        found += [str(file)] * hit
    return found


def test_a_changed_document_answers_as_before_until_its_round_has_ended(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    with Store.open(FOLDER) as store:
        kv, texts = store.cartridge("tide"), store.texts()
    (Path("manuals") / "tide.md").write_text(f"# The tide\n\n{TEXTS['ferry']} It is late.\n")
    for stage in (Teacher, Trainer):
        with interrupted(monkeypatch, stage):
            assert call(train.main, *TRAIN)[0] == 130
        with Store.open(FOLDER) as store:
            assert torch.equal(store.cartridge("tide"), kv) and store.texts() == texts
            assert set(store.answering()) == {"lamp", "pump", "tide", "valve"} and store.verify() == []
    assert call(train.main, *TRAIN)[0] == 0
    with Store.open(FOLDER) as store:
        assert not torch.equal(store.cartridge("tide"), kv) and "It is late." in store.texts()[2][2]
        assert not store.old_rows()
        contents(store)


@pytest.mark.parametrize("stage", [Teacher, Trainer])
@pytest.mark.parametrize("others", [0, 1])
def test_an_edit_that_is_reverted_in_mid_round_is_not_trained(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch, stage: Any, others: int
) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()[0]
    page = Path("manuals/tide.md")
    text = page.read_text()
    page.write_text(f"{text} Nonsense.")
    if others:
        Path("manuals/crane.md").write_text(f"# The crane\n\n{TEXTS['crane']}")
    with interrupted(monkeypatch, stage):
        assert call(train.main, *TRAIN)[0] == 130
    page.write_text(text)
    learned: set[str] = set()
    step = Trainer.train_step

    def watched(self: Trainer, number: int, work: Any) -> Any:
        learned.update(work.targets)
        return step(self, number, work)

    monkeypatch.setattr(Trainer, "train_step", watched)
    status, _, err = call(train.main, *TRAIN)
    assert status == 0, err
    after = state()[0]
    assert {name: after[name] for name in before} == before and sorted(set(after) - set(before)) == ["crane"] * others
    assert learned == ({"crane"} if others else set())
    with Store.open(FOLDER) as store:
        assert store.verify() == [] and not store.withdrawn() and not store.old_rows()


def test_a_renamed_document_keeps_its_cartridge(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()[0]
    folder = Path("manuals")
    (folder / "archive").mkdir()
    (folder / "valve.txt").rename(folder / "archive/old valve.txt")  # its title is its name
    (folder / "tide.md").rename(folder / "x")
    (folder / "pump.md").rename(folder / "tide.md")
    (folder / "x").rename(folder / "pump.md")
    monkeypatch.setattr(Trainer, "train_step", None)
    status, out, err = call(train.main, *TRAIN)
    assert status == 0 and "3 renamed; the other" in out, err
    after = state()[0]
    names = {"valve": "archive/old valve", "tide": "pump", "pump": "tide", "lamp": "lamp"}
    assert set(after) == set(names.values())
    for old, new in names.items():
        assert after[new][1] == before[old][1] and after[new][0].steps == before[old][0].steps
    assert after["archive/old valve"][0].title == "old valve"
    with Store.open(FOLDER) as store:
        assert store.verify() == []
        store.export("archive/old valve", "valve.safetensors")
        items = [c for file in sorted(FOLDER.glob("conversations*/unit-*")) for c in read_unit(file)[0]]
        assert {c.document for c in items} == set(names.values())
    with safe_open("valve.safetensors", framework="np") as file:
        about = json.loads(file.metadata()["cartridge"])
    assert (about["id"], about["title"]) == ("archive/old valve", "old valve")
    assert call(train.main, *TRAIN)[0] == 0 and state()[0] == after


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, stage: Any) -> Iterator[None]:
    """A run inside is stopped, as by Ctrl-C: in self-study at once, in training at the sixth step."""
    stopping, name = console.Interrupt(), "converse" if stage is Teacher else "train_step"
    work = getattr(stage, name)

    def stopped(self: Any, number: int, *more: Any) -> Any:
        if stage is Teacher or number == 5:
            stopping.signal = 2
        return work(self, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(console, "Interrupt", lambda: stopping)
        patch.setattr(stage, name, stopped)
        yield


@pytest.mark.parametrize("where", ["between", "self-study", "training"])
def test_a_round_that_is_cut_short_goes_on_to_the_same_bits(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    for folder in ("runs/whole", "runs/manuals"):
        assert call(train.main, *TRAIN, "--store", folder)[0] == 0
    change()
    assert call(train.main, *TRAIN, "--store", "runs/whole")[0] == 0
    if where == "between":  # as if killed when the store was changed and nothing added yet
        store = Store.open(FOLDER, write=True)
        rounds.update(store, Collection.load("manuals"))
        assert set(store.rows()) == {"lamp", "pump", "valve"} and not rounds.begun(store)
        assert set(store.answering()) == {"lamp", "pump", "tide", "valve"}
        store.close()
    else:
        with interrupted(monkeypatch, {"self-study": Teacher, "training": Trainer}[where]):
            assert call(train.main, *TRAIN)[0] == 130
    status, _, err = call(train.main, *TRAIN)
    assert status == 0, err
    assert state() == state(Path("runs/whole"))


def test_a_training_that_has_begun_is_finished_first(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added meanwhile is trained behind it, by the same command."""
    assert call(train.main, *TRAIN, "--store", "runs/whole")[0] == 0
    with interrupted(monkeypatch, Trainer):
        assert call(train.main, *TRAIN)[0] == 130
    Path("manuals/crane.md").write_text(f"# The crane\n\n{TEXTS['crane']}\n")
    Path("manuals/valve.txt").unlink()
    store = Store.open(FOLDER, write=True)
    with pytest.raises(ConfigError, match="finish the training first"):
        rounds.update(store, Collection.load("manuals"))
    store.close()
    status, out, err = call(train.main, *TRAIN)
    assert status == 0, err
    assert "1 new: first the training that was begun without them" in out and "1 new; the other 4 cartridges" in out
    assert call(train.main, *TRAIN, "--store", "runs/whole")[0] == 0
    assert state() == state(Path("runs/whole")) and set(state()[0]) == {"crane", "lamp", "pump", "tide", "valve"}


def test_what_is_pruned_in_mid_round_leaves_it(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted(monkeypatch, Trainer):
        assert call(train.main, *TRAIN)[0] == 130
    Path("manuals/valve.txt").unlink()
    status, out, err = call(train.main, *PRUNE)
    assert status == 0 and "1 gone: first the training that was begun without them; 1 leave it" in out, err
    after = state()
    assert set(after[0]) == {"lamp", "pump", "tide"} and all(row.steps for row, _ in after[0].values())
    items = [c for file in sorted(FOLDER.glob("conversations*/unit-*")) for c in read_unit(file)[0]]
    assert items and "valve" not in {c.document for c in items}
    assert call(train.main, *TRAIN)[0] == 0 and state() == after


def test_a_first_training_whose_folder_is_replaced_begins_again(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by another folder's worth of documents; what had no cartridge is forgotten."""
    with interrupted(monkeypatch, Teacher):
        assert call(train.main, *TRAIN)[0] == 130
    for file in list(Path("manuals").iterdir()):
        file.unlink()
    Path("manuals/crane.md").write_text(f"# The crane\n\n{TEXTS['crane']}\n")
    status, _, err = call(train.main, *TRAIN)
    assert status == 0, err
    rows = state()[0]
    assert set(rows) == {"crane"} and rows["crane"][0].steps > 0


def test_a_later_longer_document_is_split_as_the_span_allows(manuals: FrozenModel) -> None:
    words = [w for w in TRAIN if w not in ("--tokens", "16")] + ["--ratio", "8"]
    assert call(train.main, *words)[0] == 0
    with Store.open(FOLDER) as store:
        span = store.layout.span
    long = "# The book\n\n" + "\n\n".join(f"{text} {n}." for n in range(6) for text in TEXTS.values())
    Path("manuals/book.md").write_text(long)
    status, _, err = call(train.main, *words)
    assert status == 0 and f"cartridges of runs/manuals have {span} positions at most" in err, err
    with Store.open(FOLDER) as store:
        parts = {i: row for i, row in store.rows().items() if i.startswith("book#")}
        assert len(parts) > 2 and "book" not in store.rows()
        assert all(row.tokens <= 8 * span and row.p <= span for row in parts.values())
    before = state()[0]
    assert call(train.main, *words)[0] == 0 and state()[0] == before
    Path("manuals/book.md").write_text("\n\n".join(long.split("\n\n")[:3]))  # two of its parts, and no more
    assert call(train.main, *words)[0] == 0
    kept = {row.hash: tensors for row, tensors in before.values()}
    after = state()[0]
    assert all("part" in row.title or kept[row.hash] == tensors for row, tensors in after.values())
    assert sum(i.startswith("book#") for i in after) < 6
    Path("manuals/book.md").write_text("# The book\n\nIt is short.\n")
    assert call(train.main, *words)[0] == 0
    assert set(state()[0]) == {"book", "lamp", "pump", "tide", "valve"}


def test_an_earlier_cartridge_that_changes_before_its_round_begins_is_trained_in_it(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    change()
    with Store.open(FOLDER, write=True) as store:  # as if killed when the store was changed and nothing added yet
        rounds.update(store, Collection.load("manuals"))
    (Path("manuals") / "pump.md").write_text(f"# The pump\n\n{TEXTS['ferry']} Pumped.\n")
    status, out, err = call(train.main, *TRAIN)
    assert status == 0 and "documents   3" in out, err
    rows = state()[0]
    assert {name: rows[name][0].round for name in rows} == {"crane": 1, "lamp": 0, "pump": 1, "tide": 1, "valve": 0}
    assert all(rows[name][0].steps > 0 for name in rows)


def test_another_collection_replaces_nothing(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()
    Path("others").mkdir()
    (Path("others") / "crane.txt").write_text(TEXTS["crane"])
    words = [*TRAIN, "--store", "runs/manuals"]
    status, _, err = call(train.main, *[w if w != "manuals" else "others" for w in words])
    assert (
        status == 2 and "trained with another --collection: 4 of its documents are missing" in err and state() == before
    )
    with interrupted(monkeypatch, Trainer):  # nor in mid-training
        Path("manuals/crane.md").write_text(TEXTS["crane"])
        assert call(train.main, *TRAIN)[0] == 130
    assert call(train.main, *[w if w != "manuals" else "others" for w in words])[0] == 2
    Path("manuals/crane.md").unlink()
    assert call(train.main, *TRAIN)[0] == 0
    # One that only adds is welcome.
    (Path("others") / "ferry.txt").write_text(f"{TEXTS['ferry']} Today.")
    for file in Path("manuals").iterdir():
        (Path("others") / file.name).write_text(file.read_text())
    status, out, err = call(train.main, *[w if w != "manuals" else "others" for w in words])
    assert status == 0 and "1 new; the other 5" in out, err


def test_a_round_about_which_nothing_can_be_asked_ends_untrained(manuals: FrozenModel) -> None:
    """Its cartridge stays as initialized, which is said once; later rounds go on. With reconstruction it learns."""
    words = [*TRAIN, "--reconstruction", "off"]
    assert call(train.main, *words)[0] == 0
    Path("manuals/stars.txt").write_text("* * *\n")
    status, _, err = call(train.main, *words)
    assert (
        status == 0 and err.count("self-study kept none of 0 questions about 1 documents: their cartridges stay") == 1
    )
    status, out, err = call(query.main, "Which?", "--documents", "stars,pump", "--max-new-tokens", "3")
    assert status == 0 and "not trained yet" not in err and "stars" in out
    status, _, err = call(train.main, *words)
    assert status == 0 and "kept none" not in err
    Path("manuals/new.txt").write_text("The new pump stands behind the old shed. It has a blue lid.")
    assert call(train.main, *words)[0] == 0
    with Store.open("runs/manuals") as store:
        rows = store.rows()
        assert rows["new"].steps > 0 and rows["stars"].steps == 0 and rows["stars"].initialized and store.round == 2
    Path("manuals/moons.txt").write_text("( ( (\n")
    assert call(train.main, *TRAIN)[0] == 0
    with Store.open("runs/manuals") as store:
        assert store.rows()["moons"].steps > 0
