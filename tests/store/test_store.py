"""The store: refusals, checksums, checkpoints that others see whole, exports."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import safetensors
import torch
from conftest import tiny_hf, tiny_tokenizer
from helpers_commands import call
from helpers_store import contents, make_store, many_documents, stored_keys
from safetensors.torch import load_file
from test_imports import imported

import cas
from cas import __main__ as tool
from cas import query
from cas.data.collection import Collection, Document
from cas.errors import (
    CollectionError,
    ConfigError,
    StoreError,
    StoreExists,
    StoreLocked,
    StoreMismatch,
    StoreMissing,
)
from cas.model.frozen import FrozenModel, Source
from cas.store.changes import Change
from cas.store.records import Row, hashed
from cas.store.store import Store
from cas.training.initialization import initialize, initialize_cartridges


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def store(tmp_path: Path, model: FrozenModel, collection: Collection) -> Iterator[Store]:
    store = make_store(tmp_path / "store", model, collection)
    yield store
    store.close()


def trained(store: Store, name: str, value: float = 0.0) -> dict[str, torch.Tensor]:
    """Tensors as the manager writes them."""
    kv = store.cartridge(name)
    return {
        "kv": torch.full_like(kv, value),
        "exp_avg": torch.full_like(kv, value + 1),
        "exp_avg_sq": torch.full_like(kv, value + 2),
    }


def checkpoint(store: Store, *names: str, value: float = 0.0, step: int = 1) -> None:
    for name in names:
        store.write_tensors(name, trained(store, name, value))
    store.commit({n: replace(r, steps=step) for n, r in store.rows().items()}, {"step": step})


def damage(store: Store, key: bytes, change: Callable[[bytes], bytes]) -> None:
    with store.records.environment.begin(write=True) as txn:
        value = txn.get(key)
        assert value is not None
        txn.put(key, change(bytes(value)))


def blob(store: Store, name: str, kind: str = "kv") -> bytes:
    return f"{kind}/{hashed(name)}/{store.row(name).version}".encode()


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- making, sizes, documents -------------------------------------------------------------------------------------------


def test_documents_get_their_initial_cartridges(store: Store, model: FrozenModel, collection: Collection) -> None:
    assert list(store.rows()) == ["crane", "ferry", "lamp", "pump", "tide"]
    for document in collection.documents:
        row, ids = store.row(document.id), model.encode(document.text)
        assert (row.title, row.hash, row.tokens, row.p) == (document.title, document.hash, len(ids), 16)
        assert (row.version, row.drawn, row.steps, row.trained_tokens, row.state_hash) == (0, 0, 0, 0, None)
        kv = store.cartridge(document.id)
        assert kv.dtype == torch.float32 and kv.shape == (3, 2, 2, 16, 12)
        assert torch.equal(kv, initialize(model, ids, 16, "first", 0))
    assert store.texts() == [(d.id, d.title, d.text) for d in collection.documents]
    assert (store.layout.header, store.layout.span, store.layout.policy) == (model.layout_header, 16, "fixed")
    assert store.run_state() is None
    assert store.verify() == []


@pytest.mark.parametrize("initialisation", ["sampled", "random"])
def test_initialisation_depends_on_document_and_seed(
    tmp_path: Path, model: FrozenModel, collection: Collection, initialisation: str
) -> None:
    found = []
    for n, (seed, documents) in enumerate([(0, collection), (0, collection.select(["lamp"])), (1, collection)]):
        store = make_store(tmp_path / str(n), model, documents, initialisation=initialisation, seed=seed)
        found.append(store.cartridge("lamp"))
        store.close()
    assert torch.equal(found[0], found[1])  # whatever other documents there are
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("settings", "sizes", "span"),
    [
        ({"tokens": 32}, {32}, 32),
        ({"ratio": 1.0}, None, None),
        ({"ratio": 2.0}, None, None),
        ({"ratio": 1.0, "span": 20}, {12, 16, 20}, 20),
        ({"tokens": 16, "span": 64}, {16}, 64),
    ],
    ids=str,
)
def test_sizes(
    tmp_path: Path, model: FrozenModel, settings: dict[str, Any], sizes: set[int] | None, span: int | None
) -> None:
    documents = many_documents(5, words=3)
    store = make_store(tmp_path / "s", model, documents, **({"tokens": None} | settings))
    rows = store.rows().values()
    for row in rows:
        assert store.cartridge(row.id).shape[3] == row.p
        if "ratio" in settings and "span" not in settings:
            assert row.p % 4 == 0 and row.p <= row.tokens / settings["ratio"] < row.p + 4
    assert sizes is None or {row.p for row in rows} == sizes
    assert store.layout.span == (span or max(row.p for row in rows))
    store.close()


def test_later_documents_are_not_squeezed_into_the_span(tmp_path: Path, model: FrozenModel) -> None:
    short, long = many_documents(2, words=4), Document("long", "Long", "pebble " * 60)
    store = make_store(tmp_path / "s", model, short, tokens=None, ratio=1)
    span = store.layout.span
    before, tokens = contents_of_rows(store), model.count_tokens(long.text)
    with pytest.raises(
        ConfigError, match=f"long has {tokens} tokens, which take {tokens // 4 * 4} .* have {span} at most"
    ) as caught:
        store.add_documents(replace(short, documents=(*short.documents, long)), model.count_tokens)
    one_line(caught)
    assert contents_of_rows(store) == before
    store.close()
    store = make_store(tmp_path / "fixed", model, short, tokens=16)  # here a size is a size
    store.add_documents(replace(short, documents=(*short.documents, long)), model.count_tokens)
    assert (store.row("long").p, store.layout.span) == (16, 16)
    store.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--tokens or as --ratio"),
        ({"tokens": 16, "ratio": 2}, "--tokens or as --ratio"),
        ({"tokens": 17}, "--tokens 17"),
        ({"ratio": 0.5}, "--ratio 0.5"),
        ({"tokens": 16, "span": 2}, "--span 2"),
        ({"tokens": 16, "span": 42}, "--span 42"),
        ({"tokens": 16, "positions": "relative"}, "relative"),
        ({"tokens": 16, "initialisation": "zeros"}, "zeros"),
    ],
    ids=str,
)
def test_impossible_settings_leave_nothing(
    tmp_path: Path, model: FrozenModel, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Store.create(tmp_path / "s", model, **settings)
    assert words in one_line(caught)
    assert not (tmp_path / "s").exists()


def test_a_window_too_small_is_said_before_anything_is_written(tmp_path: Path, collection: Collection) -> None:
    model = FrozenModel(tiny_hf("llama", max_position_embeddings=64), tiny_tokenizer(), Source("folder", "short"))
    store = Store.create(tmp_path / "s", model, tokens=48)
    with pytest.raises(
        ConfigError, match=r"cartridges of 48 positions need 69 of the model's 64; raise --ratio or give --span"
    ):
        store.add_documents(collection, model.count_tokens)
    assert stored_keys(store) == {"meta"} and store.meta["span"] is None
    store.close()


def test_initialization_goes_on_where_it_stopped(
    tmp_path: Path, model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = many_documents(70, words=2)
    whole = make_store(tmp_path / "whole", model, documents)
    store, done = Store.create(tmp_path / "s", model, tokens=16, initialisation="first"), list[int]()
    store.add_documents(documents, model.count_tokens)
    assert len(store.rows()) == 70 and stored_keys(store) == {
        "meta", *(f"{kind}/{hashed(d.id)}" for kind in ("row", "text") for d in documents.documents)
    }  # fmt: skip

    def until(last: int) -> None:
        def counted(*arguments: Any) -> Any:
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(1)
            return initialize(*arguments)

        monkeypatch.setattr("cas.training.initialization.initialize", counted)

    until(66)
    with pytest.raises(KeyboardInterrupt):
        initialize_cartridges(model, store)
    assert sum(row.initialized for row in store.rows().values()) == 64  # of the last commit
    assert store.verify() == []
    done.clear()
    until(6)
    assert initialize_cartridges(model, store)
    assert len(done) == 6
    assert contents(store) == contents(whole)
    store.add_documents(documents, model.count_tokens)  # nothing is left to do
    assert initialize_cartridges(model, store)
    assert len(done) == 6
    whole.close()
    store.close()


def test_changed_text_is_refused_before_anything_is_written(
    store: Store, model: FrozenModel, collection: Collection
) -> None:
    before = contents(store)
    new, changed = (
        Document("anchor", "Anchor", "It is red."),
        Document("pump", "Pump", collection["pump"].text + " Sometimes."),
    )
    more = Collection("more", (new, collection["lamp"], changed))
    with pytest.raises(
        CollectionError, match="pump has changed since it was trained; train into a new --store"
    ) as caught:
        store.add_documents(more, model.count_tokens)
    one_line(caught)
    assert contents(store) == before


def test_any_id_is_a_key(tmp_path: Path, model: FrozenModel) -> None:
    """Ids are longer than LMDB's keys, hold slashes, or begin alike."""
    names = ("a", "a/b", "a#1", "ü" * 150 + "/" + "語" * 149, " a ")
    documents = Collection("odd", tuple(Document(name, "", f"The {n}th pebble.") for n, name in enumerate(names)))
    store = make_store(tmp_path / "s", model, documents)
    assert list(store.rows()) == sorted(names)
    assert len({store.cartridge(name).numpy().tobytes() for name in names}) == 5
    assert contents(store).keys() == set(names)
    with pytest.raises(CollectionError, match=r"has no cartridge 'b'"):
        store.cartridge("b")
    store.close()


# -- opening ------------------------------------------------------------------------------------------------------------


def test_open_again(store: Store, model: FrozenModel) -> None:
    before, meta = contents(store), store.meta
    store.close()
    again = Store.open(store.folder, write=True)
    assert (contents(again), again.meta) == (before, meta)
    again.close()
    without = Store.open(store.folder)  # to list and export, no model is needed
    assert (contents(without), without.meta) == (before, meta)
    assert without.layout.span == 16
    without.close()


def test_a_store_closes_itself_and_opens_once_per_process(store: Store) -> None:
    with pytest.raises(
        StoreLocked, match=r"is open already in this process; .* close it first: store\.close\(\)"
    ) as caught:
        Store.open(store.folder)
    one_line(caught)
    with pytest.raises(KeyError), store:
        raise KeyError
    with Store.open(store.folder, write=True) as again:
        assert len(again.rows()) == 5
        with pytest.raises(StoreLocked, match="in this process"):
            Store.open(store.folder, write=True)
    Store.open(store.folder).close()


def test_documents_without_cartridges(
    tmp_path: Path, model: FrozenModel, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are recorded, listed and whole, and whoever wants a cartridge is told to train."""
    store = Store.create(tmp_path / "s", model, tokens=16)
    store.add_documents(collection, model.count_tokens)
    for row, document in zip(store.rows().values(), collection.documents, strict=True):
        assert (row.tokens, row.p, row.version, row.kv_hash) == (len(model.encode(document.text)), 16, -1, None)
        assert not row.initialized and store.text(row.id) == document.text
    assert store.verify() == [] and store.texts() == [] and store.layout.span == 16
    for read in (
        lambda: store.cartridge("pump"),
        lambda: store.read_tensors("pump"),
        lambda: store.export("pump", tmp_path / "pump.safetensors"),
    ):
        with pytest.raises(CollectionError, match="'pump' has no cartridge yet; go on with its training") as caught:
            read()
        one_line(caught)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    with store.training():
        store.change(Change(drop=("crane",)))
    store.close()
    folder = str(store.folder)
    status, out, _ = call(tool.main, "ls", "--store", folder)
    assert status == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["ferry", "lamp", "pump", "tide"]
    status, out, _ = call(tool.main, "verify", "--store", folder)
    assert status == 0 and "0 broken" in out
    assert call(tool.main, "export", "pump", str(tmp_path / "x.safetensors"), "--store", folder)[0] == 2
    status, _, err = call(query.main, "Which?", "--store", folder)
    assert status == 2 and err == f"cas: {folder} has no cartridges yet; go on with its training\n"


def test_the_store_knows_no_model() -> None:
    """Of what stands above or beside it, it imports layout and sizes alone, and documents for their type."""
    for file in sorted(Path(Store.create.__code__.co_filename).parent.glob("*.py")):
        modules = {".".join(name.split(".")[:3]) for _, name in imported(file.read_text(), "cas.store")}
        ours = {name for name in modules if name.startswith("cas.") and not name.startswith("cas.store")}
        assert {n for n in ours if n.split(".")[1] not in ("options", "errors")} <= {
            "cas.model.positions",
            "cas.data.collection",
        }


def test_there_is_nothing_to_open(tmp_path: Path, model: FrozenModel) -> None:
    with pytest.raises(StoreMissing, match=r"holds no store; train one") as caught:
        Store.open(tmp_path / "none")
    one_line(caught)
    assert not (tmp_path / "none").exists()


def test_create_never_overwrites(store: Store, model: FrozenModel) -> None:
    before = contents(store)
    with pytest.raises(StoreExists, match="holds a store already") as caught:
        Store.create(store.folder, model, tokens=32)
    one_line(caught)
    assert contents(store) == before


def test_what_is_no_database_is_said_so(tmp_path: Path, model: FrozenModel) -> None:
    (tmp_path / "cartridges.lmdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="cannot be opened as a store") as caught:
        Store.open(tmp_path)
    one_line(caught)


def test_other_models_headers_and_formats_are_refused(
    store: Store, model: FrozenModel, tiny: Callable[..., FrozenModel], tmp_path: Path
) -> None:
    store.close()
    folder = store.folder
    weights = tiny("llama", seed=1)
    other_base = {"rope_type": "default", "rope_theta": 5e5}
    rope = FrozenModel(tiny_hf("llama", rope_parameters=other_base), tiny_tokenizer(), Source("folder", "rope"))
    rope.fingerprint = model.fingerprint  # type: ignore[misc]  # the same weights, turned otherwise
    header = FrozenModel(model.hf, tiny_tokenizer(), model.source, "Answer in French.")
    for other, words in (
        (
            weights,
            f"was made with tiny-llama (fingerprint {model.fingerprint}), not with tiny-llama ({weights.fingerprint})",
        ),
        (tiny("qwen3"), "not with tiny-qwen3"),
        (rope, "open it with the model it was made with"),
        (header, f"another header (system text or chat template); open it with --system {model.system!r}"),
    ):
        for write in (False, True):
            with Store.open(folder, write=write) as opened, pytest.raises(StoreMismatch) as caught:
                opened.check_model(other)
            assert words in one_line(caught)
    opened = Store.open(folder, write=True)
    opened.check_model(model)
    meta = opened.meta
    opened.records.write(lambda txn: txn.put(b"meta", json.dumps({**meta, "format": 1}).encode()))
    opened.close()
    for write in (True, False):  # the first refusal holds nothing
        with pytest.raises(StoreMismatch, match="has store format 1, this version reads 2 to 4") as caught:
            Store.open(folder, write=write)
        one_line(caught)


def test_only_one_trainer(store: Store, model: FrozenModel) -> None:
    code = f"""
import fcntl, sys
lock = open({str(store.folder / "trainer.lock")!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    before = contents(store)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(StoreLocked, match="another trainer is running on this store") as caught, store.training():
            pass
        one_line(caught)
        with pytest.raises(StoreLocked, match="another trainer"):
            store.add_documents(Collection("more", (Document("new", "New", "A new pebble."),)), model.count_tokens)
        assert contents(store) == before
        other.communicate()
    with store.training(), pytest.raises(StoreLocked), store.training():
        pass
    with store.training():
        pass


# -- versions and checkpoints -------------------------------------------------------------------------------------------


def test_a_version_counts_after_the_checkpoint(store: Store) -> None:
    before = contents(store)
    new = trained(store, "pump", 3)
    new["pending"] = torch.ones(3, 2, 2, 16, 12)
    store.write_tensors("pump", new)
    assert torch.equal(store.read_tensors("pump")["kv"], new["kv"])  # the trainer sees what it wrote
    assert store.read_tensors("pump").keys() == {"kv", "exp_avg", "exp_avg_sq", "pending"}
    assert store.read_tensors("pump", ["kv"]).keys() == {"kv"}
    assert not torch.equal(store.cartridge("pump"), new["kv"])  # others do not
    assert store.row("pump").version == 0
    new["kv"] = new["kv"] + 1
    store.write_tensors("pump", new)
    assert {k for k in stored_keys(store) if hashed("pump") in k and k.startswith("kv/")} == {
        f"kv/{hashed('pump')}/{v}" for v in (0, 2)
    }
    rows = store.rows()
    store.commit(
        {**rows, "pump": replace(rows["pump"], steps=7, drawn=56, trained_tokens=999)}, {"step": 7, "pool": ["pump"]}
    )
    row = store.row("pump")
    assert (row.version, row.steps, row.drawn, row.trained_tokens) == (2, 7, 56, 999)
    assert torch.equal(store.cartridge("pump"), new["kv"])
    assert store.run_state() == {"step": 7, "pool": ["pump"]}
    after = contents(store)  # and that nothing else is stored
    assert {name for name in after if after[name] != before[name]} == {"pump"}
    assert store.verify() == []


def test_versions_that_no_checkpoint_names_are_removed(store: Store, model: FrozenModel) -> None:
    checkpoint(store, "pump", value=1)
    before, keys = contents(store), stored_keys(store)
    for name in ("pump", "lamp"):
        store.write_tensors(name, trained(store, name, 9))
    assert len(stored_keys(store)) == len(keys) + 4
    store.close()  # as good as killed
    again = Store.open(store.folder, write=True)
    assert contents_of_rows(again) == {name: row for name, (row, _) in before.items()}
    with again.training():
        assert stored_keys(again) == keys
    assert contents(again) == before
    again.close()


def contents_of_rows(store: Store) -> dict[str, Row]:
    return {name: replace(row, version=0) for name, row in store.rows().items()}


@contextlib.contextmanager
def another_process(target: Callable[[Any], None]) -> Iterator[Callable[[Any], Any]]:
    """Yields a function that sends it a message and waits for its answer. Must be forked before a store is opened here:
    what a process has opened, its fork can not open."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    theirs.close()

    def ask(message: Any, wait: bool = True) -> Any:
        ours.send(message)
        if not wait:
            return None
        assert ours.poll(20), "no answer"
        return ours.recv()

    yield ask
    with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
        ours.send(None)
    process.join(20)
    assert process.exitcode == 0


def test_a_commit_is_seen_whole_by_others(tmp_path: Path, model: FrozenModel, collection: Collection) -> None:
    """A reader that was there before sees the old set, then the new one, and never a mixture or a hole."""
    with another_process(read_on_demand) as ask:
        store = make_store(tmp_path / "s", model, collection)
        commit_under_a_reader(store, collection, ask)
        store.close()


def commit_under_a_reader(store: Store, collection: Collection, ask: Callable[..., Any]) -> None:
    checkpoint(store, *collection_ids(collection), value=0, step=1)
    assert ask(store.folder) == "open"
    assert ask("values") == {(0.0, 1)}
    for name in collection_ids(collection):
        store.write_tensors(name, trained(store, name, 5))
    assert ask("values") == {(0.0, 1)}
    ask("begin")  # a read transaction across the checkpoint
    store.commit({n: replace(r, steps=2) for n, r in store.rows().items()}, {"step": 2})
    assert ask("in transaction") == {(0.0, 1)}
    assert ask("values") == {(5.0, 2)}
    # Reading over and over while checkpoints go on.
    ask("many", wait=False)
    for step in range(3, 40):
        checkpoint(store, *collection_ids(collection), value=float(step), step=step)
    count, broken = ask("enough")
    assert count > 5 and broken == []


def collection_ids(collection: Collection) -> list[str]:
    return [d.id for d in collection.documents]


def read_on_demand(pipe: Any) -> None:
    """A reader in a process of its own."""
    store = Store.open(pipe.recv())
    pipe.send("open")

    def values(txn: Any) -> set[tuple[float, int]]:
        found = set()
        for name in ("crane", "ferry", "lamp", "pump", "tide"):
            row = store.records.row(txn, name)
            tensors = store.records.tensors(txn, "kv", name, row.version, row.kv_hash)
            found.add((float(tensors["kv"][0, 0, 0, 0, 0]), row.steps))
        return found

    held: Any = None
    while (what := pipe.recv()) is not None:
        if what == "values":
            with store.records.read() as txn:
                pipe.send(values(txn))
        elif what == "begin":
            held = store.records.read()
            txn = held.__enter__()
            pipe.send("begun")
        elif what == "in transaction":
            pipe.send(values(txn))
            held.__exit__(None, None, None)
        elif what == "many":
            count, broken = 0, []
            while not pipe.poll():
                count += 1
                try:
                    for name in ("crane", "pump"):
                        kv = store.cartridge(name)
                        assert len(kv.unique()) == 1, "a mixture"
                    with store.records.read() as txn:
                        assert len(values(txn)) == 1, "another set"
                    broken += store.verify()
                except (StoreError, AssertionError) as error:
                    broken.append(str(error))
            pipe.recv()
            pipe.send((count, broken))
    store.close()


def test_a_full_map_grows(
    tmp_path: Path, model: FrozenModel, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address space doubles as often as it must, and a reader that was there before follows."""
    small = lmdb.open

    def tight(path: str, **options: Any) -> Any:
        return small(path, **(options | {"map_size": 1 << 16}))

    monkeypatch.setattr(lmdb, "open", tight)
    with another_process(read_cartridges) as ask:
        store = Store.create(tmp_path / "s", model, tokens=16)
        store.add_documents(collection.select(["crane"]), model.count_tokens)
        initialize_cartridges(model, store)
        assert ask(store.folder) == ["crane"]
        more = many_documents(40)
        store.add_documents(more, model.count_tokens)
        initialize_cartridges(model, store)
        checkpoint(store, *(d.id for d in more.documents), value=2)
        assert store.records.environment.info()["map_size"] >= 4 << 16
        assert ask("again") == list(store.rows())
        assert store.verify() == [] and len(store.rows()) == 41
        store.close()


def test_first_values_and_later_ones_have_version_numbers_of_their_own(
    tmp_path: Path, model: FrozenModel, collection: Collection
) -> None:
    store = Store.create(tmp_path / "s", model, tokens=16)
    store.add_documents(collection, model.count_tokens)
    kv = torch.zeros(3, 2, 2, 16, 12)
    store.write_tensors("pump", {"kv": kv}, version=0)
    store.write_tensors("tide", {"kv": kv})
    store.commit(store.rows(), None)
    assert {row.id: row.version for row in store.rows().values() if row.initialized} == {"pump": 0, "tide": 1}
    store.write_tensors("pump", {"kv": kv + 1})
    store.write_tensors("pump", {"kv": kv + 2})
    store.commit(store.rows(), None)
    assert store.row("pump").version == 2 and torch.equal(store.cartridge("pump"), kv + 2)
    assert {key for key in stored_keys(store) if key.startswith("kv/")} == {
        f"kv/{hashed('pump')}/2", f"kv/{hashed('tide')}/1"
    }  # fmt: skip
    store.close()


def read_cartridges(pipe: Any) -> None:
    store = Store.open(pipe.recv())
    pipe.send([name for name in store.rows() if store.cartridge(name).numel()])
    pipe.recv()
    pipe.send([name for name in store.rows() if store.cartridge(name).numel()])
    store.close()


def test_a_write_that_fails_changes_nothing(store: Store, collection: Collection) -> None:
    """A file that may not grow stands for a full disk."""
    before = contents(store)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(store.folder / "cartridges.lmdb"), limits[1]))
    try:
        with pytest.raises(StoreError) as caught:
            for _ in range(20):
                for name in collection_ids(collection):
                    store.write_tensors(name, trained(store, name, 4))
        assert one_line(caught).startswith(f"{store.folder}: ")
        assert store.verify() == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with store.training():
        assert contents(store) == before
    checkpoint(store, "pump", value=1)
    assert store.verify() == []


# -- damage -------------------------------------------------------------------------------------------------------------


def flip(value: bytes) -> bytes:
    return value[:-5] + bytes([value[-5] ^ 4]) + value[-4:]


@pytest.mark.parametrize("kind", ["kv", "state"])
@pytest.mark.parametrize(
    "change", [flip, lambda value: value[:-16], lambda value: b""], ids=["flipped", "cut", "emptied"]
)
def test_damage_is_found_and_named(
    store: Store, model: FrozenModel, kind: str, change: Callable[[bytes], bytes]
) -> None:
    checkpoint(store, "lamp", "pump", value=1)
    damage(store, blob(store, "pump", kind), change)
    broken = store.verify()
    assert len(broken) == 1 and f"{kind} of 'pump' fails its checksum" in broken[0]
    with pytest.raises(
        StoreError, match=f"{kind} of 'pump' fails its checksum; run: python -m cas verify --store"
    ) as caught:
        store.read_tensors("pump")
    one_line(caught)
    assert store.read_tensors("lamp").keys() == {"kv", "exp_avg", "exp_avg_sq"}
    if kind == "kv":
        for read in (
            lambda: store.cartridge("pump"),
            lambda: store.export("pump", store.folder / "x"),
            lambda: cas.compose(model, store, ["pump"]),
        ):
            with pytest.raises(StoreError, match="fails its checksum"):
                read()
        assert not list(store.folder.glob("x*"))


def test_what_is_missing_is_named(store: Store) -> None:
    with store.records.environment.begin(write=True) as txn:
        txn.delete(blob(store, "crane"))
        txn.delete(f"text/{hashed('tide')}".encode())
    lines = [line.removeprefix(f"{store.folder}: ") for line in store.verify()]
    assert sorted(lines) == ["kv of 'crane' is missing", "the text of 'tide' is missing or damaged"]
    with pytest.raises(StoreError, match="kv of 'crane' is missing"):
        store.cartridge("crane")
    with pytest.raises(StoreError, match="the text of 'tide' is missing or damaged"):
        store.texts()


def test_damaged_text_is_named(store: Store) -> None:
    damage(store, f"text/{hashed('tide')}".encode(), lambda value: value.replace(b"May", b"June"))
    assert len(store.verify()) == 1 and "the text of 'tide'" in store.verify()[0]
    with pytest.raises(StoreError, match="the text of 'tide'"):
        store.texts()


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value[:-9],
        lambda value: b'{"id": "lamp"}',
        lambda value: b"7",
        lambda value: value.replace(b'"steps": 0', b'"steps": 8'),
    ],
    ids=["cut", "other", "number", "figure"],
)
def test_damaged_records_are_named(store: Store, change: Callable[[bytes], bytes]) -> None:
    checkpoint(store, "pump")
    damage(store, f"row/{hashed('lamp')}".encode(), change)
    damage(store, b"run", lambda value: value[:-1])
    broken = store.verify()
    assert sorted(broken) == sorted(["run: the record is damaged", f"row/{hashed('lamp')}: the record is damaged"])
    for read in (store.rows, store.run_state, lambda: store.row("lamp"), lambda: store.cartridge("lamp")):
        with pytest.raises(StoreError, match="a record is damaged") as caught:
            read()
        one_line(caught)
    assert store.cartridge("pump").numel()


def test_values_that_mean_nothing_are_named(store: Store) -> None:
    """Whole files, but no cartridge that could be used."""
    bad = trained(store, "pump")
    bad["exp_avg"][0, 0, 0, 0, 0] = float("nan")
    store.write_tensors("pump", bad)
    small = {k: t[:, :, :, :8] for k, t in trained(store, "lamp").items()}
    store.write_tensors("lamp", small)
    store.commit(store.rows(), None)
    assert sorted(store.verify()) == [
        *(f"lamp: {kind}: has another size than its record says" for kind in ("kv", "state")),
        "pump: state: holds a value that is not finite",
    ]


# -- export -------------------------------------------------------------------------------------------------------------


def test_export_is_a_safetensors_file(store: Store, model: FrozenModel, tmp_path: Path) -> None:
    checkpoint(store, "pump", value=2)
    file = tmp_path / "pump.safetensors"
    store.export("pump", file)
    tensors = load_file(file)
    assert tensors.keys() == {"kv"} and torch.equal(tensors["kv"], store.cartridge("pump"))
    with safetensors.safe_open(file, framework="np") as opened:
        about = json.loads(opened.metadata()["cartridge"])
    assert about == {
        "format": 3, "id": "pump", "title": "Pump", "model": "tiny-llama", "fingerprint": model.fingerprint,
        "rope": model.rope_fingerprint, "header": model.layout_header, "positions": "fixed",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pump.safetensors", "store"]
    again = tmp_path / "again.safetensors"
    store.export("pump", again)
    assert again.read_bytes() == file.read_bytes()


def test_equal_cartridges_are_equal_bytes(tmp_path: Path, model: FrozenModel, collection: Collection) -> None:
    for name in ("a", "b"):
        store = make_store(tmp_path / name, model, collection)
        store.export("tide", tmp_path / f"{name}.safetensors")
        store.close()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_export_replaces_whole_or_not_at_all(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pump.safetensors"
    file.write_bytes(b"before")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(
            StoreError, match="No space left on device; free some space and run the same command again"
        ) as caught:
            store.export("pump", file)
        one_line(caught)
    assert file.read_bytes() == b"before"
    store.export("pump", file)
    assert load_file(file).keys() == {"kv"}
    with pytest.raises(StoreError, match="No such file or directory; see to that and run"):
        store.export("pump", tmp_path / "none" / "pump.safetensors")
    with pytest.raises(CollectionError, match="has no cartridge 'nobody'"):
        store.export("nobody", file)


def test_the_record_is_plain_json(store: Store) -> None:
    """Nothing but JSON and safetensors is in the file."""
    checkpoint(store, "pump")
    with store.records.environment.begin() as txn:
        for key, value in txn.cursor():
            if key.startswith((b"kv/", b"state/")):
                assert safetensors.deserialize(bytes(value))
            elif not key.startswith(b"text/"):
                assert isinstance(json.loads(bytes(value)), dict)
        read = json.loads(bytes(txn.get(f"row/{hashed('pump')}".encode())))
        assert read.pop("checksum") and read == asdict(store.row("pump"))
