"""``cas compact --values``: fewer bytes, the same answers nearly, and a store that older code refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import TRAIN, call
from helpers_store import contents, converse, forked, make_store, many_documents

from cas import __main__ as tool
from cas import train
from cas.answering.answerer import Answerer
from cas.errors import ConfigError, StoreError
from cas.model.frozen import FrozenModel
from cas.options import Training
from cas.store import records, values
from cas.store.blobs import dump_tensors, encode, parse_tensors, values_of
from cas.store.merge import merge_stores
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.rounds import begin_round, plan_round
from cas.training.trainer import Trainer
from retrieval import HashEmbedder

DOCUMENTS = many_documents(4)
SETTINGS: dict[str, Any] = {"steps": 2, "targets": 2, "per_target": 2}


@pytest.fixture
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def folder(tmp_path: Path, model: FrozenModel) -> Path:
    """A store of four documents, trained to its end, closed."""
    with make_store(tmp_path / "store", model, DOCUMENTS) as store:
        assert Trainer(model, store, converse(model, DOCUMENTS, 2), Training(**SETTINGS)).run()
    return tmp_path / "store"


def blobs(store: Store) -> dict[str, bytes]:
    with store.records.read() as txn:
        return {
            row.id: bytes(store.records.blob(txn, "kv", row.id, row.version, row.kv_hash))
            for row in store.rows().values()
        }


def within(given: torch.Tensor, expected: torch.Tensor, error: float) -> bool:
    """Whether every number is as near as this share of the largest of its channel."""
    return bool(((given - expected).abs().amax(-2) <= error * expected.abs().amax(-2)).all())


@pytest.mark.parametrize("shape", [(3, 2, 2, 16, 12), (1, 2, 4, 5, 64)])
def test_numbers_survive_as_far_as_their_bytes_go(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    kv = torch.randn(shape, generator=generator) * torch.logspace(-30, 2, shape[3])[:, None]
    kv[0, 0, 0, :, 1] = 0  # a channel without a size
    for kind, error in (("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 127)):
        blob = bytes(dump_tensors(encode(kv, kind), {"cartridge": "{}"}, bytearray(7)))  # type: ignore[arg-type]
        assert values_of(blob) == kind
        back = parse_tensors(blob)
        assert set(back) == {"kv"} and back["kv"].dtype == torch.float32 and back["kv"].shape == kv.shape
        assert within(back["kv"], kv, error)
        assert (error == 0) == torch.equal(back["kv"], kv)
    for bad in (b"", b"\xff" * 40, blob[:-1], blob[:40], b"\x02" + bytes(7) + b"{}"):
        if bad.endswith(b"{}"):
            assert parse_tensors(bad) == {}
        else:
            with pytest.raises(ValueError, match="no safetensors file"):
                parse_tensors(bad)


@pytest.mark.parametrize(("kind", "share", "error"), [("bfloat16", 0.5, 2**-8), ("int8", 0.25 + 0.5 / 16, 1 / 127)])
def test_a_compacted_store_is_smaller_and_answers(
    kind: str, share: float, error: float, folder: Path, model: FrozenModel
) -> None:
    with Store.open(folder) as store:
        before, rows = {name: store.cartridge(name) for name in store.rows()}, store.rows()
        sizes = {name: len(blob) for name, blob in blobs(store).items()}
        answer = Answerer(model, store, HashEmbedder()).ask("Which box?", documents=["doc-00"], max_new_tokens=1)
    size = (folder / "cartridges.lmdb").stat().st_size
    status, out, err = call(tool.main, "compact", str(folder), "--values", kind)
    assert status == 0 and out.startswith(f"{folder}: {size:,} bytes, now "), err
    assert (folder / "cartridges.lmdb").stat().st_size < size
    with Store.open(folder) as store:
        assert store.verify() == [] and store.meta["format"] == 4 and store.meta["values"] == kind
        for name, row in store.rows().items():
            kv = store.cartridge(name)
            assert kv.dtype == torch.float32 and not torch.equal(kv, before[name])
            assert within(kv, before[name], error)
            header = 700  # metadata
            assert len(blobs(store)[name]) < share * (sizes[name] - header) + header + 100
            assert replace(row, version=0, kv_hash=0, state_hash=0, round=0) == replace(
                rows[name], version=0, kv_hash=0, state_hash=0, round=0
            )
        contents(store)  # nothing else is stored
        again = Answerer(model, store, HashEmbedder()).ask("Which box?", documents=["doc-00"], max_new_tokens=1)
        assert again.text == answer.text or kind == "int8"
        held = contents(store)
    assert call(tool.main, "compact", str(folder), "--values", kind)[0] == 0  # a second time changes nothing
    with Store.open(folder) as store:
        assert contents(store) == held
    status, _, err = call(tool.main, "compact", str(folder), "--values", "bfloat16")
    assert (status, err) == (
        (0, "") if kind == "bfloat16" else (2, f"cas: {folder} holds int8 values, which cannot become bfloat16 again\n")
    )


def test_bytes_are_flipped_and_found(folder: Path) -> None:
    assert call(tool.main, "compact", str(folder), "--values", "int8")[0] == 0
    with Store.open(folder, write=True) as store:
        row = store.row("doc-01")
        key = records.blob_keys("doc-01", row.version)[0]
        store.records.write(lambda txn: txn.put(key, bytes(txn.get(key))[:-1] + b"\x55"))
        assert store.verify() == [f"{folder}: kv of 'doc-01' fails its checksum"]
        with pytest.raises(StoreError, match="fails its checksum"):
            store.cartridge("doc-01")
        # With the checksum of what is no tensor: as in a store of somebody else.
        hash = records.checksum(b"\x08" + bytes(7) + b"nonsense")
        store.records.write(lambda txn: txn.put(key, b"\x08" + bytes(7) + b"nonsense"))
        store.commit({**store.rows(), "doc-01": row}, None)
        row = replace(row, kv_hash=hash)
        store.records.write(lambda txn: txn.put(records.row_key("doc-01"), records.record(vars(row))))
        assert "is no safetensors file" in store.verify()[0]


def test_new_documents_train_beside_compacted_ones(folder: Path, model: FrozenModel) -> None:
    assert call(tool.main, "compact", str(folder), "--values", "int8")[0] == 0
    with Store.open(folder, write=True) as store:
        before = blobs(store)
        assert plan_round(store, DOCUMENTS).learners == ()  # they learn no more
        more = many_documents(5, 20)
        both = replace(DOCUMENTS, documents=(*DOCUMENTS.documents, more.documents[4]))
        round = plan_round(store, both)
        assert round.learners == ("doc-04",) and len(round.frozen) == 4
        begin_round(store, round)
        more = replace(more, documents=more.documents[4:])
        store.add_documents(more, model.count_tokens)
        with pytest.raises(ConfigError, match="is in training; finish it first"):
            values.compact_values(store, "int8")
        initialize_cartridges(model, store)
        assert Trainer(model, store, converse(model, more, 2), Training(steps=2, targets=1, per_target=2)).run()
        assert {name: blob for name, blob in blobs(store).items() if name != "doc-04"} == before
        assert values_of(blobs(store)["doc-04"]) == "float32" and store.meta["format"] == 4 and store.verify() == []
    assert call(tool.main, "compact", str(folder), "--values", "int8")[0] == 0
    with Store.open(folder) as store:
        after = blobs(store)
        assert values_of(after.pop("doc-04")) == "int8" and after == before


def test_training_on_says_what_stays(manuals: FrozenModel, tmp_path: Path) -> None:
    assert call(train.main, *TRAIN, "--store", "s")[0] == 0
    assert call(tool.main, "compact", "s", "--values", "bfloat16")[0] == 0
    with Store.open(tmp_path / "s") as store:
        before = contents(store)
    status, out, err = call(train.main, *TRAIN, "--store", "s")
    assert status == 0, err
    with Store.open(tmp_path / "s") as store:
        assert contents(store) == before
    longer = [*TRAIN, "--store", "s"]
    longer[longer.index("--steps") + 1] = "24"
    status, out, err = call(train.main, *longer)
    assert status == 2 and "s was compacted to bfloat16 values and its cartridges learn no more; new documents" in err
    (tmp_path / "manuals" / "new.md").write_text("# Buoys\n\nThe red buoy lies two miles out, the green one three.\n")
    status, out, err = call(train.main, *TRAIN, "--store", "s")
    assert status == 0 and "1 new; the other 4 cartridges stay as they are" in out, err
    with Store.open(tmp_path / "s") as store:
        assert contents(store).items() >= before.items() and store.row("new").steps and store.verify() == []


def test_a_merged_store_of_compacted_ones_is_marked(folder: Path, tmp_path: Path, model: FrozenModel) -> None:
    more = replace(DOCUMENTS, documents=many_documents(6).documents[4:])
    with make_store(tmp_path / "other", model, more) as store:
        assert Trainer(model, store, converse(model, more, 2), Training(**SETTINGS)).run()
        plain = contents(store)
    assert call(tool.main, "compact", str(folder), "--values", "int8")[0] == 0
    for sources in ((folder, tmp_path / "other"), (tmp_path / "other", folder)):
        with merge_stores(tmp_path / sources[0].name / "m", sources) as merged:
            assert merged.meta["format"] == 4 and merged.meta["values"] == "int8" and merged.verify() == []
            assert contents(merged).items() >= plain.items() and len(merged.rows()) == 6


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_compaction_leaves_a_whole_store_and_goes_on(at: int, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(values, "_AT_ONCE", 2)

    def killed() -> None:
        original, count = records.Records.write, 0

        def write(self: records.Records, action: Callable[[Any], Any]) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, action)

        records.Records.write = write  # type: ignore[method-assign]
        call(tool.main, "compact", str(folder), "--values", "int8")

    assert os.WIFSIGNALED(forked(killed))
    with Store.open(folder) as store:
        assert store.verify() == []
        kinds = [values_of(blob) for blob in blobs(store).values()]
        assert kinds.count("int8") == max(0, 2 * (at - 2)) and (at == 1 or store.meta["format"] == 4)
    assert call(tool.main, "compact", str(folder), "--values", "int8")[0] == 0
    with Store.open(folder) as store:
        assert {values_of(blob) for blob in blobs(store).values()} == {"int8"} and store.verify() == []


def test_an_older_version_refuses_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(tool.main, "compact", str(folder), "--values", "bfloat16")[0] == 0
    monkeypatch.setattr("cas.store.store.READS", (2, 3))  # what the version before this one reads
    status, _, err = call(tool.main, "ls", "--store", str(folder))
    assert status == 2 and "has store format 4, this version reads 2 to 3" in err
