"""A folder of documents on the command line: its spellings, what is chosen of it, what --dry-run lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers_commands import TRAIN, call

from cas import train
from cas.model.frozen import FrozenModel
from cas.store.store import Store


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
