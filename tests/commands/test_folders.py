"""A folder of documents on the command line: its spellings, what is chosen of it, what --dry-run lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from helpers_commands import TRAIN, call

from cas import train
from cas.data.collection import Collection
from cas.model.frozen import FrozenModel
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges


def test_the_same_folder_however_it_is_spelled(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = Path("manuals").resolve(), Path("runs/manuals")
    assert call(train.main, *TRAIN)[0] == 0
    recorded = yaml.safe_load((store / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["collection"] == str(folder) and recorded["include"] == recorded["exclude"] == []

    older = {k: v for k, v in recorded.items() if k not in ("include", "exclude")} | {"collection": "manuals"}
    Path("link").symlink_to(folder)
    (folder / "tide.md").unlink()
    for n, spelling in enumerate((str(folder), "./manuals/", "link", "manuals")):
        (store / "config.yaml").write_text(yaml.safe_dump(older), encoding="utf-8")
        words = [*TRAIN, "--collection", spelling, "--store", "runs/manuals", "--dry-run", "--prune"]
        status, out, err = call(train.main, *words)
        assert status == 0 and "1 gone" in out, (n, spelling, err)
    other = Path("elsewhere/manuals")
    other.mkdir(parents=True)
    (other / "new.md").write_text("Another text about the harbor wall.")
    status, _, err = call(train.main, *words, "--collection", "elsewhere/manuals")
    assert status == 2 and "was trained with another --collection" in err
    status, _, err = call(train.main, *words, "--exclude", "pump*")
    assert status == 2 and "was trained with another --exclude: 2 of its documents are missing" in err
    words = [*TRAIN, "--collection", "manuals", "--store", "runs/part"]
    assert call(train.main, *words, "--exclude", "valve*")[0] == 0
    next(folder.glob("*pump*")).unlink()
    status, out, err = call(train.main, *words, "--dry-run")
    assert status == 0 and "missing     1 (pump)" in out, err  # it takes in more: no other collection


def test_a_store_that_was_made_in_python_or_whose_folder_has_moved(manuals: FrozenModel) -> None:
    """It is that of the folder, if they have documents in common; any other one is refused, also under $CAS_STORE."""
    with Store.create("runs/manuals", manuals, tokens=16) as store:
        store.add_documents(Collection.load("manuals"), manuals.count_tokens)
        initialize_cartridges(manuals, store)
    Path("docs/other").mkdir(parents=True)
    for name in ("pump", "tide", "x"):
        Path(f"docs/other/{name}.md").write_text(f"# Another {name}\n\nThis is another text about the {name}.\n")
    words = [*TRAIN, "--store", "runs/manuals", "--dry-run"]
    status, _, err = call(train.main, *words, "--collection", "docs/other")
    assert (
        status == 2
        and "was trained with another --collection" in err
        and "\n" not in err.strip().rpartition("cas: ")[2]
    )
    Path("manuals/tide.md").write_text("# The tide\n\nIt is high at noon, and low at six.\n")
    status, _, err = call(train.main, *words[:-1])
    assert status == 0 and Path("runs/manuals/config.yaml").exists(), err
    Path("manuals").rename("docs/manuals")
    Path("docs/manuals/tide.md").write_text("# The tide\n\nIt is high at one, and low at seven.\n")
    status, out, err = call(train.main, *words, "--collection", "docs/manuals")
    assert status == 0 and "1 changed; the other 3" in out, err
    assert call(train.main, *words, "--collection", "docs/other")[0] == 2


def test_the_folder_of_another_project_is_not_that_of_the_store(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAS_STORE", str(Path("shared_store").resolve()))
    assert call(train.main, *TRAIN)[0] == 0
    recorded = yaml.safe_load(Path("shared_store/config.yaml").read_text(encoding="utf-8"))
    Path("project/manuals").mkdir(parents=True)
    Path("project/manuals/pump.md").write_text("# Our pump\n\nIt pumps water from the well.\n")
    monkeypatch.chdir("project")
    for spelling in (recorded["collection"], "manuals"):  # as stores record it now, and as older ones did
        config = Path("../shared_store/config.yaml")
        config.write_text(yaml.safe_dump(recorded | {"collection": spelling}), encoding="utf-8")
        status, _, err = call(train.main, *TRAIN)
        assert status == 2 and "was trained with another --collection" in err, (spelling, err)


def test_dry_run_lists_what_is_not_read(manuals: FrozenModel) -> None:
    folder = Path("manuals")
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "drafts").mkdir()
    (folder / "drafts" / "x.md").write_text("A draft.")
    words = [*TRAIN, "--exclude", "drafts/", "--include", "*.md", "--include", "*.png", "--dry-run"]
    status, out, err = call(train.main, *words)
    assert status == 0 and not Path("runs").exists()
    assert "documents   3" in out
    lines = err.splitlines()
    assert any(line.startswith("not read: ") and "1 image" in line and "1 by --exclude" in line for line in lines), err
    assert "photo.png: image, not text" in lines and "drafts/: by --exclude" in lines


def test_a_question_about_a_missing_document_stops_no_training(manuals: FrozenModel) -> None:
    Path("manuals/questions.jsonl").write_text('{"document_ids": ["gone"], "question": "?", "answers": ["x"]}\n')
    status, _, err = call(train.main, *TRAIN)
    assert status == 0 and "1 question about documents that are not there (q1)" in err
    with Store.open("runs/manuals") as store:
        assert store.rows()["pump"].steps > 0


@pytest.mark.parametrize("more", [(), ("--reconstruction", "off"), ("--writer", "none"), ("--effort", "quick")])
def test_the_plan_s_disk_has_room_for_conversations(manuals: FrozenModel, more: tuple[str, ...]) -> None:
    """Beside cartridges and state; not so much more that it would say nothing."""
    words = [w for w in TRAIN if w not in ("--conversations", "40")] if "quick" in more else TRAIN
    status, out, err = call(train.main, *words, *more)
    assert status == 0, err
    match = re.search(r"disk +\S+ \S+ for cartridges and state, up to (\S+) (KiB|MiB) for conversations", out)
    assert match is not None, out
    planned = float(match[1]) * {"KiB": 1 << 10, "MiB": 1 << 20}[match[2]]
    taken = sum(file.stat().st_size for file in Path("runs/manuals/conversations").iterdir())
    assert taken <= planned <= 40 * taken
