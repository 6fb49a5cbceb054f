"""The files of a store: cut short, read by others who die or may not write, compacted, in the way of a folder."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_commands import TRAIN, call
from helpers_store import contents, forked, make_store, many_documents

from cas import __main__ as tool
from cas import query, train
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


@pytest.mark.parametrize("damage", [bytes, random.Random(1).randbytes])
def test_pages_that_were_never_written_are_refused_and_end_no_process(
    folder: Path, damage: Callable[[int], bytes]
) -> None:
    """As in a copy that was cut short and has its full size all the same: LMDB would abort at such a page."""
    file = folder / "cartridges.lmdb"
    whole = file.read_bytes()

    def read() -> None:
        try:
            with Store.open(folder) as store:
                broken = store.verify()
                store.rows(), store.texts(), store.run_state()
        except StoreError as error:
            assert "\n" not in str(error)
            os._exit(3)
        os._exit(4 if broken else 5)

    ends = set()
    for start in range(0, len(whole), 4096):
        for pages in (1, len(whole) // 4096):
            damaged = bytearray(whole)
            damaged[start : start + 4096 * pages] = damage(len(damaged[start : start + 4096 * pages]))
            file.write_bytes(damaged)
            status = forked(read)
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (3, 4, 5), (start, pages, status)
            ends.add(os.WEXITSTATUS(status))
            assert os.WEXITSTATUS(status) != 5 or pages == 1  # a page that nothing uses
    assert {3, 4} <= ends


def growth(store: Store) -> int:
    """Bytes by which a store's file grows in sixty checkpoints, of some four pages each."""
    file = store.folder / "cartridges.lmdb"
    size = file.stat().st_size
    for value in range(60):
        store.write_tensors("pump", {"kv": torch.full((3, 2, 2, 16, 12), float(value))})
        store.commit(store.rows(), None)
    return file.stat().st_size - size


@contextlib.contextmanager
def reading_elsewhere(folder: Path, read: Callable[[Store], object]) -> Iterator[int]:
    """The id of a process that has opened a store, read and stopped, as by SIGSTOP; it ends afterwards."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            store = Store.open(folder)
            kept = read(store)  # noqa: F841  # alive while we are stopped
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1)
    try:
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def in_transaction(store: Store) -> object:
    held = store.records.environment.begin()
    assert held.id()
    return held


def test_a_reader_that_was_killed_keeps_no_pages(folder: Path) -> None:
    """Whether before a training or in the middle of one, and while another one keeps LMDB's list of readers alive."""
    with open_elsewhere(folder):
        with reading_elsewhere(folder, in_transaction) as before:
            os.kill(before, signal.SIGKILL)
        with Store.open(folder, write=True) as store, store.training():
            assert growth(store) < 60 * 4096


def test_a_reader_that_is_killed_during_a_training_keeps_no_pages(folder: Path) -> None:
    released = os.pipe()

    def read(store: Store) -> object:
        os.read(released[0], 1)  # until the other one trains
        return in_transaction(store)

    pid = os.fork()
    if pid == 0:
        held = read(Store.open(folder))  # noqa: F841
        os.kill(os.getpid(), signal.SIGKILL)
    with Store.open(folder, write=True) as store, store.training():
        os.write(released[1], b"x")
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert growth(store) < 60 * 4096


def test_a_reader_that_is_stopped_between_reads_keeps_no_pages(folder: Path) -> None:
    """Nothing that reads leaves a transaction open. One that is stopped within holds pages: the file grows."""

    def read(store: Store) -> object:
        index = open_index(store, HashEmbedder())
        rows = store.rows(), store.answering(), store.old_rows(), store.withdrawn(), store.run_state(), store.pending()
        values = [store.cartridge(name) for name in store.rows()], [store.read_tensors(name) for name in store.rows()]
        store.export("pump", folder / "pump.safetensors")
        return index, rows, values, store.texts(), store.text("pump"), store.verify(), store.stamp

    with reading_elsewhere(folder, read), Store.open(folder, write=True) as store, store.training():
        assert growth(store) < 60 * 4096
    with reading_elsewhere(folder, in_transaction), Store.open(folder, write=True) as store, store.training():
        assert growth(store) > 60 * 4096  # or the tests above would show nothing


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
    assert call(tool.main, "compact", "--store", str(folder))[0] == 0
    assert "name one store" in call(tool.main, "compact", str(folder), "--store", str(folder))[2]


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


def test_a_file_in_the_place_of_a_store_is_said_so(
    tmp_path: Path, manuals: FrozenModel, tiny: Callable[..., FrozenModel]
) -> None:
    """By every command, and by a training before it plans anything."""
    (tmp_path / "x").write_text("")
    expected = f"{tmp_path / 'x'} is a file; give a folder as --store"
    for folder in (tmp_path / "x", tmp_path / "x" / "store"):
        for use in (lambda f: Store.create(f, tiny("llama"), tokens=16), Store.open):
            with pytest.raises(StoreExists) as caught:
                use(folder)
            assert str(caught.value) == expected
        for main, words in (
            (train.main, TRAIN),
            (train.main, [*TRAIN, "--dry-run"]),
            (query.main, ["Which?"]),
            (tool.main, ["ls"]),
            (tool.main, ["verify"]),
        ):
            assert call(main, *words, "--store", str(folder)) == (2, "", f"cas: {expected}\n")
