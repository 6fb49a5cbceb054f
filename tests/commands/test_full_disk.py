"""A disk that is full: every command ends with one line, and goes on to the same bits when there is space again."""

from __future__ import annotations

import os
import re
import resource
from functools import cache
from pathlib import Path

import pytest
from helpers_commands import TRAIN, call
from helpers_store import contents

from cas import query, train
from cas.model.frozen import FrozenModel
from cas.store.store import Store

FOLDER = Path("runs/manuals")
FULL = r"cas: runs/manuals/\S+: No space left on device; free some space and run the same command again\n"


@cache
def whole() -> object:
    """What an uninterrupted training leaves, of the folder that every test has."""
    assert call(train.main, *TRAIN, "--store", "runs/whole")[0] == 0
    with Store.open("runs/whole") as store:
        return contents(store)


def goes_on(expected: object) -> None:
    status, _, err = call(train.main, *TRAIN)
    assert status == 0, err
    with Store.open(FOLDER) as store:
        assert contents(store) == expected and store.verify() == []
    assert call(query.main, "Which?", "--store", str(FOLDER), "--max-new-tokens", "2")[0] == 0


@pytest.mark.parametrize(
    "file",
    ["config.yaml.partial", "conversations/unit-000000.partial", "conversations/units.partial", "seconds.jsonl"],
)
def test_the_kernel_has_no_space(manuals: FrozenModel, file: str) -> None:
    """``/dev/full`` stands for the disk, so that what is written by C libraries fails, too."""
    expected = whole()
    (FOLDER / file).parent.mkdir(parents=True)
    (FOLDER / file).symlink_to("/dev/full")  # which lets the file be opened, and nothing be written
    status, _, err = call(train.main, *TRAIN)
    assert status == 1 and re.fullmatch(FULL, err.splitlines(keepends=True)[-1]), err
    (FOLDER / file).unlink(missing_ok=True)  # pyarrow has removed its own
    goes_on(expected)


@pytest.mark.parametrize("name", ["unit-000000", "metrics.jsonl", "index.faiss"])
def test_space_is_missed_only_when_the_disk_is_waited_for(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected, sync = whole(), os.fsync

    def full(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, err = call(train.main, *TRAIN)
    assert status == 1 and re.fullmatch(FULL.replace(r"/\S+:", r"/\S*:"), err.splitlines(keepends=True)[-1]), err
    goes_on(expected)


@pytest.mark.parametrize("kilobytes", [8, 64, 160])
def test_no_file_may_grow_beyond_a_limit(manuals: FrozenModel, kilobytes: int) -> None:
    """Wherever that strikes, the database included."""
    expected = whole()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, before[1]))
    try:
        status, _, err = call(train.main, *TRAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in err.splitlines() if line.startswith("cas: ")]
    assert status == 1 and len(lines) == 1 and "runs/manuals" in lines[0], err
    goes_on(expected)


def test_questions_are_answered_on_a_full_disk(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index cannot be kept, and is made again for each."""
    assert call(train.main, *TRAIN)[0] == 0
    answer = call(query.main, "Which valve?", "--json", "--max-new-tokens", "3")
    for file in (FOLDER / "index").rglob("*.*"):
        file.unlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    again = call(query.main, "Which valve?", "--json", "--max-new-tokens", "3")
    assert again[0] == answer[0] == 0 and again[1].partition('"timings"')[0] == answer[1].partition('"timings"')[0]
