"""Does it learn? A few documents of a small world, the reader in this package, the functions that users call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cas.data.collection import Collection, Question, save_jsonl
from cas.data.worlds import LOOKUP, Shape, make_records, single, world
from cas.evaluation.metrics import exact_match
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.seed_prompts import normal
from cas.selfstudy.synthesize import synthesize
from cas.store.store import Store
from cas.training.trainer import Trainer, Training

SMALL = Shape(people=(3, 3), facts=(3, 3), place_facts=(3, 3), event_facts=(0, 0), filler=0.1, indirect=0.2)


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return FrozenModel.from_pretrained("reader", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def small() -> Collection:
    """Four documents of a dozen facts, with every fact as a question in test wordings."""
    records = [record for pair in range(2) for record in make_records("learning", pair, SMALL)]
    questions = [
        Question(f"{r.document.id}/{n}", (r.document.id,), a.tests[n % len(a.tests)], (a.answer,), None, a.kind)
        for r in records
        for n, a in enumerate(single(r))
    ]
    return Collection("small", tuple(r.document for r in records), tuple(questions))


def right(model: FrozenModel, store: Store, questions: Sequence[Question], loaded: dict[str, tuple[str, ...]]) -> float:
    """Exact match of whole answers with these cartridges loaded."""
    kv = {i: store.cartridge(i).to(model.dtype) for i in {i for some in loaded.values() for i in some}}
    prompts = [Prompt(model.question_tokens(q.question), loaded[q.document_ids[0]]) for q in questions]
    answers = [model.answer_text(g.ids) for g in generate(model, prompts, kv, store.layout, max_new_tokens=12)]
    return sum(exact_match(a, q.answers) for a, q in zip(answers, questions)) / len(questions)


@pytest.fixture(scope="module")
def conversations(model: FrozenModel, small: Collection, tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    store = Store.create(tmp_path_factory.mktemp("study"), model, tokens=32)
    study = SelfStudy(kinds=("question", "structuring", "use case", "creative"))
    found = synthesize(model, small, store, study)
    store.close()
    return found


def asked(
    model: FrozenModel, small: Collection, conversations: Conversations, folder: Path, start: str, **training: float
) -> tuple[float, float]:
    """Exact match with the own cartridge and with all four loaded, after this training."""
    store = Store.create(folder, model, tokens=32, initialisation=start)
    store.add_documents(small, model.count_tokens)
    Trainer(model, store, conversations, Training(pool=4, **training)).run()  # type: ignore[arg-type]
    ids = tuple(sorted(d.id for d in small.documents))
    own = right(model, store, small.questions, {i: (i,) for i in ids})
    every = right(model, store, small.questions, dict.fromkeys(ids, ids))
    store.close()
    return own, every


def test_cartridges_learn_their_documents_and_joint_training_keeps_them_apart(
    model: FrozenModel, small: Collection, conversations: Conversations, tmp_path: Path
) -> None:
    """The paper's collapse and rescue in small: the same steps, alone and together, where distractors learn too."""
    joint = asked(model, small, conversations, tmp_path / "joint", "first", steps=150, distractor_gradients=True)
    alone = asked(model, small, conversations, tmp_path / "alone", "first", steps=150, isolation=1)
    none = right(
        model, Store.open(tmp_path / "joint"), small.questions, dict.fromkeys([d.id for d in small.documents], ())
    )
    assert none <= 0.1
    assert joint[0] >= 0.7
    assert joint[1] >= 0.6
    assert alone[0] >= 0.7
    assert joint[1] >= alone[1] + 0.1


def test_matched_starts_answer_before_they_are_trained(
    model: FrozenModel, small: Collection, conversations: Conversations, tmp_path: Path
) -> None:
    start = asked(model, small, conversations, tmp_path / "start", "matched", steps=0)
    after = asked(model, small, conversations, tmp_path / "after", "matched", steps=50)
    assert min(start) >= 0.9
    assert min(after) >= 0.9


def test_no_self_study_question_is_a_test_question(model: FrozenModel, tmp_path: Path) -> None:
    collection = world(11, 4)
    store = Store.create(tmp_path / "s", model, ratio=16)
    conversations = synthesize(model, collection, store, SelfStudy(conversations=200))
    asked = {normal(c.question) for some in conversations.by_document.values() for c in some}
    tested = {normal(q.question) for q in collection.questions}
    assert len(asked) > 150 and not asked & tested and LOOKUP in {q.kind for q in collection.questions}
    store.close()


def test_an_exported_world_trains_to_the_same_bits(model: FrozenModel, tmp_path: Path) -> None:
    """Self-study and training see the text alone: nothing comes from the generator but documents."""
    made = world(12, 2)
    save_jsonl(made, tmp_path / "exported")
    found = []
    for name, collection in (("made", made), ("read", Collection.load(tmp_path / "exported" / "documents.jsonl"))):
        store = Store.create(tmp_path / name, model, ratio=32)
        conversations = synthesize(model, collection, store, SelfStudy(conversations=40))
        Trainer(model, store, conversations, Training(steps=6, pool=2)).run()
        found.append([store.cartridge(d.id) for d in made.documents])
        store.close()
    assert all(bool((a == b).all()) for a, b in zip(*found))


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(model: FrozenModel, small: Collection, tmp_path: Path) -> None:
    """The loss curves over the same conversations, a tenth of the run at a time."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        computes = model if dtype == "float32" else FrozenModel.from_pretrained("reader", dtype=dtype, device="cpu")
        store = Store.create(tmp_path / dtype, computes, tokens=32)
        if dtype == "float32":
            conversations = synthesize(computes, small, store, SelfStudy())
        store.add_documents(small, model.count_tokens)
        Trainer(computes, store, conversations, Training(steps=200, pool=4)).run()
        lines = (store.folder / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line)["loss"] for line in lines]
        losses.append([sum(found[i : i + 20]) / 20 for i in range(0, 200, 20)])
        store.close()
    assert losses[0][-1] < losses[0][0] / 3
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.01)
