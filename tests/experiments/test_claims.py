"""The claims: every file is whole, verdicts look at the whole interval, trainings are shared and made once."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_store import converse

from cas.errors import ConfigError
from cas.evaluation import check
from cas.evaluation.recording import Prediction
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.synthesize import synthesize
from experiments.claims import lab as claims
from experiments.claims.equal_arms import equal_arms
from experiments.claims.lab import NAMES, Claim, ClaimContext, Config, Criterion, cell, key, load, report, run
from experiments.claims.outlook import outlook
from retrieval import HashEmbedder

DOCS = Path(__file__).parents[2] / "docs"


def test_a_verdict_is_on_the_whole_interval() -> None:
    for side, low, high, verdict in (
        ("least", 3, 9, "confirmed"),
        ("least", 1, 9, "undecided"),
        ("least", -1, 1, "contradicted"),
        ("most", -1, 1, "confirmed"),
        ("most", 1, 3, "undecided"),
        ("most", 3, 9, "contradicted"),
        ("least", 2, 2, "contradicted"),  # as good is not better
        ("most", 2, 2, "confirmed"),
    ):
        figures = {"a_minus_b.exact_match": {"mean": (low + high) / 2, "low": low, "high": high, "n": 4}}
        assert Criterion("", "a_minus_b", side, 2).verdict(figures) == verdict
    assert cell({"mean": 12.34, "low": 1, "high": 20}) == "12.3 [1.0, 20.0]"
    assert cell({"mean": 0.123, "low": 0.1, "high": 0.2}) == "0.12 [0.10, 0.20]"


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_says_only_what_it_compares(name: str) -> None:
    claim = load(name)
    assert claim.name == name and claim.title and re.search(r"\d{4}\.\d{5}", claim.paper)
    if claim.not_run:
        return
    figures = [figure for _, figure in claim.table] + [s.figure for s in claim.criteria]
    differences = {tuple(f.split("_minus_")) for f in figures if "_minus_" in f}
    assert differences <= {*claim.compare}
    assert claim.criteria and all(s.side in ("least", "most") for s in claim.criteria)
    assert len({label for label, _ in claim.table}) == len(claim.table) == len({f for _, f in claim.table})


def test_at_most_three_claims_are_not_run() -> None:
    assert sum(bool(load(name).not_run) for name in NAMES) <= 3
    with pytest.raises(ConfigError, match="there is no claim speed; choose from compression"):
        load("speed")


def test_the_page_follows_from_the_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("make_results")
    assert page.PAGE.read_text(encoding="utf-8") == page.text()


@pytest.fixture
def lab(tmp_path: Path, tiny: Callable[..., FrozenModel], monkeypatch: pytest.MonkeyPatch) -> ClaimContext:
    """A small world of a model that knows nothing, whose self-study is made up."""
    model = tiny("llama")

    def made_up(model: FrozenModel, documents: Any, store: Any, *_: Any, **__: Any) -> Conversations:
        store.add_documents(documents, model.count_tokens)
        return converse(model, documents, per_document=8)

    monkeypatch.setattr(claims, "synthesize", made_up)
    monkeypatch.setattr(claims, "SentenceEmbedder", HashEmbedder)
    assert synthesize is not claims.synthesize
    config = Config(output=str(tmp_path), documents=4, seeds=(0, 1), epochs=1.0, questions=6, ratio=64.0)
    return ClaimContext(config, model, 0)


def test_a_training_is_made_once_whoever_asks(lab: ClaimContext) -> None:
    with lab.trained("joint", pool=3, targets=2, per_target=4) as store:
        first = {i: store.cartridge(i) for i in store.rows()}
        assert any(row.steps for row in store.rows().values())
    steps = len(lab.log("joint"))
    assert steps == 4
    again = replace(lab)
    with again.trained("joint", pool=3, targets=2, per_target=4) as store:
        assert all((store.cartridge(i) == kv).all() for i, kv in first.items())
    assert len(again.log("joint")) == steps
    with pytest.raises(ConfigError, match="begun with"), lab.trained("joint", pool=2, targets=2, per_target=4):
        pass
    # A curve stops on the way to the same end.
    with lab.trained("curve", until=2, pool=3, targets=2, per_target=4) as store:
        assert len(lab.log("curve")) == 2
    with lab.trained("curve", pool=3, targets=2, per_target=4) as store:
        assert all((store.cartridge(i) == kv).all() for i, kv in first.items())
    # The same starts: the base store's, copied.
    with closing(lab.initialized("untrained")) as started, closing(lab._store("base")) as base:
        assert all((started.cartridge(i) == base.cartridge(i)).all() for i in base.rows())


def test_a_claim_is_run_written_and_gone_on_with(lab: ClaimContext, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def body(lab: ClaimContext) -> list[Prediction]:
        calls.append(lab.seed)
        lab.measure("steps.each", [1.0, 3.0])
        with lab.trained("joint", pool=3, targets=2, per_target=4) as store:
            return lab.ask(store, "", ["oracle", "no_context"], max_new_tokens=4)

    shown = [Criterion("nothing is known", "oracle", "most", 50), Criterion("steps", "steps.each", "least", 5)]
    table = [("own", "oracle"), ("steps", "steps.each")]
    claim = Claim("order", "Order", "said in 2606.04557", "", body, table, shown, [("oracle", "no_context")])
    found = run(claim, lab.config, lab.model)
    assert calls == [0, 1] and found["seeds"] == [0, 1]
    assert found["measurements"]["steps.each"]["mean"] == 2.0 and found["measurements"]["steps.each"]["n"] == 4
    folder = Path(lab.config.output) / "order" / "results"
    assert not [complaint for _, complaint in check.check_run(folder) if complaint]
    line = json.loads((folder / "predictions.jsonl").read_text().splitlines()[-1])
    assert line["question_id"].startswith("1/") and [*line["scores"]] == ["exact_match"]
    said = capsys.readouterr().out
    assert (
        "CONFIRMED: nothing is known" in said
        and "CONTRADICTED: steps" in said
        and said.strip() == report(claim, found).strip()
    )
    run(claim, lab.config, lab.model)
    assert calls == [0, 1]
    with pytest.raises(ConfigError, match="begun with another lr"):
        run(claim, replace(lab.config, lr=0.5), lab.model)
    assert key("oracle") == "oracle.exact_match" and key("steps.each") == "steps.each"


def test_a_killed_claim_goes_on_with_the_seed_it_was_at(lab: ClaimContext) -> None:
    calls: list[int] = []

    def body(lab: ClaimContext) -> list[Prediction]:
        calls.append(lab.seed)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        with lab.trained("joint", pool=3, targets=2, per_target=4, steps=2) as store:
            return lab.ask(store, "", ["oracle"], max_new_tokens=2)

    claim, output = Claim("order", "Order", "", "", body, [("own", "oracle")], []), lab.config.output
    assert outlook(output, ["order"], (0, 1))[0].split() == ["order", "0", "of", "2", "seeds", "done"]
    assert outlook(output, ["order"], (0, 1))[-1].startswith("no seed is timed in this folder yet")
    with pytest.raises(KeyboardInterrupt):
        run(claim, lab.config, lab.model)
    file = Path(output) / "order" / "seed-0.json"
    assert [f.name for f in file.parent.iterdir()] == ["seed-0.json"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 600.0}))
    lines = outlook(output, ["order", "pool"], (0, 1))
    assert lines[0].endswith("1 of 2 seeds done, about 10 min to go") and lines[1].endswith("about 20 min to go")
    assert lines[2].startswith("about 30 min to go in all")
    run(claim, lab.config, lab.model)
    assert calls == [0, 1, 1]
    assert json.loads((file.parent / "seed-1.json").read_text())["seconds"] > 0
    (file.parent / "seed-1.json").write_text("{}")  # of an earlier version, which did not time it
    assert outlook(output, ["order"], (0, 1))[0].endswith("2 of 2 seeds done")


def test_arms_that_are_equal_by_construction_raise_an_alarm(
    lab: ClaimContext, capsys: pytest.CaptureFixture[str]
) -> None:
    """Isolated training never looks at ``max_distractors``: the difference is exactly zero, and says nothing."""

    def body(lab: ClaimContext) -> list[Prediction]:
        predictions: list[Prediction] = []
        for name, options in (("one", {"max_distractors": 1}), ("two", {"max_distractors": 2}), ("other", {"lr": 0.5})):
            settings: dict[str, Any] = {"pool": 3, "targets": 2, "per_target": 4, "isolation": 1.0, **options}
            with lab.trained(name, **settings) as store:
                predictions += lab.ask(store, f"{name}_", ["oracle"], max_new_tokens=4)
        return predictions

    compare = [("one_oracle", "two_oracle")]
    criteria = [
        Criterion("distractors", "one_oracle_minus_two_oracle", "most", 0),
        Criterion("", "one_oracle", "most", 50),
    ]
    claim = Claim("order", "Order", "", "", body, [("own", "one_oracle")], criteria, compare)
    found = run(claim, lab.config, lab.model)
    figure = found["metrics"]["one_oracle_minus_two_oracle.exact_match"]
    assert figure["mean"] == figure["low"] == figure["high"] == 0
    said = capsys.readouterr().out
    assert said.count("- ARMS ARE EQUAL BY CONSTRUCTION?") >= 2 and "CONFIRMED: distractors" not in said
    assert "- ARMS ARE EQUAL BY CONSTRUCTION? one_oracle and two_oracle: every answer is the same" in said
    loaded = json.loads((Path(lab.config.output) / "order" / "seed-1.json").read_text())["loaded"]
    assert loaded["one_oracle"] == loaded["two_oracle"] != loaded["other_oracle"]
    assert ["one_oracle", "two_oracle"] in [list(pair) for pair in found["settings"]["equal_arms"]]
    on_disk = json.loads((Path(lab.config.output) / "order" / "results" / "results.json").read_text())
    assert report(claim, on_disk) == report(claim, found)


def test_equal_answers_from_other_cartridges_are_a_result() -> None:
    """A difference of zero is an alarm only where nothing that was loaded differs, in any seed."""
    answers: list[Prediction] = [
        {"arm": arm, "seed": 0, "question_id": q, "document_id": "d", "scores": {"exact_match": 1.0}, "answer": "x"}
        for arm in "abcde"
        for q in ("0/q", "1/q")
    ]
    answers[-1] = {**answers[-1], "answer": "y"}  # one answer of e, as wrong or right as the others
    loaded = [{arm: {"d": 1} for arm in "abce"}, {"a": {"d": 1}, "b": {"d": 1}, "c": {"d": 2}, "e": {"d": 1}}]
    pairs = [("a", "b"), ("a", "c"), ("a", "d"), ("a", "e")]
    assert equal_arms(answers, loaded, pairs) == [("a", "b"), ("a", "d")]  # of d nothing is known


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_claim_runs(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With next to no training: figures of any height."""
    claim = load(name)
    if claim.not_run:
        pytest.skip(claim.not_run)
    folder = tmp_path_factory.getbasetemp() / "claims"
    found = run(claim, Config(output=str(folder), seeds=(0,), epochs=0.05, questions=16))
    figures = {**found["metrics"], **found["measurements"]}
    assert all(key(figure) in figures for _, figure in claim.table)
