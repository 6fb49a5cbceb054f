"""Stores that were trained apart become one, or are refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_commands import call
from helpers_store import contents, converse, make_store, many_documents

from cas import __main__ as tool
from cas import query
from cas.data.collection import Collection
from cas.errors import CasError, ConfigError, StoreError, StoreExists, StoreMismatch
from cas.model.frozen import FrozenModel
from cas.options import Training
from cas.store.index import open_index
from cas.store.merge import copy_documents, create_like, join_indexes, merge_stores
from cas.store.records import blob_keys
from cas.store.store import Store
from cas.training.rounds import begin_round, end_untrained, plan_round
from cas.training.trainer import Trainer
from retrieval import HashEmbedder

DOCUMENTS = many_documents(6)


def part(numbers: slice) -> Collection:
    return replace(DOCUMENTS, documents=DOCUMENTS.documents[numbers])


def finished(folder: Path, model: FrozenModel, documents: Collection, steps: int = 0, **settings: Any) -> Path:
    """A store of documents, trained for some steps, or ended untrained."""
    with make_store(folder, model, documents, **settings) as store:
        if steps:
            Trainer(model, store, converse(model, documents, 2), Training(steps=steps, targets=2, per_target=2)).run()
        else:
            end_untrained(store)
    return folder


@pytest.fixture
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


def test_a_merged_store_has_every_document_bit_for_bit(tmp_path: Path, model: FrozenModel) -> None:
    sources = [
        finished(tmp_path / "a", model, part(slice(0, 3)), 3),
        finished(tmp_path / "b", model, part(slice(3, 6)), 3),
    ]
    expected: dict[str, Any] = {}
    for folder in sources:
        with Store.open(folder) as source:
            expected |= contents(source)
            texts = dict.fromkeys(source.texts())
    with merge_stores(tmp_path / "merged", sources) as merged:
        assert contents(merged) == expected and merged.verify() == []
        assert set(texts) <= set(merged.texts()) and len(merged.texts()) == 6
        merged.check_model(model)
        assert all(row.round < merged.round for row in merged.rows().values())  # they learn no more
        steps = (merged.folder / "metrics.jsonl").read_text().splitlines()
        assert len(steps) == 6
        # Nothing is to be trained, and a new document trains beside the others.
        assert plan_round(merged, DOCUMENTS).learners == ()
        more = replace(DOCUMENTS, documents=many_documents(7, 20).documents[6:])
        round = plan_round(merged, replace(DOCUMENTS, documents=(*DOCUMENTS.documents, *more.documents)))
        assert round.learners == ("doc-06",) and len(round.frozen) == 6
        begin_round(merged, round)
        merged.add_documents(more, model.count_tokens)
        trainer = Trainer(model, merged, converse(model, more, 2), Training(steps=2, targets=1, per_target=2))
        assert trainer.run() and contents(merged).items() >= expected.items()


def test_the_index_of_a_merged_store_is_not_embedded_again(tmp_path: Path, model: FrozenModel) -> None:
    class Counting(HashEmbedder):
        embedded = 0

        def embed(self, texts: Any) -> Any:
            Counting.embedded += len(texts)
            return super().embed(texts)

    sources, embedder = [], Counting()
    for name, numbers in (("a", slice(0, 2)), ("b", slice(2, 4)), ("c", slice(4, 6))):
        sources.append(finished(tmp_path / name, model, part(numbers)))
        if name != "c":
            with Store.open(sources[-1]) as source:
                open_index(source, embedder)
    before = Counting.embedded
    with merge_stores(tmp_path / "merged", sources) as merged:
        join_indexes(merged, sources, embedder)
        index = open_index(merged, embedder)
    assert before == 4 and Counting.embedded == 6 and index.document_ids == [d.id for d in DOCUMENTS.documents]


REFUSED: list[tuple[dict[str, Any], type[CasError], str]] = [
    ({"tokens": 32}, StoreMismatch, r"was made with tokens 32, .*a with 16: train both with the same --tokens"),
    ({"positions": "offset"}, StoreMismatch, r"was made with positions offset, .*a with fixed: .* --positions"),
    ({"tokens": None, "ratio": 2.0}, StoreMismatch, r"was made with tokens None"),
    ({"numbers": slice(2, 4)}, ConfigError, r"'doc-02' is in both .*a and .*b; documents need different ids"),
    ({"kind": "qwen3"}, StoreMismatch, r"was made with another model than .*a \(tiny-qwen3, tiny-llama\)"),
]


@pytest.mark.parametrize(("given", "error", "line"), REFUSED, ids=lambda value: str(value)[:24])
def test_stores_that_do_not_belong_together_are_refused(
    given: dict[str, Any], error: type[CasError], line: str, tmp_path: Path, tiny: Callable[..., FrozenModel]
) -> None:
    settings = {"kind": "llama", "numbers": slice(3, 6), **given}
    a = finished(tmp_path / "a", tiny("llama"), part(slice(0, 3)))
    b = finished(tmp_path / "b", tiny(settings.pop("kind")), part(settings.pop("numbers")), **settings)
    with pytest.raises(error, match=line):
        merge_stores(tmp_path / "merged", [a, b])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_store_in_training_a_folder_in_use_and_one_store_are_refused(tmp_path: Path, model: FrozenModel) -> None:
    a = finished(tmp_path / "a", model, part(slice(0, 3)))
    make_store(tmp_path / "b", model, part(slice(3, 6))).close()
    with pytest.raises(ConfigError, match=r"b is in training; finish it first"):
        merge_stores(tmp_path / "merged", [a, tmp_path / "b"])
    with pytest.raises(StoreExists, match=r"a exists already; name a new folder"):
        merge_stores(a, [a, tmp_path / "b"])
    with pytest.raises(ConfigError, match=r"two or more stores"):
        merge_stores(tmp_path / "merged", [a])
    assert not (tmp_path / "merged").exists()


def test_damage_stops_a_merge_and_leaves_nothing(tmp_path: Path, model: FrozenModel) -> None:
    a, b = (finished(tmp_path / n, model, part(s)) for n, s in (("a", slice(0, 3)), ("b", slice(3, 6))))
    with Store.open(b, write=True) as store:
        key = blob_keys("doc-04", store.row("doc-04").version)[0]
        store.records.write(lambda txn: txn.put(key, txn.get(key)[:-1] + b"\x7f"))
    with pytest.raises(StoreError, match="kv of 'doc-04' fails its checksum"):
        merge_stores(tmp_path / "merged", [a, b])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_trained_cartridge_takes_the_bytes_of_the_plan(tmp_path: Path, model: FrozenModel) -> None:
    """Four a number on disk, twelve with Adam's moments, and a header: what docs/scaling.md multiplies."""
    documents = part(slice(0, 2))
    with make_store(tmp_path / "a", model, documents) as store:
        training = Training(steps=2, targets=2, per_target=2, distractor_gradients=False)
        assert Trainer(model, store, converse(model, documents, 2), training).run()
        with store.records.read() as txn:
            for row in store.rows().values():
                kv, state = (len(txn.get(key)) for key in blob_keys(row.id, row.version))
                elements = model.geometry.elements(row.p)
                assert 4 * elements < kv < 4 * elements + 1024 and 8 * elements < state < 8 * elements + 1024


def test_copies_replace_what_the_target_has(tmp_path: Path, model: FrozenModel) -> None:
    a = finished(tmp_path / "a", model, part(slice(0, 3)), 3)
    with Store.open(a) as source, create_like(source, tmp_path / "copy") as copy:
        copy_documents(source, ["doc-00", "doc-01"], copy)
        state = contents(copy)
        copy_documents(source, ["doc-01"], copy, state=False)
        again = contents(copy)  # which also looks for stale versions
        assert again["doc-00"] == state["doc-00"] == contents(source)["doc-00"]
        assert again["doc-01"][0] == replace(state["doc-01"][0], state_hash=None)
        assert set(again["doc-01"][1]) == {"kv"}


def test_the_command_merges_and_says_what(manuals: FrozenModel, tmp_path: Path) -> None:
    a, b = (finished(tmp_path / n, manuals, part(s)) for n, s in (("a", slice(0, 3)), ("b", slice(3, 6))))
    status, out, err = call(tool.main, "merge", "all", str(a), str(b))
    assert (status, out) == (0, "all: 6 cartridges of 2 stores\n"), err
    assert call(tool.main, "verify", "--store", "all")[0] == 0
    words = ("Which valve?", "--store", "all", "--documents", "doc-00,doc-05", "--max-new-tokens", "3", "--json")
    status, out, err = call(query.main, *words)
    assert status == 0 and [c["id"] for c in json.loads(out)["cartridges"]] == ["doc-00", "doc-05"], err
    status, _, err = call(tool.main, "merge", "all", str(a), str(b))
    assert status == 2 and err == "cas: all exists already; name a new folder for the merged store\n"
