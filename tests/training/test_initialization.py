"""First values of cartridges, in new and old stores. Matched ones are exact where nothing is left out, and resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from helpers_store import contents, make_store

from cas.data.collection import Collection
from cas.errors import StoreMismatch
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import Initialization
from cas.selfstudy.conversations import Conversation, Conversations
from cas.store.records import blob_keys, row_key
from cas.store.store import Store
from cas.training.initialization import _Matching, initialize, initialize_cartridges, matched
from cas.training.trainer import Trainer, Training


def conversations(model: FrozenModel, ids: list[int], count: int, document: str = "d") -> list[Conversation]:
    """Random questions, each with what the model answers after the document: a few most likely tokens and their log-probabilities."""
    random, found = Random(0), []
    prefix = model.prefill([*model.template.header_ids, *ids])
    for n in range(count):
        prompt = np.array(random.choices(range(5, 60), k=random.randint(3, 9)), np.int32)
        answer = np.array([*random.choices(range(5, 60), k=3), model.template.end_ids[0]], np.int32)
        blank = np.zeros((4, 8))
        one = Conversation(
            document, "question", f"{n}", prompt, answer, blank.astype(np.int32), blank.astype(np.float32)
        )
        layout = Layout("offset", model.layout_header, len(ids))
        logits = student(model, {"d": prefix[:, :, :, model.layout_header :].float()}, layout, one).float()
        top = logits.log_softmax(-1).topk(8)
        found.append(
            Conversation(document, "question", f"{n}", prompt, answer, top.indices.int().numpy(), top.values.numpy())
        )
    return found


def student(model: FrozenModel, cartridges: dict[str, torch.Tensor], layout: Layout, one: Conversation) -> torch.Tensor:
    """Logits of the rows that predict the answer, behind these cartridges."""
    from cas.model.attention import Batch, Reference, packed_positions

    tokens = one.tokens(model)
    batch = Batch((len(tokens),), (tuple(cartridges),))
    context = Reference(batch, model.header_kv, cartridges, layout, model.rope)
    positions = packed_positions(batch, {n: kv.shape[3] for n, kv in cartridges.items()}, layout)
    with torch.no_grad():
        return model.forward(torch.tensor([tokens]), positions, context)[0, -len(one.answer) :]


def loss(model: FrozenModel, kv: torch.Tensor, layout: Layout, asked: list[Conversation]) -> float:
    from cas.training.loss import distillation_loss

    each = [
        distillation_loss(
            student(model, {"d": kv}, layout, c), torch.from_numpy(c.top_ids).long(), torch.from_numpy(c.top_logprobs)
        ).mean()
        for c in asked
    ]
    return float(torch.stack(each).mean())


@pytest.fixture
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


KINDS = ["llama", "qwen3", "gemma3", "mistral"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_every_token_it_is_the_documents_kv(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model, ids = tiny(kind), list(range(5, 37))
    asked = conversations(model, ids, 6)
    kv = matched(model, Layout("offset", model.layout_header, 32), ids, 32, asked, seed=0)
    whole = model.prefill([*model.template.header_ids, *ids])[:, :, :, model.layout_header :]
    torch.testing.assert_close(kv, whole.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["fixed", "offset", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_better_than_the_first_tokens(kind: str, policy: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    ids = Random(1).choices(range(5, 60), k=48)
    asked = conversations(model, ids, 40)
    asked, others = asked[:32], asked[32:]
    layout = Layout(policy, model.layout_header, 16)  # type: ignore[arg-type]
    kv = matched(model, layout, ids, 16, asked, seed=0)
    assert loss(model, kv, layout, others) < 0.8 * loss(model, initialize(model, ids, 16, "first", 0), layout, others)


def test_padding_changes_nothing(tiny: Callable[..., FrozenModel]) -> None:
    model, ids = tiny("llama"), Random(2).choices(range(5, 60), k=40)
    asked = conversations(model, ids, 8)
    layout = Layout("fixed", model.layout_header, 16)
    kv = matched(model, layout, ids, 16, asked, seed=0)
    prefix = model.prefill([*model.template.header_ids, *ids])
    tokens = [c.tokens(model) for c in asked]
    width = max(map(len, tokens)) + 5
    padded = torch.tensor([t + [9] * (width - len(t)) for t in tokens])
    real = torch.arange(width)[None] < torch.tensor([[len(t)] for t in tokens])
    context = _Matching(model, prefix, 16, real, layout.token_start([16]))
    with torch.no_grad():
        model.hidden(padded, torch.arange(width)[None].expand(len(tokens), -1) + prefix.shape[3], context)
    torch.testing.assert_close(torch.stack(context.kv), kv, atol=1e-4, rtol=1e-3)


def test_fitting_goes_on_where_it_stopped_and_leaves_the_trained_alone(
    tmp_path: Path, model: FrozenModel, collection: object
) -> None:
    def begun(folder: str) -> tuple:
        store = make_store(tmp_path / folder, model, collection, initialisation="matched", tokens=16)
        items = [c for i, row in store.rows().items() for c in conversations(model, model.encode(store.text(i)), 6, i)]
        return store, Conversations(items, {})

    whole, asked = begun("whole")
    first = {i: whole.cartridge(i) for i in whole.rows()}
    assert initialize_cartridges(model, whole, asked)
    fitted = {i: whole.cartridge(i) for i in whole.rows()}
    assert any(not torch.equal(first[i], fitted[i]) for i in first)

    halves, _ = begun("halves")
    calls: list[int] = []
    assert not initialize_cartridges(
        model, halves, asked, stop=lambda: len(calls) == 1, progress=lambda done, total: calls.append(done)
    )
    assert initialize_cartridges(model, halves, asked)
    assert all(torch.equal(halves.cartridge(i), fitted[i]) for i in fitted)

    Trainer(model, whole, asked, Training(steps=3, targets=1, per_target=2, rotate_every=1)).run()
    trained = {i: whole.cartridge(i) for i in whole.rows()}
    assert initialize_cartridges(model, whole, asked)
    assert all(torch.equal(whole.cartridge(i), trained[i]) for i in trained)


def asked_about(model: FrozenModel, documents: Collection) -> Conversations:
    """Conversations about every document but the tide."""
    return Conversations(
        [c for d in documents.documents if d.id != "tide" for c in conversations(model, model.encode(d.text), 6, d.id)],
        {},
    )


@pytest.mark.parametrize("how", ["first", "sampled", "random", "matched"])
def test_each_initialization_gives_its_values(
    tmp_path: Path, model: FrozenModel, collection: Collection, how: Initialization
) -> None:
    """Of the document, its seed and its conversations alone; a document without conversations starts as ``first``."""
    asked = asked_about(model, collection)
    with Store.create(tmp_path / "s", model, tokens=16, initialisation=how, seed=3) as store:
        store.add_documents(collection, model.count_tokens)
        assert initialize_cartridges(model, store, asked)
        for document in collection.documents:
            ids, seed = model.encode(document.text), int(document.hash[:15], 16) ^ 3
            expected = initialize(model, ids, 16, how, seed)
            if how == "matched" and document.id != "tide":
                expected = matched(model, store.layout, ids, 16, asked.by_document[document.id], seed)
            assert torch.equal(store.cartridge(document.id), expected)
        assert {row.id: row.version for row in store.rows().values()} == {
            d.id: int(how == "matched" and d.id != "tide") for d in collection.documents
        }
        before = contents(store)
        assert initialize_cartridges(model, store, asked, stop=lambda: True)  # nothing is left to do
        assert contents(store) == before


def test_another_model_initializes_nothing(
    tmp_path: Path, model: FrozenModel, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    with Store.create(tmp_path / "s", model, tokens=16) as store:
        store.add_documents(collection, model.count_tokens)
        with pytest.raises(StoreMismatch, match="open it with the model it was made with"):
            initialize_cartridges(tiny("llama", seed=1), store)
        assert not any(row.initialized for row in store.rows().values())


def as_format_2(store: Store, without: Collection, unfitted: Sequence[str]) -> None:
    """Rewrite the records of a store as versions before format 3 wrote them, as if they had been killed in the middle: some documents
    have a text but no row yet, others (``unfitted``) still the values of ``first`` as version 0."""
    model = tiny_model("llama")
    with store.training():
        for name in unfitted:
            row = store.row(name)
            store.write_tensors(
                name, {"kv": initialize(model, model.encode(store.text(name)), row.p, "first", 0)}, version=0
            )
        store.commit(store.rows(), None)

    def rewrite(txn: Any) -> None:
        for key, value in list(txn.cursor()):
            if key == b"meta" or key.startswith(b"row/"):
                fields = json.loads(value)
                del fields["checksum"]
                if key == b"meta":
                    fields["format"] = 2
                txn.put(key, json.dumps(fields, ensure_ascii=False, sort_keys=True).encode())
        for document in without.documents:
            txn.delete(row_key(document.id))
            for blob in blob_keys(document.id, 1):
                txn.delete(blob)

    store.records.write(rewrite)
    store.close()


@pytest.mark.filterwarnings("ignore:nothing to train on about tide")
def test_a_store_of_format_2_goes_on_to_the_same_values(
    tmp_path: Path, model: FrozenModel, collection: Collection
) -> None:
    asked = asked_about(model, collection)
    settings = Training(steps=4, targets=2, per_target=2, rotate_every=1, pool=3)

    def begun(folder: str) -> Store:
        store = Store.create(tmp_path / folder, model, tokens=16)
        store.add_documents(collection, model.count_tokens)
        initialize_cartridges(model, store, asked)
        return store

    whole, old = begun("whole"), begun("old")
    initial = {i: whole.cartridge(i) for i in whole.rows()}
    Trainer(model, whole, asked, settings).run()

    as_format_2(old, collection.select(["crane", "ferry"]), ["lamp"])
    with Store.open(old.folder) as read:
        assert read.meta["format"] == 2 and set(read.rows()) == {"lamp", "pump", "tide"}
        assert read.row("lamp").version == 0 and not torch.equal(read.cartridge("lamp"), initial["lamp"])
        assert read.verify() == [] and len(read.texts()) == 3
    with Store.open(old.folder, write=True) as store:
        assert store.meta["format"] == 2  # until something is written
        store.add_documents(collection, model.count_tokens)
        assert initialize_cartridges(model, store, asked)
        assert all(torch.equal(store.cartridge(i), kv) for i, kv in initial.items())
        Trainer(model, store, asked, settings).run()
        assert store.meta["format"] == 3 and store.verify() == []
        assert contents(store) == contents(whole)
    whole.close()


def test_the_trainer_fits_what_nobody_has(tmp_path: Path, model: FrozenModel, collection: object) -> None:
    store = make_store(tmp_path / "s", model, collection, initialisation="matched", tokens=16)
    items = [c for i in store.rows() for c in conversations(model, model.encode(store.text(i)), 6, i)]
    trainer = Trainer(model, store, Conversations(items, {}), Training(steps=1))
    assert not trainer.run(stop=lambda: True) and all(row.version == 0 for row in store.rows().values())
    assert trainer.run()
    long = [i for i, row in store.rows().items() if row.tokens > row.p]
    assert long and all(store.row(i).version > 0 for i in long)


def test_the_trainer_initializes_a_new_store(tmp_path: Path, model: FrozenModel, collection: Collection) -> None:
    asked = asked_about(model, collection)
    with Store.create(tmp_path / "s", model, tokens=16, initialisation="first") as store:
        store.add_documents(collection, model.count_tokens)
        with pytest.warns(UserWarning, match="nothing to train on about tide: left as initialized"):
            trainer = Trainer(model, store, asked, Training(steps=2))
        assert not trainer.run(stop=lambda: True) and not any(row.initialized for row in store.rows().values())
        assert trainer.run() and all(row.initialized for row in store.rows().values())
        ids = model.encode(store.text("tide"))
        assert torch.equal(store.cartridge("tide"), initialize(model, ids, 16, "first", 0))
