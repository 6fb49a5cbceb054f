"""Matched starts: exact where nothing is left out, better than the first tokens where it is, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from helpers_store import make_store

from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.conversations import Conversation, Conversations
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


def test_the_trainer_fits_what_nobody_has(tmp_path: Path, model: FrozenModel, collection: object) -> None:
    store = make_store(tmp_path / "s", model, collection, initialisation="matched", tokens=16)
    items = [c for i in store.rows() for c in conversations(model, model.encode(store.text(i)), 6, i)]
    trainer = Trainer(model, store, Conversations(items, {}), Training(steps=1))
    assert not trainer.run(stop=lambda: True) and all(row.version == 0 for row in store.rows().values())
    assert trainer.run()
    long = [i for i, row in store.rows().items() if row.tokens > row.p]
    assert long and all(store.row(i).version > 0 for i in long)
