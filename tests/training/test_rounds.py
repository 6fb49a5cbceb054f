"""A collection that changes: exactly what is new or changed is trained, what is gone is dropped, all else stays bit for
bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS
from helpers_commands import TRAIN, call
from helpers_store import contents

from cas import console, query, train
from cas.data.collection import Collection
from cas.errors import CollectionError, ConfigError
from cas.model.frozen import FrozenModel
from cas.selfstudy import synthesize as selfstudy
from cas.store.store import Store
from cas.training import rounds
from cas.training.trainer import Trainer
from retrieval import ChunkIndex, HashEmbedder

FOLDER = Path("runs/manuals")


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
    status, out, err = call(train.main, *TRAIN)
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
    assert call(train.main, *TRAIN, "--distractor-gradients")[0] == 0
    assert seen == {"crane", "tide", "lamp", "pump"}


def test_only_gone(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()[0]
    (Path("manuals") / "valve.txt").unlink()
    for _ in range(2):
        status, _, err = call(train.main, *TRAIN)
        assert status == 0, err
        after = state()[0]
        assert after == {k: v for k, v in before.items() if k != "valve"}
    change_back = Path("manuals") / "valve.txt"
    change_back.write_text(TEXTS["ferry"])
    assert call(train.main, *TRAIN)[0] == 0 and set(state()[0]) == set(before)


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
        assert set(store.rows()) == {"lamp", "pump"} and not rounds.begun(store)
        store.close()
    else:
        stopping, stop_in = console.Interrupt(), {"self-study": selfstudy.Teacher, "training": Trainer}[where]
        name = {"self-study": "converse", "training": "train_step"}[where]
        work = getattr(stop_in, name)

        def stopped(self: Any, number: int, *more: Any) -> Any:
            if where == "self-study" or number == 5:
                stopping.signal = 2
            return work(self, number, *more)

        with monkeypatch.context() as patch:
            patch.setattr(console, "Interrupt", lambda: stopping)
            patch.setattr(stop_in, name, stopped)
            assert call(train.main, *TRAIN)[0] == 130
    status, _, err = call(train.main, *TRAIN)
    assert status == 0, err
    assert state() == state(Path("runs/whole"))


def test_a_training_that_has_begun_is_finished_first(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(train.main, *TRAIN, "--store", "runs/whole")[0] == 0
    stopping, step = console.Interrupt(), Trainer.train_step

    def stopped(self: Trainer, number: int, work: Any) -> Any:
        stopping.signal = 2 if number == 5 else stopping.signal
        return step(self, number, work)

    with monkeypatch.context() as patch:
        patch.setattr(console, "Interrupt", lambda: stopping)
        patch.setattr(Trainer, "train_step", stopped)
        assert call(train.main, *TRAIN)[0] == 130
    change()
    store = Store.open(FOLDER, write=True)
    with pytest.raises(ConfigError, match="finish the training first"):
        rounds.update(store, Collection.load("manuals"))
    store.close()
    status, out, err = call(train.main, *TRAIN)
    assert status == 0, err
    assert "1 new, 1 changed, 1 gone: first the training" in out and "train that with the same command" in out
    assert state() == state(Path("runs/whole"))
    for folder in ("runs/whole", "runs/manuals"):
        assert call(train.main, *TRAIN, "--store", folder)[0] == 0
    assert state() == state(Path("runs/whole")) and set(state()[0]) == {"crane", "lamp", "pump", "tide"}


def test_an_earlier_cartridge_that_changes_before_its_round_begins_is_trained_in_it(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    change()
    with Store.open(FOLDER, write=True) as store:  # as if killed when the store was changed and nothing added yet
        rounds.update(store, Collection.load("manuals"))
    (Path("manuals") / "pump.md").write_text(f"# The pump\n\n{TEXTS['ferry']} Pumped.\n")
    status, out, err = call(train.main, *TRAIN)
    assert status == 0 and "documents   3" in out, err
    rows = state()[0]
    assert {name: rows[name][0].round for name in rows} == {"crane": 1, "lamp": 0, "pump": 1, "tide": 1}
    assert all(rows[name][0].steps > 0 for name in rows)


def test_another_collection_replaces_nothing(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    before = state()
    Path("others").mkdir()
    (Path("others") / "crane.txt").write_text(TEXTS["crane"])
    words = [*TRAIN, "--store", "runs/manuals"]
    status, _, err = call(train.main, *[w if w != "manuals" else "others" for w in words])
    assert status == 2 and "trained with another --collection: it would lose 4 documents" in err and state() == before
    # One that only adds is welcome.
    for file in Path("manuals").iterdir():
        (Path("others") / file.name).write_text(file.read_text())
    status, out, err = call(train.main, *[w if w != "manuals" else "others" for w in words])
    assert status == 0 and "1 new; the other 4" in out, err


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
