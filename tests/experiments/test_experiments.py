"""What the arms of experiments put before the model, and joint against isolated training from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS
from helpers_store import converse

from cas.answering import prompts as prompting
from cas.data.collection import Collection, Document, Question
from cas.errors import ConfigError
from cas.evaluation import check
from cas.evaluation.answers import prompt_groups, run_arms, unseen_questions
from cas.evaluation.arms import FULL_DOCUMENT, Arm
from cas.model.decoding import generate, log_likelihood
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.seed_prompts import BRIEF
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from experiments.claims import joint_vs_isolated
from experiments.claims.joint_vs_isolated import Config, excerpts, experiment
from retrieval import HashEmbedder, with_title


@pytest.fixture
def store(tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection) -> Store:
    store = Store.create(tmp_path / "store", tiny("llama"), tokens=16)
    store.add_documents(collection, tiny("llama").count_tokens)
    initialize_cartridges(tiny("llama"), store)
    return store


def test_a_shared_text_is_the_plain_prompt(
    tiny: Callable[..., FrozenModel], collection: Collection, store: Store
) -> None:
    """``full_document`` reads a document once for all its questions; the truth reads it with every question."""
    model = tiny("llama")
    found = list(prompt_groups(model, store, collection, collection.questions, FULL_DOCUMENT, {}))
    assert sorted(q.id for about, *_ in found for q in about) == sorted(q.id for q in collection.questions)
    for about, prompts, loaded, layout in found:
        for question, prompt in zip(about, prompts, strict=True):
            texts = [with_title(d.title, d.text) for d in map(collection.__getitem__, sorted(question.document_ids))]
            plain = prompting.text_context(model, question.question + BRIEF, texts)
            answer = generate(model, [plain], {}, layout, max_new_tokens=12)[0]
            assert generate(model, [prompt], loaded, layout, max_new_tokens=12)[0].ids == answer.ids
            gold = [model.encode(question.answers[0])]
            shared = log_likelihood(model, [prompt], gold, loaded, layout)
            assert shared == pytest.approx(log_likelihood(model, [plain], gold, {}, layout), abs=1e-4)


def test_what_every_arm_loads(tiny: Callable[..., FrozenModel], collection: Collection, store: Store) -> None:
    model, questions = tiny("llama"), collection.questions

    def prompts(name: str) -> list[Any]:
        arm = Arm.parse(name)
        [(_, prompts, _, layout)] = prompt_groups(model, store, collection, questions, arm, {}, HashEmbedder())
        assert layout == store.layout
        return prompts

    behind = [model.question_tokens(q.question + BRIEF) for q in questions]
    assert [p.tokens for p in prompts("no_context")] == behind and not any(p.cartridges for p in prompts("no_context"))
    assert [p.cartridges for p in prompts("oracle")] == [q.document_ids for q in questions]
    assert {p.cartridges for p in prompts("loaded")} == {tuple(sorted(TEXTS))}
    assert all(len(p.cartridges) == 2 for p in prompts("retrieved2"))
    for arm in ("loaded3", "loaded3_nearest", "absent2"):
        for prompt, question in zip(prompts(arm), questions, strict=True):
            assert prompt.cartridges == tuple(sorted(set(prompt.cartridges))) and len(prompt.cartridges) == int(arm[6])
            assert (set(question.document_ids) <= set(prompt.cartridges)) == arm.startswith("loaded")
            assert arm.startswith("loaded") or not set(question.document_ids) & set(prompt.cartridges)
    assert [p.cartridges[::-1] for p in prompts("loaded3_reversed")] == [p.cartridges for p in prompts("loaded3")]
    assert {p.cartridges for p in prompts("loaded3")} != {p.cartridges for p in prompts("loaded3_nearest")}
    fewer = [len(p.tokens) - len(tokens) for p, tokens in zip(prompts("rag"), behind, strict=True)]
    for prompt, tokens, few in zip(prompts("rag20"), behind, fewer, strict=True):
        assert few <= len(prompt.tokens) - len(tokens) <= 3 * 4 * 16 + 2 * 10
    for prompt, tokens in zip(prompts("rag"), behind, strict=True):
        assert prompt.tokens[-len(tokens) :] == tokens
        assert 0 < len(prompt.tokens) - len(tokens) <= 4 * 16 + 2 * 3  # as many as four cartridges, and blank lines


def test_predictions_stand_in_the_order_of_the_questions(
    tiny: Callable[..., FrozenModel], collection: Collection, store: Store
) -> None:
    mixed = replace(collection.questions[0], id="q-again")
    questions = (*collection.questions, mixed)
    found = run_arms(tiny("llama"), store, collection, questions, (FULL_DOCUMENT,), prefix="x_", max_new_tokens=4)
    assert [p["question_id"] for p in found] == [q.id for q in questions]
    assert {p["arm"] for p in found} == {"x_full_document"}
    assert found[0]["scores"] == pytest.approx(found[-1]["scores"], abs=1e-4)


def test_excerpts_keep_the_questions_about_them() -> None:
    text = "The crane is red.\n\nThe ferry is blue.\n\nThe crane was built in 1902."
    asked = ["red", "blue", "1902", "red"]
    questions = [Question(f"q{i}", ("d",), "?", ("never said", answer)) for i, answer in enumerate(asked)]
    questions.append(Question("two", ("d", "e"), "?", ("red",)))
    whole = Collection("c", (Document("d", "D", text), Document("e", "E", "Nothing.")), tuple(questions))
    cut = excerpts(whole, 8)
    assert cut["d"].text == "The crane is red.\n\nThe ferry is blue." and cut["e"].text == "Nothing."
    assert [q.id for q in cut.questions] == ["q0", "q1"]  # q3 is asked after one about what is cut off
    assert excerpts(whole, 1)["d"].text == "The crane is red." and len(excerpts(whole, 99).questions) == 4
    assert cut.hash != whole.hash


def test_joint_against_isolated_from_end_to_end(
    tmp_path: Path,
    tiny: Callable[..., FrozenModel],
    collection: Collection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, output = tiny("llama"), tmp_path / "run"
    monkeypatch.setattr(FrozenModel, "from_pretrained", classmethod(lambda cls, *_, **__: model))
    monkeypatch.setattr(Collection, "load", staticmethod(lambda *_, **__: collection))
    monkeypatch.setattr(
        "cas.selfstudy.synthesize.synthesize", lambda model, chosen, *_, **__: converse(model, chosen, 12)
    )
    monkeypatch.setattr("cas.evaluation.answers.open_index", lambda store, _: opened(store, HashEmbedder()))
    from cas.answering.answerer import open_index as opened

    config = Config(
        output=str(output),
        collection="tiny",
        shortest=3,
        ratio=2,
        lrs=(1e-3, 1e-2),
        search_epochs=1,
        epochs=3,
        pool=2,
        targets=2,
        per_target=2,
    )
    with pytest.raises(ConfigError, match=r"joint arm is not trained yet.*--train joint"):
        experiment(replace(config, train="none"))
    for arm in ("joint", "isolated"):  # each in its own process, as it were
        assert experiment(replace(config, train=arm)) == 0  # type: ignore[arg-type]
    assert experiment(replace(config, train="none")) == 0
    chosen = sorted(TEXTS, key=lambda name: (len(TEXTS[name]), name))[:3]
    records = {arm: json.loads((output / f"{arm}.json").read_text()) for arm in ("joint", "isolated")}
    for arm, record in records.items():
        assert set(record["trials"]) == {"0.001", "0.01"} and record["lr"] in (1e-3, 1e-2)
        assert record["lr"] == min((1e-3, 1e-2), key=lambda lr: record["trials"][f"{lr:g}"]["loaded"])
        store = Store.open(output / record["store"])
        assert list(store.rows()) == sorted(chosen) and all(row.steps for row in store.rows().values())
        store.close()
        assert arm in record["store"]
    # Equal tokens, but other cartridges: the isolated ones never saw a distractor.
    assert records["joint"]["trained_tokens"] == records["isolated"]["trained_tokens"] > 0
    kv = [Store.open(output / r["store"]).cartridge(chosen[0]) for r in records.values()]
    assert not torch.equal(*kv)
    results = json.loads(next(output.glob("results/**/results.json")).read_text())
    assert (
        results["metrics"]["joint_loaded.f1"]["n"] == 3
        and "joint_loaded_minus_isolated_loaded.f1" in results["metrics"]
    )
    assert "answer" not in next(output.glob("results/**/predictions.jsonl")).read_text()
    assert str(tmp_path) not in results["command"] and "--shortest 3" in results["command"]
    assert check.main([str(next(output.glob("results/**/results.json")).parent)]) == 0
    assert "joint_loaded" in capsys.readouterr().out


def test_held_out_conversations_are_not_trained(tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    everything = converse(tiny("llama"), collection, per_document=25)
    training, held_out = joint_vs_isolated.split(everything)
    assert {len(v) for v in training.by_document.values()} == {22} and {
        len(v) for v in held_out.by_document.values()
    } == {3}
    asked = {id(c) for v in training.by_document.values() for c in v}
    assert not asked & {id(c) for v in held_out.by_document.values() for c in v}


def test_questions_of_the_self_study_are_not_asked(tiny: Callable[..., FrozenModel], collection: Collection) -> None:
    one = converse(tiny("llama"), collection, per_document=1).by_document["pump"][0]
    seen = replace(one, question=f" {collection.questions[0].question.upper()} ")
    assert unseen_questions(collection.questions, Conversations([seen], {})) == list(collection.questions[1:])


# -- collapse and rescue -----------------------------------------------------------------------------------------------


def test_validation_questions_are_others_than_test_questions_and_of_the_same_kinds() -> None:
    from cas.data.worlds import world
    from experiments.claims.collapse_and_rescue import Config, validation

    config = Config(documents=20, collection_seed=3)
    tested = world(5, 20).questions
    checked = validation(config, 2)
    assert checked == validation(config, 2) != validation(config, 1)
    shares = {kind: sum(q.kind == kind for q in checked) for kind in {q.kind for q in tested}}
    assert shares == {"lookup": 128, "indirect": 64, "whole document": 32, "two documents": 32}
    # Of one document two questions with the same words ask for the same.
    wordings = {(i, q.question) for q in tested for i in q.document_ids}
    assert not wordings & {(q.document_ids[0], q.question) for q in checked}
    texts = {d.id: d.text for d in world(5, 20).documents}
    facts = [q for q in checked if q.kind in ("lookup", "indirect")]
    assert sum(q.answers[0] in texts[q.document_ids[0]] for q in facts) > 0.9 * len(facts)
    assert all(len(q.document_ids) == (2 if q.kind == "two documents" else 1) for q in checked)


def test_predictions_get_the_names_of_the_claims() -> None:
    from experiments.claims.collapse_and_rescue import CLAIMS, PARTS, rename_arms

    kinds = ["lookup"] * 4 + ["indirect"] * 2 + ["whole document"] * 2 + ["two documents"]
    questions = [Question(f"q{n}", ("d",), "Who?", ("x",), None, kind) for n, kind in enumerate(kinds)]
    arms = ("joint_retrieved4_hybrid", "joint_retrieved4", "rag40_hybrid", "monolithic_loaded")
    given: list[Any] = [
        {"arm": arm, "seed": 7, "question_id": q.id, "document_id": "d", "scores": {"exact_match": 1.0}, "answer": "x"}
        for arm in arms
        for q in questions
    ]
    found = rename_arms(given, questions, ["d"], 7)
    counts = {arm: sum(p["arm"] == arm for p in found) for arm in {p["arm"] for p in found}}
    assert counts["rag"] == counts["monolithic"] == counts["joint_retrieved4"] == counts["joint_retrieved4_dense"] == 9
    assert [counts[f"rag{part}"] for part in PARTS] == [4, 2, 2, 1, 6, 9]
    assert not any(p["arm"].endswith("_sixteen") for p in rename_arms(given, questions, ["e"], 7))
    assert {p["question_id"] for p in found if p["arm"] == "rag_thirds"} == {
        p["question_id"] for p in found if p["arm"] == "joint_retrieved4_thirds"
    }
    assert all(p["question_id"].startswith("7/") and p["document_id"] == "7/d" for p in found)
    assert all(side in ("least", "most") for _, side, _ in CLAIMS)


def test_a_folder_is_gone_on_with_under_its_settings_alone(tmp_path: Path) -> None:
    from cas.evaluation.resume import check_settings
    from experiments.claims.collapse_and_rescue import Config, settings_of

    config = Config(output=str(tmp_path / "run"), seeds=(0,), questions=20)
    folder = Path(config.output)
    check_settings(folder, settings_of(config))
    check_settings(folder, settings_of(replace(config, seeds=(0, 1, 2))))
    for other in ({"questions": None}, {"ratio": 8.0}, {"lrs": (0.03,)}, {"seeds": (1,)}):
        with pytest.raises(ConfigError, match="was begun with another"):
            check_settings(folder, settings_of(replace(config, **other)))  # type: ignore[arg-type]
