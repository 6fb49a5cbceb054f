"""The files of a store: cut short, read by others who die or may not write, compacted, in the way of a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_commands import call
from helpers_store import contents, forked, make_store, many_documents

from cas import __main__ as tool
from cas.data.collection import Collection
from cas.errors import StoreError, StoreExists, StoreLocked
from cas.model.frozen import FrozenModel
from cas.store import files
from cas.store.changes import Change
from cas.store.index import open_index
from cas.store.store import Store
from retrieval import HashEmbedder


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> Iterator[Path]:
    """A store with five cartridges, closed."""
    make_store(tmp_path / "store", tiny("llama"), collection).close()
    yield tmp_path / "store"


@pytest.mark.parametrize("write", [False, True])
def test_a_file_that_was_cut_short_is_refused_and_ends_no_process(folder: Path, tmp_path: Path, write: bool) -> None:
    file = folder / "cartridges.lmdb"
    whole = file.read_bytes()

    def refused() -> None:
        with pytest.raises(StoreError) as caught, Store.open(folder, write=write) as store:
            assert store.verify()  # nothing was refused: say what is missing
            raise StoreError("damage was found")
        assert "\n" not in str(caught.value)

    for size in (0, 100, 4096, 8192, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert forked(refused) == 0, size
    file.write_bytes(whole)
    with Store.open(folder) as store:
        assert store.verify() == []


def test_a_reader_that_was_killed_keeps_no_pages(folder: Path) -> None:
    """Even while another one, which reads nothing, keeps LMDB's list of readers alive."""

    def read_and_die() -> None:
        store = Store.open(folder)
        held = store.records.environment.begin()
        assert held.id()
        os.kill(os.getpid(), signal.SIGKILL)

    with open_elsewhere(folder):
        assert os.WIFSIGNALED(forked(read_and_die))
        with Store.open(folder, write=True) as store:
            size = os.path.getsize(folder / "cartridges.lmdb")
            for value in range(60):
                store.write_tensors("pump", {"kv": torch.full((3, 2, 2, 16, 12), float(value))})
                store.commit(store.rows(), None)
            assert os.path.getsize(folder / "cartridges.lmdb") < size + 60 * 4096


@contextlib.contextmanager
def open_elsewhere(folder: Path) -> Iterator[None]:
    """Another process has a store open."""
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with Store.open(folder):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        yield
    finally:
        os.write(done[1], b"x")
        os.waitpid(pid, 0)


def test_a_store_that_may_be_read_and_not_written_is_read(
    tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    place = Path(tempfile.mkdtemp())
    make_store(place / "store", tiny("llama"), collection).close()
    (place / "store/cartridges.lmdb-lock").unlink()
    for path, mode in ((place, 0o755), (place / "store", 0o555), (place / "store/cartridges.lmdb", 0o444)):
        path.chmod(mode)

    def read() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        with pytest.raises(StoreError, match="Permission denied"):
            Store.open(place / "store", write=True)
        with Store.open(place / "store") as store:
            assert len(store.texts()) == 5 and store.verify() == [] and store.cartridge("pump").numel()
            assert len(open_index(store, HashEmbedder()).document_ids) == 5

    try:
        assert forked(read) == 0
    finally:
        (place / "store").chmod(0o755)
        shutil.rmtree(place)


def test_compacting_gives_space_back_and_changes_nothing(folder: Path, tiny: Callable[..., FrozenModel]) -> None:
    with Store.open(folder, write=True) as store:
        store.add_documents(many_documents(40), tiny("llama").count_tokens)
        for row in store.rows().values():
            store.write_tensors(row.id, {"kv": torch.full((3, 2, 2, 16, 12), 0.5)})
        store.commit(store.rows(), None)
        with store.training():
            store.change(Change(drop=tuple(f"doc-{n:02d}" for n in range(40))))
        before = contents_but_pending(store)
    file = folder / "cartridges.lmdb"
    size = file.stat().st_size
    file.with_name("cartridges.lmdb.compact").write_bytes(b"left by a killed one")
    status, out, err = call(tool.main, "compact", str(folder))
    assert status == 0 and out == f"{folder}: {size:,} bytes, now {file.stat().st_size:,}\n", err
    assert file.stat().st_size < size / 2 and not list(folder.glob("*.compact"))
    with Store.open(folder, write=True) as store:
        assert contents_but_pending(store) == before and store.verify() == []
        store.commit({n: replace(r, steps=3) for n, r in store.rows().items()}, {"step": 3})
    with Store.open(folder) as store:
        assert store.run_state() == {"step": 3}


def contents_but_pending(store: Store) -> object:
    if store.pending():
        with store.training():
            store.clear_pending()
    return contents(store)


def test_a_store_that_others_have_open_is_not_compacted(folder: Path) -> None:
    with open_elsewhere(folder):
        before = (folder / "cartridges.lmdb").read_bytes()
        status, _, err = call(tool.main, "compact", str(folder))
        assert status == 2 and err == f"cas: {folder} is open in another process; stop that one first\n"
        assert (folder / "cartridges.lmdb").read_bytes() == before
    assert call(tool.main, "compact", str(folder))[0] == 0


def test_nobody_opens_a_store_that_is_being_compacted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str] = []
    sync = files._sync

    def looking(path: Path) -> None:
        if path.name.endswith(".compact"):
            with pytest.raises(StoreLocked, match="is being compacted; try again") as caught:
                files.shared_lock(folder / "cartridges.lmdb", False)
            held.append(str(caught.value))
        sync(path)

    monkeypatch.setattr(files, "_sync", looking)
    assert call(tool.main, "compact", str(folder))[0] == 0 and len(held) == 1


def test_a_full_disk_leaves_the_store_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    before = (folder / "cartridges.lmdb").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", full)
        status, _, err = call(tool.main, "compact", str(folder))
    assert status == 1 and "No space left on device); nothing has changed" in err
    assert (folder / "cartridges.lmdb").read_bytes() == before and not list(folder.glob("*.compact"))


def test_a_file_in_the_place_of_a_store_is_said_so(tmp_path: Path, tiny: Callable[..., FrozenModel]) -> None:
    (tmp_path / "x").write_text("")
    for folder in (tmp_path / "x", tmp_path / "x" / "store"):
        with pytest.raises(StoreExists, match="is a file; give a folder as --store"):
            Store.create(folder, tiny("llama"), tokens=16)
