"""A store that version 25c7a60^ of this code wrote, of format 2: ``format2.lmdb.gz``, two documents and two of four steps.

It was made there with ``tiny_model("llama")``, ``tokens=8``, ``initialisation="first"``, and the settings below.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS
from helpers_commands import call
from helpers_store import converse

from cas import __main__ as tool
from cas.answering.answerer import Answerer
from cas.data.collection import Collection, Document
from cas.errors import ConfigError
from cas.model.frozen import FrozenModel
from cas.store.records import checksum
from cas.store.store import Store
from cas.training.trainer import Trainer
from retrieval import HashEmbedder

SETTINGS: dict[str, Any] = {
    "epochs": 8.0, "distractor_gradients": False,
    "steps": 4, "pool": 2, "targets": 1, "per_target": 1, "rotate_every": 2, "checkpoint_every": 1, "guests": 0, "seed": 3,
}  # fmt: skip
DOCUMENTS = Collection("two", tuple(Document(i, i.title(), TEXTS[i]) for i in ("lamp", "pump")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    data = gzip.decompress(Path(__file__).with_name("format2.lmdb.gz").read_bytes())
    (tmp_path / "old" / "cartridges.lmdb").write_bytes(data)
    return tmp_path / "old"


def test_a_store_of_format_2_is_read(folder: Path, tiny: Callable[..., FrozenModel]) -> None:
    before = (folder / "cartridges.lmdb").read_bytes()
    status, out, err = call(tool.main, "ls", "--store", str(folder))
    assert status == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["lamp", "pump"], err
    assert call(tool.main, "verify", "--store", str(folder))[0] == 0
    with Store.open(folder) as store:
        assert store.meta["format"] == 2 and store.verify() == []
        assert store.texts() == [(d.id, d.title, d.text) for d in DOCUMENTS.documents]
        for name, row in store.rows().items():
            assert row.steps == 1 and row.p == 8 and store.cartridge(name).shape == (3, 2, 2, 8, 12)
            assert {"kv", "exp_avg", "exp_avg_sq"} <= set(store.read_tensors(name))
            with store.records.read() as txn:
                assert checksum(store.records.blob(txn, "kv", name, row.version, row.kv_hash)) == row.kv_hash
        answer = Answerer(tiny("llama"), store, HashEmbedder()).ask("Which valve is red?", k=1, max_new_tokens=3)
        assert [c.id for c in answer.cartridges] == ["pump"]
    assert (folder / "cartridges.lmdb").read_bytes() == before


def test_a_training_of_format_2_goes_on(folder: Path, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    conversations = converse(model, DOCUMENTS, per_document=2, top_k=4)
    with Store.open(folder, write=True) as store:
        first = {name: store.cartridge(name) for name in store.rows()}
        with pytest.raises(ConfigError, match=r"begun with epochs 8\.0 \(now 4\.0\)") as caught:
            Trainer(model, store, conversations, **SETTINGS | {"epochs": 4.0}).run()
        assert "\n" not in str(caught.value)
        assert Trainer(model, store, conversations, **SETTINGS).run()
        assert store.meta["format"] == 3 and store.verify() == []
        assert {name: row.steps for name, row in store.rows().items()} == {"lamp": 2, "pump": 2}
        assert all(not store.cartridge(name).equal(kv) for name, kv in first.items())
        assert store.run_state()["step"] == 4
    with Store.open(folder) as store:
        assert store.meta["format"] == 3 and len(store.texts()) == 2
