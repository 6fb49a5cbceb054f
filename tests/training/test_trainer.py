"""The joint loop: it learns, memory never changes a bit, and neither does being killed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_store
import numpy as np
import pytest
import torch
from conftest import tiny_hf, tiny_tokenizer
from helpers_store import contents, converse, log, make_store, many_documents
from torch import Tensor

from budget.manager import Manager
from budget.memory_plan import Sizes, activation_bytes
from cas.data.collection import Collection
from cas.errors import ConfigError, RunError
from cas.model.attention import Batch, Reference
from cas.model.frozen import FrozenModel, Source
from cas.model.positions import Layout
from cas.selfstudy.conversations import Conversation, Conversations
from cas.store.store import Store
from cas.training import loss_guard, micro_batches
from cas.training.micro_batches import kept_bytes, kept_per_token
from cas.training.optim import learning_rate
from cas.training.schedule import Example, Step
from cas.training.trainer import Report, StepResult, Trainer, Training

MIXED: dict[str, Any] = {
    "steps": 12, "lr": 0.02, "warmup": 3, "pool": 3, "targets": 2, "per_target": 2, "isolation": 0.3, "max_distractors": 4,
    "rotate_every": 2, "checkpoint_every": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def documents() -> Collection:
    return many_documents(6)


@pytest.fixture(scope="module")
def conversations(model: FrozenModel, documents: Collection) -> Conversations:
    return converse(model, documents, per_document=4)


@pytest.fixture
def new_store(tmp_path: Path, model: FrozenModel, documents: Collection) -> Iterator[Callable[..., Store]]:
    """``new_store(name, **settings)``: a store of the documents, closed in the end."""
    stores: list[Store] = []

    def make(name: str = "store", **settings: Any) -> Store:
        stores.append(make_store(tmp_path / name, model, documents, **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


# -- learning -----------------------------------------------------------------------------------------------------------


FIFTY: dict[str, Any] = {
    "steps": 50,
    "lr": 0.2,
    "warmup": 5,
    "pool": 4,
    "targets": 4,
    "per_target": 2,
    "max_distractors": 3,
}


@pytest.mark.parametrize("initialisation", ["first", "sampled", "random"])
def test_fifty_steps_learn(tmp_path: Path, model: FrozenModel, initialisation: str) -> None:
    """Gate 0: the loss falls below a tenth of where it starts."""
    documents = many_documents(4)
    store = make_store(tmp_path / "s", model, documents, initialisation=initialisation, tokens=32)
    assert Trainer(model, store, converse(model, documents, per_document=2), isolation=1, **FIFTY).run()
    losses = [line["loss"] for line in log(store)]
    assert len(losses) == 50
    assert np.mean(losses[-4:]) < losses[0] / 10
    assert {(row.steps, row.drawn) for row in store.rows().values()} == {(50, 100)}
    store.close()


def test_only_joint_training_survives_loading_all(tmp_path: Path, model: FrozenModel) -> None:
    """What the method is for: alone both are learned, but with all loaded isolated training has learned next to
    nothing. Distractors that learn too, all of them targets, help more."""
    documents = many_documents(4)
    talks = converse(model, documents, per_document=2)
    items = [c for cs in talks.by_document.values() for c in cs]
    losses = {}
    for case, options in {
        "isolated": {"isolation": 1},
        "joint": {"isolation": 0.25, "distractor_gradients": False},
        "all learn": {"isolation": 0.25},
    }.items():
        store = make_store(tmp_path / case, model, documents, tokens=32)
        trainer = Trainer(model, store, talks, **FIFTY, **options)
        names = tuple(store.rows())

        def measure(
            alone: bool, trainer: Trainer = trainer, store: Store = store, names: tuple[str, ...] = names
        ) -> float:
            cartridges = {name: store.cartridge(name) for name in names}
            with torch.no_grad():
                return float(trainer.loss(items, [(c.document,) if alone else names for c in items], cartridges)[0])

        start = measure(alone=False)
        trainer.run()
        losses[case] = measure(alone=True) / start, measure(alone=False) / start
        store.close()
    assert losses["isolated"][0] < 0.05 and losses["isolated"][1] > 0.5
    assert losses["joint"][0] < 0.2 and losses["joint"][1] < 0.3
    assert losses["all learn"][0] < 0.2 and losses["all learn"][1] < min(0.2, losses["joint"][1])


def test_next_token_objective_learns(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    store = new_store()
    one = {"objective": "next-token", "isolation": 1, "pool": 1, "targets": 1, "rotate_every": 99}
    Trainer(model, store, conversations, **(FIFTY | one)).run()
    losses = [line["loss"] for line in log(store)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) / 2


# -- one step by hand ---------------------------------------------------------------------------------------------------


def plain_loss(
    model: FrozenModel,
    items: list[Conversation],
    visible: list[tuple[str, ...]],
    cartridges: dict[str, Tensor],
    layout: Layout,
    distractor_gradients: bool,
) -> Tensor:
    """Conversation by conversation: the reference attention and an explicit KL over k + 1 classes; other documents'
    cartridges are detached unless distractors get gradients."""
    losses = []
    for item, seen in zip(items, visible, strict=True):
        own = item.tokens(model)
        learns = {n: kv if distractor_gradients or n == item.document else kv.detach() for n, kv in cartridges.items()}
        context = Reference(Batch((len(own),), (seen,)), model.header_kv, learns, layout, model.rope)
        positions = torch.arange(len(own)) + layout.token_start([cartridges[name].shape[3] for name in seen])
        logits = model.forward(torch.tensor([own]), positions[None], context)[0, -len(item.answer) :]
        q = logits.double().softmax(-1)
        p = torch.from_numpy(item.top_logprobs).double().exp()
        for t in range(len(item.answer)):
            ids = torch.from_numpy(item.top_ids[t]).long()
            rest_p, rest_q = 1 - p[t].sum(), 1 - q[t, ids].sum()
            losses.append((p[t] * (p[t] / q[t, ids]).log()).sum() + rest_p * (rest_p / rest_q).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("positions", ["fixed", "offset", "sequential"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("distractor_gradients", [False, True])
def test_loss_equals_a_plain_computation(
    tmp_path: Path,
    tiny: Callable[..., FrozenModel],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    positions: str,
    chunked: bool,
    distractor_gradients: bool,
) -> None:
    """Loss and gradients, with every cartridge a target that others see as a distractor: off, a cartridge's gradient
    is that of its own conversations alone."""
    model, documents = tiny(kind), many_documents(3, words=30)
    if chunked:
        monkeypatch.setattr("cas.training.loss.AT_ONCE", 5 * model.geometry.vocabulary)
    else:
        monkeypatch.setattr(model, "head", None)
    store = make_store(tmp_path / "s", model, documents, tokens=None, ratio=2, positions=positions)
    assert len({row.p for row in store.rows().values()}) > 1
    talks = converse(model, documents, per_document=2)
    trainer = Trainer(model, store, talks, distractor_gradients=distractor_gradients)
    items = [talks.by_document[name][n] for n, name in ((0, "doc-00"), (1, "doc-00"), (0, "doc-02"), (1, "doc-01"))]
    visible = [("doc-00",), ("doc-00", "doc-02"), ("doc-00", "doc-01", "doc-02"), ("doc-01",)]
    ours = {name: store.cartridge(name).requires_grad_() for name in store.rows()}
    theirs = {name: kv.detach().clone().requires_grad_() for name, kv in ours.items()}
    loss, tokens = trainer.loss(items, visible, ours)
    expected = plain_loss(model, items, visible, theirs, store.layout, distractor_gradients)
    assert tokens == sum(len(item.tokens(model)) for item in items)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    for name in ours:
        assert ours[name].grad is not None and ours[name].grad.abs().max() > 0
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
    store.close()


def started(
    model: FrozenModel, store: Store, conversations: Conversations, pool: tuple[str, ...], **options: Any
) -> Trainer:
    """A trainer at step 0 with this pool resident."""
    trainer = Trainer(model, store, conversations, **options)
    trainer._resume()
    trainer.manager.rotate(pool, ())
    return trainer


def by_hand(step: int, own_step: int, trainer: Trainer) -> float:
    t = trainer.training
    return learning_rate(t.lr, own_step, t.warmup, step, trainer.steps, t.final_lr)


@pytest.mark.parametrize("distractor_gradients", [False, True])
def test_steps_equal_torch_adam(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, distractor_gradients: bool
) -> None:
    """Only targets move, each by its own Adam with its own step count; a distractor's gradient waits for its turn."""
    store, pool = new_store(), ("doc-00", "doc-01", "doc-02")
    trainer = started(
        model, store, conversations, pool, steps=6, lr=0.05, warmup=2, distractor_gradients=distractor_gradients
    )
    work = [
        Step(("doc-00",), (Example("doc-00", 0, ("doc-00", "doc-01")), Example("doc-00", 1, ("doc-00",)))),
        Step(("doc-00", "doc-02"), (Example("doc-00", 2, ("doc-00", "doc-01")), Example("doc-02", 0, ("doc-02",)))),
        Step(("doc-01",), (Example("doc-01", 0, pool),)),
        Step(("doc-02",), (Example("doc-02", 1, ("doc-02",)),)),
    ]
    mine = {name: store.cartridge(name).requires_grad_() for name in pool}
    adams = {name: torch.optim.Adam([kv], fused=True) for name, kv in mine.items()}
    own_steps = dict.fromkeys(pool, 0)
    waiting: dict[str, Tensor] = {}
    for step, each in enumerate(work):
        before = {name: slot.kv.clone() for name, slot in trainer.manager.trainees.items()}
        loss, tokens, lr = trainer.train_step(step, each)
        items = [conversations.by_document[e.document][e.index] for e in each.examples]
        expected, _ = trainer.loss(items, [e.visible for e in each.examples], mine)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
        assert tokens == sum(len(item.tokens(model)) for item in items)
        for kv in mine.values():
            kv.grad = None
        expected.backward()
        for name, kv in mine.items():
            slot = trainer.manager.trainees[name]
            if name in each.targets:
                if name in waiting:
                    kv.grad += waiting.pop(name)
                own_steps[name] += 1
                lr = by_hand(step, own_steps[name], trainer)
                adams[name].param_groups[0]["lr"] = lr
                adams[name].step()
                assert slot.pending is None
                assert not torch.equal(slot.kv, before[name])
            else:
                if distractor_gradients and kv.grad is not None:
                    waiting[name] = waiting.get(name, torch.zeros_like(kv)) + kv.grad
                assert torch.equal(slot.kv, before[name])
                assert (slot.pending is not None) == (name in waiting)
            torch.testing.assert_close(slot.kv, kv.detach(), rtol=1e-6, atol=1e-6)
    assert (
        {name: trainer.state.rows[name].steps for name in pool} == {"doc-00": 2, "doc-01": 1, "doc-02": 2} == own_steps
    )
    trained = sum(len(conversations.by_document["doc-00"][n].tokens(model)) for n in range(3))
    assert (trainer.state.rows["doc-00"].drawn, trainer.state.rows["doc-00"].trained_tokens) == (3, trained)
    assert (set(waiting) == {"doc-00"}) == distractor_gradients  # seen by doc-01's conversation and not target since


def test_distractor_gradients_matter_when_every_cartridge_is_a_target(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    """Off, a step with as many targets as the pool holds moves a cartridge as if the others were frozen distractors."""
    pool, moved = ("doc-00", "doc-01", "doc-02"), {}
    examples = tuple(Example(name, n, pool) for name in pool for n in range(2))
    for on in (False, True):
        store = new_store(f"gradients-{on}")
        trainer = started(model, store, conversations, pool, steps=2, lr=0.05, warmup=1, distractor_gradients=on)
        for slot in trainer.manager.trainees.values():
            assert not slot.exp_avg.any()
        trainer.train_step(0, Step(pool, examples))
        moved[on] = {name: slot.exp_avg.clone() for name, slot in trainer.manager.trainees.items()}
    alone = {}
    store = new_store("alone")
    values = {name: store.cartridge(name) for name in pool}
    trainer = Trainer(model, store, conversations, distractor_gradients=True)  # whatever is given learns
    for name in pool:
        leaf = values[name].clone().requires_grad_()
        items = [conversations.by_document[e.document][e.index] for e in examples if e.document == name]
        loss, _ = trainer.loss(items, [pool] * len(items), values | {name: leaf})
        answers = sum(len(conversations.by_document[e.document][e.index].answer) for e in examples)
        (loss * sum(len(item.answer) for item in items) / answers).backward()
        assert leaf.grad is not None
        alone[name] = 0.1 * leaf.grad  # Adam's first moment after one step
    for name in pool:
        torch.testing.assert_close(moved[False][name], alone[name], rtol=1e-4, atol=1e-8)
        assert (moved[True][name] - alone[name]).abs().max() > 0.01 * alone[name].abs().max()


def test_guests_are_seen_and_never_change(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    store = new_store()
    before = contents(store)
    seen: set[tuple[str, ...]] = set()
    trainer = Trainer(
        model, store, conversations, **(MIXED | {"pool": 2, "guests": 2, "rotate_every": 100, "isolation": 0})
    )
    original = trainer.train_step

    def watch(step: int, work: Step) -> StepResult:
        assert set(trainer.manager.trainees).isdisjoint(trainer.manager.guests)
        seen.update(e.visible for e in work.examples)
        return original(step, work)

    trainer.train_step = watch  # type: ignore[method-assign]
    trainer.run()
    pool, guests = set(trainer.manager.trainees), set(trainer.manager.guests)
    assert len(pool) == len(guests) == 2
    assert any(guests & set(visible) for visible in seen)
    assert all(set(visible) <= pool | guests for visible in seen)
    after = contents(store)
    assert {name for name in before if before[name] != after[name]} == pool


def test_the_plan_is_an_upper_bound(tmp_path: Path, tiny: Callable[..., FrozenModel]) -> None:
    """What autograd really keeps of a step, weights and cartridges aside, is what micro-batches are cut by; and with
    what comes on top, the planner's figure."""
    documents = many_documents(6, words=60)
    for kind in ("llama", "qwen3", "gemma3"):
        model = tiny(kind)
        talks = converse(model, documents, per_document=8)
        store = make_store(tmp_path / kind, model, documents, tokens=64)
        names = tuple(store.rows())
        ours = {name: store.cartridge(name).requires_grad_() for name in names}
        items = [c for name in names for c in talks.by_document[name]]
        lengths = [len(c.tokens(model)) for c in items]
        mixed = [names[: n % 5] if c.document in names[: n % 5] else (c.document,) for n, c in enumerate(items)]
        for visible in (mixed, [names] * len(items), [(c.document,) for c in items]):
            known = {t.untyped_storage().data_ptr() for t in [*model.hf.state_dict().values(), *ours.values()]}
            kept: dict[int, tuple[int, Tensor]] = {}

            def keep(tensor: Tensor, kept: dict[int, tuple[int, Tensor]] = kept, known: set[int] = known) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    kept[storage.data_ptr()] = storage.nbytes(), tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                Trainer(model, store, talks).loss(items, visible, ours)
            g, rows = model.geometry, sum(len(c.answer) for c in items)
            counted = kept_bytes(model, lengths, [model.layout_header + 64 * len(seen) for seen in visible])
            sizes = Sizes(
                weights=0, element=4, largest=0, total=0, documents=6, tokens=0, kept=counted, per_token=kept_per_token(model),
                seen=6, logit_rows=rows, layers=g.layers, hidden=g.hidden, intermediate=64, vocabulary=g.vocabulary,
                query_heads=g.query_heads, kv_heads=g.kv_heads, head_dim=g.head_dim, longest=max(lengths),
                whole_logits=model.head is None,
            )  # fmt: skip
            measured = sum(size for size, _ in kept.values())
            logits = 4 * rows * g.vocabulary * 4 if model.head is None else 4 * rows * g.hidden
            assert measured - logits < 1.02 * counted < 1.05 * measured
            assert measured < activation_bytes(sizes) < 3.5 * measured  # the tiny ones have three layers
        store.close()


def test_micro_batches_add_up_to_the_whole_step(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a step is cut, loss and gradients are those of the whole; a part keeps no more than the limit."""
    store = new_store()
    names = tuple(store.rows())
    items = [c for name in names for c in conversations.by_document[name]]
    visible = [names if n % 3 else (c.document,) for n, c in enumerate(items)]
    lengths = [len(c.tokens(model)) for c in items]
    prefixes = [model.layout_header + 16 * len(seen) for seen in visible]
    results, counts = [], []
    for tokens in (10_000, 200, 1):
        monkeypatch.setattr(micro_batches, "TOKENS_AT_ONCE", (tokens, 0))
        parts = micro_batches.micro_batches(model, lengths, prefixes)
        assert [i for part in parts for i in range(len(items))[part]] == list(range(len(items)))
        for part in parts:
            kept = micro_batches.kept_bytes(model, lengths[part], prefixes[part])
            assert kept <= micro_batches.most_kept(model) or part.stop - part.start == 1
        ours = {name: store.cartridge(name).requires_grad_() for name in names}
        loss, own = Trainer(model, store, conversations, **MIXED).backward(items, visible, ours)
        assert own == sum(lengths)
        results.append((loss, {name: kv.grad for name, kv in ours.items()}))
        counts.append(len(parts))
    assert counts[0] == 1 < counts[1] < counts[2] == len(items)
    (whole, expected), *others = results
    for loss, gradients in others:
        assert loss == pytest.approx(whole, rel=1e-5)
        for name in names:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-7)


# -- memory moves bytes, nothing else -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guests": 2},
        {"distractor_gradients": True},
        {"guests": 2, "distractor_gradients": True},
        {"positions": "sequential"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_memory_never_changes_a_bit(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Gate 4: straight to disk, through a host that spills, through one that holds all, and never leaving the
    device."""
    settings = {"positions": options.get("positions", "fixed")}
    options = {k: v for k, v in options.items() if k != "positions"}
    one = 4 * model.geometry.elements(16)

    def train(name: str, host_bytes: int | None, **more: bool) -> tuple[Any, list[Any], Manager]:
        store = new_store(name, **settings)
        trainer = Trainer(model, store, conversations, host_bytes=host_bytes, **(MIXED | options))
        vars(trainer).update(more)
        assert trainer.run()
        assert store.verify() == []
        return contents(store), log(store), trainer.manager

    disk = train("disk", 0)
    some = train("some", 5 * one)
    host = train("host", None)
    ahead = train("ahead", 0, ahead=True)
    assert disk[:2] == some[:2] == host[:2] == ahead[:2]
    forwards, forward = 0, model.hf.base_model.layers[0].self_attn.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return forward(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(model.hf.base_model.layers[0].self_attn, "forward", counted)
        assert train("twice", 0, recompute=True)[:2] == disk[:2]
    assert forwards == 2 * MIXED["steps"] + 6  # and once for the start of every cartridge
    # Whoever entered after the first rotation, and did not just leave, had been read by then.
    counters = ahead[2].counters
    assert counters.store_reads == disk[2].counters.store_reads
    assert counters.store_reads - counters.read_ahead <= 3 + options.get("guests", 0) * counters.rotations
    assert counters.read_ahead >= counters.rotations - 2 > 0
    assert disk[2].counters.store_reads >= some[2].counters.store_reads > host[2].counters.store_reads >= 6
    assert disk[2].counters.store_writes > host[2].counters.store_writes
    assert disk[2].ledger.peak["host"] == 0 < some[2].ledger.peak["host"] <= 5 * one < host[2].ledger.peak["host"]
    if options.get("distractor_gradients"):
        assert any("pending" in tensors for _, tensors in disk[0].values())

    # All six stay on the device for good; the schedule still sees a pool of three.
    class Resident(Manager):
        def rotate(self, pool: Any, guests: Any) -> None:
            for name in [n for n in store.rows() if n not in self.everyone]:
                self._admit(name)
                self.everyone[name] = self.trainees.pop(name)
            self.trainees = {name: self.everyone[name] for name in pool}
            self.guests = {name: self.everyone[name].kv.to(self.guest_dtype, copy=True) for name in guests}

        def flush(self, before_write: Any = None) -> list[str]:
            self.trainees, few = self.everyone, self.trainees
            written = super().flush(before_write)
            self.trainees = few
            return written

        everyone: dict[str, Any] = {}  # noqa: RUF012

    Resident.everyone = {}
    monkeypatch.setattr("cas.training.trainer.Manager", Resident)
    store = new_store("resident", **settings)
    trainer = Trainer(model, store, conversations, **(MIXED | options))
    assert trainer.run()
    assert (contents(store), log(store)) == disk[:2]
    assert trainer.manager.counters.store_reads == 6


def test_device_limit_is_kept(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    store, elements = new_store(), model.geometry.elements(16)
    limit = 3 * 16 * elements + 2 * 2 * elements
    trainer = Trainer(model, store, conversations, device_bytes=limit, **(MIXED | {"guests": 2}))
    assert trainer.run()
    assert trainer.manager.ledger.peak["device"] == limit


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_run_gives_the_same_bits(tmp_path: Path, threads: int) -> None:
    """With steps so large that parallel kernels split their work, and one head, so that they split it across
    documents."""
    model = FrozenModel(tiny_hf("llama", num_key_value_heads=1), tiny_tokenizer(), Source("folder", "one-head"))
    documents = many_documents(6, words=60)
    talks = converse(model, documents, per_document=8)
    options = {**MIXED, "steps": 3, "pool": 6, "targets": 4, "per_target": 6, "isolation": 0, "max_distractors": 5}
    torch.set_num_threads(threads)
    try:
        runs = []
        for n in range(3):
            store = make_store(tmp_path / str(n), model, documents, tokens=64)
            Trainer(model, store, talks, **options).run()
            runs.append((contents(store), log(store)))
            store.close()
    finally:
        torch.set_num_threads(1)
    assert runs[0] == runs[1] == runs[2]


# -- checkpoints --------------------------------------------------------------------------------------------------------


def test_stopped_and_gone_on_with_equals_uninterrupted(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    options = {**MIXED, "guests": 1, "distractor_gradients": True}
    whole, parts, steps = new_store("whole"), new_store("parts"), iter(range(4))
    assert Trainer(model, whole, conversations, **options).run()
    assert not Trainer(model, parts, conversations, **options).run(stop=lambda: next(steps, None) is None)
    assert parts.run_state()["step"] == 4  # type: ignore[index]
    trainer = Trainer(model, parts, conversations, **options, host_bytes=None)
    assert not trainer.run(until=6)
    assert not trainer.run(until=6)
    assert [line["step"] for line in log(parts)] == list(range(6))
    assert trainer.run()
    assert Trainer(model, parts, conversations, **options).run()  # nothing left to do
    assert (contents(parts), log(parts)) == (contents(whole), log(whole))
    assert parts.run_state() == whole.run_state()


def test_killed_anywhere_and_gone_on_with_equals_never_killed(tmp_path: Path) -> None:
    """Gate 5: SIGKILL at steps, around and inside write transactions, around commits; once, and again and again."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, helpers_store.__file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    documents = helpers_store.ingredients()[1]

    def result(folder: Path) -> tuple[Any, Any, Any]:
        store = Store.open(folder)
        assert store.verify() == []
        assert list(store.rows()) == [d.id for d in documents.documents]
        found = contents(store), log(store), store.run_state()
        store.close()
        return found

    expected = result(tmp_path / "whole")
    assert [line["step"] for line in expected[1]] == list(range(helpers_store.SETTINGS["steps"]))
    assert any("pending" in tensors for _, tensors in expected[0].values())
    folders = sorted(tmp_path.glob("killed-*"))
    assert len(folders) == 16
    for folder in folders:
        assert result(folder) == expected, (folder / "killed.json").read_text()


def test_a_failed_run_keeps_its_last_checkpoint(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that stays non-finite is reported in one line; the same trainer goes on from the checkpoint, with no step
    twice."""
    whole, store = new_store("whole"), new_store("store")
    Trainer(model, whole, conversations, **MIXED).run()
    trainer = Trainer(model, store, conversations, host_bytes=None, **MIXED)
    original = trainer.loss

    def explode(*arguments: Any) -> tuple[Tensor, int]:
        loss, tokens = original(*arguments)
        return loss * float("nan") if trainer.state.rows["doc-00"].steps >= 3 else loss, tokens

    monkeypatch.setattr(trainer, "loss", explode)
    monkeypatch.setattr(loss_guard, "END_AFTER", 1)
    with pytest.raises(RunError, match=r"^at step [6-9] the loss is nan .* lower --lr$"):
        trainer.run()
    monkeypatch.undo()
    assert store.run_state()["step"] == 5  # type: ignore[index]
    assert store.verify() == []
    monkeypatch.setattr(trainer, "loss", original)
    assert trainer.run()
    assert (contents(store), log(store)) == (contents(whole), log(whole))


def test_a_non_finite_gradient_never_reaches_a_cartridge(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store()
    trainer = Trainer(model, store, conversations, **(MIXED | {"checkpoint_every": 1}))
    original = trainer.loss

    def explode(items: Any, visible: Any, cartridges: Any) -> tuple[Tensor, int]:
        loss, tokens = original(items, visible, cartridges)
        leaf = next(kv for kv in cartridges.values() if kv.requires_grad)
        return loss + (leaf * 0).sum().sqrt(), tokens  # finite, with a gradient of 0 * inf

    monkeypatch.setattr(trainer, "loss", explode)
    before = {name: store.cartridge(name) for name in store.rows()}
    with pytest.raises(
        RunError, match=r"^at step 11 the loss is \d.* or its gradient is not finite, for the 12th time"
    ):
        trainer.run()
    assert store.verify() == [] and all(torch.equal(store.cartridge(n), kv) for n, kv in before.items())


def change_loss(trainer: Trainer, steps: set[int], value: float = float("nan")) -> None:
    """Multiply the loss of these steps by ``value``, and so its gradient."""
    loss, step, now = trainer.loss, trainer.train_step, [0]

    def changed(*arguments: Any) -> tuple[Tensor, int]:
        found, tokens = loss(*arguments)
        return (found * value if now[0] in steps else found), tokens

    def counted(number: int, work: Any) -> Any:
        now[0] = number
        return step(number, work)

    trainer.loss, trainer.train_step = changed, counted  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_step_with_an_impossible_loss_is_skipped_and_counted(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, value: float
) -> None:
    """Nothing moves in it, and a run that is cut there goes on to the same end."""
    stores = [new_store(name) for name in ("whole", "cut")]
    for store, ends in zip(stores, ((None,), (4, 5, 6, None)), strict=True):
        for end in ends:
            trainer = Trainer(model, store, conversations, **MIXED)
            change_loss(trainer, {4, 5}, value)
            before = {n: store.cartridge(n) for n in store.rows()}
            trainer.run(until=end)
            if end in (5, 6):
                assert all(torch.equal(store.cartridge(n), kv) for n, kv in before.items())
    lines = log(stores[0])
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] + [2] * 7
    assert all((line["loss"] is None) == (not math.isfinite(value)) for line in lines[4:6])
    assert all(line["loss"] for line in (*lines[:4], *lines[6:]))
    assert contents(stores[0]) == contents(stores[1])
    assert stores[0].verify() == []
    rows = stores[0].rows().values()
    assert sum(r.steps for r in rows) == sum(len(line["targets"]) for i, line in enumerate(lines) if i not in (4, 5))


def test_a_cartridge_that_causes_skipped_steps_in_a_row_is_restored(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    """From its last checkpoint, moments too; others keep what they learned since."""
    store = new_store()
    settings = MIXED | {"pool": 2, "targets": 2, "rotate_every": 100, "checkpoint_every": 4}
    trainer = Trainer(model, store, conversations, **settings)
    trainer.run(until=4)
    checkpoint = contents(store)
    trainer = Trainer(model, store, conversations, **settings)
    change_loss(trainer, {6, 7, 8})  # trained at 4 and 5, then skipped three times, past a checkpoint at 8
    trainer.training = replace(trainer.training, checkpoint_every=100)
    trainer.run(until=9)
    after = contents(store)
    pool = store.run_state()["pool"]  # type: ignore[index]
    for name in checkpoint:
        assert after[name][1] == checkpoint[name][1]  # the same bytes, cartridge and moments
        assert after[name][0].steps == checkpoint[name][0].steps
        assert (after[name][0].drawn > checkpoint[name][0].drawn) == (name in pool)
    assert store.run_state()["rescue"] == {"skipped": 3, "in_a_row": 3, "back": 2, "spoilt": {}}  # type: ignore[index]
    trainer = Trainer(model, store, conversations, **settings)
    assert trainer.run() and all(store.rows()[name].steps > checkpoint[name][0].steps for name in pool)


@pytest.mark.parametrize(
    "changed", [{"lr": 0.03}, {"seed": 1}, {"pool": 4}, {"steps": 13}, {"distractor_gradients": False}]
)
def test_other_settings_are_refused(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, changed: dict[str, Any]
) -> None:
    store = new_store()
    Trainer(model, store, conversations, **MIXED).run(until=3)
    before = contents(store), log(store)
    name = next(iter(changed))
    with pytest.raises(
        ConfigError, match=rf"was begun with .*{name} .* \(now {changed[name]}\).*; go on with the same settings"
    ) as caught:
        Trainer(model, store, conversations, **(MIXED | changed)).run()
    assert "\n" not in str(caught.value)
    assert (contents(store), log(store)) == before
    Trainer(model, store, conversations, host_bytes=None, **(MIXED | {"checkpoint_every": 1})).run(
        until=4
    )  # not mathematics


def test_metrics_survive_a_torn_line(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    store = new_store()
    Trainer(model, store, conversations, **MIXED).run(until=5)
    file = store.folder / "metrics.jsonl"
    kept = file.read_bytes()
    extra = json.dumps({**json.loads(kept.splitlines()[-1]), "step": 5})
    file.write_bytes(kept + f"{extra}\n{extra[:20]}".encode())
    Trainer(model, store, conversations, **MIXED).run(until=5)
    assert file.read_bytes() == kept
    Trainer(model, store, conversations, **MIXED).run()
    assert [line["step"] for line in log(store)] == list(range(12))


def test_report(new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations) -> None:
    store, reports = new_store(), list[Report]()
    trainer = Trainer(model, store, conversations, on_step=reports.append, **MIXED)
    trainer.run()
    lines = log(store)
    for step, (report, line) in enumerate(zip(reports, lines, strict=True)):
        assert (report.step, report.steps, len(report.pool)) == (step, 12, 3)
        assert report.tokens_per_s > 0 and report.tokens > 0
        assert line["loss"] == report.loss and line["pool"] == 3 and len(line["targets"]) == 2
        assert set(line["targets"]) <= set(report.pool)
    # The first step of the first targets is already warmed up, by one of two: half of the four that each gets.
    assert reports[0].lr == pytest.approx(0.02 / 2) and MIXED["warmup"] == 3
    assert reports[-1].rotations > reports[0].rotations
    assert sum(r.drawn for r in store.rows().values()) == 12 * 4


# -- settings -----------------------------------------------------------------------------------------------------------


def test_epochs_are_passes_over_all_conversations(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    store = new_store()
    trainer = Trainer(model, store, conversations, epochs=3, pool=20, targets=2, per_target=2, max_distractors=2)
    assert (trainer.steps, trainer.schedule.pool) == (18, 6)  # 6 documents x 4 conversations x 3 / 4
    trainer.run()
    assert {row.drawn for row in store.rows().values()} == {12}
    assert Trainer(model, store, conversations, replace(trainer.training, steps=0, epochs=1)).steps == 0


def test_a_document_without_conversations_stays_as_initialised(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations
) -> None:
    some = Conversations([c for n, cs in conversations.by_document.items() if n != "doc-03" for c in cs], {})
    store = new_store()
    before = {name: store.cartridge(name) for name in store.rows()}
    with pytest.warns(UserWarning, match=r"^nothing to train on about doc-03: left as initialized$"):
        trainer = Trainer(model, store, some, epochs=4, pool=3, guests=3, targets=2, per_target=2)
    trainer.run()
    assert {n for n, row in store.rows().items() if not row.steps} == {"doc-03"}
    assert [n for n, kv in before.items() if torch.equal(kv, store.cartridge(n))] == ["doc-03"]
    with pytest.raises(ConfigError, match=r"^no conversations about the documents of this store; .*synthesis"):
        Trainer(model, store, Conversations([], {}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "mse"}, {"pool": 0}, {"targets": 0}, {"per_target": 0}, {"rotate_every": 0}, {"checkpoint_every": 0},
        {"isolation": 1.5}, {"isolation": -0.1}, {"rotate_fraction": 2.0}, {"max_distractors": -1}, {"guests": -1}, {"lr": 0.0},
        {"lr": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(
    new_store: Callable[..., Store], model: FrozenModel, conversations: Conversations, wrong: dict[str, Any]
) -> None:
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(ConfigError, match=rf"^--{name} .*"):
        Training(**wrong)
